"""The kernel of a token's transitions and gates, in Triton's interpreter: it equals the layer's own operators."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor

from path_attention.layers import PaTHAttention
from path_attention.layers.short_convolution import ConvolutionState

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs Triton's interpreter: on a GPU, test_cache_cuda.py runs the kernel", allow_module_level=True)

from path_attention.layers import short_convolution

BATCH, WINDOW, EARLIER = 2, 7, 9


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize(
    "options",
    [{"conv_size": 3}, {"conv_size": 1, "num_reflections": 2}, {"conv_size": 4, "w_rank": None}],
    ids=str,
)
@torch.no_grad()
def test_one_more_token(options: dict[str, int], gate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """After more tokens than the ring holds; head_dim 12 is no power of two, and one input is 0."""
    torch.manual_seed(0)
    layer = PaTHAttention(36, 3, use_forget_gate=gate, **options)
    x = torch.randn(BATCH, EARLIER + 2, 36)
    x[1, -1] = 0
    found = []
    for devices in (frozenset(), {"cpu"}):
        monkeypatch.setattr(short_convolution, "KERNEL_DEVICES", devices)
        assert layer.w_conv is not None
        state = ConvolutionState(BATCH, layer.w_conv.weight.shape[0], WINDOW, x)
        outs = []
        for start, end in ((0, EARLIER), (EARLIER, EARLIER + 1), (EARLIER + 1, EARLIER + 2)):
            outs.append(layer.project(x[:, start:end], convolution=state))
            state.length = state.length + end - start
            state.take_in()
        found.append((outs, state.rows))
    (expected, rows), (got, own) = found
    torch.testing.assert_close(own, rows)
    for a, b in zip(got, expected, strict=True):
        for y, z in zip(a[3:], b[3:], strict=True):
            assert (y is None) == (z is None)
            if y is not None:
                torch.testing.assert_close(y, z)


@torch.no_grad()
def test_a_shared_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under tensor parallelism the weight is a DTensor, whose memory a kernel cannot read."""
    monkeypatch.setattr(short_convolution, "KERNEL_DEVICES", {"cpu"})
    torch.manual_seed(0)
    layer, x = PaTHAttention(16, 2), torch.randn(1, 1, 16)
    assert layer.w_conv is not None

    def w() -> torch.Tensor:
        return layer.project(x, convolution=ConvolutionState(1, 16, 4, x)).w

    expected = w()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        layer.w_conv.weight = torch.nn.Parameter(distribute_tensor(layer.w_conv.weight.detach(), mesh, [Shard(0)]))
        assert torch.equal(w(), expected)
    finally:
        dist.destroy_process_group()
