"""What a recipe trains on and is measured by: a synthetic task or a byte corpus, behind one interface."""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from path_attention.data.bytes import VOCAB_SIZE, ByteCorpus
from path_attention.tasks import Score, Task, score
from path_attention.tasks.base import IGNORED
from path_attention.training.recipe import ByteEvaluation, Recipe, TaskEvaluation

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Measurement:
    """One number of an evaluation, and what it rests on.

    Args:
        value: the number, in ``unit``; lower is better in all there are.
        unit: "error rate" (in [0, 1]), "bits per byte" or "perplexity" (of a token).
        count: answers, bytes or tokens that were predicted.
        errors: wrong answers, for error rates.
        sequences: sequences or windows that were read.
    """

    value: float
    unit: str
    count: int
    sequences: int
    errors: int | None = None


class Source(ABC):
    """Data and measure of a recipe. Sequence i of the training data is a function of (seed, i)."""

    vocab_size: int
    length: int

    @abstractmethod
    def example(self, seed: int, index: int) -> dict[str, Tensor]:
        """``input_ids`` and ``labels``, int64 (L,), labels unshifted."""

    @abstractmethod
    def evaluate(
        self, model: torch.nn.Module, *, quick: bool = False, progress: Callable[[str], Progress] | None = None
    ) -> dict[str, Measurement]:
        """Measurements by split. Leaves the model's mode as it was and draws nothing from torch's generator.

        Args:
            model: called as ``model(input_ids=...)``, has ``.logits``.
            quick: on the smaller amount of data meant for looking in while training.
            progress: called with the split's name, gives what is called with the amounts done and wanted.
        """


class TrainingSet(Dataset[dict[str, Tensor]]):
    """The training sequences 0 .. size - 1 of a source under a seed."""

    def __init__(self, source: Source, seed: int, size: int) -> None:
        self.source, self.seed, self.size = source, seed, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.source.example(self.seed, index)


def open_source(recipe: Recipe, progress: Progress | None = None) -> Source:
    """The source of a recipe; ``progress`` hears of the building of a byte cache.

    Raises:
        FileNotFoundError, ValueError: where the text cannot be used, see :meth:`path_attention.data.ByteData.open`.
    """
    if recipe.task is not None:
        assert isinstance(recipe.evaluation, TaskEvaluation)
        ids = task_tokens(recipe.task, Path(recipe.initial).expanduser()) if recipe.initial else None
        return TaskSource(recipe.task, recipe.evaluation, ids)
    assert recipe.data is not None
    assert isinstance(recipe.evaluation, ByteEvaluation)
    return ByteSource(recipe.data.open(progress), recipe.evaluation)


def task_tokens(task: Task, folder: Path) -> Tensor | None:
    """The tokens of a language model that stand for a task's: each as it is written, one token of the model's
    tokenizer or one byte. None where the model has the task's own tokens.

    Raises:
        ValueError: the model has no one token for one of them.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if (folder / "tokenizer_config.json").is_file():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        encoded = [tokenizer.encode(name, add_special_tokens=False) for name in task.tokens]
    elif config["vocab_size"] == VOCAB_SIZE:
        encoded = [list(name.encode()) for name in task.tokens]
    elif config["vocab_size"] == task.vocab_size:
        return None
    else:
        raise ValueError(f"initial: {folder} has {config['vocab_size']} tokens and no tokenizer to write the task in")
    for name, ids in zip(task.tokens, encoded, strict=True):
        if len(ids) != 1:
            raise ValueError(f"task.name: the token {name!r} is {len(ids)} tokens of the model in {folder}; wanted one")
    return torch.tensor([ids[0] for ids in encoded])


class TaskSource(Source):
    """A synthetic task; each of its splits is measured by the rate of wrong answers.

    ``ids`` are other tokens than the task's own, see :func:`task_tokens`.
    """

    def __init__(self, task: Task, evaluation: TaskEvaluation, ids: Tensor | None = None) -> None:
        self.task, self.evaluation, self.ids = task, evaluation, ids
        self.vocab_size, self.length = task.vocab_size, task.length

    def example(self, seed: int, index: int) -> dict[str, Tensor]:
        examples = self.task.examples(seed, [index])
        return {
            "input_ids": self._written(examples.input_ids[0]),
            "labels": self._written(examples.labels[0]),
        }

    def _written(self, tokens: npt.NDArray[np.int64]) -> Tensor:
        """Tokens of the task as tokens of the model."""
        x = torch.from_numpy(tokens)
        return x if self.ids is None else torch.where(x == IGNORED, x, self.ids[x.clamp(min=0)])

    def evaluate(
        self, model: torch.nn.Module, *, quick: bool = False, progress: Callable[[str], Progress] | None = None
    ) -> dict[str, Measurement]:
        wanted = self.evaluation.quick_answers if quick else self.evaluation.answers
        results = {}
        for split in self.task.splits:
            total, sequences = Score(), 0
            report = progress(split) if progress else None
            while total.count < wanted:
                batch = range(sequences, sequences + self.evaluation.batch_size)
                examples = self.task.examples(self.evaluation.seed, batch, split)
                input_ids = self._written(examples.input_ids).numpy()
                (predictions,) = _forward(model, [input_ids], lambda logits, _: logits.argmax(-1))
                total += score(self._written(examples.answers).numpy(), predictions.cpu().numpy())
                sequences += len(batch)
                if report:
                    report(min(total.count, wanted), wanted)
            results[split] = Measurement(total.rate, "error rate", total.count, sequences, total.errors)
        return results


class ByteSource(Source):
    """A text corpus, measured in bits per byte of the validation files, or in perplexity where it has a tokenizer.

    Bits per byte: the negative log2-likelihood of all tokens but the first of each window, separators included,
    divided by the number of bytes among them. Each token sees the tokens before it in its window only.
    """

    def __init__(self, corpus: ByteCorpus, evaluation: ByteEvaluation) -> None:
        self.corpus, self.evaluation = corpus, evaluation
        self.vocab_size, self.length = corpus.vocab_size, corpus.length

    def example(self, seed: int, index: int) -> dict[str, Tensor]:
        window = torch.from_numpy(self.corpus.training_window(seed, index))
        return {"input_ids": window, "labels": window}

    def evaluate(
        self, model: torch.nn.Module, *, quick: bool = False, progress: Callable[[str], Progress] | None = None
    ) -> dict[str, Measurement]:
        starts = self.corpus.validation_starts(self.evaluation.quick_windows if quick else self.evaluation.windows)
        size = self.evaluation.batch_size
        batches = (
            np.stack([self.corpus.read("validation", s) for s in starts[n : n + size]])
            for n in range(0, len(starts), size)
        )
        report = progress("validation") if progress else None
        nats, predicted, done = 0.0, 0, 0
        for part in _forward(model, batches, self._window_loss):
            nats += float(part[0])
            predicted += int(part[1])
            done = min(done + size, len(starts))
            if report:
                report(done, len(starts))
        if not self.corpus.is_bytes:
            return {"validation": Measurement(math.exp(nats / predicted), "perplexity", predicted, len(starts))}
        bits = nats / math.log(2) / predicted
        return {"validation": Measurement(bits, "bits per byte", predicted, len(starts))}

    def _window_loss(self, logits: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Summed negative log-likelihood of the tokens after the first, and how many of those count."""
        targets = input_ids[:, 1:]
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="none"
        )
        counted = targets != self.corpus.separator if self.corpus.is_bytes else torch.ones_like(targets)
        return loss.double().sum(), counted.sum()


@torch.no_grad()
def _forward(model: torch.nn.Module, batches: Iterable[Any], measure: Callable[[Tensor, Tensor], Any]) -> Iterable[Any]:
    """``measure(logits, input_ids)`` of each batch, the model in evaluation mode meanwhile."""
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    try:
        results = []
        for batch in batches:
            input_ids = torch.from_numpy(batch).to(device)
            results.append(measure(model(input_ids=input_ids).logits, input_ids))
        return results
    finally:
        model.train(was_training)
