"""Errors, times and memory of one attention on a GPU."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from path_attention.benchmark.cuda_contenders import DEPENDS, Arguments, CudaContender, Formula, exact_attention

Result = TypeVar("Result")

# Milliseconds that one measurement takes at least where calls are short: a thousand times what an event resolves.
SHORTEST_MS = 2.0
MOST_CALLS = 32
# Seconds spent at most on repeats of one function; fewest repeats whatever they take.
SECONDS_EACH = 1.0
FEWEST_REPEATS = 3


def run(contender: CudaContender, given: Arguments, d_out: Tensor) -> list[Tensor]:
    """The output, and the gradients of what the formula depends on."""
    out = contender.function(*given)
    return [out.detach(), *torch.autograd.grad(out, given.of(contender.formula), d_out)]


# --- error -----------------------------------------------------------------------------------------------------------


class Exact:
    """Outputs and gradients in float64 of the last sequence and the last key head with its query heads.

    Sequences and key heads have nothing to do with one another, and the last ones stand where a wrong offset shows.
    """

    def __init__(self, given: Arguments, d_out: Tensor) -> None:
        self._group = given.q.shape[2] // given.k.shape[2]
        self._given = Arguments(*(self._last(x, n) for x, n in zip(given, Arguments._fields, strict=True)))
        self._d_out = self._last(d_out, "q").double()
        self._found: dict[Formula, list[Tensor]] = {}

    def _last(self, x: Tensor, name: str) -> Tensor:
        return x.detach()[-1:, :, -(self._group if name in "qg" else 1) :]

    def errors(self, formula: Formula, found: list[Tensor]) -> dict[str, float]:
        """Relative Frobenius errors of :func:`run`'s results; of the gradients the largest."""
        if formula not in self._found:
            exact = Arguments(*(x.double().requires_grad_() for x in self._given))
            out = exact_attention(formula, exact)
            self._found[formula] = [out.detach(), *torch.autograd.grad(out, exact.of(formula), self._d_out)]
        names = ("q", *DEPENDS[formula])
        errors = [
            float((self._last(x, n).double() - y).norm() / y.norm())
            for x, n, y in zip(found, names, self._found[formula], strict=True)
        ]
        return {"output": errors[0], "gradients": max(errors[1:])}


# --- time ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CudaTimes:
    """Milliseconds of one call."""

    median_ms: float
    min_ms: float
    max_ms: float
    repeats: int
    calls: int  # in one measurement, whose time is divided by them
    timed_by: str  # "graph": replays of a CUDA graph, the host left out. "events: REASON": launched by the host.


Function = Callable[[], object]


class DeviceLost(RuntimeError):
    """A function broke the device for this process, as an illegal memory access does."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} broke the device: {reason}. The same command goes on without it.")
        self.name, self.reason = name, reason


def attempt(name: str, function: Callable[[], Result]) -> Result | Exception:
    """The function's result, or what it raised: a rival's error is a finding, of whatever kind it is.

    Raises:
        DeviceLost: where nothing can run any more.
    """
    try:
        return function()
    except Exception as error:
        if not device_is_alive():
            raise DeviceLost(name, one_line(error)) from error
        return error


class _Prepared(NamedTuple):
    function: Function
    timed_by: str
    calls: int  # of a measurement
    first_ms: float  # of one call


def time_in_turn(functions: Mapping[str, Function], repeats: int) -> dict[str, CudaTimes | Exception]:
    """Times of each function, called in turn so that a disturbance meets all; what one raised in place of its times.

    Raises:
        DeviceLost: where nothing can run any more.
    """
    pool = torch.cuda.graph_pool_handle()
    prepared = {name: attempt(name, partial(_prepare, function, pool)) for name, function in functions.items()}
    ready = {name: x for name, x in prepared.items() if isinstance(x, _Prepared)}
    taken: dict[str, list[float]] = {name: [] for name in ready}
    found: dict[str, CudaTimes | Exception] = {}
    for repeat in range(repeats):
        for name, x in ready.items():
            is_due = repeat < FEWEST_REPEATS or (repeat + 1) * x.calls * x.first_ms <= 1e3 * SECONDS_EACH
            if name in found or not is_due:
                continue
            ms = attempt(name, partial(_milliseconds, x.function, x.calls))
            if isinstance(ms, Exception):
                found[name] = ms
            else:
                taken[name].append(ms)
    for name, prepared_or_error in prepared.items():
        if isinstance(prepared_or_error, Exception):
            found[name] = prepared_or_error
        elif name not in found:
            ms_of = taken[name]
            spread = statistics.median(ms_of), min(ms_of), max(ms_of)
            found[name] = CudaTimes(*spread, len(ms_of), prepared_or_error.calls, prepared_or_error.timed_by)
    return {name: found[name] for name in functions}


def _prepare(function: Function, pool: Any) -> _Prepared:
    timed_by = "graph"
    try:
        ready: Function = capture(function, pool).replay
    except Exception as error:
        if not device_is_alive():
            raise
        timed_by, ready = f"events: {one_line(error)}", function
    _milliseconds(ready, 1)
    first = _milliseconds(ready, 1)
    calls = max(1, min(MOST_CALLS, round(SHORTEST_MS / max(first, 1e-3))))
    return _Prepared(ready, timed_by, calls, first)


def capture(function: Function, pool: Any) -> torch.cuda.CUDAGraph:
    """The function as a CUDA graph. Nothing of its result is kept: graphs replayed in turn can share their memory."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
        # A function that makes the host wait fails here, and not in the midst of a capture.
        torch.cuda.set_sync_debug_mode("error")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        function()
    return graph


def _milliseconds(function: Function, calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / calls


# --- memory and the device -------------------------------------------------------------------------------------------


def peak_extra_bytes(function: Function) -> int:
    """Bytes of tensors alive at once during a call, beyond those before it."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def device_is_alive() -> bool:
    """False after an illegal memory access and its like: nothing runs any more in this process."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
