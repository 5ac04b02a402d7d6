"""Folding in torch: tokens leave the open rows, their keys move to the right edge of their chunk."""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from path_attention.ops.dyadic import LEAF
from path_attention.ops.history.open_rows import Open, clamp_gates, gates_after
from path_attention.ops.history.serve import kernels_serve
from path_attention.ops.history.state import (
    FOLD,
    PAGE,
    SUFFIX,
    Rows,
    State,
    Tokens,
    decode_rows,
    encode_pages,
    encode_rows,
    slots,
)

# Leaves worked on at once: bounds what a long prefill holds besides its results (about 0.5 GB at head_dim 64).
LEAVES = 4096


class Folding(NamedTuple):
    """n tokens of b sequences to be folded, a multiple of FOLD, in the dtype of the computation but for v."""

    k: Tensor  # (b, H, n, D)
    v: Tensor  # (b, H, n, DV)
    w: Tensor  # (b, H, n * R, D)
    beta: Tensor  # (b, H, n * R)
    g: Tensor | None  # (b, HQ, n)

    @classmethod
    def of(cls, tokens: Tokens, first: int, end: int, wide: torch.dtype) -> "Folding":
        """Tokens first ... end - 1 of these, ``wide`` the dtype of the computation."""
        w, beta, g = tokens.w[:, first:end], tokens.beta[:, first:end], tokens.g
        return cls(
            k=tokens.k[:, first:end].transpose(1, 2).to(wide),
            v=tokens.v[:, first:end].transpose(1, 2),
            w=w.permute(0, 3, 1, 2, 4).flatten(2, 3).to(wide),
            beta=beta.permute(0, 3, 1, 2).flatten(2, 3).to(wide),
            g=None if g is None else clamp_gates(g[:, first:end].transpose(1, 2), wide),
        )

    def part(self, first: int, end: int) -> "Folding":
        reflections = self.w.shape[2] // self.k.shape[2]
        steps = slice(first * reflections, end * reflections)
        return Folding(
            k=self.k[:, :, first:end],
            v=self.v[:, :, first:end],
            w=self.w[:, :, steps],
            beta=self.beta[:, :, steps],
            g=None if self.g is None else self.g[:, :, first:end],
        )


def fold(state: State, rows: Rows, folded: int, tokens: Folding) -> None:
    """Put tokens behind the folded ones."""
    for first, end, chunks in _cuts(state, folded, tokens.k.shape[2]):
        part = tokens.part(first, end)
        if chunks:
            _fold_chunks(state, rows, folded + first, part)
        else:
            k, product = right_edge(part.k[:, :, None], part.w[:, :, None], part.beta[:, :, None])
            _fold_behind(state, rows, folded + first, k[:, :, 0], product[:, :, 0], part.v, part.g)


def _cuts(state: State, folded: int, count: int) -> Iterator[tuple[int, int, int]]:
    """(first, end, whole chunks) of tokens behind the folded ones: first those that fill the open chunk, then all whole
    chunks, then what is left.
    """
    missing = min(count, -folded % state.chunk)
    chunks = (count - missing) // state.chunk
    whole = missing + chunks * state.chunk
    for first, end in pairwise((0, missing, whole, count)):
        if first < end:
            yield first, end, chunks if first == missing and end == whole else 0


def fold_by_kernel(state: State, rows: Rows, folded: int, due: int, tokens: Tokens) -> None:
    """As :func:`fold`, of the first ``due`` of these tokens."""
    from path_attention.ops.kernels import decode

    decode.fold_tokens(state, None if isinstance(rows, slice) else rows, folded, due, tokens)
    fold_gates(state, rows, folded, due, tokens)


def fold_gates(state: State, rows: Rows, folded: int, due: int, tokens: Tokens) -> None:
    """What kernels leave of :func:`fold` of the first ``due`` of these tokens: their gates, where they have any."""
    if tokens.g is None:
        return
    g = clamp_gates(tokens.g[:, :due].transpose(1, 2), state.w.dtype)
    for first, end, chunks in _cuts(state, folded, due):
        part = g[:, :, first:end].unflatten(2, (max(1, chunks), -1))
        _fold_gates(state, rows, folded + first, part)


def _fold_gates(state: State, rows: Rows, folded: int, g: Tensor) -> None:
    """Gates (b, HQ, chunks, n) of tokens behind the folded ones, of whole chunks or of the open one."""
    count, size = g.shape[2] * g.shape[3], state.chunk
    old = folded % size
    where = slots(state, rows, folded - old, folded + count)
    totals = g.sum(3)  # (b, HQ, chunks)
    state.gates[:, where[:, old:]] = gates_after(g).flatten(2, 3).transpose(0, 1)
    if old:
        state.gates[:, where[:, :old]] += totals.transpose(0, 1)
        totals = totals + state.gate_total[rows][..., None]
    if (folded + count) % size:
        state.gate_total[rows] = totals[..., 0]
    else:
        chunks = state.chunks[rows][:, folded // size : folded // size + g.shape[2]].long()
        state.gate_totals[chunks] = totals.transpose(1, 2)


def fold_oldest(state: State, rows: Rows, folded: int, open_rows: Open) -> None:
    """Fold the FOLD oldest open tokens: their transitions one after another, as the definition has them.

    I - W^T A W would cost as much. But A is as large as one over the angle of near-parallel reflections, and what is
    left of its digits when its terms cancel is kept here for all tokens to come.
    """
    reflections, wide = state.reflections, open_rows.w.dtype
    steps = FOLD * reflections
    w, beta = open_rows.w[:, :, :steps], open_rows.beta[:, :, :steps]
    k = open_rows.k[:, :, :FOLD]
    identity = torch.eye(k.shape[-1], dtype=wide, device=k.device).expand(*k.shape[:2], -1, -1)
    x = torch.cat([k, identity], 2)  # rows that move right: the keys, and those whose images are P^T
    token = torch.arange(FOLD, device=k.device)
    for step in range(steps):
        behind = torch.cat([token < step // reflections, token.new_ones(k.shape[-1]).bool()])
        along = (x @ w[:, :, step, :, None]) * (beta[:, :, step, None, None] * behind[:, None])
        x = x - along * w[:, :, step, None]
    k, product = x[:, :, :FOLD], x[:, :, FOLD:].mT
    g = None if open_rows.g is None else open_rows.g[:, :, :FOLD]
    _fold_behind(state, rows, folded, k, product, open_rows.v[:, :, :FOLD].to(state.values.dtype), g)


# --- rows at edges ---------------------------------------------------------------------------------------------------


def right_edge(k: Tensor, w: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Keys (b, H, spans, n, D) at the right edge of their span, and the spans' products (b, H, spans, D, D)."""
    n, dim = k.shape[3:]
    leaf = min(LEAF, n)
    pad, reflections = -n % leaf, w.shape[3] // n
    spans = k.shape[:3]
    k = torch.nn.functional.pad(k, (0, 0, 0, pad)).reshape(-1, (n + pad) // leaf, leaf, dim)
    w = torch.nn.functional.pad(w, (0, 0, 0, pad * reflections)).reshape(*k.shape[:2], leaf * reflections, dim)
    beta = torch.nn.functional.pad(beta, (0, pad * reflections)).reshape(w.shape[:3])
    size = max(1, LEAVES // k.shape[1])
    parts = [_leaves_to_edge(*part) for part in zip(k.split(size), w.split(size), beta.split(size), strict=True)]
    keys, products = torch.cat([x for x, _ in parts]), torch.cat([x for _, x in parts])
    return keys[:, :n].view(*spans, n, dim), products.view(*spans, dim, dim)


def _leaves_to_edge(k: Tensor, w: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Leaves of m spans, k (m, leaves, leaf, D): keys (m, leaves * leaf, D) and products (m, D, D)."""
    a, y = _factors(k, w, beta)
    wide = w.to(a.dtype)
    identity = torch.eye(w.shape[-1], dtype=a.dtype, device=w.device)
    # On GPUs torch may have been told to round float32 products to 11 bits; these are for all tokens to come.
    exact = a.dtype if k.is_cuda else k.dtype
    k_right = (k.to(a.dtype) - y.mT @ wide).to(exact)
    after, total = products_after((identity - wide.mT @ (a @ wide)).to(exact))
    return (k_right @ after.mT).flatten(1, 2).to(k.dtype), total.to(k.dtype)


def _factors(k: Tensor, w: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """A (..., n * R, n * R) and Y (..., n * R, n) of ops/leaf.py, of leaves k (..., n, D), w (..., n * R, D), beta."""
    wide = w.dtype if w.device.type == "mps" else torch.float64
    w, beta, k = w.to(wide), beta.to(wide), k.to(wide)
    n = k.shape[-2]
    token = torch.arange(n, device=w.device)
    after = token.repeat_interleave(w.shape[-2] // n)[:, None] > token
    # solve_triangular reads the strict lower triangle only: the unit diagonal of T is implied.
    t = (w @ w.mT) * beta[..., None]
    a = torch.linalg.solve_triangular(t, torch.diag_embed(beta), upper=False, unitriangular=True)
    return a, a @ ((w @ k.mT) * after)


def products_after(product: Tensor) -> tuple[Tensor, Tensor]:
    """(..., N, D, D) -> P_{N-1} ... P_{n+1} of each n, and the product of all (..., D, D)."""
    total = product.clone()
    span = 1
    while span < total.shape[-3]:
        total[..., :-span, :, :] = total[..., span:, :, :].clone() @ total[..., :-span, :, :]
        span *= 2
    identity = torch.eye(product.shape[-1], dtype=product.dtype, device=product.device)
    after = torch.cat([total[..., 1:, :, :], identity.expand_as(total[..., :1, :, :])], -3)
    return after, total[..., 0, :, :]


# --- writing ---------------------------------------------------------------------------------------------------------


def _fold_chunks(state: State, rows: Rows, folded: int, tokens: Folding) -> None:
    """Whole chunks, where no chunk is open."""
    count, size = tokens.k.shape[2], state.chunk

    def by_chunk(x: Tensor, dim: int = 2) -> Tensor:
        return x.unflatten(dim, (count // size, -1))

    k, product = right_edge(by_chunk(tokens.k), by_chunk(tokens.w), by_chunk(tokens.beta))
    first = folded // size
    where = state.chunks[rows][:, first : first + count // size].long()
    state.products[where] = product.transpose(1, 2)
    if tokens.g is not None:
        _fold_gates(state, rows, folded, by_chunk(tokens.g))
    _write(state, slots(state, rows, folded, folded + count), k.flatten(2, 3), tokens.v, finished=True)


def _write(state: State, where: Tensor, k: Tensor, v: Tensor, *, finished: bool) -> Tensor | None:
    """Keys (b, H, n, D) and values to slots (b, n); returns the scales of the keys, where unfinished.

    v are those of the last tokens only, perhaps fewer.
    """
    scale = None
    if not state.coded:
        state.keys[:, where] = k.transpose(0, 1).to(state.keys.dtype)
    elif finished:
        codes, page_scale = encode_pages(k)
        state.keys[:, where] = codes.transpose(0, 1)
        state.key_scale[:, where[:, ::PAGE] // PAGE] = page_scale.transpose(0, 1)
    else:
        codes, scale = encode_rows(k)
        state.keys.view(torch.int16)[:, where] = codes.transpose(0, 1)
    state.values[:, where[:, where.shape[1] - v.shape[2] :]] = v.transpose(0, 1)
    return scale


def _fold_behind(
    state: State, rows: Rows, folded: int, k: Tensor, product: Tensor, v: Tensor, g: Tensor | None
) -> None:
    """Tokens of one chunk behind those it has, which move on with them: k (b, H, n, D) at the right edge of the new
    ones, and their product (b, H, D, D).
    """
    old = folded % state.chunk
    new = old + k.shape[2]
    where = slots(state, rows, folded - old, folded + k.shape[2])
    if g is not None:
        _fold_gates(state, rows, folded, g[:, :, None])
    if old:
        moved = state.keys[:, where[:, :old]].transpose(0, 1)
        if state.coded:
            moved = decode_rows(moved.view(torch.int16), state.scale[rows][:, :, :old])
        k = torch.cat([moved @ product.mT, k], 2)
        product = product @ state.product[rows]
    finished = new == state.chunk
    scale = _write(state, where, k, v, finished=finished)
    if scale is not None:
        state.scale[rows, :, :new] = scale
    if finished:
        state.products[state.chunks[rows][:, folded // state.chunk].long()] = product
    else:
        state.product[rows] = product


# --- suffixes --------------------------------------------------------------------------------------------------------


def refresh_suffix(state: State, before: list[tuple[int, int]] | None, now: list[tuple[int, int]]) -> None:
    """Let the suffixes take in all finished chunks that make whole groups, where there are more than ``before``.

    Both are (folded, length) by sequence. Only kernels use suffixes, which would have to go from chunk to chunk one
    product after another.
    """
    group = state.chunk * SUFFIX
    wanted = [folded // group for folded, _ in now]
    if not kernels_serve(state) or (before is not None and wanted == [folded // group for folded, _ in before]):
        return
    if max(wanted) > state.suffix.shape[1]:
        state.suffix = state.suffix.new_zeros(len(now), max(wanted), *state.suffix.shape[2:])
        state.suffix_gate = state.suffix_gate.new_zeros(len(now), max(wanted), state.suffix_gate.shape[2])
    for groups in sorted(set(wanted) - {0}):
        members = [row for row, x in enumerate(wanted) if x == groups]
        rows = torch.tensor(members).to(state.k.device, non_blocking=True)
        where = state.chunks[rows][:, : groups * SUFFIX].long().unflatten(1, (groups, SUFFIX))
        products = state.products[where].permute(0, 3, 1, 2, 4, 5).double()  # (b, H, groups, SUFFIX, D, D)
        after, _ = products_after(products_after(products)[1])
        state.suffix[rows, :groups] = after.transpose(1, 2).to(state.suffix.dtype)
        if state.gated:
            totals = state.gate_totals[where].sum(2)  # (b, groups, HQ)
            state.suffix_gate[rows, :groups] = gates_after(totals.transpose(1, 2)).transpose(1, 2)
    state.covered.copy_(torch.tensor(wanted, dtype=torch.int32) * SUFFIX, non_blocking=True)
