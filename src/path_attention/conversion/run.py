"""The whole of a conversion: source in, stages in between, a model folder out; taken up where it was interrupted.

TARGET/config.json, model*.safetensors, tokenizer files, README.md    the student; config.json comes last
       conversion/recipe.yaml                                         the recipe, every default written out
                  source.json                                         what was converted
                  data.json                                           on what text
                  results.json                                        what was measured so far
                  align-FIRST-LAST/ distill/ continued/               a stage: metrics.jsonl, checkpoints to resume from
                                                                      while it runs, its weights once it is done
                  report.html, layers.png, ...
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import set_seed

from path_attention.conversion import report
from path_attention.conversion.checkpoint import TOKENIZERS, Checkpoint, check_target, find, write
from path_attention.conversion.families import FLA, OWN
from path_attention.conversion.initialise import BETAS, new_attentions, set_beta, student_of
from path_attention.conversion.recipe import Align, ConversionRecipe, Stage
from path_attention.conversion.stages import (
    Alignment,
    AlignmentTrainer,
    DistillationTrainer,
    TextSource,
    by_length,
    layer_errors,
)
from path_attention.data import ByteCorpus, TokenCorpus, TokenData
from path_attention.evaluation.perplexity import precision_context
from path_attention.models import PaTHConfig, PaTHForCausalLM
from path_attention.training.run import DATA, Report, check_unchanged, fit, machine, write_whole
from path_attention.training.trainer import RecipeTrainer

WORK, RECIPE, SOURCE, RESULTS, FINAL = "conversion", "recipe.yaml", "source.json", "results.json", "final.safetensors"


def translate(source: str | Path, target: Path, *, to: str = OWN.name, console: Console | None = None) -> Path:
    """Write a checkpoint of one family in the format of another that has the same function; nothing is trained.

    Between flash-linear-attention's PaTH models and ours, and from our ``rope`` models to a RoPE family's.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: see :class:`Checkpoint` and
            :func:`path_attention.conversion.checkpoint.write`.
    """
    check_target(target)
    folder = find(source)
    checkpoint = Checkpoint(folder)
    if checkpoint.family.name == to:
        raise ValueError(f"--to: wanted another format than that of {source}, {to}")
    model = checkpoint.load()
    write(model, target, source=folder, to=to, card=report.card_of_translation(str(source), checkpoint.family, to))
    if console:
        console.print(f"{checkpoint.family.name} -> {to}: {sum(p.numel() for p in model.parameters()):,} parameters")
    return target


def convert(
    source: str | Path, target: Path, recipe: ConversionRecipe, *, console: Console | None = None
) -> dict[str, Any]:
    """Convert a RoPE model by a recipe, and write the student, a model card and a report to ``target``.

    Args:
        source: a folder, or a name on the Hugging Face hub.
        target: a new folder, or that of an interrupted conversion of the same source by the same recipe.
        recipe: the recipe.
        console: where progress is shown.

    Returns:
        What was measured: the contents of results.json.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: before anything is computed, naming what does not fit.
        TrainingDiverged: a loss that is not finite.
        Unfinished: it was told to stop (SIGTERM), and did so in good order.
    """
    check_target(target, WORK)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("WORLD_SIZE: wanted one process: a conversion runs on one device")
    folder = find(source)
    checkpoint = Checkpoint(folder)
    if checkpoint.family is FLA or set(checkpoint.config.mixers) != {"rope"}:
        mixers = ", ".join(sorted(set(checkpoint.config.mixers)))
        raise ValueError(f"source: wanted a RoPE model, got one with {mixers}; --to writes it in another format")
    return _Conversion(str(source), checkpoint, target, recipe, console).run()


class _Conversion:
    """One conversion under way."""

    def __init__(
        self, source: str, checkpoint: Checkpoint, target: Path, recipe: ConversionRecipe, console: Console | None
    ) -> None:
        self.source, self.checkpoint, self.target, self.recipe = source, checkpoint, target, recipe
        self.console, self.work = console, target / WORK
        self.config = _student_config(checkpoint, recipe)
        self.stages: dict[str, Stage] = {
            name: stage for name in ("align", "distill", "continued") if (stage := getattr(recipe, name)) is not None
        }
        self.first = next(iter(self.stages.values()), None)
        self.device = _device(self.first)
        self._check_same()
        self.precision = "float32" if self.first is None else self.first.precision
        self.corpora: dict[int, ByteCorpus | TokenCorpus] = {}
        if recipe.data is not None:
            self._check_text()
        half = self.precision == "bfloat16" and checkpoint.dtype.itemsize == 2
        self.teacher = checkpoint.load(dtype=torch.bfloat16 if half else torch.float32)
        self.work.mkdir(parents=True, exist_ok=True)
        write_whole(self.work / RECIPE, recipe.to_yaml())
        if recipe.data is not None:
            write_whole(self.work / DATA, json.dumps({"key": self._text(None).key}) + "\n")
        write_whole(self.work / SOURCE, json.dumps(self._source_facts(), indent=2) + "\n")
        file = self.work / RESULTS
        self.results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}

    def run(self) -> dict[str, Any]:
        teacher = self.teacher
        teacher.to(self.device).eval().requires_grad_(False)  # type: ignore[arg-type]
        # The student is on the device only where all of it is needed: alignment takes a few layers' attention.
        student = self._student(teacher)
        self._note("facts", lambda: self._facts(student))
        if self.recipe.beta_is_measured:
            self._take_nearest_beta(student)
        if self.recipe.data is not None:
            self._measure("teacher", teacher)
            self._measure("initial", student)
            student.cpu()
        for name in self.stages:
            {"align": self._align, "distill": self._distill, "continued": self._continue}[name](student, teacher)
            self._measure(name, student)
            student.cpu()
        if self.recipe.data is not None and self.recipe.evaluation.lengths:
            self._note("by_length", lambda: {"teacher": self._by_length(teacher), "student": self._by_length(student)})
        self._write(student)
        return self.results

    # --- how it begins -----------------------------------------------------------------------------------------------

    def _student(self, teacher: PaTHForCausalLM) -> PaTHForCausalLM:
        options = self.recipe.initialisation
        if options.beta == "nearest":
            options = replace(options, beta=BETAS[0])  # until it is measured
        return student_of(teacher, self.config, options, 0 if self.first is None else self.first.seed)

    def _take_nearest_beta(self, student: PaTHForCausalLM) -> None:
        """Measured once and written down before any training, so that a conversion taken up again begins the same."""
        self._note("beta", lambda: self._by_beta(student))
        found = self.results["beta"]
        set_beta(student, found["nearest"])
        if self.console:
            tried = ", ".join(f"{beta}: {loss:.3f}" for beta, loss in found["losses"].items())
            self.console.print(f"beta: {found['nearest']}, the lowest of the losses before training: {tried}")

    def _by_beta(self, student: PaTHForCausalLM) -> dict[str, Any]:
        """The loss with each of :data:`BETAS`."""
        text, progress = self._text(None), Report(self.console, "initial")
        student.to(self.device)  # type: ignore[arg-type]
        losses: dict[float, float] = {}
        try:
            row = progress("betas")
            for beta in BETAS:
                set_beta(student, beta)
                found = text.evaluate(student, quick=True)["validation"]
                losses[beta] = found.value
                row(len(losses), len(BETAS))
        finally:
            progress.close()
        nearest = min(losses, key=lambda beta: math.inf if math.isnan(losses[beta]) else losses[beta])
        by_name = {str(beta): loss for beta, loss in losses.items()}
        return {"nearest": nearest, "losses": by_name, "windows": found.sequences}

    # --- the stages --------------------------------------------------------------------------------------------------

    def _align(self, student: PaTHForCausalLM, teacher: PaTHForCausalLM) -> None:
        """Stage 1, group by group of layers."""
        stage = self.recipe.align
        assert stage is not None
        layers = list(new_attentions(student))
        size = stage.layers_at_once or max(1, len(layers))
        for group in (layers[n : n + size] for n in range(0, len(layers), size)):
            self._align_group(stage, group, student, teacher)

    def _align_group(self, stage: Align, group: list[int], student: PaTHForCausalLM, teacher: PaTHForCausalLM) -> None:
        folder = self.work / f"align-{group[0]:03}-{group[-1]:03}"
        attentions = {n: attention for n, attention in new_attentions(student).items() if n in group}
        for attention in attentions.values():
            attention.requires_grad_(True)
        alignment = Alignment(teacher, attentions, self.config)
        source = self._text(stage)
        batches = source.windows(self.recipe.evaluation.windows)

        def errors() -> dict[str, float]:
            with precision_context(stage.precision, self.device):
                return {str(n): error for n, error in layer_errors(alignment, batches).items()}

        alignment.to(self.device)
        self._note(f"{folder.name} before", errors)
        if not (folder / FINAL).is_file():
            title = f"align layers {group[0]} to {group[-1]}"
            shown: dict[str, Any] = {"console": self.console, "title": title}
            trainer = self._fit(lambda: AlignmentTrainer(alignment, source, stage, folder, **shown), stage, title)
            self._finish(folder, alignment.state_dict(), trainer)
        alignment.load_state_dict(load_file(folder / FINAL))
        self._note(f"{folder.name} after", errors)
        alignment.cpu()

    def _distill(self, student: PaTHForCausalLM, teacher: PaTHForCausalLM) -> None:
        stage = self.recipe.distill
        assert stage is not None
        self._train_whole(
            "distill",
            student,
            stage,
            lambda source, folder: DistillationTrainer(
                student, teacher, source, stage, folder, console=self.console, title="distill"
            ),
        )

    def _continue(self, student: PaTHForCausalLM, teacher: PaTHForCausalLM) -> None:
        stage = self.recipe.continued
        assert stage is not None
        self._train_whole(
            "continued",
            student,
            stage,
            lambda source, folder: RecipeTrainer(
                student, source, stage, folder, console=self.console, title="continued"
            ),
        )

    def _train_whole(
        self, name: str, student: PaTHForCausalLM, stage: Stage, build: Callable[[TextSource, Path], RecipeTrainer]
    ) -> None:
        """A stage of all parameters."""
        folder = self.work / name
        if not (folder / FINAL).is_file():
            student.requires_grad_(True)
            enabled = any(getattr(module, "gradient_checkpointing", False) for module in student.modules())
            if enabled and not stage.activation_checkpointing:
                # transformers 5.17 has the old name only, and newer versions warn of it.
                old = student.gradient_checkpointing_disable
                getattr(student, "activation_checkpointing_disable", old)()
            trainer = self._fit(lambda: build(self._text(stage), folder), stage, name)
            self._finish(folder, _untied(student), trainer)
        student.load_state_dict(load_file(folder / FINAL), strict=False)
        student.tie_weights()

    def _fit(self, build: Callable[[], RecipeTrainer], stage: Stage, title: str) -> RecipeTrainer:
        set_seed(stage.seed)
        trainer = build()
        trainer.folder.mkdir(parents=True, exist_ok=True)
        fit(trainer, trainer.folder, self.console, title)
        return trainer

    def _finish(self, folder: Path, state: dict[str, torch.Tensor], trainer: RecipeTrainer) -> None:
        """The stage's weights; its checkpoints, three times as large, have served."""
        seconds, stage = trainer.metrics_file.seconds, trainer.settings
        tokens = stage.steps * stage.batch_size * trainer.source.length
        self._note(f"{folder.name} speed", lambda: {"seconds": round(seconds, 1), "tokens": tokens})
        partial = folder / f"{FINAL}.partial"
        save_file({name: x.contiguous() for name, x in state.items()}, str(partial))
        os.replace(partial, folder / FINAL)
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)

    # --- what is measured --------------------------------------------------------------------------------------------

    def _measure(self, name: str, model: PaTHForCausalLM) -> None:
        def measure() -> dict[str, Any]:
            progress = Report(self.console, name)
            try:
                model.to(self.device)  # type: ignore[arg-type]
                found = self._text(None).evaluate(model, progress=progress)["validation"]
            finally:
                progress.close()
            return {"perplexity": math.exp(found.value), "loss": found.value, "tokens": found.count}

        self._note(name, measure)
        if self.console:
            found = self.results[name]
            self.console.print(f"{name}: perplexity {found['perplexity']:.4f}, loss {found['loss']:.4f}")

    def _by_length(self, model: PaTHForCausalLM) -> dict[str, Any]:
        return by_length(model.to(self.device), self._text(None))  # type: ignore[arg-type]

    def _note(self, name: str, measure: Callable[[], Any]) -> None:
        """Measure once, and write it down at once."""
        if name not in self.results:
            self.results[name] = measure()
            write_whole(self.work / RESULTS, json.dumps(self.results, indent=1) + "\n")

    # --- around it ---------------------------------------------------------------------------------------------------

    def _text(self, stage: Stage | None) -> TextSource:
        """The text in windows of a stage's length, or of the data's."""
        return TextSource(self._corpus(stage), self.recipe.evaluation, self.precision)

    def _corpus(self, stage: Stage | None) -> ByteCorpus | TokenCorpus:
        data = self.recipe.text(str(self.checkpoint.folder), None if stage is None else stage.length)
        if data.length not in self.corpora:
            report = Report(self.console)
            try:
                if isinstance(data, TokenData):
                    self.corpora[data.length] = data.open(report)
                else:
                    self.corpora[data.length] = data.open(report("reading files"))
            finally:
                report.close()
        return self.corpora[data.length]

    def _check_text(self) -> None:
        """That the text is in the model's tokens, and long enough for everything that is to come."""
        data = self.recipe.text(str(self.checkpoint.folder))
        folder, size = self.checkpoint.folder, self.config.vocab_size
        own = isinstance(data, TokenData) and data.tokenizer == str(folder)
        if own and not any((folder / name).is_file() for name in TOKENIZERS):
            raise ValueError(f"data.tokenizer: wanted one, for {folder} has none")
        known = self._corpus(None).vocab_size
        if known > size or (not isinstance(data, TokenData) and known != size):
            raise ValueError(f"data: wanted text in the model's {size} tokens, got {known}")
        for name, stage in self.stages.items():
            try:
                self._corpus(stage)
            except ValueError as error:
                raise ValueError(str(error).replace("data.length", f"{name}.length")) from error
        file = self.work / DATA
        if file.is_file() and json.loads(file.read_text())["key"] != self._text(None).key:
            raise ValueError(
                f"{self.work} was begun with other text: files that the recipe names, or its tokenizer, have changed "
                "since. Bring them back, or move the old folder aside."
            )
        if self.recipe.evaluation.lengths:
            try:
                self._text(None).long_windows(1, max(self.recipe.evaluation.lengths))
            except ValueError as error:
                raise ValueError(f"evaluation.lengths: {error}") from error

    def _facts(self, student: PaTHForCausalLM) -> dict[str, Any]:
        parameters = sum(p.numel() for p in student.parameters())
        return {"source": self.source, "parameters": parameters, **machine(self.device)}

    def _source_facts(self) -> dict[str, Any]:
        folder = self.checkpoint.folder
        weights = {file.name: file.stat().st_size for file in sorted(folder.glob("*.safetensors"))}
        config = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
        return {"source": self.source, "family": self.checkpoint.family.name, "config": config, "weights": weights}

    def _check_same(self) -> None:
        """Raise a ValueError if the folder was begun with another recipe or source."""
        if (self.work / RECIPE).is_file():
            old = yaml.safe_load((self.work / RECIPE).read_text(encoding="utf-8"))
            check_unchanged(old, self.recipe.to_mapping(), self.work, ("description",))
        if (self.work / SOURCE).is_file():
            old = json.loads((self.work / SOURCE).read_text())
            check_unchanged(old, json.loads(json.dumps(self._source_facts())), self.work, ("source",), of="source")

    def _write(self, student: PaTHForCausalLM) -> None:
        dtype = self.checkpoint.dtype if self.recipe.dtype == "source" else getattr(torch, self.recipe.dtype)
        student.config.use_cache = True
        student.to("cpu", dtype)  # type: ignore[arg-type, call-overload]
        report.write_report(self.work, self.recipe, self.results)
        card = report.card(self.source, self.checkpoint, self.recipe, self.results)
        write(student, self.target, source=self.checkpoint.folder, card=card, begun=WORK)
        if self.console:
            self.console.print(f"written to {self.target}; report: {self.work / 'report.html'}")


def _student_config(checkpoint: Checkpoint, recipe: ConversionRecipe) -> PaTHConfig:
    """The teacher's configuration with the recipe's mixers."""
    fields = dict(checkpoint.fields)
    mixers = recipe.layer_mixers(checkpoint.config.num_hidden_layers)
    if "rope" not in mixers:
        fields.pop("rotary_scaling", None)
    fields |= {"mixer": recipe.mixer, "layer_mixers": mixers if len(set(mixers)) > 1 else None}
    try:
        return PaTHConfig(**(fields | dict(recipe.model)))
    except Exception as error:  # huggingface_hub's strict dataclasses have exception types of their own
        raise ValueError(f"model: {' '.join(str(error).split())}") from error


def _device(stage: Stage | None) -> torch.device:
    if stage is not None and stage.device == "auto" and torch.accelerator.is_available():
        current = torch.accelerator.current_accelerator()
        assert current is not None
        return current
    return torch.device("cpu")


def _untied(model: PaTHForCausalLM) -> dict[str, torch.Tensor]:
    """The state without what is tied to another tensor of it."""
    state: dict[str, torch.Tensor] = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    return state
