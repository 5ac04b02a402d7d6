"""The report of a table from its JSON alone: Markdown and a plot."""

import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from path_attention.evaluation.tables import percent
from path_attention.reproduction.tables import TABLES, Cell, Table
from path_attention.reproduction.work import read_result
from path_attention.training.run import write_whole

# The share of words without a wrong answer from which on a length counts as solved; figure 2 of the paper.
SOLVED = 0.9
_QUANTITY = {"errors": "rate of wrong answers", "accuracy": "rate of right answers", "solved": "letters solved"}
# Word lengths for which the smallest number of layers is told.
LENGTHS = (4, 8, 12, 16, 20)


def collect(name: str, cells: Sequence[Cell], runs: Path, command: str, seconds: float) -> dict[str, Any]:
    """What the report is made of: the results of all finished cells, and what is missing.

    Args:
        name: of the table, as in TABLES.
        cells: all of them.
        runs: folder of the cells' folders.
        command: that makes them.
        seconds: this call took; those of earlier calls are in the cells.
    """
    found = {cell.name: read_result(cell, runs) for cell in cells}
    return {
        "table": name,
        "command": command,
        "seconds_of_last_call": round(seconds, 1),
        "host": platform.machine(),
        "missing": [cell for cell, result in found.items() if result is None],
        "cells": [result for result in found.values() if result is not None],
    }


def write(numbers: Mapping[str, Any], out: Path) -> list[Path]:
    """Writes OUT/NAME.json, NAME.md and NAME.png, where NAME is that of the table, with -quick for a quick one."""
    out.mkdir(parents=True, exist_ok=True)
    table, name = TABLES[numbers["table"]], file_name(numbers)
    paths = [out / f"{name}.{suffix}" for suffix in ("json", "md", "png")]
    write_whole(paths[0], _text(numbers))
    if not numbers["cells"]:
        return paths[:1]
    write_whole(paths[1], markdown(table, numbers, paths[2].name))
    figure(table, numbers).savefig(paths[2], dpi=130)
    return paths


def _text(numbers: Mapping[str, Any]) -> str:
    """JSON with a line for each cell."""
    head = {key: value for key, value in numbers.items() if key != "cells"}
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    cells = ",\n".join(json.dumps(cell) for cell in numbers["cells"])
    return "{\n" + ",\n".join([*lines, f'"cells": [\n{cells}\n]']) + "\n}\n"


def read(path: Path) -> dict[str, Any]:
    """The JSON that :func:`write` wrote.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is something else.
    """
    numbers = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(numbers, dict) or numbers.get("table") not in TABLES or "cells" not in numbers:
        raise ValueError(f"{path}: wanted the JSON of a table ({', '.join(TABLES)}), got something else")
    return numbers


def file_name(numbers: Mapping[str, Any]) -> str:
    return numbers["table"] + ("-quick" if numbers.get("quick") else "")


def value(table: Table, cell: Mapping[str, Any], measure: str) -> float | None:
    """The number of a cell that the table shows; None where training diverged."""
    found = cell["measures"].get(measure)
    if found is None:
        return None
    rate = found["errors"] / found["count"] if found["count"] else float("nan")
    if table.shows == "solved":
        # Position 0 is "#": after it nothing is asked.
        right = [n / found["sequences"] for n in found["right_up_to"]][1:]
        return float(next((n for n, share in enumerate(right) if share < SOLVED), len(right)))
    return rate if table.shows == "errors" else 1 - rate


Column = tuple[str, str, str]  # variant, measure, label


def _columns(table: Table, numbers: Mapping[str, Any]) -> list[Column]:
    present = {cell["variant"] for cell in numbers["cells"]}
    variants = [v for v in table.variants if v.name in present]
    columns = []
    for variant in variants:
        for measure in table.measures:
            parts = [variant.label] if len(variants) > 1 or len(table.measures) == 1 else []
            parts += [measure.name] if len(table.measures) > 1 else []
            columns.append((variant.name, measure.name, ": ".join(parts)))
    return columns


def _values(table: Table, numbers: Mapping[str, Any], row: str, column: Column) -> list[float]:
    """One for each seed that did not diverge."""
    found = (
        value(table, cell, column[1])
        for cell in numbers["cells"]
        if cell["row"] == row and cell["variant"] == column[0]
    )
    return [x for x in found if x is not None]


def _show(table: Table, x: float) -> str:
    if table.shows == "solved":
        return f"{x:g}"
    return percent(x) if table.shows == "errors" else f"{100 * x:.1f} %"


def _cell_text(table: Table, values: Sequence[float]) -> str:
    """The median over seeds, and their range where they differ."""
    if not values:
        return "-"
    middle, low, high = statistics.median(values), min(values), max(values)
    text = _show(table, middle)
    return text if len(values) == 1 or low == high else f"{text} ({_show(table, low)} to {_show(table, high)})"


def markdown(table: Table, numbers: Mapping[str, Any], picture: str) -> str:
    columns = _columns(table, numbers)
    present = {cell["row"] for cell in numbers["cells"]}
    lines = [f"# {table.title}", "", table.remark, ""]
    if numbers.get("quick"):
        lines += ["The quick version: smaller problems and models, for a CPU. Not to be compared with the paper.", ""]
    lines += ["| | " + " | ".join(c[2] for c in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in table.rows:
        if row.name in present:
            texts = [_cell_text(table, _values(table, numbers, row.name, c)) for c in columns]
            lines.append(f"| {row.label} | " + " | ".join(texts) + " |")
    for label, published in table.published.items():
        lines.append(f"| {label} | " + " | ".join([*published, *[""] * (len(columns) - len(published))]) + " |")
    seeds = len({cell["seed"] for cell in numbers["cells"]})
    lines += ["", f"Median over {seeds} seed{'s' if seeds > 1 else ''}, in parentheses the range."]
    if table.name == "a5":
        lines += ["", *_fewest_layers(table, numbers)]
    lines += ["", f"![{table.title}]({picture})", "", *_answers(table, numbers), "", *_facts(numbers)]
    return "\n".join(lines) + "\n"


def _fewest_layers(table: Table, numbers: Mapping[str, Any]) -> list[str]:
    """The figure's own measure: layers needed for words of a length, by the best seed."""
    lines = [f"Fewest layers that solve words of a length at {SOLVED:.0%} (best seed):", ""]
    lines += ["| | " + " | ".join(str(n) for n in LENGTHS) + " |", "|---" * (len(LENGTHS) + 1) + "|"]
    columns = _columns(table, numbers)
    for row in table.rows:
        best = [max(_values(table, numbers, row.name, c), default=-1.0) for c in columns]
        if max(best) < 0:
            continue
        needed = [next((c[2].split()[0] for c, b in zip(columns, best, strict=True) if b >= n), "-") for n in LENGTHS]
        lines.append(f"| {row.label} | " + " | ".join(needed) + " |")
    return lines


def _answers(table: Table, numbers: Mapping[str, Any]) -> list[str]:
    """What the numbers rest on."""
    parts = []
    for variant, measure, label in _columns(table, numbers):
        found = [
            c["measures"][measure] for c in numbers["cells"] if c["variant"] == variant and measure in c["measures"]
        ]
        if found:
            least = min(found, key=lambda m: m["count"])
            parts.append(f"{label}: {least['count']:,} answers in {least['sequences']:,} sequences")
    return ["Each model was asked (at least): " + "; ".join(parts) + "."]


def _facts(numbers: Mapping[str, Any]) -> list[str]:
    cells = numbers["cells"]
    facts = cells[0]["facts"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = [
        f"{len(cells)} models, {sum(c['facts']['steps'] for c in cells):,} steps; the models' own times add up to "
        f"{sum(c['facts']['seconds'] for c in cells):,.0f} s, {facts['concurrent']} at a time "
        f"in each of {facts['processes']} process(es). {facts['device']}; {versions}.",
        "",
        f"Made by `{numbers['command']}`.",
    ]
    if failed := [f"{c['cell']}: {c['failure']}" for c in cells if c["failure"]]:
        lines += ["", "Diverged, and left out: " + "; ".join(failed) + "."]
    if numbers["missing"]:
        lines += ["", f"Not finished: {', '.join(numbers['missing'])}. The same command goes on with them."]
    return lines


def figure(table: Table, numbers: Mapping[str, Any]) -> Any:
    """The median of each row over the columns, a dot for each seed; models of two reflections are dashed."""
    from matplotlib.figure import Figure

    from path_attention.evaluation.plots import COLOURS

    columns = _columns(table, numbers)
    picture = Figure(figsize=(max(6.0, 1.6 * len(columns) + 3), 4.2), layout="constrained")
    axis = picture.subplots()
    rows = [row for row in table.rows if any(_values(table, numbers, row.name, c) for c in columns)]
    for place, row in enumerate(rows):
        by_column = [_values(table, numbers, row.name, c) for c in columns]
        shift = 0.6 * (place - (len(rows) - 1) / 2) / max(1, len(rows))
        points = [(n + shift, v) for n, values in enumerate(by_column) for v in values]
        middle = [(n + shift, statistics.median(values)) for n, values in enumerate(by_column) if values]
        style = "--" if row.overrides else "-" if len(columns) > 1 and table.shows != "errors" else ""
        colour = COLOURS[row.mixer]
        axis.plot(*zip(*middle, strict=True), style, marker="s", ms=5, color=colour, label=row.label)
        axis.plot(*zip(*points, strict=True), ".", color=colour, ms=5, alpha=0.6)
    if table.shows == "errors":
        # Linear below one error in a hundred thousand, so that 0 has its place.
        axis.set_yscale("symlog", linthresh=1e-5)
        axis.set_ylim(-2e-6, 1)
    axis.set_ylabel(_QUANTITY[table.shows])
    if table.shows == "accuracy":
        axis.set_ylim(0, 1.02)
    if table.shows == "solved":
        axis.set_ylim(bottom=0)
    axis.set_xticks(range(len(columns)), [c[2] for c in columns], fontsize=8, rotation=15 if len(columns) > 4 else 0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return picture
