"""Launches of kernels in a fraction of the time that Triton takes the host for one.

With every ``kernel[grid](...)`` Triton finds out which of a kernel's compilations serves the arguments: it puts types,
alignments, constants and options into text, and compares every global value that the kernel names with what it was. For
kernels of 20 to 30 arguments that takes several times as long as the launch itself, and short sequences, small models
and single tokens wait for it. Here a tuple of the same facts is looked up.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

# What Triton compiles a kernel anew for: addresses and numbers that are a multiple of this, numbers that are 1, and
# those that need more than 32 bits.
_ALIGNMENT = 16
_INT32 = 1 << 31
_MISSING = object()  # in the place of an argument that has no default


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not below a positive number. Triton's is made for its compiler."""
    return 1 << (number - 1).bit_length()


@cache
def multiprocessors(device: torch.device, off_gpu: int) -> int:
    """Of a GPU; ``off_gpu`` where kernels are interpreted."""
    if device.type != "cuda":
        return off_gpu
    return torch.cuda.get_device_properties(device).multi_processor_count


class _Call:
    """Where among a kernel's arguments and options what stands, for all calls with the same types in each place."""

    def __init__(self, kernel: "JITFunction[Any]", types: tuple[type, ...]) -> None:
        assert object not in types, f"{kernel.fn.__name__}: an argument is missing"
        # Options, which come behind the arguments, are constants too.
        self.constants = list(range(len(kernel.params), len(types)))
        self.tensors, self.integers, self.specialised, self.others = ([] for _ in range(4))
        for i, (parameter, kind) in enumerate(zip(kernel.params, types, strict=False)):
            if parameter.is_constexpr:
                self.constants.append(i)
            elif kind is Tensor:
                self.tensors.append(i)
            elif kind is int:
                self.integers.append(i)
                if not parameter.do_not_specialize:
                    self.specialised.append(i)
            elif kind not in (float, bool, type(None)):  # of which the type is all that matters
                self.others.append(i)
        self.compiled: dict[tuple[object, ...], Any] = {}

    def facts(self, values: list[Any]) -> tuple[object, ...]:
        """What a kernel is compiled for, beside the types."""
        return (
            *[values[i] for i in self.constants],
            *[values[i].dtype for i in self.tensors],
            *[values[i].data_ptr() % _ALIGNMENT == 0 for i in self.tensors],
            *[-_INT32 <= values[i] < _INT32 for i in self.integers],
            *[(values[i] == 1, values[i] % _ALIGNMENT == 0) for i in self.specialised],
            *[_facts(values[i]) for i in self.others],
        )


def _facts(value: Any) -> object:
    """Of a descriptor of memory, Triton's or Gluon's, a subclass of Tensor, or a tuple of tensors."""
    if isinstance(value, tuple):
        return tuple(_facts(x) for x in value)
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % _ALIGNMENT == 0
    return value.base.dtype, tuple(value.block_shape), getattr(value, "layout", None)


class _Kernel:
    """A kernel's parameters, and the calls there were."""

    def __init__(self, kernel: "JITFunction[Any]") -> None:
        self.kernel = kernel  # _KERNELS knows it by its id, which nothing else has while it is alive
        parameters = kernel.signature.parameters.values()
        self.defaults = {x.name: _MISSING if x.default is x.empty else x.default for x in parameters}
        self.calls: dict[tuple[object, ...], _Call] = {}


_KERNELS: dict[int, _Kernel] = {}
_only_by_triton = False


@contextmanager
def launched_by_triton() -> Iterator[None]:
    """A stretch of code in which Triton's own launches are taken: for those who watch them."""
    global _only_by_triton
    before, _only_by_triton = _only_by_triton, True
    try:
        yield
    finally:
        _only_by_triton = before


def launch_kernel(kernel: Any, grid: tuple[int, ...], /, **arguments: Any) -> None:
    """``kernel[grid](**arguments)``, launch options among them. Triton's knobs for compiling are those of the first
    launch of each compilation; hooks of launches are called.

    Arguments are tensors, tuples of them, descriptors, numbers and None, and whatever can be hashed for parameters that
    are constants. What is not a compiled kernel, in Triton's interpreter, is called as it is.
    """
    if _only_by_triton or not isinstance(kernel, JITFunction) or kernel.pre_run_hooks:
        kernel[grid](**arguments)
        return
    known = _KERNELS.get(id(kernel))
    if known is None:
        known = _KERNELS[id(kernel)] = _Kernel(kernel)
    # Parameters as the kernel has them, in its order; options come behind them.
    bound, count = {**known.defaults, **arguments}, len(known.defaults)
    values = list(bound.values())
    types = (*map(type, values), *list(bound)[count:])
    call = known.calls.get(types)
    if call is None:
        call = known.calls[types] = _Call(kernel, types[: len(values)])
    key = (triton.runtime.driver.active.get_current_device(), *call.facts(values))
    compiled = call.compiled.get(key)
    if compiled is not None:
        compiled[(*grid, 1, 1)[:3]](*values[:count])
        return
    compiled = kernel[grid](**arguments)
    if compiled is not None:  # else it was not launched
        call.compiled[key] = compiled
