"""What a recipe trains on and is measured by: a synthetic task, bytes or tokens, behind one interface."""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from path_attention.data.bytes import VOCAB_SIZE, ByteCorpus, ByteData
from path_attention.data.tokenizer import load_tokenizer
from path_attention.data.tokens import TokenCorpus, TokenData
from path_attention.evaluation.perplexity import PositionLosses, bucket_width, measure_positions, precision_context
from path_attention.tasks import IGNORED, Score, Task, score
from path_attention.training.recipe import ByteEvaluation, Recipe, TaskEvaluation, TokenEvaluation

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class Measurement:
    """One number of an evaluation, and what it rests on.

    Args:
        value: the number, in ``unit``; lower is better in all there are.
        unit: "error rate" (in [0, 1]), "bits per byte" or "nats per token".
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
    """Data and measure of a recipe. Sequence i of the training data is a function of (seed, i).

    Attributes:
        vocab_size: number of different tokens.
        length: tokens of a training sequence.
        sequences: different training sequences; None where there is no end of them.
        key: tells this data from other data under the same recipe; "" where the recipe says all.
        precision: what models are evaluated in, float32 or bfloat16.
        tokenizer: of transformers, where text is in tokens.
    """

    vocab_size: int
    length: int
    sequences: int | None = None
    key: str = ""
    precision: str = "float32"
    tokenizer: Any = None

    @abstractmethod
    def example(self, seed: int, index: int) -> dict[str, Tensor]:
        """``input_ids`` and ``labels``, int64 (L,), labels unshifted."""

    def collate(self, examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """A batch of them, as the model's forward takes it."""
        batch: dict[str, Tensor] = default_collate(list(examples))
        return batch

    def model_settings(self) -> dict[str, Any]:
        """What the data says of the model's configuration."""
        return {"vocab_size": self.vocab_size, "max_position_embeddings": self.length}

    def long_losses(
        self, model: torch.nn.Module, progress: Callable[[str], Progress] | None = None
    ) -> PositionLosses | None:
        """Losses by position on stretches longer than the training's sequences, where the recipe wants them."""
        return None

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


def open_source(recipe: Recipe, progress: Callable[[str], Progress] | None = None) -> Source:
    """The source of a recipe.

    Args:
        recipe: the recipe.
        progress: called with what is being done, gives what hears of its progress.

    Raises:
        FileNotFoundError, ValueError: where the text cannot be used, see :meth:`path_attention.data.ByteData.open` and
            :meth:`path_attention.data.TokenData.open`.
    """
    source = _open_source(recipe, progress)
    source.precision = recipe.training.precision
    if source.sequences is not None and source.sequences < recipe.training.batch_size:
        raise ValueError(
            f"data: the training documents make {source.sequences} sequences of {source.length} tokens, fewer than one "
            f"batch; wanted training.batch_size = {recipe.training.batch_size} at least"
        )
    return source


def _open_source(recipe: Recipe, progress: Callable[[str], Progress] | None) -> Source:
    if recipe.task is not None:
        assert isinstance(recipe.evaluation, TaskEvaluation)
        if not recipe.initial:
            return TaskSource(recipe.task, recipe.evaluation)
        ids, tokenizer = task_tokens(recipe.task, Path(recipe.initial).expanduser())
        source = TaskSource(recipe.task, recipe.evaluation, ids)
        source.tokenizer = tokenizer
        return source
    if isinstance(recipe.data, TokenData):
        assert isinstance(recipe.evaluation, TokenEvaluation)
        return TokenSource(recipe.data.open(progress), recipe.evaluation)
    assert isinstance(recipe.data, ByteData)
    assert isinstance(recipe.evaluation, ByteEvaluation)
    return ByteSource(recipe.data.open(progress and progress("reading files")), recipe.evaluation)


def task_tokens(task: Task, folder: Path) -> tuple[Tensor | None, Any]:
    """The tokens of a language model that stand for a task's, and the model's tokenizer.

    Each stands as it is written, as one token of the tokenizer or, without one, one byte; None and None where the model
    has the task's own tokens.

    Raises:
        FileNotFoundError: no model there.
        ValueError: the model has no one token for one of them.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"initial: no model in {folder}")
    size = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    tokenizer = None
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = load_tokenizer(str(folder), "initial")
        encoded = [tokenizer.encode(name, add_special_tokens=False) for name in task.tokens]
    elif size == VOCAB_SIZE:
        encoded = [list(name.encode()) for name in task.tokens]
    elif size == task.vocab_size:
        return None, None
    else:
        raise ValueError(f"initial: {folder} has {size} tokens and no tokenizer to write the task in")
    for name, ids in zip(task.tokens, encoded, strict=True):
        if len(ids) != 1:
            raise ValueError(f"task.name: the token {name!r} is {len(ids)} tokens of the model in {folder}; wanted one")
    return torch.tensor([ids[0] for ids in encoded]), tokenizer


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
                batches = [{"input_ids": self._written(examples.input_ids)}]
                (predictions,) = _forward(model, batches, lambda logits, _: logits.argmax(-1), self.precision)
                total += score(self._written(examples.answers).numpy(), predictions.cpu().numpy())
                sequences += len(batch)
                if report:
                    report(min(total.count, wanted), wanted)
            results[split] = Measurement(total.rate, "error rate", total.count, sequences, total.errors)
        return results


class ByteSource(Source):
    """A byte corpus, measured in bits per byte of the validation files.

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
            {"input_ids": torch.from_numpy(np.stack([self.corpus.read("validation", s) for s in starts[n : n + size]]))}
            for n in range(0, len(starts), size)
        )
        report = progress("validation") if progress else None
        nats, predicted, done = 0.0, 0, 0
        for part in _forward(model, batches, _window_loss, self.precision):
            nats += float(part[0])
            predicted += int(part[1])
            done = min(done + size, len(starts))
            if report:
                report(done, len(starts))
        bits = nats / math.log(2) / predicted
        return {"validation": Measurement(bits, "bits per byte", predicted, len(starts))}


class TokenSource(Source):
    """A token corpus, measured in nats per token of the validation documents.

    Nats per token: the mean of -log p over all tokens but the first of each window, or, packed by document, of each
    document in it. Each token sees the tokens before it in its window, or document, only.
    """

    def __init__(self, corpus: TokenCorpus, evaluation: TokenEvaluation) -> None:
        self.corpus, self.evaluation = corpus, evaluation
        self.vocab_size, self.length, self.key = corpus.vocab_size, corpus.length, corpus.key
        self.sequences, self.tokenizer = corpus.windows("train"), corpus.tokenizer
        if evaluation.long_length is not None:  # while there is time
            bucket_width(evaluation.long_length)
            corpus.long_starts(evaluation.long_length, 1)

    def example(self, seed: int, index: int) -> dict[str, Tensor]:
        return self._sequence("train", self.corpus.training_start(seed, index))

    def _sequence(self, split: Any, start: int) -> dict[str, Tensor]:
        tokens = torch.from_numpy(self.corpus.read(split, start))
        if self.corpus.packing == "plain":
            return {"input_ids": tokens, "labels": tokens}
        bounds = torch.from_numpy(self.corpus.cache.document_bounds(split, start, self.length))
        labels = tokens.clone()
        labels[bounds[:-1]] = IGNORED
        return {"input_ids": tokens, "labels": labels, "bounds": bounds}

    def collate(self, examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        if self.corpus.packing == "plain":
            return super().collate(examples)
        # One row of all documents: attention by boundaries knows no batch.
        row = {name: torch.cat([e[name] for e in examples])[None] for name in ("input_ids", "labels")}
        ends = [e["bounds"][1:] + n * self.length for n, e in enumerate(examples)]
        return row | {"cu_seqlens": torch.cat([torch.zeros(1, dtype=torch.int64), *ends]).to(torch.int32)}

    def model_settings(self) -> dict[str, Any]:
        names = ("bos_token_id", "eos_token_id")
        return super().model_settings() | {name: getattr(self.tokenizer, name) for name in names}

    def evaluate(
        self, model: torch.nn.Module, *, quick: bool = False, progress: Callable[[str], Progress] | None = None
    ) -> dict[str, Measurement]:
        starts = self.corpus.validation_starts(self.evaluation.quick_windows if quick else self.evaluation.windows)
        size = self.evaluation.batch_size
        report = progress("validation") if progress else None

        def batches() -> Iterable[dict[str, Tensor]]:
            for n in range(0, len(starts), size):
                yield self.collate([self._sequence("validation", s) for s in starts[n : n + size]])
                if report:
                    report(min(n + size, len(starts)), len(starts))

        parts = _forward(model, batches(), _label_loss, self.precision)
        nats, count = (sum(float(part[n]) for part in parts) for n in range(2))
        return {"validation": Measurement(nats / count, "nats per token", int(count), len(starts))}

    def long_losses(
        self, model: torch.nn.Module, progress: Callable[[str], Progress] | None = None
    ) -> PositionLosses | None:
        length = self.evaluation.long_length
        if length is None:
            return None
        starts = self.corpus.long_starts(length, self.evaluation.long_windows)
        report = progress(f"{length} tokens") if progress else None
        return measure_positions(
            model,
            (self.corpus.read("validation", start, length) for start in starts),
            precision=self.precision,
            progress=(lambda done: report(done, len(starts))) if report else None,
        )


def _window_loss(logits: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Summed negative log-likelihood of the tokens after the first, and how many of those are bytes."""
    targets = batch["input_ids"][:, 1:]
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="none")
    return loss.double().sum(), (targets < 256).sum()


def _label_loss(logits: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Summed negative log-likelihood of the labels, and how many they are."""
    targets = batch["labels"][:, 1:].flatten()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, reduction="none")
    return loss.double().sum(), (targets != IGNORED).sum()


@torch.no_grad()
def _forward(
    model: torch.nn.Module,
    batches: Iterable[dict[str, Tensor]],
    measure: Callable[[Tensor, dict[str, Tensor]], Any],
    precision: str,
) -> list[Any]:
    """``measure(logits, batch)`` of each batch, the model in evaluation mode meanwhile."""
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    try:
        results = []
        for batch in batches:
            # Boundaries are read on the host.
            placed = {name: x if name == "cu_seqlens" else x.to(device) for name, x in batch.items()}
            inputs = {name: x for name, x in placed.items() if name != "labels"}
            with precision_context(precision, device):
                logits = model(**inputs).logits
            results.append(measure(logits, placed))
        return results
    finally:
        model.train(was_training)
