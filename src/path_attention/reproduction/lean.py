"""A training loop for tiny models, where the Trainer's own work per step would cost more than the step.

It does what the Trainer does with the same recipe: the same initial weights, sequences, loss, AdamW, schedule and
clipping (a test compares the losses). What differs is where: sequences of many steps are made at once on the device,
nothing in a step makes the host wait, and on CUDA the whole step is one CUDA graph, of compiled layers where the recipe
wants them compiled.
"""

import math
import os
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed

from path_attention.autocast import with_tf32
from path_attention.models import PaTHForCausalLM
from path_attention.tasks import IGNORED, GroupWords, Task
from path_attention.training.recipe import Recipe, TaskEvaluation
from path_attention.training.recorded import EAGER_STEPS, record
from path_attention.training.run import model_config
from path_attention.training.schedule import learning_rate_factor
from path_attention.training.source import TaskSource
from path_attention.training.trainer import TrainingDiverged

# Tokens whose sequences are made at once: 2^22 int64 ids and their random numbers take some 100 MB.
CHUNK_TOKENS = 2**22
# Steps after which the host looks at the clock, at the least.
MAX_CHUNK_STEPS = 64


class LeanTraining:
    """One model in training on one device, from a recipe with a task and one mixer.

    Args:
        recipe: the recipe; ``recipe.mixers`` has one entry.
        device: where everything happens.
        use_graphs: record the training step as a CUDA graph; no effect on other devices.

    Raises:
        ValueError: for a recipe without a task, or with gradient accumulation, which models of this size do without.
    """

    def __init__(self, recipe: Recipe, device: torch.device, *, use_graphs: bool = True) -> None:
        settings = recipe.training
        if recipe.task is None or not isinstance(recipe.evaluation, TaskEvaluation):
            raise ValueError("task: wanted a recipe with a synthetic task")
        if settings.accumulation_steps != 1:
            raise ValueError(f"training.accumulation_steps: wanted 1 here, got {settings.accumulation_steps}")
        self.recipe, self.settings, self.device = recipe, settings, device
        self.task: Task = recipe.task
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.use_graphs = use_graphs and device.type == "cuda"
        self.step, self.seconds = 0, 0.0
        self.stopped = False  # before its time: the task is solved, or nothing is learned
        self.curve: list[list[float]] = []  # evaluations on the way: step, rate of wrong answers
        self.graph: torch.cuda.CUDAGraph | None = None
        self.eager_left = EAGER_STEPS
        self.chunk = max(1, min(MAX_CHUNK_STEPS, CHUNK_TOKENS // (settings.batch_size * self.task.length)))
        set_seed(settings.seed)
        config = model_config(recipe, TaskSource(self.task, recipe.evaluation), recipe.mixers[0])
        with self.on_stream():
            model: Any = PaTHForCausalLM(config)
            self.model = model.to(device).train()
            if settings.compile:
                # Layer by layer, as the Trainer: one compilation serves all layers of all models of a mixer.
                for layer in self.model.model.layers:
                    layer.compile()
            self.optimizer = _optimizer(self.model, recipe, device)
            self.rates = _learning_rates(recipe).to(device)
            shape = (self.chunk, settings.batch_size, self.task.length)
            self.ids = torch.zeros(shape, dtype=torch.int64, device=device)
            self.labels = torch.full(shape, IGNORED, dtype=torch.int64, device=device)
            self.losses = torch.zeros(settings.steps, device=device)
            # Where the step finds itself: its number in the training, and in the sequences that lie ready.
            self.number = torch.zeros(1, dtype=torch.int64, device=device)
            self.cursor = torch.zeros(1, dtype=torch.int64, device=device)

    def on_stream(self) -> Any:
        """This training's CUDA stream, so that several trainings in one process overlap."""
        return torch.cuda.stream(self.stream)  # with None it does nothing

    @property
    def done(self) -> bool:
        return self.stopped or self.step >= self.settings.steps

    def autocast(self) -> Any:
        """As the recipe's precision says; the cache of cast weights must not outlive a recorded step."""
        enabled = self.settings.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)

    def _products(self) -> Any:
        """Float32 products, those of the head, from tensor-float-32 operands where autocast rounds all others more."""
        rounds = self.settings.precision == "bfloat16"
        return with_tf32(self.device) if rounds else nullcontext()

    def hidden(self, input_ids: Tensor) -> Tensor:
        with self.autocast():
            return self.model.model(input_ids=input_ids).last_hidden_state

    def advance(self, until: int) -> None:
        """Launches the next steps, as many as sequences are made at once, at most to step ``until``."""
        steps = min(self.chunk, until - self.step)
        if self.graph is None and self.use_graphs:
            steps = min(steps, self.eager_left) or steps
        size = self.settings.batch_size
        with self.on_stream():
            first = self.step * size
            made = self.task.generate(
                self.settings.seed, torch.arange(first, first + steps * size, device=self.device), "train"
            )
            self.ids[:steps] = made.input_ids.unflatten(0, (steps, size))
            self.labels[:steps] = made.labels.unflatten(0, (steps, size))
            self.cursor.zero_()
            if self.use_graphs and self.graph is None and self.eager_left == 0:
                self._record()
            for _ in range(steps):
                if self.graph is not None:
                    self.graph.replay()
                else:
                    self._one_step()
        self.step += steps
        self.eager_left = max(0, self.eager_left - steps)

    def _one_step(self) -> None:
        """One optimiser step; everything in it, the learning rate and the step's number included, is on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        ids, labels = (x.index_select(0, self.cursor).squeeze(0) for x in (self.ids, self.labels))
        with self._products():
            loss = self._loss(self.hidden(ids), labels)
            loss.backward()
        if self.settings.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm)
        rate = self.rates.index_select(0, self.number).squeeze(0)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].copy_(rate)
            else:
                group["lr"] = float(rate)  # on the CPU, where it is no wait
        self.optimizer.step()
        self.losses.index_copy_(0, self.number, loss.detach()[None])
        self.number += 1
        self.cursor += 1

    def _loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy of the labels that there are, in float32."""
        logits, wanted, _ = self.logits(hidden, labels, self.task)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED)

    def logits(self, hidden: Tensor, labels: Tensor, task: Task) -> tuple[Tensor, Tensor, Tensor]:
        """Float32 logits (B, K, V), labels (B, K) and the positions before these labels (B, K), of all labels there
        are.

        Where a task has few labels these are its places alone, some without a label: with a large vocabulary the logits
        of the rest would fill the memory. How many there are is known beforehand, so that nobody waits to count them.
        """
        hidden, wanted = hidden[:, :-1], labels[:, 1:]
        if 2 * task.max_labels < task.length:
            place = (wanted != IGNORED).int().topk(task.max_labels, dim=1).indices
            wanted = wanted.gather(1, place)
            hidden = hidden.gather(1, place[..., None].expand(-1, -1, hidden.shape[-1]))
        else:
            place = torch.arange(wanted.shape[1], device=wanted.device).expand(len(wanted), -1)
        return self.model.lm_head(hidden.float()), wanted, place

    def _record(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.graph, _ = record(self._one_step, self.device, self.stream)

    def ready(self) -> bool:
        """Whether the device has done all that was launched, so that :meth:`check` would not wait."""
        return self.stream is None or self.stream.query()

    def check(self) -> None:
        """Waits for the steps launched so far.

        Raises:
            TrainingDiverged: a loss was not finite.
        """
        if self.stream is not None:
            self.stream.synchronize()
        losses = self.losses[: self.step]
        if not bool(losses.isfinite().all()):
            first = int((~losses.isfinite()).nonzero()[0])
            raise TrainingDiverged(f"training diverged: loss is {float(losses[first])} at step {first + 1}")

    def save(self, path: Path) -> None:
        """A checkpoint, whole or not at all."""
        self.check()
        partial = path.with_suffix(".partial")
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "stopped": self.stopped,
            "curve": self.curve,
            "losses": self.losses[: self.step].clone(),
        }
        torch.save(state, partial)
        os.replace(partial, path)

    def load(self, path: Path) -> None:
        """Takes up a checkpoint; only before the first step."""
        assert self.step == 0
        with self.on_stream():
            state = torch.load(path, map_location=self.device, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds = state["step"], state["seconds"]
            self.stopped, self.curve = state["stopped"], state["curve"]
            self.losses[: self.step] = state["losses"]
            self.number.fill_(self.step)


def _optimizer(model: torch.nn.Module, recipe: Recipe, device: torch.device) -> torch.optim.AdamW:
    """The Trainer's AdamW: no decay of norms and biases, the parameters that are vectors."""
    settings, cuda = recipe.training, device.type == "cuda"
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    rate = torch.tensor(settings.learning_rate, device=device) if cuda else settings.learning_rate
    betas = (settings.betas[0], settings.betas[1])
    return torch.optim.AdamW(groups, lr=rate, betas=betas, fused=cuda or None, capturable=cuda)


def _learning_rates(recipe: Recipe) -> Tensor:
    """The rate of every step."""
    settings = recipe.training
    return torch.tensor(
        [settings.learning_rate * learning_rate_factor(settings, step) for step in range(settings.steps)]
    )


class Evaluation:
    """Wrong answers of a model on a task, a batch at a time; the host waits for the first batch only.

    Args:
        training: whose model.
        task: may have another length than the one of training.
        split: of the task.
        answers: so many, by the count in the first batch, and at least one batch.
    """

    def __init__(self, training: LeanTraining, task: Task, split: str, answers: int) -> None:
        settings = training.recipe.evaluation
        assert isinstance(settings, TaskEvaluation)
        self.training, self.task, self.split, self.seed = training, task, split, settings.seed
        # The recipe's batch is meant for training's length.
        self.batch_size = max(1, settings.batch_size * training.task.length // task.length)
        self.wanted, self.sequences, self.total = answers, 0, math.inf
        with training.on_stream():
            self.counts = torch.zeros(3, dtype=torch.int64, device=training.device)
            self.right_so_far = torch.zeros(task.length - 1, dtype=torch.int64, device=training.device)

    def batches(self) -> Iterator[None]:
        """Computes; pauses after every batch is launched."""
        while self.sequences < self.total:
            self._batch()
            if self.total == math.inf:
                with self.training.on_stream():  # whose work the host is to wait for
                    first = int(self.counts[0])
                if first == 0:
                    warnings.warn(f"{self.split}: no answers in the first {self.batch_size} sequences", stacklevel=2)
                self.total = self.batch_size * math.ceil(self.wanted / max(1, first))
            yield

    @torch.no_grad()
    def _batch(self) -> None:
        training = self.training
        # Nothing is compiled for the few batches of an evaluation.
        with torch.compiler.set_stance("force_eager"), training.on_stream():
            indices = torch.arange(self.sequences, self.sequences + self.batch_size, device=training.device)
            made = self.task.generate(self.seed, indices, self.split)
            training.model.eval()
            hidden = training.hidden(made.input_ids)
            training.model.train()
            logits, answers, place = training.logits(hidden, made.answers, self.task)
            asked = answers != IGNORED
            wrong = asked & (logits.argmax(-1) != answers)
            wrong_at = torch.zeros_like(made.answers[:, 1:]).scatter(1, place, wrong.long())
            self.counts += torch.stack([asked.sum(), wrong.sum(), wrong.any(1).sum()])
            self.right_so_far += (wrong_at.cumsum(1) == 0).sum(0)
        self.sequences += self.batch_size

    def result(self) -> dict[str, Any]:
        """Answers, errors, sequences, those with an error, and of words how many have none up to each position."""
        with self.training.on_stream():
            count, errors, sequences_wrong = self.counts.tolist()
            right_up_to = self.right_so_far.tolist() if isinstance(self.task, GroupWords) else None
        return {
            "count": count,
            "errors": errors,
            "sequences": self.sequences,
            "sequences_wrong": sequences_wrong,
            "right_up_to": right_up_to,
        }
