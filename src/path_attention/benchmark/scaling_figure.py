"""The figure of ``path-attention benchmark scaling``, from its JSON alone.

python -m path_attention.benchmark.scaling_figure results/NAME.json
"""

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from path_attention.benchmark.scaling import FORMULAS, summary

_COLOURS = {1: "black", 2: "#1f78b4", 4: "#e76f51", 8: "#33a02c"}


def draw(result: dict[str, Any], path: Path) -> bool:
    """Write the figure of the results to a PNG file; False where nothing was timed."""
    if not _timed(result):
        return False
    figure(result).savefig(path, dpi=130)
    return True


def _timed(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [r for r in result["rows"] if r["kind"] == "time" and "forward_backward" in r]


def figure(result: dict[str, Any]) -> Figure:
    """Time, efficiency and memory by length, and where it was looked for the end of memory; a row a formula."""
    rows = _timed(result)
    formulas = [f for f in FORMULAS if any(r["formula"] == f for r in rows)]
    longest = [r for r in result["rows"] if r["kind"] == "longest" and "equivalent_length" in r]
    panels = 4 if longest else 3
    picture = Figure(figsize=(1.4 + 4.2 * panels, 0.8 + 3.4 * len(formulas)), layout="constrained")
    grid = picture.subplots(len(formulas), panels, squeeze=False)
    for formula, (time, efficiency, memory, *end) in zip(formulas, grid, strict=True):
        of_formula = [r for r in rows if r["formula"] == formula]
        _by_devices(time, of_formula, lambda r: r["forward_backward"]["median_ms"])
        time.set_title(f"{formula}: forward + backward, ms", loc="left", fontsize=10)
        _logarithmic(time, 1, 2, 5)
        _efficiencies(efficiency, result, formula)
        if any(r["peak_bytes"] for r in of_formula):
            _by_devices(memory, of_formula, lambda r: r["peak_bytes"] / 2**30)
            _logarithmic(memory, 1, 2, 3, 4, 6, 8)
        memory.set_title("peak memory of a device, GiB", loc="left", fontsize=10)
        lengths = sorted({r["length"] for r in of_formula})
        for axis in (time, efficiency, memory):
            axis.set_xscale("log", base=2)
            axis.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
            axis.minorticks_off()
            axis.set_xlabel("length")
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(axis="y", lw=0.3)
        time.legend(title="devices", fontsize=8, frameon=False)
        for axis in end:
            _end_of_memory(axis, [r for r in longest if r["formula"] == formula], result["options"]["heads"])
    options, versions = result["options"], result["versions"]
    picture.suptitle(
        f"{result['devices'][0]}, {options['dtype']}, {options['heads']} heads x {options['dim']}, "
        f"torch {versions['torch']}",
        fontsize=10,
    )
    return picture


def _by_devices(axis: Axes, rows: list[dict[str, Any]], value: Any) -> None:
    for ranks in sorted({r["ranks"] for r in rows}):
        points = sorted((r["length"], value(r)) for r in rows if r["ranks"] == ranks)
        axis.plot(*zip(*points, strict=True), marker="o", ms=3, color=_COLOURS.get(ranks, "grey"), label=str(ranks))


def _logarithmic(axis: Axes, *steps: int) -> None:
    """Ticks at these parts of a power of ten, so that there are some however little the values span."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=steps))
    axis.yaxis.set_major_formatter("{x:g}")


def _end_of_memory(axis: Axes, rows: list[dict[str, Any]], heads: int) -> None:
    """Bars, with what each is of the fewest devices' by their number."""
    axis.set_title(f"longest, millions of tokens of {heads} heads", loc="left", fontsize=10)
    axis.set_xlabel("devices")
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(y=0.12)
    if not rows:
        return
    rows = sorted(rows, key=lambda r: r["ranks"])
    lengths, ranks = [r["equivalent_length"] for r in rows], [r["ranks"] for r in rows]
    shares = [length / n / (lengths[0] / ranks[0]) for length, n in zip(lengths, ranks, strict=True)]
    places = range(len(rows))
    bars = axis.bar(places, [x / 1e6 for x in lengths], color=[_COLOURS.get(n, "grey") for n in ranks])
    labels = [f"{x / 1e6:.2f} ({share:.0%})" for x, share in zip(lengths, shares, strict=True)]
    axis.bar_label(bars, labels, fontsize=8, padding=2)
    axis.set_xticks(places, [str(n) for n in ranks])


def _efficiencies(axis: Axes, result: dict[str, Any], formula: str) -> None:
    """Strong scaling in lines, weak in crosses."""
    entries = [e for e in summary(result) if e["formula"] == formula]
    for ranks in sorted({e["ranks"] for e in entries}):
        colour = _COLOURS.get(ranks, "grey")
        strong = sorted((e["length"], e["strong"]["forward_backward"]) for e in entries
                        if e["ranks"] == ranks and "strong" in e)  # fmt: skip
        if strong:
            axis.plot(*zip(*strong, strict=True), marker="o", ms=3, color=colour)
        weak = [(e["length"], e["weak"]["forward_backward"]) for e in entries if e["ranks"] == ranks and "weak" in e]
        if weak:
            axis.plot(*zip(*weak, strict=True), "x", ms=8, mew=2, color=colour)
    axis.axhline(1, color="black", lw=0.6)
    axis.set_ylim(0, 1.15)
    axis.set_title("efficiency: strong (lines), weak (crosses)", loc="left", fontsize=10)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    draw(json.loads(source.read_text(encoding="utf-8")), source.with_suffix(".png"))
