"""Runs Gluon kernels for Hopper on a CPU: torch tensors, a Python thread for each partition, real mbarrier phases.

``emulated_gluon()`` puts this module's classes in the place of Gluon while the kernels' modules are imported, so that
the kernels' own source and their own launchers run. Time is taken as badly as the hardware allows: a copy to shared
memory destroys what lay there when it is issued and lands then or, sometimes, after later ones, a matrix product reads
shared memory when it is waited for, a copy from shared memory reads when store_wait comes, and a thread that lets
others go on comes after them. So these show before a GPU hangs or computes nonsense: a stage that is released too
early, a wait left out, a wrong phase, a deadlock, more arrivals than a barrier expects, an accumulator that is used in
flight, shared memory that nobody wrote (it is NaN), an access past a tensor's end, a missing fence before the copy
engine or a product reads what a thread stored, and, in a program of several warp groups, a tile written after one
group's wait for a product that another group may still have in flight.

Not modelled: layouts and swizzles, registers, 32-bit overflow, barriers that Triton puts among the threads of one
partition, but for those before a product or a load of what was stored.
"""

import contextlib
import functools
import importlib
import inspect
import pkgutil
import random
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

# Seconds after which a wait is a deadlock: a program takes some milliseconds.
TIMEOUT = 20.0
# A thread sleeps after an arrival that lets others go on, so that they do before it does anything more; and before a
# product is waited for with this probability. Seconds: some ten times what the others need to wake up.
SLEEP_PROBABILITY, SLEEP_SECONDS = 0.1, 1e-3
# After which a copy lands that is late, with this probability: later than others that are issued after it, and than the
# products that others are for, so that whoever does not wait for it reads NaN.
LATE_PROBABILITY, LATE_SECONDS = 0.2, 20e-3
# Launch options, which the functions do not take.
_OPTIONS = {"num_warps", "num_stages", "maxnreg", "num_ctas"}


class Deadlock(AssertionError):
    """A partition waited longer than TIMEOUT."""


class Tile(torch.Tensor):
    """A tensor with Triton's reinterpreting ``to``."""

    type = SimpleNamespace(layout=None)  # type: ignore[assignment]

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> "Tile":  # type: ignore[override]
        return self.view(dtype) if bitcast else super().to(dtype)  # type: ignore[return-value]


def _tile(x: Any, dtype: torch.dtype | None = None) -> Tile:
    return torch.as_tensor(x, dtype=dtype).as_subclass(Tile)


# --- where a thread is -----------------------------------------------------------------------------------------------


class _Program:
    """What the partitions of one program share."""

    def __init__(self, index: tuple[int, int, int], number: tuple[int, int, int] = (1, 1, 1), warps: int = 4) -> None:
        self.index, self.number = index, number
        self.warps = warps
        self.lock = threading.Lock()
        self.failed = False
        self.barriers = 0


class _Partition(threading.local):
    program: _Program
    name: str
    products: deque["_Product"]  # issued, not waited for
    stores: deque[Callable[[], None]]  # of the copy engine, likewise
    copies: deque[list[Callable[[], None]]]  # asynchronous ones to shared memory, in groups; the last group is open
    unfenced: list[tuple[int, int]]  # bytes of shared memory that this thread stored since its last fence
    stored: list[tuple[int, int]]  # since the last barrier among its warps
    read: list[tuple[int, int]]  # by products that were in flight and waited for, since that barrier

    def enter(self, program: _Program, name: str) -> None:
        self.program, self.name = program, name
        self.products, self.stores, self.unfenced = deque(), deque(), []
        self.copies = deque([[]])
        self.meet()

    def meet(self) -> None:
        """A barrier among the warps."""
        self.stored, self.read = [], []


_here = _Partition()


def _overlap(held: Sequence[tuple[int, int]], first: int, last: int) -> bool:
    return any(a < last and first < b for a, b in held)


def _sleep_at_random() -> None:
    if random.random() < SLEEP_PROBABILITY:
        time.sleep(SLEEP_SECONDS)


# --- barriers --------------------------------------------------------------------------------------------------------


class _Barrier:
    def __init__(self, name: str) -> None:
        self.name = name
        self.changed = threading.Condition()
        self.count = self.pending = -1  # not initialised
        self.phase = 0
        self.bytes = 0

    def init(self, count: int) -> None:
        self.count = self.pending = count

    def arrive(self, count: int, expected_bytes: int = 0) -> None:
        with self.changed:
            self.bytes += expected_bytes
            self.pending -= count
            before = self.phase
            self._complete()
        if self.phase != before:
            time.sleep(SLEEP_SECONDS)

    def receive(self, number: int) -> None:
        with self.changed:
            self.bytes -= number
            self._complete()

    def _complete(self) -> None:
        assert self.count > 0, f"{self.name} is not initialised"
        assert self.pending >= 0, f"{self.name}: more arrivals than its count"
        if self.pending == 0 and self.bytes == 0:
            self.phase ^= 1
            self.pending = self.count
            self.changed.notify_all()

    def wait(self, phase: int) -> None:
        program = _here.program
        with self.changed:
            if self.changed.wait_for(lambda: self.phase != phase or program.failed, TIMEOUT) and not program.failed:
                return
        other = program.failed
        program.failed = True
        raise Deadlock("another partition failed" if other else f"{_here.name} waits on {self.name} for phase {phase}")


class _Barriers:
    def __init__(self, number: int) -> None:
        self.all = []
        for i in range(number):
            _here.program.barriers += 1
            self.all.append(_Barrier(f"barrier {_here.program.barriers}[{i}]"))

    def index(self, i: Any) -> _Barrier:
        return self.all[int(i)]


def _one(barrier: _Barrier | _Barriers) -> _Barrier:
    return barrier if isinstance(barrier, _Barrier) else barrier.index(0)


_BARRIER_LAYOUT = object()


class mbarrier:
    @staticmethod
    def MBarrierLayout() -> object:
        return _BARRIER_LAYOUT

    @staticmethod
    def init(barrier: Any, count: int) -> None:
        _one(barrier).init(count)

    @staticmethod
    def wait(barrier: Any, phase: Any, pred: Any = True) -> None:
        if pred:
            _one(barrier).wait(int(phase))

    @staticmethod
    def arrive(barrier: Any, *, count: int = 1, pred: Any = True) -> None:
        if pred:
            _one(barrier).arrive(count)

    @staticmethod
    def expect(barrier: Any, number: int, pred: Any = True) -> None:
        if pred:
            _one(barrier).arrive(1, number)


# --- memory ----------------------------------------------------------------------------------------------------------


class Pointer:
    """Into a tensor, by elements."""

    def __init__(self, tensor: torch.Tensor, offset: Any = 0) -> None:
        self.tensor, self.offset = tensor, offset
        self.dtype = SimpleNamespace(element_ty=tensor.dtype)

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.tensor, self.offset + offset)

    def places(self, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Elements and which of them are meant, in one shape."""
        offset = torch.as_tensor(self.offset).as_subclass(torch.Tensor).long()
        meant = torch.as_tensor(True if mask is None else mask).as_subclass(torch.Tensor)
        offset, meant = torch.broadcast_tensors(offset, meant)
        inside = (offset >= 0) & (offset < self.tensor.numel())
        assert bool((inside | ~meant).all()), "access past the end of a tensor"
        return torch.where(meant, offset, 0), meant


def _load(pointer: Pointer, mask: Any = None, other: float = 0.0) -> Tile:
    offset, meant = pointer.places(mask)
    return _tile(torch.where(meant, pointer.tensor.view(-1)[offset], other).to(pointer.tensor.dtype))


def _store(pointer: Pointer, value: Any, mask: Any = None) -> None:
    offset, meant = pointer.places(mask)
    value = torch.as_tensor(value).as_subclass(torch.Tensor).expand(offset.shape)
    pointer.tensor.view(-1)[offset[meant]] = value[meant].to(pointer.tensor.dtype)


def _atomic_add(pointer: Pointer, value: Any, mask: Any = None, sem: str | None = None) -> torch.Tensor:
    """What was there before: of all elements, but only one program runs at a time."""
    offset, meant = pointer.places(mask)
    value = torch.as_tensor(value).as_subclass(torch.Tensor).expand(offset.shape)
    with _here.program.lock:
        before = pointer.tensor.view(-1)[offset].clone()
        pointer.tensor.view(-1).index_add_(0, offset[meant], value[meant].to(pointer.tensor.dtype))
    return before


class Shared:
    """Shared memory, or a view of it."""

    layout = None  # nothing is known of layouts

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.dtype = tensor.dtype
        self.shape = tensor.shape

    def index(self, i: Any) -> "Shared":
        assert 0 <= int(i) < self.tensor.shape[0], f"index {i} of {self.tensor.shape[0]}"
        return Shared(self.tensor[int(i)])

    def slice(self, start: int, length: int, dim: int) -> "Shared":
        return Shared(self.tensor.narrow(dim, start, length))

    def permute(self, order: Sequence[int]) -> "Shared":
        return Shared(self.tensor.permute(*order))

    def reinterpret(self, dtype: torch.dtype, shape: Sequence[int], layout: object) -> "Shared":
        held = self.tensor.view(-1).view(torch.uint8)
        size = torch.empty(shape, dtype=dtype, device="meta").nbytes
        assert size <= held.numel(), f"{size} bytes in {held.numel()}"
        return Shared(held[:size].view(dtype).view(*shape))

    def _bytes(self) -> tuple[int, int]:
        """First and last byte."""
        last = sum((n - 1) * s for n, s in zip(self.tensor.shape, self.tensor.stride(), strict=True))
        start = self.tensor.data_ptr()
        return start, start + (last + 1) * self.tensor.element_size()

    def read_after_stores(self) -> None:
        """Triton has the warps meet before any of them reads what another one may have stored."""
        if _overlap(_here.stored, *self._bytes()):
            _here.meet()

    def written(self) -> None:
        """Each warp group waits for its own share of a product, and Triton 3.6 takes that for all of it."""
        if _here.program.warps > 4:
            assert not _overlap(_here.read, *self._bytes()), f"{_here.name}: written before a barrier after a product"

    def load(self, layout: object) -> Tile:
        self.read_after_stores()
        return _tile(self.tensor.clone())

    def store(self, value: torch.Tensor) -> None:
        assert value.shape == self.tensor.shape, (value.shape, self.tensor.shape)
        assert value.dtype == self.dtype, (value.dtype, self.dtype)
        self.written()
        self.tensor.copy_(value)
        _here.unfenced.append(self._bytes())
        _here.stored.append(self._bytes())

    def read_by_engine(self) -> None:
        """A product or the copy engine is told to read it."""
        assert not _overlap(_here.unfenced, *self._bytes()), f"{_here.name}: read before a fence"
        self.read_after_stores()


def _allocate(dtype: torch.dtype, shape: Sequence[int], layout: object) -> Shared | _Barriers:
    if layout is _BARRIER_LAYOUT:
        return _Barriers(shape[0])
    unwritten = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max
    return Shared(torch.full(tuple(shape), unwritten, dtype=dtype))


def fence_async_shared() -> None:
    _here.unfenced.clear()


class async_copy:
    """Copies by the threads themselves, which land when their group is waited for."""

    @staticmethod
    def async_copy_global_to_shared(into: Shared, pointer: Pointer, mask: Any = None) -> None:
        offset, meant = pointer.places(mask)
        assert offset.shape == into.tensor.shape, (offset.shape, into.tensor.shape)
        assert pointer.tensor.dtype == into.dtype, (pointer.tensor.dtype, into.dtype)
        into.written()
        into.tensor.fill_(float("nan"))
        source = pointer.tensor.view(-1)

        def land() -> None:
            into.tensor.copy_(torch.where(meant, source[offset], 0.0))
            _here.unfenced.append(into._bytes())
            _here.stored.append(into._bytes())

        _here.copies[-1].append(land)

    @staticmethod
    def commit_group() -> None:
        _here.copies.append([])

    @staticmethod
    def wait_group(num_outstanding: int = 0) -> None:
        while len(_here.copies) > num_outstanding + 1:
            for land in _here.copies.popleft():
                land()


class TensorDescriptor:
    """A matrix in tiles: what is read past its end is zero, what is written there is dropped."""

    def __init__(self, tensor: torch.Tensor, block: Sequence[int], layout: object) -> None:
        assert tensor.stride(-1) == 1
        assert tensor.stride(0) * tensor.element_size() % 16 == 0
        assert tensor.data_ptr() % 16 == 0
        assert all(n <= 256 for n in block)
        self.tensor, self.block, self.layout = tensor, list(block), layout
        self.dtype = tensor.dtype

    from_tensor = classmethod(lambda cls, *arguments: cls(*arguments))

    def box(self, coordinates: Sequence[Any]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """The part of the tile that there is, in the matrix and in the tile."""
        matrix, tile = [], []
        for c, block, size in zip(coordinates, self.block, self.tensor.shape, strict=True):
            first, last = max(int(c), 0), max(min(int(c) + block, size), max(int(c), 0))
            matrix.append(slice(first, last))
            tile.append(slice(first - int(c), last - int(c)))
        return tuple(matrix), tuple(tile)


class tma:
    @staticmethod
    def async_copy_global_to_shared(
        t: TensorDescriptor, coordinates: Sequence[Any], barrier: Any, into: Shared
    ) -> None:
        assert list(into.tensor.shape) == t.block, (into.tensor.shape, t.block)
        matrix, tile = t.box(coordinates)
        into.tensor.fill_(float("nan"))

        def land() -> None:
            into.tensor.zero_()
            into.tensor[tile] = t.tensor[matrix]
            _one(barrier).receive(into.tensor.nbytes)

        if random.random() < LATE_PROBABILITY:
            threading.Timer(LATE_SECONDS, land).start()
        else:
            land()

    @staticmethod
    def async_copy_shared_to_global(t: TensorDescriptor, coordinates: Sequence[Any], source: Shared) -> None:
        _write_later(t, coordinates, source, lambda old, new: new)

    @staticmethod
    def store_wait(pendings: int) -> None:
        while len(_here.stores) > pendings:
            _here.stores.popleft()()


def reinterpret(tile: Shared, dtype: torch.dtype, shape: Sequence[int], layout: object) -> Shared:
    return tile.reinterpret(dtype, shape, layout)


def tma_reduce_add(t: TensorDescriptor, coordinates: Sequence[Any], source: Shared) -> None:
    """In the place of the function of that name in dense_backward.py, which is made of Triton's own parts."""
    _write_later(t, coordinates, source, torch.add)


def _write_later(
    t: TensorDescriptor,
    coordinates: Sequence[Any],
    source: Shared,
    joined: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    assert list(source.tensor.shape) == t.block, (source.tensor.shape, t.block)
    assert source.dtype == t.dtype
    source.read_by_engine()
    matrix, tile = t.box(coordinates)
    program = _here.program

    def write() -> None:
        with program.lock:
            t.tensor[matrix] = joined(t.tensor[matrix], source.tensor[tile])

    _here.stores.append(write)


# --- products --------------------------------------------------------------------------------------------------------


class _Product:
    """One that is issued: it reads shared memory when it is waited for."""

    def __init__(self, a: Any, b: Shared, sum_before: Any, use_sum: bool, is_async: bool) -> None:
        self.a, self.b, self.sum_before, self.use_sum, self.is_async = a, b, sum_before, use_sum, is_async
        self.value: Tile | None = None

    def finish(self) -> None:
        a = self.a.tensor if isinstance(self.a, Shared) else self.a
        assert a.dtype == self.b.dtype, (a.dtype, self.b.dtype)
        value = a.as_subclass(torch.Tensor).float() @ self.b.tensor.float()
        before = self.sum_before.value if isinstance(self.sum_before, _Product) else self.sum_before
        assert value.shape == before.shape, (value.shape, before.shape)
        self.value = _tile(value + before if self.use_sum else value)
        if self.is_async:
            _here.read += [x._bytes() for x in (self.a, self.b) if isinstance(x, Shared)]


def warpgroup_mma(a: Any, b: Shared, acc: Any, *, use_acc: bool = True, is_async: bool = False) -> Any:
    for operand in (a, b):
        if isinstance(operand, Shared):
            operand.read_by_engine()
    product = _Product(a, b, acc, use_acc, is_async)
    _here.products.append(product)
    return product if is_async else warpgroup_mma_wait(0, (product,))


def warpgroup_mma_wait(num_outstanding: int, deps: Sequence[Any]) -> Any:
    _sleep_at_random()
    while len(_here.products) > num_outstanding:
        _here.products.popleft().finish()
    found = []
    for x in deps:
        value = x.value if isinstance(x, _Product) else x
        assert value is not None, f"{_here.name}: an accumulator is used in flight"
        found.append(value)
    return found[0] if len(found) == 1 else tuple(found)


def mma_v2(a: torch.Tensor, b: torch.Tensor, acc: torch.Tensor) -> Tile:
    """The product of a warp, from registers alone."""
    assert a.dtype == b.dtype == torch.float16, (a.dtype, b.dtype)
    return _tile(a.as_subclass(torch.Tensor).float() @ b.as_subclass(torch.Tensor).float() + acc)


# --- the language ----------------------------------------------------------------------------------------------------


def _is_scalar(x: Any) -> bool:
    return not isinstance(x, torch.Tensor) or x.dim() == 0


def _where(condition: Any, a: Any, b: Any) -> Any:
    if _is_scalar(condition):
        return a if condition else b
    return _tile(torch.where(condition, a, b))


def _pairwise(of_scalars: Callable[..., Any], of_tensors: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    def function(a: Any, b: Any) -> Any:
        if _is_scalar(a) and _is_scalar(b):
            return of_scalars(a, b)
        return of_tensors(torch.as_tensor(a), torch.as_tensor(b))

    return function


def _associative_scan(x: torch.Tensor, axis: int, combine: Callable[[Any, Any], Any]) -> Tile:
    assert axis == 0
    rows = [x[0]]
    for row in x[1:]:
        rows.append(combine(rows[-1], row))
    return _tile(torch.stack(rows))


def _inline_asm_elementwise(
    asm: str, constraints: str, args: Sequence[Any], dtype: torch.dtype, is_pure: bool, pack: int
) -> Any:
    if asm.startswith("cvt.rn."):  # two numbers of a thread into one register
        return args[0].to(dtype)
    assert asm == "mov.b32 $0, $1;" or asm.startswith("shfl.sync.idx.b32"), f"no machine here for {asm}"
    return args[0]


def _static_assert(condition: bool) -> None:
    assert condition


class _Layout:
    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    @classmethod
    def get_default_for(cls, *arguments: Any) -> "_Layout":
        return cls()


def _warp_specialize(partitions: Sequence[tuple[Any, Sequence[Any]]], warps: Sequence[int], registers: Any) -> None:
    assert len(partitions) == len(warps) + 1 == len(registers) + 1
    assert not _here.products
    program, errors = _here.program, []

    def run(i: int, function: Any, arguments: Sequence[Any]) -> None:
        try:
            _here.enter(program, f"partition {i}")
            function(*arguments)
            assert not _here.products, f"partition {i} ends with a product in flight"
            tma.store_wait(0)
        except BaseException as error:
            errors.append(error)
            program.failed = True

    threads = [threading.Thread(target=run, args=(i, *x), daemon=True) for i, x in enumerate(partitions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((x for x in errors if "another partition" not in str(x)), errors[0])


class language:
    """gluon.language, as much of it as the kernels use."""

    bfloat16, float16, float32 = torch.bfloat16, torch.float16, torch.float32
    int32, int64 = torch.int32, torch.int64
    constexpr = staticmethod(lambda x: x)
    NVMMADistributedLayout = DotOperandLayout = SliceLayout = BlockedLayout = _Layout
    NVMMASharedLayout = SwizzledSharedLayout = _Layout
    allocate_shared_memory = staticmethod(_allocate)
    warp_specialize = staticmethod(_warp_specialize)
    load, store, where = staticmethod(_load), staticmethod(_store), staticmethod(_where)
    atomic_add = staticmethod(_atomic_add)
    static_range = range
    static_assert = staticmethod(_static_assert)
    program_id = staticmethod(lambda axis: _here.program.index[axis])
    num_programs = staticmethod(lambda axis: _here.program.number[axis])
    arange = staticmethod(lambda start, end, layout: _tile(torch.arange(start, end)))
    full = staticmethod(lambda shape, value, dtype, layout: _tile(torch.full(tuple(shape), value, dtype=dtype)))
    cast = staticmethod(lambda x, dtype: x.to(dtype) if isinstance(x, torch.Tensor) else x)
    convert_layout = staticmethod(lambda x, layout: x)
    to_tensor = staticmethod(lambda x: x)
    expand_dims = staticmethod(lambda x, axis: x.unsqueeze(axis))
    broadcast = staticmethod(torch.broadcast_tensors)
    maximum = staticmethod(_pairwise(max, torch.maximum))
    minimum = staticmethod(_pairwise(min, torch.minimum))
    max = staticmethod(lambda x, axis: x.amax(axis))
    sum = staticmethod(lambda x, axis: x.sum(axis))
    ravel = staticmethod(lambda x: x.reshape(-1))
    associative_scan = staticmethod(_associative_scan)
    inline_asm_elementwise = staticmethod(_inline_asm_elementwise)
    thread_barrier = staticmethod(lambda: _here.meet())
    abs, exp2, log2 = staticmethod(torch.abs), staticmethod(torch.exp2), staticmethod(torch.log2)


class Jitted:
    """A kernel, or a function that kernels call."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.launches = 0
        functools.update_wrapper(self, function)

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)

    def __getitem__(self, grid: Sequence[int]) -> Callable[..., None]:
        return functools.partial(self._launch, tuple(grid))

    def _launch(self, grid: tuple[int, ...], **given: Any) -> None:
        arguments = {name: self._argument(x) for name, x in given.items() if name not in _OPTIONS}
        inspect.signature(self.function).bind(**arguments)  # before a program is half done
        self.launches += 1
        x, y, z = (*grid, 1, 1)[:3]
        for index in range(x * y * z):
            place = index % x, index // x % y, index // (x * y)
            _here.enter(_Program(place, (x, y, z), given.get("num_warps", 4)), "program")
            self.function(**arguments)
            assert not _here.products, "the program ends with a product in flight"
            assert not any(_here.copies), "the program ends with a copy in flight"
            tma.store_wait(0)

    @staticmethod
    def _argument(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        if not x.is_contiguous():  # some heads of a tensor: from the first to the last element there is
            assert x.stride(-1) == 1
            extent = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
            x = x.as_strided((extent,), (1,))
        return Pointer(x)


def _jit(function: Callable[..., Any] | None = None, do_not_specialize: Sequence[str] = ()) -> Any:
    """gluon.jit, with and without options; what a kernel is compiled for again does not matter here."""
    return Jitted if function is None else Jitted(function)


def _module(name: str, **content: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(content)
    return module


def _builtin(function: Callable[..., Any]) -> Callable[..., Any]:
    return globals()[function.__name__]


def _instead_of_gluon() -> dict[str, Any]:
    hopper = {
        "fence_async_shared": fence_async_shared,
        "mbarrier": mbarrier,
        "tma": tma,
        "warpgroup_mma": warpgroup_mma,
        "warpgroup_mma_wait": warpgroup_mma_wait,
    }
    root = "triton.experimental"
    gluon = _module(f"{root}.gluon", jit=_jit, language=language)
    return {
        root: _module(root, gluon=gluon),
        f"{root}.gluon": gluon,
        f"{root}.gluon.language": language,
        f"{root}.gluon.language._core": _module("_core", builtin=_builtin),
        f"{root}.gluon.language.nvidia.ampere": _module("ampere", async_copy=async_copy, mma_v2=mma_v2),
        f"{root}.gluon.language.nvidia.hopper": _module("hopper", **hopper),
        f"{root}.gluon.nvidia.hopper": _module("hopper", TensorDescriptor=TensorDescriptor),
    }


@contextlib.contextmanager
def _swapped(prefix: str, instead: dict[str, Any]) -> Iterator[None]:
    """sys.modules without the module of that name and those within it, but with ``instead``."""

    def within() -> list[str]:
        return [name for name in sys.modules if name == prefix or name.startswith(f"{prefix}.")]

    before = {name: sys.modules.pop(name) for name in within()}
    sys.modules.update(instead)
    try:
        yield
    finally:
        for name in within():
            del sys.modules[name]
        sys.modules.update(before)


@contextlib.contextmanager
def emulated_gluon(package: str) -> Iterator[dict[str, ModuleType]]:
    """Within it, imports from ``package`` get modules that run on top of this one; all of them, by name."""
    parent, _, last = package.rpartition(".")
    outer = importlib.import_module(parent)
    real = importlib.import_module(package)  # an attribute of the outer one
    with _swapped(package, {}):
        with _swapped("triton.experimental", _instead_of_gluon()):  # Triton itself asks for the real one when it runs
            found = importlib.import_module(package)
            names = [x.name for x in pkgutil.iter_modules(found.__path__)]
            modules = {name: importlib.import_module(f"{package}.{name}") for name in names}
        try:
            yield modules
        finally:
            setattr(outer, last, real)
