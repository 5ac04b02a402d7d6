"""A split sequence whose pairs of pieces and rows at edges go by the kernels for Hopper, in gluon_emulator.py: output
and gradients are those of the definition.
"""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs Triton's interpreter: on a GPU, test_distributed.py runs the operator", allow_module_level=True)

from path_attention.distributed import ContextParallel, pair_attention
from path_attention.distributed.pairs import Call
from tests.distributed.processes import in_processes, with_processes
from tests.distributed.test_attention import split
from tests.ops.inputs import Shape, make_inputs, oracle
from tests.ops.kernels.gluon_emulator import emulated_gluon
from tests.ops.test_precision import errors

# Four pieces of two leaves each: the last has ways of every length. The second document begins in the second piece, and
# what of it is keys there is no whole tile: those pairs are torch's.
# Less than rounding the results to bfloat16 would cost, as tests/ops/kernels/test_hopper.py wants.
TOLERANCE = 1.7e-3
CASES = [
    (Shape(512, 1, 1, 1, 64, 64), False, None),
    (Shape(512, 1, 2, 1, 64, 64), True, None),
    (Shape(512, 1, 1, 1, 64, 64), True, (0, 190, 512)),
]


def work(rank: int) -> None:
    context = ContextParallel(dist.group.WORLD, "contiguous")
    for shape, gated, ends in CASES:
        inputs = make_inputs(shape, gated=gated, dtype=torch.float16, side_dtype=torch.float32)
        cu_seqlens = None if ends is None else torch.tensor(ends)
        with (
            pytest.MonkeyPatch.context() as monkeypatch,
            emulated_gluon("path_attention.ops.kernels.hopper") as modules,
        ):
            for method in ("_has_kernels", "_has_hopper"):
                monkeypatch.setattr(Call, method, lambda self, q, w: True)
            monkeypatch.setattr(Call, "wants_hopper", True)
            monkeypatch.setattr(pair_attention, "_has_hopper", lambda visitor: True)
            # Else their gradients, which are added up in no fixed order, would not be asked for.
            monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
            found = split(context, inputs, cu_seqlens=cu_seqlens)
            pairs = rank if ends is None else (0, 1, 0, 1)[rank]
            assert modules["pair_kernels"].pair_forward_kernel.launches == pairs
            assert modules["pair_kernels"].pair_backward_kernel.launches == pairs
            one_head = shape.query_heads == shape.heads
            # Rows at the edges are made again in the backward pass, and again on the way back through them.
            assert modules["leaf"].leaf_forward_kernel.launches == 3 * one_head
            assert modules["leaf"].leaf_backward_kernel.launches == one_head
            options = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}
        for name, error in errors(found, oracle(inputs, **options)).items():
            assert error <= TOLERANCE, (name, error, shape, gated, ends)


@pytest.mark.slow  # four processes each import torch
@with_processes
def test_pairs_and_edges_for_hopper(tmp_path: Path) -> None:
    in_processes(work, tmp_path)
