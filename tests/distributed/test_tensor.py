"""Tensor parallelism, as torch.compile sees it: in a mesh of one process parameters are DTensors all the same."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from path_attention.distributed import tensor_parallel
from path_attention.models import PaTHConfig, PaTHForCausalLM

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this build of torch has no gloo")


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("tensor",))
    dist.destroy_process_group()


def test_a_shared_layer_can_be_compiled(mesh: DeviceMesh) -> None:
    shape = {"vocab_size": 16, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    model = PaTHForCausalLM(PaTHConfig(num_hidden_layers=1, use_cache=False, **shape))
    shapes = [torch.arange(12).view(2, 6), torch.arange(16).view(2, 8)]
    wanted = [model(input_ids=ids).logits for ids in shapes]
    tensor_parallel(model, mesh["tensor"])
    for layer in model.model.layers:
        layer.compile(backend="aot_eager", dynamic=False)  # as parallel.prepare compiles it
    for ids, logits in zip(shapes, wanted, strict=True):
        torch.testing.assert_close(model(input_ids=ids).logits, logits)  # the same operators
