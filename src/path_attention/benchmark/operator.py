"""``path-attention benchmark operator``: the operator on this machine's CPU beside torch's attention.

A contender that differs from its definition is not timed at all. Then, for every length, forward and forward plus
backward of all contenders in turn, and the memory each adds in a process of its own.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from path_attention.benchmark import results_file
from path_attention.benchmark.contenders import CONTENDERS, Contender, Setting, make_operands
from path_attention.benchmark.measure import (
    Times,
    environment,
    forward,
    forward_backward,
    peak_memory,
    relative_errors,
    time_interleaved,
)

LENGTHS = (1024, 4096, 8192, 16384)
# Five leaves of 64 tokens and an odd end: every kind of step, and the definition still takes well under a second.
CHECKED_LENGTH = 300
# A float32 PaTH may have this many times the error of float32 softmax attention against float64 before it counts as
# wrong. It has 1 to 2 times (docs/numerics.md); a wrong term is off by 1e4 times and more.
ERROR_FACTOR = 8
# Time spent at most on repeats of one contender at one length and pass.
SECONDS_EACH = 30.0


class WrongResult(RuntimeError):
    """A contender does not compute what its definition says, so its time would mean nothing."""


def run_operator_benchmark(
    *, lengths: Sequence[int] = LENGTHS, repeats: int = 10, out: Path | str | None = None
) -> dict[str, Any]:
    """Check, time and weigh every contender; print a table; write all of it as JSON to ``out`` where given.

    Args:
        lengths: sequence lengths, batch 1, 8 heads of 64, float32.
        repeats: timed calls of each, after one to warm up; fewer where they would take minutes.
        out: JSON file, made with its folder.

    Raises:
        ValueError: no file can be written to ``out``.
        WrongResult: before anything is timed.
    """
    path = None if out is None else Path(out)
    results_file.check(path)
    base = Setting(length=0)
    result = {
        "benchmark": "operator",
        **environment(),
        "setting": {**asdict(base), "dtype": str(base.dtype)},
        "errors": check_contenders(base),
        "rows": [],
    }
    for length in lengths:
        print(f"length {length} ...", flush=True)
        result["rows"] += benchmark_length(replace(base, length=length), repeats)
        results_file.write(result, path)  # after every length: the longest ones take minutes
    _print_tables(result)
    if path is not None:
        print(f"written to {path}")
    return result


def check_contenders(base: Setting, contenders: Iterable[Contender] = CONTENDERS) -> dict[str, dict[str, float]]:
    """Relative errors of each against its definition in float64.

    Raises:
        WrongResult: where one is more than ERROR_FACTOR times that of softmax attention (the first contender).
    """
    setting = replace(base, length=CHECKED_LENGTH, query_heads=2, heads=2)
    errors = {x.name: relative_errors(x, setting) for x in contenders}
    yardstick = next(iter(errors.values()))
    for name, found in errors.items():
        for part, error in found.items():
            if not error <= ERROR_FACTOR * yardstick[part]:
                raise WrongResult(
                    f"{name}: the {part} at length {CHECKED_LENGTH} differs from the definition in float64 by "
                    f"{error:.1e}; wanted at most {ERROR_FACTOR} x {yardstick[part]:.1e}. Nothing was timed."
                )
    return errors


def benchmark_length(setting: Setting, repeats: int) -> list[dict[str, Any]]:
    """One row for each contender: times of both passes, memory, and their ratios to the first contender's."""
    reasons = {x.name: x.unsupported_reason(setting) for x in CONTENDERS}
    running = [x for x in CONTENDERS if reasons[x.name] is None]
    operands = make_operands(setting)
    d_out = torch.randn_like(operands.q)
    times: dict[str, dict[str, Times]] = {
        "forward": time_interleaved(
            {x.name: lambda f=x.function: forward(f, operands) for x in running},  # type: ignore[misc]
            repeats,
            SECONDS_EACH,
        ),
        "forward_backward": time_interleaved(
            {x.name: lambda f=x.function: forward_backward(f, operands, d_out) for x in running},  # type: ignore[misc]
            repeats,
            SECONDS_EACH,
        ),
    }
    memory = {x.name: peak_memory(x.name, setting) for x in running}
    first = CONTENDERS[0].name
    rows = []
    for x in CONTENDERS:
        row: dict[str, Any] = {"contender": x.name, "length": setting.length, "left_out": reasons[x.name]}
        if reasons[x.name] is None:
            for part, found in times.items():
                row[part] = asdict(found[x.name])
                row[f"{part}_ratio"] = found[x.name].median_ms / found[first].median_ms
            row["peak_extra_bytes"] = memory[x.name]
        rows.append(row)
    return rows


# --- the table -------------------------------------------------------------------------------------------------------

_COLUMNS = ("length", "attention", "fwd ms", "ratio", "fwd+bwd ms", "ratio", "MiB")


def _cells(row: dict[str, Any]) -> list[str]:
    title = next(x.title for x in CONTENDERS if x.name == row["contender"])
    if row["left_out"] is not None:
        return [str(row["length"]), title, "-", "-", "-", "-", "-"]
    cells = [str(row["length"]), title]
    for part in ("forward", "forward_backward"):
        cells += [f"{row[part]['median_ms']:.1f}", f"{row[f'{part}_ratio']:.2f}"]
    memory = row["peak_extra_bytes"]
    return [*cells, "-" if memory is None else f"{memory / 2**20:.0f}"]


def _print_tables(result: dict[str, Any]) -> None:
    setting, machine = result["setting"], result["machine"]
    title = (
        f"batch {setting['batch']}, {setting['heads']} heads x {setting['dim']}, {setting['dtype']}, "
        f"{machine['cpu']}, {machine['threads']} threads, torch {result['versions']['torch']}"
    )
    rows = [_cells(row) for row in result["rows"]]
    try:
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError:
        print(title)
        for cells in ([*_COLUMNS], *rows):
            print("  ".join(cells))
    else:
        table = Table(title=title)
        for column in _COLUMNS:
            table.add_column(column, no_wrap=True, justify="left" if column == "attention" else "right")
        for cells in rows:
            table.add_row(*cells)
        Console().print(table)
    left_out = {row["left_out"]: row["contender"] for row in result["rows"] if row["left_out"] is not None}
    for reason, name in left_out.items():
        print(f"{name}: {reason}")
    print(f"relative error against the definition in float64, length {CHECKED_LENGTH}:")
    for name, found in result["errors"].items():
        print(f"  {name}: output {found['output']:.1e}, gradients {found['gradients']:.1e}")
