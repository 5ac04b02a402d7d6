"""The figure of ``path-attention benchmark operator --device cuda``: time against length, and ratios to cuDNN.

python -m path_attention.benchmark.cuda_figure results/NAME.json    # draws results/NAME.png again
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from path_attention.benchmark.cuda_contenders import CUDA_CONTENDERS

# Contenders of one formula have one colour family; this library's lines are thick.
_COLOURS = {
    "cudnn": "black",
    "path_hopper": "#c1121f",
    "path_hopper_kept": "#7f0000",
    "path_triton": "#e76f51",
    "path_sdpa": "#f4a582",
    "path_fox_hopper": "#6a3d9a",
    "path_fox_hopper_kept": "#2d0a52",
    "path_fox_triton": "#9e7bb5",
    "path_fox_sdpa": "#cab2d6",
    "flash": "#555555",
    "flex": "#999999",
    "fla_softmax": "#80b1d3",
    "fla_fox": "#1f78b4",
    "fla_path": "#33a02c",
    "fla_path_fox": "#b2a429",
}

_OURS = [x for x in CUDA_CONTENDERS if x.ours]
# The least height of the ratios' axis that is kept where a line goes beyond it.
_RATIO = 5.5


def series(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows that differ in length alone, and in the batch where their tokens are as many; at least three of them."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        heads = str(row["heads"]) if row["heads"] == row["query_heads"] else f"{row['query_heads']}/{row['heads']}"
        found[f"{row['batch'] * row['length']:,} tokens, {heads} heads x {row['dim']}"].append(row)
        found[f"batch {row['batch']}, {heads} heads x {row['dim']}"].append(row)
    return {title: sorted(part, key=lambda row: row["length"]) for title, part in found.items() if len(part) >= 3}


def draw(result: dict[str, Any], path: Path) -> bool:
    """Write the figure of the results to a PNG file; False where too few lengths are comparable."""
    groups = series(result["rows"])
    if not groups:
        return False
    figure = Figure(figsize=(11, 0.8 + 3.4 * len(groups)), layout="constrained")
    axes = figure.subplots(len(groups), 2, squeeze=False)
    for (title, rows), (left, right) in zip(groups.items(), axes, strict=True):
        _lines(left, rows, lambda x: x["forward_backward"]["median_ms"])
        _lines(right, rows, lambda x: x.get("forward_backward_ratio"))
        left.set_yscale("log")
        left.set_ylabel("forward + backward, ms")
        left.set_title(title, loc="left", fontsize=10)
        right.set_ylabel("times cuDNN's causal attention")
        # No line of ours is cut; one of others that is many times as long would press all the rest flat.
        right.set_ylim(0, min(1.1 * max(_RATIO, _largest_of_ours(rows)), right.get_ylim()[1]))
        right.axhline(1, color="black", lw=0.6)
        for axis in (left, right):
            axis.set_xscale("log", base=2)
            lengths = [row["length"] for row in rows]
            axis.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
            axis.minorticks_off()
            axis.set_xlabel("length")
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(axis="y", lw=0.3)
    handles = {x.get_label(): x for row in axes for x in row[0].get_lines()}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8, frameon=False)
    versions = result["versions"]
    figure.suptitle(
        f"{result['gpu']}, {result['dtype']}, torch {versions['torch']}, triton {versions['triton']}", fontsize=10
    )
    figure.savefig(path, dpi=130)
    return True


def _largest_of_ours(rows: list[dict[str, Any]]) -> float:
    found = [row["contenders"].get(x.name, {}).get("forward_backward_ratio") for row in rows for x in _OURS]
    return max((x for x in found if x is not None), default=0.0)


def _lines(axis: Axes, rows: list[dict[str, Any]], value: Any) -> None:
    for contender in CUDA_CONTENDERS:
        points = [
            (row["length"], y)
            for row in rows
            if "forward_backward" in (x := row["contenders"].get(contender.name, {})) and (y := value(x)) is not None
        ]
        if points:
            width = 2.0 if contender.ours or contender.name == "cudnn" else 1.0
            style = "-" if contender.ours or contender.name == "cudnn" else "--"
            axis.plot(*zip(*points, strict=True), style, marker="o", ms=3, lw=width, color=_COLOURS[contender.name],
                      label=contender.title)  # fmt: skip


if __name__ == "__main__":
    source = Path(sys.argv[1])
    draw(json.loads(source.read_text()), source.with_suffix(".png"))
