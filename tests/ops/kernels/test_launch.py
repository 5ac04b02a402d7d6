"""launch_kernel takes the compilation that Triton would take, and has Triton compile where Triton would."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from path_attention.ops.kernels import launch
from path_attention.ops.kernels.launch import launch_kernel, launched_by_triton, next_power_of_2
from tests.ops.kernels.ahead_of_time import Hopper

HALF = torch.zeros(64, dtype=torch.float16)
ROWS = torch.zeros(64, 64)
ARGUMENTS: dict[str, Any] = {
    "p_x": HALF,
    "p_y": HALF,
    "count": 7,
    "number": 7,
    "scale": 0.5,
    "FLAG": True,
    "WORK": None,
}
# Changes to these, one at a time.
CHANGES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "another tensor": {"p_x": torch.ones(3, dtype=torch.float16)},
    "a parameter": {"p_x": torch.nn.Parameter(HALF.clone(), requires_grad=False)},
    "dtype": {"p_x": HALF.float()},
    "alignment": {"p_x": HALF[1:]},
    "alignment of the other": {"p_y": HALF[3:]},
    "no tensor": {"p_y": None},
    "several tensors": {"p_y": (HALF, HALF)},
    "several tensors of another dtype": {"p_y": (HALF, HALF.float())},
    "a descriptor": {"p_y": TensorDescriptor.from_tensor(ROWS, [16, 32])},
    "a descriptor of other tiles": {"p_y": TensorDescriptor.from_tensor(ROWS, [32, 32])},
    "count": {"count": 9},
    "count that is aligned": {"count": 48},
    "count of one": {"count": 1},
    "count of 64 bits": {"count": 1 << 40},
    "number": {"number": 9},
    "number that is aligned": {"number": 48},
    "number of one": {"number": 1},
    "number of 64 bits": {"number": (1 << 40) + 1},
    "number that is a float": {"number": 7.5},
    "scale": {"scale": 3.25},
    "constant": {"FLAG": False},
    "type": {"WORK": tl.float16},
    "default": {"DEFAULT": 5},
    "default as it is": {"DEFAULT": 3},
    "warps": {"num_warps": 8},
    "stages": {"num_stages": 1},
}


def kernel_function(p_x, p_y, count, number, scale, FLAG: tl.constexpr, WORK: tl.constexpr, DEFAULT: tl.constexpr = 3):  # type: ignore[no-untyped-def]
    pass


class Device(Hopper):
    index = 0

    def get_current_device(self) -> int:
        return self.index


class Compiled:
    """What a launch by Triton returns, and the launches by us."""

    def __init__(self) -> None:
        self.launches: list[tuple[tuple[int, ...], tuple[Any, ...]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *values: self.launches.append((grid, values))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    found = Device()
    monkeypatch.setattr(triton.runtime.driver, "_active", found)  # set_active, and back where there was no driver
    return found


@pytest.fixture
def compilations(device: Device, monkeypatch: pytest.MonkeyPatch) -> list[Compiled]:
    """One for every launch that Triton was asked for."""
    found: list[Compiled] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Compiled:
        found.append(Compiled())
        return found[-1]

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(launch, "_KERNELS", {})
    return found


def new_kernel() -> "JITFunction[Any]":
    return JITFunction(kernel_function, do_not_specialize=["count"])


def specialization(kernel: "JITFunction[Any]", arguments: dict[str, Any]) -> str:
    """Triton's own: types, alignments, constants and options, as it compares them."""
    given = {"debug": False, "instrumentation_mode": "", **arguments}
    *_, binder = kernel.create_binder()
    _, found, options = binder(**given)
    return f"{found} {options}"


@pytest.mark.parametrize("first", CHANGES)
@pytest.mark.parametrize("second", CHANGES)
def test_triton_compiles_where_it_would(first: str, second: str, compilations: list[Compiled]) -> None:
    kernel = new_kernel()
    before, after = ARGUMENTS | CHANGES[first], ARGUMENTS | CHANGES[second]
    same = specialization(kernel, before) == specialization(kernel, after)
    launch_kernel(kernel, (2,), **before)
    launch_kernel(kernel, (3, 4), **after)
    # A model's parameter is another type to us: Triton is asked once more, and finds that it has compiled that.
    asked_again = not same or (first == "a parameter") != (second == "a parameter")
    assert len(compilations) == 1 + asked_again
    if not asked_again:
        (launched,) = compilations[0].launches
        grid, values = launched
        expected = {**after, "DEFAULT": after.get("DEFAULT", 3)}
        expected = {name: x for name, x in expected.items() if not name.startswith("num_")}
        assert grid == (3, 4, 1)
        assert len(values) == len(expected)
        assert all(x is expected[name] for name, x in zip(kernel.arg_names, values, strict=True))


@pytest.mark.parametrize("change", ["nothing", "another tensor", "count", "count of one", "number", "scale"])
def test_what_changes_from_call_to_call_is_not_compiled_for(change: str, compilations: list[Compiled]) -> None:
    kernel = new_kernel()
    for arguments in (ARGUMENTS, ARGUMENTS | CHANGES[change], ARGUMENTS):
        launch_kernel(kernel, (1,), **arguments)
    assert len(compilations) == 1
    assert len(compilations[0].launches) == 2


def test_a_kernel_is_compiled_for_each_device(compilations: list[Compiled], device: Device) -> None:
    kernel = new_kernel()
    for device.index in (0, 1, 0, 1):
        launch_kernel(kernel, (1,), **ARGUMENTS)
    assert [len(x.launches) for x in compilations] == [1, 1]


def test_kernels_of_one_name_are_told_apart(compilations: list[Compiled]) -> None:
    kernels = new_kernel(), new_kernel()
    for _ in range(2):
        for kernel in kernels:
            launch_kernel(kernel, (1,), **ARGUMENTS)
    assert [len(x.launches) for x in compilations] == [1, 1]


def test_hooks_before_launches_are_called(compilations: list[Compiled]) -> None:
    kernel = new_kernel()
    launch_kernel(kernel, (1,), **ARGUMENTS)
    kernel.add_pre_run_hook(lambda *args, **kwargs: None)
    launch_kernel(kernel, (1,), **ARGUMENTS)
    assert len(compilations) == 2  # by Triton, whose affair hooks are


def test_all_launches_can_be_triton_s(compilations: list[Compiled]) -> None:
    kernel = new_kernel()
    launch_kernel(kernel, (1,), **ARGUMENTS)
    with launched_by_triton():
        launch_kernel(kernel, (1,), **ARGUMENTS)
    assert len(compilations) == 2
    launch_kernel(kernel, (1,), **ARGUMENTS)
    assert [len(x.launches) for x in compilations] == [1, 0]


def test_what_is_only_compiled_is_not_taken_for_launched(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **kwargs: asked.append(kwargs))
    kernel = new_kernel()
    for _ in range(2):
        launch_kernel(kernel, (1,), **ARGUMENTS)
    assert len(asked) == 2


def test_an_argument_that_is_missing_is_named(compilations: list[Compiled]) -> None:
    given = {name: x for name, x in ARGUMENTS.items() if name != "count"}
    with pytest.raises(AssertionError, match="kernel_function: an argument is missing"):
        launch_kernel(new_kernel(), (1,), **given)


def test_other_kernels_are_called_as_they_are() -> None:
    class Interpreted:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda **arguments: found.append((grid, arguments))

    found: list[tuple[tuple[int, ...], dict[str, Tensor]]] = []
    launch_kernel(Interpreted(), (5,), p_x=HALF)
    assert found == [((5,), {"p_x": HALF})]


def test_next_power_of_2() -> None:
    assert [next_power_of_2(x) for x in (1, 2, 3, 4, 5, 63, 64, 65, 256)] == [1, 2, 4, 4, 8, 64, 64, 128, 256]
