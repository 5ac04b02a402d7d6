"""``path-attention benchmark operator --device cuda``: this library's backends beside cuDNN's causal attention, which
is what a RoPE model pays, FlashAttention-2, FlexAttention and flash-linear-attention's kernels.

Of every shape first the error of each contender against float64 at that very shape; one that is wrong is not timed.
Then peak memory, and the times of all in turn. Finished shapes are in the file at once, and the same command goes on
behind them.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from path_attention.benchmark import cuda_measure, results_file
from path_attention.benchmark.cuda_contenders import (
    CUDA_CONTENDERS,
    Arguments,
    CudaContender,
    make_arguments,
    without,
)
from path_attention.benchmark.cuda_measure import DeviceLost, Exact, attempt, one_line, run
from path_attention.benchmark.measure import environment
from path_attention.benchmark.operator import WrongResult
from path_attention.benchmark.shapes import Shape
from path_attention.ops.backends import AUTO, choose

DTYPE = torch.bfloat16
# 16k tokens of 2048 channels, then longer ones and grouped queries: where attention kernels are usually compared.
SHAPES = (
    *(f"{16384 // n}x{n}x{2048 // dim}x{dim}" for dim in (64, 128) for n in (128, 256, 512, 1024, 2048, 4096, 8192)),
    "1x32768x32x64",
    "1x32768x16x128",
    "2x8192x32/8x128",
    "1x131072x8x64",
)
# Figure 1 of the paper: batch 32, 32 heads of 64.
FIGURE_SHAPES = tuple(f"32x{n}x32x64" for n in (512, 1024, 2048, 4096, 8192))
QUICK_SHAPES = ("16x1024x32x64", "8x2048x32x64", "2x8192x32x64", "2x8192x16x128", "1x32768x32x64")
# FlexAttention is compiled for every shape, some ten seconds each: where no shapes are asked for, at one a head dim.
FLEX_SHAPES = ("2x8192x32x64", "2x8192x16x128")
QUICK_WITHOUT = ("flex", "fla", "path_sdpa")
REPEATS, QUICK_REPEATS = 7, 3
# How many times the error of cuDNN's attention on the same q, k and v a result may have. Rounding makes it 1 to 3 times
# (fla's PaTH is at the upper end); a wrong term is off by a hundred times and more.
ERROR_FACTOR = 4
# Where cuDNN's attention does not run: half the distance of two bfloat16 numbers near 1.
ROUNDING = {"output": torch.finfo(DTYPE).eps / 2, "gradients": torch.finfo(DTYPE).eps / 2}
# Results are continued where these are the same.
_SAME = ("benchmark", "commit", "gpu", "versions", "dtype", "options")
BASELINE = CUDA_CONTENDERS[0].name


def run_cuda_operator_benchmark(
    *,
    shapes: Sequence[str] | None = None,
    quick: bool = False,
    left_out: Sequence[str] = (),
    repeats: int | None = None,
    device: str = "cuda",
    out: Path | str | None = None,
    commit: str | None = None,
) -> dict[str, Any]:
    """Check, time and weigh every contender at every shape; print the table; write JSON and a figure beside it.

    Args:
        shapes: as :meth:`Shape.parse` reads them; None for SHAPES and FIGURE_SHAPES.
        quick: fewer shapes, contenders and repeats, where they are not given.
        left_out: contenders or groups of them, as :func:`cuda_contenders.without` reads them.
        repeats: timed measurements of each; fewer where they would take more than a second.
        device: of CUDA.
        out: JSON file, written after every shape. One that is there already is continued.
        commit: of the sources, where git does not tell.

    Raises:
        ValueError: an argument of another form.
        FileExistsError: ``out`` holds results of other sources, versions, options or another GPU, or is damaged.
        WrongResult: after everything that is right was timed, where a backend of this library is wrong.
        DeviceLost: a contender broke the device; where there is a file the same command goes on without it.
    """
    parsed = [Shape.parse(text) for text in shapes or (QUICK_SHAPES if quick else (*SHAPES, *FIGURE_SHAPES))]
    names = tuple(left_out) or (QUICK_WITHOUT if quick else ())
    contenders = without(names)
    repeats = repeats or (QUICK_REPEATS if quick else REPEATS)
    packages = ["triton", *(["fla"] if any(x.name.startswith("fla_") for x in contenders) else [])]
    fresh = describe(device, commit, packages) | {"options": {"repeats": repeats, "without": list(names)}}
    path = None if out is None else Path(out)
    result = results_file.resume(fresh, path, _SAME)
    done = {row["shape"] for row in result["rows"]}
    for shape in parsed:
        if str(shape) in done:
            continue
        broken = result["broken"].get(str(shape), {})
        try:
            row = measure_shape(shape, contenders, broken, repeats, device, everywhere=shapes is not None)
        except DeviceLost as error:
            result["broken"][str(shape)] = {**broken, error.name: f"broke the device: {error.reason}"}
            results_file.write(result, path)
            raise
        result["rows"].append(row)
        results_file.write(result, path)
        print_row(row)
    if path is not None:
        print(f"written to {path}")
        _draw(result, path.with_suffix(".png"))
    wrong = [f"{row['shape']} {name}" for row in result["rows"] for name in row["wrong"]]
    if wrong:
        raise WrongResult(f"wrong, and not timed: {', '.join(wrong)}")
    return result


# --- the file --------------------------------------------------------------------------------------------------------


def describe(device: str, commit: str | None, packages: Sequence[str]) -> dict[str, Any]:
    """What the numbers mean nothing without, and no rows yet."""
    result: dict[str, Any] = {"benchmark": "cuda_operator", **environment()}
    result["commit"] = commit or result["commit"]
    result["gpu"] = torch.cuda.get_device_name(device)
    result["versions"] |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    result["versions"] |= {name: _version(name) for name in packages if find_spec(name) is not None}
    return result | {"dtype": str(DTYPE).removeprefix("torch."), "rows": [], "broken": {}}


def _version(package: str) -> str:
    try:
        return str(importlib.import_module(package).__version__)
    except Exception as error:  # of another project's import, which its contenders then report too
        return one_line(error)


def _draw(result: dict[str, Any], path: Path) -> None:
    try:
        from path_attention.benchmark.cuda_figure import draw
    except ModuleNotFoundError as error:
        print(f"no figure: {error.name} is not installed")
        return
    if draw(result, path):
        print(f"figure: {path}")


# --- one shape -------------------------------------------------------------------------------------------------------


def measure_shape(
    shape: Shape,
    contenders: Sequence[CudaContender],
    broken: dict[str, str],
    repeats: int,
    device: str,
    *,
    everywhere: bool,
) -> dict[str, Any]:
    """A row of the results. ``broken`` are contenders that broke the device before; ``everywhere``: FlexAttention too.

    Raises:
        DeviceLost: see there.
    """
    row: dict[str, Any] = {"shape": str(shape), **asdict(shape), "auto": {}, "wrong": []}
    given = attempt("operands", partial(make_arguments, shape, DTYPE, device))
    if isinstance(given, Exception):
        return row | {"contenders": {x.name: {"left_out": f"operands: {one_line(given)}"} for x in contenders}}
    d_out = torch.randn_like(given.q)
    reasons = {x.name: broken.get(x.name) or _reason(x, shape, given, everywhere) for x in contenders}
    found: dict[str, dict[str, Any]] = {name: {"left_out": reason} for name, reason in reasons.items() if reason}
    running = [x for x in contenders if not reasons[x.name]]
    right, row["wrong"] = _check(running, given, d_out, found)
    for x in list(right):
        memory = attempt(x.name, partial(cuda_measure.peak_extra_bytes, partial(run, x, given, d_out)))
        if isinstance(memory, Exception):
            found[x.name]["failed"] = one_line(memory)
            right.remove(x)
        else:
            found[x.name]["peak_extra_bytes"] = memory
    _time(right, given, d_out, repeats, found)
    _ratios(found)
    return row | {"auto": _auto(given), "contenders": {x.name: found[x.name] for x in contenders}}


def _reason(contender: CudaContender, shape: Shape, given: Arguments, everywhere: bool) -> str | None:
    if contender.name == "flex" and not everywhere and str(shape) not in FLEX_SHAPES:
        return f"compiled anew for every shape: here at {' and '.join(FLEX_SHAPES)} only"
    return contender.unsupported_reason(shape, given)


def _auto(given: Arguments) -> dict[str, str]:
    """Which backend serves the call where the caller names none."""
    w = given.w.unsqueeze(2)
    return {
        f"{formula}_{'backward' if is_backward else 'forward'}": choose(
            AUTO, given.q, given.v, w, g, None, is_backward=is_backward
        )
        for formula, g in (("path", None), ("path_fox", given.g))
        for is_backward in (False, True)
    }


def _check(
    contenders: Sequence[CudaContender], given: Arguments, d_out: Tensor, found: dict[str, dict[str, Any]]
) -> tuple[list[CudaContender], list[str]]:
    """Those that are right, and names of this library's that are wrong; errors and failures go to ``found``."""
    exact, allowed = Exact(given, d_out), ROUNDING
    right, wrong = [], []
    for x in contenders:
        errors = attempt(x.name, lambda x=x: exact.errors(x.formula, run(x, given, d_out)))  # type: ignore[misc]
        if isinstance(errors, Exception):
            found[x.name] = {"failed": one_line(errors)}
            continue
        found[x.name] = {"errors": errors}
        if x.name == BASELINE:
            allowed = errors
        too_much = [part for part in errors if not errors[part] <= ERROR_FACTOR * allowed[part]]
        if not too_much or x.name == BASELINE:
            right.append(x)
            continue
        found[x.name]["failed"] = f"wrong: {' and '.join(too_much)} more than {ERROR_FACTOR} times cuDNN's error"
        if x.ours:
            wrong.append(x.name)
    return right, wrong


def _time(
    contenders: Sequence[CudaContender],
    given: Arguments,
    d_out: Tensor,
    repeats: int,
    found: dict[str, dict[str, Any]],
) -> None:
    def forward(x: CudaContender) -> Tensor:
        with torch.no_grad():
            return x.function(*given)

    parts: dict[str, Callable[[CudaContender], object]] = {
        "forward": forward,
        "forward_backward": lambda x: run(x, given, d_out),
    }
    for part, function in parts.items():
        times = cuda_measure.time_in_turn({x.name: partial(function, x) for x in contenders}, repeats)
        torch.cuda.empty_cache()  # the memory of this part's graphs
        for name, taken in times.items():
            if isinstance(taken, Exception):
                found[name]["failed"] = f"{part}: {one_line(taken)}"
            else:
                found[name][part] = asdict(taken)
    for x in found.values():
        if "forward" in x and "forward_backward" in x:
            # Not timed by itself: its graph would have to begin in the midst of autograd's.
            difference = x["forward_backward"]["median_ms"] - x["forward"]["median_ms"]
            x["backward"] = {"median_ms": difference, "timed_by": "difference of the other two medians"}


def _ratios(found: dict[str, dict[str, Any]]) -> None:
    """To cuDNN's of the same row."""
    baseline = found.get(BASELINE, {})
    for x in found.values():
        for part in ("forward", "backward", "forward_backward"):
            if part in x and part in baseline:
                x[f"{part}_ratio"] = x[part]["median_ms"] / baseline[part]["median_ms"]
        if "peak_extra_bytes" in x and baseline.get("peak_extra_bytes"):
            x["memory_ratio"] = x["peak_extra_bytes"] / baseline["peak_extra_bytes"]


# --- the table -------------------------------------------------------------------------------------------------------

_PARTS = {"forward": "fwd ms", "backward": "bwd ms", "forward_backward": "f+b ms"}


def print_row(row: dict[str, Any]) -> None:
    """One shape's part of the table, a line a contender; * marks times that include the host's."""
    auto = row["auto"]
    chosen = ", ".join(f"{part.replace('_', ' ')} {backend}" for part, backend in auto.items())
    print(f"\n{row['shape']}   (auto: {chosen})")
    head = " ".join(f"{x:>8} {'ratio':>6}" for x in (*_PARTS.values(), "MiB"))
    print(f"{'':>16} {head} {'err out':>8} {'err grad':>8}")
    for name, x in row["contenders"].items():
        print(f"{name:>16} {_cells(x)}", flush=True)


def _cells(x: dict[str, Any]) -> str:
    if "left_out" in x or "failed" in x:
        return f"- {x.get('failed') or x['left_out']}"
    cells = []
    for part in _PARTS:
        mark = "*" if x[part]["timed_by"].startswith("events") else ""
        cells.append(f"{x[part]['median_ms']:.3f}{mark}".rjust(8) + _ratio(x, part))
    cells.append(f"{x['peak_extra_bytes'] / 2**20:8.0f}" + _ratio(x, "memory"))
    return " ".join([*cells, f"{x['errors']['output']:8.1e} {x['errors']['gradients']:8.1e}"])


def _ratio(x: dict[str, Any], part: str) -> str:
    return f" {x[f'{part}_ratio']:6.2f}" if f"{part}_ratio" in x else f" {'-':>6}"
