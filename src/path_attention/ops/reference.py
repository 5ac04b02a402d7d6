"""The definition of PaTH attention, token by token: the oracle of every test and benchmark.

PaTH (arXiv 2505.16381, section 2.2) gives token t a transition matrix H_t = I - beta_t w_t^T w_t and scores key j for
query i by

    logit(i, j) = scale * q_i H_i H_{i-1} ... H_{j+1} k_j^T  +  sum_{s=j+1..i} g_s ,    j <= i .

Nothing here uses chunks, inverses or products of matrices: transitions are applied one at a time, so an error in the
derivation of the fast algorithm cannot hide here too. Everything is plain differentiable torch in the dtype of the
inputs (pass float64 for an oracle); time and memory are quadratic in the length.

Shapes: B batch, L length, HQ query heads, H key/value heads (HQ a multiple of H), D key dim, DV value dim,
R reflections.
"""

import torch
from torch import Tensor

from path_attention.autocast import without_autocast
from path_attention.ops.arguments import LOWEST_GATE, Arguments, sequence_bounds, validate_arguments


def _logits_one_sequence(q: Tensor, k: Tensor, w: Tensor, beta: Tensor, g: Tensor | None, scale: float) -> Tensor:
    """Logits (B, HQ, L, L) of whole sequences, -inf above the diagonal. q, k, w (B, HQ, L, ...): heads expanded."""
    length = q.shape[-2]
    columns: list[Tensor] = []
    moved = q[:, :, :0]  # queries i > t, each already times H_i ... H_{t+1}
    between = q[:, :, :0, 0]  # sums g_{t+1} + ... + g_i for i > t: differences of running sums would lose small gates
    for t in reversed(range(length)):
        moved = torch.cat([q[:, :, t : t + 1], moved], dim=2)
        scores = scale * (moved @ k[:, :, t, :, None]).squeeze(-1)  # (B, HQ, L - t)
        if g is not None:
            between = torch.nn.functional.pad(between, (1, 0))
            scores = scores + between
            between = between + g[:, :, t, None]
        columns.append(torch.nn.functional.pad(scores, (t, 0), value=float("-inf")))
        for r in reversed(range(w.shape[-2])):  # H_t = H_{t,R} ... H_{t,1}: a row vector meets H_{t,R} first
            w_t, beta_t = w[:, :, t, r], beta[:, :, t, r, None, None]
            moved = moved - beta_t * (moved @ w_t[..., None]) * w_t[:, :, None, :]
    return torch.stack(columns[::-1], dim=-1)


def path_attention_weights(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The attention matrix itself, (B, HQ, L, L), for people who want to look at it.

    Entry (i, j) is softmax over j of the logit in the module's formula; entries with j > i, and entries that would join
    two packed sequences, are 0. Arguments, shapes and errors are those of :func:`path_attention.path_attention` without
    ``v``. Computed by the definition in the promoted dtype of the inputs (float32 at least): quadratic time and memory.
    """
    arguments = validate_arguments(q, k, k, w, beta, g, scale=scale, cu_seqlens=cu_seqlens)
    bounds = sequence_bounds(cu_seqlens, q.shape[1])
    with without_autocast(q.device):
        return _weights(arguments, bounds)


def _weights(arguments: Arguments, bounds: list[tuple[int, int]]) -> Tensor:
    q, k, _, _, _, g, scale = arguments
    dtype = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[2] // k.shape[2]

    def heads_first(x: Tensor) -> Tensor:  # (B, L, H, ...) -> (B, HQ, L, ...)
        x = x.to(dtype).movedim(2, 1)
        return x.repeat_interleave(group, dim=1) if x.shape[1] != q.shape[2] else x

    w, beta = arguments.reflections()
    q_, k_ = heads_first(q), heads_first(k)
    w_, beta_ = heads_first(w.movedim(2, -2)), heads_first(beta.movedim(2, -1))
    g_ = None if g is None else g.to(dtype).clamp(min=LOWEST_GATE).movedim(2, 1)
    weights = q_.new_zeros(q_.shape[0], q_.shape[1], q.shape[1], q.shape[1])
    for start, end in bounds:
        if start == end:
            continue
        part = slice(start, end)
        logits = _logits_one_sequence(
            q_[:, :, part],
            k_[:, :, part],
            w_[:, :, part],
            beta_[:, :, part],
            None if g_ is None else g_[:, :, part],
            q.shape[-1] ** -0.5 if scale is None else scale,
        )
        block = torch.nn.functional.pad(logits.softmax(-1), (start, q.shape[1] - end, start, q.shape[1] - end))
        weights = weights + block
    return weights


def path_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """PaTH attention by its definition: the oracle.

    Same arguments, shapes and errors as :func:`path_attention.path_attention`.

    Returns (B, L, HQ, DV) in the promoted dtype of the inputs (float32 at least), differentiable in every input.
    Quadratic in time and memory; meant for float64 checks of a few thousand tokens at most.
    """
    arguments = validate_arguments(q, k, v, w, beta, g, scale=scale, cu_seqlens=cu_seqlens)
    bounds = sequence_bounds(cu_seqlens, q.shape[1])
    with without_autocast(q.device):
        weights = _weights(arguments, bounds)
        values = arguments.v.to(weights.dtype).repeat_interleave(q.shape[2] // v.shape[2], dim=2)
        return torch.einsum("bhij,bjhd->bihd", weights, values)
