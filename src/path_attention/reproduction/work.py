"""Cells done: several at a time in a process, in several processes, up to a deadline, never twice.

RUNS/TABLE/CELL/checkpoint.pt    of a cell that was cut off
                result.json      of a finished one; its presence means that it is not done again
"""

import dataclasses
import json
import math
import multiprocessing
import queue
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from path_attention.reproduction.lean import Evaluation, GraphCaptureFailed, LeanTraining
from path_attention.reproduction.tables import Cell
from path_attention.training import recipe_from_mapping, strict
from path_attention.training.run import machine, write_whole
from path_attention.training.trainer import TrainingDiverged

CHECKPOINT, RESULT = "checkpoint.pt", "result.json"
# Exit code of a worker whose CUDA refused to record a step.
CAPTURE_FAILED = 3
# A checkpoint is written at least so often, in seconds: what an interruption costs at most.
SAVE_EVERY = 60.0

Report = Callable[[str, int, str], None]  # cell, steps done, note


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How cells are done.

    Args:
        runs: folder of the cells' folders.
        processes: that share the cells.
        concurrent: trainings at a time in each, every one on a CUDA stream of its own. On a GPU the kernels of one
            process's streams overlap, those of several processes take turns.
        device: of all.
        use_graphs: see LeanTraining.
        time_limit: seconds after which everything stops in good order; None for no limit.
    """

    runs: Path
    device: str
    processes: int = 1
    concurrent: int = 1
    use_graphs: bool = True
    time_limit: float | None = None


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
    if recipe_from_mapping(result["recipe"]) != cell.recipe:
        raise ValueError(
            f"{file} was made by another recipe; wanted the one asked for: give another --runs, or move it aside"
        )
    return result


def unfinished(cells: Sequence[Cell], runs: Path) -> list[Cell]:
    return [cell for cell in cells if read_result(cell, runs) is None]


def run(cells: Sequence[Cell], plan: Plan, report: Report) -> bool:
    """Does the cells that are not finished; whether all are, when it returns.

    A cell whose training diverges is finished: its result says so.

    Raises:
        RuntimeError: a worker died.
    """
    deadline = math.inf if plan.time_limit is None else time.monotonic() + plan.time_limit
    left = unfinished(cells, plan.runs)
    if not left:
        return True
    if plan.processes == 1 and torch.device(plan.device).type != "cuda":
        work(left, plan, deadline, report)
    else:
        # A process each also on one GPU: one whose recording failed had better end.
        _in_processes(left, plan, deadline, report)
    return not unfinished(cells, plan.runs)


def work(cells: Sequence[Cell], plan: Plan, deadline: float, report: Report) -> None:
    """Does cells in this process, in turns of a few steps each, until they are finished or the deadline has passed.

    Raises:
        GraphCaptureFailed: cells in hand are left as their last checkpoints have them.
    """
    waiting = list(cells)
    in_hand: list[_CellInHand] = []
    try:
        while (waiting or in_hand) and time.monotonic() < deadline:
            while waiting and len(in_hand) < plan.concurrent:
                in_hand.append(_CellInHand(waiting.pop(0), plan, report))
            for one in list(in_hand):
                if time.monotonic() >= deadline:
                    break
                if not one.turn():
                    in_hand.remove(one)
    except GraphCaptureFailed:
        in_hand.clear()  # what CUDA still has of them cannot be relied on; their last checkpoints can
        raise
    finally:
        for one in in_hand:
            one.save()


class _CellInHand:
    """A cell being done, a turn at a time."""

    def __init__(self, cell: Cell, plan: Plan, report: Report) -> None:
        self.cell, self.plan, self.report = cell, plan, report
        self.folder = cell.folder(plan.runs)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.training = LeanTraining(cell.recipe, torch.device(plan.device), use_graphs=plan.use_graphs)
        if (self.folder / CHECKPOINT).is_file():
            self.training.load(self.folder / CHECKPOINT)
        self.saved_at = self.resumed_at = time.monotonic()
        self.seconds_before = self.training.seconds
        self.recorded = False
        self.turns = self._turns()

    def turn(self) -> bool:
        """A few steps, or a batch of an evaluation; False when the cell is finished."""
        try:
            return next(self.turns, None) is not None
        except TrainingDiverged as error:
            self._write({}, str(error))
            return False

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

    def _turns(self) -> Iterator[bool]:
        training, settings = self.training, self.cell.recipe.training
        while not training.done:
            until = settings.steps
            if settings.eval_every:
                until = min(until, (training.step // settings.eval_every + 1) * settings.eval_every)
            while training.step < until:
                # The turn before is waited for, not this one: the other cells' steps run meanwhile.
                training.check()
                training.advance(until)
                self.recorded = self.recorded or training.graph is not None
                self.report(self.cell.name, training.step, "")
                if time.monotonic() - self.saved_at > SAVE_EVERY:
                    self.save()
                yield True
            training.check()
            if settings.eval_every and self.cell.stop_at is not None and not training.done:
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
                training.stopped = rate <= self.cell.stop_at
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
            "facts": {
                "steps": training.step,
                "seconds": round(self.seconds, 1),
                "parameters": sum(p.numel() for p in training.model.parameters()),
                "cuda_graph": self.recorded,
                "concurrent": self.plan.concurrent,
                "processes": self.plan.processes,
                **machine(training.device),
            },
        }
        write_whole(self.folder / RESULT, json.dumps(strict.plain(result)) + "\n")
        (self.folder / CHECKPOINT).unlink(missing_ok=True)
        self.report(self.cell.name, self.cell.recipe.training.steps, failure or "finished")


def _in_processes(cells: Sequence[Cell], plan: Plan, deadline: float, report: Report) -> None:
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    messages: Any = context.Queue()
    left = math.inf if deadline == math.inf else deadline - time.monotonic()

    def start(share: Sequence[Cell], use_graphs: bool) -> Any:
        seconds = left if left == math.inf else deadline - time.monotonic()
        process = context.Process(target=_worker, args=(share, plan, use_graphs, seconds, messages), daemon=True)
        process.start()
        return process

    shares = [cells[n :: plan.processes] for n in range(min(plan.processes, len(cells)))]
    running = [(start(share, plan.use_graphs), share) for share in shares]
    try:
        while running:
            try:
                report(*messages.get(timeout=0.5))
                continue
            except queue.Empty:
                pass
            for process, share in list(running):
                if process.is_alive():
                    continue
                running.remove((process, share))
                if process.exitcode == CAPTURE_FAILED and plan.use_graphs:
                    report("", 0, "CUDA graphs failed in a worker (see above); it goes on without them, more slowly")
                    running.append((start(unfinished(share, plan.runs), False), share))
                elif process.exitcode:
                    raise RuntimeError(f"a worker ended with exit code {process.exitcode}; its error is above")
    finally:
        for process, _ in running:
            process.terminate()


def _worker(cells: Sequence[Cell], plan: Plan, use_graphs: bool, seconds: float, messages: Any) -> None:
    if torch.device(plan.device).type == "cpu":
        torch.set_num_threads(1)  # tensors this small are not worth sharing among threads
    deadline = math.inf if seconds == math.inf else time.monotonic() + seconds
    try:
        work(
            cells,
            dataclasses.replace(plan, use_graphs=use_graphs),
            deadline,
            lambda *message: messages.put(message),
        )
    except GraphCaptureFailed as error:
        print(f"path-attention: a training step could not be recorded as a CUDA graph: {error}", file=sys.stderr)
        messages.close()
        messages.join_thread()
        sys.exit(CAPTURE_FAILED)
