"""Parts of Gluon that have other names in Triton 3.6 than in 3.9, and one that 3.6 does not wrap."""

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma

_IS_OLD = not hasattr(tma, "async_load")

# Of the copy engine: a tile to shared memory, and one to global memory.
async_load = tma.async_copy_global_to_shared if _IS_OLD else tma.async_load
async_store = tma.async_copy_shared_to_global if _IS_OLD else tma.async_store
# Of the threads themselves, each its own numbers, to shared memory.
async_load_numbers = async_copy.async_copy_global_to_shared if _IS_OLD else async_copy.async_load
thread_barrier = gl.thread_barrier if _IS_OLD else gl.barrier


@builtin
def tma_reduce_add(tensor_desc, coord, src, _semantic=None):
    """Adds a tile of shared memory to global memory; tma.store_wait waits for it."""
    if not _IS_OLD:
        tma.async_atomic_add(tensor_desc, coord, src, _semantic=_semantic)
        return
    from triton._C.libtriton import ir

    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor_desc.handle, coord, src.handle)


@builtin
def reinterpret(s_tile, dtype, shape, layout, _semantic=None):
    """The bytes of shared memory as another tile, of as many bytes at most."""
    method = s_tile._reinterpret if _IS_OLD else s_tile.reinterpret
    return method(dtype, shape, layout, _semantic=_semantic)
