"""What the operator accepts: one place that checks it and says, by argument name, what came and what is wanted."""

from itertools import pairwise
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from path_attention.autocast import autocast_dtype
from path_attention.checks import bad

# Log gates count as this where they are lower. exp of it is 0 in every dtype and no logit makes up for it, yet the sum
# of 3e8 of them is still a float32, where lower ones would add up to -inf, and -inf less -inf is no number.
LOWEST_GATE = -1e30
FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Arguments(NamedTuple):
    """A valid call, its tensors cast as autocast asks."""

    q: Tensor
    k: Tensor
    v: Tensor
    w: Tensor
    beta: Tensor
    g: Tensor | None
    scale: float | None  # None: D ** -0.5, left open so that D may be a symbol

    def reflections(self) -> tuple[Tensor, Tensor]:
        """w (B, L, R, H, D) and beta (B, L, R, H), whichever of the two forms the caller used."""
        w, beta = self.w, self.beta
        return (w, beta) if w.dim() == 5 else (w.unsqueeze(2), beta.unsqueeze(2))


def _shape(x: Tensor) -> str:
    return str(tuple(x.shape))


# Messages are put together only where a check fails: torch.compile follows the checks, and can, under dynamic shapes,
# branch on a symbolic length but not print it.


def check_tensor(name: str, x: object) -> None:
    """An ordinary tensor, with strides."""
    if not isinstance(x, Tensor):
        raise bad(name, type(x).__name__, "a torch.Tensor")
    if x.layout != torch.strided:
        raise bad(name, f"layout {x.layout}", "torch.strided, a dense tensor")


def _check_floating(tensors: dict[str, Tensor]) -> None:
    for name, x in tensors.items():
        check_tensor(name, x)
        if x.dtype not in FLOATING:
            raise bad(name, f"dtype {x.dtype}", "float64, float32, bfloat16 or float16")


def _check_together(q: Tensor, others: dict[str, Tensor]) -> None:
    for name, x in others.items():
        if x.device != q.device:
            raise bad(name, f"device {x.device}", f"the device of q, {q.device}")
    for name in ("k", "v"):
        if others[name].dtype != q.dtype:
            raise bad(name, f"dtype {others[name].dtype}", f"the dtype of q, {q.dtype}")
    for name in ("w", "beta", "g"):
        if name in others and others[name].dtype not in (q.dtype, torch.float32):
            raise bad(name, f"dtype {others[name].dtype}", f"the dtype of q, {q.dtype}, or float32")


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, w: Tensor, beta: Tensor, g: Tensor | None) -> None:
    if q.dim() != 4:
        raise bad("q", f"shape {_shape(q)}", "4 dimensions (batch, length, query heads, head_dim)")
    batch, length, query_heads, dim = q.shape
    if query_heads < 1 or dim < 1:
        raise bad("q", f"shape {_shape(q)}", "at least one head and head_dim >= 1")
    if k.dim() != 4:
        raise bad("k", f"shape {_shape(k)}", "4 dimensions (batch, length, heads, head_dim)")
    heads = k.shape[2]
    if (k.shape[0], k.shape[1], k.shape[3]) != (batch, length, dim):
        raise bad("k", f"shape {_shape(k)}", f"({batch}, {length}, heads, {dim}) to go with q {_shape(q)}")
    if heads < 1 or query_heads % heads:
        raise bad("k", f"{heads} heads", f"a number of heads that divides the {query_heads} query heads of q")
    if v.dim() != 4 or v.shape[:3] != k.shape[:3] or v.shape[3] < 1:
        wanted = f"({batch}, {length}, {heads}, value_dim) to go with k {_shape(k)}"
        raise bad("v", f"shape {_shape(v)}", wanted)
    plain = w.shape == k.shape
    several = w.dim() == 5 and w.shape[:2] == k.shape[:2] and w.shape[3:] == k.shape[2:] and w.shape[2] >= 1
    if not (plain or several):
        wanted = (
            f"({batch}, {length}, {heads}, {dim}), or ({batch}, {length}, R, {heads}, {dim}) for R reflections a token"
        )
        raise bad("w", f"shape {_shape(w)}", wanted)
    if beta.shape != w.shape[:-1]:
        raise bad("beta", f"shape {_shape(beta)}", f"{tuple(w.shape[:-1])}, the shape of w without its last dimension")
    if g is not None and g.shape != q.shape[:3]:
        wanted = f"({batch}, {length}, {query_heads}): one log gate for each token and query head"
        raise bad("g", f"shape {_shape(g)}", wanted)


def check_cu_seqlens(cu_seqlens: Tensor, device: torch.device) -> None:
    """What can be said of boundaries without their values."""
    check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise bad("cu_seqlens", f"dtype {cu_seqlens.dtype}", "int32 or int64")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise bad("cu_seqlens", f"shape {_shape(cu_seqlens)}", "(number of sequences + 1,)")
    if cu_seqlens.device != device and cu_seqlens.device.type != "cpu":
        raise bad("cu_seqlens", f"device {cu_seqlens.device}", f"the device of the tokens, {device}, or the host")


def sequence_bounds(cu_seqlens: Tensor | None, length: int) -> list[tuple[int, int]]:
    """(start, end) of every sequence in a row: the whole row, or what cu_seqlens says (read to the host).

    Raises:
        ValueError: cu_seqlens does not run from 0 to the length in values that never decrease.
    """
    if cu_seqlens is None:
        return [(0, length)]
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != length:
        wanted = f"first 0 and last {length}, the number of tokens"
        raise bad("cu_seqlens", f"first {ends[0]} and last {ends[-1]}", wanted)
    bounds = list(pairwise(ends))
    if any(start > end for start, end in bounds):
        raise bad("cu_seqlens", ends, "values that never decrease")
    return bounds


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
        outside = ~torch.isfinite(x)
        if bool(outside.any()):
            index = tuple(int(i) for i in outside.nonzero()[0])
            raise bad(name, f"{float(x[index])} at index {index}", "finite values")
    outside = (beta < 0) | (beta > 2)
    if bool(outside.any()):
        index = tuple(int(i) for i in outside.nonzero()[0])
        raise bad("beta", f"{float(beta[index])} at index {index}", "values in [0, 2]")
    dtype = torch.promote_types(w.dtype, torch.float32)
    norm = torch.linalg.vector_norm(w, dim=-1, dtype=dtype)
    # A row normalised in the dtype of w misses length 1 by a few units of its last place. A sum of D squares, here and
    # where the row was normalised, is off by at most D eps / 2, its root by half of that. Zero rows are padding.
    tolerance = 4 * torch.finfo(w.dtype).eps + w.shape[-1] / 2 * torch.finfo(dtype).eps
    outside = ((norm - 1).abs() > tolerance) & (norm != 0)
    if bool(outside.any()):
        index = tuple(int(i) for i in outside.nonzero()[0])
        raise bad("w", f"length {float(norm[index])} at index {index}", "unit vectors (or zero, for padding)")
    if g is not None and bool((g > 0).any()):
        index = tuple(int(i) for i in (g > 0).nonzero()[0])
        raise bad("g", f"{float(g[index])} at index {index}", "logarithms of gates, at most 0")
    sequence_bounds(cu_seqlens, q.shape[1])


def _check_scale(scale: object) -> float | None:
    if scale is None or isinstance(scale, (torch.SymFloat, torch.SymInt)):
        return scale  # type: ignore[return-value]  # symbols stand for numbers while a graph is traced
    if not isinstance(scale, (int, float, Real)) or isinstance(scale, bool):
        raise bad("scale", repr(scale), "a number or None")
    try:
        value = float(scale)
    except OverflowError:
        value = float("inf")
    if not abs(value) < float("inf"):
        raise bad("scale", value, "a finite number")
    return value


def _as_autocast(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, beta: Tensor, g: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """q, k and v in the dtype of autocast, where it is on; as everywhere under autocast, float64 stays."""
    dtype = autocast_dtype(q.device)
    if dtype is None:
        return q, k, v, w, beta, g

    def cast(x: Tensor, to: torch.dtype) -> Tensor:
        return x if x.dtype == torch.float64 else x.to(to)

    def side(x: Tensor) -> Tensor:  # may stay float32; only the other half precision would not go with q
        return x if x.dtype == dtype else cast(x, torch.float32)

    return cast(q, dtype), cast(k, dtype), cast(v, dtype), side(w), side(beta), None if g is None else side(g)


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
    """Check types, dtypes, devices and shapes before anything is computed, and cast as autocast asks.

    The values of cu_seqlens are not read here but by :func:`sequence_bounds`, inside the operator, where they are known
    also while a graph is traced.

    Raises:
        ValueError: naming the argument, what was given and what is wanted.
    """
    gate = {} if g is None else {"g": g}
    _check_floating({"q": q, "k": k, "v": v, "w": w, "beta": beta} | gate)
    q, k, v, w, beta, g = _as_autocast(q, k, v, w, beta, g)
    gate = {} if g is None else {"g": g}
    _check_together(q, {"k": k, "v": v, "w": w, "beta": beta} | gate)
    _check_shapes(q, k, v, w, beta, g)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, q.device)
        if q.shape[0] != 1:
            raise bad("q", f"batch {q.shape[0]}", "batch 1 when cu_seqlens packs the sequences into one row")
    elif q.shape[1] < 1:
        raise bad("q", f"length {q.shape[1]}", "at least one token")
    return Arguments(q, k, v, w, beta, g, _check_scale(scale))
