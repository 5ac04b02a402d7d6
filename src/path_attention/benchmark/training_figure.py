"""The figure of ``path-attention benchmark training-scaling``, from its JSON alone.

python -m path_attention.benchmark.training_figure results/NAME.json
"""

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def draw(result: dict[str, Any], path: Path) -> bool:
    """Write the figure of the results to a PNG file; False where no step was timed."""
    rows = [r for r in result["rows"] if r["kind"] == "step" and "tokens_per_second_each" in r]
    if not rows:
        return False
    rows.sort(key=lambda r: (r["length"], r["ranks"], r["context"]))
    labels = [f"{r['length']} tokens: {r['ranks'] // r['context']} x {r['context']}" for r in rows]
    places = list(range(len(rows)))
    memory = any(r["peak_bytes"] for r in rows)
    figure = Figure(figsize=(11, 1.2 + 0.4 * len(rows)), layout="constrained")
    left, *right = figure.subplots(1, 2 if memory else 1, squeeze=False, sharey=True)[0]
    lengths = sorted({r["length"] for r in rows})
    colours = [("#c1121f", "#1f78b4", "#33a02c")[lengths.index(r["length"]) % 3] for r in rows]
    bars = left.barh(places, [r["tokens_per_second_each"] for r in rows], color=colours)
    left.bar_label(bars, fmt="{:,.0f}", fontsize=8, padding=2)
    left.set_yticks(places, labels, fontsize=8)
    left.invert_yaxis()
    left.set_title("tokens a second of a device (devices: data x context)", loc="left", fontsize=10)
    for axis in right:
        bars = axis.barh(places, [(r["peak_bytes"] or 0) / 2**30 for r in rows], color=colours)
        axis.bar_label(bars, fmt="{:.1f}", fontsize=8, padding=2)
        axis.set_title("peak memory of a device, GiB", loc="left", fontsize=10)
    for axis in (left, *right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.12)
    options, versions = result["options"], result["versions"]
    figure.suptitle(
        f"{options['recipe']}{' (small)' if options['changes'] else ''}, {options['mixer']}, {result['devices'][0]}, "
        f"torch {versions['torch']}",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)
    return True


if __name__ == "__main__":
    source = Path(sys.argv[1])
    draw(json.loads(source.read_text(encoding="utf-8")), source.with_suffix(".png"))
