"""Processes that talk through gloo, on this machine."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

RANKS = 4

with_processes = pytest.mark.skipif(not dist.is_gloo_available(), reason="this build of torch has no gloo")


def _enter(rank: int, work: Callable[[int], None], meet: str) -> None:
    torch.set_num_threads(1)
    # Every buffer of torch.empty starts as NaN: what no process has written cannot pass for a number.
    torch.use_deterministic_algorithms(True)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=RANKS)
    try:
        work(rank)
    finally:
        dist.destroy_process_group()


def in_processes(work: Callable[[int], None], folder: Path) -> None:
    """``work(rank)`` in each of RANKS processes; what one of them raises is raised here."""
    torch.multiprocessing.spawn(_enter, args=(work, str(folder / "meet")), nprocs=RANKS)
