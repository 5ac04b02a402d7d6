"""What ``path-attention reproduce`` does."""

import datetime
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from path_attention.benchmark.measure import environment
from path_attention.reproduction import report as reports
from path_attention.reproduction.tables import TABLES, Cell, cells
from path_attention.reproduction.work import Plan, read_result, run

# Trainings at a time on a GPU: steps of these models leave most of it idle.
CONCURRENT_ON_GPU = 4
# Seconds between two reports while models are being trained.
REPORT_EVERY = 30.0
# Linux knows which cores are ours.
_COUNTS_CORES = hasattr(os, "sched_getaffinity")


def reproduce(
    name: str,
    *,
    quick: bool,
    seeds: int | None,
    rows: Sequence[str],
    overrides: Sequence[str],
    plan: Plan,
    out: Path,
    console: Console,
) -> bool:
    """Does what is left of a table, writes its JSON and report; whether all that was asked for is finished.

    Models that OUT's JSON holds already are finished, also where their run folders are gone, and stay in it also where
    this call does not ask for them. The JSON is written anew after every model.

    Raises:
        ValueError: naming the argument, before anything is computed; OUT or RUNS hold models of another recipe.
        RuntimeError: a worker died; JSON and report have what is finished.
    """
    began = time.monotonic()
    wanted = cells(name, quick=quick, seeds=seeds, rows=rows, overrides=overrides)
    book = _Book(name, quick, wanted, overrides, plan, out, began)
    left = book.left
    console.print(
        f"{TABLES[name].title}: {len(wanted)} models, {len(wanted) - len(left)} finished already; processes on "
        f"{plan.device}{f' ({plan.gpus} GPUs)' if plan.gpus > 1 else ''}: {plan.processes}, models at a time in each: "
        f"{plan.concurrent}",
        soft_wrap=True,
    )
    try:
        with _Progress(left, console, book.take_in) as progress:
            run(left, plan, progress.report, began)
    finally:
        for path in book.write():
            console.print(f"written: {path}", soft_wrap=True)
    if missing := len(book.left):
        console.print(
            f"{missing} of {len(wanted)} models are not finished; the same command goes on with them", soft_wrap=True
        )
    return not missing


class _Book:
    """The results of a table: those that its JSON held, those in RUNS, and those that come."""

    def __init__(
        self,
        name: str,
        quick: bool,
        wanted: Sequence[Cell],
        overrides: Sequence[str],
        plan: Plan,
        out: Path,
        began: float,
    ) -> None:
        self.name, self.wanted, self.plan, self.out, self.began = name, wanted, plan, out, began
        file = out / f"{reports.file_name({'table': name, 'quick': quick})}.json"
        self.results = reports.kept(name, quick, overrides, file)
        self._look()
        self.head = {"quick": quick, "command": plan.command, "commit": plan.commit}
        self.reported = began

    @property
    def left(self) -> list[Cell]:
        return [cell for cell in self.wanted if cell.name not in self.results]

    def _look(self) -> None:
        """Takes in what has come to RUNS."""
        for cell in self.left:
            if (result := read_result(cell, self.plan.runs)) is not None:
                self.results[cell.name] = result

    def take_in(self) -> None:
        """After a cell is finished: the JSON at once, the report with its plot, which takes a second, now and then."""
        self._look()
        if time.monotonic() - self.reported > REPORT_EVERY:
            self.write()
        else:
            reports.write_json(self.numbers, self.out)

    @property
    def numbers(self) -> dict[str, Any]:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        seconds = round(time.monotonic() - self.began, 1)
        of_call = self.head | {"date": now, "seconds_of_last_call": seconds}
        return of_call | reports.collect(self.name, self.wanted, self.results)

    def write(self) -> list[Path]:
        self._look()
        self.reported = time.monotonic()
        return reports.write(self.numbers, self.out)


def remake(path: Path, out: Path, console: Console) -> None:
    """The report anew from a JSON."""
    for written in reports.write(reports.read(path), out):
        console.print(f"written: {written}", soft_wrap=True)


def default_plan(
    runs: Path,
    *,
    device: str | None,
    processes: int | None,
    concurrent: int | None,
    use_graphs: bool,
    time_limit: float | None,
    command: str = "",
    commit: str | None = None,
) -> Plan:
    """What is not given is chosen for the machine: one process of several streams a GPU, on a CPU a process a core.

    Args:
        device: "cuda" for all GPUs that are visible, "cuda:1" for one of them.
        commit: of the sources; None where git is to tell.

    Raises:
        ValueError: naming the option.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = device.partition(":")
    count = torch.cuda.device_count() if kind == "cuda" and torch.cuda.is_available() else 0
    good = device == "cpu" or (
        kind == "cuda" and count and (device == "cuda" or (index.isdigit() and int(index) < count))
    )
    if not good:
        there_are = f"cuda, cuda:0 ... cuda:{count - 1}" if count else "no GPU is to be seen"
        raise ValueError(f"--device: wanted cpu, or cuda where there is one ({there_are}), got {device!r}")
    gpus = count if device == "cuda" else 1
    if processes is None:
        processes = gpus if kind == "cuda" else len(os.sched_getaffinity(0)) if _COUNTS_CORES else os.cpu_count() or 1
    if concurrent is None:
        concurrent = CONCURRENT_ON_GPU if kind == "cuda" else 1
    for option, number in (("--processes", processes), ("--concurrent", concurrent), ("--time-limit", time_limit)):
        if number is not None and not number > 0:
            raise ValueError(f"{option}: wanted a number above 0, got {number}")
    return Plan(
        runs=runs,
        device=device,
        processes=processes,
        concurrent=concurrent,
        gpus=min(gpus, processes),
        use_graphs=use_graphs,
        time_limit=time_limit,
        command=command,
        commit=commit or environment()["commit"],
    )


class _Progress:
    """One bar over the steps of all cells; off a terminal, a line a finished cell."""

    def __init__(self, left: Sequence[Cell], console: Console, finished: Callable[[], None]) -> None:
        self.console, self.after_cell = console, finished
        self.steps = {cell.name: cell.steps for cell in left}
        self.done = dict.fromkeys(self.steps, 0)
        self.finished = 0
        self.bar = None
        if console.is_terminal and left:
            from path_attention.training.trainer import progress_bar

            self.bar = progress_bar(console)
            self.row = self.bar.add_task("steps", total=sum(self.steps.values()), note="")

    def __enter__(self) -> "_Progress":
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def report(self, cell: str, step: int, note: str) -> None:
        if cell not in self.done:
            self.console.print(note)
            return
        self.done[cell] = max(self.done[cell], step)
        ended = note == "finished" or note.startswith("training diverged")
        self.finished += ended
        state = f"{self.finished} of {len(self.steps)} models"
        if self.bar is not None:
            self.bar.update(self.row, completed=sum(self.done.values()), note=state)
        elif ended:
            self.console.print(f"{cell}: {note} ({state})")
        if ended:
            self.after_cell()
