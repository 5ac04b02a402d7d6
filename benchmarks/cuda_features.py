"""Calls that the fastest kernels do not take, on a GPU: float32, several reflections a token, rows past 128 columns.

    python benchmarks/cuda_features.py --out results/NAME.json

By the triton backend and by the torch backend in the same dtype: relative Frobenius error of output and gradients
against the torch backend in float64, median time, and peak memory beside inputs and results. One line a setting,
written as it is done; a second run goes on where the first one ended.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from path_attention import path_attention
from path_attention.benchmark import results_file
from path_attention.benchmark.cuda_measure import peak_extra_bytes
from path_attention.benchmark.measure import environment, time_interleaved

# What a first call costs in compiling is not to count, nor a few disturbances.
REPEATS = 5
SECONDS = 4.0
# Length at which errors are measured: the torch backend in float64 holds whole matrices of a level.
CHECKED_LENGTH = 1024


class Case(NamedTuple):
    dtype: torch.dtype
    dim: int
    reflections: int = 1
    gate: bool = False

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype}, D {self.dim}, R {self.reflections}" + (", gates" if self.gate else "")


CASES = [
    Case(torch.float32, 64),
    Case(torch.float32, 64, gate=True),
    Case(torch.float32, 128),
    Case(torch.float32, 256),
    Case(torch.bfloat16, 64, reflections=2),
    Case(torch.bfloat16, 128, reflections=2, gate=True),
    Case(torch.bfloat16, 256),
    Case(torch.bfloat16, 256, gate=True),
]


def make(case: Case, length: int, heads: int, device: str) -> list[Tensor | None]:
    """q, k, v, w, beta and g: beta uniform in [0, 2]; w, beta and g in float32."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(1, length, *size, generator=generator, device=device)

    q, k, v = (normal(heads, case.dim).to(case.dtype) for _ in range(3))
    w = torch.nn.functional.normalize(normal(case.reflections, heads, case.dim), dim=-1)
    beta = 2 * torch.rand(1, length, case.reflections, heads, generator=generator, device=device)
    g = torch.nn.functional.logsigmoid(normal(heads) + 2) if case.gate else None
    return [None if x is None else x.requires_grad_() for x in (q, k, v, w, beta, g)]


def step(inputs: list[Tensor | None], backend: str, d_out: Tensor) -> list[Tensor]:
    out = path_attention(*inputs, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, [x for x in inputs if x is not None], d_out.to(out))]


def forward(inputs: list[Tensor | None], backend: str) -> Tensor:
    with torch.no_grad():
        return path_attention(*inputs, backend=backend)


def errors(case: Case, backend: str, device: str, length: int) -> dict[str, float]:
    inputs = make(case, length, 2, device)
    d_out = torch.randn(inputs[2].shape, generator=torch.Generator().manual_seed(1)).to(device)
    exact = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    wanted = step(exact, "torch", d_out.to(case.dtype))
    found = step(inputs, backend, d_out)
    relative = [float((x.double() - y).norm() / y.norm()) for x, y in zip(found, wanted, strict=True)]
    return {"output": relative[0], "gradients": max(relative[1:])}


def waited(function: Callable[[], object], device: str) -> Callable[[], object]:
    def run() -> object:
        result = function()
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    return run


def measure(case: Case, backends: list[str], length: int, device: str) -> dict[str, Any]:
    inputs = make(case, length, 1024 // case.dim, device)
    d_out = torch.randn_like(inputs[2])
    functions: dict[str, Callable[[], object]] = {}
    for backend in backends:
        functions[f"{backend} forward"] = lambda backend=backend: forward(inputs, backend)
        functions[f"{backend} forward + backward"] = lambda backend=backend: step(inputs, backend, d_out)
    for function in functions.values():
        waited(function, device)()  # compiles
    times = time_interleaved({name: waited(x, device) for name, x in functions.items()}, REPEATS, SECONDS)
    row: dict[str, Any] = {"case": case.name, "length": length, "heads": 1024 // case.dim}
    row["ms"] = {name: x.median_ms for name, x in times.items()}
    row["errors"] = {x: errors(case, x, device, min(length, CHECKED_LENGTH)) for x in backends}
    if device == "cuda":
        row["peak_bytes"] = {name: peak_extra_bytes(x) for name, x in functions.items() if "backward" in name}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8192, help="tokens of the one sequence that is timed (8192)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: the torch backend alone")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    backends = ["triton", "torch"] if arguments.device == "cuda" else ["torch"]
    rows = json.loads(arguments.out.read_text())["rows"] if arguments.out.exists() else []
    done = {(x["case"], x["length"]) for x in rows}
    result = {"benchmark": "cuda features", **environment()}
    if arguments.device == "cuda":
        result["gpu"] = torch.cuda.get_device_name()
    for case in CASES:
        if (case.name, arguments.length) in done:
            continue
        rows.append(measure(case, backends, arguments.length, arguments.device))
        results_file.write({**result, "rows": rows}, arguments.out)
        print(json.dumps(rows[-1]), flush=True)


if __name__ == "__main__":
    main()
