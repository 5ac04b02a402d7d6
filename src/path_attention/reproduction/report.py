"""The report of a table from its JSON alone: Markdown and a plot."""

import json
import os
import platform
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from path_attention.evaluation.tables import percent
from path_attention.reproduction.tables import TABLES, Cell, GiveUp, Table, cells
from path_attention.reproduction.work import check_recipe
from path_attention.training.run import write_whole

# The share of words without a wrong answer from which on a length counts as solved; figure 2 of the paper.
SOLVED = 0.9
_QUANTITY = {"errors": "rate of wrong answers", "accuracy": "rate of right answers", "solved": "letters solved"}
# Word lengths for which the smallest number of layers is told.
LENGTHS = (4, 8, 12, 16, 20)


def kept(name: str, quick: bool, overrides: Sequence[str], file: Path) -> dict[str, dict[str, Any]]:
    """The finished cells of an earlier call in a table's JSON, by name; none where there is no file.

    All of them count, also those that this call does not ask for: rows and seeds only ever join a table. Each was made
    by the recipe that it would have now.

    Raises:
        ValueError: the file is something else, or holds a cell of another recipe.
    """
    if not file.is_file():
        return {}
    earlier = read(file)
    if earlier["table"] != name or bool(earlier.get("quick")) != quick:
        raise ValueError(f"{file}: wanted the JSON of {name}, got that of {file_name(earlier)}: give another --out")
    results = {result["cell"]: result for result in earlier["cells"]}
    seeds = max((result["seed"] for result in results.values()), default=0) + 1
    known = {cell.name: cell for cell in cells(name, quick=quick, seeds=seeds, overrides=overrides)}
    for cell, result in results.items():
        if cell not in known:
            raise ValueError(f"{file} holds {cell}, which {name} does not have: give another --out, or move it aside")
        check_recipe(result, known[cell], f"{cell} in {file}", "--out")
        # Of results that do not say it themselves: what is known of the call that wrote them.
        result.setdefault("made", {key: earlier.get(key) for key in ("date", "commit", "command")})
    return results


def collect(name: str, wanted: Sequence[Cell], results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the report is made of: all results, in the table's order, and what is missing.

    Args:
        name: of the table, as in TABLES.
        wanted: the cells that were asked for.
        results: of finished cells by name, among them others than those.
    """
    table = TABLES[name]
    variants, rows = [v.name for v in table.variants], [r.name for r in table.rows]

    def place(cell: Mapping[str, Any]) -> tuple[int, int, int]:
        return cell["seed"], variants.index(cell["variant"]), rows.index(cell["row"])

    return {
        "table": name,
        "host": platform.machine(),
        "missing": [cell.name for cell in wanted if cell.name not in results],
        "cells": sorted(results.values(), key=place),
    }


def write_json(numbers: Mapping[str, Any], out: Path) -> Path:
    """Writes OUT/NAME.json alone, at once or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{file_name(numbers)}.json"
    write_whole(path, _text(numbers))
    return path


def write(numbers: Mapping[str, Any], out: Path) -> list[Path]:
    """Writes OUT/NAME.json, NAME.md and NAME.png, where NAME is that of the table, with -quick for a quick one."""
    table, name = TABLES[numbers["table"]], file_name(numbers)
    paths = [write_json(numbers, out), out / f"{name}.md", out / f"{name}.png"]
    if not numbers["cells"]:
        return paths[:1]
    write_whole(paths[1], markdown(table, numbers, paths[2].name))
    partial = paths[2].with_name(f"{paths[2].name}.{os.getpid()}.partial")
    figure(table, numbers).savefig(partial, dpi=130, format="png")
    os.replace(partial, paths[2])
    return paths


def _text(numbers: Mapping[str, Any]) -> str:
    """JSON with a line for each cell."""
    head = {key: value for key, value in numbers.items() if key != "cells"}
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    cells = ",\n".join(json.dumps(cell) for cell in numbers["cells"])
    return "{\n" + ",\n".join([*lines, f'"cells": [\n{cells}\n]']) + "\n}\n"


def read_json(path: Path) -> Any:
    """What the file holds; a ValueError that names it, if that is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one too
        raise ValueError(f"{path}: no JSON: {error}") from error


def read(path: Path) -> dict[str, Any]:
    """The JSON that :func:`write` wrote.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is something else.
    """
    numbers = read_json(path)
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
    lines += ["", _seeds(table, numbers)]
    if table.name == "a5":
        lines += ["", *_fewest_layers(table, numbers)]
    lines += ["", f"![{table.title}]({picture})", "", *_answers(table, numbers), "", *_facts(table, numbers)]
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


def _seeds(table: Table, numbers: Mapping[str, Any]) -> str:
    """Over how many seeds the medians are, which may differ from row to row."""
    counts: dict[str, list[str]] = {}
    for row in table.rows:
        per_column = Counter(cell["variant"] for cell in numbers["cells"] if cell["row"] == row.name)
        if per_column:
            low, high = min(per_column.values()), max(per_column.values())
            text = f"{low} seed{'s' if low > 1 else ''}" if low == high else f"{low} to {high} seeds"
            counts.setdefault(text, []).append(row.label)
    if list(counts) == ["1 seed"]:
        return "One seed."
    if len(counts) == 1:
        return f"Median over {next(iter(counts))}, in parentheses the range."
    parts = "; ".join(f"{', '.join(labels)}: {text}" for text, labels in counts.items())
    return f"Medians, in parentheses the range. {parts}."


def _facts(table: Table, numbers: Mapping[str, Any]) -> list[str]:
    cells = numbers["cells"]
    lines = [
        f"{len(cells)} models, {sum(c['facts']['steps'] for c in cells):,} steps; the models' own times add up to "
        f"{sum(c['facts']['seconds'] for c in cells):,.0f} s. {_machines(table, numbers)}",
        "",
        f"Made by {_commands(numbers)}.",
    ]
    if table.give_up and (ended := [c["cell"] for c in cells if _given_up(table.give_up, c)]):
        lines += [
            "",
            f"Ended after {100 * table.give_up.share:.0f} % of the steps, for more than "
            f"{100 * table.give_up.above:.0f} % of the answers were wrong: {', '.join(ended)}.",
        ]
    if failed := [f"{c['cell']}: {c['failure']}" for c in cells if c["failure"]]:
        lines += ["", "Diverged, and left out: " + "; ".join(failed) + "."]
    if numbers["missing"]:
        lines += ["", f"Not finished: {', '.join(numbers['missing'])}. The same command goes on with them."]
    return lines


def _given_up(limit: GiveUp, cell: Mapping[str, Any]) -> bool:
    short = cell["facts"]["steps"] < cell["recipe"]["training"]["steps"]
    return short and bool(cell["curve"]) and cell["curve"][-1][1] > limit.above


def _commands(numbers: Mapping[str, Any]) -> str:
    """Each command once, in the order of its first cell."""
    found = [_made(cell, numbers).get("command") or numbers["command"] for cell in numbers["cells"]]
    return ", ".join(f"`{command}`" for command in dict.fromkeys(found))


def _made(cell: Mapping[str, Any], numbers: Mapping[str, Any]) -> Mapping[str, Any]:
    """Date, commit and command: the cell's own, or of a JSON that has them for all."""
    return cell.get("made") or {key: numbers.get(key) for key in ("date", "commit", "command")}


def _machines(table: Table, numbers: Mapping[str, Any]) -> str:
    """Where, with what and when the models were made: once, or where that differs with the models of each."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for cell in numbers["cells"]:
        found.setdefault(_machine(cell, _made(cell, numbers)), []).append(cell)
    if len(found) == 1:
        return f"{next(iter(found))}."
    parts = (f"- {_models(table, of)}: {text}." for text, of in found.items())
    return "\n".join(["Of them", "", *parts])


def _machine(cell: Mapping[str, Any], made: Mapping[str, Any]) -> str:
    facts = cell["facts"]
    processes, gpus = facts["processes"], facts.get("gpus") or 1
    where = f"in each of {processes} processes" if processes > 1 else "in one process"
    where += f" on {gpus} GPUs" if gpus > 1 else ""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    date = made["date"][:10] if made.get("date") else "date not recorded"
    commit = f"commit {made['commit']}" if made.get("commit") else "commit not recorded"
    return f"{facts['device']}, {facts['concurrent']} models at a time {where}; {versions}; {date}, {commit}"


def _models(table: Table, cells: Sequence[Mapping[str, Any]]) -> str:
    """Rows and, of each, how many models with which seeds."""
    parts = []
    for row in table.rows:
        if seeds := [cell["seed"] for cell in cells if cell["row"] == row.name]:
            numbers = ", ".join(str(seed) for seed in sorted(set(seeds)))
            parts.append(f"{len(seeds)} of {row.label} (seed{'s' if len(set(seeds)) > 1 else ''} {numbers})")
    return ", ".join(parts)


# Line and mark of a mixer's first, second and third row.
_STYLES = (("-", "s"), ("--", "D"), (":", "^"))


def figure(table: Table, numbers: Mapping[str, Any]) -> Any:
    """The median of each row over the columns, a dot for each seed. Rows of one mixer have one colour; those with
    changes of its model are hollow, with lines and marks of their own.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from path_attention.evaluation.plots import COLOURS

    columns = _columns(table, numbers)
    picture = Figure(figsize=(max(6.0, 1.6 * len(columns) + 3), 4.2), layout="constrained")
    axis = picture.subplots()
    rows = [row for row in table.rows if any(_values(table, numbers, row.name, c) for c in columns)]
    # A line says that what is between two columns is between their values.
    in_order = len(columns) > 1 and len(table.measures) == 1
    for place, row in enumerate(rows):
        by_column = [_values(table, numbers, row.name, c) for c in columns]
        shift = 0.6 * (place - (len(rows) - 1) / 2) / max(1, len(rows))
        points = [(n + shift, v) for n, values in enumerate(by_column) for v in values]
        middle = [(n + shift, statistics.median(values)) for n, values in enumerate(by_column) if values]
        line, mark = _STYLES[[other.name for other in rows if other.mixer == row.mixer].index(row.name)]
        style = line if in_order else "none"
        colour = COLOURS[row.mixer]
        face = "none" if row.overrides else colour
        axis.plot(*zip(*middle, strict=True), ls=style, marker=mark, ms=5, color=colour, mfc=face, label=row.label)
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
        axis.yaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axis.set_xticks(range(len(columns)), [c[2].replace(": ", "\n").replace(", ", "\n") for c in columns], fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return picture
