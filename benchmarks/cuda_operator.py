"""The operator on a GPU beside cuDNN's causal attention, which is what a RoPE model pays: time, memory, error.

    python benchmarks/cuda_operator.py --out results/NAME.json

PaTH by each backend that serves a shape, and PaTH-FoX; bfloat16; median of calls timed in turn with CUDA events. Errors
against the torch backend in float64 come first, and a result that is wrong is not timed.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

from path_attention import path_attention, unsupported_reason
from path_attention.benchmark.contenders import Operands, Setting, causal_softmax_attention, contender, make_operands
from path_attention.benchmark.measure import environment, forward, forward_backward, relative_errors

BASE = Setting(length=0, dtype=torch.bfloat16, device="cuda")
# 16k tokens of 2048 channels, then long ones: the shapes that plain attention kernels are usually compared at.
SHAPES = [
    replace(BASE, batch=16384 // length, length=length, query_heads=2048 // dim, heads=2048 // dim, dim=dim)
    for dim in (64, 128)
    for length in (128, 256, 512, 1024, 2048, 8192)
]
SHAPES += [replace(BASE, length=32768, query_heads=2048 // dim, heads=2048 // dim, dim=dim) for dim in (64, 128)]
SHAPES += [
    replace(BASE, batch=2, length=8192, query_heads=32, heads=8, dim=128),
    replace(BASE, length=131072, query_heads=8, heads=8, dim=64),
]
CHECKED = replace(BASE, length=1024, query_heads=4, heads=2)
# The output may have this many times the error of cuDNN's attention in the same dtype, each gradient likewise; a wrong
# term is off by a hundred times and more.
ERROR_FACTOR = 2


def cudnn_attention(*operands: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return causal_softmax_attention(*operands)


def timed(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """Median, smallest and largest milliseconds of each, called in turn after three calls to warm up."""
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(-3, repeats):
        for name, function in functions.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            function()
            end.record()
            torch.cuda.synchronize()
            if repeat >= 0:
                taken[name].append(start.elapsed_time(end))
    return {name: {"median_ms": statistics.median(x), "min_ms": min(x), "max_ms": max(x)} for name, x in taken.items()}


def peak_extra_bytes(function: Callable[[], object]) -> int:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def gates(setting: Setting) -> torch.Tensor:
    """Log forget gates, log sigmoid(normal + 2): (B, L, HQ)."""
    normal = torch.randn(setting.batch, setting.length, setting.query_heads, device=setting.device)
    return torch.nn.functional.logsigmoid(normal + 2)


def functions_of(setting: Setting, operands: Operands) -> dict[str, Callable[..., torch.Tensor]]:
    """By name, of the fields of Operands; cuDNN's is first."""
    found: dict[str, Callable[..., torch.Tensor]] = {"cudnn": cudnn_attention}
    for backend in ("triton", "sdpa"):
        if unsupported_reason(backend, *operands) is None:
            found[f"path_{backend}"] = partial(path_attention, backend=backend)
    g = gates(setting)
    found["path_fox"] = lambda *operands: path_attention(*operands, g)
    return found


def measure(setting: Setting, repeats: int) -> dict[str, object]:
    operands = Operands(*make_operands(setting))
    functions = functions_of(setting, operands)
    d_out = torch.randn_like(operands.q)
    row: dict[str, object] = {**asdict(setting), "dtype": str(setting.dtype)}
    parts = {
        "forward": lambda f: forward(f, operands),
        "forward_backward": lambda f: forward_backward(f, operands, d_out),
    }
    times = {
        part: timed({name: lambda f=f, run=run: run(f) for name, f in functions.items()}, repeats)
        for part, run in parts.items()
    }
    memory = {name: peak_extra_bytes(lambda f=f: forward_backward(f, operands, d_out)) for name, f in functions.items()}
    for name in functions:
        row[name] = {
            **{part: times[part][name] for part in parts},
            **{f"{part}_ratio": times[part][name]["median_ms"] / times[part]["cudnn"]["median_ms"] for part in parts},
            "peak_extra_bytes": memory[name],
            "memory_ratio": memory[name] / memory["cudnn"],
        }
    return row


def checked_errors(setting: Setting) -> dict[str, dict[str, float]]:
    """Errors of softmax attention and of what is timed; SystemExit where one is wrong."""
    operands = Operands(*make_operands(setting))
    found = {"softmax": relative_errors(contender("softmax"), setting)}
    d_out = torch.randn_like(operands.q)
    g = gates(setting)
    for name, extra, backend in (
        ("path_triton", (), "triton"),
        ("path_sdpa", (), "sdpa"),
        ("path_fox", (g,), "triton"),
    ):
        exact = [x.detach().double().requires_grad_() for x in (*operands, *extra)]
        inputs = [x.detach().requires_grad_() for x in (*operands, *extra)]
        out, expected = path_attention(*inputs, backend=backend), path_attention(*exact, backend="torch")
        gradients = torch.autograd.grad(out, inputs, d_out), torch.autograd.grad(expected, exact, d_out.double())
        found[name] = {
            "output": relative_error(out.detach(), expected.detach()),
            "gradients": max(relative_error(x, y) for x, y in zip(*gradients, strict=True)),
        }
        for part, error in found[name].items():
            if not error <= ERROR_FACTOR * found["softmax"][part]:
                raise SystemExit(f"{name}: the {part} differs from float64 by {error:.1e}. Nothing was timed.")
    return found


def relative_error(x: torch.Tensor, exact: torch.Tensor) -> float:
    return float((x.double() - exact).norm() / exact.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--commit", help="of the sources, where git does not tell")
    options = parser.parse_args()
    errors = {f"dim {dim}": checked_errors(replace(CHECKED, dim=dim)) for dim in (64, 128)}
    result = {
        "benchmark": "cuda_operator",
        **environment(),
        "gpu": torch.cuda.get_device_name(),
        "errors": {"setting": {**asdict(CHECKED), "dtype": str(CHECKED.dtype)}, **errors},
        "rows": [],
    }
    result["command"] = "python benchmarks/cuda_operator.py --out results/h200_operator.json"
    result["commit"] = options.commit or result["commit"]
    result["versions"] |= {"triton": triton.__version__, "cuda": torch.version.cuda}
    print(f"{'B x L x HQ/H x D':>41} " + " ".join(f"{x:>8} {'ratio':>6}" for x in ("fwd ms", "f+b ms", "MiB")))
    for setting in SHAPES:
        row = measure(setting, options.repeats)
        result["rows"].append(row)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")  # after every row: nothing finished is lost
        shape = f"{setting.batch} x {setting.length} x {setting.query_heads}/{setting.heads} x {setting.dim}"
        for name in ("cudnn", "path_triton", "path_sdpa", "path_fox"):
            if name in row:
                print(f"{shape:>28} {name:>12} " + cells(row[name]), flush=True)


def cells(found: dict) -> str:
    times = " ".join(
        f"{found[x]['median_ms']:8.2f} {found[x + '_ratio']:6.2f}" for x in ("forward", "forward_backward")
    )
    return f"{times} {found['peak_extra_bytes'] / 2**20:8.0f} {found['memory_ratio']:6.2f}"


if __name__ == "__main__":
    main()
