"""Launchers of a cache's step (attend_kernel, append_kernel, fold_kernel), of long calls and of the fold of prompts.

Grids depend on shapes and on the number of multiprocessors only, so that a captured step is right for all lengths.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from path_attention.ops.history.state import FOLD, PAGE, SHORT, State, Tokens
from path_attention.ops.kernels.append_kernels import append_kernel, fold_kernel, join_kernel
from path_attention.ops.kernels.decode_kernels import attend_kernel
from path_attention.ops.kernels.fold_kernels import fold_chain_kernel, fold_leaf_kernel
from path_attention.ops.kernels.launch import launch_kernel, multiprocessors, next_power_of_2
from path_attention.ops.kernels.leaf_table import token_heads
from path_attention.ops.kernels.linear import Spans
from path_attention.ops.kernels.prefill_kernels import prefill_keys_kernel, prefill_products_kernel

_HALF = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: None}


class FoldLaunch(NamedTuple):
    """How the kernels that fold a prompt are launched."""

    leaf_warps: int
    leaf_registers: int | None
    chain_warps: int
    stages: int


# First numbers of the compute capabilities of Hopper and of what has its instructions and as much shared memory.
HOPPER = (9, 10)
# Narrowest tile of a matrix unit.
MIN_BLOCK = 16
# Multiprocessors that interpreted kernels are launched for.
INTERPRETED = 1
# Of the kernels that fold a prompt, by the widest row: warps and registers a thread at most of fold_leaf_kernel, warps
# and stages of the loop over pages of fold_chain_kernel.
FOLD_LAUNCHES: dict[int, FoldLaunch] = {
    64: FoldLaunch(leaf_warps=4, leaf_registers=168, chain_warps=4, stages=3),
    128: FoldLaunch(leaf_warps=4, leaf_registers=None, chain_warps=8, stages=2),
}
# Bytes that lie between these two kernels at most, but for a chain a multiprocessor.
FOLD_BYTES = 2**28
# Numbers of partial results of a long call's queries that are held at once: 256 MB.
PARTIAL = 2**26
# Numbers of a tile of the open chunk's product that a fold moves, 16 a thread.
COLUMNS_TILE = 2048
# What no sequence reaches, where memory grows.
UNBOUNDED = 2**31 - 1


@dataclass(frozen=True)
class Launch:
    """How attend_kernel is launched."""

    num_warps: int
    stages: int  # of the loop over pages: one for the entry of the table, one to work on, the others on their way
    registers: int | None  # a thread at most; what a program does before its loop needs more, and may spill
    programs: int  # a multiprocessor, that histories are cut into pieces for: as many as run at once
    hop_stages: int  # of the loop over the matrices that a query passes


# By the widest row. Warps and stages were the fastest of ten launches on an H200, over the shapes of `path-attention
# benchmark decode` (benchmarks/cuda_decode.py --only tune); programs are what registers and memory have room for.
# Twice as many programs as run at once were slower on an H100, by 4 % to 22 %: each moves its queries first. With 7
# stages fewer of them fit, and a second round began. Stages of hops, with which two matrices of 64 columns, or one of
# 128, take no more memory than pages do: on an H200 two or more are alike to 2 %, one is 4 % slower at 131,072 tokens
# (results/h200_decode_launches.json).
LAUNCHES = {
    64: Launch(num_warps=2, stages=5, registers=None, programs=4, hop_stages=5),
    128: Launch(num_warps=4, stages=5, registers=None, programs=2, hop_stages=3),
    256: Launch(num_warps=8, stages=3, registers=None, programs=1, hop_stages=1),
}


@dataclass(frozen=True)
class StepFold:
    """How fold_kernel is launched."""

    num_warps: int
    registers: int | None  # a thread at most
    programs: int  # a multiprocessor: as many as run at once
    keys: int  # a tile
    stages: int  # of the loop over these


# By the widest row. Tiles of 64 keys leave the reflections in shared memory, where matrix units read them; those of
# fewer keys take them from registers, and all of these spill.
STEP_FOLDS = {
    64: StepFold(num_warps=4, registers=168, programs=3, keys=64, stages=5),
    128: StepFold(num_warps=4, registers=None, programs=2, keys=64, stages=4),
    256: StepFold(num_warps=8, registers=None, programs=1, keys=16, stages=1),
}
# Many query rows, as of long calls: tiles of MAX_ROWS have matrix units to keep busy, not memory. They do not fit
# beside wider rows, or those of float32, which are read for their digits and not for speed.
LAUNCH_ROWS = Launch(num_warps=8, stages=3, registers=None, programs=4, hop_stages=1)
MAX_ROWS, MAX_ROWS_WIDTH = 64, 128
FLOAT32_STAGES = 2


def _launch(state: State, rows: int) -> tuple[int, Launch]:
    """Rows of a tile, and the launch, for so many query rows of a head."""
    wide = max(_block(state.k.shape[3]), _block(state.v.shape[3]))
    is_many = state.coded and wide <= MAX_ROWS_WIDTH
    block_rows = min(MAX_ROWS if is_many else MIN_BLOCK, _block(rows))
    launch = next(launch for width, launch in LAUNCHES.items() if wide <= width)
    if block_rows == MAX_ROWS:
        launch = LAUNCH_ROWS
    return block_rows, launch if state.coded else replace(launch, stages=FLOAT32_STAGES)


@cache
def _is_hopper(device: torch.device) -> bool:
    """Has kernels launched before the one ahead of them has ended, and 227 KB of shared memory."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in HOPPER


def _block(dim: int) -> int:
    return max(MIN_BLOCK, next_power_of_2(dim))


STEP_OPTIONS = "GROUP R D DV C ROOM BLOCK_D BLOCK_DV BLOCK_B CODED GATED"


def _options(state: State, query_heads: int, names: str) -> dict[str, object]:
    """Compile-time arguments by name."""
    heads, dim, value_dim = state.k.shape[1], state.k.shape[3], state.v.shape[3]
    known = {
        "GROUP": query_heads // heads,
        "R": state.reflections,
        "D": dim,
        "DV": value_dim,
        "C": state.chunk,
        "ROOM": state.room,
        "BLOCK_D": _block(dim),
        "BLOCK_DV": _block(value_dim),
        "BLOCK_B": _block(len(state.length)),
        "CODED": state.coded,
        "GATED": state.gated,
    }
    return {name: known[name] for name in names.split()}


@cache
def _pointers(names: str) -> tuple[tuple[str, str], ...]:
    return tuple((f"p_{name}", name) for name in names.split())


def _fields(state: State, names: str) -> dict[str, Tensor]:
    """Arguments by name, for pointers."""
    return {argument: getattr(state, name) for argument, name in _pointers(names)}


def _codes(state: State) -> Tensor:
    return state.keys.view(torch.int16) if state.coded else state.keys


_ATTENDED = (
    "keys key_scale values gates products gate_totals pages chunks length folded covered suffix suffix_gate product "
    "gate_total scale k v w beta g"
)
_FOLDED = "keys key_scale values gates products gate_totals pages chunks product gate_total scale k v w beta g"


def _attend(
    state: State,
    q: Tensor,
    query_heads: int,
    count: int,
    new: dict[str, Tensor | None],
    before: Tensor | None,
    scale: float,
    capacity: int,
    *,
    moved: bool,
) -> tuple[Tensor, Tensor, int]:
    """out and log_sum_exp of all pieces, (H, pieces, rows, DV) and (H, pieces, rows), and the pieces asked for."""
    batch, heads, _, dim = state.k.shape
    value_dim = state.v.shape[3]
    rows = count * query_heads // heads
    block_rows, launch = _launch(state, rows)
    tiles = triton.cdiv(rows, block_rows)
    items = max(1, launch.programs * multiprocessors(state.k.device, INTERPRETED) // (heads * tiles))
    pieces = items + batch
    out = torch.empty(heads, pieces, rows, value_dim, dtype=torch.float32, device=q.device)
    log_sum_exp = torch.empty(heads, pieces, rows, dtype=torch.float32, device=q.device)
    launch_kernel(
        attend_kernel,
        (pieces * heads * tiles,),
        p_q=q,
        **new,
        **_fields(state, _ATTENDED),
        p_codes=_codes(state),
        p_before=before,
        p_out=out,
        p_log_sum_exp=log_sum_exp,
        scale=scale,
        capacity=capacity,
        B=batch,
        H=heads,
        s_new=count,
        s_items=items,
        s_slots=state.keys.shape[1],
        s_page_columns=state.pages.shape[1],
        s_chunk_columns=state.chunks.shape[1],
        s_groups=state.suffix.shape[1],
        ROWS=block_rows,
        MOVED=moved,
        # A moved query counts for one step: 16 bits are eight more than bfloat16 has.
        HALF=_HALF[state.k.dtype],
        STAGES=launch.stages,
        WIDTH=min(64, _block(dim)),
        STEPS=_block(state.reflections),
        HOP_STAGES=launch.hop_stages,
        OVERLAPS=not moved and _is_hopper(q.device),
        **_options(state, query_heads, STEP_OPTIONS),
        num_warps=launch.num_warps,
        maxnreg=launch.registers,
        num_stages=1,
    )
    return out, log_sum_exp, items


def step(
    state: State,
    tokens: Tokens,
    bounds: Tensor | None,
    longest: int,
    keep: int,
    *,
    capacity: int | None = None,
    fold_due: bool = True,
) -> Tensor:
    """Add at most SHORT tokens to every sequence and attend: (b, T, HQ, DV), the shape of q with value_dim.

    Args:
        tokens: (B, T, ...), or packed into one row (1, tokens, ...) by ``bounds``.
        bounds: (B + 1,) int32 on the device, or None.
        longest: most tokens of a sequence.
        keep: tokens that stay open.
        capacity: tokens a sequence at most. One that has no room for its new tokens stays as it is, its results are
            NaN, and it is marked in State.full.
        fold_due: False if the caller knows that no sequence folds.
    """
    assert longest <= SHORT
    q, query_heads = tokens.q.contiguous(), tokens.q.shape[2]
    batch, heads = state.k.shape[:2]
    new: dict[str, Tensor | None] = {
        "p_new_k": tokens.k.contiguous(),
        "p_new_v": tokens.v.contiguous(),
        "p_new_w": tokens.w.contiguous(),
        "p_new_beta": tokens.beta.contiguous(),
        "p_new_g": None if tokens.g is None else tokens.g.contiguous(),
        "p_bounds": bounds,
    }
    before = torch.empty(2, batch, dtype=torch.int32, device=q.device)
    capacity = UNBOUNDED if capacity is None else capacity
    found = _attend(state, q, query_heads, longest, new, before, tokens.scale, capacity, moved=False)
    result = torch.empty(*q.shape[:3], state.v.shape[3], dtype=q.dtype, device=q.device)
    count = q.shape[0] * q.shape[1]
    launch_kernel(
        append_kernel,
        (count * query_heads + batch,),
        p_out=found[0],
        p_log_sum_exp=found[1],
        p_before=before,
        p_result=result,
        p_full=state.full,
        p_bounds=bounds,
        **_fields(state, "length folded"),
        keep=keep,
        capacity=capacity,
        B=batch,
        H=heads,
        s_new=longest,
        s_items=found[2],
        s_queries=count * query_heads,
        OVERLAPS=_is_hopper(q.device),
        **_options(state, query_heads, "GROUP DV BLOCK_DV BLOCK_B"),
        num_warps=4,
        num_stages=1,
        **({"launch_pdl": True} if _is_hopper(q.device) else {}),
    )
    if fold_due:
        _fold(state, before, bounds, longest, keep, capacity, query_heads)
    return result


def _fold(
    state: State, before: Tensor, bounds: Tensor | None, longest: int, keep: int, capacity: int, query_heads: int
) -> None:
    """Fold the oldest open tokens of all sequences where it is time."""
    batch, heads = state.k.shape[:2]
    device = state.k.device
    wide = max(_block(state.k.shape[3]), _block(state.v.shape[3]))
    launch = next(launch for width, launch in STEP_FOLDS.items() if wide <= width)
    if not state.coded:
        launch = replace(launch, keys=MIN_BLOCK)  # products in float32 take registers for every key
    workers = min(batch * heads * state.chunk // PAGE, launch.programs * multiprocessors(device, INTERPRETED))
    launch_kernel(
        fold_kernel,
        (workers,),
        p_before=before,
        p_bounds=bounds,
        **_fields(state, _FOLDED),
        p_codes=_codes(state),
        s_workers=workers,
        keep=keep,
        capacity=capacity,
        B=batch,
        H=heads,
        s_new=longest,
        s_slots=state.keys.shape[1],
        s_page_columns=state.pages.shape[1],
        s_chunk_columns=state.chunks.shape[1],
        KEYS=launch.keys,
        COLUMNS=min(_block(state.k.shape[3]), COLUMNS_TILE // _block(state.k.shape[3])),
        STEPS=_block(FOLD * state.reflections),
        STAGES=launch.stages if state.coded and _is_hopper(device) else 1,
        **_options(state, query_heads, STEP_OPTIONS),
        num_warps=launch.num_warps,
        maxnreg=launch.registers,
        num_stages=1,
    )


def attend_history(state: State, x: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    """out (B, HQ, T, DV) and log_sum_exp (B, HQ, T), float32, of attention to the folded tokens.

    x (B, H, T * G, D) float32: queries at the fold's edge, times scale; gate (B, H, T * G): the sum of g from there to
    each. Row t * G + n is token t of the head's query head n.
    """
    batch, heads, rows, _ = x.shape
    group = state.g.shape[1] // heads if state.gated else 1
    size = max(1, PARTIAL // (heads * group * state.v.shape[3] * (2 * batch + LAUNCH_ROWS.programs))) * group
    gates = [None] * (-(-rows // size)) if gate is None else gate.split(size, 2)
    found = [_attend_rows(state, part, g, group) for part, g in zip(x.split(size, 2), gates, strict=True)]
    return torch.cat([out for out, _ in found], 2), torch.cat([lse for _, lse in found], 2)


def _attend_rows(state: State, x: Tensor, gate: Tensor | None, group: int) -> tuple[Tensor, Tensor]:
    batch, heads, rows, _ = x.shape
    query_heads, count = heads * group, rows // group
    x = x.contiguous()
    empty: dict[str, Tensor | None] = {f"p_new_{name}": x for name in ("k", "v", "w", "beta")}
    empty |= {"p_new_g": None if gate is None else gate.contiguous(), "p_bounds": None}
    out, lse, items = _attend(state, x, query_heads, count, empty, None, 1.0, UNBOUNDED, moved=True)
    result = torch.empty(batch, query_heads, count, state.v.shape[3], dtype=torch.float32, device=x.device)
    result_lse = torch.empty(batch, query_heads, count, dtype=torch.float32, device=x.device)
    launch_kernel(
        join_kernel,
        (result_lse.numel(),),
        p_out=out,
        p_log_sum_exp=lse,
        p_result=result,
        p_result_lse=result_lse,
        p_folded=state.folded,
        B=batch,
        H=heads,
        s_new=count,
        s_items=items,
        GROUP=group,
        DV=state.v.shape[3],
        BLOCK_DV=_block(state.v.shape[3]),
        BLOCK_B=_block(batch),
        num_warps=4,
    )
    return result, result_lse


class FoldedLeaves(NamedTuple):
    """What fold_leaf_kernel makes of n leaves, beside what it writes to the cache."""

    right: Tensor  # (2, n, PAGE, BLOCK_D) float16: keys at the leaf's right edge over their units, and the rest
    unit: Tensor  # (n, PAGE) float32
    matrix: Tensor  # (2, n, BLOCK_D, BLOCK_D) float16: P, and the rest

    @classmethod
    def empty(cls, state: State, leaves: int) -> "FoldedLeaves":
        block, device = _block(state.k.shape[3]), state.k.device
        return cls(
            right=torch.empty(2, leaves, PAGE, block, dtype=torch.float16, device=device),
            unit=torch.empty(leaves, PAGE, dtype=torch.float32, device=device),
            matrix=torch.empty(2, leaves, block, block, dtype=torch.float16, device=device),
        )

    @property
    def arguments(self) -> dict[str, object]:
        return {"p_right": self.right, "p_unit": self.unit, "p_matrix": self.matrix}


def _fold_launch(state: State) -> FoldLaunch:
    wide = max(_block(state.k.shape[3]), _block(state.v.shape[3]))
    return next(launch for width, launch in FOLD_LAUNCHES.items() if wide <= width)


class _Rows(NamedTuple):
    """Tokens as the kernels that fold take them, contiguous."""

    k: Tensor  # (b, n, H, D)
    v: Tensor  # (b, n, H, DV)
    w: Tensor  # (b, n, 1, H, D)
    beta: Tensor  # (b, n, 1, H)

    @classmethod
    def of(cls, tokens: Tokens, first: int, end: int) -> "_Rows":
        """Tokens first ... end - 1 of each sequence."""
        return cls(*(x[:, first:end].contiguous() for x in (tokens.k, tokens.v, tokens.w, tokens.beta)))


def _fold_leaves(state: State, rows: _Rows, common: dict[str, object], first: int, chains: int, chunk: int) -> None:
    """fold_leaf_kernel of ``chains`` chunks of so many tokens and heads, from chain ``first`` on."""
    heads, launch = rows.k.shape[2], _fold_launch(state)
    launch_kernel(
        fold_leaf_kernel,
        (chains * chunk // PAGE,),
        p_k=rows.k,
        p_v=rows.v,
        p_w=rows.w,
        p_beta=rows.beta,
        **_fields(state, "key_scale values pages scale"),
        **common,
        s_tokens=rows.k.shape[1],
        s_first=first,
        s_chains=chains,
        **{**_options(state, heads, "D DV BLOCK_D BLOCK_DV"), "C": chunk},
        num_warps=launch.leaf_warps,
        maxnreg=launch.leaf_registers,
        num_stages=1,
    )


def fold_tokens(state: State, rows: Tensor | None, folded: int, due: int, tokens: Tokens) -> None:
    """Fold the first ``due`` of tokens (b, T, ...) that come behind the ``folded`` ones of sequences ``rows``, but for
    their gates. One reflection a token, keys in half precision.
    """
    new = _Rows.of(tokens, 0, tokens.k.shape[1])  # a part of them would be a copy
    batch, _, heads, dim = new.k.shape
    pages, block, launch = state.chunk // PAGE, _block(dim), _fold_launch(state)
    segments = (folded + due - 1) // state.chunk - folded // state.chunk + 1
    chains = batch * heads * segments
    size = max(multiprocessors(state.k.device, INTERPRETED), FOLD_BYTES // (pages * 4 * block * (block + PAGE)))
    size = min(chains, size)
    leaves = FoldedLeaves.empty(state, size * pages)
    common: dict[str, object] = {
        "p_rows": None if rows is None else rows.to(torch.int32),
        "p_codes": _codes(state),
        **leaves.arguments,
        "s_folded": folded,
        "s_due": due,
        "s_segments": segments,
        "H": heads,
        "s_slots": state.keys.shape[1],
        "s_page_columns": state.pages.shape[1],
        "HALF": tl.float16,
    }
    for first in range(0, chains, size):
        part = min(size, chains - first)
        _fold_leaves(state, new, common, first, part, state.chunk)
        launch_kernel(
            fold_chain_kernel,
            (part,),
            **_fields(state, "keys key_scale products pages chunks product scale"),
            **common,
            s_first=first,
            s_chains=part,
            s_chunk_columns=state.chunks.shape[1],
            STAGES=launch.stages if _is_hopper(state.k.device) else 1,
            **_options(state, heads, "D C BLOCK_D"),
            num_warps=launch.chain_warps,
            num_stages=1,
        )


def fold_tail(state: State, due: int, tokens: Tokens) -> FoldedLeaves:
    """Of the first ``due`` of tokens (B, T, ...), the first of all sequences, those behind the last whole page: their
    values go to the cache, what else :func:`fold_spans` needs is returned, a leaf for each sequence and head.
    """
    batch, _, heads, _ = tokens.k.shape
    tail, missing = FoldedLeaves.empty(state, batch * heads), due % PAGE
    if missing:
        common: dict[str, object] = {
            "p_rows": None,
            "p_codes": _codes(state),
            **tail.arguments,
            "s_folded": due - missing,
            "s_due": missing,
            "s_segments": 1,
            "H": heads,
            "s_slots": state.keys.shape[1],
            "s_page_columns": state.pages.shape[1],
            "HALF": tl.float16,
        }
        _fold_leaves(state, _Rows.of(tokens, due - missing, due), common, 0, batch * heads, PAGE)
    return tail


def fold_spans(
    state: State, due: int, tail: FoldedLeaves, spans: Spans, v: Tensor, leaves: int, sequence: int, head: int
) -> None:
    """Fold the first ``due`` tokens of some sequences and key heads, which are not all of theirs, but for their gates.

    Args:
        tail: from :func:`fold_tail`, of all sequences and heads.
        spans: what the operator made of the sequences, which it has in equally many leaves each.
        v: their values (tokens, H, DV), perhaps padded with more columns, or some heads of a tensor with more of them.
        leaves: of a sequence.
        sequence: the first one, and the first key head, in the state.
    """
    heads, dim = spans.k_right.shape[2:]
    batch, launch = spans.k_right.shape[0] // leaves, _fold_launch(state)
    common: dict[str, object] = {
        "p_node": spans.nodes,
        "p_node_rest": spans.node_rest,
        "p_tail_matrix": tail.matrix,
        "s_leaves": leaves,
        "s_due": due,
        "s_sequences": len(state.length),
        "i_first": sequence,
        "i_first_head": head,
        "H": heads,
        "s_heads": state.k.shape[1],
        "DIM": dim,
        "num_stages": 1,
    }
    pages, segments = triton.cdiv(due, PAGE), triton.cdiv(due, state.chunk)
    launch_kernel(
        prefill_keys_kernel,
        (batch * pages * heads,),
        p_k_right=spans.k_right,
        p_v=v,
        p_tail=tail.right,
        p_tail_unit=tail.unit,
        **_fields(state, "keys key_scale values pages scale"),
        p_codes=_codes(state),
        **common,
        token_heads=token_heads(v),
        s_tokens=v.shape[0] // batch,
        s_pages=pages,
        s_slots=state.keys.shape[1],
        s_page_columns=state.pages.shape[1],
        **_options(state, heads, "D DV C BLOCK_D BLOCK_DV"),
        DIM_V=v.shape[2],
        # As the operator's leaves have it: bfloat16 rows meet matrices rounded once, float16 rows 22 bits of them.
        SPLIT=state.k.dtype == torch.float16,
        num_warps=4,
    )
    launch_kernel(
        prefill_products_kernel,
        (batch * segments * heads,),
        **_fields(state, "products chunks product"),
        **common,
        s_segments=segments,
        s_chunk_columns=state.chunks.shape[1],
        **_options(state, heads, "D C BLOCK_D"),
        num_warps=launch.chain_warps,
    )
