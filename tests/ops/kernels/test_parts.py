"""The CUDA engine in Triton's interpreter, cut into parts along sequences and heads: always the definition's result."""

import os
from functools import partial

import pytest
import torch
from torch import Tensor

from path_attention import path_attention_reference

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs Triton's interpreter: on a GPU, test_cuda.py runs the engine", allow_module_level=True)

from path_attention.ops.engines import cuda
from path_attention.ops.kernels import linear
from path_attention.ops.kernels.dense import DESCRIPTOR_ALIGNMENT


def relative_error(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact).norm() / exact.norm())


# Leaves times key heads of a part: one head of one sequence, an uneven cut, everything at once.
@pytest.mark.parametrize("part", [1, 4, 100])
@pytest.mark.parametrize(
    ("shape", "value_dim", "ends"),
    [((3, 70, 4, 2, 16), 24, None), ((1, 150, 6, 3, 18), 8, [0, 20, 20, 150]), ((5, 3, 3, 3, 16), 16, None)],
    ids=["batch", "packed", "short"],
)
def test_parts_equal_the_definition(
    part: int, shape: tuple[int, ...], value_dim: int, ends: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "PART", part)
    batch, length, query_heads, heads, dim = shape
    reflections = 1 + part % 2  # several for one of the three
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(batch, length, *size, generator=generator)

    q, k, v = normal(query_heads, dim), normal(heads, dim), normal(heads, value_dim)
    w = torch.nn.functional.normalize(normal(reflections, heads, dim), dim=-1)
    beta, g = 2 * torch.rand(batch, length, reflections, heads, generator=generator), -normal(query_heads).abs()
    d_out = normal(query_heads, value_dim)
    cu_seqlens = None if ends is None else torch.tensor(ends)
    exact = [x.double().requires_grad_() for x in (q, k, v, w, beta, g)]
    expected = path_attention_reference(*exact, cu_seqlens=cu_seqlens)
    expected.backward(d_out.double())
    inputs = (q, k, v, w, beta, g)
    scale = dim**-0.5
    out, log_sum_exp = cuda.forward("triton", *inputs, cu_seqlens, scale)
    gradients = cuda.backward("triton", d_out, *inputs, out, log_sum_exp, cu_seqlens, scale)
    # float32: some ten roundings of 6e-8 in a row.
    assert relative_error(out, expected.detach()) <= 1e-6
    for x, y in zip(gradients, exact, strict=True):
        assert relative_error(x, y.grad) <= 3e-6


@pytest.mark.parametrize(
    ("part", "parts", "gated"), [(6, 2, False), (2, 6, True), (5, 3, True)], ids=["sequences", "heads", "heads of all"]
)
def test_a_part_of_the_heads_is_read_and_written_where_it_is(
    part: int, parts: int, gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two sequences of two leaves with three key heads."""
    generator = torch.Generator().manual_seed(0)
    query_heads = 6 if gated else 3

    def normal(*size: int) -> Tensor:
        return torch.randn(2, 80, *size, generator=generator).half()

    q, k, v, beta = normal(query_heads, 16), normal(3, 16), normal(3, 32), normal(1, 3).sigmoid()
    w = torch.nn.functional.normalize(normal(1, 3, 16).float(), dim=-1)
    inputs = (q, k, v, w, beta, -normal(query_heads).abs() if gated else None)
    expected = cuda.forward("triton", *inputs, None, 0.25)
    monkeypatch.setattr(cuda, "FORWARD_PARTS", 1)
    monkeypatch.setattr(cuda, "PART", part)
    cut = list(cuda._parts(q, k, None, cuda._plain_cut(q, k, part, in_place=True)))
    assert len(cut) == parts
    assert all((x.keys[0] == slice(0, 2)) == (part == 5) for x in cut)
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    copied = cuda.forward("triton", *apart, *inputs[3:], None, 0.25)

    def no_copies(x: Tensor) -> Tensor:
        raise AssertionError("a copy")

    monkeypatch.setattr(cuda, "_rows", no_copies)
    in_place = cuda.forward("triton", *inputs, None, 0.25)
    for x, y, z in zip(expected, in_place, copied, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x, z)
    with pytest.raises(AssertionError, match="a copy"):
        cuda.forward("triton", *apart, *inputs[3:], None, 0.25)


# Parts of sequences, of heads, and one part; boundaries on the host, which need less room than any might.
@pytest.mark.parametrize(
    ("part", "shape", "ends", "gated"),
    [
        (2, (2, 70, 2, 1, 16), None, True),
        (1, (1, 70, 2, 2, 24), None, False),
        (100, (2, 3, 2, 2, 16), None, False),
        (100, (1, 90, 2, 1, 16), [0, 10, 10, 90], True),
    ],
    ids=["sequences", "heads", "short", "packed"],
)
def test_what_is_kept_is_what_would_be_computed_again(
    part: int, shape: tuple[int, ...], ends: list[int] | None, gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "PART", part)
    monkeypatch.setattr(cuda, "FORWARD_PARTS", 1)
    batch, length, query_heads, heads, dim = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(batch, length, *size, generator=generator).half()

    q, k, v, beta = normal(query_heads, dim), normal(heads, dim), normal(heads, 32), normal(1, heads).sigmoid()
    w = torch.nn.functional.normalize(normal(1, heads, dim).float(), dim=-1)
    inputs, d_out = (q, k, v, w, beta, -normal(query_heads).abs() if gated else None), normal(query_heads, 32)
    cu_seqlens = None if ends is None else torch.tensor(ends)
    rest = (cu_seqlens, 0.25)
    expected = cuda.forward("triton", *inputs, *rest)
    monkeypatch.setattr(cuda, "_plain_cut", partial(cuda._plain_cut, in_place=False))  # sums of the same parts
    expected_gradients = cuda.backward("triton", d_out, *inputs, *expected, *rest)
    size = cuda.kept_bytes("triton", q, k, v, w, inputs[5], cu_seqlens)
    kept = torch.full((size,), 255, dtype=torch.uint8)  # NaN
    found = cuda.forward("triton", *inputs, *rest, kept=kept)

    def again(*_: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(linear, "recompute", again)
    before = kept.clone()
    for _ in range(2):  # it is read only
        gradients = cuda.backward("triton", d_out, *inputs, *found, *rest, kept)
        for x, y in zip((*expected, *expected_gradients), (*found, *gradients), strict=True):
            assert x is y is None or torch.equal(x, y)
    assert torch.equal(before, kept)
    with pytest.raises(RuntimeError, match=r"more is kept, \d+ bytes, than there is room for"):
        cuda.forward("triton", *inputs, *rest, kept=kept[: size // 4 if ends else size - 1])


def test_leaves_in_torch_keep_nothing() -> None:
    q = torch.zeros(1, 100, 2, 16)
    w = torch.zeros(1, 100, 1, 2, 16)
    assert cuda.kept_bytes("triton", q, q, q, w, None, None) == 0
    assert cuda.kept_bytes("triton", q.half(), q.half(), q.half(), w.expand(1, 100, 2, 2, 16), None, None) == 0
    assert cuda.kept_bytes("triton", q.half(), q.half(), q.half(), w, None, None) > 0


def test_rows_are_copied_only_to_be_padded_or_gathered() -> None:
    x = torch.zeros(2, 3, 4, 16)
    assert cuda._rows(x).data_ptr() == x.data_ptr()
    assert cuda._rows(x[1:]).data_ptr() == x[1:].data_ptr()
    some_heads = cuda._rows(x[:, :, 1:3])
    assert some_heads.is_contiguous()
    assert some_heads.shape == (6, 2, 16)
    assert cuda._rows(x[..., :9]).shape == (6, 4, 16)
    at_an_odd_place = torch.zeros(1 + 6 * 64)[1:].view(2, 3, 4, 16)
    assert cuda._rows(at_an_odd_place).data_ptr() % DESCRIPTOR_ALIGNMENT == 0
