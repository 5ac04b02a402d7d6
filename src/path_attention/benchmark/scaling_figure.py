"""The figure of ``path-attention benchmark scaling``, from its JSON alone.

python -m path_attention.benchmark.scaling_figure results/NAME.json
"""

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from path_attention.benchmark.scaling import FORMULAS, summary

_COLOURS = {1: "black", 2: "#1f78b4", 4: "#e76f51", 8: "#33a02c"}


def draw(result: dict[str, Any], path: Path) -> bool:
    """Write the figure of the results to a PNG file; False where nothing was timed."""
    rows = [r for r in result["rows"] if r["kind"] == "time" and "forward_backward" in r]
    if not rows:
        return False
    formulas = [f for f in FORMULAS if any(r["formula"] == f for r in rows)]
    figure = Figure(figsize=(14, 0.8 + 3.4 * len(formulas)), layout="constrained")
    for formula, (time, efficiency, memory) in zip(
        formulas, figure.subplots(len(formulas), 3, squeeze=False), strict=True
    ):
        of_formula = [r for r in rows if r["formula"] == formula]
        _by_devices(time, of_formula, lambda r: r["forward_backward"]["median_ms"])
        time.set_title(f"{formula}: forward + backward, ms", loc="left", fontsize=10)
        time.set_yscale("log")
        _efficiencies(efficiency, result, formula)
        if any(r["peak_bytes"] for r in of_formula):
            _by_devices(memory, of_formula, lambda r: r["peak_bytes"] / 2**30)
            memory.set_yscale("log", base=2)
            memory.yaxis.set_major_formatter("{x:g}")
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
    options, versions = result["options"], result["versions"]
    figure.suptitle(
        f"{result['devices'][0]}, {options['dtype']}, {options['heads']} heads x {options['dim']}, "
        f"torch {versions['torch']}",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)
    return True


def _by_devices(axis: Axes, rows: list[dict[str, Any]], value: Any) -> None:
    for ranks in sorted({r["ranks"] for r in rows}):
        points = sorted((r["length"], value(r)) for r in rows if r["ranks"] == ranks)
        axis.plot(*zip(*points, strict=True), marker="o", ms=3, color=_COLOURS.get(ranks, "grey"), label=str(ranks))


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
