"""Pictures of finished runs, as matplotlib figures; no display is needed."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from path_attention.evaluation.perplexity import RANGES, PositionLosses
from path_attention.evaluation.tables import NAMES, lengths_of, percent
from path_attention.training.run import Run
from path_attention.training.trainer import METRICS, read_metrics

# One colour a mixer throughout; from Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = {
    "path": "#0072B2",
    "rope": "#D55E00",
    "path_fox": "#009E73",
    "fox": "#56B4E9",
    "stick_breaking": "#E69F00",
    "alibi": "#F0E442",
    "none": "#666666",
}
_PUBLISHED = "#bbbbbb"
_ALARM = "#CC79A7"

# Log axes of error rates begin here; the smallest rate the paper's table 1 tells apart is 1e-6.
_SMALLEST_RATE = 3e-7


def learning_curves(runs: Sequence[Run]) -> Figure:
    """The training loss, and each split's measurement while training, by step; a line a run."""
    splits = list(runs[0].measurements)
    figure = Figure(figsize=(3.4 * (1 + len(splits)), 3.2), layout="constrained")
    axes = figure.subplots(1, 1 + len(splits), squeeze=False)[0]
    for run in runs:
        entries = read_metrics(run.folder / METRICS)
        for axis, key in zip(axes, ("loss", *(f"eval_{s}" for s in splits)), strict=True):
            points = [(e["step"], e[key]) for e in entries if key in e]
            split = key.removeprefix("eval_")
            if split != key and not points:
                # Only where nothing was measured on the way: the final measurement is on more data, and is no point
                # of the same curve.
                points = [(run.facts["steps"], run.measurements[split].value)]
            steps, values = zip(*points, strict=True)
            axis.plot(
                steps, values, color=COLOURS[run.mixer], label=NAMES[run.mixer], marker="." if split != key else ""
            )
    unit = runs[0].measurements[splits[0]].unit
    for axis, title in zip(axes, ("training loss", *(f"{unit}, {s.replace('_', ' ')}" for s in splits)), strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0 if unit == "error rate" else None)
        axis.spines[["top", "right"]].set_visible(False)
        if unit == "error rate" and title != "training loss":
            axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g} %"))
    axes[0].legend(frameon=False)
    return figure


def error_rates(runs: Sequence[Run], published: Mapping[str, Sequence[float]] | None = None) -> Figure:
    """Error rates on a log axis, a panel a split, a bar a run, and below them published ones.

    No errors in N answers is no bar: the text says so, and a thin line reaches to 3 / N, the end of the 95 %
    confidence interval of the rate (the rule of three).

    Args:
        runs: whose measurements are error rates.
        published: name -> rates in the order of the splits, in [0, 1].
    """
    published = published or {}
    splits = list(runs[0].measurements)
    labels = [f"{NAMES[r.mixer]}, here" for r in runs] + [f"{name}, paper" for name in published]
    figure = Figure(figsize=(11, 0.9 + 0.34 * len(labels)), layout="constrained")
    axes = figure.subplots(1, len(splits), sharey=True, squeeze=False)[0]
    for n, (axis, split) in enumerate(zip(axes, splits, strict=True)):
        for row, run in enumerate(runs):
            measured = run.measurements[split]
            if measured.errors:
                note = f"{percent(measured.value)}"
            else:
                note = f"0 of {measured.count:,}"
                axis.hlines(row, _SMALLEST_RATE, 3 / measured.count, color=COLOURS[run.mixer], lw=1, ls=":")
            start = measured.value if measured.errors else 3 / measured.count
            _bar(axis, row, measured.value, COLOURS[run.mixer], note, start)
        for row, rates in enumerate(published.values(), len(runs)):
            _bar(axis, row, rates[n], _PUBLISHED, percent(rates[n]), max(rates[n], _SMALLEST_RATE))
        axis.set_xscale("log")
        axis.set_xlim(_SMALLEST_RATE, 40)  # room for the text beside a bar that reaches 1
        axis.set_xticks([1e-6, 1e-4, 1e-2, 1], ["0.0001 %", "0.01 %", "1 %", "100 %"], fontsize=8)
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_title(split.replace("_", " "), fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(labels)), labels)
    axes[0].invert_yaxis()
    return figure


def _bar(axis: Axes, row: int, rate: float, colour: str, note: str, text_at: float) -> None:
    if rate > 0:
        axis.barh(row, rate - _SMALLEST_RATE, left=_SMALLEST_RATE, color=colour, height=0.7)
    axis.text(text_at * 1.3, row, note, va="center", fontsize=8)


def loss_curves(curves: Mapping[str, tuple[Sequence[Sequence[float]], Sequence[Sequence[float]]]]) -> Figure:
    """Training and validation loss by step, a line a mixer.

    Args:
        curves: mixer -> [step, loss] of training, and of validation.
    """
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for mixer, parts in curves.items():
        for axis, points in zip(axes, parts, strict=True):
            if points:
                steps, values = zip(*points, strict=True)
                axis.plot(steps, values, color=COLOURS.get(mixer, _PUBLISHED), label=NAMES.get(mixer, mixer), lw=1.2)
    for axis, title in zip(axes, ("training loss", "validation loss"), strict=True):
        axis.set_title(f"{title}, nats per token", fontsize=10)
        axis.set_xlabel("step")
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axis.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axis.tick_params(which="both", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    return figure


def perplexity_by_position(positions: Mapping[str, PositionLosses], trained: int) -> Figure:
    """Perplexity in long contexts, a line a mixer: of the tokens around a position, and of all tokens up to a length.

    Args:
        positions: mixer -> losses, all on the same stretches.
        trained: tokens of the training's sequences.
    """
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for mixer, losses in positions.items():
        colour, name = COLOURS.get(mixer, _PUBLISHED), NAMES.get(mixer, mixer)
        width = losses.length // RANGES
        ends, values = losses.by_position(width)
        left.plot([end - width / 2 for end in ends], values, color=colour, label=name)
        lengths = lengths_of(losses)
        right.plot(lengths, losses.by_length(lengths), color=colour, marker=".", label=name)
    first, names = next(iter(positions.values())), {NAMES.get(mixer, mixer) for mixer in positions}
    left.set_xlabel("position")
    left.set_ylabel(f"perplexity of {first.length // RANGES:,} tokens")
    right.set_xlabel("length")
    right.set_ylabel("perplexity of all tokens up to there")
    right.set_xscale("log", base=2)
    right.set_xticks(lengths_of(first), [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths_of(first)])
    right.xaxis.set_minor_locator(NullLocator())
    for axis in (left, right):
        if trained < first.length:
            axis.axvline(trained, color=_PUBLISHED, lw=1, ls="--", zorder=0)
            axis.annotate(
                " trained length",
                (trained, 1),
                xycoords=("data", "axes fraction"),
                va="top",
                fontsize=8,
                color="#666666",
            )
        drawn = [y for line in axis.get_lines() if line.get_label() in names for y in line.get_ydata()]
        if max(drawn) > 8 * min(drawn):  # one that falls apart would press the others flat
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
        axis.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    return figure


@dataclass(frozen=True)
class Attention:
    """What one head attends to at one position.

    Args:
        mixer: whose head.
        head: its number.
        weights: (L,), of the query at ``query``; zero after it.
        correct: the probability that the model gives the right answer there.
    """

    mixer: str
    head: int
    weights: npt.NDArray[np.float64]
    correct: float


def attention_at_read(heads: Sequence[Attention], tokens: Sequence[str], query: int, write: int) -> Figure:
    """The attention weights at a read of a flip-flop sequence: all of it left, around the last write right.

    Args:
        heads: the heads, a row each.
        tokens: the sequence's tokens.
        query: position of the r.
        write: position of the last w before it; its bit stands behind it.
    """
    figure = Figure(figsize=(11, 1.55 * len(heads) + 0.6), layout="constrained")
    axes = figure.subplots(len(heads), 2, width_ratios=(3, 2), squeeze=False)
    positions = range(query + 1)
    near = range(max(0, write - 8), min(query, write + 10) + 1)
    writes = [t for t in positions if tokens[t] == "w"]
    labelled = [write]  # and, going left, those with room for their two letters
    for t in reversed(writes):
        if labelled[-1] - t >= 0.04 * query:
            labelled.append(t)
    for (whole, zoom), head in zip(axes, heads, strict=True):
        weights, colour = head.weights[: query + 1], COLOURS[head.mixer]
        top = 1.4 * float(weights.max())
        for axis in (whole, zoom):
            axis.axvspan(write - 0.5, write + 1.5, color=_ALARM, alpha=0.3, lw=0)
            axis.bar(positions, weights, color=colour, width=0.8, edgecolor=colour, lw=0.8)
            axis.set_ylim(0, top)
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=8)
        whole.set_xlim(-2, query + 2)
        for t in writes:
            whole.axvline(t, color=_ALARM, lw=0.6)
        for t in labelled:
            text = f"w{tokens[t + 1]}"
            whole.text(t, top, text, ha="center", va="top", fontsize=8, weight="bold" if t == write else None)
        share = float(weights[write] + weights[write + 1])
        whole.set_ylabel(f"{NAMES[head.mixer]}\nhead {head.head + 1}", fontsize=9)
        zoom.set_xlim(near[0] - 0.6, near[-1] + 0.6)
        zoom.set_xticks(near, [tokens[t] for t in near], fontsize=8)
        zoom.set_ylim(0, 1.7 * max(float(weights[near].max()), 1e-9))
        zoom.text(
            0.99,
            0.95,
            f"last write: {percent(share)} of the weight\nright answer: {percent(head.correct)}",
            transform=zoom.transAxes,
            ha="right",
            va="top",
            fontsize=8,
        )
    axes[0, 0].set_title(
        f"attention of the r at position {query}; every write is marked, the last one shaded", fontsize=9
    )
    axes[0, 1].set_title("around the last write (own scale)", fontsize=9)
    axes[-1, 0].set_xlabel("position", fontsize=9)
    axes[-1, 1].set_xlabel("token", fontsize=9)
    return figure


def as_image(figure: Figure, alternative: str) -> str:
    """An HTML img element that holds the figure itself (PNG)."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return f'<img alt="{alternative}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
