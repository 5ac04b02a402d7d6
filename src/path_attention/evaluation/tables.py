"""Measurements as text and as tables for the terminal."""

import math
from collections.abc import Iterable, Mapping, Sequence

from rich.table import Table

from path_attention.evaluation.perplexity import PositionLosses
from path_attention.training.run import Run
from path_attention.training.source import Measurement

# How mixers are called in tables and pictures.
NAMES = {
    "path": "PaTH",
    "path_fox": "PaTH-FoX",
    "fox": "FoX",
    "stick_breaking": "SBA",
    "alibi": "ALiBi",
    "rope": "RoPE",
    "none": "no position encoding",
}


def show(measured: Measurement) -> str:
    """A measurement with its unit and what it rests on: "40.3 % (8,060 of 20,000)", "2.104 (131,072 bytes)"."""
    if measured.unit == "nats per token":
        return f"{measured.value:.4f}, perplexity {math.exp(measured.value):.2f} ({measured.count:,} tokens)"
    if measured.errors is None:
        return f"{measured.value:.3f} ({measured.count:,} bytes)"
    return f"{percent(measured.value)} ({measured.errors:,} of {measured.count:,})"


def percent(rate: float) -> str:
    """A rate in percent, with digits enough to tell it from 0: 0 %, 0.0001 %, 0.01 %, 40.3 %."""
    value = 100 * rate
    if value == 0:
        return "0 %"
    return f"{value:.1f} %" if value >= 1 else f"{value:.1g} %"


def runs_table(runs: Sequence[Run], published: Mapping[str, Iterable[str]] | None = None, title: str = "") -> Table:
    """A row a run, a column a split; ``published`` adds rows of text below, in the order of the splits."""
    units = {m.unit for run in runs for m in run.measurements.values()}
    table = Table(title=title or ", ".join(sorted(units)), title_justify="left")
    table.add_column("model")
    splits = list(runs[0].measurements)
    for split in splits:
        table.add_column(split.replace("_", " "), justify="right")
    table.add_column("training", justify="right")
    for run in runs:
        # On two lines, what a number rests on below it: four columns fit a terminal of 80 characters.
        cells = (show(run.measurements[s]).replace(" (", "\n(") if s in run.measurements else "" for s in splits)
        table.add_row(NAMES[run.mixer], *cells, f"{run.facts['steps']} steps\n{run.facts['training_seconds']:.0f} s")
    for n, (name, row) in enumerate((published or {}).items()):
        if n == 0:
            table.add_section()
        table.add_row(name, *row, "", style="dim")
    return table


def lengths_of(losses: PositionLosses) -> list[int]:
    """The lengths that tables show: powers of two from 512 on, and the whole; all but the whole within the buckets."""
    powers = [2**n for n in range(9, losses.length.bit_length())]
    found = [length for length in powers if length < losses.length and length % losses.width == 0]
    return [*found, losses.length]


def length_table(positions: Mapping[str, PositionLosses], title: str = "perplexity by length") -> Table:
    """A row a mixer, a column a length: the perplexity of the first so many tokens."""
    first = next(iter(positions.values()))
    table = Table(title=f"{title} ({first.stretches} stretches of {first.length:,} tokens)", title_justify="left")
    table.add_column("model")
    lengths = lengths_of(first)
    for length in lengths:
        table.add_column(f"{length:,}", justify="right")
    for mixer, losses in positions.items():
        table.add_row(NAMES.get(mixer, mixer), *(f"{p:.2f}" for p in losses.by_length(lengths)))
    return table
