"""Cells done: several at a time in a process, in several processes on one GPU or more, up to a deadline, never twice.

RUNS/TABLE/CELL/checkpoint.pt    of a cell that was cut off
                result.json      of a finished one; its presence means that it is not done again
"""

import datetime
import gc
import json
import math
import multiprocessing
import queue
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from path_attention.reproduction.lean import Evaluation, LeanTraining
from path_attention.reproduction.tables import Cell
from path_attention.training import Recipe, recipe_from_mapping, strict
from path_attention.training.recorded import GraphCaptureFailed
from path_attention.training.run import machine, write_whole
from path_attention.training.trainer import TrainingDiverged

CHECKPOINT, RESULT = "checkpoint.pt", "result.json"
# Exit code of a worker whose CUDA refused to record a step.
CAPTURE_FAILED = 3
# A checkpoint is written at least so often, in seconds: what an interruption costs at most.
SAVE_EVERY = 60.0
# Seconds after the deadline in which workers end by themselves: a turn, then a checkpoint of each model in hand. One
# that has not by then, because it compiles kernels, is stopped: it loses what its last checkpoints lack.
GRACE = 10.0
# Seconds that the steps of a turn take at most, as far as the turn before tells: so late is the deadline noticed.
TURN = 1.0
# Seconds between two looks at whether the workers live, and at whether any model's steps have ended.
LOOK_EVERY, POLL_EVERY = 0.5, 0.0005
# A cell that no worker has taken.
FREE = -1

Report = Callable[[str, int, str], None]  # cell, steps done, note


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How cells are done.

    Args:
        runs: folder of the cells' folders.
        processes: that share the cells.
        concurrent: trainings at a time in each, every one on a CUDA stream of its own. On a GPU the kernels of one
            process's streams overlap, those of several processes take turns.
        device: of all; "cuda" for all GPUs there are, "cuda:1" for one of them.
        gpus: how many the processes are spread over, see :func:`device_of`.
        use_graphs: see LeanTraining.
        time_limit: seconds after which everything stops in good order; None for no limit.
        command, commit: that the results are marked with.
    """

    runs: Path
    device: str
    processes: int = 1
    concurrent: int = 1
    gpus: int = 1
    use_graphs: bool = True
    time_limit: float | None = None
    command: str = ""
    commit: str | None = None


def device_of(plan: Plan, worker: int) -> str:
    """Where a worker does its cells: on GPU number worker modulo their number, unless the plan names a device."""
    return f"{plan.device}:{worker % plan.gpus}" if plan.device == "cuda" else plan.device


def read_result(cell: Cell, runs: Path) -> dict[str, Any] | None:
    """The result of a finished cell.

    Raises:
        ValueError: it was made by another recipe.
    """
    file = cell.folder(runs) / RESULT
    if not file.is_file():
        return None
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    # Read as a recipe: keys that have come since stand at their defaults.
    check_recipe(result, cell, str(file), "--runs")
    return result


def check_recipe(result: Mapping[str, Any], cell: Cell, place: str, option: str) -> None:
    """Raises a ValueError where a result was made by another recipe than the cell's.

    How steps are launched may differ: ``training.cuda_graphs``, in whose place ``--graphs`` says what these trainings
    record, and ``training.compile``.

    Args:
        place: where the result was found.
        option: that names another place.
    """
    if _what(recipe_from_mapping(result["recipe"])) != _what(cell.recipe):
        raise ValueError(
            f"{place} was made by another recipe; wanted the one asked for: give another {option}, or move it aside"
        )


def _what(recipe: Recipe) -> Recipe:
    """What a recipe trains, whatever it says of how."""
    return replace(recipe, training=replace(recipe.training, cuda_graphs=False, compile=False))


def unfinished(cells: Sequence[Cell], runs: Path) -> list[Cell]:
    return [cell for cell in cells if read_result(cell, runs) is None]


def run(cells: Sequence[Cell], plan: Plan, report: Report, began: float | None = None) -> bool:
    """Does the cells that are not finished; whether all are, when it returns.

    A cell whose training diverges is finished: its result says so.

    Args:
        began: by time.monotonic, when the plan's time limit began to run; None for now.

    Raises:
        RuntimeError: a worker died; the others have done what they could.
    """
    began = time.monotonic() if began is None else began
    deadline = math.inf if plan.time_limit is None else began + plan.time_limit
    left = unfinished(cells, plan.runs)
    if not left:
        return True
    if plan.processes == 1 and torch.device(plan.device).type != "cuda":
        work(left, plan, deadline, report)
    else:
        # A process each also on one GPU: one whose recording failed had better end.
        _in_processes(left, plan, deadline, report)
    return not unfinished(cells, plan.runs)


def _always(_: Cell) -> bool:
    return True


def work(
    cells: Iterable[Cell],
    plan: Plan,
    deadline: float,
    report: Report,
    device: str | None = None,
    may_record: Callable[[Cell], bool] = _always,
) -> None:
    """Does cells in this process, in turns of a few steps each, until they are finished or the deadline has passed.

    A cell's turn comes when its last one has ended on the device: quick cells do not wait for slow ones.

    Args:
        cells: taken one by one, each when there is room for it.
        device: of this process; None for the plan's.
        may_record: whether a cell's step is worth being recorded as a CUDA graph.

    Raises:
        GraphCaptureFailed: with the cell's row; cells in hand are left as their last checkpoints have them.
    """
    waiting, more = iter(cells), True
    in_hand: list[_CellInHand] = []
    try:
        while time.monotonic() < deadline:
            while more and len(in_hand) < plan.concurrent:
                cell = next(waiting, None)
                more = cell is not None
                if cell is not None:
                    use_graphs = plan.use_graphs and may_record(cell)
                    in_hand.append(_CellInHand(cell, plan, report, device or plan.device, use_graphs))
            if not in_hand:
                break
            if not _a_turn_each(in_hand, deadline):
                time.sleep(POLL_EVERY)
    except GraphCaptureFailed:
        in_hand.clear()  # what CUDA still has of them cannot be relied on; their last checkpoints can
        raise
    finally:
        for one in in_hand:
            one.save()


def _a_turn_each(in_hand: list["_CellInHand"], deadline: float) -> bool:
    """A turn of each cell that is ready for one, finished ones taken out; whether there was any."""
    ready = [one for one in in_hand if one.training.ready()]
    for one in ready:
        if time.monotonic() >= deadline:
            break
        if not one.turn():
            in_hand.remove(one)
            one.close()
    return bool(ready)


class _CellInHand:
    """A cell being done, a turn at a time."""

    def __init__(self, cell: Cell, plan: Plan, report: Report, device: str, use_graphs: bool) -> None:
        self.cell, self.plan, self.report = cell, plan, report
        self.folder = cell.folder(plan.runs)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.training = LeanTraining(cell.recipe, torch.device(device), use_graphs=use_graphs)
        if (self.folder / CHECKPOINT).is_file():
            self.training.load(self.folder / CHECKPOINT)
        self.saved_at = self.resumed_at = time.monotonic()
        self.seconds_before = self.training.seconds
        self.recorded = False
        self.steps = 1  # of the next turn
        self.turns = self._turns()

    def turn(self) -> bool:
        """A few steps, or a batch of an evaluation; False when the cell is finished."""
        try:
            return next(self.turns, None) is not None
        except TrainingDiverged as error:
            self._write({}, str(error))
            return False
        except GraphCaptureFailed as error:
            error.row = self.cell.row.name
            raise

    def close(self) -> None:
        """Gives the memory of a finished cell back: blocks of one stream are of no use to the next cell's."""
        cuda = self.training.device.type == "cuda"
        self.turns.close()
        del self.training
        if cuda:
            gc.collect()
            torch.cuda.empty_cache()

    def save(self) -> None:
        """So that the cell can be taken up; a cell that has diverged meanwhile stays as its last checkpoint has it."""
        self.training.seconds = self.seconds
        try:
            self.training.save(self.folder / CHECKPOINT)
        except TrainingDiverged:
            return
        self.saved_at = time.monotonic()

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.resumed_at

    def _turns(self) -> Generator[bool, None, None]:
        training, settings = self.training, self.cell.recipe.training
        while not training.done:
            until = settings.steps
            if settings.eval_every:
                until = min(until, (training.step // settings.eval_every + 1) * settings.eval_every)
            while training.step < until:
                # The turn before is waited for, not this one: the other cells' steps run meanwhile.
                training.check()
                first, launched = training.step, time.monotonic()
                training.advance(min(until, first + self.steps))
                self.recorded = self.recorded or training.graph is not None
                self.report(self.cell.name, training.step, "")
                if time.monotonic() - self.saved_at > SAVE_EVERY:
                    self.save()
                yield True
                of_step = (time.monotonic() - launched) / (training.step - first)
                self.steps = max(1, min(training.chunk, int(TURN / max(of_step, 1e-9))))
            training.check()
            if self.cell.looks and not training.done:
                quick = Evaluation(
                    training,
                    self.cell.measures[0].of(self.cell.task),
                    self.cell.measures[0].split,
                    self.cell.evaluation.quick_answers,
                )
                for _ in quick.batches():
                    yield True
                found = quick.result()
                rate = found["errors"] / max(1, found["count"])
                training.curve.append([training.step, rate])
                training.stopped = self.cell.ends(training.step, rate)
        self.save()
        measured = {}
        for measure in self.cell.measures:
            wanted = max(1, round(measure.share * self.cell.evaluation.answers))
            evaluation = Evaluation(training, measure.of(self.cell.task), measure.split, wanted)
            for _ in evaluation.batches():
                self.report(self.cell.name, training.step, measure.name)
                yield True
            measured[measure.name] = evaluation.result()
        self._write(measured, "")

    def _write(self, measured: dict[str, Any], failure: str) -> None:
        training = self.training
        losses = training.losses[: training.step].tolist()
        every = max(1, len(losses) // 200)
        result = {
            "cell": self.cell.name,
            "row": self.cell.row.name,
            "variant": self.cell.variant.name,
            "seed": self.cell.seed,
            "recipe": self.cell.recipe.to_mapping(),
            "measures": measured,
            "failure": failure,
            "curve": training.curve,
            "losses": [[n + 1, losses[n]] for n in range(0, len(losses), every) if math.isfinite(losses[n])],
            "made": {
                "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "commit": self.plan.commit,
                "command": self.plan.command,
            },
            "facts": {
                "steps": training.step,
                "seconds": round(self.seconds, 1),
                "parameters": sum(p.numel() for p in training.model.parameters()),
                "cuda_graph": self.recorded,
                "concurrent": self.plan.concurrent,
                "processes": self.plan.processes,
                "gpus": self.plan.gpus if training.device.type == "cuda" else 0,
                **machine(training.device),
            },
        }
        write_whole(self.folder / RESULT, json.dumps(strict.plain(result)) + "\n")
        (self.folder / CHECKPOINT).unlink(missing_ok=True)
        self.report(self.cell.name, self.cell.steps, failure or "finished")


def _in_processes(cells: Sequence[Cell], plan: Plan, deadline: float, report: Report) -> None:
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    messages: Any = context.Queue()
    count = min(plan.processes, len(cells))
    # The first are dealt out, so that each worker has its share of the expensive ones; then who has room takes one.
    dealt = count * plan.concurrent
    owners: Any = context.Array("i", [n % count if n < dealt else FREE for n in range(len(cells))])
    unrecorded: Any = context.Array("i", len(cells))
    # By the clock that all processes share: a worker's imports are part of the time.
    ends = math.inf if deadline == math.inf else time.time() + deadline - time.monotonic()

    def start(worker: int) -> Any:
        arguments = (worker, cells, plan, ends, owners, unrecorded, messages)
        process = context.Process(target=_worker, args=arguments, daemon=True)
        process.start()
        return process

    running = {worker: start(worker) for worker in range(count)}
    failed = 0
    try:
        while running:
            _pass_on(messages, report, LOOK_EVERY)
            for worker, process in list(running.items()):
                if process.is_alive():
                    continue
                del running[worker]
                if process.exitcode == CAPTURE_FAILED:
                    report("", 0, "CUDA graphs failed in a worker (see above); such models go on without, more slowly")
                    running[worker] = start(worker)
                elif process.exitcode:
                    failed = process.exitcode
                    report("", 0, f"a worker ended with exit code {failed}; its error is above; the others go on")
            if time.monotonic() > deadline + GRACE and running:
                report("", 0, f"{len(running)} worker(s) stopped {GRACE:g} s after the time limit")
                break
        _pass_on(messages, report, 0.0)
    finally:
        for process in running.values():
            process.terminate()
    if failed:
        raise RuntimeError(f"a worker ended with exit code {failed}; its error is above")


def _pass_on(messages: Any, report: Report, seconds: float) -> None:
    """Reports what workers say, for so long; with 0 what lies there."""
    until = time.monotonic() + seconds
    try:
        while True:
            left = until - time.monotonic()
            report(*messages.get(timeout=max(0.01, left)))
            if seconds and left <= 0:
                return
    except queue.Empty:
        pass


def take(cells: Sequence[Cell], owners: Any, worker: int, runs: Path) -> Iterator[Cell]:
    """The cells a worker does: those dealt to it, also by a worker of its number that has ended, then free ones.

    Args:
        owners: shared by the workers: for each cell the worker's number, or FREE.
    """
    had: set[int] = set()
    while True:
        with owners.get_lock():
            mine = [n for n, owner in enumerate(owners[:]) if owner == worker and n not in had]
            free = [n for n, owner in enumerate(owners[:]) if owner == FREE]
            if not mine and not free:
                return
            number = (mine or free)[0]
            owners[number] = worker
        had.add(number)
        if read_result(cells[number], runs) is None:
            yield cells[number]


def _worker(
    worker: int, cells: Sequence[Cell], plan: Plan, ends: float, owners: Any, unrecorded: Any, messages: Any
) -> None:
    device = device_of(plan, worker)
    if torch.device(device).type == "cpu":
        torch.set_num_threads(1)  # tensors this small are not worth sharing among threads
    else:
        torch.cuda.set_device(device)  # kernels that are told no device go to the current one
    deadline = math.inf if ends == math.inf else time.monotonic() + ends - time.time()
    numbers = {cell.name: n for n, cell in enumerate(cells)}
    try:
        work(
            take(cells, owners, worker, plan.runs),
            plan,
            deadline,
            lambda *message: messages.put(message),
            device,
            lambda cell: not unrecorded[numbers[cell.name]],
        )
    except GraphCaptureFailed as error:
        # Models of the same row have the same kernels; others may well be recorded.
        for number, cell in enumerate(cells):
            if cell.row.name == error.row:
                unrecorded[number] = 1
        told = f"path-attention: a training step of {error.row} could not be recorded as a CUDA graph: {error}"
        print(told, file=sys.stderr)
        messages.close()
        messages.join_thread()
        sys.exit(CAPTURE_FAILED)
