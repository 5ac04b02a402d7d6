"""The whole CUDA engine with the kernels for Hopper: those in gluon_emulator.py, the others in Triton's interpreter.

Both know float16, not bfloat16, for operands. Fresh memory is NaN throughout.
"""

import os
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs Triton's interpreter: on a GPU, test_cuda.py runs the engine", allow_module_level=True)

from path_attention import path_attention_reference
from path_attention.ops.engines import cuda, siblings
from tests.ops.kernels.gluon_emulator import emulated_gluon
from tests.ops.kernels.test_engine import errors


@pytest.fixture
def hopper() -> Iterator[dict[str, ModuleType]]:
    """The modules of kernels/hopper/ on top of the emulator."""
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    with emulated_gluon("path_attention.ops.kernels.hopper") as modules:
        yield modules
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def as_for_bfloat16(hopper: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    """float16 inputs take the way of bfloat16 ones: leaves by the kernels for Hopper, gradients of rows in 16 bits,
    weights beside nothing.
    """
    monkeypatch.setattr(hopper["dense"], "_has_exponents", lambda dtype: True)
    monkeypatch.setattr(siblings, "_row_gradient_dtype", lambda inputs: torch.float16)
    monkeypatch.setattr(cuda, "_leaves_by", lambda by, q, v, w: "hopper")


# (batch, length, query heads, key heads, dim): six leaves, an odd number with a last one of 10 tokens in a batch, fewer
# than the kernels between siblings have levels for, one more than a power of two.
CASES = {
    "whole leaves": {"shape": (1, 384, 1, 1, 64)},
    "odd number of leaves": {"shape": (2, 266, 2, 2, 64)},
    "two leaves": {"shape": (1, 100, 1, 1, 64)},
    "one more than eight": {"shape": (1, 513, 1, 1, 64)},
    "grouped": {"shape": (1, 330, 4, 2, 64)},
    "128": {"shape": (1, 330, 1, 1, 128)},
    "128, grouped": {"shape": (1, 266, 2, 1, 128)},
    # Sequences of no, five, one, seven and one leaf: last leaves that are partly empty and alone in their pair.
    "packed": {"shape": (1, 730, 1, 1, 64), "ends": [0, 0, 300, 301, 700, 730, 730]},
    "packed, grouped": {"shape": (1, 460, 2, 1, 64), "ends": [0, 130, 460]},
    "packed, group of eight": {"shape": (1, 170, 8, 1, 64), "ends": [0, 30, 170]},
    "128, group of four": {"shape": (1, 100, 4, 1, 128)},
    "packed, 128": {"shape": (1, 460, 1, 1, 128), "ends": [0, 135, 460]},
    "beta is 2": {"shape": (1, 330, 1, 1, 64), "least_beta": 2.0},
    "small gradients": {"shape": (1, 330, 1, 1, 64), "loss_scale": 2.0**-10},
}


# Shapes that place gates differently.
GATED = {
    name: {**CASES[name], "gate": True}
    for name in (
        "odd number of leaves",
        "two leaves",
        "one more than eight",
        "grouped",
        "packed",
        "packed, group of eight",
        "packed, 128",
        "128, group of four",
    )
}
GATED |= {
    f"closed, {name}": {**CASES[name], "gate": True, "closed": float("-inf")}
    for name in ("odd number of leaves", "grouped")
}


def check_errors(**case: object) -> None:
    """As near as the portable kernels: less than rounding the results to bfloat16 would cost, 1.7e-3."""
    for x, y in errors("hopper", dtype=torch.float16, **case):
        assert (x.double() - y).norm() <= 1.7e-3 * y.norm()


@pytest.mark.usefixtures("as_for_bfloat16")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_engine_equals_the_definition(hopper: dict[str, ModuleType], case: dict) -> None:
    check_errors(**case)
    _, length, query_heads, heads, dim = case["shape"]
    by_group = query_heads > heads or dim == 128
    assert hopper["leaf"].leaf_forward_kernel.launches == 2  # once more in the backward pass
    assert hopper["leaf"].leaf_backward_kernel.launches == (not by_group)
    assert hopper["leaf_group"].leaf_backward_group_kernel.launches == by_group
    assert hopper["dense_forward"].dense_forward_kernel.launches == 1
    assert hopper["dense_backward"].dense_backward_kernel.launches == (length > 128)


@pytest.mark.usefixtures("as_for_bfloat16")
@pytest.mark.parametrize("case", GATED.values(), ids=GATED.keys())
def test_gates_equal_the_definition(hopper: dict[str, ModuleType], case: dict) -> None:
    check_errors(**case)
    _, _, query_heads, heads, dim = case["shape"]
    by_group = query_heads > heads or dim == 128
    assert hopper["leaf"].leaf_forward_kernel.launches == 2
    assert hopper["leaf"].leaf_backward_kernel.launches == (not by_group)
    assert hopper["leaf_group"].leaf_backward_group_kernel.launches == by_group
    assert hopper["dense_forward"].dense_forward_kernel.launches == 1
    assert hopper["dense_backward"].dense_backward_kernel.launches == (case["shape"][1] > 128)


# Channel 0 of keys, which queries have eight times: of the first 128 tokens, and of all others. Sums beside nothing or
# beside a leaf's own log-sum-exp are no numbers, or that is -96, and nothing beside nothing.
OUTWEIGH = {"sums too large": (6.5, -6.0), "weights too small": (0.5, -12.0)}


@pytest.mark.usefixtures("as_for_bfloat16")
@pytest.mark.parametrize("channel", OUTWEIGH.values(), ids=OUTWEIGH.keys())
@pytest.mark.parametrize("way", ["beside nothing", "beside their own", "gates"])
@pytest.mark.parametrize(("dim", "length"), [(64, 420), (128, 330)])
def test_first_keys_that_outweigh_a_leafs_own(
    hopper: dict[str, ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    dim: int,
    length: int,
    way: str,
    channel: tuple[float, float],
) -> None:
    """By e^100: programs begin anew, those of the first two pairs do not."""
    if way == "beside their own":
        monkeypatch.setattr(hopper["dense"], "_has_exponents", lambda dtype: False)
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(1, length, *size, generator=generator)

    first = (torch.arange(length) < 128)[:, None, None]
    q, k, v = normal(1, dim), normal(1, dim) / 8, normal(1, dim)
    q[..., 0] = 8
    k[..., 0] = torch.where(first, *channel)[..., 0]
    w = torch.nn.functional.normalize(normal(1, 1, dim), dim=-1)
    w[..., 0] = 0  # what decides is not moved
    beta = 2 * torch.rand(1, length, 1, 1, generator=generator)
    g = -normal(1).abs() / 100 if way == "gates" else None
    inputs = (q.half(), k.half(), v.half(), w, beta, g)
    expected = path_attention_reference(*[None if x is None else x.double() for x in inputs], scale=1.0)
    out, _ = cuda.forward("hopper", *inputs, None, 1.0)
    # A row of the second leaf has logits of 52 within its leaf, of queries as they are, and within its sibling, of
    # queries that are rounded: those are off by 52 * 2^-12.
    for rows, most in ((slice(128, None), 1.7e-3), (slice(128), 52 * 2.0**-12)):
        wanted = expected[:, rows]
        assert (out[:, rows].double() - wanted).norm() <= most * wanted.norm()


# There is nothing before the first token for its gate to come between: its gradient, the sum of all rows' sums of dS
# less all columns', is zero if both are of the same dS. What one dS is rounded beside the other adds up token by token.
@pytest.mark.usefixtures("as_for_bfloat16")
@pytest.mark.parametrize("dim", [64, 128])
def test_rows_and_columns_have_the_same_sum(hopper: dict[str, ModuleType], dim: int) -> None:
    *_, (d_g, _) = errors("hopper", (1, 460, 2, 1, dim), gate=True, dtype=torch.float16)
    assert hopper["dense_backward"].dense_backward_kernel.launches == 1
    # Some hundred float32 additions, each with an error of 2^-24 of what is there by then.
    assert d_g[:, 0].abs().max() <= 1e-5 * d_g.square().mean().sqrt()


# A group's gradients are summed in one unit, that of the largest: the others keep their bits only beside it. Without
# other spans, whose gradients share a factor.
@pytest.mark.usefixtures("as_for_bfloat16")
@pytest.mark.parametrize("exponents", [(-12, 0, 8), (8, -12, 0)])
@pytest.mark.parametrize("dim", [64, 128])
def test_heads_of_a_group_differ_in_scale(hopper: dict[str, ModuleType], dim: int, exponents: tuple[int, ...]) -> None:
    scales = 2.0 ** torch.tensor(exponents)[:, None]
    results = list(
        errors("hopper", (1, 110, 3, 1, dim), ends=[0, 64, 110], gate=True, dtype=torch.float16, loss_scale=scales)
    )
    assert hopper["leaf_group"].leaf_backward_group_kernel.launches == 1
    for x, y in results:
        assert (x.double() - y).norm() <= 1.7e-3 * y.norm()
    # Gradients of a head's queries are rounded in the largest unit until then: those before it is raised are exact.
    d_q, expected = results[1]
    for i in range(3):
        if exponents[i] >= max(exponents[:i], default=-12):
            assert (d_q[:, :, i].double() - expected[:, :, i]).norm() <= 1.7e-3 * expected[:, :, i].norm()


# Head dim, query heads a key head, and whether the leaves are those for Hopper.
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("dim", "group", "as_bfloat16"), [(64, 1, True), (64, 2, True), (128, 1, True), (128, 2, True), (64, 2, False)]
)
def test_a_part_of_the_heads_is_read_and_written_where_it_is(
    dim: int,
    group: int,
    as_bfloat16: bool,
    gated: bool,
    hopper: dict[str, ModuleType],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if as_bfloat16:
        request.getfixturevalue("as_for_bfloat16")
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(1, 200, *size, generator=generator).half()

    q, k, v, beta = normal(2 * group, dim), normal(2, dim), normal(2, dim), normal(1, 2).sigmoid()
    w = torch.nn.functional.normalize(normal(1, 2, dim).float(), dim=-1)
    inputs = (q, k, v, w, beta, -normal(2 * group).abs() if gated else None)
    d_out = normal(2 * group, dim)

    def passes() -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor | None, ...]]:
        found = cuda.forward("hopper", *inputs, None, 0.125)
        return found, cuda.backward("hopper", d_out, *inputs, *found, None, 0.125)

    forward, backward = passes()
    monkeypatch.setattr(cuda, "FORWARD_PARTS", 1)
    monkeypatch.setattr(cuda, "PART", 4 * dim // 64)  # four leaves of one head
    of_parts, backward_of_parts = passes()
    for x, y in zip(forward, of_parts, strict=True):
        assert torch.equal(x, y)
    # What gradients are multiplied by on their way is one for a part.
    for x, y in zip(backward, backward_of_parts, strict=True):
        assert x is None or float((x - y).float().norm() / x.float().norm()) <= 1e-3

    def no_copies(x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a copy")

    monkeypatch.setattr(cuda, "_rows", no_copies)
    passes()


@pytest.mark.usefixtures("as_for_bfloat16")
@pytest.mark.parametrize(
    ("group", "dim", "length", "ends", "gated"),
    [
        (1, 64, 200, None, True),
        (2, 64, 200, None, True),
        (1, 128, 200, None, True),
        (1, 64, 330, None, False),  # an odd last leaf below two levels
        (1, 64, 100, None, False),  # level 0 alone
        (1, 64, 300, [0, 30, 300], True),
        (1, 128, 270, [0, 270], False),
    ],
)
def test_what_is_kept_is_what_would_be_computed_again(
    group: int, dim: int, length: int, ends: list[int] | None, gated: bool, hopper: dict[str, ModuleType]
) -> None:
    """The leaves' kernel writes it beside their attention, and that between siblings the queries that it moves."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(1, length, *size, generator=generator).half()

    q, d_out, k, v = normal(group, dim), normal(group, dim), normal(1, dim), normal(1, dim)
    w = torch.nn.functional.normalize(normal(1, 1, dim).float(), dim=-1)
    g = -normal(group).abs() if gated else None
    cu_seqlens = None if ends is None else torch.tensor(ends)
    inputs, rest = (q, k, v, w, normal(1, 1).sigmoid(), g), (cu_seqlens, 0.125)
    expected = cuda.forward("hopper", *inputs, *rest)
    expected_gradients = cuda.backward("hopper", d_out, *inputs, *expected, *rest)
    assert hopper["leaf"].leaf_forward_kernel.launches == 2
    size = cuda.kept_bytes("hopper", q, k, v, w, g, cu_seqlens)
    kept = torch.full((size,), 255, dtype=torch.uint8)
    found = cuda.forward("hopper", *inputs, *rest, kept=kept)
    gradients = cuda.backward("hopper", d_out, *inputs, *found, *rest, kept)
    assert hopper["leaf"].leaf_forward_kernel.launches == 3
    for x, y in zip((*expected, *expected_gradients), (*found, *gradients), strict=True):
        assert (x is None and y is None) or torch.equal(x, y)


@pytest.mark.parametrize("name", ["odd number of leaves", "128, grouped"])
@pytest.mark.parametrize("gate", [False, True])
def test_float16_equals_the_definition(hopper: dict[str, ModuleType], name: str, gate: bool) -> None:
    """Leaves by the portable kernels, gradients of rows in float32."""
    check_errors(**CASES[name], gate=gate)
    assert hopper["leaf"].leaf_forward_kernel.launches == 0
    assert hopper["dense_backward"].dense_backward_kernel.launches == 1
