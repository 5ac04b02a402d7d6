"""Every kind of bad input is a ValueError that names the argument, what was given and what is wanted."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from path_attention import path_attention, path_attention_reference, path_attention_weights
from tests.ops.inputs import Shape, make_inputs

LENGTH = 6


def good() -> dict[str, Any]:
    shape = Shape(LENGTH, query_heads=4, heads=2, dim=4, value_dim=3)
    return {name: x.detach().float() for name, x in make_inputs(shape, gated=True).items()}


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


# (argument at fault, what to change, words of the message: given ... wanted)
BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "q is no tensor": ("q", {"q": [1.0]}, "list; wanted a torch.Tensor"),
    "k is no tensor": ("k", {"k": None}, "NoneType; wanted a torch.Tensor"),
    "q of integers": ("q", {"q": zeros(1, LENGTH, 4, 4, dtype=torch.int64)}, "torch.int64; wanted float64, float32"),
    "w complex": ("w", {"w": zeros(1, LENGTH, 2, 4, dtype=torch.complex64)}, "complex64; wanted float64, float32"),
    "q without batch": ("q", {"q": zeros(LENGTH, 4, 4)}, r"\(6, 4, 4\); wanted 4 dimensions"),
    "q without heads": ("q", {"q": zeros(1, LENGTH, 0, 4)}, r"\(1, 6, 0, 4\); wanted at least one head"),
    "k of another dtype": (
        "k",
        {"k": zeros(1, LENGTH, 2, 4).double()},
        "float64; wanted the dtype of q, torch.float32",
    ),
    "v of another dtype": ("v", {"v": zeros(1, LENGTH, 2, 3).bfloat16()}, "bfloat16; wanted the dtype of q"),
    "w in half beside float32": ("w", {"w": zeros(1, LENGTH, 2, 4).half()}, "float16; wanted the dtype of q"),
    "beta in float64 beside float32": ("beta", {"beta": zeros(1, LENGTH, 2).double()}, "float64; wanted the dtype of"),
    "g in half beside float32": ("g", {"g": zeros(1, LENGTH, 4).bfloat16()}, "bfloat16; wanted the dtype of q"),
    "k on another device": ("k", {"k": zeros(1, LENGTH, 2, 4).to("meta")}, "device meta; wanted the device of q, cpu"),
    "k of another batch": ("k", {"k": zeros(2, LENGTH, 2, 4)}, r"\(2, 6, 2, 4\); wanted \(1, 6, heads, 4\)"),
    "k of another length": ("k", {"k": zeros(1, 5, 2, 4)}, r"\(1, 5, 2, 4\); wanted \(1, 6, heads, 4\)"),
    "k of another head_dim": ("k", {"k": zeros(1, LENGTH, 2, 5)}, r"\(1, 6, 2, 5\); wanted \(1, 6, heads, 4\)"),
    "k of 3 dimensions": ("k", {"k": zeros(1, LENGTH, 8)}, r"\(1, 6, 8\); wanted 4 dimensions"),
    "k heads that do not divide": ("k", {"k": zeros(1, LENGTH, 3, 4)}, "3 heads; wanted .* divides the 4 query heads"),
    "v of another number of heads": (
        "v",
        {"v": zeros(1, LENGTH, 4, 3)},
        r"\(1, 6, 4, 3\); wanted \(1, 6, 2, value_dim",
    ),
    "v without columns": ("v", {"v": zeros(1, LENGTH, 2, 0)}, r"\(1, 6, 2, 0\); wanted"),
    "w with the query heads": ("w", {"w": zeros(1, LENGTH, 4, 4)}, r"\(1, 6, 4, 4\); wanted \(1, 6, 2, 4\), or"),
    "w with no reflection": ("w", {"w": zeros(1, LENGTH, 0, 2, 4)}, r"\(1, 6, 0, 2, 4\); wanted"),
    "beta with a last dimension": ("beta", {"beta": zeros(1, LENGTH, 2, 1)}, r"\(1, 6, 2, 1\); wanted \(1, 6, 2\)"),
    "beta without R": (
        "beta",
        {"w": zeros(1, LENGTH, 2, 2, 4), "beta": zeros(1, LENGTH, 2)},
        r"\(1, 6, 2\); wanted \(1, 6, 2, 2\), the shape of w without",
    ),
    "g of the key heads": ("g", {"g": zeros(1, LENGTH, 2)}, r"\(1, 6, 2\); wanted \(1, 6, 4\)"),
    "scale is a word": ("scale", {"scale": "large"}, "'large'; wanted a number"),
    "scale is a tensor": ("scale", {"scale": torch.ones(())}, "wanted a number"),
    "scale is True": ("scale", {"scale": True}, "True; wanted a number"),
    "q is sparse": ("q", {"q": zeros(1, LENGTH, 4, 4).to_sparse()}, "torch.sparse_coo; wanted torch.strided"),
    "cu_seqlens is sparse": ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 6]).to_sparse()}, "sparse_coo; wanted"),
    "cu_seqlens has no values": (
        "cu_seqlens",
        {"cu_seqlens": torch.tensor([0, LENGTH], device="meta")},
        "device meta; wanted the device of the tokens, cpu",
    ),
    "scale is too large for a float": ("scale", {"scale": 10**400}, "inf; wanted a finite number"),
    "scale is complex": ("scale", {"scale": 1j}, "wanted a number"),
    "backend cannot be hashed": ("backend", {"backend": ["torch"]}, r"\['torch'\]; wanted one of torch"),
    "backend is an array": ("backend", {"backend": torch.zeros(3)}, "wanted one of torch"),
    "scale is not finite": ("scale", {"scale": float("nan")}, "nan; wanted a finite number"),
    "cu_seqlens is a list": ("cu_seqlens", {"cu_seqlens": [0, LENGTH]}, "list; wanted a torch.Tensor"),
    "cu_seqlens of floats": ("cu_seqlens", {"cu_seqlens": torch.tensor([0.0, 6.0])}, "float32; wanted int32 or int64"),
    "cu_seqlens of one number": ("cu_seqlens", {"cu_seqlens": torch.tensor([0])}, r"\(1,\); wanted \(number of seq"),
    "cu_seqlens of 2 dimensions": ("cu_seqlens", {"cu_seqlens": torch.tensor([[0, 6]])}, r"\(1, 2\); wanted"),
    "cu_seqlens from 1": ("cu_seqlens", {"cu_seqlens": torch.tensor([1, 6])}, "first 1 and last 6; wanted first 0"),
    "cu_seqlens too short": ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 5])}, "last 5; wanted first 0 and last 6"),
    "cu_seqlens that decreases": ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 4, 2, 6])}, "wanted values that never"),
}


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case: str, autocast: bool) -> None:
    name, change, message = BAD[case]
    if autocast and "dtype of" in message:
        pytest.skip("autocast makes the dtypes equal")
    # Under autocast the messages name the dtype cast to.
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), pytest.raises(ValueError, match=rf"^{name}: got .*"):
        path_attention(**{**good(), **change})
    if not autocast:
        with pytest.raises(ValueError, match=rf"^{name}: got .*{message}"):
            path_attention(**{**good(), **change})


@pytest.mark.parametrize("kind", [Fraction, np.float32, np.int64], ids=str)
def test_scale_is_any_real_number(kind: type) -> None:
    assert torch.equal(path_attention(**good(), scale=kind(2)), path_attention(**good(), scale=2.0))


@pytest.mark.parametrize("ends", [[1, 6], [0, 5], [0, 4, 2, 6]])
def test_boundaries_are_checked_in_compiled_code_too(ends: list[int]) -> None:
    """The operator itself reads them: a traced check would be left out of the graph."""
    compiled = torch.compile(path_attention, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"^cu_seqlens: got"):
        compiled(**good(), cu_seqlens=torch.tensor(ends))


def test_boundaries_beyond_no_tokens() -> None:
    with pytest.raises(ValueError, match=r"^cu_seqlens: got first 0 and last 5"):
        path_attention(**{name: x[:, :0] for name, x in good().items()}, cu_seqlens=torch.tensor([0, 5]))


def test_a_batch_cannot_be_packed_too() -> None:
    batch = {name: torch.cat([x, x]) for name, x in good().items()}
    with pytest.raises(ValueError, match=r"^q: got batch 2; wanted batch 1 when cu_seqlens"):
        path_attention(**batch, cu_seqlens=torch.tensor([0, LENGTH]))


def test_no_tokens_without_cu_seqlens() -> None:
    with pytest.raises(ValueError, match=r"^q: got length 0; wanted at least one token"):
        path_attention(**{name: x[:, :0] for name, x in good().items()})


@pytest.mark.parametrize("case", ["k of another length", "g of the key heads", "cu_seqlens from 1"])
def test_the_definition_takes_and_refuses_the_same(case: str) -> None:
    name, change, message = BAD[case]
    arguments = {**good(), **change}
    with pytest.raises(ValueError, match=rf"^{name}: got .*{message}"):
        path_attention_reference(**arguments)
    del arguments["v"]
    with pytest.raises(ValueError, match=rf"^{name}: got .*{message}"):
        path_attention_weights(**arguments)


NOT_IN_RANGE: dict[str, tuple[str, float, str]] = {
    "q NaN": ("q", float("nan"), "nan at index .*; wanted finite"),
    "k infinite": ("k", float("inf"), "inf at index .*; wanted finite"),
    "v minus infinite": ("v", float("-inf"), "-inf at index .*; wanted finite"),
    "w NaN": ("w", float("nan"), "nan at index .*; wanted finite"),
    "beta NaN": ("beta", float("nan"), "nan at index .*; wanted finite"),
    "g infinite": ("g", float("-inf"), "-inf at index .*; wanted finite"),
    "beta negative": ("beta", -0.5, r"-0.5 at index \(0, 3, 1\); wanted values in \[0, 2\]"),
    "beta above 2": ("beta", 2.25, r"2.25 at index \(0, 3, 1\); wanted values in \[0, 2\]"),
    "w not of unit length": ("w", 0.7, r"length .* at index \(0, 3, 1\); wanted unit vectors"),
    "g positive": ("g", 0.25, r"0.25 at index \(0, 3, 1\); wanted .* at most 0"),
}


@pytest.mark.parametrize("case", NOT_IN_RANGE)
def test_check_inputs_finds_bad_values(case: str) -> None:
    name, value, message = NOT_IN_RANGE[case]
    arguments = good()
    arguments[name][0, 3, 1] = value
    with pytest.raises(ValueError, match=f"^{name}: got {message}"):
        path_attention(**arguments, check_inputs=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [5, 64, 128, 4096])
def test_check_inputs_passes_good_values(dtype: torch.dtype, dim: int) -> None:
    """w normalised in its own dtype, and rounded to it, is of unit length as far as the check can ask."""
    inputs = make_inputs(Shape(100, query_heads=1, heads=1, dim=dim), gated=True, beta="2", dtype=dtype)
    path_attention(**inputs, check_inputs=True)
    inputs["w"] = torch.nn.functional.normalize(inputs["w"].detach(), dim=-1)
    inputs["w"][:, 10:] = 0
    path_attention(**inputs, check_inputs=True)


def test_values_are_not_read_without_check_inputs() -> None:
    """A NaN in one token's value raises nothing and is seen by every output that attends to it."""
    arguments = good()
    arguments["v"][0, 3] = float("nan")
    assert path_attention(**arguments)[:, 3:].isnan().all()
