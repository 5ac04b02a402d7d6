"""The operator as a PyTorch operator: registration, compilation, autocast, checkpointing, layouts, what is saved."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from path_attention import path_attention, path_attention_reference, path_attention_weights, unsupported_reason
from path_attention.ops import autograd
from path_attention.ops.autograd import path_attention_backward, path_attention_forward
from tests.ops.inputs import (
    Inputs,
    Shape,
    assert_same,
    copy_inputs,
    make_inputs,
    out_and_gradients,
    output_gradient,
)

# Three leaves, the last one not full; grouped queries; DV != D. With and without what is optional.
SHAPE = Shape(130, query_heads=4, heads=2, dim=8, value_dim=12)
VARIANTS = {
    "plain": (SHAPE, False, None),
    "gate": (SHAPE, True, None),
    "reflections, packed": (Shape(130, query_heads=4, heads=2, dim=8, reflections=2), True, (0, 50, 50, 130)),
}
variants = pytest.mark.parametrize("variant", VARIANTS)


def build(variant: str, dtype: torch.dtype = torch.float32) -> tuple[Inputs, dict[str, Tensor]]:
    shape, gated, ends = VARIANTS[variant]
    options = {} if ends is None else {"cu_seqlens": torch.tensor(ends)}
    return make_inputs(shape, gated=gated, dtype=dtype), options


@variants
def test_opcheck(variant: str) -> None:
    """Schema, fake tensors, autograd registration and the dispatch under AOT, as torch.library states them."""
    inputs, options = build(variant)
    q, k, v, w, beta = (inputs[name] for name in ("q", "k", "v", "w", "beta"))
    if w.dim() == 4:
        w, beta = w.unsqueeze(2).detach().requires_grad_(True), beta.unsqueeze(2).detach().requires_grad_(True)
    arguments = (q, k, v, w, beta, inputs.get("g"), options.get("cu_seqlens"), 0.3, "auto")
    torch.library.opcheck(path_attention_forward, arguments)
    out, log_sum_exp, _ = path_attention_forward(*arguments)
    saved = [x if x is None else x.detach() for x in (out, *arguments[:6], out, log_sum_exp, arguments[6])]
    torch.library.opcheck(path_attention_backward, (*saved, 0.3, "auto"))


@variants
def test_without_kernels_nothing_is_kept(variant: str) -> None:
    inputs, options = build(variant, torch.float64)
    kept = out_and_gradients(path_attention, inputs, **options, recompute=False)
    assert_same(kept, out_and_gradients(path_attention, inputs, **options), tolerance=0.0)


def test_no_gradient_of_what_is_kept_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be zeros, as many bytes as are kept."""
    monkeypatch.setattr(autograd, "_room_to_keep", lambda *_: torch.zeros(1_000_003, dtype=torch.uint8))
    out = path_attention(**make_inputs(SHAPE), recompute=False)

    class Sizes(TorchDispatchMode):
        found: set[int] = set()  # noqa: RUF012 (one mode)

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            self.found |= {x.numel() for x in (result,) if isinstance(x, Tensor)}
            return result

    with Sizes() as sizes:
        out.sum().backward()
    assert out.numel() in sizes.found  # it sees what is made
    assert 1_000_003 not in sizes.found


def test_an_output_without_a_gradient_gives_none() -> None:
    class Ignored(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.sum()

        @staticmethod
        def backward(ctx: Any, d: Tensor) -> None:
            return None

    inputs = make_inputs(SHAPE)
    Ignored.apply(path_attention(**inputs)).backward()
    assert all(x.grad is None for x in inputs.values())


@variants
def test_compiled_equals_eager(variant: str) -> None:
    """One graph, forward and backward, the operator opaque in it."""
    inputs, options = build(variant, torch.float64)

    def function(**arguments: Tensor) -> Tensor:
        return path_attention(**{**arguments, "q": arguments["q"] * 2}) + 1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same(
        out_and_gradients(compiled, inputs, **options), out_and_gradients(function, inputs, **options), tolerance=1e-13
    )


def test_compiled_by_inductor() -> None:
    inputs, _ = build("gate")
    compiled = torch.compile(path_attention, fullgraph=True)
    assert_same(out_and_gradients(compiled, inputs), out_and_gradients(path_attention, inputs), tolerance=1e-6)


def test_compiled_for_any_length() -> None:
    """Marked dynamic, the length does not compile the function again."""
    torch._dynamo.reset()
    frames: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> object:
        frames.append(1)
        return graph

    compiled = torch.compile(path_attention, fullgraph=True, backend=backend, dynamic=True)
    for length in (70, 130, 65):
        inputs = {name: x.detach() for name, x in make_inputs(Shape(length, dim=8, value_dim=8)).items()}
        torch.testing.assert_close(compiled(**inputs), path_attention(**inputs))
    assert len(frames) == 1


@variants
def test_inputs_that_are_not_contiguous(variant: str) -> None:
    """Views of other layouts give the same result, and gradients of the views."""
    inputs, options = build(variant, torch.float64)
    views = {
        "q": inputs["q"].detach().transpose(1, 2).contiguous().transpose(1, 2),  # heads before the length
        "k": torch.cat([inputs["k"], inputs["k"]], dim=-1).detach()[..., : inputs["k"].shape[-1]],
        "v": inputs["v"].detach().flip(1).flip(1)[:, :, :1].expand_as(inputs["v"]),  # stride 0
        "w": inputs["w"].detach().mT.contiguous().mT,
        "beta": inputs["beta"].detach().repeat_interleave(2, dim=1)[:, ::2],
    }
    if "g" in inputs:
        views["g"] = inputs["g"].detach().transpose(0, 2).contiguous().transpose(0, 2)
    assert not any(x.is_contiguous() for x in views.values())
    contiguous = {name: x.contiguous() for name, x in views.items()}
    leaves = {name: x.requires_grad_(True) for name, x in views.items()}
    out = path_attention(**leaves, **options)
    d_out = output_gradient(out).transpose(1, 2).contiguous().transpose(1, 2)
    gradients = torch.autograd.grad(out, list(leaves.values()), d_out)
    assert_same(
        {"out": out, **dict(zip(leaves, gradients, strict=True))},
        out_and_gradients(path_attention, contiguous, **options),
        tolerance=1e-14,
    )


def test_gradients_of_an_expanded_output_gradient() -> None:
    """out.sum() hands the backward pass a gradient of stride 0."""
    inputs = make_inputs(SHAPE)
    out = path_attention(**inputs)
    summed = torch.autograd.grad(out.sum(), list(inputs.values()), retain_graph=True)
    written = torch.autograd.grad(out, list(inputs.values()), torch.ones_like(out))
    for x, y in zip(summed, written, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    """q, k and v go to the autocast dtype, w, beta and g stay float32; gradients come back in float32."""
    inputs = make_inputs(SHAPE, gated=True, dtype=torch.float32)
    by_hand = {name: x.to(dtype) if name in ("q", "k", "v") else x for name, x in copy_inputs(inputs).items()}
    with torch.autocast("cpu", dtype):
        out = path_attention(**inputs)
    assert out.dtype == dtype
    assert torch.equal(out, path_attention(**by_hand))
    gradients = torch.autograd.grad(out, list(inputs.values()), output_gradient(out))
    assert all(x.dtype == torch.float32 for x in gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_definition_under_autocast(dtype: torch.dtype) -> None:
    """It sees the rounded queries, keys and values that the operator computes with, and rounds nothing else."""
    inputs = make_inputs(SHAPE, gated=True, dtype=torch.float32)
    by_hand = {name: x.to(dtype) if name in ("q", "k", "v") else x for name, x in inputs.items()}
    with torch.autocast("cpu", dtype):
        out = path_attention_reference(**inputs)
        weights = path_attention_weights(**{name: x for name, x in inputs.items() if name != "v"})
        assert unsupported_reason("torch", **{**inputs, "q": inputs["q"].to(dtype)}) is None
    assert torch.equal(out, path_attention_reference(**by_hand))
    assert torch.equal(weights, path_attention_weights(**{name: x for name, x in by_hand.items() if name != "v"}))


@variants
def test_shapes_without_values(variant: str) -> None:
    """On meta, and of fake tensors, forward and backward give the shapes and dtypes that real tensors give."""
    inputs, options = build(variant)
    expected = out_and_gradients(path_attention, inputs, **options)
    leaves = {name: x.detach().to("meta").requires_grad_(True) for name, x in inputs.items()}
    out = path_attention(**leaves, **options)
    got = dict(zip(leaves, torch.autograd.grad(out.sum(), list(leaves.values())), strict=True))
    assert {name: (x.shape, x.dtype) for name, x in {"out": out, **got}.items()} == {
        name: (x.shape, x.dtype) for name, x in expected.items()
    }
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(x) for name, x in (inputs | options).items()}
        assert path_attention(**fake).shape == expected["out"].shape


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_traced_packed_rows(tracing_mode: str) -> None:
    """The graph takes other boundaries than those it was traced with."""
    inputs, options = build("reflections, packed")

    def function(inputs: Inputs, ends: Tensor) -> Tensor:
        return path_attention(**inputs, cu_seqlens=ends)

    inputs = {name: x.detach() for name, x in inputs.items()}
    graph = make_fx(function, tracing_mode=tracing_mode)(inputs, options["cu_seqlens"])
    other = torch.tensor([0, 20, 90, 130])
    assert torch.equal(graph(inputs, other), function(inputs, other))


@pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
def test_exported_for_any_width(strict: bool) -> None:
    """With scale None the exported graph scales by the width it meets."""

    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, w: Tensor, beta: Tensor) -> Tensor:
            return path_attention(q, k, v, w, beta)

    def arguments(length: int, dim: int) -> tuple[Tensor, ...]:
        return tuple(x.detach() for x in make_inputs(Shape(length, dim=dim, value_dim=dim)).values())

    length, dim = torch.export.Dim("length", min=2, max=4096), torch.export.Dim("dim", min=2, max=512)
    rows = {1: length, 3: dim}
    shapes = (rows, rows, rows, rows, {1: length})
    exported = torch.export.export(Module(), arguments(70, 8), dynamic_shapes=shapes, strict=strict)
    given = arguments(130, 12)
    assert torch.equal(exported.module()(*given), path_attention(*given))


def test_forward_mode_is_refused() -> None:
    """Never zeros for a derivative, whether inputs take part in reverse mode or not."""
    inputs = make_inputs(SHAPE)
    plain = {name: x.detach() for name, x in inputs.items()}
    for given in (inputs, plain):
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward"):
            path_attention(**{**given, "w": forward_ad.make_dual(given["w"], plain["w"])})
    with pytest.raises(NotImplementedError, match="forward"):
        torch.func.jvp(lambda v: path_attention(**{**plain, "v": v}), (plain["v"],), (plain["v"],))


def test_vmap_is_a_loop() -> None:
    inputs = {name: x.detach() for name, x in make_inputs(SHAPE).items()}
    several = torch.stack([inputs["q"], 2 * inputs["q"]])
    out = torch.func.vmap(lambda q: path_attention(**{**inputs, "q": q}))(several)
    assert torch.equal(out, torch.stack([path_attention(**{**inputs, "q": q}) for q in several]))


def test_autocast_takes_the_other_half_dtype() -> None:
    """Parameters kept in bfloat16 under float16 autocast: w, beta and g go by float32."""
    inputs = make_inputs(SHAPE, gated=True, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.float16):
        assert path_attention(**inputs).dtype == torch.float16


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
@variants
def test_activation_checkpointing(variant: str, use_reentrant: bool) -> None:
    inputs, options = build(variant, torch.float64)

    def checkpointed(**arguments: Tensor) -> Tensor:
        names = list(arguments)

        def function(*values: Tensor) -> Tensor:
            return path_attention(**dict(zip(names, values, strict=True)))

        return torch.utils.checkpoint.checkpoint(function, *arguments.values(), use_reentrant=use_reentrant)

    # A reentrant checkpoint takes part in backward() only, not in autograd.grad().
    leaves = copy_inputs(inputs)
    out = checkpointed(**leaves, **options)
    out.backward(output_gradient(out))
    got = {"out": out.detach(), **{name: x.grad for name, x in leaves.items()}}
    assert_same(got, out_and_gradients(path_attention, inputs, **options), tolerance=0.0)


def test_backward_twice_gives_the_same() -> None:
    """Nothing that is saved is written over."""
    inputs = make_inputs(SHAPE, gated=True)
    out = path_attention(**inputs)
    first, second = (
        torch.autograd.grad(out, list(inputs.values()), output_gradient(out), retain_graph=True) for _ in range(2)
    )
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)


def test_inputs_are_left_alone() -> None:
    inputs = make_inputs(SHAPE, gated=True)
    before = {name: x.detach().clone() for name, x in inputs.items()}
    out_and_gradients(path_attention, {name: x.requires_grad_(True) for name, x in inputs.items()})
    path_attention(**inputs).sum().backward()
    assert all(torch.equal(x.detach(), before[name]) for name, x in inputs.items())


def test_a_second_derivative_is_refused() -> None:
    """Differentiable once: asking for more is an error, not a wrong number."""
    inputs = make_inputs(SHAPE)
    out = path_attention(**inputs)
    (d_q,) = torch.autograd.grad(out.sum(), inputs["q"], create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(d_q.sum(), inputs["q"])


@variants
def test_saved_for_backward(variant: str) -> None:
    """The inputs, the output and the log-sum-exp; nothing else, and nothing that grows faster than the length."""
    inputs, options = build(variant, torch.bfloat16)
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = path_attention(**inputs, **options)
    log_sum_exp_bytes = 4 * out.shape[0] * out.shape[1] * out.shape[2]
    tensors = (*inputs.values(), *options.values(), out)
    assert sum(saved.values()) <= sum(x.nbytes for x in tensors) + log_sum_exp_bytes


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN."""
    deterministic, fill = (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("gated", [False, True], ids=["no gate", "gate"])
@pytest.mark.parametrize(
    "shape", [Shape(65), Shape(300, batch=2), SHAPE, Shape(1, reflections=2), Shape(64 * 3 + 1, reflections=3)], ids=str
)
def test_memory_that_was_not_written_is_never_read(shape: Shape, gated: bool) -> None:
    got = out_and_gradients(path_attention, make_inputs(shape, gated=gated, dtype=torch.float32))
    assert all(torch.isfinite(x).all() for x in got.values())


@pytest.mark.usefixtures("poisoned_memory")
def test_memory_that_was_not_written_is_never_read_when_packed() -> None:
    inputs = make_inputs(Shape(265), gated=True, dtype=torch.bfloat16)
    got = out_and_gradients(path_attention, inputs, cu_seqlens=torch.tensor([0, 65, 65, 264, 265]))
    assert all(torch.isfinite(x).all() for x in got.values())
