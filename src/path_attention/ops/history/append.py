"""The two things done with a cache: attend to it, and add to it. Short calls by kernels where there are any, else in
torch, where sequences are told apart on the host: each group that agrees in length is some kernel launches of its own.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor

from path_attention.ops import dyadic
from path_attention.ops.autograd import path_attention_forward
from path_attention.ops.backends import AUTO
from path_attention.ops.dyadic import LEAF
from path_attention.ops.history.fold import Folding, fold, fold_by_kernel, fold_gates, fold_oldest
from path_attention.ops.history.open_rows import Open, clamp_gates, gates_after, put_open
from path_attention.ops.history.read import join_history
from path_attention.ops.history.serve import engine_of, fold_kernel_serves, kernels_serve
from path_attention.ops.history.state import SHORT, Rows, State, Tokens, folds
from path_attention.ops.leaf import leaf_edges
from path_attention.ops.spans import plan_spans


def append(
    state: State, tokens: Tokens, keep: int, *, capacity: int | None = None, facts: list[tuple[int, int]] | None = None
) -> Tensor:
    """Add T tokens to every sequence; out (B, T, HQ, DV), their attention over all tokens up to them.

    Args:
        keep: tokens that stay open. The tables must have pages and chunks for what is folded; O >= open_room(keep).
        capacity: tokens a sequence at most, where kernels are to look at that themselves; marked in State.full.
        facts: (folded, length) of each sequence, where the host knows them.
    """
    count = tokens.q.shape[1]
    if count <= SHORT and kernels_serve(state):
        return _step(state, tokens, None, [count] * len(state.length), keep, capacity, facts)
    batch, count, query_heads = tokens.q.shape[:3]
    out = tokens.q.new_empty(batch, count, query_heads, tokens.v.shape[3])
    for rows, folded, length in _groups(state, facts):
        out[rows] = _append_group(state, rows, folded, length, tokens.of(rows), keep)
    return out


def append_packed(
    state: State,
    tokens: Tokens,
    counts: list[int],
    keep: int,
    *,
    capacity: int | None = None,
    facts: list[tuple[int, int]] | None = None,
) -> Tensor:
    """As :func:`append`, of tokens packed into one row, ``counts`` of each sequence: (1, sum of counts, HQ, DV)."""
    out = tokens.q.new_empty(*tokens.q.shape[:3], tokens.v.shape[3])
    facts = state.facts() if facts is None else facts
    long = counts
    if kernels_serve(state):
        short = [count if count <= SHORT else 0 for count in counts]
        long = [count if count > SHORT else 0 for count in counts]
        if any(short):
            where = _places(counts, short, state.k.device)
            out[:, where] = _step(state, tokens.at(where), short, short, keep, capacity, facts)
    for rows, folded, length, places, part in list(_packed_groups(facts, tokens, counts, long)):
        out[0, places] = _append_group(state, rows, folded, length, part, keep)
    return out


def _step(
    state: State,
    tokens: Tokens,
    packed: list[int] | None,
    counts: list[int],
    keep: int,
    capacity: int | None,
    facts: list[tuple[int, int]] | None,
) -> Tensor:
    """Short calls by kernels; ``packed``: the counts, where tokens are packed into one row."""
    from path_attention.ops.kernels import decode  # triton is not needed on other devices

    bounds = None
    if packed is not None:
        ends = torch.tensor([0, *packed], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        bounds = ends.to(state.k.device, non_blocking=True)
    fold_due = facts is None or any(
        folds(folded, length, count, keep) for (folded, length), count in zip(facts, counts, strict=True)
    )
    return decode.step(state, tokens, bounds, max(counts), keep, capacity=capacity, fold_due=fold_due)


def _groups(state: State, facts: list[tuple[int, int]] | None) -> list[tuple[Rows, int, int]]:
    """(sequences, folded, length) of all that agree in both: a batch of equal lengths is one group."""
    both = state.facts() if facts is None else facts
    if len(set(both)) == 1:
        return [(slice(None), *both[0])]
    found: list[tuple[Rows, int, int]] = []
    for folded, length in sorted(set(both)):
        rows = [row for row, x in enumerate(both) if x == (folded, length)]
        found.append((torch.tensor(rows, device=state.k.device), folded, length))
    return found


def _places(counts: list[int], chosen: list[int], device: torch.device) -> Tensor:
    """Where in a packed row of ``counts`` tokens each the tokens of the chosen sequences are."""
    starts = [0, *accumulate(counts)]
    ranges = [torch.arange(start, start + count) for start, count in zip(starts, chosen, strict=False)]
    return torch.cat(ranges).to(device)


def absorb(state: State, tokens: Tokens, keep: int) -> None:
    """Add the first T tokens to every sequence, without attending."""
    _absorb(state, slice(None), 0, tokens.q.shape[1], tokens, keep)


def prefill(room: Callable[[], State], tokens: Tokens, keep: int) -> Tensor | None:
    """Add the first T tokens to every sequence and attend, (B, T, HQ, DV), without gradients, where one pass of the
    CUDA engine does both: its leaves and spans need not be made again. Else None, and nothing is done.

    Args:
        room: makes a state with room for the tokens. It is called once, when the device has attention to do.
    """
    count = tokens.q.shape[1]
    due = folds(0, 0, count, keep)
    # Spans that a sequence ends with have no product in the operator's tree.
    is_served = 0 < due < count and fold_kernel_serves(tokens.k, tokens.v, tokens.w.shape[2])
    engine = engine_of(tokens) if is_served else None
    if engine is None:
        return None
    from path_attention.ops.engines import cuda  # triton is not needed on other devices
    from path_attention.ops.kernels import decode
    from path_attention.ops.kernels.linear import Inputs, Spans

    @cache
    def begun() -> tuple[State, decode.FoldedLeaves]:
        state = room()
        return state, decode.fold_tail(state, due, tokens)

    def fold_part(part: cuda.Part, inputs: Inputs, spans: Spans) -> None:
        state, tail = begun()
        decode.fold_spans(state, due, tail, spans, inputs.v, part.table.leaves, part.sequence, part.head)

    q, k, v, w, beta, g, scale = tokens
    out, _ = cuda.forward(engine, q, k, v, w, beta, g, None, scale, fold_part)
    state, _ = begun()
    fold_gates(state, slice(None), 0, due, tokens)
    _keep_open(state, slice(None), 0, due, tokens)
    return out


def absorb_packed(state: State, tokens: Tokens, counts: list[int], keep: int) -> None:
    """As :func:`absorb`, of tokens packed into one row."""
    for rows, _, _, _, part in list(_packed_groups([(0, 0)] * len(counts), tokens, counts, counts)):
        _absorb(state, rows, 0, part.q.shape[1], part, keep)


def _packed_groups(
    facts: list[tuple[int, int]], tokens: Tokens, counts: list[int], chosen: list[int]
) -> Iterator[tuple[Tensor, int, int, Tensor, Tokens]]:
    """Of tokens packed into one row, ``counts`` of each sequence: sequences that agree in count, fold and length (b,),
    their folded and length, where their tokens are (b, count), and the tokens; of the ``chosen`` counts that are not 0.
    """
    device = tokens.k.device
    agree: dict[tuple[int, int, int], list[int]] = defaultdict(list)
    for row, (count, (folded, length)) in enumerate(zip(chosen, facts, strict=True)):
        if count:
            agree[count, folded, length].append(row)
    starts = torch.tensor([0, *counts[:-1]]).cumsum(0)
    for (count, folded, length), members in agree.items():
        places = (starts[members][:, None] + torch.arange(count)).to(device)
        yield torch.tensor(members, device=device), folded, length, places, tokens.at(places)


def _append_group(state: State, rows: Rows, folded: int, length: int, tokens: Tokens, keep: int) -> Tensor:
    """As :func:`append`, of sequences of one length and fold; ``tokens`` and the result are theirs alone."""
    if tokens.q.shape[1] == 1:
        return _append_one(state, rows, folded, length, tokens, keep)
    piece = _Piece.join(state, rows, folded, length, tokens)
    out = piece.attend(state, rows, folded)
    _absorb(state, rows, folded, tokens.q.shape[1], piece.tokens, keep)
    return out


# --- one token -------------------------------------------------------------------------------------------------------


def _append_one(state: State, rows: Rows, folded: int, length: int, tokens: Tokens, keep: int) -> Tensor:
    """Put one token behind the open rows, attend, and fold where it is time: (b, 1, HQ, DV)."""
    n, wide = length - folded, state.w.dtype
    w, beta = tokens.w.permute(0, 3, 1, 2, 4).flatten(2, 3), tokens.beta.permute(0, 3, 1, 2).flatten(2, 3)
    g = None if tokens.g is None else clamp_gates(tokens.g.transpose(1, 2), wide)
    put_open(state, rows, folded, n, tokens.k.transpose(1, 2), tokens.v.transpose(1, 2), w, beta, g)
    rows_open = Open.read(state, rows, folded, n + 1)
    heads = rows_open.k.shape[1]
    q = tokens.q[:, 0].to(wide).mul(tokens.scale).unflatten(1, (heads, -1))  # (b, H, G, D)
    (logits, x), passed = rows_open.pass_all(q), None
    if rows_open.g is not None:
        passed = rows_open.g.sum(-1, keepdim=True).unflatten(1, (heads, -1))
        logits = logits + gates_after(rows_open.g).unflatten(1, (heads, -1))
    log_sum_exp = logits.logsumexp(-1, keepdim=True)
    out = (logits - log_sum_exp).exp() @ rows_open.v
    if folded:
        out = join_history(state, rows, folded, x, passed, out, log_sum_exp)
    due = folds(folded, length, 1, keep)
    if due:
        fold_oldest(state, rows, folded, rows_open)
        state.folded[rows] = folded + due
    state.length[rows] = length + 1
    return out.flatten(1, 2).unsqueeze(1).to(tokens.q.dtype)


# --- several tokens --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Piece:
    """The open rows and the new tokens behind them, as one sequence that starts where the folded one ends."""

    tokens: Tokens  # (b, n + T, ...); the queries of the n open rows are zeros
    open: int  # n

    @classmethod
    def join(cls, state: State, rows: Rows, folded: int, length: int, new: Tokens) -> "_Piece":
        n, wide, reflections = length - folded, state.w.dtype, state.reflections
        rows_open = Open.read(state, rows, folded, n)
        before = (
            new.q.new_zeros(len(new.q), n, *new.q.shape[2:]),
            rows_open.k.transpose(1, 2).to(new.k.dtype),
            rows_open.v.transpose(1, 2).to(new.v.dtype),
            rows_open.w.unflatten(2, (n, reflections)).permute(0, 2, 3, 1, 4),
            rows_open.beta.unflatten(2, (n, reflections)).permute(0, 2, 3, 1),
        )
        after = (new.q, new.k, new.v, new.w.to(wide), new.beta.to(wide))
        q, k, v, w, beta = (torch.cat([a, b], 1) for a, b in zip(before, after, strict=True))
        g = None
        if new.g is not None and rows_open.g is not None:
            g = torch.cat([rows_open.g.transpose(1, 2), clamp_gates(new.g, wide)], 1)
        return cls(Tokens(q, k, v, w, beta, g, new.scale), n)

    def attend(self, state: State, rows: Rows, folded: int) -> Tensor:
        """Of the new tokens: (b, T, HQ, DV)."""
        t = self.tokens
        out, log_sum_exp, _ = path_attention_forward(t.q, t.k, t.v, t.w, t.beta, t.g, None, t.scale, AUTO)
        out, log_sum_exp = out[:, self.open :], log_sum_exp[:, self.open :]
        if not folded:
            return out
        heads, wide = t.k.shape[2], state.w.dtype

        def by_head(y: Tensor) -> Tensor:  # (b, T, HQ, dim) -> (b, H, G * T, dim)
            return y.to(wide).transpose(1, 2).unflatten(1, (heads, -1)).flatten(2, 3)

        passed = None if t.g is None else by_head(t.g.to(wide).cumsum(1)[:, self.open :, :, None])
        x = self._queries().flatten(2, 3)
        joined = join_history(state, rows, folded, x, passed, by_head(out), by_head(log_sum_exp[..., None]))
        return joined.unflatten(2, (-1, out.shape[1])).flatten(1, 2).transpose(1, 2).to(out.dtype)

    def _queries(self) -> Tensor:
        """The new tokens' queries times scale at the edge of the folded tokens, (b, H, G, T, D)."""
        t = self.tokens
        batch, length = t.q.shape[:2]
        plan = plan_spans((length,) * batch, LEAF)
        problem = dyadic.Problem.pack(plan, t.q, t.k, t.v, t.w, t.beta, None, t.scale)
        q_left, _, product, *_ = dyadic._in_chunks(leaf_edges, problem.leaf, problem.masks)

        def by_sequence(x: Tensor) -> Tensor:  # (H * b * N, ...) -> (b, H, N, ...)
            return x.unflatten(0, (problem.heads, batch, -1)).transpose(0, 1)

        x = by_sequence(q_left).unflatten(3, (problem.group, LEAF)).transpose(2, 3)  # (b, H, G, N, LEAF, D)
        x = x @ _products_before(by_sequence(product))[:, :, None]
        return x.flatten(3, 4)[:, :, :, self.open : length]


def _products_before(product: Tensor) -> Tensor:
    """(..., N, D, D) -> P_{n-1} ... P_0 of each n, the identity for n = 0: log2(N) batched products."""
    total = product.clone()
    span = 1
    while span < total.shape[-3]:
        total[..., span:, :, :] = total[..., span:, :, :] @ total[..., :-span, :, :].clone()
        span *= 2
    identity = torch.eye(product.shape[-1], dtype=product.dtype, device=product.device)
    return torch.cat([identity.expand_as(total[..., :1, :, :]), total[..., :-1, :, :]], -3)


def _absorb(state: State, rows: Rows, folded: int, count: int, tokens: Tokens, keep: int) -> None:
    """Of ``tokens`` that come after the folded ones, the last ``count`` new: fold those that it is time for, keep the
    others open.
    """
    total = tokens.q.shape[1]
    due = folds(folded, folded + total - count, count, keep)
    if due and fold_kernel_serves(state.k, state.v, state.reflections):
        fold_by_kernel(state, rows, folded, due, tokens)
    elif due:
        fold(state, rows, folded, Folding.of(tokens, 0, due, state.w.dtype))
    _keep_open(state, rows, folded, due, tokens)


def _keep_open(state: State, rows: Rows, folded: int, due: int, tokens: Tokens) -> None:
    """Of tokens behind the folded ones, the first ``due`` of which are folded now, keep the others open."""
    total = tokens.q.shape[1]
    rest = Folding.of(tokens, due, total, state.w.dtype)
    put_open(state, rows, folded + due, 0, rest.k, rest.v, rest.w, rest.beta, rest.g)
    state.folded[rows] = folded + due
    state.length[rows] = folded + total
