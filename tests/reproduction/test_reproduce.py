"""Cells, their resumption, the deadline, processes, and the report from the JSON alone."""

import itertools
import json
import multiprocessing
import queue
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from typer.testing import CliRunner, Result

from path_attention import cli
from path_attention.layers import mixer_names
from path_attention.reproduction import report, work
from path_attention.reproduction.command import default_plan
from path_attention.reproduction.lean import LeanTraining
from path_attention.reproduction.tables import TABLES, Cell, GiveUp, cells
from path_attention.reproduction.work import (
    CHECKPOINT,
    FREE,
    RESULT,
    Plan,
    device_of,
    read_result,
    run,
    take,
    unfinished,
)
from path_attention.training import Recipe
from path_attention.training.recorded import GraphCaptureFailed

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


RECALL = (*(x for x in TINY if not x.startswith("task.")), "task.length=16", "task.num_queries=4")


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
    # What the Trainer would record is nothing to these trainings.
    for recorded in ("true", "false"):
        same = cells("table1", quick=True, rows=["path"], overrides=[*TINY, f"training.cuda_graphs={recorded}"])
        assert not unfinished(same, tmp_path)


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


class Player:
    """A process played by a call when it is started: what it says, how it exits and what is done then is all real."""

    started: ClassVar[list[int]] = []

    def __init__(self, target: Callable[..., None], args: tuple[Any, ...], daemon: bool) -> None:
        self.target, self.args, self.exitcode = target, args, 0

    def start(self) -> None:
        self.started.append(self.args[0])
        try:
            self.target(*self.args)
        except SystemExit as error:
            self.exitcode = error.code
        except OSError:
            self.exitcode = 1

    def is_alive(self) -> bool:
        return False

    def terminate(self) -> None:
        pass


class Messages(queue.Queue):
    def close(self) -> None:
        pass

    join_thread = close


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Processes are calls; the numbers of the workers that were started."""
    monkeypatch.setattr(Player, "started", [])
    array = multiprocessing.get_context("spawn").Array
    context = SimpleNamespace(Process=Player, Queue=Messages, Array=array)
    monkeypatch.setattr(work.multiprocessing, "get_context", lambda _: context)
    monkeypatch.setattr(work, "LOOK_EVERY", 0.01)
    return Player.started


def test_turns_are_as_long_as_the_deadline_can_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 0.3 s by the clock: one to begin with, then three in a second, whatever is made ready at once."""
    made = cells("table1", quick=True, rows=["path"], overrides=[*TINY, "training.steps=12", "training.eval_every=0"])
    sizes, now, original = [], [0.0], LeanTraining.advance

    def slow(self: LeanTraining, until: int) -> None:
        first = self.step
        original(self, until)
        sizes.append(self.step - first)
        now[0] += 0.3 * sizes[-1]

    monkeypatch.setattr(LeanTraining, "advance", slow)
    monkeypatch.setattr(work.time, "monotonic", lambda: now[0])
    work.work(made, plan(tmp_path), 1e6, silent)
    assert sizes == [1, 3, 3, 3, 2]


def test_a_worker_whose_graphs_fail_is_replaced_and_does_that_row_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], played: list[int]
) -> None:
    """Only models of the row that cannot be recorded go without graphs; every cell is finished in the end."""
    original, told, asked = LeanTraining.__init__, [], []

    def noted(self: LeanTraining, recipe: Recipe, device: object, *, use_graphs: bool) -> None:
        asked.append((recipe.mixers[0], use_graphs))
        original(self, recipe, device, use_graphs=False)
        self.refuses = use_graphs and recipe.mixers[0] == "path"

    def refuses(self: LeanTraining, until: int) -> None:
        if self.refuses:
            raise GraphCaptureFailed("no")
        advance(self, until)

    advance = LeanTraining.advance
    monkeypatch.setattr(LeanTraining, "__init__", noted)
    monkeypatch.setattr(LeanTraining, "advance", refuses)
    assert run(tiny_cells(2), plan(tmp_path, processes=2), lambda *message: told.append(message))
    assert played == [0, 1, 0]  # by the time worker 1 takes a cell of PaTH, it is known
    assert asked.count(("path", True)) == 1
    assert asked.count(("path", False)) == 2
    assert asked.count(("rope", True)) == 2
    assert sum("go on without" in note for _, _, note in told) == 1
    assert "of path could not be recorded as a CUDA graph: no" in capsys.readouterr().err


def test_a_worker_that_dies_leaves_the_others_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, played: list[int]
) -> None:
    original = LeanTraining.__init__

    def breaks(self: LeanTraining, recipe: Recipe, *arguments: object, **options: object) -> None:
        if recipe.mixers == ("path",) and recipe.training.seed == 0:
            raise OSError("the machine is on fire")
        original(self, recipe, *arguments, **options)

    monkeypatch.setattr(LeanTraining, "__init__", breaks)
    with pytest.raises(RuntimeError, match="exit code 1"):
        run(tiny_cells(2), plan(tmp_path, processes=2), silent)
    assert played == [0, 1]
    assert [cell.name for cell in unfinished(tiny_cells(2), tmp_path)] == ["flip_flop-path-0"]


def test_cells_are_dealt_then_taken(tmp_path: Path) -> None:
    """Every cell once, whoever asks; a worker's own first; one that starts again gets what it has not finished."""
    made = tiny_cells(3)
    names = [cell.name for cell in made]
    owners = multiprocessing.get_context("spawn").Array("i", [0, 1, 0, 1, FREE, FREE])
    first, second = take(made, owners, 0, tmp_path), take(made, owners, 1, tmp_path)
    taken = [next(who).name for who in (first, first, first, second, second, second)]
    assert taken == [names[n] for n in (0, 2, 4, 1, 3, 5)]
    assert next(first, None) is None
    assert next(second, None) is None
    assert run(made[:2], plan(tmp_path), silent)
    assert [cell.name for cell in take(made, owners, 0, tmp_path)] == [names[n] for n in (2, 4)]


@pytest.mark.parametrize(
    "device, gpus, wanted",
    [
        ("cpu", 1, ["cpu"] * 5),
        ("cuda", 1, ["cuda:0"] * 5),
        ("cuda", 4, ["cuda:0", "cuda:1", "cuda:2", "cuda:3", "cuda:0"]),
        ("cuda:2", 1, ["cuda:2"] * 5),
    ],
)
def test_workers_are_spread_over_the_gpus(device: str, gpus: int, wanted: list[str], tmp_path: Path) -> None:
    one = Plan(runs=tmp_path, device=device, gpus=gpus, processes=5)
    assert [device_of(one, worker) for worker in range(5)] == wanted


@pytest.mark.parametrize(
    "options, processes, gpus",
    [({}, 4, 4), ({"processes": 8}, 8, 4), ({"processes": 2}, 2, 2), ({"device": "cuda:3"}, 1, 1)],
)
def test_a_process_a_gpu_unless_told_otherwise(
    options: dict[str, Any], processes: int, gpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    given: dict[str, Any] = {"device": None, "processes": None, "concurrent": None} | options
    made = default_plan(tmp_path, use_graphs=True, time_limit=None, commit="abc", **given)
    assert (made.processes, made.gpus, made.concurrent, made.commit) == (processes, gpus, 4, "abc")
    with pytest.raises(ValueError, match=r"--device.*cuda:3\), got 'cuda:4'"):
        default_plan(tmp_path, use_graphs=True, time_limit=None, **(given | {"device": "cuda:4"}))


def test_seed_by_seed_and_the_expensive_first() -> None:
    made = cells("a5")
    assert [cell.seed for cell in made] == sorted(cell.seed for cell in made)
    of_seed = [cell for cell in made if cell.seed == 1]
    assert [cell.cost for cell in of_seed] == sorted((cell.cost for cell in of_seed), reverse=True)
    assert {cell.name for cell in of_seed[:2]} == {"layers4-path_2-1", "layers4-path_fox_2-1"}
    assert of_seed[-1].variant.name == "layers1"


def test_diverged_cells_are_finished_and_say_so(tmp_path: Path) -> None:
    made = cells("table1", quick=True, rows=["rope"], overrides=[*TINY, "training.learning_rate=1e30"])
    assert run(made, plan(tmp_path, command="command"), silent)
    result = read_result(made[0], tmp_path)
    assert result is not None
    assert "training diverged" in result["failure"]
    numbers = {"quick": True, "command": ""} | report.collect("table1", made, {made[0].name: result})
    assert "Diverged, and left out" in report.markdown(TABLES["table1"], numbers, "x.png")


def test_training_ends_where_the_task_is_solved_or_nothing_is_learned() -> None:
    cell = replace(cells("mqrar", seeds=1)[0], stop_at=0.01, give_up=GiveUp(share=0.5, above=0.9))
    half = cell.steps // 2
    assert not cell.ends(1, 0.5)
    assert cell.ends(1, 0.01)  # solved, however early
    assert not cell.ends(half - 1, 1.0)
    assert cell.ends(half, 0.91)
    assert not cell.ends(half, 0.9)
    never = replace(cell, stop_at=None, give_up=None)
    assert not never.ends(half, 0.0)
    assert not never.ends(half, 1.0)


def test_given_up_models_are_evaluated_and_named(tmp_path: Path) -> None:
    made = cells("mqrar", quick=True, seeds=1, rows=["none"], overrides=RECALL)[:1]
    hopeless = replace(made[0], give_up=GiveUp(share=0.5, above=0.0))
    assert run([hopeless], plan(tmp_path, command="command"), silent)
    result = read_result(hopeless, tmp_path)
    assert result is not None
    assert result["facts"]["steps"] == 3
    assert result["measures"]["held out"]["count"] > 0
    numbers = {"quick": True, "command": ""} | report.collect("mqrar", made, {made[0].name: result})
    told = f"Ended after 33 % of the steps, for more than 98 % of the answers were wrong: {made[0].name}."
    text = report.markdown(TABLES["mqrar"], numbers, "x.png")
    assert (told in text) == (result["curve"][-1][1] > 0.98)
    result["curve"][-1][1] = 0.99
    assert told in report.markdown(TABLES["mqrar"], numbers, "x.png")
    result["curve"][-1][1] = 0.0  # ended because it was solved
    assert told not in report.markdown(TABLES["mqrar"], numbers, "x.png")


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


@pytest.fixture
def quick_table(tmp_path: Path) -> Callable[..., Result]:
    """Calls that make a tiny quick table in OUT, with empty folders of runs unless told otherwise."""
    count = itertools.count()

    def again(*arguments: object) -> Result:
        options = ["--runs", tmp_path / f"runs{next(count)}", "--out", tmp_path, "--device", "cpu", "--processes", 1]
        return call("reproduce", "table1", *TINY, "--quick", *options, *arguments)

    return again


def names_in(file: Path) -> list[str]:
    return [cell["cell"] for cell in json.loads(file.read_text())["cells"]]


def test_goes_on_from_the_json_alone_and_keeps_all_that_is_in_it(
    tmp_path: Path, quick_table: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows and seeds only ever join: the JSON is the union of what it held and what was asked for, in table order."""
    file = tmp_path / "table1-quick.json"
    assert quick_table("--rows", "rope", "--seeds", 2, "--commit", "aaa").exit_code == 0
    first = {cell["cell"]: cell for cell in json.loads(file.read_text())["cells"]}
    more = quick_table("--rows", "path,rope", "--seeds", 1, "--commit", "bbb")
    assert "2 models, 1 finished already" in more.output.replace("\n", " ")
    assert names_in(file) == ["flip_flop-path-0", "flip_flop-rope-0", "flip_flop-rope-1"]
    numbers = json.loads(file.read_text())
    assert [cell for cell in numbers["cells"] if cell["row"] == "rope"] == list(first.values())
    assert [cell["made"]["commit"] for cell in numbers["cells"]] == ["bbb", "aaa", "aaa"]
    assert numbers["commit"] == "bbb"
    assert numbers["date"][:2] == "20"
    page = (tmp_path / "table1-quick.md").read_text()
    for text in (
        "1 of PaTH (seed 0)",
        "2 of RoPE (seeds 0, 1)",
        "commit aaa",
        "commit bbb",
        "PaTH: 1 seed; RoPE: 2 seeds",
    ):
        assert text in page
    monkeypatch.setattr(work, "LeanTraining", None)
    assert quick_table("--rows", "path", "--seeds", 1).exit_code == 0
    assert json.loads(file.read_text())["cells"] == numbers["cells"]
    assert (tmp_path / "table1-quick.md").read_text() == page


def test_json_of_another_recipe_or_table_is_refused_and_left_alone(
    tmp_path: Path, quick_table: Callable[..., Result]
) -> None:
    file = tmp_path / "table1-quick.json"
    assert quick_table("--rows", "rope").exit_code == 0
    before = file.read_bytes()
    # Also where what the JSON holds is not asked for: its rows would stand beside rows of another budget.
    refused = quick_table("--rows", "path", "training.steps=7")
    assert refused.exit_code == 2
    assert "flip_flop-rope-0 in " in refused.stderr
    assert "was made by another recipe" in refused.stderr
    assert file.read_bytes() == before
    file.write_text(before.decode().replace('"flip_flop-rope-0"', '"flip_flop-roap-0"'))
    assert "holds flip_flop-roap-0, which table1 does not have" in quick_table().stderr
    file.write_text(before.decode().replace('"table": "table1"', '"table": "a5"'))
    assert "wanted the JSON of table1, got that of a5-quick" in quick_table().stderr
    file.write_bytes(before[:100])
    assert f"{file}: no JSON" in " ".join(quick_table().stderr.splitlines())
    assert file.read_bytes() == before[:100]


def test_cells_without_their_own_date_get_what_their_json_says(
    tmp_path: Path, quick_table: Callable[..., Result]
) -> None:
    """Tables of before cells had it: their command is kept as theirs, and what is not known is said to be so."""
    file = tmp_path / "table1-quick.json"
    assert quick_table("--rows", "rope").exit_code == 0
    numbers = json.loads(file.read_text())
    del numbers["date"], numbers["commit"], numbers["cells"][0]["made"], numbers["cells"][0]["facts"]["gpus"]
    file.write_text(json.dumps(numbers | {"command": "an earlier command"}))
    assert call("reproduce", file, "--report-only").exit_code == 0
    assert "date not recorded, commit not recorded" in (tmp_path / "table1-quick.md").read_text()
    assert quick_table("--rows", "path").exit_code == 0
    page = (tmp_path / "table1-quick.md").read_text()
    assert "1 of RoPE (seed 0): cpu" in page
    assert "`an earlier command`" in page
    assert "date not recorded, commit not recorded" in page


def test_the_json_has_a_model_as_soon_as_it_is_finished(
    tmp_path: Path, quick_table: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that is killed in its second model has lost nothing of the first, nor of what the JSON held."""
    file = tmp_path / "table1-quick.json"
    assert quick_table("--rows", "none").exit_code == 0
    original = LeanTraining.__init__
    seen: list[list[str]] = []

    def noted(self: LeanTraining, *arguments: object, **options: object) -> None:
        seen.append(names_in(file))
        original(self, *arguments, **options)

    monkeypatch.setattr(LeanTraining, "__init__", noted)
    assert quick_table("--rows", "path,rope").exit_code == 0
    assert seen == [["flip_flop-none-0"], ["flip_flop-path-0", "flip_flop-none-0"]]
    assert not list(tmp_path.glob("*.partial"))


ENDLESS = (*TINY, "training.steps=1000000")


def test_workers_end_at_the_time_limit_and_leave_checkpoints(tmp_path: Path, played: list[int]) -> None:
    """Models that would take hours: the one that a worker has in hand at the limit leaves a checkpoint."""
    made = cells("table1", quick=True, rows=["path", "rope"], overrides=ENDLESS)
    began = time.monotonic()
    limit = 5.0  # a busy machine takes two seconds for the first step
    assert not run(made, plan(tmp_path, processes=2, time_limit=limit), silent)
    assert played == [0, 1]
    assert limit < time.monotonic() - began < limit + work.GRACE
    # Played by calls, workers come one after another: the second finds that there is no time left.
    assert torch.load(made[0].folder(tmp_path) / CHECKPOINT)["step"] > 0
    assert not (made[1].folder(tmp_path) / CHECKPOINT).exists()


def test_workers_that_hang_are_stopped_after_the_time_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, played: list[int]
) -> None:
    stopped, told = [], []
    monkeypatch.setattr(Player, "start", lambda self: None)
    monkeypatch.setattr(Player, "is_alive", lambda self: True)
    monkeypatch.setattr(Player, "terminate", lambda self: stopped.append(self.args[0]))
    monkeypatch.setattr(work, "GRACE", 0.1)
    made = cells("table1", quick=True, rows=["path", "rope"], overrides=ENDLESS)
    assert not run(made, plan(tmp_path, processes=2, time_limit=0.1), lambda *message: told.append(message))
    assert stopped == [0, 1]
    assert "2 worker(s) stopped" in told[-1][2]


def test_time_limit_leaves_work_and_says_so(tmp_path: Path) -> None:
    arguments = ["reproduce", "table1", *TINY, "--quick", "--rows", "path", "--runs", tmp_path / "runs"]
    result = call(*arguments, "--out", tmp_path, "--device", "cpu", "--processes", 1, "--time-limit", 1e-9)
    assert result.exit_code == 1, result.output
    assert "1 of 1 models are not finished" in result.output
    numbers = json.loads((tmp_path / "table1-quick.json").read_text())
    assert numbers["missing"] == ["flip_flop-path-0"]
    assert not list(tmp_path.rglob(RESULT))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["reproduce", "table9"], "table: got 'table9'; wanted one of table1, mqrar, a5, length, language-model"),
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
