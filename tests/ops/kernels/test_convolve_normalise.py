"""The kernels that make w: they equal the layer's own torch operators in float64, each way.

In Triton's interpreter where there is no GPU: in float32 and float16, since it gets bfloat16 wrong.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import functional as F

from path_attention.layers import PaTHAttention, ShortConvolution, path, short_convolution
from path_attention.layers.padding import token_positions

pytest.importorskip("triton")

from path_attention.ops.convolve_normalise import convolve_normalise, convolve_normalise_backward
from path_attention.ops.kernels import convolve_normalise as kernels

HAS_CUDA = torch.cuda.is_available()
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
needs_gpu = pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")
DEVICE = "cuda" if HAS_CUDA else "cpu"
LEAST = 1e-6
# Relative, of whole tensors in float32: some ten roundings of 6e-8 in a row, and in gradients some ten more before the
# difference between one and its part along w.
FORWARD_TOLERANCE, BACKWARD_TOLERANCE = 1e-6, 3e-6

# Programs of 8 tokens: three blocks of tokens, the last one not full.
CASES: dict[str, dict[str, Any]] = {
    "batch": {"batch": 2, "length": 19, "heads": 3, "dim": 16},
    # Boundaries in a block, one before its end, at it and one after it; sequences of no token, one and two.
    "packed": {"length": 26, "heads": 2, "dim": 24, "ends": [0, 0, 1, 3, 7, 7, 8, 9, 15, 16, 17, 26]},
    "packed, wide": {"length": 19, "heads": 1, "dim": 16, "width": 4, "ends": [0, 5, 6, 8, 11, 19]},
    "packed, padded columns": {"length": 9, "heads": 3, "dim": 80, "width": 2, "ends": [0, 8, 9]},
    "two blocks of heads, the second not full": {"length": 17, "heads": 9, "dim": 64},
    "epsilon": {"batch": 2, "length": 10, "heads": 2, "dim": 64, "added": 1e-6},
    "one tap": {"length": 9, "heads": 2, "dim": 8, "width": 1},
    "shorter than the convolution": {"batch": 2, "length": 2, "heads": 2, "dim": 80, "width": 4},
    "one token": {"length": 1, "heads": 1, "dim": 256},
}
cases = pytest.mark.parametrize("case", CASES)


@pytest.fixture(autouse=True)
def short_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "TOKENS", 8)


def make(
    length: int,
    heads: int,
    dim: int,
    batch: int = 1,
    width: int = 3,
    ends: list[int] | None = None,
    added: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, ...]:
    """Arguments of the operator, and a gradient of its output."""
    generator = torch.Generator().manual_seed(length)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(DEVICE)

    x, weight = normal(batch, length, heads * dim).to(dtype), normal(heads * dim, width)
    positions = None if ends is None else token_positions(torch.tensor(ends), length, x.device)
    return x, weight, positions, dim, 0.0 if added else LEAST, added, normal(batch, length, heads * dim)


def by_torch(x: Tensor, weight: Tensor, positions: Tensor | None, dim: int, least: float, added: float) -> Tensor:
    """The layer's torch operators; that it puts them together so is for the tests of the layer below."""
    positions = torch.arange(x.shape[1], device=x.device) if positions is None else positions
    convolution = ShortConvolution(*weight.shape).to(x)
    y = torch.func.functional_call(convolution, {"weight": weight}, (x, positions)).unflatten(2, (-1, dim))
    if added:
        return (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + added)).flatten(2)
    return F.normalize(y, dim=-1, eps=least).flatten(2)


def out_and_gradients(function: Any, x: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, ...]:
    *others, d_w = others
    leaves = [y.detach().clone().requires_grad_() for y in (x, weight)]
    out = function(*leaves, *others)
    return out.detach(), *torch.autograd.grad(out, leaves, d_w.to(out.dtype))


def check(arguments: tuple[Any, ...]) -> None:
    x, weight, *others = arguments
    got = out_and_gradients(convolve_normalise, *arguments)
    exact = out_and_gradients(by_torch, x.double(), weight.double(), *others)
    assert [y.dtype for y in got] == [torch.float32, x.dtype, torch.float32]
    rounding = 0.0 if x.dtype == torch.float32 else torch.finfo(x.dtype).eps / 2  # of the result
    tolerances = (FORWARD_TOLERANCE, BACKWARD_TOLERANCE + rounding, BACKWARD_TOLERANCE)
    for y, z, tolerance in zip(got, exact, tolerances, strict=True):
        assert (y.double() - z).norm() <= tolerance * z.norm()


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@cases
def test_equals_torch(case: str, dtype: torch.dtype) -> None:
    check(make(**CASES[case], dtype=dtype))


LARGE: dict[str, dict[str, Any]] = {
    "many programs": {"batch": 3, "length": 1000, "heads": 20, "dim": 64},
    "many programs, packed": {"length": 3000, "heads": 12, "dim": 128, "ends": [0, 31, 32, 33, 64, 64, 1000, 3000]},
}


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", [*CASES, *LARGE])
def test_equals_torch_on_a_gpu(case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """And gives the same bits again."""
    if case in LARGE:
        monkeypatch.undo()  # programs as they are
    arguments = make(**(CASES | LARGE)[case], dtype=dtype)
    check(arguments)
    first, second = (out_and_gradients(convolve_normalise, *arguments) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.gpu
@needs_gpu
def test_in_a_cuda_graph() -> None:
    *arguments, d_w = make(**CASES["packed"], dtype=torch.bfloat16)
    expected = out_and_gradients(convolve_normalise, *arguments, d_w)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = convolve_normalise(*arguments), *convolve_normalise_backward(d_w, *arguments)
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


@interpreted
@pytest.mark.parametrize("added", [0.0, 1e-6])
def test_vectors_without_a_direction(added: float) -> None:
    """A sequence of zeros, as padding is, gives zeros; one of numbers near them, vectors shorter than one. Gradients
    are those that torch gives: large ones, but finite.
    """
    x, *others = make(12, 2, 16, ends=[0, 5, 8, 12], added=added)
    x[:, 5:8] *= 1e-7
    x[:, 8:] = 0
    got, exact = (out_and_gradients(function, x, *others) for function in (convolve_normalise, by_torch))
    assert bool((got[0][:, 5:8].unflatten(2, (2, 16)).norm(dim=-1) < 0.9).all())
    assert not got[0][:, 8:].any()
    for y, z in zip(got, exact, strict=True):
        assert bool(torch.isfinite(y).all())
        torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-5)


@interpreted
def test_what_is_no_number_stays_none() -> None:
    x, *others = make(6, 2, 16)
    x[0, 2, 3] = float("nan")
    out = convolve_normalise(x, *others[:-1]).unflatten(2, (2, 16))
    assert bool(out[0, 2:5, 0].isnan().all())
    assert not out[0, :2].isnan().any()
    assert not out[0, :, 1].isnan().any()


@interpreted
@pytest.mark.parametrize("shape", [(1, 0, 32), (0, 5, 32)])
def test_no_tokens(shape: tuple[int, ...]) -> None:
    _, weight, *others, _ = make(1, 2, 16)
    got = out_and_gradients(convolve_normalise, torch.zeros(shape), weight, *others, torch.zeros(shape))
    assert (got[0].shape, got[1].shape) == (shape, shape)
    assert not got[2].any()


@interpreted
def test_inputs_that_are_not_contiguous() -> None:
    x, weight, *others, d_w = make(9, 2, 16, batch=2)
    views = [y.mT.contiguous().mT for y in (x, weight, d_w)]
    assert not any(y.is_contiguous() for y in views)
    got = out_and_gradients(convolve_normalise, views[0], views[1], *others, views[2])
    expected = out_and_gradients(convolve_normalise, x, weight, *others, d_w)
    assert all(torch.equal(y, z) for y, z in zip(got, expected, strict=True))


@interpreted
@pytest.mark.parametrize("ends", [None, [0, 1, 3]], ids=["", "packed"])
def test_opcheck(ends: list[int] | None) -> None:
    x, weight, *others, d_w = make(3, 1, 16, ends=ends, dtype=torch.float16)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    torch.library.opcheck(convolve_normalise, (*leaves, *others))
    torch.library.opcheck(convolve_normalise_backward, (d_w, x.detach(), weight.detach(), *others))


@interpreted
def test_a_second_derivative_is_refused() -> None:
    x, *others, _ = make(3, 1, 16)
    out = convolve_normalise(x.requires_grad_(), *others)
    (d_x,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(d_x.sum(), x)


@interpreted
def test_the_inputs_alone_are_saved() -> None:
    saved: dict[int, int] = {}
    x, weight, positions, *others, _ = make(**CASES["packed"], dtype=torch.float16)

    def pack(y: Tensor) -> Tensor:
        saved[y.untyped_storage().data_ptr()] = y.untyped_storage().nbytes()
        return y

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda y: y):
        convolve_normalise(x.requires_grad_(), weight.requires_grad_(), positions, *others)
    assert sum(saved.values()) == x.nbytes + weight.nbytes + positions.nbytes


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtype of the projection of each call that went to the kernels."""
    found: list[torch.dtype] = []

    def counted(x: Tensor, *others: Any) -> Tensor:
        found.append(x.dtype)
        return convolve_normalise(x, *others)

    monkeypatch.setattr(path, "convolve_normalise", counted)
    return found


@pytest.fixture
def kernels_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(short_convolution, "KERNEL_DEVICES", frozenset({"cpu", "cuda"}))


def layer_results(layer: PaTHAttention, hidden_states: Tensor, ends: Tensor | None) -> list[Tensor]:
    """Output and every gradient."""
    hidden_states = hidden_states.clone().requires_grad_()
    out = layer(hidden_states, cu_seqlens=ends)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
    leaves = [hidden_states, *layer.parameters()]
    return [out.detach(), *torch.autograd.grad((out.float() * weights).sum(), leaves)]


LAYERS: dict[str, dict[str, Any]] = {
    "paper": {},
    "reflections, gate": {"num_reflections": 2, "use_forget_gate": True, "num_kv_heads": 1},
    "full rank, epsilon": {"w_rank": None, "w_norm_eps": 1e-6, "conv_size": 4},
}


def by_both_ways(
    layer: PaTHAttention, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    hidden_states = torch.randn(1, 20, layer.q_proj.in_features, device=DEVICE)
    ends = torch.tensor([0, 1, 1, 10, 20]) if packed else None
    got = layer_results(layer, hidden_states, ends)
    monkeypatch.setattr(short_convolution, "KERNEL_DEVICES", frozenset())
    yield from zip(got, layer_results(layer, hidden_states, ends), strict=True)


@interpreted
@pytest.mark.usefixtures("kernels_everywhere")
@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("options", LAYERS)
def test_layer(options: str, packed: bool, calls: list[torch.dtype], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = PaTHAttention(24, 2, **LAYERS[options])
    pairs = list(by_both_ways(layer, packed, monkeypatch))
    assert calls == [torch.float32]  # and the second time none
    for x, y in pairs:
        # What differs by some 1e-7 in w went through the operator in float32 and sums over 20 tokens.
        assert (x - y).norm() <= 1e-5 * y.norm()


@interpreted
@pytest.mark.usefixtures("kernels_everywhere")
def test_layer_under_autocast(calls: list[torch.dtype], monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel takes what the projection gives, in half precision, and w stays float32."""
    torch.manual_seed(0)
    layer = PaTHAttention(24, 2)
    hidden_states = torch.randn(1, 20, 24)
    with torch.autocast("cpu", torch.float16):
        got = layer.project(hidden_states).w
        monkeypatch.setattr(short_convolution, "KERNEL_DEVICES", frozenset())
        expected = layer.project(hidden_states).w
    assert calls == [torch.float16]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0, atol=FORWARD_TOLERANCE)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("options", LAYERS)
@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
def test_layer_on_a_gpu(options: str, packed: bool, calls: list[torch.dtype], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = PaTHAttention(128, 2, **LAYERS[options]).to(DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        pairs = list(by_both_ways(layer, packed, monkeypatch))
    assert calls == [torch.bfloat16]
    for x, y in pairs:
        # Both ways round the gradient of x to bfloat16, and operands of products after it, from numbers that differ a
        # little: some fall on the other side, by one unit of the last place.
        assert (x - y).norm() <= torch.finfo(torch.bfloat16).eps * y.norm()


@interpreted
@pytest.mark.usefixtures("kernels_everywhere")
def test_what_the_kernels_do_not_take_goes_to_torch(calls: list[torch.dtype]) -> None:
    for options in ({"conv_size": 0}, {"conv_size": 5}, {"head_dim": 257}):
        PaTHAttention(8, 1, **options).project(torch.zeros(1, 3, 8))
    PaTHAttention(8, 1).double().project(torch.zeros(1, 3, 8, dtype=torch.float64))
    assert not calls


@interpreted
@pytest.mark.usefixtures("kernels_everywhere")
@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
def test_compiled_without_a_break(packed: bool, calls: list[torch.dtype]) -> None:
    torch.manual_seed(0)
    layer = PaTHAttention(24, 2)
    hidden_states = torch.randn(1, 20, 24)
    ends = torch.tensor([0, 7, 20]) if packed else None

    def w(hidden_states: Tensor, ends: Tensor | None) -> Tensor:
        return layer.project(hidden_states, ends).w

    found = []
    for function in (w, torch.compile(w, fullgraph=True, backend="aot_eager")):
        out = function(hidden_states, ends)
        found.append([out.detach(), *torch.autograd.grad(out.square().mul(out.detach()).sum(), layer.w_conv.weight)])
    assert len(calls) == 2
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y)


@interpreted
@pytest.mark.usefixtures("kernels_everywhere")
def test_a_shared_weight_has_a_shared_gradient(calls: list[torch.dtype], tmp_path: Path) -> None:
    """Under tensor parallelism the weight is a DTensor, its gradient too."""
    torch.manual_seed(0)
    layer, hidden_states = PaTHAttention(16, 2), torch.randn(1, 9, 16)
    assert layer.w_conv is not None

    def gradient() -> Tensor:
        w = layer.project(hidden_states).w
        (w * torch.linspace(-1, 1, w.numel()).view_as(w)).sum().backward()
        return layer.w_conv.weight.grad

    expected = gradient()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        shared = distribute_tensor(layer.w_conv.weight.detach(), mesh, [Shard(0)])
        layer.w_conv.weight = torch.nn.Parameter(shared)
        got = gradient()
        assert isinstance(got, DTensor)
        assert got.placements == (Shard(0),)
        torch.testing.assert_close(got.full_tensor(), expected)
        assert len(calls) == 2
    finally:
        dist.destroy_process_group()
