"""Which backend is chosen where the caller asks for the same bits on every run."""

from collections.abc import Iterator

import pytest
import torch

from path_attention.ops import backends
from path_attention.ops.backends import AUTO, BACKENDS, UNORDERED, choose
from tests.ops.inputs import Shape, make_inputs


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def everything_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "reason_against", lambda backend, *call: None)


def chosen(backend: str, *, is_backward: bool = False, dtype: torch.dtype = torch.bfloat16, gate: bool = False) -> str:
    inputs = make_inputs(Shape(64), gated=gate)
    q, v = inputs["q"].to(dtype), inputs["v"].to(dtype)
    return choose(backend, q, v, inputs["w"][:, :, None], inputs.get("g"), None, is_backward=is_backward)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate", [False, True])
def test_hopper_is_taken_for_all_that_it_serves(dtype: torch.dtype, gate: bool) -> None:
    assert chosen(AUTO, dtype=dtype, gate=gate) == "hopper"


@pytest.mark.usefixtures("deterministic")
def test_auto_takes_a_backward_pass_with_a_fixed_order() -> None:
    assert chosen(AUTO, is_backward=False) == "hopper"
    assert chosen(AUTO, is_backward=True) == "triton"


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_that_is_named_raises_where_it_has_none(backend: str) -> None:
    assert chosen(backend, is_backward=False) == backend
    if backend not in UNORDERED:
        assert chosen(backend, is_backward=True) == backend
        return
    with pytest.raises(RuntimeError, match=f"backend '{backend}' adds up gradients in no fixed order"):
        chosen(backend, is_backward=True)


@pytest.mark.usefixtures("deterministic")
def test_it_warns_where_torch_only_warns() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    with pytest.warns(UserWarning, match="backend 'hopper' adds up"):
        assert chosen("hopper", is_backward=True) == "hopper"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_that_is_named_serves_both_directions(backend: str) -> None:
    assert chosen(backend, is_backward=False) == chosen(backend, is_backward=True) == backend
