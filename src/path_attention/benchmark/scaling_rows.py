"""What each process of ``path-attention benchmark scaling`` does for a row: attention over shards, timed, weighed."""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from path_attention.distributed.attention import path_attention_context_parallel
from path_attention.distributed.context import ContextParallel
from path_attention.distributed.processes import Place
from path_attention.ops import path_attention

# Seconds of the repeats of one direction of a row at most; the first repeat whatever it takes.
SECONDS_EACH = 3.0
# Short calls are made one after another, so that the host runs ahead of the device as it does in training; so many
# seconds of them make a measurement, and no more calls than that.
SHORTEST, MOST_CALLS = 0.05, 8


@dataclass(frozen=True)
class Work:
    """One attention: batch 1, ``length`` tokens in all, ``heads`` query and key heads of ``dim``."""

    formula: str  # path or path_fox
    length: int
    heads: int
    dim: int
    dtype: str


class Attention:
    """The operator on this process's shard, with gradients of everything; alone it is the ordinary operator."""

    def __init__(self, place: Place, work: Work) -> None:
        self.context = ContextParallel(dist.group.WORLD) if place.size > 1 else None
        self.leaves = _shard(place, work)
        self.d_out = torch.randn_like(self.leaves[0])

    def forward(self) -> Tensor:
        if self.context is None:
            return path_attention(*self.leaves)
        return path_attention_context_parallel(*self.leaves, group=self.context)

    def only_forward(self) -> None:
        with torch.no_grad():
            self.forward()

    def forward_backward(self) -> None:
        torch.autograd.grad(self.forward(), self.leaves, self.d_out)


def _shard(place: Place, work: Work) -> list[Tensor]:
    """This process's part of random q, k, v, w, beta and perhaps g, made where it is needed; leaves of autograd."""
    generator = torch.Generator(place.device).manual_seed(place.rank)
    rows, dtype = (1, work.length // place.size, work.heads), getattr(torch, work.dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*rows, *shape, generator=generator, device=place.device)

    # The small ones first: torch's allocator would put them into what the large ones leave, which then stays taken.
    beta = 2 * torch.rand(rows, generator=generator, device=place.device)
    gates = [torch.nn.functional.logsigmoid(normal() + 2)] if work.formula == "path_fox" else []
    q, k, v = (normal(work.dim).to(dtype) for _ in range(3))
    w = torch.nn.functional.normalize(normal(work.dim), dim=-1)
    return [x.requires_grad_() for x in (q, k, v, w, beta, *gates)]


def measure(place: Place, work: Work, repeats: int) -> dict[str, Any]:
    """Milliseconds of the slowest process, forward and both, and bytes of the fullest device. After :func:`forget`.

    Bytes are everything allocated: inputs, output and gradients too.
    """
    attention = Attention(place, work)
    _reset_peak(place)
    with place.step("forward + backward"):
        first = seconds(place, attention.forward_backward)  # also compiles, and opens connections
    peak = _peak(place)
    found: dict[str, Any] = {"peak_bytes": peak}
    for name, function in (("forward", attention.only_forward), ("forward_backward", attention.forward_backward)):
        with place.step(name):
            found[name] = timed(place, function, repeats)
    return found | {"first_ms": 1e3 * first}


def weigh(place: Place, work: Work) -> dict[str, Any]:
    """Bytes and milliseconds of one forward and backward pass."""
    attention = Attention(place, work)
    forget(place)
    _reset_peak(place)
    with place.step("forward + backward"):
        taken = seconds(place, attention.forward_backward)
    return {"peak_bytes": _peak(place), "first_ms": 1e3 * taken}


def timed(place: Place, function: Callable[[], object], repeats: int, most: float = SECONDS_EACH) -> dict[str, Any]:
    """Median, smallest and largest milliseconds; the number of repeats is what all processes agree on."""
    first = seconds(place, function)
    calls = max(1, min(MOST_CALLS, round(SHORTEST / first)))
    taken = [first] if calls == 1 else [seconds(place, function, calls)]
    while len(taken) < repeats and (sum(taken) + taken[-1]) * calls <= most:
        taken.append(seconds(place, function, calls))
    ms = [1e3 * x for x in taken]
    spread = {"median_ms": statistics.median(ms), "min_ms": min(ms), "max_ms": max(ms)}
    return spread | {"repeats": len(ms), "calls": calls}


def seconds(place: Place, function: Callable[[], object], calls: int = 1) -> float:
    """Of one call on the slowest process, from a common start to the end of what its device has to do."""
    place.wait()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    if place.device.type == "cuda":
        torch.cuda.synchronize(place.device)
    return max(place.all(time.perf_counter() - start)) / calls


def forget(place: Place) -> int | None:
    """Give memory back to the device; the bytes that the fullest one has left. None on a CPU."""
    if place.device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    return min(place.all(torch.cuda.mem_get_info(place.device)[0]))


def warm_up(place: Place, heads: int, dim: int, dtype: str) -> None:
    """Compile the kernels of both formulas, on few tokens."""
    for formula in ("path", "path_fox"):
        with place.step(f"compiling the kernels of {formula}", 300):
            Attention(place, Work(formula, 1024 * place.size, heads, dim, dtype)).forward_backward()
            place.wait()


def describe(place: Place) -> dict[str, Any]:
    """The devices there are."""
    names = place.all(torch.cuda.get_device_name(place.device) if place.device.type == "cuda" else "cpu")
    memory = torch.cuda.get_device_properties(place.device).total_memory if place.device.type == "cuda" else None
    return {"devices": names, "memory_bytes": memory, "nccl": _nccl() if place.device.type == "cuda" else None}


def _nccl() -> str:
    return ".".join(str(x) for x in torch.cuda.nccl.version())


def _reset_peak(place: Place) -> None:
    if place.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(place.device)


def _peak(place: Place) -> int | None:
    if place.device.type != "cuda":
        return None
    return max(place.all(torch.cuda.max_memory_allocated(place.device)))


def as_row(work: Work) -> dict[str, Any]:
    return asdict(work)
