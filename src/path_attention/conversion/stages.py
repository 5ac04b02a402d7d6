"""The stages of a conversion, each a recipe's trainer with an objective of its own."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from path_attention.autocast import without_autocast
from path_attention.conversion.initialise import new_attentions
from path_attention.conversion.objectives import divergence, output_error
from path_attention.conversion.recipe import Distill, Measure
from path_attention.data.bytes import ByteCorpus
from path_attention.data.tokens import TokenCorpus
from path_attention.evaluation.perplexity import precision_context, token_losses
from path_attention.layers.attention import Attention
from path_attention.models import PaTHConfig, PaTHForCausalLM
from path_attention.training.source import Measurement, Progress, Source
from path_attention.training.trainer import RecipeTrainer


class TextSource(Source):
    """A corpus, measured in nats per token on its validation text, however it is cut into tokens."""

    def __init__(self, corpus: ByteCorpus | TokenCorpus, settings: Measure, precision: str = "float32") -> None:
        self.corpus, self.settings, self.precision = corpus, settings, precision
        self.vocab_size, self.length = corpus.vocab_size, corpus.length
        if isinstance(corpus, TokenCorpus):
            self.key, self.sequences = corpus.key, corpus.windows("train")

    def example(self, seed: int, index: int) -> dict[str, Tensor]:
        if isinstance(self.corpus, TokenCorpus):
            window = self.corpus.read("train", self.corpus.training_start(seed, index))
        else:
            window = self.corpus.training_window(seed, index)
        tokens = torch.from_numpy(window)
        return {"input_ids": tokens, "labels": tokens}

    def windows(self, count: int) -> list[Tensor]:
        """Batches of validation windows (B, L)."""
        return self._batches(self.corpus.validation_starts(count), self.length, self.settings.batch_size)

    def long_windows(self, count: int, length: int) -> list[Tensor]:
        """Validation windows (1, length) that may be longer; in tokens, each within one document or folder.

        Raises:
            ValueError: there is no text as long.
        """
        if isinstance(self.corpus, TokenCorpus):
            starts = self.corpus.long_starts(length, count)
        else:
            starts = self.corpus.validation_starts(count, length)
            if not starts:
                raise ValueError(f"length: wanted at most the tokens of the validation files, got {length}")
        return self._batches(starts, length, 1)

    def _batches(self, starts: list[int], length: int, size: int) -> list[Tensor]:
        read = [torch.from_numpy(self.corpus.read("validation", start, length)) for start in starts]
        return [torch.stack(read[n : n + size]) for n in range(0, len(read), size)]

    def evaluate(
        self, model: nn.Module, *, quick: bool = False, progress: Callable[[str], Progress] | None = None
    ) -> dict[str, Measurement]:
        batches = self.windows(self.settings.quick_windows if quick else self.settings.windows)
        report = progress("validation") if progress else None
        total, count = 0.0, 0
        for n, losses in enumerate(self.losses(model, batches)):
            total, count = total + float(losses.double().sum()), count + losses.numel()
            if report:
                report(n + 1, len(batches))
        return {"validation": Measurement(total / count, "nats per token", count, sum(map(len, batches)))}

    def losses(self, model: nn.Module, batches: list[Tensor]) -> Iterator[Tensor]:
        """The losses (B, L - 1) of each batch of tokens, in evaluation mode."""
        device, was_training = next(model.parameters()).device, model.training
        model.eval()
        try:
            for batch in batches:
                with precision_context(self.precision, device):
                    yield token_losses(model, batch.to(device))
        finally:
            model.train(was_training)


def by_length(model: nn.Module, source: TextSource) -> dict[str, Any]:
    """Perplexity of the first so many tokens of long windows, and of the stretches between these lengths by their ends.

    The lengths are those of ``source.settings``, and the source's own.
    """
    lengths = sorted({*source.settings.lengths, source.length})
    batches = source.long_windows(max(1, source.settings.tokens // lengths[-1]), lengths[-1])
    losses = torch.stack([x.double().mean(0).cpu() for x in source.losses(model, batches)]).mean(0)
    stretches = zip([1, *lengths], lengths, strict=False)  # token n's loss is losses[n - 1]
    return {
        "windows": len(batches),
        "perplexity": {str(length): losses[: length - 1].mean().exp().item() for length in lengths},
        "stretches": {str(end): losses[start - 1 : end - 1].mean().exp().item() for start, end in stretches},
    }


class _Gradients(torch.autograd.Function):
    """A value whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: tuple[Tensor, ...], *parameters: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, d_value: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, None, *(d_value * gradient for gradient in ctx.saved_tensors)


class Alignment(nn.Module):
    """Students of some layers' attention beside a teacher, whose hidden states flow on unchanged.

    The loss is the sum over these layers of :func:`output_error`. Each layer's gradient is made right behind its
    forward pass, as no other layer is in it, so that the activations of one layer's attention are alive at a time.

    Args:
        teacher: frozen; not a part of this module.
        students: by number of the layer.
        config: of the model that they are layers of.
    """

    context = None  # sequences are whole

    def __init__(self, teacher: PaTHForCausalLM, students: Mapping[int, Attention], config: PaTHConfig) -> None:
        super().__init__()
        self.config = config
        self.students = nn.ModuleDict({str(n): attention for n, attention in students.items()})
        self._teacher = [teacher]  # in a list, which torch does not look into: it is neither trained nor saved

    @property
    def base_model(self) -> Any:
        """What the trainer asks for the layers of, when a loss is not finite."""
        return SimpleNamespace(layers=list(self.students.values()))

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> CausalLMOutputWithPast:
        return CausalLMOutputWithPast(loss=self.errors(input_ids).sum())

    def errors(self, input_ids: Tensor) -> Tensor:
        """Each student's error, (students,)."""
        decoder = self._teacher[0].model
        wanted = {int(n) for n in self.students}
        errors = []
        with torch.no_grad():
            x = decoder.embed_tokens(input_ids)
        for n, layer in enumerate(decoder._decoder_layers()[: max(wanted) + 1]):
            with torch.no_grad():
                normed = layer.input_layernorm(x)
                out = layer.self_attn(normed)
            if n in wanted:
                errors.append(self._error(self.students[str(n)], normed, out))
            with torch.no_grad():
                x = x + out
                x = x + layer.mlp(layer.post_attention_layernorm(x))
        return torch.stack(errors)

    @staticmethod
    def _error(student: nn.Module, normed: Tensor, out: Tensor) -> Tensor:
        error = output_error(student(normed), out)
        if not torch.is_grad_enabled():
            return error
        parameters = [p for p in student.parameters() if p.requires_grad]
        with without_autocast(error.device):
            gradients = torch.autograd.grad(error, parameters)
        found: Tensor = _Gradients.apply(error.detach(), gradients, *parameters)
        return found


class AlignmentTrainer(RecipeTrainer):
    """Stage 1. While training it is measured by the layers' errors on validation text."""

    source: TextSource

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        with precision_context(self.settings.precision, self.args.device):
            errors = layer_errors(self.language_model, self.source.windows(self.source.settings.quick_windows))
        metrics = {f"eval_layer_{n}": error for n, error in errors.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


@torch.no_grad()
def layer_errors(alignment: Alignment, batches: list[Tensor]) -> dict[int, float]:
    """The mean error of every student over batches of tokens, by number of the layer."""
    device = next(alignment.parameters()).device
    total = torch.stack([alignment.errors(batch.to(device)).double() for batch in batches]).mean(0)
    return dict(zip(map(int, alignment.students), total.tolist(), strict=True))


class DistillationTrainer(RecipeTrainer):
    """Stage 2: the mean over tokens of the divergence of the student's next-token distribution from the teacher's."""

    def __init__(
        self,
        student: PaTHForCausalLM,
        teacher: PaTHForCausalLM,
        source: Source,
        settings: Distill,
        folder: Path,
        *,
        console: Console | None = None,
        title: str = "",
    ) -> None:
        self._teacher = [teacher]
        self._distill = settings
        super().__init__(student, source, settings, folder, console=console, title=title)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        ids, teacher = inputs["input_ids"], self._teacher[0]
        with torch.no_grad():
            wanted = teacher.model(input_ids=ids).last_hidden_state[:, :-1]
        count = wanted.shape[:2].numel() if num_items_in_batch is None else num_items_in_batch

        def objective(states: Tensor, head: nn.Linear, labels: Tensor | None) -> Tensor:
            chunk = self._distill.chunk
            return divergence(states[:, :-1], head.weight, wanted, teacher.lm_head.weight, chunk) / count

        given = {"input_ids": ids, "objective": objective}
        return super().compute_loss(model, given, return_outputs, num_items_in_batch)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        rate = self._distill.attention_learning_rate
        fresh = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if fresh and rate is not None:
            layers = new_attentions(self.language_model).values()
            attention = {id(p) for layer in layers for p in layer.parameters()}
            for group in list(optimizer.param_groups):
                ours = [p for p in group["params"] if id(p) in attention]
                group["params"] = [p for p in group["params"] if id(p) not in attention]
                optimizer.add_param_group({**group, "params": ours, "lr": rate})
        return optimizer
