"""The benchmarks of several devices, in small: two gloo processes. What follows from rows is told from made-up ones."""

import json
from pathlib import Path
from typing import Any

import pytest

from path_attention.benchmark import restart, scaling, scaling_figure, training_scaling
from path_attention.benchmark.scaling import run_scaling_benchmark, summary
from path_attention.benchmark.training_scaling import run_training_scaling
from path_attention.distributed.processes import Place, ProcessesFailed
from path_attention.training import recipe_from_mapping
from path_attention.training.run import train
from path_attention.training.trainer import METRICS, read_metrics
from tests.distributed.processes import with_processes

SMALL: dict[str, Any] = {"device": "cpu", "ranks": [2], "lengths": [64, 128], "heads": 2, "dim": 16, "repeats": 1}


@with_processes
def test_scaling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """All rows; the same command does nothing again; of one that is missing it does that one alone."""
    out = tmp_path / "scaling.json"
    result = run_scaling_benchmark(**SMALL, out=out)
    rows = result["rows"]
    assert [r["wrong"] for r in rows if r["kind"] == "equality"] == [[]] * 4  # both formulas in both dtypes
    timed = {(r["formula"], r["ranks"], r["length"]) for r in rows if "forward_backward" in r}
    assert timed == {(f, 2, length) for f in ("path", "path_fox") for length in (64, 128)}
    assert (tmp_path / "scaling.png").stat().st_size > 1000
    assert "strong" in capsys.readouterr().out

    def no_processes(*_: Any) -> None:
        raise AssertionError("nothing is left to do")

    monkeypatch.setattr(scaling, "Team", no_processes)
    assert run_scaling_benchmark(**SMALL, out=out)["rows"] == rows
    with pytest.raises(FileExistsError, match="options"):
        run_scaling_benchmark(**SMALL | {"heads": 1}, out=out)
    monkeypatch.undo()
    whole = json.loads(out.read_text())
    out.write_text(json.dumps(whole | {"rows": rows[:-1]}))
    again = run_scaling_benchmark(**SMALL, out=out)["rows"]
    assert again[:-1] == rows[:-1]
    assert again[-1]["length"] == rows[-1]["length"]


def test_a_row_without_memory_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows: one for which memory ends, then one that would take more: it is not tried. Equality is not asked of one
    process.
    """
    rows = scaling.Rows({"rows": [], "machines": {"1": {"memory_bytes": 1000}}}, None)
    options = scaling._options("cpu", [1], [64, 128, 256], 2, 16, None, False, 1)
    tried = []

    class NoTeam(scaling.Devices):
        def run(self, function: Any, *arguments: Any) -> Any:
            tried.append((arguments[0].formula, arguments[0].length))
            if arguments[0].length == 128:
                raise ProcessesFailed("rank 0: out of memory in 'forward'", out_of_memory=True)
            times = {"median_ms": 1.0, "min_ms": 1.0, "max_ms": 1.0, "repeats": 1}
            return {"peak_bytes": 400, "forward": times, "forward_backward": times, "first_ms": 1.0}

    scaling._measure_all(NoTeam(1, options, rows), options)
    assert tried == [(f, n) for f in scaling.FORMULAS for n in (64, 128)]
    found = [r.get("failed") or r.get("left_out") or "timed" for r in rows.result["rows"]]
    assert found == ["timed", "out of memory", "after 128: out of memory"] * 2


def test_lengths_that_would_not_fit_are_left_out() -> None:
    rows = scaling.Rows({"rows": [], "machines": {"2": {"memory_bytes": 1000}}}, None)
    options = scaling._options("cpu", [2], [64, 128], 2, 16, None, False, 1)
    devices = scaling.Devices(2, options, rows)
    before = {"length": 64, "peak_bytes": 600, "forward_backward": {"median_ms": 10.0}}
    assert "GiB a device" in str(scaling._too_much(devices, 128, before))
    before |= {"peak_bytes": 400}
    assert scaling._too_much(devices, 128, before) is None
    before |= {"forward_backward": {"median_ms": 10_000.0}}
    assert scaling._too_much(devices, 128, before) == "would take about 100 s"


def test_the_end_of_memory_is_found_by_two_numbers_of_heads() -> None:
    """Memory of 100 bytes and 10 bytes a head; of 990 heads a share of 0.96 does not fit, and 0.9 does."""
    rows = scaling.Rows({"rows": [], "machines": {}}, None)
    tried: list[int] = []

    class Linear(scaling.Devices):
        def run(self, function: Any, *arguments: Any) -> Any:
            if function is scaling.forget:
                return 10_000
            assert arguments[0].length == 128  # for each of two devices 64
            heads = arguments[0].heads
            tried.append(heads)
            if heads > 910:
                raise ProcessesFailed("rank 1: out of memory", out_of_memory=True)
            return {"peak_bytes": 100 + 10 * heads, "first_ms": 1.0}

    options = scaling._options("cpu", [2], [32], 2, 16, 64, False, 1)
    options = type(options)(**{**vars(options), "probes": (4, 8)})
    scaling._longest(Linear(2, options, rows), options, "path")
    assert tried == [4, 4, 8, 8, 944, 880]
    (row,) = rows.result["rows"]
    assert row["heads"] == 880
    assert row["bytes_per_head"] == 10
    assert row["equivalent_length"] == 128 * 440  # of two heads
    assert [x["failed"] for x in row["tried"]] == ["out of memory"]


def test_the_end_of_memory_is_drawn() -> None:
    """A panel more where there are such rows: a bar for each number of devices, with its share of what is
    proportional."""
    times = {"median_ms": 1.0}
    timed = {"kind": "time", "formula": "path", "ranks": 1, "length": 64, "peak_bytes": 2**30, "forward": times,
             "forward_backward": times}  # fmt: skip
    rows = [{"kind": "longest", "formula": "path", "ranks": n, "equivalent_length": x} for n, x in ((1, 10), (2, 15))]
    options = {"dtype": "bfloat16", "heads": 2, "dim": 16, "per_device": 64}
    result = {"rows": [timed, *rows], "options": options, "versions": {"torch": "2"}, "devices": ["GPU"]}
    *_, end = scaling_figure.figure(result).axes
    assert [bar.get_height() for bar in end.patches] == [10e-6, 15e-6]
    assert [text.get_text().split()[-1] for text in end.texts] == ["(100%)", "(75%)"]
    assert len(scaling_figure.figure(result | {"rows": [timed]}).axes) == 3


def test_efficiency() -> None:
    """Twice as fast on two is 1, strong. Weak: four times the work, on two, in twice the time, is 1 as well."""

    def row(ranks: int, length: int, ms: float) -> dict[str, Any]:
        times = {"median_ms": ms}
        return {"kind": "time", "formula": "path", "ranks": ranks, "length": length, "forward": times,
                "forward_backward": times}  # fmt: skip

    rows = [row(1, 64, 10.0), row(2, 64, 5.0), row(2, 128, 25.0), row(4, 128, 20.0)]
    found = summary({"rows": rows, "options": {"per_device": 64}})
    assert found == [
        {"formula": "path", "ranks": 2, "length": 64, "strong": {"forward": 1.0, "forward_backward": 1.0},
         "against": 1},
        {"formula": "path", "ranks": 2, "length": 128, "weak": {"forward": 0.8, "forward_backward": 0.8}},
        {"formula": "path", "ranks": 4, "length": 128, "strong": {"forward": 0.625, "forward_backward": 0.625},
         "against": 2},
    ]  # fmt: skip


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"ranks": [0]}, "--ranks: wanted numbers above 0, got"),
        ({"lengths": [66]}, "--lengths: wanted multiples of 4"),
        ({"device": "tpu"}, "--device"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_scaling_benchmark(**SMALL | changes)


@with_processes
def test_training_scaling(tmp_path: Path) -> None:
    """Steps by FSDP2 and with context parallelism, and a checkpoint for half the processes."""
    out = tmp_path / "training.json"
    result = run_training_scaling(device="cpu", ranks=[2], quick=True, parts=["steps"], out=out)
    steps = result["rows"]
    assert [(r["ranks"], r["context"]) for r in steps] == [(2, 1), (2, 2)]
    # The same tokens on two processes, however they share them: the same losses, but for the order of sums.
    assert steps[1]["losses"][:2] == pytest.approx(steps[0]["losses"][:2], rel=1e-5)
    assert (tmp_path / "training.png").stat().st_size > 1000
    row = training_scaling._checkpoint("cpu", result["options"], 2, 1)
    assert "wrong" not in row
    assert row["saved"]["fingerprint"] == row["loaded"]["fingerprint"]
    assert row["saved"]["next_loss"] == pytest.approx(row["loaded"]["next_loss"], rel=1e-5)


def test_lengths_that_are_not_measured() -> None:
    with pytest.raises(ValueError, match=r"--lengths: wanted some of \[64\], got 65"):
        run_training_scaling(device="cpu", ranks=[1], lengths=[64, 65])


def test_tokens_of_a_device_against_one() -> None:
    def step(ranks: int, context: int, rate: float) -> dict[str, Any]:
        shape = {"length": 64, "sequences": 2, "tokens_per_second_each": rate}
        return {"kind": "step", "ranks": ranks, "context": context, **shape}

    found = training_scaling.summary({"rows": [step(1, 1, 100.0), step(2, 1, 90.0), step(2, 2, 80.0)]})
    assert [(e["context"], e["efficiency"]) for e in found] == [(1, 0.9), (2, 0.8)]


@pytest.mark.slow  # a training by torchrun that is started twice
@with_processes
def test_a_killed_process_costs_nothing_but_time(tmp_path: Path) -> None:
    """Beside a training in one process, whose sums are in another order: rounding, which training makes grow."""
    disturbed = restart.Training(tmp_path / "disturbed", 2, "cpu")
    disturbed.wait(1)
    assert disturbed.failure == ""
    assert disturbed.killed_at is not None
    alone = restart.TINY.recipe(2, "cpu")
    del alone["training"]["parallel"]
    (run,) = train(recipe_from_mapping(alone), tmp_path / "alone")
    calm = {e["step"]: e["loss"] for e in read_metrics(run.folder / METRICS) if "loss" in e}
    found = restart._compare(restart.TINY, calm, disturbed.losses())
    assert found["largest_difference"] < 1e-3


def test_a_training_that_lost_steps_is_wrong() -> None:
    calm = {step: 1.0 for step in range(restart.TINY.every, restart.TINY.steps + 1, restart.TINY.every)}
    assert "wrong" not in restart._compare(restart.TINY, calm, calm)
    assert "wrong" in restart._compare(restart.TINY, calm, {k: v for k, v in calm.items() if k != 10})
    assert "wrong" in restart._compare(restart.TINY, calm, {**calm, 10: 1.1})


def test_place_names_the_innermost_step() -> None:
    place = Place(0, 1, device=None)  # type: ignore[arg-type]
    with place.step("outer"), place.step("inner"):
        assert place.doing == "inner"
    assert place.doing == "nothing"


@pytest.mark.parametrize("quick", [False, True])
def test_a_cpu_gets_lengths_that_it_can_do(quick: bool) -> None:
    """Nobody who only wants to see that it runs waits for 32,768 tokens."""
    options = scaling._options("cpu", [1, 2], None, 32, 64, None, quick, None)
    assert max(*options.lengths, 2 * options.per_device) <= 1024
    assert min(options.lengths) < options.per_device
