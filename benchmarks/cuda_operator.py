"""The operator on a GPU beside cuDNN's causal attention, which is what a RoPE model pays: time, memory, error.

    python benchmarks/cuda_operator.py --out results/NAME.json

bfloat16; median of calls timed in turn with CUDA events. Errors against the definition in float64 come first, and a
result that is wrong is not timed.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

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


def measure(setting: Setting, repeats: int) -> dict[str, object]:
    functions = {"path": contender("path").function, "cudnn": cudnn_attention}
    operands = Operands(*make_operands(setting))
    d_out = torch.randn_like(operands.q)
    row: dict[str, object] = {**asdict(setting), "dtype": str(setting.dtype)}
    for part, run in {
        "forward": lambda f: forward(f, operands),
        "forward_backward": lambda f: forward_backward(f, operands, d_out),
    }.items():
        found = timed({name: lambda f=f, run=run: run(f) for name, f in functions.items()}, repeats)
        row[part] = {**found, "ratio": found["path"]["median_ms"] / found["cudnn"]["median_ms"]}
    row["peak_extra_bytes"] = {
        name: peak_extra_bytes(lambda f=f: forward_backward(f, operands, d_out)) for name, f in functions.items()
    }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--commit", help="of the sources, where git does not tell")
    options = parser.parse_args()
    errors = {}
    for dim in (64, 128):
        setting = replace(CHECKED, dim=dim)
        found = {name: relative_errors(contender(name), setting) for name in ("softmax", "path")}
        errors[f"dim {dim}"] = found
        for part, error in found["path"].items():
            if not error <= ERROR_FACTOR * found["softmax"][part]:
                raise SystemExit(f"path: the {part} differs from float64 by {error:.1e}. Nothing was timed.")
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
    print(f"{'B x L x HQ/H x D':>28} {'fwd ms':>8} {'ratio':>6} {'f+b ms':>8} {'ratio':>6} {'MiB':>7} {'ratio':>6}")
    for setting in SHAPES:
        row = measure(setting, options.repeats)
        result["rows"].append(row)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")  # after every row: nothing finished is lost
        shape = f"{setting.batch} x {setting.length} x {setting.query_heads}/{setting.heads} x {setting.dim}"
        cells = [f"{shape:>28}"]
        for part in ("forward", "forward_backward"):
            cells.append(f"{row[part]['path']['median_ms']:8.2f} {row[part]['ratio']:6.2f}")
        memory = row["peak_extra_bytes"]
        cells.append(f"{memory['path'] / 2**20:7.0f} {memory['path'] / memory['cudnn']:6.2f}")
        print(" ".join(cells), flush=True)


if __name__ == "__main__":
    main()
