"""The operator over a split sequence equals that of one process: output and every gradient, 2 and 4 processes."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from path_attention import path_attention
from path_attention.distributed import ContextParallel, pair_attention, parts, path_attention_context_parallel
from path_attention.distributed.pairs import Call
from tests.distributed.processes import RANKS, in_processes, with_processes
from tests.ops.inputs import Inputs, Shape, assert_same, make_inputs, oracle, out_and_gradients, output_gradient
from tests.ops.test_memory import LiveBytes
from tests.ops.test_precision import FLOAT32_FACTOR, HALF_FACTOR, assert_within, errors, softmax_errors


@dataclass(frozen=True)
class Case:
    shape: Shape
    gated: bool = False
    cu_seqlens: tuple[int, ...] | None = None
    beta: str = "uniform"
    closed: bool = False  # some gates shut, by more than any logit makes up for or altogether

    def inputs(self) -> Inputs:
        inputs = make_inputs(self.shape, gated=self.gated, beta=self.beta)
        if self.closed:
            with torch.no_grad():
                inputs["g"][:, 5::37], inputs["g"][:, 60:63] = -1e4, float("-inf")
        return inputs


# Lengths are multiples of 8, the pieces of four processes in layout zigzag.
CASES = {
    "one token a piece": Case(Shape(8), gated=True),
    # Pieces of 13 tokens: no leaf is full. Groups of two, and values of another width than keys.
    "grouped": Case(Shape(104, batch=2, query_heads=4, heads=2, dim=8, value_dim=12)),
    # Pieces of 70 tokens (two leaves) for four processes, of 140 (three leaves) for two.
    "several leaves, two reflections, gates": Case(
        Shape(560, query_heads=2, heads=1, dim=8, value_dim=4, reflections=2), gated=True
    ),
    "reflections": Case(Shape(208, dim=8, value_dim=8), beta="2"),
    "closed gates": Case(Shape(208, query_heads=2, heads=1, dim=8), gated=True, closed=True),
    # Boundaries on the edge of a piece (70), next to it, twice at one place; sequences of many pieces, and in one.
    "packed": Case(Shape(560, query_heads=2, heads=1, dim=8), gated=True, cu_seqlens=(0, 3, 3, 70, 71, 300, 420, 560)),
}


def split(context: ContextParallel, inputs: Inputs, **options: object) -> dict[str, torch.Tensor]:
    """As out_and_gradients of path_attention, of shards and whole again."""
    shards = {name: context.shard(x.detach()).requires_grad_() for name, x in inputs.items()}
    out = path_attention_context_parallel(**shards, group=context, **options)
    shape = (*inputs["q"].shape[:3], inputs["v"].shape[3])
    d_out = context.shard(output_gradient(torch.empty(shape, dtype=out.dtype)))
    gradients = torch.autograd.grad(out, list(shards.values()), d_out)
    whole = [context.unshard(x.detach()) for x in (out, *gradients)]
    return dict(zip(["out", *inputs], whole, strict=True))


def check_cases(context: ContextParallel) -> None:
    for name, case in CASES.items():
        inputs = case.inputs()
        cu_seqlens = None if case.cu_seqlens is None else torch.tensor(case.cu_seqlens)
        wanted = out_and_gradients(path_attention, inputs, cu_seqlens=cu_seqlens)
        got = split(context, inputs, cu_seqlens=cu_seqlens, check_inputs=not case.closed)
        try:
            assert_same(got, wanted)
        except AssertionError as error:
            raise AssertionError(f"{name}, {context.size} processes, {context.layout}: {error}") from error


def check_rounding(context: ContextParallel) -> None:
    """By the yardsticks of tests/ops/test_precision.py."""
    for dtype, gated, factor in (
        (torch.bfloat16, False, HALF_FACTOR),
        (torch.bfloat16, True, HALF_FACTOR),
        (torch.float32, True, FLOAT32_FACTOR),
    ):
        shape = Shape(208, query_heads=2, heads=1, dim=32, value_dim=32)
        inputs = make_inputs(shape, gated=gated, dtype=dtype, side_dtype=torch.float32)
        got = split(context, inputs)
        assert {name: got[name].dtype for name in inputs} == {name: x.dtype for name, x in inputs.items()}
        assert got["out"].dtype == dtype
        assert_within(errors(got, oracle(inputs)), softmax_errors(inputs), factor)
        again = split(context, inputs)
        assert all(torch.equal(got[name], again[name]) for name in got), "not the same bits twice"


def check_autocast(context: ContextParallel) -> None:
    inputs = make_inputs(Shape(16), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = split(context, inputs)
    assert got["out"].dtype == torch.bfloat16
    assert all(got[name].dtype == torch.float32 for name in inputs)


def check_balance(context: ContextParallel) -> None:
    """Two pairs of pieces at every step of the ring, whatever the process."""
    q = torch.zeros(1, 2, 1, 1)
    call = Call.of(context, q, q, q, None, None, 1.0, "auto")
    for origin in range(context.size):
        assert len(call.pairs(origin)) == (1 if origin == context.rank else 2)


def check_sharding(context: ContextParallel) -> None:
    x = torch.arange(48.0).view(2, 24).requires_grad_()
    shard = context.shard(x)
    torch.testing.assert_close(context.unshard(shard), x, rtol=0, atol=0)
    # Each process adds up all of its copy, so every number is counted once for each process.
    (gradient,) = torch.autograd.grad(context.unshard(shard).sum(), x)
    torch.testing.assert_close(context.shard(gradient), torch.full_like(shard, context.size), rtol=0, atol=0)
    tokens = torch.arange(48).view(2, 24)
    following = context.unshard(context.next_tokens(context.shard(tokens), -1))
    expected = torch.cat([tokens[:, 1:], torch.full((2, 1), -1)], dim=1)
    torch.testing.assert_close(following, expected, rtol=0, atol=0)


def check_memory(two: ContextParallel, four: ContextParallel) -> None:
    """Of a process: as the length of its shard, and no more with more processes but for their products."""

    def peak(context: ContextParallel, local_length: int) -> int:
        shape = Shape(local_length * context.size, query_heads=1, heads=1)
        inputs = {name: context.shard(x.detach()) for name, x in make_inputs(shape, gated=True).items()}
        with LiveBytes() as counter:
            leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
            path_attention_context_parallel(**leaves, group=context).sum().backward()
        return counter.peak

    # The leaf stage works on 32 leaves at a time: shards of 2048 tokens are one chunk, those of 4096 two.
    assert peak(four, 4096) < 2 * peak(four, 2048)
    assert peak(four, 2048) < 1.1 * peak(two, 2048)


def check_parts(context: ContextParallel, monkeypatch: pytest.MonkeyPatch) -> None:
    """One key head at a time: the same numbers, and less memory beside inputs and results."""
    shape = Shape(104, batch=2, query_heads=6, heads=3, dim=8, value_dim=12, reflections=2)
    inputs = make_inputs(shape, gated=True)
    wanted = out_and_gradients(path_attention, inputs)

    def peak() -> int:
        rows = {name: x.detach() for name, x in make_inputs(Shape(1024, query_heads=8, heads=8)).items()}
        with LiveBytes() as counter:
            leaves = {name: context.shard(x).requires_grad_() for name, x in rows.items()}
            path_attention_context_parallel(**leaves, group=context).sum().backward()
        return counter.peak

    at_once = peak()
    monkeypatch.setattr(parts, "PART", 1)
    assert_same(split(context, inputs), wanted)
    # A part holds an eighth of what is beside q, k, v, w, out and six gradients of the shard: that is some ten of them,
    # and all that there is beside them some thirty.
    assert peak() < 0.6 * at_once


def check_volume(context: ContextParallel, monkeypatch: pytest.MonkeyPatch) -> None:
    """What docs/distributed.md says that a process sends around the ring, in numbers of each kind."""
    batch, length, dim, value_dim, query_heads, heads = 2, 2 * context.size, 8, 12, 4, 2
    shape = Shape(length * context.size, batch, query_heads, heads, dim, value_dim)
    inputs = make_inputs(shape, gated=True, dtype=torch.bfloat16)
    sent: dict[torch.dtype, int] = {torch.bfloat16: 0, torch.float32: 0}
    send = dist.batch_isend_irecv

    def counted(operations: list[dist.P2POp]) -> list[dist.Work]:
        for operation in operations:
            if operation.op is dist.isend:
                sent[operation.tensor.dtype] += operation.tensor.numel()
        return send(operations)

    monkeypatch.setattr(dist, "batch_isend_irecv", counted)
    split(context, inputs)
    rows, n = batch * length, context.size
    keys_and_values, gates = rows * heads * (dim + value_dim), rows * query_heads
    assert sent[torch.bfloat16] == 2 * (n - 1) * keys_and_values  # forward and backward
    assert sent[torch.float32] == 2 * (n - 1) * gates + n * (keys_and_values + gates)


def check_refusals(context: ContextParallel) -> None:
    inputs = {name: x.detach() for name, x in make_inputs(Shape(2)).items()}
    odd = {name: x[:, :1] for name, x in inputs.items()}
    refused = {
        "layout: got 'rows'": lambda: ContextParallel(context.group, "rows"),  # type: ignore[arg-type]
        "layout: got 'contiguous'": lambda: ContextParallel.of(context, "contiguous"),
        "group: got 3": lambda: ContextParallel(3),
        "wanted one dimension": lambda: ContextParallel(init_device_mesh("cpu", (2, 2))),
        "q: got shape": lambda: path_attention_context_parallel(**odd, group=context),
        "x: got length 9": lambda: context.shard(torch.zeros(1, 9)),
        "x: got pieces of 1 tokens": lambda: context.before(torch.zeros(1, 2, 1), 2),
        "cu_seqlens: got": lambda: path_attention_context_parallel(
            **inputs, group=context, cu_seqlens=torch.tensor([0, 2])
        ),
        "backend: got 'triton'": lambda: path_attention_context_parallel(**inputs, group=context, backend="triton"),
    }
    for message, call in refused.items():
        with pytest.raises(ValueError, match=message):
            call()
    if context.rank == 0:  # every process has to see it, or the others would wait
        inputs = {name: x.repeat_interleave(2, dim=1) for name, x in inputs.items()}
    with pytest.raises(ValueError, match="wanted the same everywhere"):
        path_attention_context_parallel(**inputs, group=context, check_inputs=True)


def work(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))
    check_cases(ContextParallel(mesh["context"]))
    check_cases(ContextParallel(dist.group.WORLD, "contiguous"))
    check_cases(ContextParallel(dist.group.WORLD))
    everyone = ContextParallel(dist.group.WORLD)
    check_rounding(everyone)
    check_autocast(everyone)
    check_balance(everyone)
    check_sharding(everyone)
    check_memory(ContextParallel(mesh["context"]), everyone)
    with pytest.MonkeyPatch.context() as monkeypatch:
        check_parts(everyone, monkeypatch)
    with pytest.MonkeyPatch.context() as monkeypatch:
        check_volume(everyone, monkeypatch)
    check_refusals(everyone)


@pytest.mark.slow  # four processes each import torch
@with_processes
def test_split_sequence_equals_whole(tmp_path: Path) -> None:
    assert RANKS == 4
    in_processes(work, tmp_path)


@with_processes
def test_by_our_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those for gates in half precision, and those for rows at the edges of pieces, in Triton's interpreter: results
    are those of torch's kernels and of the algorithm in torch.

    Two pieces of 128 tokens are one pair. Grouped queries, a batch, values of another width. In float32, which on a GPU
    is not theirs: both round alike there but for the order of sums.
    """
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs Triton's interpreter")
    from path_attention.ops.kernels import pairs

    used = []

    def unsupported_reason(dtype: torch.dtype, *sizes: int) -> None:
        used.append(sizes)

    inputs = make_inputs(Shape(256, 2, 4, 2, 16, 32), gated=True, dtype=torch.float32)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        context = ContextParallel(dist.group.WORLD)
        by_torch = split(context, inputs)
        monkeypatch.setattr(pair_attention, "_has_kernels", lambda x: True)
        monkeypatch.setattr(pairs, "unsupported_reason", unsupported_reason)
        monkeypatch.setattr(Call, "_has_kernels", lambda self, q, w: True)
        by_kernels = split(context, inputs)
    finally:
        dist.destroy_process_group()
    assert used == [(128, 128, 16, 32, 1024)] * 2  # forward and backward
    exact = oracle(inputs)
    assert_within(errors(by_kernels, exact), errors(by_torch, exact), 2.0)


@with_processes
def test_one_process_is_a_group(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        for layout in ("zigzag", "contiguous"):
            check_cases(ContextParallel(dist.group.WORLD, layout))
    finally:
        dist.destroy_process_group()
