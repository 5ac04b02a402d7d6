"""The emulator finds what it is there to find, and the kernels' own modules are back when it is done."""

import sys

import pytest
import torch

from tests.ops.kernels import gluon_emulator as emulator
from tests.ops.kernels.gluon_emulator import (
    Deadlock,
    Jitted,
    TensorDescriptor,
    emulated_gluon,
    fence_async_shared,
    mbarrier,
    tma,
    tma_reduce_add,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from tests.ops.kernels.gluon_emulator import language as gl

BYTES = 64 * 64 * 2


def barrier(count: int = 1):
    made = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(made, count=count)
    return made


def tiles(number: int):
    return gl.allocate_shared_memory(gl.float16, [number, 64, 64], None)


def zeros() -> torch.Tensor:
    return gl.full([64, 64], 0.0, gl.float32, None)


def operands(stages: int) -> tuple[TensorDescriptor, torch.Tensor]:
    x = torch.randn(stages * 64, 64).half()
    return TensorDescriptor(x, [64, 64], None), x


def sums_of_squares(t_x, p_out, steps, stages, first_phase, empty_before_wait):
    """out = sum of x_i x_i^T over the tiles of t_x: one partition fetches them, one multiplies."""
    s_x = tiles(stages)
    full, empty = ([barrier() for _ in range(stages)] for _ in range(2))

    def produce():
        for i in range(steps):
            mbarrier.wait(empty[i % stages], (i // stages & 1) ^ first_phase)
            mbarrier.expect(full[i % stages], BYTES)
            tma.async_copy_global_to_shared(t_x, [i * 64, 0], full[i % stages], s_x.index(i % stages))

    def consume():
        b_sum = zeros()
        for i in range(steps):
            mbarrier.wait(full[i % stages], i // stages & 1)
            s_tile = s_x.index(i % stages)
            t_sum = warpgroup_mma(s_tile, s_tile.permute((1, 0)), b_sum, is_async=True)
            if empty_before_wait:
                mbarrier.arrive(empty[i % stages])
                mbarrier.wait(full[(i + 1) % stages], (i + 1) // stages & 1, pred=i + 1 < steps)
            b_sum = warpgroup_mma_wait(0, (t_sum,))
            if not empty_before_wait:
                mbarrier.arrive(empty[i % stages])
        o = gl.arange(0, 64, None)
        gl.store(p_out + (o[:, None] * 64 + o[None, :]), b_sum)

    gl.warp_specialize([(produce, ()), (consume, ())], [4], [240])


def run(steps: int = 4, stages: int = 2, first_phase: int = 1, empty_before_wait: bool = False) -> float:
    t_x, x = operands(steps)
    out = torch.full((64, 64), float("nan"))
    Jitted(sums_of_squares)[(1,)](
        t_x=t_x, p_out=out, steps=steps, stages=stages, first_phase=first_phase, empty_before_wait=empty_before_wait
    )
    expected = sum(y.float() @ y.float().T for y in x.split(64))
    return float((out - expected).norm() / expected.norm())


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_a_pipeline_that_is_right(stages: int) -> None:
    assert run(stages=stages) < 1e-5  # float32 sums of 64 products in another order


def test_a_stage_that_is_released_too_early_gives_a_wrong_result() -> None:
    assert run(stages=1, empty_before_wait=True) > 0.1


def test_a_wrong_phase_is_a_deadlock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulator, "TIMEOUT", 0.2)
    with pytest.raises(Deadlock, match=r"partition [01] waits on barrier \d+\[0\] for phase [01]"):
        run(first_phase=0)


def launch(kernel, **arguments) -> None:
    Jitted(kernel)[(1,)](**arguments)


def test_more_arrivals_than_a_barrier_expects() -> None:
    def kernel():
        mbarrier.arrive(barrier(count=2), count=3)

    with pytest.raises(AssertionError, match="more arrivals"):
        launch(kernel)


def test_an_accumulator_in_flight() -> None:
    def kernel(t_x):
        s_x = tiles(1)
        full = barrier()
        mbarrier.expect(full, BYTES)
        tma.async_copy_global_to_shared(t_x, [0, 0], full, s_x.index(0))
        mbarrier.wait(full, 0)
        product = warpgroup_mma(s_x.index(0), s_x.index(0), zeros(), is_async=True)
        warpgroup_mma_wait(1, (product,))

    with pytest.raises(AssertionError, match="in flight"):
        launch(kernel, t_x=operands(1)[0])


@pytest.mark.parametrize("fenced", [True, False])
def test_a_fence_before_what_was_stored_is_read(fenced: bool) -> None:
    def kernel(t_x):
        s_x = gl.allocate_shared_memory(gl.float16, [64, 64], None)
        s_x.store(zeros().to(gl.float16) + 1)
        if fenced:
            fence_async_shared()
        tma_reduce_add(t_x, [0, 0], s_x)

    t_x, x = operands(1)
    expected = x + 1
    if fenced:
        launch(kernel, t_x=t_x)
        assert torch.equal(x, expected)
    else:
        with pytest.raises(AssertionError, match="before a fence"):
            launch(kernel, t_x=t_x)


@pytest.mark.parametrize(("warps", "met"), [(4, False), (8, True), (8, False)])
def test_warp_groups_meet_before_a_tile_is_written_that_a_product_reads(warps: int, met: bool) -> None:
    def kernel():
        s_x = gl.allocate_shared_memory(gl.float16, [64, 64], None)
        s_x.store(zeros().to(gl.float16))
        fence_async_shared()
        product = warpgroup_mma(s_x, s_x, zeros(), is_async=True)
        b_x = warpgroup_mma_wait(0, (product,))
        if met:
            gl.thread_barrier()
        s_x.store(b_x.to(gl.float16))

    if warps == 4 or met:
        launch(kernel, num_warps=warps)
    else:
        with pytest.raises(AssertionError, match="before a barrier"):
            launch(kernel, num_warps=warps)


def test_an_access_past_the_end() -> None:
    def kernel(p_x, masked):
        o = gl.arange(0, 64, None)
        gl.load(p_x + o, mask=o < 60 if masked else None, other=0.0)

    launch(kernel, p_x=torch.zeros(60), masked=True)
    with pytest.raises(AssertionError, match="past the end"):
        launch(kernel, p_x=torch.zeros(60), masked=False)


def test_shared_memory_is_not_zero_before_it_is_written() -> None:
    def kernel(p_out):
        gl.store(p_out, tiles(1).load(None).amax())

    out = torch.zeros(1)
    launch(kernel, p_out=out)
    assert out.isnan()


def test_the_real_modules_come_back() -> None:
    package = "path_attention.ops.kernels.hopper"
    with emulated_gluon(package) as modules:
        from path_attention.ops.kernels.hopper import leaf

        assert leaf is modules["leaf"]
        assert isinstance(leaf.leaf_forward_kernel, Jitted)
    assert not any(x is leaf for x in sys.modules.values())
    assert sys.modules[package] is not modules["leaf"]
