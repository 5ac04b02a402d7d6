"""Memory grows as the length, not its square."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from path_attention import path_attention
from path_attention.ops.autograd import path_attention_backward, path_attention_forward
from tests.ops.inputs import Shape, make_inputs


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made inside it that are alive, and their peak; looks into our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()
        self._inside = {
            torch.ops.path_attention.forward.default: path_attention_forward._init_fn,
            torch.ops.path_attention.backward.default: path_attention_backward._init_fn,
        }

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in self._inside:
            with self:
                return self._inside[function](*args, **(kwargs or {}))
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self._count(x)
        return result

    def _count(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def peak_bytes(length: int, gated: bool) -> int:
    """Of the forward and the backward pass, inputs and gradients included (views of the inputs are seen)."""
    inputs = make_inputs(Shape(length, heads=1, query_heads=1), gated=gated, dtype=torch.float32)
    with LiveBytes() as counter:
        path_attention(**inputs).sum().backward()
    return counter.peak


def test_the_counter() -> None:
    x, y = torch.randn(256, 4), torch.randn(4, 256)
    with LiveBytes() as counter:
        held = x @ y
        x + x
        assert counter.live == held.nbytes
        del held
        assert counter.live == 0
    assert counter.peak == 4 * 256**2 + x.nbytes


@pytest.mark.parametrize("gated", [False, True], ids=["no gate", "gate"])
def test_peak_memory_is_linear_in_the_length(gated: bool) -> None:
    """Twice the length takes twice the memory, a little more for the rows of one more level; squares would take 4."""
    assert peak_bytes(8192, gated) <= 2.3 * peak_bytes(4096, gated)


def test_peak_memory_in_multiples_of_the_inputs() -> None:
    """A bound to notice when a stage starts to hold what it need not."""
    inputs_bytes = sum(x.nbytes for x in make_inputs(Shape(4096, heads=1, query_heads=1), dtype=torch.float32).values())
    assert peak_bytes(4096, False) <= 16 * inputs_bytes
