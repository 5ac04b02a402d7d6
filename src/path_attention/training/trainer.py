"""transformers' Trainer, told what a recipe says, and what is written and shown while it runs."""

import importlib.util
import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from path_attention.training import recipe as recipes
from path_attention.training.source import Source, TrainingSet

METRICS = "metrics.jsonl"
# Written into a checkpoint once all of it is there: a folder without it was interrupted and is no checkpoint.
COMPLETE = "complete"

_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


class TrainingDiverged(RuntimeError):
    """The loss or the gradient is no longer a finite number."""


def training_arguments(settings: recipes.Training, folder: Path) -> TrainingArguments:
    """The Trainer's arguments for a recipe's ``training`` section.

    Raises:
        ValueError: if batch_size does not divide among the devices and accumulation steps.
    """
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size // settings.accumulation_steps,
        gradient_accumulation_steps=settings.accumulation_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=_SCHEDULES[settings.schedule],
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        bf16=settings.precision == "bfloat16",
        use_cpu=settings.device == "cpu",
        logging_steps=settings.log_every,
        # The default replaces a loss that is NaN by the mean so far; here it stops the run.
        logging_nan_inf_filter=False,
        eval_strategy="steps" if settings.eval_every else "no",
        eval_steps=settings.eval_every or None,
        save_strategy="steps",
        save_steps=settings.save_every,
        # The one before the last stays until the last is whole, should writing it be interrupted.
        save_total_limit=2,
        # Every parameter of these models takes part in every step.
        ddp_find_unused_parameters=False,
        dataloader_num_workers=settings.workers,
        # Sequence i is made from (seed, i): the order is the data, and skipping on resume costs nothing.
        train_sampling_strategy="sequential",
        dataloader_pin_memory=torch.cuda.is_available() and settings.device != "cpu",
        disable_tqdm=True,
        report_to=["tensorboard"] if importlib.util.find_spec("tensorboard") else [],
    )
    devices = arguments.world_size * max(1, arguments.n_gpu)
    if settings.batch_size % (devices * settings.accumulation_steps):
        raise ValueError(
            f"training.batch_size: wanted a multiple of {devices} devices x {settings.accumulation_steps} "
            f"accumulation steps, got {settings.batch_size}"
        )
    arguments.per_device_train_batch_size = settings.batch_size // (devices * settings.accumulation_steps)
    return arguments


class RecipeTrainer(Trainer):
    """The Trainer on a recipe's source: it evaluates by the source's own measure and stops when the loss is not finite.

    Args:
        model: the model.
        source: the data and its measure.
        settings: the recipe's ``training`` section.
        folder: where checkpoints and metrics.jsonl go.
        console: where progress is shown.
        title: what it is called there.
    """

    def __init__(
        self,
        model: Any,
        source: Source,
        settings: recipes.Training,
        folder: Path,
        *,
        console: Console | None = None,
        title: str = "",
    ) -> None:
        data = TrainingSet(source, settings.seed, settings.steps * settings.batch_size)
        super().__init__(
            model=model,
            args=training_arguments(settings, folder),
            train_dataset=data,
            # The Trainer insists on one where it is to evaluate; evaluate() below does not use it.
            eval_dataset=data,
        )
        self.source = source
        self.settings = settings
        self.folder = folder
        for unwanted in (PrinterCallback, ProgressCallback):
            self.remove_callback(unwanted)
        self.metrics_file = MetricsFile(folder / METRICS)
        self.add_callback(self.metrics_file)
        self.add_callback(MarkComplete())
        if console is not None:
            self.add_callback(ShowProgress(console, title))

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The source's quick evaluation, logged as eval_SPLIT."""
        assert isinstance(self.model, torch.nn.Module)
        results = self.source.evaluate(self.model, quick=True)
        metrics = {f"eval_{split}": measured.value for split, measured in results.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's. It comes before a checkpoint of the same step, so what diverged is never saved."""
        for name in ("loss", "grad_norm"):
            if name in logs and not math.isfinite(logs[name]):
                good = last_checkpoint(self.folder)
                raise TrainingDiverged(
                    f"training diverged: {name} is {logs[name]} at step {self.state.global_step}; last good checkpoint "
                    f"is {good or 'none'}. A lower learning_rate or max_grad_norm in training may help."
                )
        super().log(logs, start_time)


def fit(trainer: RecipeTrainer, folder: Path, console: Console | None, title: str) -> None:
    """Train, from the last whole checkpoint in the folder where there is one."""
    checkpoint = last_checkpoint(folder)
    if trainer.is_world_process_zero():
        whole = {p.parent for p in folder.glob(f"checkpoint-*/{COMPLETE}")}
        for half_written in set(folder.glob("checkpoint-*")) - whole:
            shutil.rmtree(half_written)
    if checkpoint is not None and console:
        console.print(f"{title}: continues from {checkpoint}")
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ShowProgress):
                callback.close()


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run folder, None where there is none."""
    found = [p.parent for p in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return max(found, key=lambda p: int(p.name.rpartition("-")[2]), default=None)


class MarkComplete(TrainerCallback):
    """Marks checkpoints that are whole."""

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero and args.output_dir:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


class MetricsFile(TrainerCallback):
    """Appends what is logged to metrics.jsonl: one object a line, with step and seconds trained so far.

    On resume, lines past the checkpoint are dropped, so that the file reads like that of an uninterrupted run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seconds_before, self._started = 0.0, 0.0

    @property
    def seconds(self) -> float:
        """Seconds of training, evaluations in between included, over all sessions of the run."""
        return self._seconds_before + time.monotonic() - self._started

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        kept = [entry for entry in read_metrics(self.path) if entry["step"] <= state.global_step]
        self._seconds_before = max((entry["seconds"] for entry in kept), default=0.0)
        self._started = time.monotonic()
        if state.is_world_process_zero:
            partial = self.path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
            os.replace(partial, self.path)

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if state.is_world_process_zero and logs and "train_runtime" not in logs:
            entry = {"step": state.global_step, "seconds": round(self.seconds, 3), **logs}
            entry.pop("epoch", None)
            with open(self.path, "a") as file:
                file.write(json.dumps(entry) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The entries of a metrics.jsonl; a last line that was cut off by an interruption is left out."""
    entries = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return entries


class ShowProgress(TrainerCallback):
    """A progress bar with the time left on a terminal; elsewhere a line every tenth of the way."""

    def __init__(self, console: Console, title: str) -> None:
        self.console, self.title = console, title
        self.loss = ""
        self.bar: Progress | None = None

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        self._started, self._first = time.monotonic(), state.global_step
        if state.is_world_process_zero and self.console.is_terminal:
            self.bar = progress_bar(self.console)
            self.bar.start()
            self.row = self.bar.add_task(self.title, total=state.max_steps, completed=state.global_step, note="")

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        step, steps = state.global_step, state.max_steps
        if self.bar is not None:
            self.bar.update(self.row, completed=step, note=self.loss)
        elif state.is_world_process_zero and step % max(1, steps // 10) == 0:
            elapsed = time.monotonic() - self._started
            left = elapsed / (step - self._first) * (steps - step)
            self.console.print(f"{self.title}: step {step} of {steps} {self.loss}, about {left:.0f} s left")

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.loss = f"loss {logs['loss']:.4f}"

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends the bar; also where training is interrupted, or the terminal stays without its cursor."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def progress_bar(console: Console) -> Progress:
    """The bar that training and evaluation show; rows have a field ``note``."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )
