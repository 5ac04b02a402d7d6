"""Launchers of the linear-cost stages: what each allocates, and in which order they run.

leaves -> tree -> query_transport and key_transport. What they write is all that the dense attention between
siblings needs, or without query_transport one that moves the leaves' queries by itself; docs/kernels.md lists the
buffers with their sizes.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from path_attention.ops.kernels.launch import launch_kernel, next_power_of_2
from path_attention.ops.kernels.leaf_kernels import leaf_backward_kernel, leaf_forward_kernel
from path_attention.ops.kernels.leaf_table import LEAF, LeafTable, token_heads
from path_attention.ops.kernels.transport_kernels import (
    key_transport_backward_kernel,
    key_transport_kernel,
    query_transport_backward_kernel,
    query_transport_kernel,
)
from path_attention.ops.kernels.tree_kernels import tree_backward_kernel, tree_kernel

# Narrowest tile of the linear stages, in columns: what a matrix instruction of Hopper takes whole.
MIN_BLOCK = 64
# Levels of the tree that one launch upwards works through at most: three products in a row, and 67% of the traffic of
# one launch a level. Three levels have 57%, and seven products in a row: 0.19 ms instead of 0.17 at 2 x 8192 x 32 x 64,
# and 0.18 instead of 0.15 at 8 x 2048, on an H200 (both passes). What waits for its right sibling lies in shared memory
# beside both factors of a product: wide rows take so many bytes of it on Hopper, and a GPU that has less for a program
# makes one level of them a launch.
TREE_LEVELS = 2
WIDE_TREE_SHARED = 192 * 1024
# Programs with work that such a launch has at least, or it works through fewer levels, so that pairs run side by side:
# one for each of the 132 multiprocessors of a large GPU, as the power of two that their number mostly is.
TREE_PROGRAMS = 128

# Widest row whose float16 matrix a program of the tree and the transports holds whole.
WHOLE_DIM = 128
# Columns or rows of a float32 factor in one product: the narrowest that tl.dot takes. The tiles at hand fill the
# registers, so that each column more is spilled (32 spill twice as much at D = 256), and takes shared memory twice, as
# a tensor-float-32 part and the rest.
PIECE = 16

# How the leaves are computed: by our kernels, portable or for Hopper, or in torch's batched products.
LeavesBy = Literal["triton", "hopper", "torch"]


@dataclass(frozen=True)
class Inputs:
    """The operator's arguments as rows of tokens: T = B * L of them. R reflections a token. Contiguous; or q, k, v and
    w, and with them out and all gradients, the same heads of contiguous tensors that have more.
    """

    q: Tensor  # (T, HQ, D)
    k: Tensor  # (T, H, D)
    v: Tensor  # (T, H, DV)
    w: Tensor  # (T, H, D), or (T, H, R * D)
    beta: Tensor  # (T, H), or (T, H, R)
    g: Tensor | None  # (T, HQ)
    scale: float
    # Our kernels take one reflection a token; those for Hopper bfloat16.
    leaves: LeavesBy = "triton"
    # The tree and the transports read their factors in pieces: what float32 ones ask for on a GPU.
    in_pieces: bool = False
    # What queries at edges and gates are multiplied by: log2(e) makes logits in base 2 of them.
    unit: float = 1.0

    @property
    def heads(self) -> int:
        return self.k.shape[1]

    @property
    def query_heads(self) -> int:
        return self.q.shape[1]

    @property
    def group(self) -> int:
        return self.query_heads // self.heads

    @property
    def reflections(self) -> int:
        return self.w.shape[2] // self.k.shape[2]

    @cached_property
    def work_dtype(self) -> torch.dtype:
        """What operands of the linear stages' products are rounded to, and what lies between the stages: tiles.py.

        Wide rows stay float32: a tile's power of two would have to be known before the tile is made, piece by piece.
        """
        wide = self.q.shape[2] > WHOLE_DIM
        return torch.float32 if self.q.dtype == torch.float32 or wide else torch.float16

    def options(self, *, wide: bool = False) -> dict[str, object]:
        """Compile-time arguments and launch options of the linear stages' kernels.

        ``wide``: of those that hold two D x D matrices or as much beside their rows. Measured on an H200 at 16k tokens
        of 2048 channels: at D = 64 4 warps are faster than 8 in every kernel, at D = 128 8 in the wide ones
        (leaf_backward 1.73 ms against 2.61; leaf_forward 1.16 against 0.65). That of the tree's gradients is not among
        them: 0.44 ms in 4, 0.48 in 8 (2 x 8192 x 16 x 128, results/h200_backward_pieces.json).
        """
        dim = self.q.shape[2]
        return {
            "GROUP": self.group,
            "D": dim,
            "BLOCK_D": max(MIN_BLOCK, next_power_of_2(dim)),
            "WORK": None if self.work_dtype == torch.float32 else tl.float16,
            # Loops here run a few times over whole tiles: buffering the next one would only take shared memory.
            "num_stages": 1,
            "num_warps": 8 if self.in_pieces or (wide and dim > MIN_BLOCK) else 4,
        }

    def matrix_options(self, *, wide: bool = False) -> dict[str, object]:
        """The same of the tree's and the transports' kernels."""
        return {**self.options(wide=wide), "PIECE": PIECE if self.in_pieces else None}

    @property
    def tree_levels(self) -> int:
        """Of one launch upwards, at most."""
        if self.in_pieces or self.q.shape[2] <= MIN_BLOCK or not self.q.is_cuda:
            return TREE_LEVELS
        properties = torch.cuda.get_device_properties(self.q.device)
        shared = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # which torch's stubs lack
        return TREE_LEVELS if shared >= WIDE_TREE_SHARED else 1

    @property
    def value_options(self) -> dict[str, int]:
        """Compile-time arguments of the kernels that see values."""
        value_dim = self.v.shape[2]
        return {"DV": value_dim, "BLOCK_DV": max(MIN_BLOCK, next_power_of_2(value_dim))}

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.work_dtype, device=self.q.device)


@dataclass(frozen=True)
class Scaled:
    """Gradients in the work dtype, each tile to be multiplied by its power of two; float32 ones are as they are."""

    tiles: Tensor
    power: Tensor  # float32


class _Rows:
    """Rows at the edges of every level, or their gradients: the largest buffers there are."""

    query_rows: Tensor
    key_rows: Tensor

    def take_queries(self) -> Tensor:
        """The queries' rows, which are forgotten here: once their user drops them, their memory serves what follows."""
        rows, self.query_rows = self.query_rows, self.query_rows.new_empty(0)
        return rows

    def take_keys(self) -> Tensor:
        """The keys' rows, likewise."""
        rows, self.key_rows = self.key_rows, self.key_rows.new_empty(0)
        return rows


@dataclass
class Levels(_Rows):
    """Rows at the edges of every level."""

    # (levels, query_slots, 64, HQ, D), times scale and unit; (0,) where the attention moves the leaves' own and keeps
    # none.
    query_rows: Tensor
    key_rows: Tensor  # (levels, key_slots, 64, H, D)
    gate_query: Tensor | None = None  # (HQ, levels, query_slots, 64) float32, both times unit
    gate_key: Tensor | None = None  # (HQ, levels, key_slots, 64) float32


@dataclass(frozen=True)
class Leaves:
    """What the backward pass wants again of the leaves and the tree, in the work dtype."""

    nodes: Tensor  # (2 N, H, D, D)
    # T^-1 (N, H, 64, 64), Y (N, H, 64, 64) and U (N, H, 64, D); leaves in torch make them again, a few at a time.
    factors: tuple[Tensor, Tensor, Tensor] | None


class Form(NamedTuple):
    """A tensor that is not there yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def node_form(leaves: int, heads: int, dim: int, work_dtype: torch.dtype) -> Form:
    """Of :attr:`Leaves.nodes`."""
    return Form((2 * leaves, heads, dim, dim), work_dtype)


def factor_forms(leaves: int, heads: int, dim: int, work_dtype: torch.dtype) -> tuple[Form, Form, Form]:
    """Of :attr:`Leaves.factors`."""
    square = Form((leaves, heads, LEAF, LEAF), work_dtype)
    return square, square, Form((leaves, heads, LEAF, dim), work_dtype)


def level_forms(
    levels: int, query_slots: int, key_slots: int, query_heads: int, heads: int, dim: int, row_dtype: torch.dtype
) -> tuple[Form, Form, Form, Form]:
    """Of :class:`Levels`, with gates."""
    queries, keys = (levels, query_slots, LEAF), (levels, key_slots, LEAF)
    return (
        Form((*queries, query_heads, dim), row_dtype),
        Form((*keys, heads, dim), row_dtype),
        Form((query_heads, *queries), torch.float32),
        Form((query_heads, *keys), torch.float32),
    )


class LeafQueries(NamedTuple):
    """Queries at their leaves' left edges and what moves them on to those of the spans around them."""

    q_left: Tensor  # (N, 64, HQ, D), times scale and unit
    nodes: Tensor  # (2 N, H, D, D)


class Spans(NamedTuple):
    """Keys at their leaves' right edges and the matrices of all spans: what a fold begins with. In half precision."""

    k_right: Tensor  # (N, 64, H, D)
    nodes: Tensor  # (2 N, H, D, D), of spans that something lies to the right of
    node_rest: Tensor  # likewise: what rounding left of them


class Forward(NamedTuple):
    """What :func:`forward` returns."""

    levels: Levels
    queries: LeafQueries | None  # for an attention that moves them
    spans: Spans | None  # if they are wanted


def forward(
    inputs: Inputs,
    table: LeafTable,
    out: Tensor,
    log_sum_exp: Tensor,
    row_dtype: torch.dtype,
    kept: tuple[Levels, Leaves] | None = None,
    *,
    moves_queries: bool = False,
    with_spans: bool = False,
) -> Forward:
    """Run the forward linear stages; the leaves' own attention goes to out (T, HQ, DV) and log_sum_exp (T, HQ).

    Args:
        row_dtype: what the rows at the levels' edges are rounded to.
        kept: where what :func:`recompute` would return goes, which then need not be called. Leaves by kernels alone.
        moves_queries: the attention does so by itself, and writes rows of them where they are kept.
        with_spans: of half-precision inputs the spans are wanted too.
    """
    levels, leaves = (None, new_leaves(inputs, table, with_factors=False)) if kept is None else kept
    node_rest = torch.empty_like(leaves.nodes) if with_spans else None
    q_left, k_right, gate_nodes = _leaves(inputs, table, out, log_sum_exp, leaves, node_rest)
    levels = _levels(
        inputs, table, leaves.nodes, q_left, k_right, gate_nodes, row_dtype, result=levels,
        with_queries=not moves_queries
    )  # fmt: skip
    queries = LeafQueries(q_left, leaves.nodes) if moves_queries else None
    return Forward(levels, queries, None if node_rest is None else Spans(k_right, leaves.nodes, node_rest))


def recompute(inputs: Inputs, table: LeafTable, row_dtype: torch.dtype) -> tuple[Levels, Leaves]:
    """The forward linear stages again, for the backward pass: no attention, but all that it needs of the leaves."""
    leaves = new_leaves(inputs, table, with_factors=inputs.leaves != "torch")
    q_left, k_right, gate_nodes = _leaves(inputs, table, None, None, leaves)
    return _levels(inputs, table, leaves.nodes, q_left, k_right, gate_nodes, row_dtype), leaves


def new_leaves(inputs: Inputs, table: LeafTable, *, with_factors: bool) -> Leaves:
    """To be filled by :func:`_leaves`."""
    of_part = (table.num_leaves, inputs.heads, inputs.q.shape[2], inputs.work_dtype)
    factors = None
    if with_factors:
        inverse, y, u = (inputs.empty(*form.shape) for form in factor_forms(*of_part))
        factors = inverse, y, u
    return Leaves(inputs.empty(*node_form(*of_part).shape), factors)


def _leaves(
    inputs: Inputs,
    table: LeafTable,
    out: Tensor | None,
    log_sum_exp: Tensor | None,
    result: Leaves,
    node_rest: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Fill ``result``; q_left (N, 64, HQ, D), k_right (N, 64, H, D) and the nodes' gates are returned.

    node_rest: where what rounding leaves of the nodes goes, for callers that want it.
    """
    heads, query_heads, dim = inputs.heads, inputs.query_heads, inputs.q.shape[2]
    leaves, is_half = table.num_leaves, inputs.work_dtype != torch.float32
    nodes = result.nodes
    all_rests = node_rest is not None
    if is_half and node_rest is None:
        node_rest = torch.empty_like(nodes)
    gate_nodes = None if inputs.g is None else inputs.empty(2 * leaves, query_heads, dtype=torch.float32)
    q_left, k_right = inputs.empty(leaves, LEAF, query_heads, dim), inputs.empty(leaves, LEAF, heads, dim)
    if inputs.leaves == "torch":
        from path_attention.ops.kernels import torch_leaves  # which imports this module

        torch_leaves.forward(inputs, table, q_left, k_right, nodes, node_rest, gate_nodes, out, log_sum_exp)
    else:
        results = {
            "p_q_left": q_left,
            "p_k_right": k_right,
            "p_node": nodes,
            "p_node_rest": node_rest,
            "p_gate_node": gate_nodes,
            "p_out": out,
            "p_log_sum_exp": log_sum_exp,
        }
        _launch_leaves(inputs, table, results, result.factors)
    _tree(inputs, table, nodes, node_rest, gate_nodes, all_rests=all_rests)
    return q_left, k_right, gate_nodes


def _tree(
    inputs: Inputs,
    table: LeafTable,
    nodes: Tensor,
    node_rest: Tensor | None,
    gate_nodes: Tensor | None,
    *,
    all_rests: bool,
) -> None:
    """All nodes above the leaves, from theirs, and of their rests all or those that a launch begins with."""
    options = inputs.matrix_options(wide=True)
    for first_level, levels in _tree_launches(inputs, table):
        launch_kernel(
            tree_kernel,
            (_spans(table, first_level + levels) * inputs.heads,),
            p_node=nodes,
            p_node_rest=node_rest,
            p_gate_node=gate_nodes,
            first_level=first_level,
            H=inputs.heads,
            LEVELS=levels,
            ALL_RESTS=all_rests,
            **table.arguments,
            **options,
        )


def _tree_launches(inputs: Inputs, table: LeafTable) -> list[tuple[int, int]]:
    """First level and number of levels of each launch upwards: as many as leave TREE_PROGRAMS programs with work.

    Where one level alone has fewer, all: another launch waits for the first and reads what it wrote, which takes as
    long as the third product. In pieces always as many: nothing else was tried there.
    """
    launches: list[tuple[int, int]] = []
    most, level = inputs.tree_levels, 0
    while level < table.num_levels - 1:
        choices = range(1, most + 1)
        filling = [x for x in choices if (table.num_leaves >> (level + x)) * inputs.heads >= TREE_PROGRAMS]
        levels = most if inputs.in_pieces else max(filling, default=most)
        launches.append((level, min(levels, table.num_levels - 1 - level)))
        level += levels
    return launches


def _launch_leaves(
    inputs: Inputs,
    table: LeafTable,
    results: dict[str, Tensor | None],
    factors: tuple[Tensor, Tensor, Tensor] | None,
) -> None:
    """Launch the leaves' forward kernel, portable or for Hopper; ``results`` are its arguments of these names."""
    leaves, heads, dim = table.num_leaves, inputs.heads, inputs.q.shape[2]
    is_half = inputs.work_dtype != torch.float32
    inverse, y, u = (None, None, None) if factors is None else factors
    arguments = {
        **results,
        "p_q": inputs.q,
        "p_k": inputs.k,
        "p_v": inputs.v,
        "p_w": inputs.w,
        "p_beta": inputs.beta,
        "p_g": inputs.g,
        "p_inverse": inverse,
        "p_y": y,
        "p_u": u,
        "scale": inputs.scale,
        "row_scale": inputs.scale * inputs.unit,
        "H": heads,
        "token_heads": token_heads(inputs.k),
        "SPLIT_W": is_half and inputs.w.dtype == torch.float32,
        **table.arguments,
    }
    if inputs.leaves == "hopper":
        from path_attention.ops.kernels.hopper import leaf as hopper_leaf  # only some versions of Triton have Gluon

        launch_kernel(
            hopper_leaf.leaf_forward_kernel,
            (leaves * heads,),
            **arguments,
            GROUP=inputs.group,
            D=dim,
            **hopper_leaf.forward_options(dim),
        )
    else:
        # A row meets 64 reflections, each of whose roundings is in proportion to 1 / sqrt(D): float16's own bits, and
        # rows shorter than the leaf, want both parts of the factors.
        split = is_half and (inputs.q.dtype == torch.float16 or dim < LEAF)
        launch_kernel(
            leaf_forward_kernel,
            (leaves * heads,),
            **arguments,
            SPLIT_ROWS=split,
            **inputs.value_options,
            **inputs.options(),
        )


def _levels(
    inputs: Inputs,
    table: LeafTable,
    nodes: Tensor,
    q_left: Tensor,
    k_right: Tensor,
    gate_nodes: Tensor | None,
    row_dtype: torch.dtype,
    key_table: LeafTable | None = None,
    *,
    only_top: bool = False,
    with_queries: bool = True,
    result: Levels | None = None,
) -> Levels:
    """Rows at every level's edges, or of the uppermost level alone; ``key_table``: where keys stand, for callers to
    whom that is another place. ``result``: where they go. Without queries their gates are made all the same.
    """
    heads, query_heads, dim = inputs.heads, inputs.query_heads, inputs.q.shape[2]
    levels, key_table = 1 if only_top else table.num_levels, key_table or table
    if result is None:
        forms = level_forms(levels, table.query_slots, key_table.key_slots, query_heads, heads, dim, row_dtype)
        used = forms if inputs.g is not None else forms[:2]
        if not with_queries:
            used = (Form((0,), row_dtype), *used[1:])
        result = Levels(*(inputs.empty(*form.shape, dtype=form.dtype) for form in used))
    if levels == 0:
        return result
    shared = {
        "p_g": inputs.g,
        "p_node": nodes,
        "p_gate_node": gate_nodes,
        "H": heads,
        "num_levels": table.num_levels,
        "ONLY_TOP": only_top,
        "UNIT": inputs.unit,
        **inputs.matrix_options(),
    }
    if with_queries or inputs.g is not None:
        launch_kernel(
            query_transport_kernel,
            (table.num_leaves * query_heads,),
            p_q_left=q_left if with_queries else None,
            p_query_rows=result.query_rows if with_queries else None,
            p_gate_query=result.gate_query,
            query_slots=table.query_slots,
            **shared,
            **table.arguments,
        )
    launch_kernel(
        key_transport_kernel,
        (key_table.num_leaves * heads,),
        p_k_right=k_right,
        p_key_rows=result.key_rows,
        p_gate_key=result.gate_key,
        key_slots=key_table.key_slots,
        BLOCK_GROUP=next_power_of_2(inputs.group),
        **shared,
        **key_table.arguments,
    )
    return result


@dataclass
class DenseGradients(_Rows):
    """What the backward of the dense attention between siblings hands to the linear stages."""

    query_rows: Tensor  # (levels, query_slots, 64, HQ, D), of rows without the unit
    key_rows: Tensor  # (levels, key_slots, 64, H, D)
    values: Tensor  # (T, H, DV)
    gate: Tensor | None  # (T, HQ) float32: row sums less column sums of dS
    factor: Tensor | None  # (1,) float32: what all but gate was multiplied by, a power of two; None for 1


@dataclass(frozen=True)
class Gradients:
    """Where the gradients of :class:`Inputs` go, each like its input; that of g is left in d_gate."""

    q: Tensor
    k: Tensor
    v: Tensor | None
    w: Tensor
    beta: Tensor


@dataclass(frozen=True)
class EdgeGradients:
    """Gradients of the leaves' rows at their edges and of all transitions."""

    q_left: Scaled  # (N, 64, HQ, D), (N, HQ)
    k_right: Scaled  # (N, 64, H, D), (N, H)
    nodes: Scaled  # (2 N, H, D, D), (2 N, H)


def scaled_matrices(inputs: Inputs, number: int, of_heads: int) -> Scaled:
    """Room for gradients of so many D x D matrices a head."""
    dim = inputs.q.shape[2]
    return Scaled(inputs.empty(number, of_heads, dim, dim), inputs.empty(number, of_heads, dtype=torch.float32))


def levels_backward(
    inputs: Inputs,
    table: LeafTable,
    levels: Levels,
    leaves: Leaves,
    dense: DenseGradients,
    key_table: LeafTable | None = None,
    nodes: Scaled | None = None,
) -> EdgeGradients:
    """From the rows at all levels' edges back to the leaves' edges: transports, and the tree from its root down.

    Takes the rows out of ``levels`` and ``dense``. ``key_table`` is that of the rows' making. ``nodes``, if given, hold
    the gradients of the matrices at the uppermost level, which no rows were moved by; ``dense`` then has rows of that
    level alone.
    """
    heads, query_heads = inputs.heads, inputs.query_heads
    key_table = key_table or table
    tree_levels = table.num_levels - (nodes is not None)
    shared = {"p_node": leaves.nodes, "H": heads}
    moved = {
        **shared,
        **inputs.matrix_options(wide=True),
        "p_factor": dense.factor,
        "num_levels": table.num_levels,
        "ONLY_TOP": nodes is not None,
    }
    # Keys first: their gradients wait beside the queries', of which there are more.
    k_right = _scaled_rows(inputs, table, heads)
    key_partials = scaled_matrices(inputs, _partial_tiles(key_table.key_slots, table.num_levels), heads)
    if table.num_levels > 0:
        launch_kernel(
            key_transport_backward_kernel,
            (key_table.num_leaves * heads,),
            p_key_rows=levels.take_keys(),
            p_d_key_rows=dense.take_keys(),
            p_d_k_right=k_right.tiles,
            p_d_k_right_power=k_right.power,
            p_partials=key_partials.tiles,
            p_partials_power=key_partials.power,
            key_slots=key_table.key_slots,
            **moved,
            **key_table.arguments,
        )
    q_left = _scaled_rows(inputs, table, query_heads)
    query_partials = scaled_matrices(inputs, _partial_tiles(table.query_slots, table.num_levels), query_heads)
    launch_kernel(
        query_transport_backward_kernel,
        (table.num_leaves * query_heads,),
        p_query_rows=levels.take_queries(),
        p_d_query_rows=dense.take_queries(),
        p_d_q_left=q_left.tiles,
        p_d_q_left_power=q_left.power,
        p_partials=query_partials.tiles,
        p_partials_power=query_partials.power,
        query_slots=table.query_slots,
        UNIT=inputs.unit,
        **moved,
        **table.arguments,
    )
    nodes = nodes or scaled_matrices(inputs, 2 * table.num_leaves, heads)
    options = inputs.matrix_options()
    for level in reversed(range(tree_levels)):
        launch_kernel(
            tree_backward_kernel,
            (_spans(table, level + 1) * heads, 2),
            p_query_partials=query_partials.tiles,
            p_query_partials_power=query_partials.power,
            p_key_partials=key_partials.tiles,
            p_key_partials_power=key_partials.power,
            p_d_node=nodes.tiles,
            p_d_node_power=nodes.power,
            level=level,
            query_slots=table.query_slots,
            key_slots=table.key_slots,
            **shared,
            **options,
            **table.arguments,
        )
    return EdgeGradients(q_left, k_right, nodes)


def _spans(table: LeafTable, level: int) -> int:
    """Programs that find all spans of a level by _first_leaf of tree_kernels.py."""
    if table.columns is not None:
        return table.num_leaves
    return table.num_leaves // table.leaves * -(-table.leaves >> level)


def _scaled_rows(inputs: Inputs, table: LeafTable, of_heads: int) -> Scaled:
    tiles = inputs.empty(table.num_leaves, LEAF, of_heads, inputs.q.shape[2])
    return Scaled(tiles, inputs.empty(table.num_leaves, of_heads, dtype=torch.float32))


def _partial_tiles(slots: int, levels: int) -> int:
    """Tiles that partial_tile of tree_kernels.py numbers: one a slot at level 0, one for two slots above; none of the
    uppermost level, whose rows nothing moves on.
    """
    return slots + max(0, levels - 2) * (slots // 2)


def leaves_backward(
    inputs: Inputs,
    table: LeafTable,
    leaves: Leaves,
    edges: EdgeGradients,
    d_values: Tensor | None,
    factor: Tensor | None,
    d_gate: Tensor | None,
    log_sum_exp: Tensor | None,
    delta: Tensor | None,
    d_out: Tensor | None,
    result: Gradients,
) -> None:
    """Back through the leaves, to ``result``, by the kernels that computed them: leaves.factors are given.

    d_values, factor and d_gate are those of :class:`DenseGradients`; d_gate is added to in place.
    log_sum_exp and delta = rowsum(d_out * out) are (T, HQ) float32, of the whole attention. Without d_out there was no
    attention in the leaves: all of these are None, and so is result.v. leaf_group.py wants it.
    """
    assert leaves.factors is not None
    inverse, y, u = leaves.factors
    arguments = {
        "p_q": inputs.q,
        "p_k": inputs.k,
        "p_v": inputs.v,
        "p_w": inputs.w,
        "p_beta": inputs.beta,
        "p_g": inputs.g,
        "p_inverse": inverse,
        "p_y": y,
        "p_u": u,
        "p_log_sum_exp": log_sum_exp,
        "p_delta": delta,
        "p_d_out": d_out,
        "p_d_q_left": edges.q_left.tiles,
        "p_d_q_left_power": edges.q_left.power,
        "p_d_k_right": edges.k_right.tiles,
        "p_d_k_right_power": edges.k_right.power,
        "p_d_node": edges.nodes.tiles,
        "p_d_node_power": edges.nodes.power,
        "p_d_values": d_values,
        "p_factor": factor,
        "p_d_q": result.q,
        "p_d_k": result.k,
        "p_d_v": result.v,
        "p_d_w": result.w,
        "p_d_beta": result.beta,
        "p_d_gate": d_gate,
        "scale": inputs.scale,
        "H": inputs.heads,
        "token_heads": token_heads(inputs.k),
        **table.arguments,
    }
    dim = inputs.q.shape[2]
    if inputs.leaves == "hopper" and inputs.group == 1 and dim == LEAF:
        from path_attention.ops.kernels.hopper import leaf as hopper_leaf

        launch_kernel(
            hopper_leaf.leaf_backward_kernel,
            (table.num_leaves * inputs.heads,),
            **arguments,
            D=dim,
            **hopper_leaf.backward_options(),
        )
    elif inputs.leaves == "hopper":
        from path_attention.ops.kernels.hopper import leaf_group

        assert d_out is not None
        launch_kernel(
            leaf_group.leaf_backward_group_kernel,
            (table.num_leaves * inputs.heads,),
            **arguments,
            GROUP=inputs.group,
            D=dim,
            **leaf_group.backward_options(dim),
        )
    else:
        launch_kernel(
            leaf_backward_kernel,
            (table.num_leaves * inputs.heads,),
            **arguments,
            **inputs.value_options,
            **inputs.options(wide=True),
        )
