"""The operator on CUDA: linear stages by our Triton kernels, the attention between sibling spans by one of two ways.

Same algorithm as ops/dyadic.py, on rows of tokens as they come, (B * L, heads, dim): nothing is packed or transposed.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import EllipsisType
from typing import Literal, NamedTuple

import torch
import triton
from torch import Tensor

from path_attention.ops.engines import dense, siblings
from path_attention.ops.engines.kept import Buffer, Sizes
from path_attention.ops.engines.part_sizes import Cut, Limits, Shape, backward_cut, cut
from path_attention.ops.kernels import linear, torch_leaves
from path_attention.ops.kernels.dense import DESCRIPTOR_ALIGNMENT
from path_attention.ops.kernels.launch import launch_kernel, next_power_of_2
from path_attention.ops.kernels.leaf_table import (
    LEAF,
    LeafTable,
    batch_leaf_table,
    packed_leaf_bounds,
    packed_leaf_table,
    token_heads,
)
from path_attention.ops.kernels.linear import Inputs
from path_attention.ops.kernels.merge_kernels import delta_kernel, factor_kernel
from path_attention.ops.sums import running_sum

# How the attention between siblings is computed: by our fused kernels, portable or for Hopper, or by the fastest one of
# torch, level by level.
Siblings = Literal["triton", "hopper", "sdpa"]

# Widest row that the tiles of the attention between siblings are made for.
MAX_DIM = 256
# Widest row of half precision for which a leaf's tiles fit an SM; leaves with wider ones are computed in torch
# (docs/kernels.md).
MAX_LEAF_DIM = 128
# What the kernels for Hopper are made for, and the versions of Triton that compiled them well: registers, spills and
# the order of instructions are read for each (docs/kernels.md).
HOPPER = (9, 0)
HOPPER_DIMS = (64, 128)
TRITON_VERSIONS = ("3.6",)
# Rows are padded to a multiple of this many columns: what tensor descriptors and torch's kernels ask of half precision.
COLUMNS = 16
# Leaves times key heads of a part, for head dims up to PART_DIM: 0.9 GB of rows and matrices, and still enough programs
# to fill the largest GPUs several times.
PART, PART_DIM = 4096, 64
# Times as many in the forward pass, whose buffers for a leaf are at most 0.6 times those of the backward pass, beside
# fewer results: the peak of a training step stays where it is, and a prompt takes half the launches.
FORWARD_PARTS = 2
# Rows of one program of the delta kernel: 64 x 64 tiles keep loads wide and registers few.
DELTA_ROWS = 64
# |dS| <= |d_out . (v - out)|: with entries of d_out and v below twice their powers of two a row of 256 columns gives at
# most 2^11 times both, and 2^4 more is float16's largest. Typical entries, some 2^-4 of that for weights near 1, leave
# weights down to 1e-6 with all their bits.
HEADROOM = 4


def unsupported_reason(
    siblings_by: Siblings, q: Tensor, v: Tensor, w: Tensor, g: Tensor | None, cu_seqlens: Tensor | None
) -> str | None:
    """Why this engine cannot serve a call in this way, or None. w is (B, L, R, H, D)."""
    length, dim, value_dim = q.shape[1], q.shape[3], v.shape[3]
    if not q.is_cuda:
        return f"q is on {q.device}, not on CUDA"
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"q is {q.dtype}, not bfloat16, float16 or float32"
    if max(dim, value_dim) > MAX_DIM:
        return f"head_dim {dim} and value_dim {value_dim} are not both at most {MAX_DIM}"
    if siblings_by == "triton":
        return None
    if siblings_by == "hopper":
        return _reason_against_hopper(q, v)
    if q.dtype == torch.float32:
        return "q is torch.float32, not bfloat16 or float16: the kernels of torch that are fast are for these"
    leaves = length // LEAF
    if g is not None:
        return "torch's attention kernels take no forget gates"
    if cu_seqlens is not None:
        return "torch's attention kernels take no packed sequences in this layout"
    if dim != value_dim or dim % dense.CUDA_COLUMNS:
        return f"head_dim {dim} and value_dim {value_dim} are not equal and a multiple of {dense.CUDA_COLUMNS}"
    if length % LEAF or leaves & (leaves - 1):
        return f"length {length} is not {LEAF} times a power of two"
    return None


def _reason_against_hopper(q: Tensor, v: Tensor) -> str | None:
    capability = torch.cuda.get_device_capability(q.device)
    if capability != HOPPER:
        return f"compute capability {capability[0]}.{capability[1]}, not {HOPPER[0]}.{HOPPER[1]}"
    version = ".".join(triton.__version__.split(".")[:2])
    if version not in TRITON_VERSIONS:
        return f"Triton {version}, not one that these kernels were tested with: {', '.join(TRITON_VERSIONS)}"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"q is {q.dtype}, not bfloat16 or float16"
    if q.shape[3] != v.shape[3] or q.shape[3] not in HOPPER_DIMS:
        return f"head_dim {q.shape[3]} and value_dim {v.shape[3]} are not both one of {HOPPER_DIMS}"
    return None


def _leaves_by(siblings_by: Siblings, q: Tensor, v: Tensor, w: Tensor) -> linear.LeavesBy:
    """How a call's leaves are computed. w is (B, L, R, H, D)."""
    if w.shape[2] > 1 or q.dtype == torch.float32 or max(q.shape[3], v.shape[3]) > MAX_LEAF_DIM:
        return "torch"
    # Those for Hopper keep what bfloat16 asks for.
    return "hopper" if siblings_by == "hopper" and q.dtype == torch.bfloat16 else "triton"


def _by_head(x: Tensor) -> Tensor:
    """(B, L, R, H, ...) -> (B, L, H, ...), or with several reflections (B, L, H, R, ...): a view."""
    return x.squeeze(2) if x.shape[2] == 1 else x.transpose(2, 3)


# Of (B, L, heads, ...): sequences and heads; all of it by ``...``, which takes the host half as long.
_Index = tuple[slice, slice, slice] | EllipsisType


class Part(NamedTuple):
    """Sequences and heads that go through the stages together: indices into (B, L, HQ, ...) and (B, L, H, ...)."""

    queries: _Index
    keys: _Index
    table: LeafTable
    sequence: int = 0  # the first one
    head: int = 0  # the first key head

    def of(
        self,
        siblings_by: Siblings,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        w: Tensor,
        beta: Tensor,
        g: Tensor | None,
        scale: float,
        *,
        in_place: bool = False,
    ) -> Inputs:
        """The part's arguments as the kernels take them; ``in_place``: some heads of q, k, v and w where they are."""
        in_pieces = q.dtype == torch.float32 or q.shape[3] > linear.WHOLE_DIM
        rows = _rows_in_place if in_place else _rows
        return Inputs(
            q=rows(q[self.queries]),
            k=rows(k[self.keys]),
            v=rows(v[self.keys]),
            w=rows(_by_head(w)[self.keys]).flatten(2),
            beta=_by_head(beta)[self.keys].flatten(0, 1).contiguous(),
            g=None if g is None else g[self.queries].flatten(0, 1).contiguous(),
            scale=scale,
            leaves=_leaves_by(siblings_by, q, v, w),
            in_pieces=in_pieces,
            unit=siblings.UNITS[siblings_by],
        )


# Takes a part, its arguments as rows of tokens, and what linear.forward makes of them.
SpansUser = Callable[[Part, Inputs, linear.Spans], None]


def _most(q: Tensor, part: int) -> int:
    """Leaves times key heads of a part of these queries; ``part`` as PART."""
    dim = int(q.shape[3])
    # A leaf's rows grow with their width, and float32 ones, which wide rows are between the stages, are twice as large.
    float32 = q.dtype == torch.float32 or dim > linear.WHOLE_DIM
    return max(1, int(part / (max(1, dim / PART_DIM) * (2 if float32 else 1))))


def _plain_cut(q: Tensor, k: Tensor, part: int, *, in_place: bool) -> Cut:
    """Into parts that are alike; ``part`` as PART."""
    batch, length, heads = map(int, k.shape[:3])  # torch.compile: one shape a compilation, where sizes depend on it
    most = _most(q, part)
    return cut(batch, -(-length // LEAF), heads, Limits(most, most), in_place=in_place)


def _parts(q: Tensor, k: Tensor, cu_seqlens: Tensor | None, of: Cut) -> Iterator[Part]:
    """The call cut like this. What the stages hold besides inputs and results is by far the most of their memory: it is
    held for one part.
    """
    batch, length, heads, _ = k.shape
    packed = None if cu_seqlens is None else packed_leaf_table(cu_seqlens, length, q.device)
    if of.parts == 1:
        yield Part(..., ..., packed or batch_leaf_table(batch, length))
        return
    group = q.shape[2] // heads
    for sequence in _slices(of.sequences):
        table = packed or batch_leaf_table(sequence.stop - sequence.start, length)
        for head in _slices(of.heads):
            yield Part(
                queries=(sequence, slice(None), slice(head.start * group, head.stop * group)),
                keys=(sequence, slice(None), head),
                table=table,
                sequence=sequence.start,
                head=head.start,
            )


def _slices(lengths: Sequence[int]) -> Iterator[slice]:
    """One behind the other."""
    start = 0
    for length in lengths:
        yield slice(start, start + length)
        start += length


def _row_dtype(siblings_by: Siblings, dtype: torch.dtype) -> torch.dtype:
    """Of the rows at the levels' edges, for inputs in ``dtype``: our kernels take them in float16 beside bfloat16
    values, torch's want one.
    """
    return dtype if siblings_by == "sdpa" or dtype == torch.float32 else torch.float16


def _missing(dim: int) -> int:
    """Columns to the next multiple of COLUMNS."""
    return -dim % COLUMNS


def _kept_cut(q: Tensor, k: Tensor) -> Cut:
    """Of a call whose forward pass keeps what its backward pass needs, for both: by shapes alone, for so is its size.

    Most of the memory is kept for the whole call, and the fewer parts the better.
    """
    return _plain_cut(q, k, FORWARD_PARTS * PART, in_place=False)


def kept_bytes(
    siblings_by: Siblings, q: Tensor, k: Tensor, v: Tensor, w: Tensor, g: Tensor | None, cu_seqlens: Tensor | None
) -> int:
    """Of the buffer in which a call's forward pass can keep what :func:`backward` needs; of packed sequences whatever
    their boundaries. 0 where that is computed again: leaves in torch make it a few at a time. w is (B, L, R, H, D).
    """
    if _leaves_by(siblings_by, q, v, w) == "torch":
        return 0
    length, heads, dim = map(int, k.shape[1:])
    group, of = int(q.shape[2]) // heads, _kept_cut(q, k)
    sizes = Sizes(dim + _missing(dim), _row_dtype(siblings_by, q.dtype), gated=g is not None)
    packed = None if cu_seqlens is None else packed_leaf_bounds(int(cu_seqlens.numel()) - 1, length)
    return sum(
        sizes.nbytes(packed or batch_leaf_table(sequences, length), group * part_heads, part_heads)
        for sequences in of.sequences
        for part_heads in of.heads
    )


def _kept(
    buffer: Buffer, siblings_by: Siblings, inputs: Inputs, table: LeafTable
) -> tuple[linear.Levels, linear.Leaves]:
    """A part's share of the buffer: as the forward pass fills it, and the backward pass, part by part, finds it."""
    sizes = Sizes(inputs.q.shape[2], _row_dtype(siblings_by, inputs.q.dtype), gated=inputs.g is not None)
    return sizes.take(buffer, table, inputs.query_heads, inputs.heads)


def _rows(x: Tensor) -> Tensor:
    """(B, L, heads, ..., dim) -> (B * L, heads, ..., dim padded to a multiple of COLUMNS), contiguous and aligned."""
    x = x.flatten(0, 1)
    if missing := _missing(x.shape[-1]):  # torch's pad by nothing would be a copy
        return torch.nn.functional.pad(x, (0, missing)).contiguous()
    x = x.contiguous()
    return x.clone() if x.data_ptr() % DESCRIPTOR_ALIGNMENT else x


def _rows_in_place(x: Tensor) -> Tensor:
    """(B, L, heads, dim) -> (B * L, heads, dim), a view of some heads of a contiguous tensor."""
    return x.view(-1, *x.shape[2:])


def _can_stay(siblings_by: Siblings, q: Tensor, k: Tensor, v: Tensor, w: Tensor, d_out: Tensor | None = None) -> bool:
    """Whether kernels can take some heads of these arguments, and write some of the results, where they are."""
    # Backward, the kernels of one backend alone are made for that.
    if siblings_by not in (("triton", "hopper") if d_out is None else ("hopper",)):
        return False
    return _leaves_by(siblings_by, q, v, w) != "torch" and all(
        x.is_contiguous() and x.shape[-1] % COLUMNS == 0 and x.data_ptr() % DESCRIPTOR_ALIGNMENT == 0
        for x in (q, k, v, w, d_out)
        if x is not None
    )


def _place(result: Tensor, index: _Index, padded: bool, *, in_place: bool = False) -> Tensor:
    """Where a kernel writes a part's rows of result (B, L, heads, ...): there, or else rows for :func:`_store`.

    padded: the last dimension is made a multiple of COLUMNS. in_place: some heads are written where they belong.
    """
    place = result[index]
    missing = _missing(place.shape[-1]) if padded else 0
    if not missing and (in_place or place.is_contiguous()):
        return _rows_in_place(place)
    rows = place.shape[0] * place.shape[1]
    return place.new_empty(rows, *place.shape[2:-1], place.shape[-1] + missing)


class _Place(NamedTuple):
    """Of a part's gradients in those of the call, and where kernels write them: arguments of :func:`_store`."""

    result: Tensor
    of_part: _Index
    rows: Tensor


def _store(result: Tensor, index: _Index, rows: Tensor) -> None:
    """Bring a part's rows from where the kernels wrote them to result (B, L, heads, ...), without the padding."""
    place = result[index]
    if rows.data_ptr() != place.data_ptr():
        place.copy_(rows[..., : place.shape[-1]].reshape(place.shape))


def forward(
    siblings_by: Siblings,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    beta: Tensor,
    g: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    use_spans: SpansUser | None = None,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out (B, L, HQ, DV) and log_sum_exp (B, L, HQ) float32; w (B, L, R, H, D), beta (B, L, R, H).

    Args:
        use_spans: called for every part, of half-precision inputs, while its buffers are there and the device has its
            attention to do.
        kept: :func:`kept_bytes` bytes in which to keep what :func:`backward` would compute again.
    """
    result = torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype, device=q.device)
    result_log_sum_exp = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    attend = siblings.FORWARD[siblings_by]
    in_place = _can_stay(siblings_by, q, k, v, w)
    buffer = None if kept is None else Buffer(kept)
    of = _plain_cut(q, k, FORWARD_PARTS * PART, in_place=in_place) if buffer is None else _kept_cut(q, k)
    for part in _parts(q, k, cu_seqlens, of):
        inputs = part.of(siblings_by, q, k, v, w, beta, g, scale, in_place=in_place)
        out = _place(result, part.queries, padded=True, in_place=in_place)
        log_sum_exp = _place(result_log_sum_exp, part.queries, padded=False)
        to_keep = None if buffer is None else _kept(buffer, siblings_by, inputs, part.table)
        row_dtype = _row_dtype(siblings_by, q.dtype)
        made = linear.forward(
            inputs,
            part.table,
            out,
            log_sum_exp,
            row_dtype,
            to_keep,
            moves_queries=siblings_by in siblings.MOVES_QUERIES,
            with_spans=use_spans is not None,
        )
        attend(inputs, part.table, made, out, log_sum_exp)
        if use_spans is not None and made.spans is not None:
            use_spans(part, inputs, made.spans)
        _store(result, part.queries, out)
        _store(result_log_sum_exp, part.queries, log_sum_exp)
        del inputs, out, log_sum_exp, made, to_keep  # before the next part asks for as much
    return result, result_log_sum_exp


def backward(
    siblings_by: Siblings,
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    beta: Tensor,
    g: Tensor | None,
    out: Tensor,
    log_sum_exp: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v, w, beta and g, in their dtypes. ``kept``: as :func:`forward` of the same call filled it."""
    d_gate = None if g is None else torch.empty(g.shape, dtype=torch.float32, device=g.device)
    results: list[Tensor] = []

    def places(part: Part) -> list[_Place]:
        """Where a part's gradients go. There are none before the first part's buffers give way to them."""
        if not results:
            results.extend(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, w, beta))
        d_q, d_k, d_v, d_w, d_beta = results
        of_rows = ((d_q, part.queries), (d_k, part.keys), (d_v, part.keys), (_by_head(d_w), part.keys))
        of_numbers = _by_head(d_beta)
        return [
            *[_Place(x, index, _place(x, index, padded=True, in_place=in_place)) for x, index in of_rows],
            _Place(of_numbers, part.keys, _place(of_numbers, part.keys, padded=False)),
        ]

    in_place = _can_stay(siblings_by, q, k, v, w, d_out)
    rows = _rows_in_place if in_place else _rows
    buffer = None if kept is None else Buffer(kept)
    if buffer is not None:
        of = _kept_cut(q, k)
    elif in_place:
        batch, length, query_heads, dim = q.shape
        shape = Shape(batch, length, query_heads, k.shape[2], dim, w.element_size(), gated=g is not None)
        of = backward_cut(shape, _most(q, PART))
    else:
        of = _plain_cut(q, k, PART, in_place=False)
    for part in _parts(q, k, cu_seqlens, of):
        inputs = part.of(siblings_by, q, k, v, w, beta, g, scale, in_place=in_place)
        found, part_d_gate = _part_backward(
            siblings_by,
            inputs,
            part.table,
            rows(d_out[part.queries]),
            rows(out[part.queries]),
            log_sum_exp[part.queries].flatten(0, 1).contiguous(),
            partial(places, part),
            buffer,
        )
        for place in found:
            _store(*place)
        if d_gate is not None and part_d_gate is not None:
            _store(d_gate, part.queries, part_d_gate)
        del inputs, found, place, part_d_gate
    d_q, d_k, d_v, d_w, d_beta = results
    return d_q, d_k, d_v, d_w, d_beta, None if d_gate is None else _gate_gradient(d_gate, cu_seqlens).to(g)


def _part_backward(
    siblings_by: Siblings,
    inputs: Inputs,
    table: LeafTable,
    d_out: Tensor,
    out: Tensor,
    log_sum_exp: Tensor,
    places: Callable[[], list[_Place]],
    kept: Buffer | None,
) -> tuple[list[_Place], Tensor | None]:
    """Write a part's gradients to its places; also returns row sums less column sums of dS, (T, HQ), where there are
    gates.
    """
    delta, factor = delta_and_factor(out, d_out, inputs.v)
    if kept is None:
        levels, leaves = linear.recompute(inputs, table, _row_dtype(siblings_by, inputs.q.dtype))
    else:
        levels, leaves = _kept(kept, siblings_by, inputs, table)
    if siblings_by == "triton":
        gradients = siblings.triton_backward(inputs, table, levels, d_out, log_sum_exp, delta, factor)
    elif siblings_by == "hopper":
        assert factor is not None, "float32 inputs have no kernels here"
        gradients = siblings.hopper_backward(inputs, table, levels, d_out, log_sum_exp, delta, factor)
    else:
        gradients = siblings.sdpa_backward(inputs, table, levels, d_out, out, log_sum_exp)
    edges = linear.levels_backward(inputs, table, levels, leaves, gradients)
    of_dense = (gradients.values, gradients.factor, d_gate := gradients.gate)
    found = places()
    result = linear.Gradients(*[x.rows for x in found])
    if inputs.leaves == "torch":
        torch_leaves.backward(inputs, table, edges, *of_dense, log_sum_exp, out, d_out, result)
    else:
        linear.leaves_backward(inputs, table, leaves, edges, *of_dense, log_sum_exp, delta, d_out, result)
    return found, d_gate


def delta_and_factor(out: Tensor, d_out: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    """rowsum(d_out * out) of (T, HQ, DV) in float32, (T, HQ); and what gradients are multiplied by on their way through
    half precision, (1,), None for float32 inputs. v (tokens, H, DV), not more rows than out has. All may be some heads
    of tensors that have more of them.
    """
    delta = torch.empty(out.shape[:2], dtype=torch.float32, device=out.device)
    largest = None if v.dtype == torch.float32 else torch.zeros(2, dtype=torch.int32, device=out.device)
    launch_kernel(
        delta_kernel,
        (triton.cdiv(delta.numel(), DELTA_ROWS),),
        p_out=out,
        p_d_out=d_out,
        p_v=v,
        p_delta=delta,
        p_largest=largest,
        s_rows=delta.numel(),
        s_values=v.shape[0] * v.shape[1],
        HQ=out.shape[1],
        H=v.shape[1],
        out_heads=token_heads(out),
        value_heads=token_heads(v),
        DV=out.shape[2],
        BLOCK_DV=next_power_of_2(out.shape[2]),
        BLOCK_ROWS=DELTA_ROWS,
        num_warps=4,
    )
    if largest is None:
        return delta, None
    factor = torch.empty(1, dtype=torch.float32, device=out.device)
    launch_kernel(factor_kernel, (1,), p_largest=largest, p_factor=factor, HEADROOM=HEADROOM, num_warps=1)
    return delta, factor


def _gate_gradient(d_gate: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Row sums less column sums of dS, (B, L, HQ), to the gradient of g: g_s is in the logits of all j < s <= i, so
    its gradient is the sum over the rows from s on, less the columns from s on, to the end of its sequence.
    """
    # float64: what precedes a sequence in a packed row must leave no trace of its rounding.
    total = running_sum(d_gate.double(), 1)
    from_here = d_gate - total
    if cu_seqlens is None:
        return from_here + total[:, -1:]
    ends = cu_seqlens.to(d_gate.device, torch.int64)
    token = torch.arange(d_gate.shape[1], device=d_gate.device)
    last = ends[torch.searchsorted(ends, token, right=True)] - 1  # of the token's sequence
    return from_here + total[:, last]
