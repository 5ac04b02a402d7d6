"""A training by torchrun of which one process is killed: it is started again, and goes on from its checkpoint."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from path_attention.training.trainer import COMPLETE, METRICS, read_metrics


@dataclass(frozen=True)
class Plan:
    """A training on flip-flop language modelling. Rates are low enough that rounding, where a device adds up in no
    fixed order, does not grow into another training.
    """

    model: dict[str, Any]
    length: int
    sequences_each: int  # of a step, for each process
    steps: int
    every: int  # steps between checkpoints
    learning_rate: float
    precision: str
    limit: float  # seconds that a training may take, the restart included

    def recipe(self, ranks: int, device: str) -> dict[str, Any]:
        """For so many processes."""
        return {
            "name": NAME,
            "mixers": [MIXER],
            "task": {"name": "flip_flop", "length": self.length},
            "model": self.model,
            "training": {
                "steps": self.steps,
                "batch_size": self.sequences_each * ranks,
                "learning_rate": self.learning_rate,
                "warmup_steps": self.every,
                "log_every": self.every,
                "save_every": self.every,
                "precision": self.precision,
                "parallel": {"strategy": "fsdp"},
                "device": "auto" if device == "cuda" else "cpu",
            },
            "evaluation": {"answers": 100, "batch_size": 8},
        }


NAME, MIXER = "restart", "path"
# Starting processes is most of the time.
TINY = Plan(
    model={"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128},
    length=64, sequences_each=4, steps=40, every=5, learning_rate=1e-3, precision="float32", limit=240.0
)  # fmt: skip
# The layers of the paper's model, PaTHConfig's defaults. A checkpoint has 8 GB, and writing it is most of the time.
PAPER = Plan(
    model={}, length=2048, sequences_each=4, steps=16, every=4, learning_rate=1e-5, precision="bfloat16", limit=400.0
)
# Relative, of a logged loss. On CPUs there is none.
TOLERANCE = 1e-2
# What torchrun is told. By default its processes meet in a store that still has the addresses of those before the
# restart, where they fail to meet (torch 2.13); and processes that wait in NCCL for the one that is gone, and hear no
# signal, are given 30 seconds.
ENVIRONMENT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "10"}


def scenario(ranks: int, device: str, plan: Plan = TINY) -> dict[str, Any]:
    """The losses of a disturbed training beside those of an undisturbed one, and the seconds lost."""
    with tempfile.TemporaryDirectory(prefix="path-attention-") as folder:
        calm = Training(Path(folder) / "calm", ranks, device, plan)
        calm_seconds = calm.wait(None)
        losses = calm.losses()
        shutil.rmtree(calm.folder)  # checkpoints of a large model fill disks
        disturbed = Training(Path(folder) / "disturbed", ranks, device, plan)
        seconds = disturbed.wait(ranks - 1)
        found = _compare(plan, losses, disturbed.losses())
    found |= {"killed_rank": ranks - 1, "killed_after_step": disturbed.killed_at, "tolerance": TOLERANCE}
    found |= {"seconds": round(seconds, 1), "seconds_undisturbed": round(calm_seconds, 1)}
    if disturbed.failure or calm.failure:
        return found | {"wrong": disturbed.failure or calm.failure}
    text = f"rank {ranks - 1} killed after step {disturbed.killed_at}, {plan.steps} steps all the same"
    return found | {"found": f"{text}; losses differ by {found['largest_difference']:.1e} at most"}


def _compare(plan: Plan, calm: dict[int, float], disturbed: dict[int, float]) -> dict[str, Any]:
    if calm.keys() != disturbed.keys() or max(calm, default=0) != plan.steps:
        return {"wrong": f"steps {sorted(disturbed)} were logged, undisturbed {sorted(calm)}"}
    largest = max(abs(disturbed[step] - loss) / loss for step, loss in calm.items())
    found: dict[str, Any] = {"steps": plan.steps, "largest_difference": largest, "last_loss": disturbed[plan.steps]}
    return found if largest <= TOLERANCE else found | {"wrong": f"losses differ by {largest:.1e}"}


class Training:
    """One run of torchrun in a folder of its own."""

    def __init__(self, folder: Path, ranks: int, device: str, plan: Plan = TINY) -> None:
        folder.mkdir()
        self.folder, self.limit, self.killed_at, self.failure = folder, plan.limit, None, ""
        file = folder / "restart.yaml"
        file.write_text(yaml.safe_dump(plan.recipe(ranks, device)), encoding="utf-8")
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command = [*launch, "--max-restarts=1", "-m", "path_attention", "train", str(file), "--runs", str(folder)]
        self.log = folder / "log.txt"
        self.started = time.monotonic()
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                command, env=os.environ | ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def run(self) -> Path:
        return self.folder / NAME / MIXER

    def wait(self, kill: int | None) -> float:
        """For its end; seconds. Kills the process of this rank once there is a checkpoint."""
        try:
            while self.process.poll() is None:
                if time.monotonic() - self.started > self.limit:
                    self.failure = f"no end after {self.limit:.0f} s"
                    break
                if kill is not None and self.killed_at is None and self._complete():
                    self._kill(kill)
                time.sleep(0.02)
        finally:
            self._end()
        if not self.failure and self.process.returncode != 0:
            last = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-1:]
            self.failure = f"torchrun ended with exit code {self.process.returncode}: {' '.join(last)[:300]}"
        if not self.failure and kill is not None and self.killed_at is None:
            self.failure = "it ended before a process could be killed"
        return time.monotonic() - self.started

    def _complete(self) -> list[int]:
        return sorted(int(p.parent.name.rpartition("-")[2]) for p in self.run.glob(f"checkpoint-*/{COMPLETE}"))

    def _kill(self, rank: int) -> None:
        """As the fault of a machine would: without a word. torchrun's own children are looked at alone."""
        for pid in _children(self.process.pid):
            if _rank(pid) == rank:
                os.kill(pid, signal.SIGKILL)
                self.killed_at = self._complete()[-1]  # type: ignore[assignment]
                return

    def _end(self) -> None:
        """Nothing of it stays: torchrun ends its processes when it is told to, and is waited for."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)  # a session of our own: these processes and no others
                self.process.wait()

    def losses(self) -> dict[int, float]:
        return {entry["step"]: entry["loss"] for entry in read_metrics(self.run / METRICS) if "loss" in entry}


def _children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(x) for x in found.read_text().split()] if found.exists() else []


def _rank(pid: int) -> int | None:
    """Of a process of torchrun, by its environment."""
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None  # it has ended meanwhile
    values = [x.removeprefix(b"RANK=") for x in environment if x.startswith(b"RANK=")]
    return int(values[0]) if values else None


if __name__ == "__main__":
    print(json.dumps(scenario(int(sys.argv[1]), sys.argv[2], PAPER if "paper" in sys.argv[3:] else TINY), indent=1))
