"""The operator on a GPU: every route a call can take there, against the torch backend in float64.

That one is held to the definition by test_path_attention.py, and is a hundred times faster than its loop over tokens.

The tolerance is derived from torch's own causal softmax attention in the same dtype on the same q, k and v: PaTH moves
its rows and rounds them once more, which costs up to 1.5 times that error in the output and, through one more product,
twice in the gradients.
"""

import os
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from path_attention import path_attention, unsupported_reason
from path_attention.benchmark.cuda_measure import peak_extra_bytes
from path_attention.ops.autograd import _warn_of_slow_engine

# torch refuses its matrix products, which leaves of several reflections and of float32 are made of, under
# use_deterministic_algorithms unless cuBLAS was told so before its first use.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

# (batch, length, query heads, key heads, head_dim): whole trees of spans, head dims with and without masks.
WHOLE_TREES = [
    (1, 64, 1, 1, 64),
    (2, 128, 2, 2, 64),
    (2, 1024, 4, 2, 128),
    (1, 1024, 4, 1, 96),
    (1, 512, 8, 1, 32),
    (1, 512, 2, 2, 16),
    (1, 4096, 2, 2, 64),
]
# What only our own kernel between siblings takes.
TRITON_ONLY = [
    {"shape": (3, 1000, 2, 2, 64)},
    {"shape": (1, 600, 4, 2, 64), "gate": True},
    {"shape": (1, 2048, 8, 1, 128), "gate": True},
    {"shape": (1, 1300, 2, 2, 128)},
    {"shape": (2, 700, 4, 2, 96), "value_dim": 64, "gate": True},
    {"shape": (1, 700, 2, 2, 80), "value_dim": 24},
    {"shape": (1, 400, 2, 1, 18), "value_dim": 22, "gate": True},
    {"shape": (1, 700, 4, 2, 64), "ends": [0, 5, 5, 300, 700]},
    {"shape": (1, 3000, 2, 2, 128), "ends": [0, 1, 1100, 1100, 1101, 2100, 3000, 3000], "gate": True},
]
# Leaves in torch's batched products: several reflections a token, rows past 128 columns, and both. Few shapes beyond
# those above, for each is ten kernels to compile.
LEAVES_IN_TORCH = [
    {"shape": (1, 600, 4, 2, 64), "reflections": 2, "gate": True},
    {"shape": (3, 1000, 2, 2, 64), "reflections": 3},
    {"shape": (1, 700, 4, 2, 64), "reflections": 2, "ends": [0, 5, 5, 300, 700]},
    {"shape": (1, 700, 4, 2, 256), "gate": True},
    {"shape": (2, 600, 4, 2, 256), "reflections": 2, "gate": True},
    {"shape": (1, 500, 2, 2, 192), "value_dim": 160, "ends": [0, 130, 500]},
]
# In float32, which has pieces of tiles in place of tiles.
FLOAT32 = [
    {"shape": (2, 1000, 4, 2, 64), "gate": True},
    {"shape": (1, 700, 4, 2, 64), "reflections": 2, "gate": True},
    {"shape": (1, 700, 2, 2, 96), "value_dim": 160, "ends": [0, 5, 5, 300, 700]},
    {"shape": (1, 700, 4, 2, 256), "gate": True},
]
# What runs in the torch backend.
TORCH_ONLY = [{"shape": (1, 300, 2, 2, 264)}, {"shape": (1, 300, 2, 2, 64), "value_dim": 272, "gate": True}]
# Errors that output and gradients may have, as multiples of softmax attention's in the same dtype. Beside bfloat16
# inputs the linear stages' operands are rounded to three more bits; beside float16 ones to as many, so that a row
# passes some four more roundings than softmax attention has, and a gradient of w some eight more, each magnified by
# the leaf's inverse where beta is near 2 (docs/numerics.md). A row meets 64 reflections in its leaf, each with an inner
# product in proportion to 1 / sqrt(D): below D = 64 what float16 rounds there is sqrt(64 / D) times as much beside it.
OUTPUT_FACTOR = {torch.bfloat16: 1.5, torch.float16: 3}
GRADIENT_FACTOR = {torch.bfloat16: 2, torch.float16: 5}
# Error in float32 as a multiple of the torch backend's: a product of three tensor-float-32 parts leaves out some 2^-22
# of itself where rounding leaves 2^-24, and matrix units cut off what a sum does not hold where others round, so that
# errors of one sign add up: twice as much again, and twice for the longer row of sums.
FLOAT32_FACTOR = 16
BETAS = {"uniform": (0.0, 2.0), "near 2": (1.9, 2.0), "2": (2.0, 2.0)}


def make(shape: tuple[int, ...], dtype: torch.dtype, beta: str = "uniform", **case: object) -> list[Tensor | None]:
    batch, length, query_heads, heads, dim = shape
    torch.manual_seed(0)
    reflections = int(case.get("reflections", 1))

    def normal(*size: int) -> Tensor:
        return torch.randn(batch, length, *size, device="cuda")

    low, high = BETAS[beta]
    w = torch.nn.functional.normalize(normal(reflections, heads, dim), dim=-1)
    strength = low + (high - low) * torch.rand(batch, length, reflections, heads, device="cuda")
    g = torch.nn.functional.logsigmoid(normal(query_heads) + 2) if case.get("gate") else None
    half = [normal(query_heads, dim), normal(heads, dim), normal(heads, int(case.get("value_dim", dim)))]
    tensors = [x.to(dtype) for x in half] + [w, strength, g]
    return [None if x is None else x.requires_grad_() for x in tensors]


def error(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y).norm() / y.norm())


def softmax_errors(inputs: list[Tensor | None], d_out: Tensor, rotate: bool = False) -> tuple[float, float]:
    """Of torch's causal attention on the same q, k, v: its output, and the worst of its gradients.

    With ``rotate`` as RoPE has it: q and k are rotated first and rounded to their dtype, which the logits do not know.
    """
    group = inputs[0].shape[2] // inputs[1].shape[2]
    given = [x.detach().repeat_interleave(1 if i == 0 else group, 2).transpose(1, 2) for i, x in enumerate(inputs[:3])]
    exact = [x.double() for x in given]
    if rotate:
        rotation = torch.linalg.qr(torch.randn(2 * [exact[0].shape[-1]], device="cuda", dtype=torch.float64)).Q
        exact = [exact[0] @ rotation, exact[1] @ rotation, exact[2]]
    half = [x.to(given[0].dtype).requires_grad_() for x in exact]
    exact = [x.requires_grad_() for x in exact]
    length = half[0].shape[2]
    out = torch.nn.functional.scaled_dot_product_attention(*half, is_causal=True)
    visible = torch.ones(length, length, dtype=torch.bool, device="cuda").tril()
    logits = (exact[0] @ exact[1].mT * exact[0].shape[-1] ** -0.5).masked_fill(~visible, float("-inf"))
    expected = logits.softmax(-1) @ exact[2]
    out.backward(d_out.transpose(1, 2))
    expected.backward(d_out.double().transpose(1, 2))
    gradients = max(error(x.grad, y.grad) for x, y in zip(half, exact, strict=True))
    return error(out.detach(), expected.detach()), gradients


def check(inputs: list[Tensor | None], cu_seqlens: Tensor | None = None, backend: str | None = None) -> None:
    exact = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    out = path_attention(*inputs, cu_seqlens=cu_seqlens, backend=backend)
    expected = path_attention(*exact, cu_seqlens=cu_seqlens, backend="torch")
    d_out = torch.randn_like(out)
    out.backward(d_out)
    expected.backward(d_out.double())
    # torch's attention between siblings takes rows in the inputs' dtype, as that of a RoPE model does.
    of_output, of_gradients = softmax_errors(inputs, d_out, rotate=backend == "sdpa")
    short = 1 if out.dtype == torch.bfloat16 else max(1, 64 / inputs[0].shape[-1]) ** 0.5
    assert error(out.detach(), expected.detach()) <= OUTPUT_FACTOR[out.dtype] * of_output
    for x, y in zip(inputs, exact, strict=True):
        if x is not None and y.grad is not None and float(y.grad.norm()) > 0:
            assert x.grad.dtype == x.dtype
            assert error(x.grad, y.grad) <= GRADIENT_FACTOR[out.dtype] * short * of_gradients


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("backend", ["triton", "sdpa"])
@pytest.mark.parametrize("shape", WHOLE_TREES, ids=str)
def test_whole_trees(shape: tuple[int, ...], backend: str, beta: str, dtype: torch.dtype) -> None:
    check(make(shape, dtype, beta), backend=backend)


def case_inputs(case: dict, dtype: torch.dtype = torch.bfloat16) -> tuple[list[Tensor | None], Tensor | None]:
    case = dict(case)
    ends = case.pop("ends", None)
    return make(case.pop("shape"), dtype, **case), None if ends is None else torch.tensor(ends)


def test_inputs_that_start_anywhere() -> None:
    """Views of larger tensors at an offset that copies of 16 bytes cannot start from."""
    inputs = make((1, 300, 2, 2, 64), torch.bfloat16)
    places = [torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")[1:] for x in inputs if x is not None]
    moved = [p.copy_(x.detach().flatten()).view(x.shape) for p, x in zip(places, inputs, strict=False)]
    check([*(x.requires_grad_() for x in moved), None])


@pytest.mark.parametrize("bounds", ["cpu", "cuda"])
@pytest.mark.parametrize("backend", ["triton", "hopper"])
@pytest.mark.parametrize("case", TRITON_ONLY, ids=str)
def test_fused_kernels_alone(case: dict, backend: str, bounds: str) -> None:
    if bounds == "cuda" and "ends" not in case:
        pytest.skip("no boundaries")
    inputs, cu_seqlens = case_inputs(case)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(bounds)
    assert unsupported_reason("triton", *inputs, cu_seqlens=cu_seqlens) is None
    assert unsupported_reason("sdpa", *inputs, cu_seqlens=cu_seqlens) is not None
    if (reason := unsupported_reason(backend, *inputs, cu_seqlens=cu_seqlens)) is not None:
        pytest.skip(reason)
    check(inputs, cu_seqlens, backend)


@pytest.mark.parametrize("backend", ["triton", "hopper"])
@pytest.mark.parametrize("case", [x for x in TRITON_ONLY if x["shape"][3] > 1], ids=str)
def test_parts_of_a_head_or_two(case: dict, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part's heads are read and written where they are, or copied where that cannot be."""
    from path_attention.ops.engines import cuda

    inputs, cu_seqlens = case_inputs(case)
    if (reason := unsupported_reason(backend, *inputs, cu_seqlens=cu_seqlens)) is not None:
        pytest.skip(reason)
    monkeypatch.setattr(cuda, "PART", -(-case["shape"][1] // 64) * case["shape"][4] // 64 + 2)
    check(inputs, cu_seqlens, backend)


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize(
    ("shape", "times"),
    [
        ((2, 8192, 32, 32, 64), 3.0),
        ((4, 4096, 24, 24, 64), 3.0),
        ((2, 8192, 16, 16, 128), 3.25),  # 3 would take three parts
        ((2, 8192, 32, 8, 64), 3.0),
        ((2, 8192, 32, 8, 128), 3.0),
    ],
    ids=str,
)
def test_memory_is_what_parts_are_cut_for(shape: tuple[int, ...], times: float, gate: bool) -> None:
    """At most so many times what softmax attention takes, and what part_sizes.py says."""
    from path_attention.ops.engines import cuda
    from path_attention.ops.engines.part_sizes import Shape

    q, k, v, w, beta, g = make(shape, torch.bfloat16, gate=gate)
    if (reason := unsupported_reason("hopper", q, k, v, w, beta, g)) is not None:
        pytest.skip(reason)
    d_out, inputs = torch.randn_like(q), [x for x in (q, k, v, w, beta, g) if x is not None]
    heads_first = [x.detach().transpose(1, 2).requires_grad_() for x in (q, k, v)]

    def path() -> tuple[Tensor, ...]:
        return torch.autograd.grad(path_attention(q, k, v, w, beta, g), inputs, d_out)

    def softmax() -> tuple[Tensor, ...]:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
            out = torch.nn.functional.scaled_dot_product_attention(
                *heads_first, is_causal=True, enable_gqa=shape[2] > shape[3]
            )
        return torch.autograd.grad(out, heads_first, d_out.transpose(1, 2))

    path(), softmax()  # what is kept from the first call on does not count
    ours, others = peak_extra_bytes(path), peak_extra_bytes(softmax)
    assert ours <= times * others
    described = Shape(*shape, w_bytes=w.element_size(), gated=gate)  # type: ignore[call-arg]
    # Numbers of tokens and matrices, which it leaves out, are a hundredth.
    assert others == pytest.approx(described.softmax_bytes(), rel=0.01)
    if described.units * shape[4] // cuda.PART_DIM <= cuda.PART:  # one part: results come after the peak
        assert ours == pytest.approx(described.out_bytes() + described.buffer_bytes(), rel=0.02)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("backend", "case"),
    [
        ("triton", {"shape": (2, 300, 4, 2, 64), "gate": True}),
        ("triton", {"shape": (1, 700, 2, 2, 80), "ends": [0, 5, 5, 300, 700]}),
        ("sdpa", {"shape": (2, 1024, 4, 2, 64)}),
        ("hopper", {"shape": (2, 1000, 4, 4, 64)}),
        ("hopper", {"shape": (2, 1000, 4, 2, 128), "gate": True}),
        ("hopper", {"shape": (1, 1500, 4, 2, 64), "gate": True, "ends": [0, 5, 5, 700, 1500]}),
    ],
    ids=str,
)
def test_what_is_kept_is_what_would_be_computed_again(case: dict, backend: str, compiled: bool) -> None:
    inputs, cu_seqlens = case_inputs(case)
    q, k, v, w, beta, g = inputs
    if (reason := unsupported_reason(backend, q, k, v, w, beta, g, cu_seqlens=cu_seqlens)) is not None:
        pytest.skip(reason)
    function = torch.compile(path_attention, fullgraph=True) if compiled else path_attention
    given = [x for x in inputs if x is not None]
    d_out = torch.randn_like(q)

    def run(**options: object) -> tuple[Tensor, ...]:
        out = function(*inputs, cu_seqlens=cu_seqlens, backend=backend, **options)
        return out.detach(), *torch.autograd.grad(out, given, d_out)

    leaves = "leaf_forward_kernel"
    assert kernel_names(run).count(leaves) == 2
    assert kernel_names(partial(run, recompute=False)).count(leaves) == 1
    for x, y in zip(run(), run(recompute=False), strict=True):
        assert error(x, y.double()) <= (0.0 if backend == "triton" else 1e-3)  # the others add up in no fixed order


def test_what_is_kept_has_a_size_for_each_length() -> None:
    """Compiled for any length, one after another: each is compiled anew, without breaks."""
    compiled = torch.compile(path_attention, fullgraph=True, dynamic=True)
    for length in (700, 900):
        inputs = make((1, length, 2, 2, 64), torch.bfloat16)
        found, expected = compiled(*inputs, recompute=False), path_attention(*inputs)
        assert torch.equal(found, expected)
        given = [x for x in inputs if x is not None]
        pairs = zip(*(torch.autograd.grad(x, given, torch.ones_like(x)) for x in (found, expected)), strict=True)
        assert all(error(x, y.double()) <= 1e-3 for x, y in pairs)


def kernel_names(function: Callable[[], object]) -> list[str]:
    """Of all launches of a call, but the first one."""
    function()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        function()
        torch.cuda.synchronize()
    return [event.name for event in found.events()]


def test_kept_by_another_backend_than_gradients_want() -> None:
    """Deterministic algorithms, asked for between the passes: the backward pass is another backend's."""
    inputs = make((1, 700, 2, 2, 64), torch.bfloat16)
    given = [x for x in inputs if x is not None]
    out = path_attention(*inputs, recompute=False)
    torch.use_deterministic_algorithms(True)
    try:
        found = torch.autograd.grad(out, given, torch.ones_like(out))
        expected = gradients(inputs, recompute=False)[1:]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(error(x, y.double()) <= 1e-2 for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", ["triton", "hopper"])
@pytest.mark.parametrize("gate", [False, True])
def test_launches_are_those_of_triton(backend: str, gate: bool) -> None:
    from path_attention.ops.kernels.launch import launched_by_triton

    inputs = make((1, 700, 4, 2, 64), torch.bfloat16, gate=gate)
    if (reason := unsupported_reason(backend, *inputs)) is not None:
        pytest.skip(reason)
    with launched_by_triton():
        expected = path_attention(*inputs, backend=backend)
    for _ in range(2):  # the first looks for what is compiled
        assert torch.equal(path_attention(*inputs, backend=backend), expected)


@pytest.mark.parametrize("beta", ["uniform", "2"])
@pytest.mark.parametrize("case", [x for x in TRITON_ONLY if x["shape"][4] in (64, 128)], ids=str)
def test_float16_on_hopper(case: dict, beta: str) -> None:
    inputs, cu_seqlens = case_inputs({**case, "beta": beta}, torch.float16)
    if (reason := unsupported_reason("hopper", *inputs, cu_seqlens=cu_seqlens)) is not None:
        pytest.skip(reason)
    check(inputs, cu_seqlens, "hopper")


@pytest.mark.parametrize("case", LEAVES_IN_TORCH, ids=str)
def test_leaves_in_torch(case: dict) -> None:
    inputs, cu_seqlens = case_inputs(case)
    check(inputs, cu_seqlens, "triton")


@pytest.mark.parametrize("backend", [None, "sdpa"])  # None: on Hopper its own kernels between siblings
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_leaves_in_torch_before_other_siblings(backend: str | None, dtype: torch.dtype) -> None:
    check(make((2, 1024, 2, 2, 64), dtype, reflections=2), backend=backend)


@pytest.mark.parametrize("beta", ["uniform", "2"])
@pytest.mark.parametrize("case", FLOAT32, ids=str)
def test_float32(case: dict, beta: str) -> None:
    inputs, cu_seqlens = case_inputs({**case, "beta": beta}, torch.float32)
    assert unsupported_reason("triton", *inputs, cu_seqlens=cu_seqlens) is None
    exact = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    expected = gradients(exact, cu_seqlens=cu_seqlens, backend="torch")
    of_torch = gradients(inputs, cu_seqlens=cu_seqlens, backend="torch")
    allowed = FLOAT32_FACTOR * max(error(x, y) for x, y in zip(of_torch, expected, strict=True))
    assert allowed < 2**-13  # a single tensor-float-32 product would not pass
    for x, y in zip(gradients(inputs, cu_seqlens=cu_seqlens), expected, strict=True):
        assert x.dtype == torch.float32
        assert error(x, y) <= allowed


def test_float32_stays_so_where_tf32_is_allowed() -> None:
    """Bit by bit: nothing is left to cuBLAS's modes."""
    inputs = make((1, 700, 4, 2, 64), torch.float32, reflections=2, gate=True)
    wanted = gradients(inputs)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert all(torch.equal(x, y) for x, y in zip(gradients(inputs), wanted, strict=True))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("case", TORCH_ONLY, ids=str)
def test_the_rest_runs_in_the_torch_backend(case: dict) -> None:
    inputs, cu_seqlens = case_inputs(case)
    reason = unsupported_reason("triton", *inputs, cu_seqlens=cu_seqlens)
    assert reason is not None
    with pytest.raises(ValueError, match="backend: got 'triton'"):
        path_attention(*inputs, backend="triton")
    _warn_of_slow_engine.cache_clear()
    with pytest.warns(UserWarning, match=r"at most 256\. The torch backend serves this call"):
        check(inputs, cu_seqlens)


def test_one_token_gives_its_value() -> None:
    inputs = make((2, 1, 4, 2, 64), torch.bfloat16, gate=True)
    out, d_q, d_k, d_v, *rest = gradients(inputs)
    assert torch.equal(out, inputs[2].repeat_interleave(2, 2))
    assert torch.equal(d_v, torch.full_like(d_v, 2))
    assert all(float(x.abs().max()) <= 1e-2 for x in (d_q, d_k, *rest))


def gradients(inputs: list[Tensor | None], **options: object) -> list[Tensor]:
    given = [x for x in inputs if x is not None]
    out = path_attention(*inputs, **options)
    return [out.detach(), *torch.autograd.grad(out, given, torch.ones_like(out))]


@pytest.mark.parametrize("backend, gate", [(None, False), ("triton", False), (None, True)])
def test_deterministic_where_asked(backend: str | None, gate: bool) -> None:
    """Bit by bit, ten runs; 64 sequences on as many heads keep every multiprocessor busy."""
    inputs = make((16, 1024, 8, 4, 64), torch.bfloat16, gate=gate)
    torch.use_deterministic_algorithms(True)
    try:
        first = gradients(inputs, backend=backend)
        for _ in range(10):
            assert all(torch.equal(x, y) for x, y in zip(first, gradients(inputs, backend=backend), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype, reflections", [(torch.float32, 1), (torch.bfloat16, 2)])
def test_leaves_in_torch_are_deterministic_where_asked(dtype: torch.dtype, reflections: int) -> None:
    inputs = make((4, 1000, 8, 4, 64), dtype, reflections=reflections, gate=True)
    torch.use_deterministic_algorithms(True)
    try:
        first = gradients(inputs)
        for _ in range(3):
            assert all(torch.equal(x, y) for x, y in zip(first, gradients(inputs), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", ["hopper", "sdpa"])
def test_no_fixed_order_is_refused_where_one_is_asked_for(backend: str) -> None:
    inputs = make((1, 1024, 2, 2, 64), torch.bfloat16)
    if (reason := unsupported_reason(backend, *inputs)) is not None:
        pytest.skip(reason)
    torch.use_deterministic_algorithms(True)
    try:
        path_attention(*inputs, backend=backend)  # in order as far as it goes
        with pytest.raises(RuntimeError, match="no fixed order"):
            gradients(inputs, backend=backend)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "case, dtype",
    [
        ({"shape": (1, 1024, 2, 2, 64)}, torch.bfloat16),
        ({"shape": (1, 1024, 2, 2, 64), "gate": True, "ends": [0, 300, 1024]}, torch.bfloat16),
        ({"shape": (1, 700, 4, 2, 64), "reflections": 2, "ends": [0, 5, 5, 300, 700]}, torch.bfloat16),
        ({"shape": (1, 700, 4, 2, 64), "gate": True}, torch.float32),
    ],
    ids=str,
)
def test_the_host_never_waits(case: dict, dtype: torch.dtype) -> None:
    inputs, cu_seqlens = case_inputs(case, dtype)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.to("cuda", torch.int32)
    gradients(inputs, cu_seqlens=cu_seqlens)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(inputs, cu_seqlens=cu_seqlens)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend, reflections", [("triton", 1), ("sdpa", 1), ("triton", 2)])
def test_cuda_graph(backend: str, reflections: int) -> None:
    """Captured once, replayed on other values; of several reflections, matrix products of torch's among the kernels."""
    inputs = make((1, 1024, 4, 2, 64), torch.bfloat16, reflections=reflections)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradients(inputs, backend=backend)  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(inputs, backend=backend)
    with torch.no_grad():
        inputs[0].mul_(0.5)
        inputs[4].mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    for x, y in zip(captured, gradients(inputs, backend=backend), strict=True):
        assert error(x, y.double()) <= 1e-2  # the order of sums may differ


def test_more_programs_than_a_grid_dimension() -> None:
    """B * H past 65535: grids are one-dimensional."""
    inputs = make((2100, 65, 32, 32, 16), torch.bfloat16)
    out = path_attention(*inputs)
    last = [None if x is None else x[-1:].detach() for x in inputs]
    expected = path_attention(*[None if x is None else x.double() for x in last], backend="torch")
    assert error(out[-1:].detach(), expected) < 4e-3


@pytest.mark.parametrize(
    "case, dtype",
    [
        *[(case, torch.bfloat16) for case in ({"shape": (1, 1024, 4, 2, 64)}, *TRITON_ONLY, *LEAVES_IN_TORCH)],
        *[(case, torch.float32) for case in FLOAT32],
    ],
    ids=str,
)
def test_nothing_unwritten_is_read(case: dict, dtype: torch.dtype) -> None:
    """Fresh memory filled with NaN leaves no trace."""
    inputs, cu_seqlens = case_inputs(case, dtype)
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        torch.utils.deterministic.fill_uninitialized_memory = True
        path_attention(*inputs, cu_seqlens=cu_seqlens).sum().backward()
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = before
        torch.use_deterministic_algorithms(False)
    assert all(bool(torch.isfinite(x.grad).all()) for x in inputs if x is not None)


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
def test_finite_at_131072_tokens_with_beta_2(backend: str) -> None:
    inputs = make((1, 131072, 1, 1, 64), torch.bfloat16, "2")
    out = path_attention(*inputs, backend=backend)
    out.sum().backward()
    assert bool(torch.isfinite(out).all())
    assert all(bool(torch.isfinite(x.grad).all()) for x in inputs if x is not None)


@pytest.mark.parametrize("gate", [False, True])
def test_compiles_without_breaks(gate: bool) -> None:
    inputs = make((1, 256, 2, 2, 64), torch.bfloat16, gate=gate)
    compiled = torch.compile(lambda *x: path_attention(*x), fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), path_attention(*inputs), rtol=0, atol=0)
