"""Two processes give the gradients of one: DDP and FSDP2 see an ordinary differentiable operator."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from path_attention import path_attention

RANKS = 2
BATCH, LENGTH, HEADS, DIM = 4, 70, 2, 8


class Mixer(nn.Module):
    """The smallest module whose parameters reach every input of the operator."""

    def __init__(self) -> None:
        super().__init__()
        width = HEADS * DIM
        self.rows = nn.Linear(width, 4 * width, dtype=torch.float64)
        self.scalars = nn.Linear(width, 2 * HEADS, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, w = self.rows(x).unflatten(-1, (4, HEADS, DIM)).unbind(2)
        beta, g = self.scalars(x).chunk(2, dim=-1)
        w = nn.functional.normalize(w, dim=-1)
        return path_attention(q, k, v, w, 2 * beta.sigmoid(), nn.functional.logsigmoid(g)).flatten(2)


def build() -> tuple[Mixer, Tensor]:
    torch.manual_seed(0)
    return Mixer(), torch.randn(BATCH, LENGTH, HEADS * DIM, dtype=torch.float64)


def gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Of the mean square of the output, in full on every process."""
    module(x).square().mean().backward()
    found = [p.grad for p in module.parameters() if p.grad is not None]
    return [x.full_tensor() if isinstance(x, DTensor) else x for x in found]


def work(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=RANKS)
    try:
        module, x = build()
        wanted = gradients(module, x)
        part = x.chunk(RANKS)[rank]
        module, _ = build()
        found = {"DDP": gradients(DistributedDataParallel(module), part)}
        module, _ = build()
        fully_shard(module.rows)
        fully_shard(module)
        found["FSDP2"] = gradients(module, part)
        for name, values in found.items():
            assert len(values) == len(wanted), name
            for value, exact in zip(values, wanted, strict=True):
                torch.testing.assert_close(value, exact, rtol=0, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow  # two processes each import torch
@pytest.mark.skipif(not dist.is_gloo_available(), reason="this build of torch has no gloo")
def test_gradients_of_two_processes_equal_those_of_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, args=(str(tmp_path),), nprocs=RANKS)
