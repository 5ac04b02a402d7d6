"""One machine: versions, devices, which backend serves what, and whether every device computes the definition."""

import platform
from collections.abc import Iterator
from importlib import metadata
from typing import NamedTuple

import torch
from torch import Tensor

import path_attention
from path_attention.distributed.equality import FACTOR, arguments
from path_attention.doctor.check import Check
from path_attention.ops import path_attention as operator
from path_attention.ops import path_attention_reference, unsupported_reason
from path_attention.ops.backends import AUTO, BACKENDS, choose

_PACKAGES = ("triton", "transformers", "accelerate", "safetensors", "numpy", "datasets", "lm_eval")


class Kind(NamedTuple):
    """A kind of call, of the shapes and dtypes that models make."""

    name: str
    dtype: torch.dtype
    dim: int
    gated: bool = False
    packed: bool = False


KINDS = (
    Kind("bfloat16, head dim 64", torch.bfloat16, 64),
    Kind("bfloat16, head dim 128", torch.bfloat16, 128),
    Kind("bfloat16, 64, forget gates", torch.bfloat16, 64, gated=True),
    Kind("bfloat16, 64, packed", torch.bfloat16, 64, packed=True),
    Kind("float16, head dim 64", torch.float16, 64),
    Kind("float32, head dim 64", torch.float32, 64),
)
# Tokens of the calls that backends are asked about: long, and a whole tree of leaves. Nothing is computed.
LENGTH = 32768
# Of those that are computed: two leaves and a part of one; the definition in float64 goes token by token.
COMPUTED, COMPUTED_HEADS = 130, 2


def examine_machine() -> Iterator[Check]:
    yield versions()
    found = devices()
    yield from (describe(device) for device in found)
    if found[0].type == "cpu":
        yield Check("backends", "ok", "torch serves every call; the others are for GPUs")
    else:
        yield from (served(kind, found[0]) for kind in KINDS)
    for device in found:
        for dtype in (torch.float32, torch.bfloat16):
            for gated in (False, True):
                yield computes(device, dtype, gated)


def versions() -> Check:
    found = [f"path-attention {path_attention.__version__}", f"python {platform.python_version()}"]
    found += [f"torch {torch.__version__}", f"cuda {torch.version.cuda or 'none'}"]
    for package in _PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            found.append(f"{package} none")
    return Check("versions", "ok", ", ".join(found))


def devices() -> list[torch.device]:
    """The GPUs, or the CPU where there are none."""
    if torch.cuda.is_available():
        return [torch.device("cuda", n) for n in range(torch.cuda.device_count())]
    return [torch.device("cpu")]


def describe(device: torch.device) -> Check:
    if device.type == "cpu":
        cores = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
        return Check("cpu", "note", f"no GPU that torch can use; {platform.machine()}, {cores}")
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    found = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
    found += f", {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    # Half of it gone before anything began is another job's.
    return Check(str(device), "ok" if free > total / 2 else "note", found)


def served(kind: Kind, device: torch.device) -> Check:
    """Which backend serves a kind of call in either direction, and why not the others."""
    with torch.device(device):
        # One number stands for all: backends look at shapes, dtypes and devices alone.
        def rows(*shape: int, dtype: torch.dtype = kind.dtype) -> Tensor:
            return torch.zeros((), dtype=dtype).expand(1, LENGTH, *shape)

        q = rows(1, kind.dim)
        w, beta = rows(1, kind.dim, dtype=torch.float32), rows(1, dtype=torch.float32)
        g = rows(1, dtype=torch.float32) if kind.gated else None
    ends = torch.tensor([0, LENGTH // 2 + 1, LENGTH], dtype=torch.int32) if kind.packed else None
    chosen = [choose(AUTO, q, q, w.unsqueeze(2), g, ends, is_backward=is_backward) for is_backward in (False, True)]
    reasons = {
        name: unsupported_reason(name, q, q, q, w, beta, g, cu_seqlens=ends) for name in BACKENDS if name not in chosen
    }
    why = "; ".join(f"not {name}: {reason}" for name, reason in reasons.items() if reason)
    by = " forward, ".join(dict.fromkeys(chosen)) + (" backward" if len(set(chosen)) > 1 else "")
    slow = chosen[0] == "torch" and device.type == "cuda"
    return Check(f"{device.type}: {kind.name}", "note" if slow else "ok", f"by {by}{' (slow)' * slow}. {why}".strip())


def computes(device: torch.device, dtype: torch.dtype, gated: bool) -> Check:
    """A small forward and backward pass against the definition, token by token in float64."""
    name = f"{device}: {'path_fox' if gated else 'path'} in {str(dtype).removeprefix('torch.')}"
    try:
        given = arguments(COMPUTED, COMPUTED_HEADS, 64, dtype, device, gated=gated)
        exact = _run(path_attention_reference, [x.double() for x in given])
        found = _run(operator, given)
        # The yardstick: what the definition itself loses in float32, or a number when it is rounded to this dtype.
        plain = _run(path_attention_reference, [x.float() for x in given])
    except RuntimeError as error:
        return Check(name, "failed", " ".join(str(error).split())[:300])
    off, allowed = _error(found, exact), FACTOR * max(_error(plain, exact), torch.finfo(dtype).eps / 2)
    text = f"error {off:.1e} against float64, at most {allowed:.1e} allowed"
    return Check(name, "ok" if off <= allowed else "failed", text)


def _run(function: object, given: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in given]
    out = function(*leaves)  # type: ignore[operator]
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]


def _error(found: list[Tensor], exact: list[Tensor]) -> float:
    """The largest of the relative errors of output and gradients."""
    return max(float((x.double() - y).norm() / y.norm()) for x, y in zip(found, exact, strict=True))
