"""A sequence in two pieces on one GPU, by the kernels that pairs of pieces and their edges have there."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from path_attention import path_attention
from path_attention.distributed import ContextParallel, pair_attention, path_attention_context_parallel
from path_attention.distributed.equality import FACTOR, NAMES, arguments

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def has_hopper() -> bool:
    from path_attention.ops.engines import cuda

    x = torch.empty(0, 0, 0, 64, device="cuda", dtype=torch.float16)
    return cuda._reason_against_hopper(x, x) is None


def results(function: object, given: list[torch.Tensor], d_out: torch.Tensor, **options: object) -> list[torch.Tensor]:
    leaves = [x.clone().requires_grad_() for x in given]
    out = function(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out.to(out.dtype))]


# Documents: some of the second piece's queries meet all keys of the first; all meet whole tiles of keys; a part of one.
@pytest.mark.parametrize("ends", [None, (0, 640, 1024), (0, 128, 1024), (0, 100, 1024)], ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dim", [64, 128])
def test_two_pieces(tmp_path: Path, dim: int, gated: bool, ends: tuple[int, ...] | None) -> None:
    used = check(tmp_path, dim, gated, ends)
    if has_hopper() and ends != (0, 100, 1024):
        assert len(used) == 2
        assert all(x is not None for x in used)


def test_forward_by_cudnn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_attention, "CUDNN_KEYS", 1)
    used = check(tmp_path, 64, False, None)
    if has_hopper():
        assert len(used) == 1  # backward


def check(tmp_path: Path, dim: int, gated: bool, ends: tuple[int, ...] | None) -> list[object]:
    """Errors beside those of one piece; returns the modules that served pairs, or None, where ours were asked for."""
    device = torch.device("cuda")
    given = arguments(1024, 4, dim, torch.bfloat16, device, gated=gated)
    d_out = arguments(1024, 4, dim, torch.float32, device, gated=False, seed=1)[0].to(torch.bfloat16)
    options = {} if ends is None else {"cu_seqlens": torch.tensor(ends)}
    exact = results(path_attention, [x.double() for x in given], d_out, **options)
    alone = results(path_attention, given, d_out, **options)
    used: list[object] = []
    served = pair_attention._hopper
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(pair_attention, "_hopper", lambda *a, **b: used.append(served(*a, **b)) or used[-1])
        dist.init_process_group("nccl", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
        try:
            group = ContextParallel(dist.group.WORLD)
            found = results(path_attention_context_parallel, given, d_out, group=group, **options)
        finally:
            dist.destroy_process_group()
    floor = torch.finfo(torch.bfloat16).eps / 2
    for name, x, other, y in zip(NAMES, found, alone, exact, strict=False):
        error, yardstick = ((a.double() - y).norm() / y.norm() for a in (x, other))
        assert error <= FACTOR * max(yardstick, floor), (name, float(error), float(yardstick))
    return used
