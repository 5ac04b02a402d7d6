"""What a cache of PaTH attention holds, and the two things done with it: attend to it, add to it.

A sequence of L tokens is kept in two parts. The first ``folded`` tokens, a multiple of the leaf, are *folded*: their
keys stand, rounded to the dtype of the cache once, at the right edge of their chunk of C tokens, in blocks of one chunk
each; a finished chunk also keeps its product P and never changes again. In the last chunk, as long as it is open, the
right edge is that of its last folded leaf. The other tokens are *open*: their rows are kept as they came, beside two
matrices that a query needs to pass them (docs/math.md, section 2): with n open tokens

    U = T^{-1} D W        Y = T^{-1} D Z        logits = q K^T - (q W^T) Y        q_left = q - (q W^T) U

Both grow by one row a reflection, because T is lower triangular. A query then goes left from edge to edge,

    x <- q_left,  x <- x P_open,  x <- x P_c  for the finished chunks c from right to left,

one (D x D) product a chunk, and meets the keys of each chunk at its right edge: one read of K and V. As soon as the
open rows are LEAF more than the last ``keep``, which a rollback may take away, their first leaf is folded. Folding
moves the keys of the open chunk to their new edge. They are kept in twice the precision meanwhile (the rounded key and
what the rounding took away), so that a key is rounded once however often it moves.

Legend: B sequences, H key/value heads, G query heads for each of them, HQ = H G, C tokens a chunk, O open rows at most,
R reflections a token, D key dim, DV value dim; b sequences of the same length and fold, worked on together.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from path_attention.ops import dyadic
from path_attention.ops.autograd import path_attention_forward
from path_attention.ops.backends import AUTO
from path_attention.ops.dyadic import LEAF
from path_attention.ops.engines.decode import attend
from path_attention.ops.leaf import leaf_edges
from path_attention.ops.spans import plan_spans

# Query rows that are moved to the edges of all chunks at once, in rows times chunks: bounds the temporaries of a long
# prefill against a long history, whatever their lengths (32 MB a head of 64 in float32 at 2^17).
MOVED_ROWS = 2**17

Rows = slice | Tensor  # which of the B sequences: all of them, or by index


@dataclass
class State:
    """The tensors of one cache. Every one is contiguous, the head dim last; none is replaced while it is added to.

    Blocks (N of them) belong to whoever's table names them; all others have a row for each sequence. Fields of length 0
    are not in use: gates where there are none, ``low`` in float32 and float64.
    """

    keys: Tensor  # (N, H, C, D), dtype of the cache, at the right edge of their chunk
    values: Tensor  # (N, H, C, DV)
    products: Tensor  # (N, H, D, D) float32: P of a finished chunk
    gates: Tensor  # (N, HQ, C) float32: sum of g from the token after this one to its chunk's right edge
    gate_totals: Tensor  # (N, HQ) float32: sum of g over a finished chunk
    table: Tensor  # (B, blocks) int64: the block of each chunk
    length: Tensor  # (B,) int64: tokens
    folded: Tensor  # (B,) int64: of these, in blocks
    product: Tensor  # (B, H, D, D) float32: P_open, of the folded leaves of the open chunk
    gate_total: Tensor  # (B, HQ) float32: sum of g over them
    low: Tensor  # (B, H, C, D) dtype of the cache: what rounding took from the keys of the open chunk
    k: Tensor  # (B, H, O, D) dtype of the cache: open rows from here on
    v: Tensor  # (B, H, O, DV)
    w: Tensor  # (B, H, O * R, D) float32
    beta: Tensor  # (B, H, O * R) float32
    g: Tensor  # (B, HQ, O) float32
    u: Tensor  # (B, H, O * R, D) float32
    y: Tensor  # (B, H, O * R, O) float32

    @property
    def chunk(self) -> int:
        return self.keys.shape[2]

    @property
    def reflections(self) -> int:
        return self.w.shape[2] // self.k.shape[2]

    @property
    def gated(self) -> bool:
        return self.g.numel() > 0

    def tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


BLOCK_FIELDS = ("keys", "values", "products", "gates", "gate_totals")
ROW_FIELDS = tuple(field.name for field in fields(State) if field.name not in BLOCK_FIELDS)


class Tokens(NamedTuple):
    """T new tokens of each of some sequences; w (b, T, R, H, D) and beta (b, T, R, H) as the operator takes them."""

    q: Tensor
    k: Tensor
    v: Tensor
    w: Tensor
    beta: Tensor
    g: Tensor | None
    scale: float

    def of(self, rows: Rows, tokens: slice = slice(None)) -> "Tokens":
        """Those of some sequences, or some tokens of them."""
        g = None if self.g is None else self.g[rows][:, tokens]
        q, k, v, w, beta = (x[rows][:, tokens] for x in (self.q, self.k, self.v, self.w, self.beta))
        return Tokens(q, k, v, w, beta, g, self.scale)


# Sequences are told apart on the host: in the torch engine each group is some kernel launches of its own.
def groups(state: State) -> Iterator[tuple[Rows, int, int]]:
    """(sequences, folded, length) of all that agree in both: a batch of equal lengths is one group."""
    both = list(zip(state.folded.tolist(), state.length.tolist(), strict=True))
    if len(set(both)) == 1:
        yield slice(None), *both[0]
        return
    for folded, length in sorted(set(both)):
        rows = [row for row, x in enumerate(both) if x == (folded, length)]
        yield torch.tensor(rows), folded, length


def append(state: State, tokens: Tokens, keep: int) -> Tensor:
    """Add T tokens to every sequence; out (B, T, HQ, DV), their attention over all tokens up to them.

    ``keep``: tokens that stay open. The tables must have blocks for what is folded; O >= LEAF + keep.
    """
    batch, count, query_heads = tokens.q.shape[:3]
    out = tokens.q.new_empty(batch, count, query_heads, tokens.v.shape[3])
    for rows, folded, length in list(groups(state)):
        out[rows] = append_group(state, rows, folded, length, tokens.of(rows), keep)
    return out


# The torch engine tells sequences apart on the host, which a CUDA graph cannot hold: the tag keeps it out of them.
@torch.library.custom_op(
    "path_attention::append",
    mutates_args=tuple(f.name for f in fields(State) if f.name != "table"),
    tags=(torch.Tag.cudagraph_unsafe,),
)
def append_operator(
    q: Tensor,
    new_k: Tensor,
    new_v: Tensor,
    new_w: Tensor,
    new_beta: Tensor,
    new_g: Tensor | None,
    scale: float,
    keep: int,
    keys: Tensor,
    values: Tensor,
    products: Tensor,
    gates: Tensor,
    gate_totals: Tensor,
    table: Tensor,
    length: Tensor,
    folded: Tensor,
    product: Tensor,
    gate_total: Tensor,
    low: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    beta: Tensor,
    g: Tensor,
    u: Tensor,
    y: Tensor,
) -> Tensor:
    """:func:`append` as an operator that torch.compile sees as one node: the fields of Tokens, and of State."""
    state = State(
        keys,
        values,
        products,
        gates,
        gate_totals,
        table,
        length,
        folded,
        product,
        gate_total,
        low,
        k,
        v,
        w,
        beta,
        g,
        u,
        y,
    )
    room = table.shape[1] * state.chunk
    if int(length.max()) + q.shape[1] > room:
        raise ValueError(
            f"q: got {q.shape[1]} tokens behind {int(length.max())}; wanted {room} in all: the cache is full"
        )
    return append(state, Tokens(q, new_k, new_v, new_w, new_beta, new_g, scale), keep)


@append_operator.register_fake
def _(q: Tensor, new_k: Tensor, new_v: Tensor, *_: object) -> Tensor:
    return q.new_empty(*q.shape[:3], new_v.shape[3])


def append_group(state: State, rows: Rows, folded: int, length: int, tokens: Tokens, keep: int) -> Tensor:
    """As :func:`append`, of sequences of one length and fold; ``tokens`` and the result are theirs alone."""
    if tokens.q.shape[1] == 1:
        out = _attend_one(state, rows, folded, length, tokens)
        state.length[rows] = length + 1
        if length + 1 - folded >= LEAF + keep:
            _fold_open_leaf(state, rows, folded, length + 1)
        return out
    piece = _Piece.join(state, rows, length - folded, tokens)
    out = piece.attend(state, rows, folded)
    piece.absorb(state, rows, folded, keep)
    return out


def _packed_groups(
    state: State, tokens: Tokens, counts: list[int]
) -> Iterator[tuple[Tensor, int, int, Tensor, Tokens]]:
    """Of tokens packed into one row, ``counts`` of each sequence: sequences that agree in count, fold and length (b,),
    their folded and length, where their tokens are (b, count), and the tokens."""
    agree: dict[tuple[int, int, int], list[int]] = defaultdict(list)
    facts = zip(counts, state.folded.tolist(), state.length.tolist(), strict=True)
    for row, (count, folded, length) in enumerate(facts):
        if count:
            agree[count, folded, length].append(row)
    starts = torch.tensor([0, *counts[:-1]]).cumsum(0)
    for (count, folded, length), members in agree.items():
        rows = torch.tensor(members)
        places = starts[rows][:, None] + torch.arange(count)
        g = None if tokens.g is None else tokens.g[0][places]
        q, k, v, w, beta = (x[0][places] for x in (tokens.q, tokens.k, tokens.v, tokens.w, tokens.beta))
        yield rows, folded, length, places, Tokens(q, k, v, w, beta, g, tokens.scale)


def append_packed(state: State, tokens: Tokens, counts: list[int], keep: int) -> Tensor:
    """As :func:`append`, of tokens packed into one row, ``counts`` of each sequence: (1, sum of counts, HQ, DV)."""
    out = tokens.q.new_empty(*tokens.q.shape[:3], tokens.v.shape[3])
    for rows, folded, length, places, part in list(_packed_groups(state, tokens, counts)):
        out[0, places] = append_group(state, rows, folded, length, part, keep)
    return out


def absorb_packed(state: State, tokens: Tokens, counts: list[int], keep: int) -> None:
    """As :func:`absorb`, of tokens packed into one row."""
    for rows, _, _, _, part in list(_packed_groups(state, tokens, counts)):
        absorb(state, rows, part, keep)


def absorb(state: State, rows: Rows, tokens: Tokens, keep: int) -> None:
    """Add the first tokens of sequences that have none yet, without attending."""
    _Piece.join(state, rows, 0, tokens).absorb(state, rows, 0, keep)


# --- one token -------------------------------------------------------------------------------------------------------


def _attend_one(state: State, rows: Rows, folded: int, length: int, tokens: Tokens) -> Tensor:
    """Put one token behind the open rows and attend: (b, 1, HQ, DV)."""
    n, dtype = length - folded, state.w.dtype
    state.k[rows, :, n] = tokens.k[:, 0]
    state.v[rows, :, n] = tokens.v[:, 0]
    if tokens.g is not None:
        state.g[rows, :, n] = tokens.g[:, 0].to(dtype)
    k = state.k[rows][:, :, : n + 1].to(dtype)
    steps = _append_reflections(state, rows, n, k[:, :, :n], tokens)
    w, u, y = (x[rows][:, :, :steps] for x in (state.w, state.u, state.y))
    q = tokens.q[:, 0].to(dtype).mul(tokens.scale).unflatten(1, (k.shape[1], -1))  # (b, H, G, D)
    x = q @ w.mT
    logits = q @ k.mT - x @ y[..., : n + 1]
    passed = None
    if tokens.g is not None:
        total = state.g[rows][:, :, : n + 1].cumsum(-1).unflatten(1, (k.shape[1], -1))  # from the fold to each token
        passed = total[..., -1:]
        logits = logits + (passed - total)
    log_sum_exp = logits.logsumexp(-1, keepdim=True)
    out = (logits - log_sum_exp).exp() @ state.v[rows][:, :, : n + 1].to(dtype)
    if folded:
        out = _join_history(state, rows, folded, q - x @ u, passed, out, log_sum_exp)
    return out.flatten(1, 2).unsqueeze(1).to(tokens.q.dtype)


def _append_reflections(state: State, rows: Rows, n: int, k: Tensor, tokens: Tokens) -> int:
    """The rows of W, U and Y of token n, after which there are so many; k (b, H, n, D) are the keys before it.

    T U = D W and T Y = D Z, row by row: u_s = beta_s (w_s - sum_{r<s} (w_s . w_r) u_r), and the same of Y.
    """
    count = tokens.w.shape[2]
    for r in range(count):
        step = n * count + r
        w, beta = tokens.w[:, 0, r].to(state.w.dtype), tokens.beta[:, 0, r].to(state.w.dtype)  # (b, H, D), (b, H)
        before = w[:, :, None] @ state.w[rows][:, :, :step].mT  # (b, H, 1, steps)
        u = w - (before @ state.u[rows][:, :, :step]).squeeze(2)
        y = (w[:, :, None] @ k.mT - before @ state.y[rows][:, :, :step, :n]).squeeze(2)
        state.w[rows, :, step] = w
        state.beta[rows, :, step] = beta
        state.u[rows, :, step] = beta[..., None] * u
        state.y[rows, :, step, :n] = beta[..., None] * y
        state.y[rows, :, step, n:] = 0  # the keys from its own token on
    return (n + 1) * count


def _fold_open_leaf(state: State, rows: Rows, folded: int, length: int) -> None:
    """Fold the first leaf of the open rows and move the others up."""
    steps, n, dtype = LEAF * state.reflections, length - folded, state.w.dtype
    k, w = state.k[rows][:, :, :n], state.w[rows][:, :, : n * state.reflections]
    u, y = state.u[rows][:, :, :steps], state.y[rows][:, :, :steps, :LEAF]
    first = w[:, :, :steps]
    identity = torch.eye(w.shape[-1], dtype=dtype, device=w.device)
    leaf = _Leaves(
        k_right=(k[:, :, :LEAF].to(dtype) - y.mT @ first)[:, :, None],
        product=(identity - first.mT @ u)[:, :, None],
        v=state.v[rows][:, :, :LEAF],
        g=state.g[rows][:, :, :LEAF] if state.gated else None,
    )
    _fold(state, rows, folded, leaf)
    rest_k, rest_v = k[:, :, LEAF:].clone(), state.v[rows][:, :, LEAF:n].clone()
    gates = state.g[rows][:, :, LEAF:n].clone() if state.gated else None
    beta = state.beta[rows][:, :, steps : n * state.reflections].clone()
    _set_open(state, rows, rest_k, rest_v, w[:, :, steps:].clone(), beta, gates)
    state.folded[rows] = folded + LEAF


def _set_open(state: State, rows: Rows, k: Tensor, v: Tensor, w: Tensor, beta: Tensor, g: Tensor | None) -> None:
    """Make these the open rows: k and v (b, H, n, ...), w and beta (b, H, n * R, ...), g (b, HQ, n)."""
    n, steps = k.shape[2], w.shape[2]
    state.k[rows, :, :n], state.v[rows, :, :n] = k, v
    state.w[rows, :, :steps], state.beta[rows, :, :steps] = w, beta
    if g is not None:
        state.g[rows, :, :n] = g
    if n:
        token = torch.arange(n, device=w.device)
        after = token.repeat_interleave(state.reflections)[:, None] > token
        right = torch.cat([w, (w @ k.to(w.dtype).mT) * after], -1) * beta[..., None]
        # solve_triangular reads the strict lower triangle only: the unit diagonal of T is implied.
        both = torch.linalg.solve_triangular((w @ w.mT) * beta[..., None], right, upper=False, unitriangular=True)
        state.u[rows, :, :steps], state.y[rows, :, :steps, :n] = both.split([w.shape[-1], n], -1)
        state.y[rows, :, :steps, n:] = 0


# --- several tokens --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Leaves:
    """F leaves, ready to be folded."""

    k_right: Tensor  # (b, H, F, LEAF, D), each key at its leaf's right edge
    product: Tensor  # (b, H, F, D, D)
    v: Tensor  # (b, H, F * LEAF, DV)
    g: Tensor | None  # (b, HQ, F * LEAF)

    def part(self, start: int, end: int) -> "_Leaves":
        tokens = slice(start * LEAF, end * LEAF)
        g = None if self.g is None else self.g[:, :, tokens]
        return _Leaves(self.k_right[:, :, start:end], self.product[:, :, start:end], self.v[:, :, tokens], g)


@dataclass(frozen=True)
class _Piece:
    """The open rows and the new tokens behind them, as one sequence that starts where the folded one ends."""

    tokens: Tokens  # (b, n + T, ...); the queries of the n open rows are zeros
    open: int  # n
    x: Tensor  # queries at the left edge of their leaf, times scale (b, H, G, N * LEAF, D)
    k_right: Tensor  # (b, H, N, LEAF, D)
    product: Tensor  # (b, H, N, D, D)

    @classmethod
    def join(cls, state: State, rows: Rows, n: int, new: Tokens) -> "_Piece":
        dtype, reflections = state.w.dtype, state.reflections
        before = (
            new.q.new_zeros(len(new.q), n, *new.q.shape[2:]),
            state.k[rows][:, :, :n].transpose(1, 2),
            state.v[rows][:, :, :n].transpose(1, 2),
            state.w[rows][:, :, : n * reflections].unflatten(2, (n, reflections)).permute(0, 2, 3, 1, 4),
            state.beta[rows][:, :, : n * reflections].unflatten(2, (n, reflections)).permute(0, 2, 3, 1),
        )
        after = (new.q, new.k, new.v, new.w.to(dtype), new.beta.to(dtype))
        q, k, v, w, beta = (torch.cat([a, b], 1) for a, b in zip(before, after, strict=True))
        g = None
        if new.g is not None:
            g = torch.cat([state.g[rows][:, :, :n].transpose(1, 2), new.g.to(dtype)], 1)
        batch, length = q.shape[:2]
        problem = dyadic.Problem.pack(plan_spans((length,) * batch, LEAF), q, k, v, w, beta, g, new.scale)
        q_left, k_right, product, *_ = dyadic._in_chunks(leaf_edges, problem.leaf, problem.masks)

        def by_sequence(x: Tensor) -> Tensor:  # (H * b * N, ...) -> (b, H, N, ...)
            return x.unflatten(0, (problem.heads, batch, -1)).transpose(0, 1)

        x = by_sequence(q_left).unflatten(3, (problem.group, LEAF)).transpose(2, 3).flatten(3, 4)
        return cls(Tokens(q, k, v, w, beta, g, new.scale), n, x, by_sequence(k_right), by_sequence(product))

    def attend(self, state: State, rows: Rows, folded: int) -> Tensor:
        """Of the new tokens: (b, T, HQ, DV)."""
        t = self.tokens
        out, log_sum_exp = path_attention_forward(t.q, t.k, t.v, t.w, t.beta, t.g, None, t.scale, AUTO)
        out, log_sum_exp = out[:, self.open :], log_sum_exp[:, self.open :]
        if not folded:
            return out
        heads, dtype = t.k.shape[2], state.w.dtype
        length = t.q.shape[1]
        leaves = _products_before(self.product)
        x = self.x.unflatten(3, (-1, LEAF)) @ leaves[:, :, None]
        x = x.flatten(3, 4)[:, :, :, self.open : length]  # at the edge of the folded tokens

        def by_head(y: Tensor) -> Tensor:  # (b, T, HQ, dim) -> (b, H, G * T, dim)
            return y.to(dtype).transpose(1, 2).unflatten(1, (heads, -1)).flatten(2, 3)

        passed = None
        if t.g is not None:
            passed = by_head(t.g.to(dtype).cumsum(1)[:, self.open :, :, None])
        joined = _join_history(
            state, rows, folded, x.flatten(2, 3), passed, by_head(out), by_head(log_sum_exp[..., None])
        )
        return joined.unflatten(2, (-1, length - self.open)).flatten(1, 2).transpose(1, 2).to(out.dtype)

    def absorb(self, state: State, rows: Rows, folded: int, keep: int) -> None:
        """Fold all that need not stay open and keep the rest."""
        t = self.tokens
        length = t.q.shape[1]
        leaves = max(0, (length - keep) // LEAF)
        first = leaves * LEAF
        k, v = t.k.transpose(1, 2), t.v.transpose(1, 2)
        w, beta = t.w.permute(0, 3, 1, 2, 4).flatten(2, 3), t.beta.permute(0, 3, 1, 2).flatten(2, 3)
        g = None if t.g is None else t.g.transpose(1, 2)
        if leaves:
            folding = None if g is None else g[:, :, :first]
            _fold(
                state,
                rows,
                folded,
                _Leaves(self.k_right[:, :, :leaves], self.product[:, :, :leaves], v[:, :, :first], folding),
            )
        steps = first * state.reflections
        rest = None if g is None else g[:, :, first:]
        _set_open(state, rows, k[:, :, first:], v[:, :, first:], w[:, :, steps:], beta[:, :, steps:], rest)
        state.folded[rows] = folded + first
        state.length[rows] = folded + length


def _products_before(product: Tensor) -> Tensor:
    """(..., N, D, D) -> P_{n-1} ... P_0 of each n, the identity for n = 0: log2(N) batched products."""
    total = product.clone()
    span = 1
    while span < total.shape[-3]:
        total[..., span:, :, :] = total[..., span:, :, :] @ total[..., :-span, :, :].clone()
        span *= 2
    identity = torch.eye(product.shape[-1], dtype=product.dtype, device=product.device)
    return torch.cat([identity.expand_as(total[..., :1, :, :]), total[..., :-1, :, :]], -3)


def _products_after(product: Tensor) -> tuple[Tensor, Tensor]:
    """(..., N, D, D) -> P_{N-1} ... P_{n+1} of each n, and the product of all (..., D, D)."""
    total = product.clone()
    span = 1
    while span < total.shape[-3]:
        total[..., :-span, :, :] = total[..., span:, :, :].clone() @ total[..., :-span, :, :]
        span *= 2
    identity = torch.eye(product.shape[-1], dtype=product.dtype, device=product.device)
    after = torch.cat([total[..., 1:, :, :], identity.expand_as(total[..., :1, :, :])], -3)
    return after, total[..., 0, :, :]


# --- folding ---------------------------------------------------------------------------------------------------------


def _fold(state: State, rows: Rows, folded: int, leaves: _Leaves) -> None:
    """Put leaves behind the folded ones: first those that fill the open chunk, then whole chunks, then what is left."""
    per_chunk = state.chunk // LEAF
    count = leaves.k_right.shape[2]
    missing = min(count, -(folded // LEAF) % per_chunk)
    whole = missing + (count - missing) // per_chunk * per_chunk
    for start, end in pairwise((0, missing, whole, count)):
        if start == end:
            continue
        part, first = leaves.part(start, end), folded // LEAF + start
        if start == missing and end == whole:
            _fold_chunks(state, rows, first // per_chunk, part)
        else:
            _fold_into_open(state, rows, first, part)


def _gates_after(g: Tensor) -> tuple[Tensor, Tensor]:
    """(..., n) -> the sum over the tokens after each one, and over all."""
    total = g.flip(-1).cumsum(-1).flip(-1)
    return total - g, total[..., 0]


def _fold_chunks(state: State, rows: Rows, first: int, leaves: _Leaves) -> None:
    """Whole chunks, from chunk ``first`` on, where no chunk is open."""
    per_chunk = state.chunk // LEAF
    after, total = _products_after(leaves.product.unflatten(2, (-1, per_chunk)))
    k = (leaves.k_right.unflatten(2, (-1, per_chunk)) @ after.mT).flatten(3, 4)
    blocks = state.table[rows][:, first : first + k.shape[2]].to(state.keys.device)
    state.keys[blocks] = k.transpose(1, 2).to(state.keys.dtype)
    state.values[blocks] = leaves.v.unflatten(2, (-1, state.chunk)).transpose(1, 2)
    state.products[blocks] = total.transpose(1, 2)
    if leaves.g is not None:
        gates, totals = _gates_after(leaves.g.unflatten(2, (-1, state.chunk)))
        state.gates[blocks], state.gate_totals[blocks] = gates.transpose(1, 2), totals.transpose(1, 2)


def _fold_into_open(state: State, rows: Rows, first: int, leaves: _Leaves) -> None:
    """Leaves of one chunk, behind those it has: ``first`` counts the leaves before them in the sequence."""
    per_chunk, dtype = state.chunk // LEAF, state.w.dtype
    block = state.table[rows][:, first // per_chunk].to(state.keys.device)
    old = first % per_chunk * LEAF
    new = old + leaves.v.shape[2]
    after, total = _products_after(leaves.product)
    k = (leaves.k_right @ after.mT).flatten(2, 3)
    if old:
        moved = state.keys[block][:, :, :old].to(dtype)
        if state.low.numel():
            moved += state.low[rows][:, :, :old].to(dtype)
        k = torch.cat([moved @ total.mT, k], 2)
    rounded = k.to(state.keys.dtype)
    state.keys[block, :, :new] = rounded
    if state.low.numel():
        state.low[rows, :, :new] = (k - rounded.to(dtype)).to(state.low.dtype)
    state.values[block, :, old:new] = leaves.v
    product = total @ state.product[rows] if old else total
    gate_total = None
    if leaves.g is not None:
        gates, gate_total = _gates_after(leaves.g)
        if old:
            state.gates[block, :, :old] += gate_total[..., None]
            gate_total = gate_total + state.gate_total[rows]
        state.gates[block, :, old:new] = gates
    if new == state.chunk:
        state.products[block] = product
        if gate_total is not None:
            state.gate_totals[block] = gate_total
    else:
        state.product[rows] = product
        if gate_total is not None:
            state.gate_total[rows] = gate_total


# --- attending to what is folded -------------------------------------------------------------------------------------


def _join_history(
    state: State, rows: Rows, folded: int, x: Tensor, passed: Tensor | None, out: Tensor, log_sum_exp: Tensor
) -> Tensor:
    """out (b, H, r, DV) of attention over the open tokens, joined with that over the folded ones.

    x (b, H, r, D): the r = G * T queries of each key/value head at the fold's edge; passed (b, H, r, 1): the sum of g
    from there to each query.
    """
    chunks = -(-folded // state.chunk)
    group = x.shape[2] if passed is None else state.g.shape[1] // x.shape[1]
    per_head = x.unflatten(2, (group, -1))  # (b, H, G, T, D), or T = 1 where heads need not be told apart
    size = max(1, MOVED_ROWS // chunks // max(1, x.shape[0] * x.shape[1] * group))
    outs, sums = [], []
    for part in per_head.split(size, 3):
        found = _attend_history(state, rows, folded, part.flatten(2, 3), group)
        outs.append(found[0].unflatten(2, part.shape[2:4]))
        sums.append(found[1].unflatten(2, part.shape[2:4]))
    far, far_sum = torch.cat(outs, 3).flatten(2, 3), torch.cat(sums, 3).flatten(2, 3)
    if passed is not None:
        far_sum = far_sum + passed
    total = torch.logaddexp(log_sum_exp, far_sum)
    return out * (log_sum_exp - total).exp() + far * (far_sum - total).exp()


def _attend_history(state: State, rows: Rows, folded: int, x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """out (b, H, r, DV) and log_sum_exp (b, H, r, 1) over the folded tokens."""
    finished, rest = divmod(folded, state.chunk)
    blocks = state.table[rows][:, : finished + bool(rest)].tolist()
    outs, sums = [], []
    gate = state.gate_total[rows] if state.gated else None  # (b, HQ): from the chunk's edge to the fold's
    if rest:
        last = [row[-1] for row in blocks]
        found = _attend_blocks(state, last, rest, x, None if gate is None else torch.zeros_like(gate), group)
        outs, sums = [found[0]], [found[1]]
        x = x @ state.product[rows]
    elif gate is not None:
        gate = torch.zeros_like(gate)
    moved, biases = [], []
    for chunk in reversed(range(finished)):
        moved.append(x)
        biases.append(gate)
        index = torch.tensor([row[chunk] for row in blocks], device=x.device)
        if chunk:
            x = x @ state.products[index]
        if gate is not None:
            gate = gate + state.gate_totals[index]
    if finished:
        queries = torch.stack(moved[::-1], 1)  # (b, chunks, H, r, D)
        bias = None if gate is None else torch.stack([y for y in biases[::-1] if y is not None], 1).flatten(0, 1)
        flat = [block for row in blocks for block in row[:finished]]
        out, log_sum_exp = _attend_blocks(state, flat, state.chunk, queries.flatten(0, 1), bias, group)
        outs += out.unflatten(0, queries.shape[:2]).unbind(1)
        sums += log_sum_exp.unflatten(0, queries.shape[:2]).unbind(1)
    if len(outs) == 1:
        return outs[0], sums[0]
    all_sums = torch.stack(sums)
    total = all_sums.logsumexp(0)
    return (torch.stack(outs) * (all_sums - total).exp()).sum(0), total


def _attend_blocks(
    state: State, blocks: list[int], keys: int, x: Tensor, gate: Tensor | None, group: int
) -> tuple[Tensor, Tensor]:
    """Attention of x (p, H, r, D) to the first ``keys`` keys of one block each; gate (p, HQ): added to their gates.

    Blocks that follow one another in memory, whoever's they are, are one call on a view of them: no key is copied.
    """
    q = x.to(state.keys.dtype)
    order = sorted(range(len(blocks)), key=blocks.__getitem__)
    back = None
    if order != list(range(len(blocks))):
        blocks, index = [blocks[n] for n in order], torch.tensor(order, device=x.device)
        q, gate, back = q[index], None if gate is None else gate[index], index.argsort()
    outs, sums = [], []
    for start, end in _runs(blocks):
        part = slice(blocks[start], blocks[start] + end - start)
        bias = None
        if gate is not None:
            bias = state.gates[part][..., :keys] + gate[start:end, :, None]  # (p, HQ, keys)
            bias = bias.unflatten(1, (x.shape[1], group)).repeat_interleave(x.shape[2] // group, 2)
        out, log_sum_exp = attend(q[start:end], state.keys[part, :, :keys], state.values[part, :, :keys], bias)
        outs.append(out)
        sums.append(log_sum_exp)
    out, log_sum_exp = (outs[0], sums[0]) if len(outs) == 1 else (torch.cat(outs), torch.cat(sums))
    return (out, log_sum_exp) if back is None else (out[back], log_sum_exp[back])


def _runs(blocks: list[int]) -> list[tuple[int, int]]:
    """Bounds of the longest runs of consecutive numbers."""
    cuts = [n for n in range(1, len(blocks)) if blocks[n] != blocks[n - 1] + 1]
    return list(pairwise([0, *cuts, len(blocks)]))
