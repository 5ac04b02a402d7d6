"""Attention over the folded tokens in torch: the query goes left from chunk to chunk, K and V are read once."""

import torch
from torch import Tensor

from path_attention.ops.engines.decode import attend
from path_attention.ops.history.serve import kernels_serve
from path_attention.ops.history.state import PAGE, ROW_FIELDS, Rows, State, decode_pages, decode_rows

# Query rows that are moved to the edges of all chunks at once, in rows times chunks: bounds the temporaries of a long
# prefill against a long history, whatever their lengths (32 MB a head of 64 in float32 at 2^17).
MOVED_ROWS = 2**17
# Keys that are copied at once where they do not lie one after another or are not in the format of the computation:
# with their values 32 MB a head of 64 in float32.
COPIED_KEYS = 2**16


def join_history(
    state: State, rows: Rows, folded: int, x: Tensor, passed: Tensor | None, out: Tensor, log_sum_exp: Tensor
) -> Tensor:
    """out (b, H, r, DV) of attention over the open tokens, joined with that over the folded ones.

    x (b, H, r, D): the r = G * T queries of each key/value head at the fold's edge; passed (b, H, r, 1): the sum of g
    from there to each query.
    """
    group = x.shape[2] if passed is None else state.g.shape[1] // x.shape[1]
    per_head = x.unflatten(2, (group, -1))  # (b, H, G, T, D), or T = 1 where heads need not be told apart
    if kernels_serve(state):
        far, far_sum = _attend_by_kernels(state, rows, per_head, passed)
    else:
        far, far_sum = _attend_in_parts(state, rows, folded, per_head)
    if passed is not None:
        far_sum = far_sum + passed
    total = torch.logaddexp(log_sum_exp, far_sum)
    return out * (log_sum_exp - total).exp() + far * (far_sum - total).exp()


def _attend_by_kernels(state: State, rows: Rows, x: Tensor, passed: Tensor | None) -> tuple[Tensor, Tensor]:
    """out (b, H, r, DV) and log_sum_exp (b, H, r, 1) over the folded tokens, of x (b, H, G, T, D)."""
    from path_attention.ops.kernels import decode

    if isinstance(rows, Tensor):
        own = {name: y[rows] if name in ROW_FIELDS else y for name, y in state.tensors().items()}
        state = State(**own)
    if passed is None:
        x = x.flatten(2, 3)[:, :, None]  # rows of which head they are makes no difference
    heads, group = x.shape[1:3]
    gate = x.new_zeros(*x.shape[:2], x.shape[3] * group) if state.gated else None
    out, log_sum_exp = decode.attend_history(state, x.transpose(2, 3).flatten(2, 3), gate)
    return out.unflatten(1, (heads, -1)).flatten(2, 3), log_sum_exp.unflatten(1, (heads, -1)).flatten(2, 3)[..., None]


def _attend_in_parts(state: State, rows: Rows, folded: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`_attend_by_kernels`, in torch, so many queries at once."""
    chunks, group = -(-folded // state.chunk), x.shape[2]
    size = max(1, MOVED_ROWS // chunks // max(1, x.shape[0] * x.shape[1] * group))
    outs, sums = [], []
    for part in x.split(size, 3):
        found = attend_history(state, rows, folded, part.flatten(2, 3), group)
        outs.append(found[0].unflatten(2, part.shape[2:4]))
        sums.append(found[1].unflatten(2, part.shape[2:4]))
    return torch.cat(outs, 3).flatten(2, 3), torch.cat(sums, 3).flatten(2, 3)


def attend_history(state: State, rows: Rows, folded: int, x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """out (b, H, r, DV) and log_sum_exp (b, H, r, 1) over the folded tokens."""
    finished, rest = divmod(folded, state.chunk)
    per_chunk, pages = state.chunk // PAGE, state.pages[rows]
    outs, sums = [], []
    gate = state.gate_total[rows] if state.gated else None  # (b, HQ): from the chunk's edge to the fold's
    if rest:
        of_chunk = pages[:, finished * per_chunk : -(-folded // PAGE)]
        scale = state.scale[rows][:, :, :rest] if state.coded else None
        found = _attend_spans(state, of_chunk, rest, x, None, group, scale)
        outs, sums = [found[0]], [found[1]]
        x = x @ state.product[rows]
    elif gate is not None:
        gate = torch.zeros_like(gate)
    if finished:
        where = state.chunks[rows][:, :finished].long()
        moved, biases = [x], [] if gate is None else [gate]
        for chunk in reversed(range(1, finished)):
            moved.append(moved[-1] @ state.products[where[:, chunk]])
            biases += [y + state.gate_totals[where[:, chunk]] for y in biases[-1:]]
        queries = torch.stack(moved[::-1], 1).flatten(0, 1)  # (b * chunks, H, r, D)
        bias = torch.stack(biases[::-1], 1).flatten(0, 1) if biases else None
        of_chunks = pages[:, : finished * per_chunk].reshape(-1, per_chunk)
        found = _attend_spans(state, of_chunks, state.chunk, queries, bias, group, None)
        outs += found[0].unflatten(0, (-1, finished)).unbind(1)
        sums += found[1].unflatten(0, (-1, finished)).unbind(1)
    if len(outs) == 1:
        return outs[0], sums[0]
    all_sums = torch.stack(sums)
    total = all_sums.logsumexp(0)
    return (torch.stack(outs) * (all_sums - total).exp()).sum(0), total


def _attend_spans(
    state: State, pages: Tensor, keys: int, x: Tensor, gate: Tensor | None, group: int, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """out (p, H, r, DV) and log_sum_exp of queries x (p, H, r, D), each at the edge of a span of ``keys`` tokens that
    stand in pages (p, pages of a span).

    Spans at equal distances in memory, whoever's they are, are one call on a view of them: no key is copied.

    Args:
        gate: (p, HQ), added to the keys' own.
        scale: (p, H, keys) of int16 keys, None for those of finished chunks.
    """
    outs, sums = x.new_empty(*x.shape[:3], state.values.shape[2]), x.new_empty(*x.shape[:3], 1)
    offset = torch.arange(pages.shape[1], device=pages.device)
    in_one = ((pages - offset) == pages[:, :1]).all(1)
    if state.coded or state.values.dtype != x.dtype:
        in_one = torch.zeros_like(in_one)
    first = (pages[:, 0] * PAGE).tolist()
    copies = (~in_one).nonzero().flatten()
    for run, step in _runs(in_one.nonzero().flatten().tolist(), first):
        k, v = (_view(y, first[run[0]], len(run), step, keys) for y in (state.keys, state.values))
        every = len(run) == len(x) and run == list(range(len(x)))
        at: Rows = slice(None) if every else torch.tensor(run, device=x.device)
        bias = _bias(state, pages[at], keys, None if gate is None else gate[at], x[at], group)
        outs[at], sums[at] = attend(x[at], k, v, bias)
    for at in copies.split(max(1, COPIED_KEYS // keys)):
        where = _slots(pages[at], keys)
        k, v = (y[:, where].transpose(0, 1) for y in (state.keys, state.values))
        if scale is not None:
            k = decode_rows(k.view(torch.int16), scale[at])
        elif state.coded:
            k = decode_pages(k, state.key_scale[:, pages[at].long()].transpose(0, 1))
        bias = _bias(state, pages[at], keys, None if gate is None else gate[at], x[at], group)
        outs[at], sums[at] = attend(x[at], k, v.to(x.dtype), bias)
    return outs, sums


def _slots(pages: Tensor, keys: int) -> Tensor:
    """(p, keys): where the tokens of these pages stand."""
    return (pages.long()[:, :, None] * PAGE + torch.arange(PAGE, device=pages.device)).flatten(1)[:, :keys]


def _view(x: Tensor, first: int, count: int, step: int, keys: int) -> Tensor:
    """(H, S, dim) -> (count, H, keys, dim): ``count`` spans of slots, from slot ``first`` on every ``step``."""
    stride = x.stride()
    return x.as_strided(
        (count, x.shape[0], keys, x.shape[2]), (step * stride[1], *stride), x.storage_offset() + first * stride[1]
    )


def _bias(state: State, pages: Tensor, keys: int, gate: Tensor | None, x: Tensor, group: int) -> Tensor | None:
    """What gates add to the logits of queries x (p, H, r, D) and keys in pages (p, ...), their own and gate (p, HQ)."""
    if not state.gated:
        return None
    bias = state.gates[:, _slots(pages, keys)].transpose(0, 1)  # (p, HQ, keys)
    if gate is not None:
        bias = bias + gate[..., None]
    return bias.unflatten(1, (x.shape[1], group)).repeat_interleave(x.shape[2] // group, 2)


def _runs(members: list[int], first: list[int]) -> list[tuple[list[int], int]]:
    """Members in the order of ``first``, cut into runs whose entries of it are equally far apart, and how far."""
    order = sorted(members, key=first.__getitem__)
    runs: list[tuple[list[int], int]] = []
    for member in order:
        if runs:
            run, step = runs[-1]
            distance = first[member] - first[run[-1]]
            if len(run) == 1 or distance == step:
                runs[-1] = ([*run, member], distance)
                continue
        runs.append(([member], 0))
    return runs
