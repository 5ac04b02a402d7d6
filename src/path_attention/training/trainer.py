"""transformers' Trainer, told what a recipe says, and what is written and shown while it runs."""

import contextlib
import importlib.util
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState

from path_attention.evaluation.perplexity import precision_context
from path_attention.tasks import IGNORED
from path_attention.training import checkpoint, divergence, parallel, recorded
from path_attention.training import recipe as recipes
from path_attention.training.callbacks import Speed, StopInTime
from path_attention.training.schedule import learning_rate_factor
from path_attention.training.source import Source, TrainingSet

METRICS, DIVERGENCE = "metrics.jsonl", "divergence.json"
# The Trainer's name for the number of labels in all micro-batches of a step.
LABELS = "num_items_in_batch"
# Written into a checkpoint once all of it is there: a folder without it was interrupted and is no checkpoint.
COMPLETE = "complete"


class TrainingDiverged(RuntimeError):
    """The loss or the gradient is no longer a finite number."""


class NotWritten(RuntimeError):
    """A checkpoint, or the trained model, could not be written: the disk is full, or not ours to write on."""


# In the messages of what torch's writers raise, which is no OSError: its own file format's, and a process's.
_WRITERS_ERRORS = ("inline_container", "PytorchStreamWriter", "[Errno ")


@contextlib.contextmanager
def writing(what: str, folder: Path) -> Iterator[None]:
    """Turns the errors of writers into one that says where the training stands.

    Raises:
        NotWritten: what is written within could not be.
    """
    try:
        yield
    except (OSError, RuntimeError, CheckpointException, SafetensorError) as error:
        if isinstance(error, RuntimeError | CheckpointException) and not any(x in str(error) for x in _WRITERS_ERRORS):
            raise
        reason = str(error).strip().splitlines()[-1][:200]
        free, last = shutil.disk_usage(folder).free / 2**20, last_checkpoint(folder)
        raise NotWritten(
            f"{folder}: {what} could not be written: {reason}; {free:,.0f} MiB are free there. The same command goes "
            f"on from {f'its last checkpoint, {last.name}' if last else 'the beginning: there is no checkpoint yet'}"
        ) from error


def training_arguments(settings: recipes.Training, folder: Path) -> TrainingArguments:
    """The Trainer's arguments for a recipe's ``training`` section.

    Raises:
        ValueError: if batch_size does not divide among the devices and accumulation steps; cuda_graphs beside several
            GPUs; processes that would not work together.
    """
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size // settings.accumulation_steps,
        gradient_accumulation_steps=settings.accumulation_steps,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        # Said where there is nothing else, too: else accelerate takes no notice of the other processes of torchrun, and
        # each would train by itself.
        use_cpu=settings.device == "cpu" or not torch.accelerator.is_available(),
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
        remove_unused_columns=False,  # the source makes what the model takes
        disable_tqdm=True,
        report_to=["tensorboard"] if importlib.util.find_spec("tensorboard") else [],
    )
    if settings.cuda_graphs and arguments.n_gpu > 1:
        raise ValueError(
            f"{settings.section}.cuda_graphs: wanted false, or one GPU (CUDA_VISIBLE_DEVICES=0), got true with "
            f"{arguments.n_gpu} GPUs"
        )
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if "RANK" in os.environ and arguments.world_size != processes:
        raise ValueError(
            f"training.device: got {settings.device} with {processes} processes, of which transformers makes "
            f"{arguments.world_size} here; wanted cpu, or torchrun with a GPU for each"
        )
    both = settings.parallel.tensor * settings.parallel.context
    devices = arguments.world_size * max(1, arguments.n_gpu) // both
    if settings.batch_size % (devices * settings.accumulation_steps):
        raise ValueError(
            f"training.batch_size: wanted a multiple of {devices} devices x {settings.accumulation_steps} "
            f"accumulation steps, got {settings.batch_size}"
        )
    arguments.per_device_train_batch_size = settings.batch_size // (devices * settings.accumulation_steps)
    return arguments


class RecipeTrainer(Trainer):
    """The Trainer on a recipe's source: it evaluates by the source's own measure and stops when a number is not finite.

    Checkpoints are those of :mod:`path_attention.training.checkpoint`, whatever the number of processes. With the
    strategy fsdp the processes share model and data as :mod:`path_attention.training.parallel` says; the Trainer, which
    cannot do so on CPUs or with context parallelism, then neither wraps the model nor divides the batches.

    Args:
        model: the model.
        source: the data and its measure.
        settings: the recipe's ``training`` section.
        folder: where checkpoints and metrics.jsonl go.
        console: where progress is shown.
        title: what it is called there.
        deadline: of time.monotonic(), after which training stops in good order.
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
        deadline: float = math.inf,
    ) -> None:
        arguments = training_arguments(settings, folder)
        self.mesh = None
        if settings.parallel.strategy == "fsdp":
            self.mesh = parallel.make_mesh(settings, arguments.device)
            model.to(arguments.device)
        parallel.prepare(model, settings, self.mesh)
        data = TrainingSet(source, settings.seed, settings.steps * settings.batch_size)
        super().__init__(
            model=model,
            args=arguments,
            data_collator=source.collate,
            train_dataset=data,
            # The Trainer insists on one where it is to evaluate; evaluate() below does not use it.
            eval_dataset=data,
        )
        self.language_model: Any = model
        self.source, self.settings, self.folder = source, settings, folder
        self.micro_batches: list[dict[str, Any]] = []  # of the step in hand, for the case that it diverges
        self.recorded: recorded.RecordedPasses | None = None
        if settings.cuda_graphs and (recorder := recorded.recorder_for(arguments.device)) is not None:
            self.recorded = recorded.RecordedPasses(self._passes, model.parameters(), recorder)
        if self.mesh is not None:
            accelerator: Any = self.accelerator
            accelerator.prepare_model = lambda model, **_: model
        for unwanted in (PrinterCallback, ProgressCallback):
            self.remove_callback(unwanted)
        self.metrics_file = MetricsFile(folder / METRICS)
        self.speed = Speed(settings.batch_size * source.length)
        self.stop = StopInTime(deadline)
        for callback in (self.speed, self.metrics_file, MarkComplete(), self.stop):
            self.add_callback(callback)
        if console is not None:
            self.add_callback(ShowProgress(console, title))

    # --- data ----------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Any]:
        if self.mesh is None:
            return super().get_train_dataloader()
        shares, rank = self.mesh["data"].size(), self.mesh["data"].get_local_rank()
        size = self.args.per_device_train_batch_size
        assert isinstance(self.train_dataset, TrainingSet)
        return DataLoader(
            self.train_dataset,
            batch_sampler=parallel.SharedBatches(len(self.train_dataset), size, rank, shares),
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The micro-batches of a step, and the labels in those of all processes."""
        if self.mesh is None:
            batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        else:
            batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
            count = torch.stack([(batch["labels"][..., 1:] != IGNORED).sum() for batch in batches]).sum().to(device)
            dist.all_reduce(count, group=self.mesh["data"].get_group())
        self.micro_batches = batches
        return batches, count

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # Boundaries are read on the host: there they cost no wait.
        boundaries = {name: x for name, x in inputs.items() if name == "cu_seqlens"}
        return super()._prepare_inputs({n: x for n, x in inputs.items() if n not in boundaries}) | boundaries

    # --- a step --------------------------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward pass of a micro-batch, recorded where the recipe wants it; its loss.

        Raises:
            GraphCaptureFailed: CUDA refuses to record them.
        """
        if self.recorded is None or "cu_seqlens" in inputs:  # boundaries that the host reads
            return super().training_step(model, inputs, num_items_in_batch)
        given = self._prepare_inputs(inputs)
        if num_items_in_batch is not None:
            given[LABELS] = torch.as_tensor(num_items_in_batch, device=self.args.device)
        try:
            return self.recorded(given)
        except recorded.GraphCaptureFailed as error:
            option = f"{self.settings.section}.cuda_graphs"
            raise recorded.GraphCaptureFailed(
                f"{option}: step {self.state.global_step + 1} could not be recorded: {error}. The same command with "
                f"{option}=false goes on from the last checkpoint"
            ) from error

    def _passes(self, given: dict[str, Tensor]) -> Tensor:
        inputs = {name: x for name, x in given.items() if name != LABELS}
        return super().training_step(self.language_model, inputs, given.get(LABELS))

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        # accelerate's own autocast would also turn all logits into float32.
        return precision_context(self.settings.precision, self.args.device)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.mesh is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.language_model.context is not None:
            inputs = parallel.context_shard(inputs, self.language_model.context)
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        # The sum over this process's labels by the number of all; FSDP takes the mean over the data's shares.
        loss = outputs.loss * self.mesh["data"].size()
        return (loss, outputs) if return_outputs else loss

    def _clip_grad_norm(self, model: Any) -> Tensor:
        norm = self._finite_norm()
        parallel.clip_gradients(self.language_model.parameters(), self.args.max_grad_norm, norm)
        return norm

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        return self._finite_norm() if grad_norm is None else grad_norm

    def _finite_norm(self) -> Tensor:
        """The norm of the gradient, before anything is done with it: weights are still as they were.

        Raises:
            TrainingDiverged: it is not finite, as when the loss is not.
        """
        norm = parallel.gradient_norm(self.language_model.parameters())
        if not math.isfinite(norm.item()):
            self._diverged(norm.item())
        return norm

    def _diverged(self, norm: float) -> None:
        """Write down what is known, and raise."""
        step, size = self.state.global_step + 1, self.settings.batch_size
        batches = [self._prepare_inputs(batch) for batch in self.micro_batches]

        def loss(batch: dict[str, Any]) -> Tensor:
            if self.language_model.context is not None:
                batch = parallel.context_shard(batch, self.language_model.context)
            with self.compute_loss_context_manager():
                found: Tensor = self.language_model(**batch).loss
            return found

        with torch.compiler.set_stance("force_eager"):
            found = divergence.examine(self.language_model, batches, loss)
        processes = [found]
        if dist.is_initialized() and dist.get_world_size() > 1:
            processes = [{} for _ in range(dist.get_world_size())]
            dist.all_gather_object(processes, found)
        good = last_checkpoint(self.folder)
        known = {
            "step": step,
            "sequences": [(step - 1) * size, step * size],
            "gradient_norm": str(norm),
            "last_good_checkpoint": good and good.name,
            "processes": processes,
        }
        if self.is_world_process_zero():
            (self.folder / DIVERGENCE).write_text(
                json.dumps(divergence.named(known), indent=1, allow_nan=False) + "\n", encoding="utf-8"
            )
        losses = ", ".join(f"{x:.4g}" for process in processes for x in process["losses"])
        first = next((p["first"] for p in processes if not p["first"].startswith("nothing")), processes[0]["first"])
        raise TrainingDiverged(
            f"training diverged at step {step}: the gradient's norm is {norm}, the loss {losses}; first not finite: "
            f"{first}. "
            f"Sequences {(step - 1) * size} to {step * size - 1} of the data; {self.folder / DIVERGENCE} has more. "
            f"Last good checkpoint: {good or 'none'}. A lower learning_rate or max_grad_norm in training may help."
        )

    def create_optimizer(self, model: Any = None) -> Any:
        """AdamW with a group for each mesh that parameters lie on, beside those with and without decay."""
        if self.mesh is None or self.optimizer is not None:
            return super().create_optimizer(model)
        decayed = set(self.get_decay_parameter_names(self.language_model))
        groups = [
            {"params": part, "weight_decay": self.args.weight_decay if decay else 0.0}
            for decay in (True, False)
            for part in parallel.by_mesh(
                p for n, p in self.language_model.named_parameters() if (n in decayed) == decay
            )
        ]
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.language_model)
        self.optimizer = kind(groups, **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            steps: Any = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                steps, lambda step: learning_rate_factor(self.settings, step)
            )
        return self.lr_scheduler

    # --- evaluation and logs --------------------------------------------------------------------------------------

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The source's quick evaluation, logged as eval_SPLIT."""
        with self.whole_sequences():
            results = self.source.evaluate(self.language_model, quick=True)
        metrics = {f"eval_{split}": measured.value for split, measured in results.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @contextlib.contextmanager
    def whole_sequences(self) -> Iterator[None]:
        """Every process reads whole sequences meanwhile, and nothing is compiled for their shapes."""
        context = self.language_model.context
        if context is not None:
            self.language_model.set_context_parallel(None)
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            if context is not None:
                self.language_model.set_context_parallel(context)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's, with the speed beside the loss."""
        if "loss" in logs:
            logs |= self.speed.numbers(self.args.device)
        super().log(logs, start_time)

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The whole model as save_pretrained writes it; in a checkpoint its configuration alone."""
        folder = Path(output_dir or str(self.args.output_dir))
        if _internal_call:
            if self.args.should_save:
                folder.mkdir(parents=True, exist_ok=True)
                self.language_model.config.save_pretrained(folder)
            return
        weights = checkpoint.whole_weights(self.language_model)
        if self.language_model.config.tie_word_embeddings:
            weights.pop("lm_head.weight", None)  # it is the embeddings', and may be a copy by now
        if self.args.should_save:
            self.language_model.save_pretrained(folder, state_dict=weights)

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        with writing(f"the checkpoint of step {self.state.global_step}", self.folder):
            super()._save_checkpoint(model, trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        checkpoint.save(self.language_model, self._optimizer(), Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Weights come with the optimiser's moments, later."""

    def _load_optimizer_and_scheduler(self, checkpoint_folder: str | None) -> None:
        if checkpoint_folder is None:
            return
        checkpoint.load(self.language_model, self._optimizer(), Path(checkpoint_folder))
        # The rate is a function of the step: with other processes there are other groups of parameters.
        step = TrainerState.load_from_json(str(Path(checkpoint_folder) / "trainer_state.json")).global_step
        scheduler: Any = self.lr_scheduler
        rates = [rate * learning_rate_factor(self.settings, step) for rate in scheduler.base_lrs]
        where = {"last_epoch": step, "_step_count": step + 1, "_last_lr": rates}
        scheduler.load_state_dict(scheduler.state_dict() | where)
        for group, rate in zip(self._optimizer().param_groups, rates, strict=True):
            group["lr"] = rate

    def _optimizer(self) -> torch.optim.Optimizer:
        """Ours, without accelerate's wrapping."""
        optimizer: Any = self.optimizer
        found: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        return found


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run folder, None where there is none."""
    found = [p.parent for p in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return max(found, key=lambda p: int(p.name.rpartition("-")[2]), default=None)


class MarkComplete(TrainerCallback):
    """Marks checkpoints that are whole."""

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        if dist.is_initialized():
            dist.barrier()  # every process has written its part
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
