"""What a call takes the host on a GPU: the operator's passes, a step of a cache and a prompt, all so short that the GPU
waits.

    python benchmarks/cuda_host.py --out results/NAME.json

Times in the JSON are of stretches of CALLS calls each, from the first to the end of the work of the last, so that
kernels count only where they take longer than the host; ``kernels_ms`` says what those of one call take alone. Each
with our launches and, in turn with them, with Triton's own (``ops/kernels/launch.py``). Beside them torch's attention
at the same shape.
"""

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from path_attention import PathCache, path_attention
from path_attention.benchmark import results_file
from path_attention.benchmark.measure import environment, time_interleaved
from path_attention.benchmark.shapes import Shape, operands
from path_attention.ops.kernels.launch import launched_by_triton

CALLS, REPEATS = 20, 11
SECONDS = 20.0  # for all repeats at most
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


def stretch(function: Callable[[], object], launches: Callable[[], AbstractContextManager[None]]) -> None:
    with launches():
        for _ in range(CALLS):
            function()
    torch.cuda.synchronize()


def kernels_ms(function: Callable[[], object]) -> float:
    """What the kernels of a call take, one after another."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return sum(x.self_device_time_total for x in profile.key_averages()) / 1e3


def measure(shape: Shape) -> dict[str, Any]:
    """Of every call: times of CALLS of them by either way, and what the kernels of one take."""
    found: dict[str, Any] = {}
    for name, function in calls_of(shape).items():
        ways = {way: partial(stretch, function, context) for way, context in LAUNCHES.items()}
        times = {way: asdict(x) for way, x in time_interleaved(ways, REPEATS, SECONDS).items()}
        found[name] = {**times, "kernels_ms": kernels_ms(function)}
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
        results_file.write(result, arguments.out)
        print(f"{shape}: ms a call with our launches, with Triton's, of the kernels alone")
        for name, x in row["calls"].items():
            ours, triton = (x[way]["median_ms"] / CALLS for way in LAUNCHES)
            print(f"  {ours:7.3f} {triton:7.3f} {x['kernels_ms']:7.3f}  {name}")


if __name__ == "__main__":
    main()
