"""Language models of code by mixer, and how they cope with contexts longer than those of their training.

A small version of table 2 and figure 3 of the PaTH paper (arXiv 2505.16381): the recipe ``python_code``, equal tokens,
same seed, the mixers in turn; then losses by position on held-out packages. What the models are small in, and what the
text is, is said in the report: the order of the mixers is what may be compared with the paper.
"""

import dataclasses
import json
import math
import time
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
from path_attention.reproduction.report import read_json
from path_attention.training.recipe import Recipe, load_recipe
from path_attention.training.run import (
    EVALUATION,
    HOW,
    HOW_TOO,
    Run,
    Unfinished,
    check_unchanged,
    open_data,
    train,
    write_whole,
)
from path_attention.training.trainer import METRICS, TrainingDiverged, read_metrics

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
    "training.cuda_graphs=false",
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
    commit: str | None = None,
) -> bool:
    """Trains what is left of the recipe's models, writes JSON and report; whether all are finished.

    The JSON is written anew after every model. Models that it holds already are finished, also where their run folders
    are gone: a machine that was lost costs the model that it was training.

    Args:
        commit: of the sources, where git does not tell.

    Raises:
        ValueError: naming the argument, before anything is computed; OUT holds models of another recipe or other text.
    """
    started = time.monotonic()
    recipe = load_recipe(RECIPE, [*(QUICK if quick else ()), *overrides])
    wanted = _wanted(recipe, rows)
    file = out / f"{file_name(quick)}.json"
    earlier = read(file) if file.is_file() else None
    if earlier is not None:
        remedy = "Wanted another folder by --out, or the file moved aside."
        check_unchanged(earlier["recipe"], recipe.to_mapping(), file, HOW, HOW_TOO, remedy)
    source = open_data(wanted, console)
    numbers = describe(recipe, source, command, commit) | {"quick": quick}
    models = _kept(earlier, numbers, file)
    made = {key: numbers[key] for key in ("date", "commit")}

    def keep(run: Run) -> None:
        models[run.mixer] = _numbers(run) | {"made": made}
        _update(numbers, models, recipe, wanted)
        write_whole(file, _text(numbers))

    _update(numbers, models, recipe, wanted)
    out.mkdir(parents=True, exist_ok=True)
    left = [m for m in wanted.mixers if m not in models or (runs / recipe.name / m / EVALUATION).is_file()]
    for mixer in (m for m in wanted.mixers if m not in left):
        console.print(f"{mixer}: finished already in {file}", soft_wrap=True)
    left_s = None if time_limit is None else time_limit - (time.monotonic() - started)
    complete = True
    try:
        if left:
            with fastest_attention():
                to_train = dataclasses.replace(wanted, mixers=tuple(left))
                train(to_train, runs, time_limit=left_s, console=console, source=source, finished=keep)
    except Unfinished as stopped:
        console.print(str(stopped), soft_wrap=True)
        complete = False
    except TrainingDiverged:  # the others' report is worth as much as before
        write(numbers, out)
        raise
    for path in write(numbers, out):
        console.print(f"written: {path}", soft_wrap=True)
    return complete


def file_name(quick: bool) -> str:
    """Of JSON, report and plots, without their endings."""
    return NAME + ("-quick" if quick else "")


def _wanted(recipe: Recipe, rows: Sequence[str]) -> Recipe:
    """The recipe with the mixers that are wanted alone.

    Raises:
        ValueError: naming the argument.
    """
    if unknown := [row for row in rows if row not in recipe.mixers]:
        raise ValueError(f"--rows: no {', '.join(unknown)}; there are {', '.join(recipe.mixers)}")
    if getattr(recipe.evaluation, "long_length", None) is None:
        raise ValueError("evaluation.long_length: wanted a number of tokens, for losses by position, got nothing")
    return dataclasses.replace(recipe, mixers=tuple(m for m in recipe.mixers if not rows or m in rows))


def _kept(earlier: Mapping[str, Any] | None, numbers: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The models of an earlier call."""
    if earlier is None or not earlier["models"]:
        return {}
    remedy = "Wanted another folder by --out, or the file moved aside."
    check_unchanged(earlier["corpus"], numbers["corpus"], file, remedy=remedy, of="corpus")
    return dict(earlier["models"])


def _update(numbers: dict[str, Any], models: dict[str, Any], recipe: Recipe, wanted: Recipe) -> None:
    """Puts the models there are into ``numbers``, in the recipe's order, and what is missing of those wanted."""
    numbers["missing"] = [mixer for mixer in wanted.mixers if mixer not in models]
    numbers["models"] = {mixer: models[mixer] for mixer in recipe.mixers if mixer in models}


@contextmanager
def fastest_attention() -> Iterator[None]:
    """RoPE's attention by cuDNN where it serves: what torch takes by default depends on its version."""
    if not torch.cuda.is_available():
        yield
        return
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True):
        yield


def describe(recipe: Recipe, source: Any, command: str, commit: str | None) -> dict[str, Any]:
    """What the report says beside the models: machine, recipe and text."""
    from path_attention.benchmark.measure import environment

    here = environment()
    corpus = source.corpus.cache.facts
    documents: Any = recipe.data.documents()  # type: ignore[union-attr]
    return {
        **here,
        "commit": commit or here["commit"],
        "table": NAME,
        "command": command,
        "recipe": recipe.to_mapping(),
        "corpus": {key: value for key, value in corpus.items() if key not in ("key", "dtype", "separator")},
        "held_out": sorted(group.partition(":")[2] for group in getattr(documents, "held_out", ())),
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
    name = file_name(numbers.get("quick", False))
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
    numbers = read_json(path)
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
        f"order, seed {facts['seed']}. {_made(models)}. Made by `{numbers['command']}`."
    )
    missing = ["", f"Not finished: {', '.join(numbers['missing'])}."] if numbers["missing"] else []
    return [text, "", trained, *missing]


def _made(models: Mapping[str, Any]) -> str:
    """Device, versions, date and commit: once, or where they differ with the models of each."""
    found: dict[str, list[str]] = {}
    for mixer, of in models.items():
        facts, made = of["facts"], of["made"]
        versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        commit = f", commit {made['commit']}" if made["commit"] else ""
        found.setdefault(f"{facts['device']}; {versions}; {made['date'][:10]}{commit}", []).append(mixer)
    if len(found) == 1:
        return next(iter(found))
    return ". ".join(f"{', '.join(NAMES[m] for m in mixers)}: {text}" for text, mixers in found.items())


def _table(numbers: Mapping[str, Any]) -> list[str]:
    head = ["model", "parameters", "loss (nats per token)", "perplexity", "tokens/s", "of RoPE's", "peak memory"]
    lines = [f"| {' | '.join(head)} | perplexity in the paper |", "|---" * (len(head) + 1) + "|"]
    models = numbers["models"]
    base = models.get("rope", {}).get("facts", {})
    for mixer, found in models.items():
        facts, loss = found["facts"], found["validation"]["value"]
        # A ratio of two kinds of machines would tell of the machines.
        rope = base.get("tokens_per_second") if base.get("device") == facts["device"] else None
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
