"""Language models of code by mixer, and how they cope with contexts longer than those of their training.

A small version of table 2 and figure 3 of the PaTH paper (arXiv 2505.16381): the recipe ``python_code``, equal tokens,
same seed, the mixers in turn; then losses by position on held-out packages. What the models are small in, and what the
text is, is said in the report: the order of the mixers is what may be compared with the paper.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel

from path_attention.evaluation.perplexity import RANGES, PositionLosses
from path_attention.evaluation.tables import NAMES, lengths_of
from path_attention.training.recipe import Recipe, load_recipe
from path_attention.training.run import Run, Unfinished, train, write_whole
from path_attention.training.source import open_source
from path_attention.training.trainer import METRICS, read_metrics

NAME = "language-model"
RECIPE = "python_code"
# Training losses of a mixer that the JSON keeps.
LOSSES = 200
# A small version for a CPU: it shows that everything works.
QUICK = (
    "name=python_code_quick",
    "data.files.paths=['${stdlib}']",
    "data.files.include=['json/*.py', 'email/*.py', 'unittest/*.py', 'http/*.py', 'xml/**/*.py', 'logging/*.py']",
    "data.vocab_size=1024",
    "data.length=128",
    "data.validation={by: folder, fraction: 0.2, seed: 0}",
    "model={hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 128}",
    "training.steps=60",
    "training.batch_size=8",
    "training.warmup_steps=10",
    "training.eval_every=30",
    "training.save_every=20",
    "training.precision=float32",
    "training.workers=0",
    "training.compile=false",
    "evaluation.windows=32",
    "evaluation.quick_windows=8",
    "evaluation.long_length=1024",
    "evaluation.long_windows=4",
)
# Wikitext perplexity of the paper's table 2, 760M parameters, trained on 50B tokens of FineWeb-Edu at length 4096.
PAPER = {"rope": 19.01, "fox": 18.33, "path": 18.03, "path_fox": 17.35}
# What its figure 3 shows, in its own words' sense; there are no numbers in the text.
PAPER_LENGTHS = "RoPE breaks beyond 4K, PaTH is stable to 32K, FoX and PaTH-FoX to 64K"


def reproduce(
    *,
    quick: bool,
    rows: Sequence[str],
    overrides: Sequence[str],
    runs: Path,
    out: Path,
    time_limit: float | None,
    command: str,
    console: Console,
) -> bool:
    """Trains what is left of the recipe's models, writes JSON and report; whether all are finished.

    Raises:
        ValueError: naming the argument, before anything is computed.
    """
    recipe = load_recipe(RECIPE, [*(QUICK if quick else ()), *overrides])
    if unknown := [row for row in rows if row not in recipe.mixers]:
        raise ValueError(f"--rows: no {', '.join(unknown)}; there are {', '.join(recipe.mixers)}")
    wanted = dataclasses.replace(recipe, mixers=tuple(m for m in recipe.mixers if not rows or m in rows))
    try:
        with fastest_attention():
            train(wanted, runs, time_limit=time_limit, console=console)
        complete = True
    except Unfinished as stopped:
        console.print(str(stopped), soft_wrap=True)
        complete = False
    numbers = collect(wanted, runs, command) | {"quick": quick}
    for path in write(numbers, out):
        console.print(f"written: {path}", soft_wrap=True)
    return complete


@contextmanager
def fastest_attention() -> Iterator[None]:
    """RoPE's attention by cuDNN where it serves: what torch takes by default depends on its version."""
    if not torch.cuda.is_available():
        yield
        return
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True):
        yield


def collect(recipe: Recipe, runs: Path, command: str) -> dict[str, Any]:
    """What the report is made of."""
    from path_attention.benchmark.measure import environment

    corpus = open_source(recipe).corpus.cache.facts  # type: ignore[attr-defined]
    documents: Any = recipe.data.documents()  # type: ignore[union-attr]
    finished = {}
    for mixer in recipe.mixers:
        folder = runs / recipe.name / mixer
        if (folder / "evaluation.json").is_file():
            finished[mixer] = _numbers(Run.read(folder))
    return {
        **environment(),
        "table": NAME,
        "command": command,
        "recipe": recipe.to_mapping(),
        "corpus": {key: value for key, value in corpus.items() if key not in ("key", "dtype", "separator")},
        "held_out": sorted(group.partition(":")[2] for group in getattr(documents, "held_out", ())),
        "missing": [mixer for mixer in recipe.mixers if mixer not in finished],
        "models": finished,
    }


def _numbers(run: Run) -> dict[str, Any]:
    entries = read_metrics(run.folder / METRICS)
    losses = [[e["step"], round(e["loss"], 5)] for e in entries if "loss" in e]
    measured, positions = run.measurements["validation"], run.positions
    assert positions is not None
    return {
        "validation": dataclasses.asdict(measured),
        "losses": losses[:: max(1, math.ceil(len(losses) / LOSSES))],
        "validation_losses": [[e["step"], round(e["eval_validation"], 5)] for e in entries if "eval_validation" in e],
        "positions": dataclasses.asdict(positions),
        "facts": run.facts,
    }


def write(numbers: Mapping[str, Any], out: Path) -> list[Path]:
    """Writes OUT/language-model.json, .md and two plots, with -quick in the name of a quick one."""
    out.mkdir(parents=True, exist_ok=True)
    name = NAME + ("-quick" if numbers.get("quick") else "")
    paths = [out / f"{name}{end}" for end in (".json", ".md", ".png", "-losses.png")]
    write_whole(paths[0], _text(numbers))
    if not numbers["models"]:
        return paths[:1]
    write_whole(paths[1], markdown(numbers, paths[2].name, paths[3].name))
    _length_figure(numbers).savefig(paths[2], dpi=130)
    _loss_figure(numbers).savefig(paths[3], dpi=130)
    return paths


def _text(numbers: Mapping[str, Any]) -> str:
    """JSON with a line for each part of a model."""
    head = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in numbers.items() if k != "models"]
    models = []
    for mixer, found in numbers["models"].items():
        parts = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in found.items())
        models.append(f"{json.dumps(mixer)}: {{\n{parts}\n}}")
    return "{\n" + ",\n".join([*head, '"models": {\n' + ",\n".join(models) + "\n}"]) + "\n}\n"


def read(path: Path) -> dict[str, Any]:
    """The JSON that :func:`write` wrote.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is something else.
    """
    numbers = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(numbers, dict) or numbers.get("table") != NAME or "models" not in numbers:
        raise ValueError(f"{path}: wanted the JSON of {NAME}, got something else")
    return numbers


def positions_of(numbers: Mapping[str, Any]) -> dict[str, PositionLosses]:
    return {mixer: PositionLosses(**found["positions"]) for mixer, found in numbers["models"].items()}


def markdown(numbers: Mapping[str, Any], lengths: str, losses: str) -> str:
    """The report."""
    recipe, models = numbers["recipe"], numbers["models"]
    trained = recipe["data"]["length"]
    lines = ["# Language models of code, by mixer", ""]
    if numbers.get("quick"):
        lines += ["The quick version: small models and little text, for a CPU. It shows that everything works.", ""]
    lines += [*_what(numbers), "", "## Trained length", "", *_table(numbers), ""]
    lines += [*_order(models), "", f"![losses]({losses})", "", "## Longer contexts", "", *_lengths(numbers), ""]
    lines += [f"![perplexity by position and by length]({lengths})", ""]
    lines += [f"For comparison, the paper's figure 3: {PAPER_LENGTHS} (760M parameters, 50B tokens).", ""]
    lines += _limits(numbers, trained)
    return "\n".join(lines) + "\n"


def _what(numbers: Mapping[str, Any]) -> list[str]:
    recipe, corpus, models = numbers["recipe"], numbers["corpus"], numbers["models"]
    facts = next(iter(models.values()))["facts"]
    train, held = corpus["train"], corpus["validation"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    text = (
        f"Text: {corpus['bytes'] / 1e6:,.0f} MB of source code installed with Python, {corpus['repeated_documents']:,} "
        f"repeated files left out; {train['tokens']:,} tokens of {train['documents']:,} files to train on and "
        f"{held['tokens']:,} of {held['documents']:,} files in packages that are held out whole. Byte-level BPE of "
        f"{corpus['vocab_size']:,} tokens, trained on the training files."
        + (f" Held out: {', '.join(numbers['held_out'])}." if numbers["held_out"] else "")
    )
    trained = (
        f"Models: about {facts['parameters'] / 1e6:,.1f} million parameters, {facts['tokens'] / 1e6:,.1f} million "
        f"tokens each ({facts['steps']:,} steps, length {recipe['data']['length']:,}), the same sequences in the same "
        f"order, seed {facts['seed']}. {facts['device']}; {versions}; {numbers['date'][:10]}, commit "
        f"{numbers['commit']}. Made by `{numbers['command']}`."
    )
    missing = ["", f"Not finished: {', '.join(numbers['missing'])}."] if numbers["missing"] else []
    return [text, "", trained, *missing]


def _table(numbers: Mapping[str, Any]) -> list[str]:
    head = ["model", "parameters", "loss (nats per token)", "perplexity", "tokens/s", "of RoPE's", "peak memory"]
    lines = [f"| {' | '.join(head)} | perplexity in the paper |", "|---" * (len(head) + 1) + "|"]
    models = numbers["models"]
    rope = models.get("rope", {}).get("facts", {}).get("tokens_per_second")
    for mixer, found in models.items():
        facts, loss = found["facts"], found["validation"]["value"]
        rate, memory = facts.get("tokens_per_second"), facts.get("peak_memory_mib")
        lines.append(
            f"| {NAMES.get(mixer, mixer)} | {facts['parameters']:,} | {loss:.4f} | {math.exp(loss):.3f} | "
            f"{f'{rate:,.0f}' if rate else '-'} | {f'{rate / rope:.2f}' if rate and rope else '-'} | "
            f"{f'{memory:,.0f} MiB' if memory else '-'} | {PAPER.get(mixer, '-')} |"
        )
    count = next(iter(models.values()))["validation"]["count"]
    lines += [
        "",
        f"Loss on {count:,} held-out tokens. Tokens/s: median while training, compilation and evaluation aside.",
    ]
    return lines


def _order(models: Mapping[str, Any]) -> list[str]:
    shared = [mixer for mixer in models if mixer in PAPER]
    here = sorted(shared, key=lambda m: models[m]["validation"]["value"])
    there = sorted(shared, key=lambda m: PAPER[m])
    verdict = "the same order" if here == there else "another order"
    return [
        f"From the best: {', '.join(NAMES[m] for m in here)}. In the paper's table 2 (Wikitext, 760M parameters): "
        f"{', '.join(NAMES[m] for m in there)}: {verdict}."
    ]


def _lengths(numbers: Mapping[str, Any]) -> list[str]:
    positions = positions_of(numbers)
    first = next(iter(positions.values()))
    lengths = lengths_of(first)
    lines = [
        f"Perplexity of the first so many tokens of {first.stretches} stretches of {first.length:,} held-out tokens, "
        "each within one package (its files one after another) and read in one pass:",
        "",
        "| | " + " | ".join(f"{n:,}" for n in lengths) + " |",
        "|---" * (len(lengths) + 1) + "|",
    ]
    for mixer, losses in positions.items():
        lines.append(
            f"| {NAMES.get(mixer, mixer)} | " + " | ".join(f"{p:.2f}" for p in losses.by_length(lengths)) + " |"
        )
    width = first.length // RANGES
    ends = [n for n in lengths if n % width == 0]
    lines += ["", f"Perplexity of the {width:,} tokens before each position:", ""]
    lines += ["| | " + " | ".join(f"{n:,}" for n in ends) + " |", "|---" * (len(ends) + 1) + "|"]
    for mixer, losses in positions.items():
        values = [math.exp(losses.between(n - width, n)) for n in ends]
        lines.append(f"| {NAMES.get(mixer, mixer)} | " + " | ".join(f"{p:.2f}" for p in values) + " |")
    return [*lines, "", *_against_rope(positions)]


def _against_rope(positions: Mapping[str, PositionLosses]) -> list[str]:
    """Differences on the same stretches, with their standard errors: they vary far less than the losses themselves."""
    if "rope" not in positions or len(positions) < 2 or positions["rope"].stretches < 2:
        return []
    rope = np.array(positions["rope"].by_stretch).mean(1)
    parts = []
    for mixer, losses in positions.items():
        if mixer != "rope":
            gap = np.array(losses.by_stretch).mean(1) - rope
            error = gap.std(ddof=1) / math.sqrt(len(gap))
            parts.append(f"{NAMES.get(mixer, mixer)} {gap.mean():+.3f} ± {error:.3f}")
    return [f"Loss of whole stretches against RoPE's, mean difference and its standard error: {', '.join(parts)} nats."]


def _limits(numbers: Mapping[str, Any], trained: int) -> list[str]:
    facts = next(iter(numbers["models"].values()))["facts"]
    text = (
        f"One seed; models of {facts['parameters'] / 1e6:,.1f}M parameters that saw {facts['tokens'] / 1e6:,.1f}M "
        f"tokens, {760e6 / facts['parameters']:,.0f} times fewer than the paper's parameters and "
        f"{50e9 / facts['tokens']:,.0f} times fewer than its tokens; code, not the web. Small differences may be "
        f"chance. The order of the mixers and the shape of the curves beyond {trained:,} tokens may be compared with "
        "the paper; the perplexities may not: they depend on the text and on the tokenizer."
    )
    return ["## What this can and cannot say", "", text]


def _length_figure(numbers: Mapping[str, Any]) -> Any:
    from path_attention.evaluation.plots import perplexity_by_position

    return perplexity_by_position(positions_of(numbers), numbers["recipe"]["data"]["length"])


def _loss_figure(numbers: Mapping[str, Any]) -> Any:
    from path_attention.evaluation.plots import loss_curves

    curves = {m: (found["losses"], found["validation_losses"]) for m, found in numbers["models"].items()}
    return loss_curves(curves)
