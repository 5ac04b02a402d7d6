"""Where the time of the operator on a GPU goes: each of our kernels beside the memory that it is given.

    python benchmarks/cuda_stages.py --out results/NAME.json
    python benchmarks/cuda_stages.py --shapes 2x8192x32x64,1x32768x32/8x128 --backends triton --out results/NAME.json

One forward and backward pass of PaTH in bfloat16 with w in float32, in one part; medians of CALLS calls after one that
compiles, by CUDA events around every launch of Triton. ``bytes`` are those of all buffers that a launch is given, each
once: some are written in half, and what is read again comes from the L2 cache, so bytes over time is a yardstick for
the kernels that are bound by memory and says nothing of those bound by matrix products (``dense``).
"""

import argparse
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from path_attention import path_attention, unsupported_reason
from path_attention.benchmark import results_file
from path_attention.benchmark.measure import environment
from path_attention.benchmark.shapes import Shape, operands
from path_attention.ops.engines import cuda
from path_attention.ops.kernels.launch import launched_by_triton

CALLS = 5
SHAPES = "2x8192x32x64,8x2048x32x64,2x8192x16x128,1x32768x32x64"


def bytes_of(arguments: Any) -> int:
    """Of the tensors among a launch's arguments, those behind descriptors and in tuples too."""
    if isinstance(arguments, torch.Tensor):
        return arguments.numel() * arguments.element_size()
    if isinstance(arguments, tuple | list):
        return sum(bytes_of(x) for x in arguments)
    base = getattr(arguments, "base", None)
    return bytes_of(base) if isinstance(base, torch.Tensor) else 0


@contextmanager
def recorded() -> Iterator[list[tuple[str, int, torch.cuda.Event, torch.cuda.Event]]]:
    """Name, bytes, start and end of every launch of Triton's."""
    launches: list[tuple[str, int, torch.cuda.Event, torch.cuda.Event]] = []
    run = JITFunction.run

    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = run(self, *args, **kwargs)
        end.record()
        where = "hopper." if ".hopper." in self.fn.__module__ else ""
        name = where + self.fn.__name__.removesuffix("_kernel")
        launches.append((name, bytes_of((*args, *kwargs.values())), start, end))
        return result

    JITFunction.run = timed
    try:
        with launched_by_triton():
            yield launches
    finally:
        JITFunction.run = run


def measure(shape: Shape, backend: str) -> dict[str, Any]:
    """Milliseconds, launches and bytes of each kernel, forward and backward apart, and milliseconds of the whole."""
    given = [x.requires_grad_() for x in operands(shape, shape.length, torch.bfloat16, "cuda")]
    d_out = torch.randn_like(given[0])
    found: dict[str, dict[str, list[float]]] = {"forward": {}, "backward": {}}
    launches: dict[str, dict[str, list[int]]] = {"forward": {}, "backward": {}}
    whole: dict[str, list[float]] = {"forward": [], "backward": []}
    for call in range(-1, CALLS):
        out = None
        for direction in found:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with recorded() as kernels:
                torch.cuda.synchronize()
                start.record()
                if out is None:
                    out = path_attention(*given, backend=backend)
                else:
                    torch.autograd.grad(out, given, d_out)
                end.record()
            torch.cuda.synchronize()
            if call < 0:
                continue
            whole[direction].append(start.elapsed_time(end))
            sums: dict[str, tuple[float, int, int]] = {}
            for name, moved, begin, finish in kernels:
                ms, count, total = sums.get(name, (0.0, 0, 0))
                sums[name] = (ms + begin.elapsed_time(finish), count + 1, total + moved)
            for name, (ms, count, total) in sums.items():
                found[direction].setdefault(name, []).append(ms)
                launches[direction][name] = [count, total]
    return {
        direction: {
            "whole_ms": statistics.median(whole[direction]),
            "kernels": {
                name: {
                    "ms": round(statistics.median(times), 4),
                    "launches": launches[direction][name][0],
                    "bytes": launches[direction][name][1],
                    "terabytes_per_second": round(launches[direction][name][1] / statistics.median(times) / 1e9, 2),
                }
                for name, times in sorted(kernels.items(), key=lambda item: -statistics.median(item[1]))
            },
        }
        for direction, kernels in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shapes", default=SHAPES, help="batch x length x query heads / key heads x head_dim")
    parser.add_argument("--backends", default="hopper,triton")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device")
    cuda.PART = 10**9  # in one part: a kernel's launches are not cut up
    result: dict[str, Any] = {
        "benchmark": "cuda_stages",
        **environment(),
        "gpu": torch.cuda.get_device_name(),
        "rows": [],
    }
    for text in arguments.shapes.split(","):
        shape = Shape.parse(text)
        for backend in arguments.backends.split(","):
            if reason := unsupported_reason(backend, *operands(shape, 64, torch.bfloat16, "cuda")):
                print(f"{shape} {backend}: {reason}")
                continue
            row = {"shape": str(shape), "backend": backend, **measure(shape, backend)}
            result["rows"].append(row)
            results_file.write(result, arguments.out)
            for direction in ("forward", "backward"):
                print(f"{shape} {backend} {direction}: {row[direction]['whole_ms']:.3f} ms")
                for name, x in row[direction]["kernels"].items():
                    print(f"  {x['ms']:8.4f} ms {x['terabytes_per_second']:6.2f} TB/s {x['launches']:3d} x {name}")
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
