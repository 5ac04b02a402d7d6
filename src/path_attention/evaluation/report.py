"""Self-contained HTML reports of finished runs, with the numbers beside them as JSON."""

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from path_attention.evaluation import plots
from path_attention.evaluation.tables import NAMES, lengths_of, show
from path_attention.training import strict
from path_attention.training.run import RECIPE, Run, read_recipe, write_whole
from path_attention.training.trainer import METRICS, read_metrics

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .25rem .9rem; text-align: right }
th:first-child, td:first-child { text-align: left } thead, tr.rule { border-bottom: 1px solid #999 }
tr.published { color: #666 } img { max-width: 100% } pre { background: #f5f5f5; padding: 1rem; overflow-x: auto }
"""


def write_report(
    runs: Sequence[Run],
    folder: Path,
    *,
    title: str,
    introduction: str = "",
    published: Mapping[str, Sequence[float]] | None = None,
    sections: Iterable[str] = (),
    name: str = "report",
) -> Path:
    """Writes FOLDER/NAME.html, and FOLDER/metrics.json with everything its tables and curves show.

    Args:
        runs: of one recipe, differing in the mixer.
        folder: made if it does not exist.
        title: plain text.
        introduction: HTML under the title.
        published: error rates of a paper, in [0, 1], in the order of the splits.
        sections: further HTML, before the account of what was trained.
        name: of the HTML file.

    Returns:
        The path of the HTML file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rates = next(iter(runs[0].measurements.values())).unit == "error rate"
    recipe = html.escape((runs[0].folder / RECIPE).read_text(encoding="utf-8"))
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        introduction,
        "<h2>Results</h2>",
        _results(runs, published or {}),
        plots.as_image(plots.error_rates(runs, published), "error rates") if rates else "",
        "<p>A dotted line instead of a bar: no error; it ends at three errors per number of answers, the upper end of "
        "the 95 % confidence interval.</p>"
        if rates
        else "",
        "<h2>Learning curves</h2>",
        plots.as_image(plots.learning_curves(runs), "learning curves"),
        *_long_contexts(runs),
        *sections,
        "<h2>What was trained</h2>",
        _facts(runs),
        f"<details><summary>The recipe</summary><pre>{recipe}</pre></details>",
    ]
    write_whole(folder / "metrics.json", json.dumps(_numbers(runs, published or {}), indent=1) + "\n")
    return write_page(folder / f"{name}.html", title, parts)


def write_page(path: Path, title: str, parts: Iterable[str]) -> Path:
    """Writes parts of HTML as one self-contained page."""
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
    write_whole(path, f"{head}<style>{_STYLE}</style>\n" + "\n".join(parts) + "\n</html>\n")
    return path


def _results(runs: Sequence[Run], published: Mapping[str, Sequence[float]]) -> str:
    splits = list(runs[0].measurements)
    rows = [[NAMES[r.mixer], *(show(r.measurements[s]) for s in splits)] for r in runs]
    body = _rows(rows)
    if published:
        # As printed there: its rounding is part of what it says.
        body += '<tr class="rule"></tr>' + _rows(
            ([f"{name}, paper", *(f"{100 * rate:g} %" for rate in rates)] for name, rates in published.items()),
            "published",
        )
    unit = runs[0].measurements[splits[0]].unit
    header = "".join(f"<th>{html.escape(c)}</th>" for c in (unit, *(s.replace("_", " ") for s in splits)))
    return f"<table><thead><tr>{header}</tr></thead>{body}</table>"


def _long_contexts(runs: Sequence[Run]) -> list[str]:
    """A plot and a table of losses by position, where they were measured."""
    positions = {run.mixer: run.positions for run in runs}
    found = {mixer: losses for mixer, losses in positions.items() if losses is not None}
    if not found:
        return []
    data = read_recipe(runs[0].folder).data
    first = next(iter(found.values()))
    lengths = lengths_of(first)
    rows = [[NAMES[mixer], *(f"{p:.2f}" for p in losses.by_length(lengths))] for mixer, losses in found.items()]
    header = "".join(f"<th>{html.escape(c)}</th>" for c in ("perplexity up to", *(f"{n:,}" for n in lengths)))
    return [
        "<h2>Long contexts</h2>",
        plots.as_image(plots.perplexity_by_position(found, data.length if data else 0), "perplexity by position"),
        f"<table><thead><tr>{header}</tr></thead>{_rows(rows)}</table>",
        f"<p>{first.stretches} stretches of {first.length:,} held-out tokens, each in one pass.</p>",
    ]


def _facts(runs: Sequence[Run]) -> str:
    settings = read_recipe(runs[0].folder).training
    keys = {"parameters": "{:,}", "steps": "{:,}", "training_seconds": "{:.0f} s", "seed": "{}"}
    optional = {"tokens_per_second": "{:,.0f}", "peak_memory_mib": "{:,.0f}"}
    keys |= {key: form for key, form in optional.items() if all(key in r.facts for r in runs)}
    header = "".join(f"<th>{key.replace('_', ' ')}</th>" for key in ("model", *keys))
    rows = [[NAMES[r.mixer], *(form.format(r.facts[key]) for key, form in keys.items())] for r in runs]
    first = runs[0].facts
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    return (
        f"<table><thead><tr>{header}</tr></thead>{_rows(rows)}</table>"
        f"<p>All models saw the same {settings.steps * settings.batch_size:,} training sequences in the same order. "
        f"Times include the evaluations while training. "
        f"Machine: {html.escape(first['device'])}, threads: {first['threads']}; {html.escape(versions)}.</p>"
    )


def _rows(rows: Iterable[Iterable[str]], kind: str = "") -> str:
    lines = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    return "".join(f'<tr class="{kind}">{line}</tr>\n' for line in lines)


def _numbers(runs: Sequence[Run], published: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    return {
        "runs": {
            r.mixer: {
                "measurements": strict.plain(r.measurements),
                "facts": r.facts,
                "curves": read_metrics(r.folder / METRICS),
            }
            for r in runs
        },
        "published": strict.plain(published),
    }
