"""What ``path-attention evaluate`` does beyond runs: questions, the harness's tasks, perplexity by position."""

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from path_attention.evaluation.perplexity import bucket_width, measure_positions, stretches_of
from path_attention.evaluation.questions import kind_names
from path_attention.evaluation.tables import length_table
from path_attention.training.run import write_whole

# All questions that are made here, by one name.
QUESTIONS = "questions"


class Place(NamedTuple):
    """Where a model is evaluated, and in which dtype."""

    device: torch.device
    dtype: str


def place(device: str | None, dtype: str) -> Place:
    """What is not given is chosen for the machine.

    Raises:
        ValueError: naming the option.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"--device: wanted cpu, or cuda where there is one, got {device!r}")
    if dtype not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"--dtype: wanted auto, float32 or bfloat16, got {dtype!r}")
    if dtype == "auto":
        dtype = "bfloat16" if kind == "cuda" else "float32"
    return Place(torch.device(device), dtype)


def by_position(
    model: Path, text: Sequence[Path], length: int, stretches: int, place: Place, out: Path | None, console: Console
) -> None:
    """Prints perplexity by length, and writes OUT and beside it a plot and a table."""
    from path_attention.benchmark.measure import environment
    from path_attention.data.documents import FileDocuments, Split, find_files
    from path_attention.data.tokenizer import Encoder, separator
    from path_attention.data.tokens import Files
    from path_attention.evaluation.harness import load_model
    from path_attention.evaluation.plots import perplexity_by_position

    bucket_width(length)
    files = find_files(text, Files(paths=("text",)).include, (), key="--text")
    documents = FileDocuments(files, "text", Split("none"), 0.0, by_group=False)
    loaded, tokenizer = load_model(model, place.device, "float32")
    encode = Encoder(tokenizer)
    rows = stretches_of(
        (encode([document.text])[0] for document in documents.read()), separator(tokenizer), length, stretches
    )
    losses = measure_positions(
        loaded,
        rows,
        precision=place.dtype,
        progress=lambda done: console.print(f"{done} of {len(rows)} stretches"),
    )
    name = getattr(loaded.config, "mixer", model.name)
    trained = int(loaded.config.max_position_embeddings)
    console.print(length_table({name: losses}))
    if out is None:
        return
    numbers = {
        **environment(),
        "model": str(model),
        "mixer": name,
        "trained_length": trained,
        "text": [str(path) for path in text],
        "precision": place.dtype,
        "device": torch.cuda.get_device_name(place.device) if place.device.type == "cuda" else "cpu",
        "positions": dataclasses.asdict(losses),
    }
    write_whole(out, json.dumps(numbers) + "\n")
    picture = out.with_suffix(".png")
    perplexity_by_position({name: losses}, trained).savefig(picture, dpi=130)
    console.print(f"written: {out}, {picture}", soft_wrap=True)


def by_tasks(
    model: Path,
    tasks: Sequence[str],
    *,
    lengths: str,
    samples: int,
    haystack: Path | None,
    limit: int | None,
    max_length: int | None,
    batch_size: int,
    seed: int,
    place: Place,
    out: Path | None,
    console: Console,
) -> None:
    """Prints the measurements of questions and tasks, and writes them to OUT after every task."""
    from path_attention.evaluation.harness import evaluate_tasks

    try:
        parsed = [int(n) for n in lengths.split(",")]
    except ValueError:
        raise ValueError(f"--lengths: wanted whole numbers separated by commas, got {lengths!r}") from None
    wanted = [name for task in tasks for name in (kind_names() if task == QUESTIONS else [task])]
    with tempfile.TemporaryDirectory(prefix="path-attention-questions-") as work:
        found = evaluate_tasks(
            model,
            wanted,
            lengths=parsed,
            samples=samples,
            seed=seed,
            haystack=haystack,
            max_length=max_length,
            batch_size=batch_size,
            limit=limit,
            device=place.device,
            dtype=place.dtype,
            work=Path(work),
            out=out,
            progress=lambda state: console.print(state, soft_wrap=True),
        )
    console.print(_table(found["tasks"]))
    if out is not None:
        console.print(f"written: {out}", soft_wrap=True)


def _table(tasks: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="lm-evaluation-harness", title_justify="left")
    for name in ("task", "metric", "value", "standard error", "samples"):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    for task, values in tasks.items():
        for metric in (name for name in values if name != "samples" and not name.endswith("stderr")):
            error = values.get(f"{metric} stderr")
            number = "" if "samples" not in values else f"{values['samples']:.0f}"
            table.add_row(task, metric, f"{values[metric]:.4f}", "" if error is None else f"{error:.4f}", number)
    return table
