"""Run folders: train a recipe into one, take up an interrupted one, read a finished one.

runs/NAME/MIXER/recipe.yaml        the recipe, every default written out
                data.json          which text, where the recipe alone does not say
                metrics.jsonl      losses, speed and evaluations by step
                checkpoint-STEP/   the last two, to resume from on any number of processes
                divergence.json    what is known, where a training diverged
                runs/              TensorBoard logs, where tensorboard is installed
                final/             the trained model, as save_pretrained writes it, with its tokenizer
                positions.json     losses by position in long contexts, where the recipe wants them
                evaluation.json    measurements of the final model; its presence means the run is finished
"""

import dataclasses
import gc
import json
import math
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from rich.console import Console

from path_attention.evaluation.perplexity import PositionLosses
from path_attention.training import strict
from path_attention.training.recipe import Recipe, recipe_from_mapping
from path_attention.training.source import Measurement, Source, open_source

RECIPE, FINAL, EVALUATION = "recipe.yaml", "final", "evaluation.json"
DATA, POSITIONS = "data.json", "positions.json"

# Keys that say how the work is done, not what comes out of it: a run may go on with others.
HOW = ("mixers", "description", "data.cache", "training.accumulation_steps", "training.workers", "training.compile")
HOW_TOO = (
    "training.cuda_graphs",
    "training.activation_checkpointing",
    "training.recompute_attention",
    "training.parallel.",
)


class Unfinished(RuntimeError):
    """A training stopped in good order before its end: time was up, or it was told to."""


@dataclass(frozen=True)
class Run:
    """A finished run: one recipe, one mixer.

    Args:
        folder: runs/NAME/MIXER.
        mixer: the mixer.
        measurements: of the final model, by split.
        facts: steps, seconds of training, number of parameters, seed, device and versions.
    """

    folder: Path
    mixer: str
    measurements: dict[str, Measurement]
    facts: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """The run of a folder.

        Raises:
            FileNotFoundError: if there is no finished run.
        """
        file = folder / EVALUATION
        if not file.is_file():
            state = "interrupted; train the recipe again to finish it" if (folder / RECIPE).is_file() else "no run"
            raise FileNotFoundError(f"{folder}: no finished run here ({state})")
        values = json.loads(file.read_text())
        measurements = {split: Measurement(**m) for split, m in values["measurements"].items()}
        return cls(folder, values["mixer"], measurements, values["facts"])

    @property
    def positions(self) -> PositionLosses | None:
        """Losses by position in long contexts, where they were measured."""
        file = self.folder / POSITIONS
        return PositionLosses(**json.loads(file.read_text())) if file.is_file() else None

    def write(self) -> None:
        """Writes evaluation.json, whole or not at all."""
        values = {"mixer": self.mixer, "measurements": strict.plain(self.measurements), "facts": self.facts}
        write_whole(self.folder / EVALUATION, json.dumps(values, indent=2) + "\n")


def train(
    recipe: Recipe,
    runs: Path = Path("runs"),
    *,
    restart: bool = False,
    time_limit: float | None = None,
    console: Console | None = None,
    source: Source | None = None,
    finished: Callable[[Run], object] | None = None,
) -> list[Run]:
    """Trains every mixer of a recipe and evaluates it; what is finished already is not done again.

    An interrupted run continues from its last checkpoint with the losses it would have had uninterrupted.

    Args:
        recipe: the recipe.
        runs: folder of all run folders.
        restart: move an existing runs/NAME aside (NAME.1, NAME.2, ...) and start anew.
        time_limit: seconds after which to stop with a checkpoint; None for no limit.
        console: where progress is shown; None shows nothing.
        source: of the recipe, where it is open already.
        finished: called with every run as soon as it is finished, on the first process.

    Raises:
        ValueError, FileNotFoundError: before anything is computed, where the recipe cannot be run or the run folder
            holds a run of another recipe.
        TrainingDiverged: when a loss is not finite.
        CacheIncomplete: the disk was full, or the network gone, before all text was in tokens.
        Unfinished: time was up, or SIGTERM came; the same call goes on.
        GraphCaptureFailed: CUDA refused to record a step; the same call goes on in a new process, without graphs.
    """
    from path_attention.training import parallel

    deadline = math.inf if time_limit is None else time.monotonic() + time_limit
    folder = runs / recipe.name
    parallel.check_processes(recipe.training)
    if restart and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"--restart: wanted one process, got several, which would all move {folder}; rename it first")
    if restart and folder.exists():
        aside = next(p for n in range(1, 10**6) if not (p := runs / f"{recipe.name}.{n}").exists())
        os.rename(folder, aside)
        if console:
            console.print(f"the existing run was moved to {aside}")
    for mixer in recipe.mixers:
        _check_same_recipe(recipe, folder / mixer)
    source = source or open_data(recipe, console)
    configs = {mixer: model_config(recipe, source, mixer) for mixer in recipe.mixers}
    for mixer, config in configs.items():
        parallel.check_model(recipe.training, config, source.length)
        _check_same_data(source, folder / mixer)
    runs_of: list[Run] = []
    trained = False
    for mixer, config in configs.items():
        if (folder / mixer / EVALUATION).is_file():
            if console:
                console.print(f"{mixer}: finished already in {folder / mixer} (--restart trains anew)")
            runs_of.append(Run.read(folder / mixer))
        else:
            # A model that would be compiled for the few steps to its first checkpoint waits for the next call.
            if trained and parallel.any_process(time.monotonic() >= deadline, _device(recipe)):
                raise Unfinished(f"{mixer}: not begun, time is up; the same command goes on with it")
            runs_of.append(_train_one(recipe, source, mixer, config, folder / mixer, deadline, console))
            trained = True
        if finished is not None and os.environ.get("RANK", "0") == "0":
            finished(runs_of[-1])
    return runs_of


def evaluate(folder: Path, *, console: Console | None = None) -> Run:
    """Evaluates the final model of a finished run again, as its recipe says, and writes evaluation.json anew.

    Raises:
        FileNotFoundError: if the folder holds no finished run.
    """
    from path_attention.models import PaTHForCausalLM

    before = Run.read(folder)
    recipe = read_recipe(folder)
    source = open_data(recipe, console)
    model: torch.nn.Module = PaTHForCausalLM.from_pretrained(folder / FINAL)
    model.to(_device(recipe))
    run = dataclasses.replace(before, measurements=_measure(source, model, before.mixer, folder, console))
    run.write()
    return run


def run_folders(folder: Path) -> list[Path]:
    """The runs in a folder: itself, or one for each mixer of the recipe that wrote it.

    Raises:
        FileNotFoundError: if it is neither.
    """
    if (folder / RECIPE).is_file():
        return [folder]
    found = sorted(p.parent for p in folder.glob(f"*/{RECIPE}"))
    if not found:
        raise FileNotFoundError(f"{folder}: no run here (wanted runs/NAME or runs/NAME/MIXER)")
    mixers = list(read_recipe(found[0]).mixers)
    return sorted(found, key=lambda p: mixers.index(p.name) if p.name in mixers else len(mixers))


def read_recipe(folder: Path) -> Recipe:
    """The recipe a run folder was trained by."""
    return recipe_from_mapping(yaml.safe_load((folder / RECIPE).read_text(encoding="utf-8")))


def model_config(recipe: Recipe, source: Source, mixer: str) -> Any:
    """The ``PaTHConfig`` of one of a recipe's models.

    Raises:
        ValueError: for a key of ``model`` that PaTHConfig does not have, or a value it refuses; the text is in other
            tokens than those of the model to start from.
    """
    from path_attention.models import PaTHConfig

    if recipe.initial:
        config = _initial_config(recipe, mixer)
        _check_vocabulary(recipe, source, config)
        return config
    known = {f.name for f in dataclasses.fields(PaTHConfig)} - {"vocab_size", "mixer"}
    strict.check_keys(recipe.model, known, "model")
    values = source.model_settings() | dict(recipe.model)
    try:
        return PaTHConfig(mixer=mixer, use_cache=False, **values)
    except Exception as error:  # huggingface_hub's strict dataclasses have exception types of their own
        raise ValueError(f"model: {' '.join(str(error).split())}") from error


def _initial_config(recipe: Recipe, mixer: str) -> Any:
    """The configuration of the model that a recipe starts from."""
    from path_attention.models import PaTHConfig

    folder = Path(recipe.initial).expanduser()
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"initial: no model in {folder}")
    config = PaTHConfig.from_pretrained(folder)
    if config.mixer != mixer:
        raise ValueError(f"mixers: wanted [{config.mixer}], the mixer of the model in {folder}, got {mixer}")
    return config


def _check_vocabulary(recipe: Recipe, source: Source, config: Any) -> None:
    """Raises a ValueError where text is in tokens that the model to start from does not know, or knows as others."""
    if recipe.data is None:  # a task is written in the model's own
        return
    if source.vocab_size > config.vocab_size:
        raise ValueError(
            f"initial: the text has {source.vocab_size} tokens, the model in {recipe.initial} knows {config.vocab_size}"
        )
    folder = Path(recipe.initial).expanduser()
    if source.tokenizer is None or not (folder / "tokenizer_config.json").is_file():
        return
    from path_attention.data.tokenizer import load_tokenizer

    if load_tokenizer(str(folder), "initial").get_vocab() != source.tokenizer.get_vocab():
        raise ValueError(
            f"data.tokenizer: wanted that of the model to start from, {folder}, got another one: the same numbers "
            "would stand for other texts"
        )


def write_whole(path: Path, text: str) -> None:
    """Writes a file beside its place and renames it there: it is the old one or the new one, never half."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _train_one(
    recipe: Recipe,
    source: Source,
    mixer: str,
    config: Any,
    folder: Path,
    deadline: float,
    console: Console | None,
) -> Run:
    from transformers import set_seed

    from path_attention.models import PaTHForCausalLM
    from path_attention.training.trainer import RecipeTrainer

    # The model before this one is in cycles; and what was compiled for it counts against dynamo's limit.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if recipe.training.compile:
        torch.compiler.reset()
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / RECIPE, recipe.to_yaml())
    if source.key:
        write_whole(folder / DATA, json.dumps({"key": source.key}) + "\n")
    set_seed(recipe.training.seed)
    model: torch.nn.Module
    if recipe.initial:
        model = PaTHForCausalLM.from_pretrained(Path(recipe.initial).expanduser(), dtype=torch.float32)
    else:
        model = PaTHForCausalLM(config)
    parameters = sum(p.numel() for p in model.parameters())
    trainer = RecipeTrainer(model, source, recipe.training, folder, console=console, title=mixer, deadline=deadline)
    fit(trainer, folder, console, mixer)
    _save_final(trainer, source.tokenizer, folder)
    if trainer.mesh is not None:  # its own shards are no model that reads long sequences on one device
        dist.barrier()
        whole: torch.nn.Module = PaTHForCausalLM.from_pretrained(folder / FINAL)
        model = whole.to(trainer.args.device)
    with torch.compiler.set_stance("force_eager"):
        measurements = _measure(source, model, mixer, folder, console, writes=trainer.is_world_process_zero())
    run = Run(folder, mixer, measurements, _facts(recipe, source, parameters, trainer))
    if trainer.is_world_process_zero():
        run.write()
    return run


def _save_final(trainer: Any, tokenizer: Any, folder: Path) -> None:
    """FOLDER/final, whole or not at all."""
    from path_attention.training.trainer import writing

    partial = folder / f"{FINAL}.partial"
    with writing("the trained model", folder):
        trainer.save_model(str(partial))
        if trainer.is_world_process_zero():
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
            shutil.rmtree(folder / FINAL, ignore_errors=True)
            os.rename(partial, folder / FINAL)


def fit(trainer: Any, folder: Path, console: Console | None, title: str) -> None:
    """Train to the end, from the last whole checkpoint in the folder where there is one.

    Raises:
        Unfinished: training stopped in good order before its end.
    """
    from path_attention.training.trainer import COMPLETE, ShowProgress, last_checkpoint

    checkpoint = last_checkpoint(folder)
    if trainer.is_world_process_zero():
        complete = {p.parent for p in folder.glob(f"checkpoint-*/{COMPLETE}")}
        for half_written in set(folder.glob("checkpoint-*")) - complete:
            shutil.rmtree(half_written)
    if checkpoint is not None and console:
        console.print(f"{title}: continues from {checkpoint}")
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        trainer.stop.close()
        trainer.recorded = None  # and with it the memory of its graph
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ShowProgress):
                callback.close()
    step, steps = trainer.state.global_step, trainer.settings.steps
    if step < steps:
        raise Unfinished(f"{title}: stopped at step {step} of {steps}; the same command goes on")


def _facts(recipe: Recipe, source: Source, parameters: int, trainer: Any) -> dict[str, Any]:
    """What a run's numbers rest on."""
    from path_attention.training.trainer import METRICS, read_metrics

    settings = recipe.training
    facts: dict[str, Any] = {
        "recipe": recipe.name,
        "steps": settings.steps,
        "tokens": settings.steps * settings.batch_size * source.length,
        "seed": settings.seed,
        "parameters": parameters,
        "training_seconds": round(trainer.metrics_file.seconds, 1),
        "processes": trainer.args.world_size,
        **machine(trainer.args.device),
    }
    for name, summary in (("tokens_per_second", statistics.median), ("peak_memory_mib", max)):
        if found := [entry[name] for entry in read_metrics(trainer.folder / METRICS) if name in entry]:
            facts[name] = summary(found)
    return facts


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers of a run depend on besides the recipe: the kind of device, its threads, and versions."""
    import transformers

    import path_attention

    return {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type} ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "versions": {
            "path_attention": path_attention.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def _device(recipe: Recipe) -> torch.device:
    if recipe.training.device == "auto" and torch.accelerator.is_available():
        current = torch.accelerator.current_accelerator()
        assert current is not None
        return current
    return torch.device("cpu")


def open_data(recipe: Recipe, console: Console | None) -> Source:
    """The source of a recipe, with progress on the console; raises as :func:`open_source`."""
    report = Report(console)
    try:
        return open_source(recipe, report)
    finally:
        report.close()


def _measure(
    source: Source,
    model: torch.nn.Module,
    title: str,
    folder: Path,
    console: Console | None,
    *,
    writes: bool = True,
) -> dict[str, Measurement]:
    """Everything the recipe wants to know of a final model; writes positions.json."""
    report = Report(console, title)
    try:
        measurements = source.evaluate(model, progress=report)
        positions = source.long_losses(model, report)
    finally:
        report.close()
    if positions is not None and writes:
        write_whole(folder / POSITIONS, json.dumps(dataclasses.asdict(positions)) + "\n")
    return measurements


# Seconds between two lines about the same work, off a terminal.
_LINE_EVERY = 15.0


class Report:
    """Rows of one progress bar, made as they are asked for; off a terminal lines, at the beginning and now and then."""

    def __init__(self, console: Console | None, title: str = "") -> None:
        self.console, self.title = console, title
        self.bar: Any = None

    def __call__(self, name: str) -> Callable[[int, int | None], None]:
        row: Any = None
        title, told = f"{self.title} {name}".strip(), time.monotonic()

        def report(done: int, total: int | None) -> None:
            nonlocal row, told
            if row is None:
                row, told = self._begin(title, total), time.monotonic()
            if self.bar is not None:
                self.bar.update(row, completed=done)
            elif self.console is not None and time.monotonic() - told > _LINE_EVERY:
                told = time.monotonic()
                self.console.print(f"{title}: {100 * done // total} %" if total else f"{title}: {done:,}")

        return report

    def _begin(self, title: str, total: int | None) -> int:
        """A new row; its number."""
        if self.console is None or not self.console.is_terminal:
            if self.console is not None:
                self.console.print(f"{title} ...")
            return 0
        if self.bar is None:
            from path_attention.training.trainer import progress_bar

            self.bar = progress_bar(self.console)
            self.bar.start()
        row: int = self.bar.add_task(title, total=total, note="")
        return row

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()


def _check_same_recipe(recipe: Recipe, folder: Path) -> None:
    """Raises a ValueError if the folder was begun by a recipe that would train another model."""
    if not (folder / RECIPE).is_file():
        return
    remedy = "Give this one another name (name=...) or move the old one aside (--restart)."
    check_unchanged(read_recipe(folder).to_mapping(), recipe.to_mapping(), folder, HOW, HOW_TOO, remedy)


def check_unchanged(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    folder: Path,
    ignored: Sequence[str] = (),
    ignored_beginnings: tuple[str, ...] = (),
    remedy: str = "Wanted another folder, or the old one moved aside.",
    of: str = "recipe",
) -> None:
    """Raises a ValueError that names the keys, where what a folder was begun with differs from what is wanted now."""
    before, now = _flat(old), _flat(new)
    changed = [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key not in ignored and not key.startswith(ignored_beginnings or ("\0",))
    ]
    if changed:
        raise ValueError(f"{folder} holds a run of another {of}: {'; '.join(changed)}. {remedy}")


def _check_same_data(source: Source, folder: Path) -> None:
    """Raises a ValueError if the folder was begun with other text under the same recipe."""
    file = folder / DATA
    if not file.is_file() or (folder / EVALUATION).is_file():
        return
    before = json.loads(file.read_text())["key"]
    if before != source.key:
        raise ValueError(
            f"{folder} was begun with other data: files that the recipe names, or its tokenizer, have changed since. "
            "Bring them back, give this run another name (name=...) or move the old one aside (--restart)."
        )


def _flat(values: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(values, Mapping):
        return {path: values}
    return {k: v for key, item in values.items() for k, v in _flat(item, f"{path}.{key}" if path else key).items()}
