"""Whole language models by mixer: tokens a second of a training step, and one pass over a long sequence.

    python benchmarks/language_model.py --out results/NAME.json

The models are those of the paper's size (760M, 24 layers of 24 heads x 64), with random weights; RoPE's attention is
cuDNN's, where it serves. A training step is forward, backward, clipping and AdamW under bfloat16 autocast with float32
weights, layers and loss compiled as `training.compile` does it, on random tokens; both passes are recorded as
`training.cuda_graphs` does it: else small models would be timed by how fast a CPU launches their kernels. The long pass
is that of the evaluation by position: no gradient, the loss of every token, logits of some thousand tokens at a time.

What is wanted most comes first: rope and path, their long passes, then the others. Training steps of rope are measured
before and after those that are compared with it, and again where a later call goes on: how far its numbers are apart is
what differences may owe to the machine, and ratios are those to rope in the same call. A model whose first loss is not
that of random guessing, or whose step is not finite, is not timed.

--mixers rope,path,path_kept has the training step of path with training.recompute_attention=false too, which takes less
time and more memory.

--mixers rope,path,fla has flash-linear-attention's PaTH model too, where it is installed: training steps alone, as it
comes, with its own fused modules, neither compiled nor recorded, because its operator leaves torch.compile.

OUT is written after every row, and the same command goes on with those that it has not: about six minutes in all on an
H100. --time-limit begins no row after so many seconds. --size tiny --device cpu tries the script out.
"""

import argparse
import gc
import importlib.util
import json
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from path_attention.benchmark import fla_decode, results_file
from path_attention.benchmark.measure import environment
from path_attention.evaluation.perplexity import precision_context, token_losses
from path_attention.evaluation.tables import NAMES
from path_attention.models import PaTHConfig, PaTHForCausalLM
from path_attention.reproduction.language_model import fastest_attention
from path_attention.training import parallel
from path_attention.training.recipe import Training
from path_attention.training.recorded import EAGER_STEPS, GraphCaptureFailed, RecordedPasses, recorder_for

SIZES: dict[str, dict[str, Any]] = {
    "760m": {},  # PaTHConfig's defaults
    "50m": {  # of the recipe python_code
        "vocab_size": 8192,
        "hidden_size": 640,
        "num_hidden_layers": 8,
        "num_attention_heads": 10,
        "intermediate_size": 1728,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 128,
    },
}
BASE = "rope"
FLA = "fla"
# Of the name of a mixer whose training step does not recompute the linear stages of its attention.
KEPT = "_kept"
# Results are continued where these are the same.
SAME = ("benchmark", "commit", "gpu", "versions", "size", "batch", "length", "compile", "cuda_graphs", "repeats")
# The loss of random weights is the logarithm of the vocabulary plus half the variance of the logits, about 0.3 here.
FIRST_LOSS_TOLERANCE = 1.0
# Steps before those that are timed: as they are, then the recording, and a replay.
WARM_UP = EAGER_STEPS + 2


class NotTimed(RuntimeError):
    """A model computes something else than it should."""


def build(size: str, mixer: str, device: torch.device) -> Any:
    mixer = mixer.removesuffix(KEPT)
    if mixer == FLA:
        return fla_decode.build(SIZES[size], torch.float32, str(device))
    torch.manual_seed(0)
    with torch.device(device):  # on the device at once: seconds instead of a minute
        return PaTHForCausalLM(PaTHConfig(mixer=mixer, use_cache=False, **SIZES[size]))


def tokens(model: Any, batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(model.config.vocab_size, (batch, length), generator=generator)
    return ids.to(model.device)


class Step:
    """A training step of a model, ready to be called."""

    def __init__(
        self, model: Any, batch: int, length: int, compile: bool, cuda_graphs: bool, recompute: bool = True
    ) -> None:
        settings = Training(
            steps=1, batch_size=batch, learning_rate=1e-4, compile=compile, recompute_attention=recompute
        )
        parallel.prepare(model.train(), settings, None)
        ids = tokens(model, batch, length)
        self.model, self.inputs = model, {"input_ids": ids, "labels": ids}
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
        recorder = recorder_for(model.device) if cuda_graphs else None
        self.passes: Callable[[dict[str, Tensor]], Tensor] = self._passes
        if recorder is not None:
            self.passes = RecordedPasses(self._passes, model.parameters(), recorder)

    def _passes(self, inputs: dict[str, Tensor]) -> Tensor:
        with precision_context("bfloat16", self.model.device):
            loss: Tensor = self.model(**inputs).loss
        loss.backward()
        return loss.detach()

    def __call__(self) -> Tensor:
        loss = self.passes(self.inputs)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    taken = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        taken.append(time.perf_counter() - start)
    return taken


def peak_mib(device: torch.device) -> int | None:
    return round(torch.cuda.max_memory_allocated(device) / 2**20) if device.type == "cuda" else None


def forget(device: torch.device) -> None:
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def check_loss(loss: float, model: Any) -> None:
    wanted = math.log(model.config.vocab_size)
    if not abs(loss - wanted) < FIRST_LOSS_TOLERANCE:
        raise NotTimed(f"the first loss is {loss}, wanted about {wanted:.2f}")


def training(options: argparse.Namespace, mixer: str, device: torch.device) -> dict[str, Any]:
    model = build(options.size, mixer, device)
    ours = mixer != FLA
    step = Step(
        model,
        options.batch,
        options.length,
        options.compile and ours,
        options.cuda_graphs and ours,
        recompute=not mixer.endswith(KEPT),
    )
    started = time.perf_counter()
    first = float(step())
    check_loss(first, model)
    compiled = time.perf_counter() - started
    for _ in range(WARM_UP - 1):
        last = float(step())
    if not math.isfinite(last):
        raise NotTimed(f"the loss is {last} after {WARM_UP} steps")
    taken = seconds(step, device, options.repeats)
    rate = options.batch * options.length / statistics.median(taken)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_per_second": round(rate, 1),
        "step_ms": {"median": 1e3 * statistics.median(taken), "min": 1e3 * min(taken), "max": 1e3 * max(taken)},
        "first_call_s": round(compiled, 1),
        "peak_memory_mib": peak_mib(device),
    }


def long_pass(model: Any, length: int, device: torch.device) -> dict[str, Any]:
    ids = tokens(model, 1, length)

    def run() -> float:
        with precision_context("bfloat16", device):
            return float(token_losses(model, ids).mean())

    check_loss(run(), model)
    forget(device)
    taken = seconds(run, device, 2)
    return {
        "seconds": round(min(taken), 4),
        "tokens_per_second": round(length / min(taken), 1),
        "peak_memory_mib": peak_mib(device),
    }


class Rows:
    """The rows of this call: each is measured, printed and written before the next one is begun.

    Args:
        result: of this call and of those before it that it continues.
        options: of the command line.
    """

    def __init__(self, result: dict[str, Any], options: argparse.Namespace) -> None:
        self.result, self.options, self.device = result, options, torch.device(options.device)
        self.deadline = math.inf if options.time_limit is None else time.monotonic() + options.time_limit
        self.call = result["calls"] = result["calls"] + 1
        self.left_out: list[str] = []

    def has(self, part: str, mixer: str, length: int) -> bool:
        found = (r for r in self.result[part] if (r["mixer"], r["length"]) == (mixer, length))
        return any("failed" not in r for r in found)

    def add(self, part: str, mixer: str, length: int, measure: Callable[[], dict[str, Any]]) -> None:
        """A row, or why there is none; one that failed in an earlier call gives way to it."""
        if time.monotonic() >= self.deadline:
            self.left_out.append(f"{part} {mixer} {length}")
            return
        forget(self.device)
        started = time.monotonic()
        row: dict[str, Any] = {"mixer": mixer, "length": length}
        try:
            row |= measure()
        except (NotTimed, torch.OutOfMemoryError) as error:
            row["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        row |= {"call": self.call, "seconds_of_row": round(time.monotonic() - started, 1)}
        rows = self.result[part]
        kept = [r for r in rows if "failed" not in r or (r["mixer"], r["length"]) != (mixer, length)]
        self.result[part] = [*kept, row]
        self.compare()
        results_file.write(self.result, self.options.out)
        print(json.dumps(row), flush=True)

    def compare(self) -> None:
        """Every training row as a multiple of rope's mean in the same call."""
        rows = [r for r in self.result["training"] if "failed" not in r]
        for row in rows:
            base = [r["tokens_per_second"] for r in rows if r["mixer"] == BASE and r["call"] == row["call"]]
            row[f"of_{BASE}"] = round(row["tokens_per_second"] / statistics.mean(base), 4) if base else None

    def train(self, mixers: list[str]) -> None:
        """Training steps of those of the mixers that are left, between two measurements of rope."""
        length = self.options.length
        left = [m for m in mixers if m != BASE and not self.has("training", m, length)]
        if not left and (BASE not in mixers or self.has("training", BASE, length)):
            return
        begun = any(r["mixer"] == BASE and r["call"] == self.call for r in self.result["training"])
        for mixer in [*([] if begun else [BASE]), *left, *([BASE] if left else [])]:
            self.add("training", mixer, length, partial(training, self.options, mixer, self.device))

    def read(self, mixer: str) -> None:
        """Passes over long sequences, the longest first."""
        for length in sorted(self.options.long, reverse=True):
            if not self.has("long", mixer, length):
                self.add("long", mixer, length, partial(one_pass, self.options.size, mixer, length, self.device))


@torch.no_grad()
def one_pass(size: str, mixer: str, length: int, device: torch.device) -> dict[str, Any]:
    return long_pass(build(size, mixer, device).eval(), length, device)


def fresh(options: argparse.Namespace) -> dict[str, Any]:
    here = environment()
    return {
        "benchmark": "language_model",
        **here,
        "commit": options.commit or here["commit"],
        "gpu": torch.cuda.get_device_name(options.device) if options.device.startswith("cuda") else None,
        **{name: getattr(options, name) for name in ("size", "batch", "length", "compile", "cuda_graphs", "repeats")},
        "calls": 0,
        "training": [],
        "long": [],
    }


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="760m")
    parser.add_argument("--mixers", default="rope,path,path_fox,fox", help="of which rope is always measured")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a training step")
    parser.add_argument("--length", type=int, default=4096, help="of a training step; 0 leaves training out")
    parser.add_argument("--long", default="4096,16384,65536", help="lengths of one pass; empty leaves them out")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--cuda-graphs", action=argparse.BooleanOptionalAction, help="record the training step; default on a GPU"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--time-limit", type=float, help="seconds after which no row is begun")
    parser.add_argument("--commit", help="of the sources, where git does not tell")
    parser.add_argument("--out", type=Path, help="JSON file; continued, if it is there")
    options = parser.parse_args()
    options.mixers = options.mixers.split(",")
    try:
        options.long = [int(n) for n in options.long.split(",") if n]
    except ValueError:
        parser.error(f"--long: wanted whole numbers separated by commas, got {options.long!r}")
    there = [*NAMES, *(f"{name}{KEPT}" for name in NAMES if name.startswith("path")), FLA]
    if unknown := set(options.mixers) - set(there):
        parser.error(f"--mixers: no {', '.join(map(repr, sorted(unknown)))}; there are {', '.join(there)}")
    if FLA in options.mixers and importlib.util.find_spec("fla") is None:
        parser.error("--mixers: fla is flash-linear-attention's model, which is not installed")
    if options.device.partition(":")[0] not in ("cpu", "cuda"):
        parser.error(f"--device: wanted cpu or cuda, got {options.device!r}")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device: no GPU here; wanted cpu, with --size tiny")
    for name, least in (("batch", 1), ("length", 0), ("repeats", 1)):
        if (given := getattr(options, name)) < least:
            parser.error(f"--{name}: wanted a number from {least} on, got {given}")
    if min(options.long, default=1) < 1:
        parser.error(f"--long: wanted numbers above 0, got {options.long}")
    if options.time_limit is not None and not options.time_limit >= 0:
        parser.error(f"--time-limit: wanted a number from 0 on, got {options.time_limit}")
    on_gpu = options.device.startswith("cuda")
    if options.cuda_graphs and not on_gpu:
        parser.error(f"--cuda-graphs: wanted --device cuda, got {options.device}")
    options.cuda_graphs = on_gpu if options.cuda_graphs is None else options.cuda_graphs
    return options


def main() -> None:
    options = parsed()
    try:
        result = results_file.resume(fresh(options), options.out, SAME)
    except (ValueError, FileExistsError) as error:
        raise SystemExit(str(error)) from error
    rows = Rows(result, options)
    # rope and path are what the others are looked at for.
    groups = [["rope", "path"], [m for m in options.mixers if m not in ("rope", "path")]]
    try:
        with fastest_attention():
            for group in ([m for m in group if m in options.mixers] for group in groups):
                if options.length:
                    rows.train(group)
                for mixer in reversed(group):
                    if mixer != FLA and not mixer.endswith(KEPT):  # a pass without gradients keeps nothing
                        rows.read(mixer)
    except GraphCaptureFailed as error:
        raise SystemExit(f"a step could not be recorded, --no-cuda-graphs does without: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("interrupted" + ("; the same command goes on" if options.out else "")) from None
    for row in rows.result["training"]:
        if "failed" not in row:
            print(f"{row['mixer']:10} {row['tokens_per_second']:12,.0f} tokens/s  {row[f'of_{BASE}']}")
    failed = [f"{r['mixer']}: {r['failed']}" for part in ("training", "long") for r in result[part] if "failed" in r]
    if rows.left_out:
        print(f"time is up; the same command goes on with: {', '.join(rows.left_out)}")
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
