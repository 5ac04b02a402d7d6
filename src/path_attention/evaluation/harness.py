"""Language models asked by lm-evaluation-harness: its own tasks by name, and the questions made here.

The questions are written as tasks of the harness, a JSONL and a YAML file each, so that whoever wants to can run them
by ``lm_eval --include_path`` with any model; here they are run on a model folder, without a network where the data is
local.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError

from path_attention.benchmark import results_file
from path_attention.benchmark.measure import environment
from path_attention.evaluation.questions import Kind, fitting, kind, kind_names
from path_attention.training.run import FINAL

# Measurements are continued where these are the same.
SAME = ("benchmark", "weights", "dtype", "device", "seed", "questions", "haystack", "max_length", "limit")
# Of the harness's results, what is no measurement.
_NOT_METRICS = ("alias", "name", "sample_len", "sample_count")
_SCORES = '''"""Scores of the questions, for lm-evaluation-harness."""

from path_attention.evaluation.questions import kind


def score(doc, results):
    return {"score": kind(doc["kind"]).score(results[0], doc["outputs"])}
'''


def sentences(text: str) -> tuple[str, ...]:
    """A text in sentences of at least two words, for haystacks."""
    found = [" ".join(part.split()) for part in re.split(r"(?<=[.!?])\s+", text)]
    return tuple(part for part in found if " " in part)


def write_questions(
    folder: Path,
    names: Sequence[str],
    lengths: Sequence[int],
    count_tokens: Callable[[str], int],
    *,
    samples: int,
    seed: int = 0,
    haystack: Sequence[str] | None = None,
    progress: Callable[[str], object] | None = None,
) -> list[str]:
    """Writes tasks NAME_LENGTH for the harness into a folder.

    Args:
        folder: made if it does not exist.
        names: of kinds of questions.
        lengths: in tokens, question and answer together.
        count_tokens: of a text, special tokens included.
        samples: questions of each task.
        seed: of the questions.
        haystack: sentences to hide things among; None for those of the kinds.
        progress: called with the name of every task before it is made.

    Returns:
        The names of the tasks.

    Raises:
        ValueError: a kind does not exist, or a length is too short for it.
    """
    kinds = {name: kind(name) for name in names}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scores.py").write_text(_SCORES, encoding="utf-8")
    written = []
    for name, of in kinds.items():
        if haystack:
            of.haystack = haystack
        for length in lengths:
            task = f"{name}_{length}"
            if progress is not None:
                progress(task)
            questions = fitting(name, of, count_tokens, length, seed=seed, samples=samples)
            with open(folder / f"{task}.jsonl", "w", encoding="utf-8") as file:
                for q in questions:
                    row = {"kind": name, "input": q.prompt, "prefix": q.prefix, "outputs": list(q.answers)}
                    file.write(json.dumps(row | {"place": round(q.place, 4), "length": length}) + "\n")
            (folder / f"{task}.yaml").write_text(_task(task, of, folder), encoding="utf-8")
            written.append(task)
    return written


def _task(name: str, of: Kind, folder: Path) -> str:
    values = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str((folder / f"{name}.jsonl").resolve())}},
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{input}}",
        "doc_to_target": "{{outputs}}",
        "gen_prefix": "{{prefix}}",
        # The prefix is the rest of the prompt's own line, or begins with its blank.
        "target_delimiter": "",
        "metric_list": [{"metric": "score", "aggregation": "mean", "higher_is_better": True}],
        "generation_kwargs": {"do_sample": False, "max_gen_toks": of.new_tokens, "until": list(of.until)},
        "metadata": {"version": 1.0},
    }
    return yaml.safe_dump(values, sort_keys=False) + "process_results: !function scores.score\n"


def load_model(model: Path, device: torch.device, dtype: str) -> tuple[Any, Any]:
    """A causal language model and its tokenizer from a folder, or a run folder.

    Args:
        model: as save_pretrained writes it, or runs/NAME/MIXER.
        device: where it goes.
        dtype: float32, bfloat16 or float16.

    Raises:
        FileNotFoundError: no model there.
        ValueError: no tokenizer there, or one of more tokens than the model knows; no weights, or damaged ones.
    """
    import transformers
    from transformers import AutoModelForCausalLM

    import path_attention.models  # noqa: F401 (known to AutoModel from here on)
    from path_attention.data.tokenizer import load_tokenizer

    folder = model / FINAL if (model / FINAL).is_dir() else model
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{model}: no model here; wanted a folder with config.json, or runs/NAME/MIXER")
    if not any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json")):
        raise ValueError(f"{model}: no tokenizer here; wanted one in the model's folder, as save_pretrained writes it")
    tokenizer = load_tokenizer(str(folder), key="tokenizer")
    config = transformers.AutoConfig.from_pretrained(folder)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"{model}: the tokenizer has {len(tokenizer)} tokens, the model knows {config.vocab_size}; wanted the "
            "tokenizer that it was trained with"
        )
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    except (OSError, SafetensorError) as error:  # no weights there, or damaged ones
        raise ValueError(f"{model}: the weights cannot be read: {' '.join(str(error).split())}") from error
    return loaded.to(device).eval(), tokenizer


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    folder: Path | None,
    max_length: int,
    batch_size: int = 1,
    limit: int | None = None,
    finished: Callable[[str, dict[str, dict[str, float]]], object] | None = None,
) -> dict[str, dict[str, float]]:
    """The harness's measurements of a model, one task after another.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        tasks: names of the harness's own tasks, or of those in ``folder``.
        folder: with tasks as :func:`write_questions` writes them; None for none.
        max_length: tokens that the model is given at most; longer prompts lose their beginning.
        batch_size: of requests.
        limit: documents of each task at most.
        finished: called with the name and the measurements of each task as soon as there are any.

    Returns:
        task -> metric -> value, also standard errors (``METRIC stderr``) and the number of documents (``samples``).

    Raises:
        ValueError: the harness knows no such task, or its data cannot be had.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    own = {path.stem for path in folder.glob("*.yaml")} if folder is not None else set()
    manager = TaskManager(
        include_path=str(folder) if folder is not None else None, include_defaults=bool(set(tasks) - own)
    )
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise ValueError(
            f"tasks: the harness knows no {', '.join(unknown)}; made here are {', '.join(kind_names())}, and the "
            "harness's are listed by `lm_eval ls tasks`"
        )
    language_model = HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length, backend="causal"
    )
    measured: dict[str, dict[str, float]] = {}
    for task in tasks:
        try:
            found = simple_evaluate(
                model=language_model,
                tasks=[task],
                task_manager=manager,
                limit=limit,
                log_samples=False,
                bootstrap_iters=1000,
            )
        except (OSError, ConnectionError) as error:  # of the hub, without network or data
            raise ValueError(
                f"tasks: the data of {task} cannot be had: {' '.join(str(error).split())[:300]}"
            ) from error
        assert found is not None
        counts = found.get("n-samples", {})
        measured |= (of := {name: _metrics(values, counts.get(name)) for name, values in found["results"].items()})
        if finished is not None:
            finished(task, of)
    return measured


def _metrics(values: dict[str, Any], samples: Any) -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in values.items():
        name, _, filter_name = key.partition(",")
        if name in _NOT_METRICS or not isinstance(value, int | float):
            continue
        name = f"{name.removesuffix('_stderr')} stderr" if name.endswith("_stderr") else name
        found[name if filter_name in ("", "none") else f"{name} ({filter_name})"] = float(value)
    if samples:
        found["samples"] = samples["effective"]
    return found


def evaluate_tasks(
    model: Path,
    tasks: Sequence[str],
    *,
    lengths: Sequence[int],
    samples: int,
    seed: int,
    haystack: Path | None,
    max_length: int | None,
    batch_size: int,
    limit: int | None,
    device: torch.device,
    dtype: str,
    work: Path,
    out: Path | None = None,
    progress: Callable[[str], object] | None = None,
) -> dict[str, Any]:
    """Questions made here and tasks of the harness, asked of the model in a folder; see :func:`run_tasks`.

    Args:
        work: folder that the questions are written to; what it held of earlier ones goes.
        out: a JSON that is written after every task; tasks that it has of the same model are not asked again.

    Returns:
        ``tasks``, the measurements, beside everything they depend on.

    Raises:
        FileExistsError: OUT has measurements of another model, or by other settings.
    """
    made = [task for task in tasks if task in kind_names()]
    others = [task for task in tasks if task not in kind_names()]
    loaded, tokenizer = load_model(model, device, dtype)
    longest = max([max_length or loaded.config.max_position_embeddings, *(lengths if made else ())])
    options: dict[str, Any] = {"max_length": longest, "batch_size": batch_size, "limit": limit}
    result = results_file.resume(
        {
            "benchmark": "tasks",
            **environment(),
            "model": str(model),
            "weights": _fingerprint(loaded),
            "mixer": getattr(loaded.config, "mixer", None),
            "parameters": sum(p.numel() for p in loaded.parameters()),
            "dtype": dtype,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "seed": seed,
            "questions": samples,
            "haystack": None if haystack is None else str(haystack),
            **options,
            "tasks": {},
        },
        out,
        SAME,
    )
    asked = {name: [n for n in lengths if f"{name}_{n}" not in result["tasks"]] for name in made}
    written = _write_asked(work, asked, tokenizer, samples=samples, seed=seed, haystack=haystack, progress=progress)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the harness forks after tokenizing
    left = [*written, *(task for task in others if task not in result["tasks"])]
    if progress is not None:
        progress(f"asking the model: {len(left)} tasks")

    def finished(task: str, found: dict[str, dict[str, float]]) -> None:
        result["tasks"] |= found
        results_file.write(result, out)
        if progress is not None:
            progress(f"{task}: {_one_line(found)}")

    if left:
        folder = work if written else None
        run_tasks(loaded, tokenizer, left, folder=folder, finished=finished, **options)
    return result


def _write_asked(
    work: Path,
    asked: Mapping[str, Sequence[int]],
    tokenizer: Any,
    *,
    samples: int,
    seed: int,
    haystack: Path | None,
    progress: Callable[[str], object] | None,
) -> list[str]:
    """The questions of each kind in the lengths that are left."""
    if haystack is not None and not haystack.is_file():
        raise FileNotFoundError(f"--haystack: no file {haystack}")
    text = None if haystack is None else sentences(haystack.read_text(encoding="utf-8", errors="replace"))
    if text is not None and not text:
        raise ValueError(f"--haystack: wanted a text of sentences, got none in {haystack}")
    shutil.rmtree(work, ignore_errors=True)
    written: list[str] = []
    for name, lengths in asked.items():
        written += write_questions(
            work,
            [name],
            lengths,
            lambda text: len(tokenizer(text)["input_ids"]),
            samples=samples,
            seed=seed,
            haystack=text,
            progress=progress,
        )
    return written


@torch.no_grad()
def _fingerprint(model: Any) -> str:
    """Tells a model from one of other weights: of the sum and the sum of squares of each parameter."""
    sums = [[name, float(p.double().sum()), float(p.double().square().sum())] for name, p in model.named_parameters()]
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()[:16]


def _one_line(found: dict[str, dict[str, float]]) -> str:
    values = next(iter(found.values()), {})
    return ", ".join(f"{k} {v:.4f}" for k, v in values.items() if k != "samples" and not k.endswith("stderr"))
