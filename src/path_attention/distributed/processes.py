"""Processes on this machine that work together, and what ends them where they would wait for ever.

A collective that one process does not reach leaves the others waiting. So every step of such work has a time limit,
kept by the process itself: when it is over, the process says its rank and the step, and ends.
"""

import multiprocessing
import os
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Exit code of a process that ended itself because a step took too long.
STUCK = 70
# What processes of a team want, imported once for all of them by a server that computes nothing: importing takes
# seconds. What is not installed is left out. On CPUs alone: where an import asks for GPUs, forked processes have none.
_IMPORTED = ("path_attention.distributed.equality", "path_attention.models", "path_attention.training.trainer")
# Seconds that the others get to say where they are, once one has failed.
_LAST_WORDS = 2.0


class ProcessesFailed(RuntimeError):
    """A process failed, or ended, or waited too long; the message has a line for each.

    Args:
        message: rank, step and reason.
        out_of_memory: whether memory ran out in one of them.
    """

    def __init__(self, message: str, out_of_memory: bool = False) -> None:
        super().__init__(message)
        self.out_of_memory = out_of_memory


@dataclass
class Place:
    """Where a process stands among those it works with.

    Args:
        rank, size: its number and theirs.
        device: its device.
        seconds: limit of a step.
        tell: called with a line that somebody should read.
        last_words: called with the line that says where the process got stuck, before it ends.
    """

    rank: int
    size: int
    device: torch.device
    seconds: float = 60.0
    tell: Callable[[str], None] = print
    last_words: Callable[[str], None] = print
    objects: Any = None  # group for Python objects, on CPUs
    _steps: list[tuple[str, float]] = field(default_factory=list)
    _timer: threading.Timer = field(default_factory=lambda: threading.Timer(0, print))

    @contextmanager
    def step(self, name: str, seconds: float | None = None) -> Iterator[None]:
        """Ends the process, exit code STUCK, if what is inside takes longer than the limit. Steps inside count anew."""
        limit = self.seconds if seconds is None else seconds
        before = self._steps[-1] if self._steps else None
        self._steps.append((name, limit))
        self._watch(name, limit)
        yield
        # Not after an error: its step is what the message names.
        self._steps.pop()
        self._watch(*before) if before is not None else self._timer.cancel()

    @property
    def doing(self) -> str:
        """The innermost step."""
        return self._steps[-1][0] if self._steps else "nothing"

    def _watch(self, name: str, limit: float) -> None:
        self._timer.cancel()
        self._timer = threading.Timer(limit, self._stuck, [name, limit])
        self._timer.daemon = True
        self._timer.start()

    def failed(self) -> str:
        """The innermost step that raised; whatever it was in has ended with it."""
        name = self.doing
        self._timer.cancel()
        self._steps.clear()
        return name

    def _stuck(self, name: str, limit: float) -> None:
        self.last_words(
            f"rank {self.rank} ({socket.gethostname()}, {self.device}): no end of {name!r} after {limit:.0f} s"
        )
        os._exit(STUCK)

    def join(self, backend: str, **options: Any) -> None:
        """Meet the other processes: the process group, and one for objects."""
        with self.step(f"init_process_group({backend})"):
            dist.init_process_group(backend, **options)
            self.objects = dist.group.WORLD if backend == "gloo" else dist.new_group(backend="gloo")

    def all(self, value: Any) -> list[Any]:
        """What every process passes here, by rank."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.objects)
        return found

    def wait(self) -> None:
        """For the device, then for the other processes."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        dist.barrier(group=self.objects)


def backend_of(device: str) -> str:
    return "nccl" if device == "cuda" else "gloo"


def device_of(kind: str, local_rank: int) -> torch.device:
    """A process's device, made the current one."""
    if kind != "cuda":
        return torch.device(kind)
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


class Team:
    """``size`` processes of this machine, one for each device, that do one piece of work after another.

    Use it in a ``with`` statement. After a failure it is over: what is left of the processes is ended.

    Args:
        size: number of processes.
        device: cuda or cpu.
        seconds: limit of a step, and of work that names no steps.
    """

    def __init__(self, size: int, device: str, seconds: float = 60.0) -> None:
        context: Any = multiprocessing.get_context("spawn" if device == "cuda" else "forkserver")
        if device != "cuda":
            context.set_forkserver_preload(list(_IMPORTED))
        self.size = size
        self._meet = tempfile.TemporaryDirectory(prefix="path-attention-")
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(size):
            here, there = context.Pipe()
            meet = str(Path(self._meet.name) / "meet")
            process = context.Process(target=_enter, args=(rank, size, device, seconds, meet, there), daemon=True)
            process.start()
            there.close()
            self._connections.append(here)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """``function(place, *arguments)`` in every process; the results by rank. All of it is pickled.

        Raises:
            ProcessesFailed: in one of them it raised, did not end in time, or the process ended.
        """
        with suppress(OSError):  # it is gone, and its last words say why
            for connection in self._connections:
                connection.send((function, arguments))
        found: dict[int, Any] = {}
        failed: dict[int, tuple[str, str]] = {}
        deadline = None
        while len(found) + len(failed) < self.size and (deadline is None or time.monotonic() < deadline):
            left = [rank for rank in range(self.size) if rank not in found and rank not in failed]
            ready = wait([self._connections[rank] for rank in left], timeout=0.1 if deadline else None)
            for rank in left:
                if self._connections[rank] in ready:
                    kind, value = self._receive(rank)
                    if kind == "done":
                        found[rank] = value
                    else:
                        failed[rank] = kind, value
                        deadline = deadline or time.monotonic() + _LAST_WORDS
        if failed:
            self.close()
            memory = any(kind == "memory" for kind, _ in failed.values())  # the others only lost a peer
            raise ProcessesFailed("\n".join(text for _, text in dict(sorted(failed.items())).values()), memory)
        return [found[rank] for rank in range(self.size)]

    def _receive(self, rank: int) -> tuple[str, Any]:
        try:
            message: tuple[str, Any] = self._connections[rank].recv()
        except (EOFError, OSError):
            self._processes[rank].join(_LAST_WORDS)
            return "ended", f"rank {rank}: ended with exit code {self._processes[rank].exitcode}"
        return message

    def kill(self, rank: int) -> None:
        """End one process at once, as a fault of its machine would."""
        self._processes[rank].kill()

    def close(self) -> None:
        for connection in self._connections:
            with suppress(OSError):  # it is gone already
                connection.send(None)
        for process in self._processes:
            process.join(_LAST_WORDS)
            if process.is_alive():
                process.kill()
                process.join()
        self._meet.cleanup()

    def __enter__(self) -> "Team":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _enter(rank: int, size: int, device: str, seconds: float, meet: str, connection: Connection) -> None:
    """The life of a process of a team."""
    if device == "cpu":
        torch.set_num_threads(1)
    place = Place(rank, size, torch.device(device), seconds, last_words=lambda text: connection.send(("stuck", text)))
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    try:
        place.device = device_of(device, rank)
        place.join(backend_of(device), init_method=f"file://{meet}", rank=rank, world_size=size)
        while (work := connection.recv()) is not None:
            function, arguments = work
            with place.step(function.__name__):
                result = function(place, *arguments)
            connection.send(("done", result))
            del result, arguments, work  # their memory is the next one's
    except (EOFError, KeyboardInterrupt):
        return  # nobody is left to work for
    except Exception as error:
        connection.send(_last_words(place, error))
    # Not by way of the interpreter's end: a group with processes that are gone cannot be taken apart in good order.
    os._exit(0)


def _last_words(place: Place, error: Exception) -> tuple[str, str]:
    where = traceback.extract_tb(error.__traceback__)[-1]
    text, step = " ".join(f"{type(error).__name__}: {error}".split()), place.failed()
    if isinstance(error, torch.OutOfMemoryError):
        return "memory", f"rank {place.rank}: out of memory in {step!r}"
    at = f"{Path(where.filename).name}:{where.lineno}"
    return "failed", f"rank {place.rank}: {step!r} failed at {at}: {text[:2000]}"
