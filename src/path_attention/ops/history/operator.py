"""Adding tokens to a cache of fixed memory, as an operator that torch.compile sees as one node."""

import torch
from torch import Tensor

from path_attention.ops.history.append import append
from path_attention.ops.history.serve import kernels_serve
from path_attention.ops.history.state import FIELDS, SHORT, TABLES, State, Tokens

_CHANGED = tuple(x for x in FIELDS if x not in TABLES)


def _append_fields(
    q: Tensor,
    new_k: Tensor,
    new_v: Tensor,
    new_w: Tensor,
    new_beta: Tensor,
    new_g: Tensor | None,
    sm_scale: float,
    keep: int,
    capacity: int,
    keys: Tensor,
    key_scale: Tensor,
    values: Tensor,
    gates: Tensor,
    products: Tensor,
    gate_totals: Tensor,
    pages: Tensor,
    chunks: Tensor,
    length: Tensor,
    folded: Tensor,
    covered: Tensor,
    suffix: Tensor,
    suffix_gate: Tensor,
    product: Tensor,
    gate_total: Tensor,
    scale: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    beta: Tensor,
    g: Tensor,
    full: Tensor,
) -> Tensor:
    """:func:`append` as an operator: the fields of Tokens, how many tokens stay open and fit, the fields of State."""
    state = State(
        keys,
        key_scale,
        values,
        gates,
        products,
        gate_totals,
        pages,
        chunks,
        length,
        folded,
        covered,
        suffix,
        suffix_gate,
        product,
        gate_total,
        scale,
        k,
        v,
        w,
        beta,
        g,
        full,
    )
    tokens = Tokens(q, new_k, new_v, new_w, new_beta, new_g, sm_scale)
    # Kernels see for themselves whether there is room; what they find is told when the host next asks.
    if not (kernels_serve(state) and q.shape[1] <= SHORT) and int(length.max()) + q.shape[1] > capacity:
        raise ValueError(
            f"q: got {q.shape[1]} tokens behind {int(length.max())}; wanted {capacity} in all: the cache is full"
        )
    return append(state, tokens, keep, capacity=capacity)


def _fake(q: Tensor, new_k: Tensor, new_v: Tensor, *_: object) -> Tensor:
    return q.new_empty(*q.shape[:3], new_v.shape[3])


append_operator = torch.library.custom_op("path_attention::append", _append_fields, mutates_args=_CHANGED)
# More tokens than SHORT are told apart on the host, which a CUDA graph cannot hold: the tag keeps the call out of them.
append_long_operator = torch.library.custom_op(
    "path_attention::append_long", _append_fields, mutates_args=_CHANGED, tags=(torch.Tag.cudagraph_unsafe,)
)
for _operator in (append_operator, append_long_operator):
    _operator.register_fake(_fake)
