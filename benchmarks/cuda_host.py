"""What a call takes the host on a GPU: the operator's passes, a step of a cache and a prompt, all so short that the GPU
waits.

    python benchmarks/cuda_host.py --out results/NAME.json

Medians of REPEATS stretches of CALLS calls each, from the first to the end of the work of the last, so that a call
counts with its kernels only where these take longer than the host; ``kernels_ms`` says what they take alone. Each with
our launches and, in turn with them, with Triton's own (``ops/kernels/launch.py``). Beside them torch's attention at the
same shape.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from path_attention import PathCache, path_attention
from path_attention.benchmark.measure import environment
from path_attention.benchmark.shapes import Shape, operands
from path_attention.ops.kernels.launch import launched_by_triton

CALLS, REPEATS = 20, 11
SHAPES = "1x1024x8x64,1x1024x16/4x64,1x1024x4x128"
LAUNCHES: dict[str, Callable[[], AbstractContextManager[None]]] = {"ours": nullcontext, "triton": launched_by_triton}


def calls_of(shape: Shape) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    given = operands(shape, shape.length, torch.bfloat16, "cuda")
    wanted = [x.clone().requires_grad_() for x in given]
    d_out = torch.randn_like(given[0])
    softmax = [x.transpose(1, 2).contiguous().requires_grad_() for x in given[:3]]
    d_softmax = torch.randn_like(softmax[0])
    token = operands(shape, 1, torch.bfloat16, "cuda", seed=1)
    cache = PathCache()
    with torch.no_grad():
        cache.attend(*given)
    grouped = shape.query_heads != shape.heads

    def without_gradients(function: Callable[[], object]) -> Callable[[], object]:
        return torch.no_grad()(function)

    def attention() -> torch.Tensor:
        return scaled_dot_product_attention(*softmax, is_causal=True, enable_gqa=grouped)

    return {
        "forward": without_gradients(lambda: path_attention(*given)),
        "forward and backward": lambda: torch.autograd.grad(path_attention(*wanted), wanted, d_out),
        "step": without_gradients(lambda: cache.attend(*token)),
        "prompt": without_gradients(lambda: PathCache().attend(*given)),
        "softmax forward": without_gradients(attention),
        "softmax forward and backward": lambda: torch.autograd.grad(attention(), softmax, d_softmax),
    }


def per_call_ms(function: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        function()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / CALLS * 1e3


def kernels_ms(function: Callable[[], object]) -> float:
    """What the kernels of a call take, one after another."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return sum(x.self_device_time_total for x in profile.key_averages()) / 1e3


def measure(shape: Shape) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, function in calls_of(shape).items():
        times: dict[str, list[float]] = {way: [] for way in LAUNCHES}
        for repeat in range(-1, REPEATS):
            for way, context in LAUNCHES.items():
                with context():
                    ms = per_call_ms(function)
                if repeat >= 0:  # the first compiles
                    times[way].append(ms)
        found[name] = {way: {"median_ms": statistics.median(x), "min_ms": min(x)} for way, x in times.items()}
        found[name]["kernels_ms"] = kernels_ms(function)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shapes", default=SHAPES, help="batch x length x query heads / key heads x head_dim")
    parser.add_argument("--commit", help="of the sources, where git does not tell")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device")
    here = environment()
    result: dict[str, Any] = {
        "benchmark": "cuda_host",
        **here,
        "commit": arguments.commit or here["commit"],
        "gpu": torch.cuda.get_device_name(),
        "calls": CALLS,
        "repeats": REPEATS,
        "rows": [],
    }
    for text in arguments.shapes.split(","):
        shape = Shape.parse(text)
        row = {"shape": str(shape), "calls": measure(shape)}
        result["rows"].append(row)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{shape}: ms a call with our launches, with Triton's, of the kernels alone")
        for name, x in row["calls"].items():
            print(f"  {x['ours']['median_ms']:7.3f} {x['triton']['median_ms']:7.3f} {x['kernels_ms']:7.3f}  {name}")


if __name__ == "__main__":
    main()
