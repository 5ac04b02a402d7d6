"""What a conversion leaves for people to read: the report, its plots, and the model card."""

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

from path_attention.conversion.checkpoint import Checkpoint
from path_attention.conversion.families import Family
from path_attention.conversion.recipe import ConversionRecipe
from path_attention.evaluation.plots import COLOURS, as_image
from path_attention.evaluation.report import write_page
from path_attention.evaluation.tables import NAMES
from path_attention.training.trainer import METRICS, read_metrics

# What a measurement is called, in order.
STAGES = {
    "teacher": "teacher",
    "initial": "student before training",
    "align": "after stage 1, alignment",
    "distill": "after stage 2, distillation",
    "continued": "after stage 3, continued pretraining",
}
_TEACHER, _BEFORE = COLOURS["rope"], "#bbbbbb"


def write_report(folder: Path, recipe: ConversionRecipe, results: Mapping[str, Any]) -> Path:
    """Write report.html and its plots as PNG into the folder of a conversion, from what was measured."""
    figures = {
        "layers": layers_figure(results, recipe.mixer),
        "losses": losses_figure(folder),
        "lengths": lengths_figure(results, recipe.mixer),
    }
    for name, figure in figures.items():
        if figure is not None:
            figure.savefig(folder / f"{name}.png", dpi=130)
    shown = {name: as_image(figure, name) if figure is not None else "" for name, figure in figures.items()}
    parts = [
        f"<h1>Conversion of {html.escape(results['facts']['source'])} to {NAMES[recipe.mixer]}</h1>",
        f"<p>{html.escape(recipe.description)}</p>" if recipe.description else "",
        _table(("", "perplexity", "loss (nats)", "of the teacher's", "tokens trained on", "seconds"), _rows(results)),
        _beta(results),
        _titled("Training", shown["losses"]),
        _titled("Attention outputs, layer by layer", shown["layers"]),
        _titled("By length", shown["lengths"]),
        f"<h2>What was run</h2><pre>{html.escape(json.dumps(results['facts'], indent=1))}</pre>",
        f"<details><summary>The recipe</summary><pre>{html.escape(recipe.to_yaml())}</pre></details>",
    ]
    return write_page(folder / "report.html", f"Conversion of {results['facts']['source']}", parts)


def _beta(results: Mapping[str, Any]) -> str:
    """The losses among which the nearest beta was found."""
    if "beta" not in results:
        return ""
    found = results["beta"]
    rows = [["loss (nats)", *(f"{loss:.4f}" for loss in found["losses"].values())]]
    about = f"<p>It began with {found['nearest']}: the lowest loss on {found['windows']} validation windows.</p>"
    return "<h2>beta, before training</h2>" + _table(("beta", *found["losses"]), rows) + about


def _titled(title: str, image: str) -> str:
    return f"<h2>{title}</h2>{image}" if image else ""


def _speeds(results: Mapping[str, Any], stage: str) -> list[dict[str, Any]]:
    return [x for name, x in results.items() if name.startswith(stage) and name.endswith(" speed")]


def _rows(results: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for name, title in STAGES.items():
        if name in results:
            found, speeds = results[name], _speeds(results, name)
            share = f"{100 * (found['perplexity'] / results['teacher']['perplexity'] - 1):+.2f} %"
            tokens, seconds = max((x["tokens"] for x in speeds), default=0), sum(x["seconds"] for x in speeds)
            trained = [f"{tokens:,}", f"{seconds:.0f}"] if speeds else ["", ""]
            rows.append([title, f"{found['perplexity']:.4f}", f"{found['loss']:.4f}", share, *trained])
    return rows


def _table(header: tuple[str, ...], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>\n" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead>{body}</table>"


def layers_figure(results: Mapping[str, Any], mixer: str) -> Figure | None:
    """The error of every new layer's attention output before and after stage 1."""
    found = {
        when: {int(n): e for name, x in results.items() if name.endswith(f" {when}") for n, e in x.items()}
        for when in ("before", "after")
    }
    if not found["after"]:
        return None
    figure = Figure(figsize=(max(5.0, 0.3 * len(found["after"]) + 2), 3.2), layout="constrained")
    axis = figure.subplots()
    for when, colour in (("before", _BEFORE), ("after", COLOURS[mixer])):
        layers = sorted(found[when])
        axis.plot(layers, [found[when][n] for n in layers], "o-", color=colour, label=f"{when} stage 1")
    axis.set_yscale("log")
    axis.set_xlabel("layer")
    axis.set_ylabel("squared error / teacher's square")
    axis.set_xticks(sorted(found["after"]) if len(found["after"]) <= 40 else sorted(found["after"])[::4])
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    return figure


def losses_figure(folder: Path) -> Figure | None:
    """The training loss of every stage by step."""
    curves = {
        path.parent.name: [(e["step"], e["loss"]) for e in read_metrics(path) if "loss" in e]
        for path in sorted(folder.glob(f"*/{METRICS}"))
    }
    panels: dict[str, dict[str, Any]] = {}
    for name, points in curves.items():
        if points:
            panels.setdefault(name.partition("-")[0], {})[name] = points
    if not panels:
        return None
    titles = {
        "align": "stage 1: sum of errors of the layers",
        "distill": "stage 2: divergence (nats)",
        "continued": "stage 3: loss (nats)",
    }
    figure = Figure(figsize=(4.2 * len(panels), 3.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, name in zip(axes, sorted(panels, key=list(titles).index), strict=True):
        for label, points in panels[name].items():
            axis.plot(*zip(*points, strict=True), label=label.replace("align-", "layers "))
        axis.set_title(titles[name], fontsize=10)
        axis.set_xlabel("step")
        if all(loss > 0 for points in panels[name].values() for _, loss in points):
            axis.set_yscale("log")
        axis.spines[["top", "right"]].set_visible(False)
        if len(panels[name]) > 1:
            axis.legend(frameon=False, fontsize=8)
    return figure


def lengths_figure(results: Mapping[str, Any], mixer: str) -> Figure | None:
    """Perplexity of the first so many tokens, teacher and student."""
    if "by_length" not in results:
        return None
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axis = figure.subplots()
    for who, colour, marker in (("teacher", _TEACHER, "s-"), ("student", COLOURS[mixer], "o-")):
        found = results["by_length"][who]["perplexity"]
        label = "teacher" if who == "teacher" else f"student, {NAMES[mixer]}"
        axis.plot([int(n) for n in found], list(found.values()), marker, color=colour, label=label)
    lengths = [int(n) for n in results["by_length"]["teacher"]["perplexity"]]
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axis.set_xlabel("tokens read")
    axis.set_ylabel("perplexity")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    return figure


def card(source: str, checkpoint: Checkpoint, recipe: ConversionRecipe, results: Mapping[str, Any]) -> str:
    """The README.md of a converted model."""
    kept = [n for n, mixer in enumerate(recipe.layer_mixers(checkpoint.config.num_hidden_layers)) if mixer == "rope"]
    what = f"All attention layers are {NAMES[recipe.mixer]}."
    if kept and recipe.mixer != "rope":
        what = f"Attention is {NAMES[recipe.mixer]}, but for the layers {', '.join(map(str, kept))}, which keep RoPE."
    lines = [what, ""]
    if "teacher" in results:
        lines += ["| | perplexity | of the teacher's |", "|---|---|---|"]
        lines += [f"| {row[0]} | {row[1]} | {row[3]} |" for row in _rows(results)]
        lines += ["", "Perplexity of a token on held-out files of the text that the conversion trained on.", ""]
    if "beta" in results:
        lines += [f"Training began at beta {results['beta']['nearest']}, the nearest of those tried.", ""]
    if not (recipe.align or recipe.distill or recipe.continued):
        lines += ["**Nothing was trained**: this is the beginning of a conversion, no model to use.", ""]
    return _card(source, checkpoint.folder, "\n".join(lines), f"```yaml\n{recipe.to_yaml()}```\n")


def card_of_translation(source: str, family: Family, to: str) -> str:
    """The README.md of a model in another format."""
    return f"The model {source} ({family.name}) in the format {to}, with the same function. Nothing was trained.\n"


def _card(source: str, folder: Path, what: str, how: str) -> str:
    data: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    data["tags"] = ["path-attention"]
    licence = _front_matter(folder).get("license")
    if licence is not None:
        data["license"] = licence
    if not Path(source).exists():  # a name on the hub
        data["base_model"] = source
    return f"""---
{yaml.safe_dump(data, sort_keys=False)}---

# {Path(source).name}, converted to PaTH attention

Converted from {source if not Path(source).exists() else Path(source).name} with path-attention
([PaTH attention, arXiv 2505.16381](https://arxiv.org/abs/2505.16381)).

{what}
```python
import path_attention.models  # makes the class known
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("...")
```

The recipe:

{how}"""


def _front_matter(folder: Path) -> dict[str, Any]:
    """The YAML at the head of a model card, {} where there is none."""
    file = folder / "README.md"
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    if not text.startswith("---\n"):
        return {}
    try:
        found = yaml.safe_load(text[4:].partition("\n---")[0])
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}
