"""What the doctor finds on machines that are well, and on those that are not. Two gloo processes."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml

from path_attention.distributed.processes import STUCK, Place, ProcessesFailed, Team
from path_attention.doctor import examine, examine_together, machine, together
from path_attention.doctor.check import Check
from tests.distributed.processes import with_processes

RECIPE = {
    "name": "small",
    "mixers": ["path"],
    "task": {"name": "flip_flop", "length": 32},
    "model": {"vocab_size": 8, "hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 2,
              "intermediate_size": 64},
    "training": {"steps": 4, "batch_size": 8, "learning_rate": 1e-3, "accumulation_steps": 2,
                 "parallel": {"strategy": "fsdp"}},
}  # fmt: skip


def test_a_machine_is_well(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "COMPUTED", 40)
    assert examine()
    table = capsys.readouterr().out
    assert f"torch {torch.__version__}" in table
    assert table.count("against float64") == 4 * len(machine.devices())
    assert "all is well" in table


def test_a_wrong_operator_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that loses a thousandth of the output."""
    monkeypatch.setattr(machine, "COMPUTED", 10)
    right = machine.operator
    monkeypatch.setattr(machine, "operator", lambda *given: right(*given) * 1.001)
    check = machine.computes(torch.device("cpu"), torch.float32, False)
    assert check.state == "failed"


def test_every_backend_is_said_with_its_reason() -> None:
    for kind in machine.KINDS:
        check = machine.served(kind, torch.device("cpu"))
        assert "by torch" in check.found
        assert "not triton: q is on cpu" in check.found


def run_doctor(*options: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *launcher, "-m", "path_attention", "doctor", "--distributed", "--device", "cpu"]
    environment = {name: x for name, x in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "TRITON_INTERPRET")}
    return subprocess.run(
        [*command, *options], env=environment, check=False, capture_output=True, text=True, timeout=120
    )


@with_processes
def test_two_processes_are_well(tmp_path: Path) -> None:
    """All checks, a recipe's step among them, whose states are as many bytes as computed."""
    file = tmp_path / "small.yaml"
    values = {**RECIPE, "model": {k: v for k, v in RECIPE["model"].items() if k != "vocab_size"}}  # type: ignore[attr-defined]
    file.write_text(yaml.safe_dump(values))
    done = run_doctor("--recipe", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "15 checks: all is well" in done.stdout
    for name in ("all_to_all", "context parallel path_fox, bfloat16", "FSDP2 x context", "read by 1", "a step"):
        assert name in done.stdout


@with_processes
def test_processes_of_a_launcher(tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    done = run_doctor("--folder", str(tmp_path), launcher=launcher)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("12 checks: all is well") == 1  # one process speaks
    assert list(tmp_path.iterdir()) == []


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--processes: wanted"):
        examine_together(device="cpu", processes=0)
    with pytest.raises(ValueError, match="--device: wanted"):
        examine_together(device="tpu")
    with pytest.raises(FileNotFoundError, match="no recipe"):
        examine_together(device="cpu", recipe=str(tmp_path / "none.yaml"))


def stuck(place: Place) -> None:
    """Rank 1 does not come to a reduction."""
    with place.step("a long step", 60), place.step("a reduction", 1):
        if place.rank == 1:
            time.sleep(60)
        dist.all_reduce(torch.ones(1))


def out_of_memory(place: Place) -> None:
    if place.rank == 0:
        raise torch.OutOfMemoryError("no more")
    dist.barrier()


def found_wrong(place: Place) -> list[Check]:
    """A check that rank 1 alone finds wrong."""
    outcome = [Check("a", "ok", "fine"), Check("b", "failed" if place.rank == 1 else "ok", "seen here")]
    return together._agreed(place.all(outcome))


@with_processes
def test_failures_name_rank_and_step() -> None:
    """A check that fails somewhere fails; one that hangs ends; memory is told from other errors."""
    with Team(2, "cpu", 30) as team:
        assert [x.state for x in team.run(found_wrong)[0]] == ["ok", "failed"]
        assert "rank 1: seen here" in team.run(found_wrong)[1][1].found
        with pytest.raises(ProcessesFailed, match=r"rank 1 \(.*cpu\): no end of 'a reduction' after 1 s") as hang:
            team.run(stuck)
        assert not hang.value.out_of_memory
        assert team._processes[1].exitcode in (STUCK, -9)
    with Team(2, "cpu", 30) as team, pytest.raises(ProcessesFailed, match="rank 0: out of memory in") as memory:
        team.run(out_of_memory)
    assert memory.value.out_of_memory
