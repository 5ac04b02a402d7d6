"""Several processes: collectives, context parallelism, sharded training steps, a checkpoint for another number of them.

Every process makes every check; what one of them finds wrong is wrong. A check that does not end is ended by
:class:`path_attention.distributed.processes.Place`, which says rank and step.
"""

import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from path_attention.distributed.context import ContextParallel, PassedOn
from path_attention.distributed.equality import compare
from path_attention.distributed.processes import Place
from path_attention.doctor.check import Check, Tell

# Numbers of a message whose time is taken: large enough that its bandwidth is that of long messages.
MESSAGE = {"cuda": 2**25, "cpu": 2**18}
TIMED = 5
# Tokens for each process, heads and head dim of the split sequence; on a GPU the kernels' own tiles are filled.
SPLIT = {"cuda": (1024, 4, 64), "cpu": (32, 2, 16)}


def checks_together(place: Place, folder: Path | None, recipe: str | None, tell: Tell) -> list[Check]:
    """All checks, told by the first process as they are made; the list is the same on every process."""
    found: list[Check] = []
    for name, function in _plan(place, folder, recipe):
        with place.step(name):
            outcome = _attempt(place, name, function)
            for check in _agreed(place.all(outcome)):
                found.append(check)
                if place.rank == 0:
                    tell(check)
    return found


def _plan(
    place: Place, folder: Path | None, recipe: str | None
) -> Iterator[tuple[str, Callable[[], Check | list[Check]]]]:
    yield "processes", lambda: processes(place)
    for name, function in COLLECTIVES.items():
        yield name, lambda name=name, function=function: collective(place, name, function)  # type: ignore[misc]
    for dtype in (torch.float32, torch.bfloat16):
        for formula in ("path", "path_fox"):
            yield (
                f"context parallel {formula}, {str(dtype).removeprefix('torch.')}",
                lambda formula=formula, dtype=dtype: split_sequence(place, formula, dtype),  # type: ignore[misc]
            )
    from path_attention.doctor import sharded

    yield "FSDP2 step", lambda: sharded.step(place, 1)
    if place.size > 1:
        context = 2 if place.size % 2 == 0 else place.size
        yield "FSDP2 x context parallel step", lambda: sharded.step(place, context)
    yield "checkpoint", lambda: sharded.checkpoint_for_others(place, folder)
    if recipe is not None:
        from path_attention.doctor.dry_run import dry_run

        yield f"recipe {recipe}", lambda: dry_run(place, recipe)


def _attempt(place: Place, name: str, function: Callable[[], Check | list[Check]]) -> list[Check]:
    try:
        found = function()
    except torch.OutOfMemoryError as error:
        found = Check(name, "failed", f"out of memory: {' '.join(str(error).split())[:160]}")
    except (RuntimeError, ValueError, OSError) as error:
        # Told at once: if the others wait in this step, nobody gets to the table.
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        place.tell(f"rank {place.rank}: {name!r} failed: {text}")
        found = Check(name, "failed", text)
    return found if isinstance(found, list) else [found]


def _agreed(by_rank: list[list[Check]]) -> list[Check]:
    """The first process's checks, or in their place a failure of another one."""
    for rank, checks in enumerate(by_rank):
        for check in checks:
            if check.state == "failed":
                return [*by_rank[0][: checks.index(check)], Check(check.name, "failed", f"rank {rank}: {check.found}")]
    return by_rank[0]


def processes(place: Place) -> Check:
    """Who is there; two processes on one GPU would wait for each other in NCCL."""
    name = torch.cuda.get_device_name(place.device) if place.device.type == "cuda" else ""
    mine = (socket.gethostname(), str(place.device), name)
    everyone = place.all(mine)
    backend = dist.get_backend()
    where = ", ".join(f"{rank}: {host} {device}" for rank, (host, device, _) in enumerate(everyone))
    kinds = ", ".join(sorted({kind for *_, kind in everyone} - {""}))
    found = f"{place.size} by {backend}, {kinds + '; ' if kinds else ''}{where}"
    if place.device.type == "cuda":
        found += f"; NCCL {'.'.join(str(x) for x in torch.cuda.nccl.version())}"
        if len({(host, device) for host, device, _ in everyone}) < place.size:
            return Check("processes", "failed", f"several processes share a GPU: {where}")
    return Check("processes", "ok", found)


# --- collectives -----------------------------------------------------------------------------------------------------


def _all_reduce(place: Place, x: Tensor) -> tuple[Tensor, float, float]:
    """What came, what ought to, and bytes that each process sends over the link at least."""
    total = x.clone()
    dist.all_reduce(total)
    return total, sum(range(1, place.size + 1)), 2 * x.nbytes * (place.size - 1) / place.size


def _all_gather(place: Place, x: Tensor) -> tuple[Tensor, float, float]:
    parts = x.new_empty(place.size, x.numel())
    dist.all_gather(list(parts.unbind()), x)
    numbers = torch.arange(1, place.size + 1, dtype=x.dtype, device=x.device)
    return parts / numbers[:, None], 1, x.nbytes * (place.size - 1)


def _all_to_all(place: Place, x: Tensor) -> tuple[Tensor, float, float]:
    sent = x[: x.numel() // place.size * place.size]
    parts = torch.empty_like(sent)
    dist.all_to_all_single(parts, sent)
    numbers = torch.arange(1, place.size + 1, dtype=x.dtype, device=x.device)
    return parts.view(place.size, -1) / numbers[:, None], 1, sent.nbytes * (place.size - 1) / place.size


def _ring(place: Place, x: Tensor) -> tuple[Tensor, float, float]:
    (came,) = PassedOn(ContextParallel(dist.group.WORLD), [x]).wait()
    return came, (place.rank - 1) % place.size + 1, x.nbytes


COLLECTIVES: dict[str, Callable[[Place, Tensor], tuple[Tensor, float, float]]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "all_to_all": _all_to_all,
    "send and receive in a ring": _ring,
}


def collective(place: Place, name: str, function: Callable[[Place, Tensor], tuple[Tensor, float, float]]) -> Check:
    """Whether it brings what it ought to, and how fast: process r sends r + 1."""
    x = torch.full((MESSAGE[place.device.type],), place.rank + 1.0, device=place.device)
    if place.size == 1 and function is _ring:
        return Check(name, "note", "one process has no neighbour")
    came, wanted, moved = function(place, x)
    if not bool((came == wanted).all()):
        return Check(name, "failed", f"got numbers from {came.min().item()} to {came.max().item()}, wanted {wanted}")
    place.wait()
    start = time.perf_counter()
    for _ in range(TIMED):
        function(place, x)
    if place.device.type == "cuda":
        torch.cuda.synchronize(place.device)
    taken = max(place.all((time.perf_counter() - start) / TIMED))
    speed = f", {moved / taken / 1e9:.2f} GB/s sent by each" if place.size > 1 else ""
    return Check(name, "ok", f"right; {x.nbytes / 2**20:.0f} MiB in {1e3 * taken:.2f} ms{speed}")


def split_sequence(place: Place, formula: str, dtype: torch.dtype) -> Check:
    each, heads, dim = SPLIT[place.device.type]
    found = compare(place, each * place.size, heads, dim, dtype, formula == "path_fox")
    name = f"context parallel {formula}, {found['dtype']}"
    worst = max(found["errors"], key=lambda key: found["errors"][key])
    text = f"{found['length']} tokens, output and gradients; largest error {found['errors'][worst]:.1e} ({worst}), "
    text += f"of one process {found['errors_alone'][worst]:.1e}"
    if found["wrong"]:
        return Check(name, "failed", f"unlike one process: {', '.join(found['wrong'])}; {text}")
    return Check(name, "ok", text)


def shared_folder(place: Place, folder: Path | None) -> Path:
    """A new folder that all processes see.

    Raises:
        ValueError: one of them does not.
    """
    made = [None]
    if place.rank == 0:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        made = [tempfile.mkdtemp(prefix="path-attention-doctor-", dir=folder)]  # type: ignore[list-item]
    dist.broadcast_object_list(made, src=0, group=place.objects)
    found = Path(str(made[0]))
    blind = [rank for rank, sees in enumerate(place.all(found.is_dir())) if not sees]
    if blind:
        raise ValueError(f"--folder: wanted one that all processes see, got {found}, which ranks {blind} do not")
    return found
