"""Cells, their resumption, the deadline, processes, and the report from the JSON alone."""

import json
import queue
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner, Result

from path_attention import cli
from path_attention.layers import mixer_names
from path_attention.reproduction import report, work
from path_attention.reproduction.lean import GraphCaptureFailed, LeanTraining
from path_attention.reproduction.tables import TABLES, Cell, cells
from path_attention.reproduction.work import CHECKPOINT, RESULT, Plan, read_result, run, unfinished

# Seconds for a whole table: two mixers, models of 16 dimensions, a few steps.
TINY = (
    "task.length=16",
    "model.hidden_size=16",
    "model.intermediate_size=16",
    "training.steps=6",
    "training.warmup_steps=1",
    "training.batch_size=4",
    "training.eval_every=3",
    "evaluation.answers=40",
    "evaluation.quick_answers=10",
    "evaluation.batch_size=4",
)


def tiny_cells(seeds: int = 1) -> list[Cell]:
    return cells("table1", quick=True, seeds=seeds, rows=["path", "rope"], overrides=TINY)


def plan(tmp_path: Path, **options: object) -> Plan:
    return Plan(runs=tmp_path, device="cpu", **options)


def silent(*_: object) -> None:
    pass


@pytest.mark.parametrize("name", TABLES)
def test_tables_have_every_mixer_and_good_recipes(name: str) -> None:
    table = TABLES[name]
    assert {row.mixer for row in table.rows} == set(mixer_names())
    for quick in (False, True):
        made = cells(name, quick=quick)
        assert len({cell.name for cell in made}) == len(made)
        for cell in made:
            assert cell.recipe.mixers == (cell.row.mixer,)
            assert cell.recipe.training.seed == cell.seed
            for measure in cell.measures:
                assert measure.split in measure.of(cell.task).splits
    # Same budget for all: recipes of a variant and seed differ in the mixer and what the row says, nothing else.
    for variant in table.variants:
        budgets = {
            (c.recipe.training, c.recipe.task, c.recipe.evaluation)
            for c in cells(name, seeds=1)
            if c.variant == variant
        }
        assert len(budgets) == 1


def test_measures_change_the_task() -> None:
    table1, length = cells("table1")[0], cells("length")[0]
    assert [m.of(table1.task).length for m in table1.measures] == [512] * 3 + [4096] * 3
    assert [m.of(length.task).length for m in length.measures] == [66, 258]


def test_unknown_names_are_told() -> None:
    with pytest.raises(ValueError, match="table: got 'tabel1'"):
        cells("tabel1")
    with pytest.raises(ValueError, match="--rows: got 'pth'"):
        cells("a5", rows=["pth"])
    with pytest.raises(ValueError, match="--seeds: got 0"):
        cells("a5", seeds=0)


def test_finished_cells_are_never_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(tiny_cells(), plan(tmp_path), silent)
    results = [read_result(cell, tmp_path) for cell in tiny_cells()]
    monkeypatch.setattr(work, "LeanTraining", None)
    assert run(tiny_cells(), plan(tmp_path), silent)
    assert [read_result(cell, tmp_path) for cell in tiny_cells()] == results
    for result in results:
        assert result is not None
        assert result["facts"]["steps"] == 6
        assert set(result["measures"]) == {m.name for m in TABLES["table1"].measures}
        assert all(m["count"] > 0 for m in result["measures"].values())
    assert not list(tmp_path.rglob(CHECKPOINT))


def test_results_of_another_recipe_are_refused(tmp_path: Path) -> None:
    run(tiny_cells(), plan(tmp_path), silent)
    other = cells("table1", quick=True, rows=["path"], overrides=[*TINY, "training.steps=7"])
    with pytest.raises(ValueError, match="was made by another recipe"):
        unfinished(other, tmp_path)


def test_a_deadline_stops_in_good_order_and_the_next_call_goes_on(tmp_path: Path) -> None:
    """One step at a time: cut off anywhere, in training or evaluation, the results are those of an uncut run."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(tiny_cells(), plan(whole), silent)
    original, clock = work._CellInHand.turn, time.monotonic
    state = {"turns": 0, "allowed": 0}

    def one_step(self: work._CellInHand) -> bool:
        state["turns"] += 1
        self.training.chunk = 1
        return original(self)

    calls = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work._CellInHand, "turn", one_step)
        # The deadline passes after so many turns, whatever the time.
        patch.setattr(work.time, "monotonic", lambda: clock() + (1e6 if state["turns"] >= state["allowed"] else 0))
        while left := unfinished(tiny_cells(), cut):
            calls += 1
            assert calls < 100
            # More each time: an evaluation that is cut off begins anew.
            state |= {"turns": 0, "allowed": 2 + calls}
            work.work(left, plan(cut, concurrent=2), clock() + 1e5, silent)
    assert calls > 3
    for cell in tiny_cells():
        a, b = read_result(cell, whole), read_result(cell, cut)
        assert a is not None
        assert b is not None
        assert [a[key] for key in ("measures", "losses", "curve")] == [
            b[key] for key in ("measures", "losses", "curve")
        ]


def test_a_worker_whose_graphs_fail_is_replaced_by_one_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Processes are played by calls: what they say, how they exit and what is started then is all real."""
    original, told, started = LeanTraining.advance, [], []

    def refuses(self: LeanTraining, until: int) -> None:
        if wants_graphs[-1]:
            raise GraphCaptureFailed("no")
        original(self, until)

    class Process:
        def __init__(self, target: object, args: tuple[object, ...], daemon: bool) -> None:
            self.target, self.args, self.exitcode = target, args, 0

        def start(self) -> None:
            wants_graphs.append(self.args[2])
            started.append([cell.name for cell in self.args[0]])
            try:
                self.target(*self.args)
            except SystemExit as error:
                self.exitcode = error.code

        def is_alive(self) -> bool:
            return False

        def terminate(self) -> None:
            pass

    class Messages(queue.Queue):
        def close(self) -> None:
            pass

        join_thread = close

    wants_graphs: list[bool] = []
    monkeypatch.setattr(LeanTraining, "advance", refuses)
    context = SimpleNamespace(Process=Process, Queue=Messages)
    monkeypatch.setattr(work.multiprocessing, "get_context", lambda _: context)
    assert run(tiny_cells(), plan(tmp_path, processes=2), lambda *message: told.append(message))
    assert wants_graphs == [True, True, False, False]
    assert started[2:] == started[:2]
    assert sum("without them" in note for _, _, note in told) == 2
    assert "could not be recorded as a CUDA graph: no" in capsys.readouterr().err


def test_diverged_cells_are_finished_and_say_so(tmp_path: Path) -> None:
    made = cells("table1", quick=True, rows=["rope"], overrides=[*TINY, "training.learning_rate=1e30"])
    assert run(made, plan(tmp_path), silent)
    result = read_result(made[0], tmp_path)
    assert result is not None
    assert "training diverged" in result["failure"]
    numbers = report.collect("table1", made, tmp_path, "command", 1.0)
    numbers["quick"] = True
    assert "Diverged, and left out" in report.markdown(TABLES["table1"], numbers, "x.png")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app(), [str(a) for a in arguments])


def test_command_in_two_processes_then_the_report_alone(tmp_path: Path) -> None:
    arguments = ["reproduce", "table1", *TINY, "--quick", "--rows", "path,rope", "--runs", tmp_path / "runs"]
    arguments += ["--out", tmp_path / "out", "--device", "cpu"]
    result = call(*arguments, "--processes", 2)
    assert result.exit_code == 0, result.output
    assert "2 of 2 models" in result.output
    page = (tmp_path / "out" / "table1-quick.md").read_text()
    for text in ("| PaTH |", "| RoPE |", "| RoPE, paper | 6.9 % |", "sparse, 8 x length", "--quick --rows path,rope"):
        assert text in page
    again = call(*arguments)
    assert again.exit_code == 0, again.output
    assert "2 models, 2 finished already" in again.output.replace("\n", " ")
    (tmp_path / "out" / "table1-quick.md").unlink()
    (tmp_path / "out" / "table1-quick.png").unlink()
    assert call("reproduce", tmp_path / "out" / "table1-quick.json", "--report-only").exit_code == 0
    assert (tmp_path / "out" / "table1-quick.md").read_text() == page
    assert (tmp_path / "out" / "table1-quick.png").stat().st_size > 1000


def test_time_limit_leaves_work_and_says_so(tmp_path: Path) -> None:
    arguments = ["reproduce", "table1", *TINY, "--quick", "--rows", "path", "--runs", tmp_path / "runs"]
    result = call(*arguments, "--out", tmp_path, "--device", "cpu", "--processes", 1, "--time-limit", 1e-9)
    assert result.exit_code == 0, result.output
    assert "1 of 1 models are not finished" in result.output
    numbers = json.loads((tmp_path / "table1-quick.json").read_text())
    assert numbers["missing"] == ["flip_flop-path-0"]
    assert not list(tmp_path.rglob(RESULT))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["reproduce", "table9"], "table: got 'table9'"),
        (["reproduce", "a5", "--rows", "pth"], "--rows: got 'pth'"),
        (["reproduce", "a5", "--time-limit", "0"], "--time-limit: wanted a number above 0"),
        (["reproduce", "a5", "--device", "tpu"], "--device"),
        (["reproduce", "nothing.json", "--report-only"], "nothing.json"),
        (["task", "flop"], "no task 'flop'"),
        (["task", "flip_flop", "length=5"], "length must be even"),
        (["task", "flip_flop", "--show", "--split", "spare"], "split: wanted one of"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(arguments: list[str], message: str, tmp_path: Path) -> None:
    options = ["--runs", tmp_path, "--out", tmp_path] if arguments[0] == "reproduce" else []
    result = call(*arguments, *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def solved_numbers() -> dict[str, object]:
    """Two seeds of PaTH with one layer and one with two, of words of 20 letters."""

    def cell(variant: str, seed: int, solved: int) -> dict[str, object]:
        right = [100] + [90] * solved + [89] * (20 - solved)
        measure = {"count": 2000, "errors": 5, "sequences": 100, "sequences_wrong": 11, "right_up_to": right}
        return {"row": "path", "variant": variant, "seed": seed, "measures": {"held out": measure}}

    return {"cells": [cell("layers1", 0, 4), cell("layers1", 1, 12), cell("layers2", 0, 20)]}


def test_solved_lengths_and_fewest_layers() -> None:
    table, numbers = TABLES["a5"], solved_numbers()
    assert [report.value(table, c, "held out") for c in numbers["cells"]] == [4, 12, 20]
    page = "\n".join(report._fewest_layers(table, numbers))
    assert "| PaTH | 1 | 1 | 1 | 2 | 2 |" in page
