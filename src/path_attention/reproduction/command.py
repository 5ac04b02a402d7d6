"""What ``path-attention reproduce`` does."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from path_attention.reproduction import report as reports
from path_attention.reproduction.tables import TABLES, Cell, cells
from path_attention.reproduction.work import Plan, run, unfinished

# Trainings at a time on a GPU: steps of these models leave most of it idle.
CONCURRENT_ON_GPU = 4
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
    command: str,
    console: Console,
) -> bool:
    """Does what is left of a table, writes its JSON and report; whether the table is complete.

    Raises:
        ValueError: naming the argument, before anything is computed.
    """
    wanted = cells(name, quick=quick, seeds=seeds, rows=rows, overrides=overrides)
    left = unfinished(wanted, plan.runs)
    console.print(
        f"{TABLES[name].title}: {len(wanted)} models, {len(wanted) - len(left)} finished already; processes on "
        f"{plan.device}: {plan.processes}, models at a time in each: {plan.concurrent}",
        soft_wrap=True,
    )
    started = time.monotonic()
    with _Progress(left, console) as progress:
        complete = run(wanted, plan, progress.report)
    numbers = reports.collect(name, wanted, plan.runs, command, time.monotonic() - started)
    numbers["quick"] = quick
    for path in reports.write(numbers, out):
        console.print(f"written: {path}", soft_wrap=True)
    if not complete:
        missing = numbers["missing"]
        console.print(
            f"{len(missing)} of {len(wanted)} models are not finished; the same command goes on with them",
            soft_wrap=True,
        )
    return complete


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
) -> Plan:
    """What is not given is chosen for the machine: on a GPU one process of several streams, on a CPU a process a core.

    Raises:
        ValueError: naming the option.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"--device: wanted cpu, or cuda where there is one, got {device!r}")
    if processes is None:
        processes = 1 if kind == "cuda" else len(os.sched_getaffinity(0)) if _COUNTS_CORES else os.cpu_count() or 1
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
        use_graphs=use_graphs,
        time_limit=time_limit,
    )


class _Progress:
    """One bar over the steps of all cells; off a terminal, a line a finished cell."""

    def __init__(self, left: Sequence[Cell], console: Console) -> None:
        self.console = console
        self.steps = {cell.name: cell.recipe.training.steps for cell in left}
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
