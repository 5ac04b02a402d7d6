"""Error, time and memory of a contender; and what machine it was."""

import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from path_attention.benchmark.contenders import Contender, Operands, Setting, make_operands


def forward(function: Callable[..., Tensor], operands: Operands) -> Tensor:
    with torch.no_grad():
        return function(*operands)


def forward_backward(
    function: Callable[..., Tensor], operands: Operands, d_out: Tensor
) -> tuple[Tensor, *tuple[Tensor | None, ...]]:
    """out and the gradients of q, k, v, w and beta; None where the function does not use them."""
    out = function(*operands)
    return out.detach(), *torch.autograd.grad(out, operands, d_out, allow_unused=True)


# --- error -----------------------------------------------------------------------------------------------------------


def relative_errors(of: Contender, setting: Setting) -> dict[str, float]:
    """Frobenius norm of the difference to the definition in float64 over that of the definition; of the gradients
    that there are, the largest."""
    operands = make_operands(setting)
    exact_operands = Operands(*(x.detach().double().requires_grad_() for x in operands))
    d_out = torch.randn(*operands.q.shape[:3], operands.v.shape[-1], generator=torch.Generator().manual_seed(1))
    d_out = d_out.to(operands.q)
    found = forward_backward(of.function, operands, d_out)
    exact = forward_backward(of.definition, exact_operands, d_out.double())
    errors = [
        float((x.double() - y).norm() / y.norm())
        for x, y in zip(found, exact, strict=True)
        if x is not None and y is not None
    ]
    return {"output": errors[0], "gradients": max(errors[1:])}


# --- time ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Times:
    median_ms: float
    min_ms: float
    max_ms: float
    repeats: int

    @classmethod
    def of(cls, seconds: list[float]) -> "Times":
        ms = [1e3 * x for x in seconds]
        return cls(statistics.median(ms), min(ms), max(ms), len(ms))


def time_interleaved(functions: dict[str, Callable[[], object]], repeats: int, seconds_each: float) -> dict[str, Times]:
    """Median, smallest and largest time of each function, called in turn so that a disturbance meets all of them.

    Each is called once to warm up, then up to ``repeats`` times; one that would take longer than ``seconds_each`` in
    all is called less often. Where the first call alone takes that long, it is the measurement.
    """

    def seconds(function: Callable[[], object]) -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    first = {name: seconds(function) for name, function in functions.items()}
    taken = {name: [x] if x >= seconds_each else [] for name, x in first.items()}
    for repeat in range(repeats):
        for name, function in functions.items():
            if (repeat == 0 and not taken[name]) or (repeat + 1) * first[name] < seconds_each:
                taken[name].append(seconds(function))
    return {name: Times.of(x) for name, x in taken.items()}


# --- memory ----------------------------------------------------------------------------------------------------------

# glibc then gives every buffer back to the system when it is freed, so that resident memory follows live tensors.
_MEMORY_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
# Where Linux tells a process its resident memory and its peak, and lets it start the peak anew.
STATUS = Path("/proc/self/status")
CLEAR_PEAK = Path("/proc/self/clear_refs")


def peak_memory(name: str, setting: Setting) -> int | None:
    """Bytes that forward and backward add at most to the resident memory of a fresh process that holds the inputs.

    None where the system does not tell (it takes Linux's /proc), or where the process did not live to tell.
    """
    if not (STATUS.exists() and CLEAR_PEAK.exists()):
        return None
    described = {**asdict(setting), "dtype": str(setting.dtype).removeprefix("torch.")}
    command = [sys.executable, "-m", "path_attention.benchmark.memory_process", name, json.dumps(described)]
    done = subprocess.run(command, env={**os.environ, **_MEMORY_ENVIRONMENT}, capture_output=True, text=True)
    return int(done.stdout) if done.returncode == 0 else None


# --- the machine -----------------------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """Machine, versions, command, date and commit: what a number means nothing without."""
    return {
        "command": _command(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def _command() -> str:
    """As somebody else would type it: of paths that are only this machine's, the names alone."""
    script = Path(sys.argv[0])
    program = ["python", f"benchmarks/{script.name}"] if script.parent.name == "benchmarks" else ["path-attention"]
    return shlex.join([*program, *(Path(x).name if Path(x).is_absolute() else x for x in sys.argv[1:])])


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _commit() -> str | None:
    """Of the checkout this file lies in, with "+" where its sources differ from it; None outside of one."""
    here = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "ops", "benchmark")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
