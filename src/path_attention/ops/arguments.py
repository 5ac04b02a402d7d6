"""What the operator accepts: one place that checks it and says, by argument name, what came and what is wanted."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Arguments:
    """The facts about a valid call that the rest of the operator needs."""

    scale: float
    num_reflections: int  # R: 1 when w came without that dimension

    def reflections(self, w: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        """w (B, L, R, H, D) and beta (B, L, R, H), whichever of the two forms the caller used."""
        return (w, beta) if w.dim() == 5 else (w.unsqueeze(2), beta.unsqueeze(2))


def _shape(x: Tensor) -> str:
    return str(tuple(x.shape))


def _bad(name: str, got: object, wanted: str) -> ValueError:
    return ValueError(f"{name}: got {got}; wanted {wanted}")


# Messages are put together only where a check fails: torch.compile follows the checks, and can, under dynamic shapes,
# branch on a symbolic length but not print it.


def _check_tensors(q: Tensor, others: dict[str, Tensor]) -> None:
    for name, x in {"q": q, **others}.items():
        if not isinstance(x, Tensor):
            raise _bad(name, type(x).__name__, "a torch.Tensor")
        if x.dtype not in FLOATING:
            raise _bad(name, f"dtype {x.dtype}", "float64, float32, bfloat16 or float16")
        if x.device != q.device:
            raise _bad(name, f"device {x.device}", f"the device of q, {q.device}")
    for name in ("k", "v"):
        if others[name].dtype != q.dtype:
            raise _bad(name, f"dtype {others[name].dtype}", f"the dtype of q, {q.dtype}")
    for name in ("w", "beta", "g"):
        if name in others and others[name].dtype not in (q.dtype, torch.float32):
            raise _bad(name, f"dtype {others[name].dtype}", f"the dtype of q, {q.dtype}, or float32")


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, w: Tensor, beta: Tensor, g: Tensor | None) -> None:
    if q.dim() != 4:
        raise _bad("q", f"shape {_shape(q)}", "4 dimensions (batch, length, query heads, head_dim)")
    batch, length, query_heads, dim = q.shape
    if query_heads < 1 or dim < 1:
        raise _bad("q", f"shape {_shape(q)}", "at least one head and head_dim >= 1")
    if k.dim() != 4:
        raise _bad("k", f"shape {_shape(k)}", "4 dimensions (batch, length, heads, head_dim)")
    heads = k.shape[2]
    if (k.shape[0], k.shape[1], k.shape[3]) != (batch, length, dim):
        raise _bad("k", f"shape {_shape(k)}", f"({batch}, {length}, heads, {dim}) to go with q {_shape(q)}")
    if heads < 1 or query_heads % heads:
        raise _bad("k", f"{heads} heads", f"a number of heads that divides the {query_heads} query heads of q")
    if v.dim() != 4 or v.shape[:3] != k.shape[:3] or v.shape[3] < 1:
        wanted = f"({batch}, {length}, {heads}, value_dim) to go with k {_shape(k)}"
        raise _bad("v", f"shape {_shape(v)}", wanted)
    plain = w.shape == k.shape
    several = w.dim() == 5 and w.shape[:2] == k.shape[:2] and w.shape[3:] == k.shape[2:] and w.shape[2] >= 1
    if not (plain or several):
        wanted = (
            f"({batch}, {length}, {heads}, {dim}), or ({batch}, {length}, R, {heads}, {dim}) for R reflections a token"
        )
        raise _bad("w", f"shape {_shape(w)}", wanted)
    if beta.shape != w.shape[:-1]:
        raise _bad("beta", f"shape {_shape(beta)}", f"{tuple(w.shape[:-1])}, the shape of w without its last dimension")
    if g is not None and g.shape != q.shape[:3]:
        wanted = f"({batch}, {length}, {query_heads}): one log gate for each token and query head"
        raise _bad("g", f"shape {_shape(g)}", wanted)


def _check_cu_seqlens(cu_seqlens: Tensor, q: Tensor) -> None:
    if not isinstance(cu_seqlens, Tensor):
        raise _bad("cu_seqlens", type(cu_seqlens).__name__, "a torch.Tensor")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise _bad("cu_seqlens", f"dtype {cu_seqlens.dtype}", "int32 or int64")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise _bad("cu_seqlens", f"shape {_shape(cu_seqlens)}", "(number of sequences + 1,)")
    if q.shape[0] != 1:
        raise _bad("q", f"batch {q.shape[0]}", "batch 1 when cu_seqlens packs the sequences into one row")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        # Only here: reading values from a GPU would make the host wait for it.
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != q.shape[1]:
            raise _bad(
                "cu_seqlens", f"first {ends[0]} and last {ends[-1]}", f"first 0 and last {q.shape[1]}, the length of q"
            )
        if any(a > b for a, b in pairwise(ends)):
            raise _bad("cu_seqlens", ends, "values that never decrease")


def check_values(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, beta: Tensor, g: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    """The checks that must read every value (``check_inputs=True``): NaN or inf anywhere, beta outside [0, 2], w not of
    unit or zero length, g above 0, cu_seqlens. Reading results back makes the host wait for the device.

    Raises:
        ValueError: naming the argument, the worst value found and its index.
    """
    named = {"q": q, "k": k, "v": v, "w": w, "beta": beta} | ({} if g is None else {"g": g})
    for name, x in named.items():
        bad = ~torch.isfinite(x)
        if bool(bad.any()):
            index = tuple(int(i) for i in bad.nonzero()[0])
            raise _bad(name, f"{float(x[index])} at index {index}", "finite values")
    outside = (beta < 0) | (beta > 2)
    if bool(outside.any()):
        index = tuple(int(i) for i in outside.nonzero()[0])
        raise _bad("beta", f"{float(beta[index])} at index {index}", "values in [0, 2]")
    norm = torch.linalg.vector_norm(w, dim=-1, dtype=torch.promote_types(w.dtype, torch.float32))
    # A row normalised in the dtype of w misses length 1 by a few units of its last place; zero rows are padding.
    tolerance = 4 * torch.finfo(w.dtype).eps
    outside = ((norm - 1).abs() > tolerance) & (norm != 0)
    if bool(outside.any()):
        index = tuple(int(i) for i in outside.nonzero()[0])
        raise _bad("w", f"length {float(norm[index])} at index {index}", "unit vectors (or zero, for padding)")
    if g is not None and bool((g > 0).any()):
        index = tuple(int(i) for i in (g > 0).nonzero()[0])
        raise _bad("g", f"{float(g[index])} at index {index}", "logarithms of gates, at most 0")
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens.cpu(), q)


def validate_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    beta: Tensor,
    g: Tensor | None,
    *,
    scale: float | None,
    cu_seqlens: Tensor | None,
) -> Arguments:
    """Check types, dtypes, devices and shapes before anything is computed.

    Raises:
        ValueError: naming the argument, what was given and what is wanted.
    """
    others = {"k": k, "v": v, "w": w, "beta": beta} | ({} if g is None else {"g": g})
    _check_tensors(q, others)
    _check_shapes(q, k, v, w, beta, g)
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, q)
    elif q.shape[1] < 1:
        raise _bad("q", f"length {q.shape[1]}", "at least one token")
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if not isinstance(scale, (int, float)) or isinstance(scale, bool):
        raise _bad("scale", repr(scale), "a number or None")
    if not abs(scale) < float("inf"):
        raise _bad("scale", scale, "a finite number")
    return Arguments(scale=float(scale), num_reflections=w.shape[2] if w.dim() == 5 else 1)


def sequence_bounds(cu_seqlens: Tensor | None, length: int) -> list[tuple[int, int]]:
    """(start, end) of every sequence in a row: the whole row, or what cu_seqlens says (read to the host)."""
    if cu_seqlens is None:
        return [(0, length)]
    ends = cu_seqlens.tolist()
    return list(pairwise(ends))
