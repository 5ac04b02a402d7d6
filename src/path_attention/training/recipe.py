"""Recipes: everything a training run is, in one YAML file.

A recipe names the data (``task``, a synthetic task made on the fly, or ``data``, text that is read as bytes or, with
``data.tokenizer``, in tokens), the model (fields of ``PaTHConfig``), the training and the evaluation, and one or
several mixers: models that differ in nothing else. With ``initial``, the weights of a finished model are where training
starts. Keys that are unknown, missing or of the wrong type are errors.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml

from path_attention.data.bytes import ByteData
from path_attention.data.tokens import TokenData
from path_attention.tasks import Task, task_class
from path_attention.training import strict

Mixer = Literal["path", "path_fox", "rope", "none", "fox", "stick_breaking", "alibi"]

# They follow from the data, the mixer list and the context length, so a recipe may not set them.
_DERIVED_MODEL_KEYS = ("vocab_size", "mixer")


def _positive(section: object, path: str, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if value is not None and not value > 0:
            raise ValueError(f"{path}.{name}: wanted a number above 0, got {value}")


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How several processes share a training; by torchrun or accelerate launch there may be any number of them.

    Args:
        strategy: ddp, every process holds the whole model; fsdp, parameters, gradients and optimiser states are sharded
            over the processes (FSDP2), all but those of ``tensor``.
        tensor: processes that share the heads and the width of every layer.
        context: processes that share every sequence, for mixers by the PaTH operator.
    """

    strategy: Literal["ddp", "fsdp"] = "ddp"
    tensor: int = 1
    context: int = 1

    def __post_init__(self) -> None:
        _positive(self, "training.parallel", "tensor", "context")
        if self.strategy == "ddp" and self.tensor * self.context > 1:
            raise ValueError("training.parallel.strategy: wanted fsdp beside tensor or context above 1, got ddp")


@dataclass(frozen=True, kw_only=True)
class Training:
    """How the weights are found: AdamW, by transformers' Trainer.

    Args:
        steps: optimiser steps.
        batch_size: sequences an optimiser step sees, over all devices and accumulated micro-batches.
        accumulation_steps: micro-batches a step is split into, to save memory.
        learning_rate: the peak.
        schedule: what follows the warm-up: cosine or linear descent to the final rate, or constant.
        warmup_steps: steps of linear rise from the initial rate.
        initial_learning_rate, final_learning_rate: at most the peak.
        weight_decay: AdamW's; not applied to biases and norms.
        betas: AdamW's.
        max_grad_norm: gradients are scaled down to this norm; 0 switches it off.
        seed: of the weights and of the data.
        log_every, eval_every, save_every: in steps; eval_every 0 evaluates at the end only. save_every must be a
            multiple of log_every: a logged loss is a mean over log_every steps, and a resumed run logs the same ones.
        precision: float32, or bfloat16 for autocast with float32 weights.
        device: auto takes an accelerator where there is one.
        workers: processes that make the data; 0 makes it in the main one.
        compile: torch.compile of the layers and of the loss.
        cuda_graphs: record forward and backward pass of a micro-batch as a CUDA graph and replay it: where kernels are
            short, launching them one by one takes longer than they do. For one process on one GPU; no effect on others.
        activation_checkpointing: keep the inputs of layers alone, and compute them again for the gradients.
        recompute_attention: compute the linear stages of attention by the PaTH operator again for the gradients. False
            keeps them: steps take less time and more memory (docs/kernels.md). No effect with parallel.context.
        parallel: how several processes share it.
    """

    steps: int
    batch_size: int
    learning_rate: float
    accumulation_steps: int = 1
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 0
    initial_learning_rate: float = 0.0
    final_learning_rate: float = 0.0
    weight_decay: float = 0.0
    betas: tuple[float, ...] = (0.9, 0.999)
    max_grad_norm: float = 1.0
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0
    save_every: int = 100
    precision: Literal["float32", "bfloat16"] = "float32"
    device: Literal["auto", "cpu"] = "auto"
    workers: int = 0
    compile: bool = False
    cuda_graphs: bool = False
    activation_checkpointing: bool = False
    recompute_attention: bool = True
    parallel: Parallel = Parallel()

    section: ClassVar[str] = "training"  # the recipe's key

    def __post_init__(self) -> None:
        _positive(self, "training", "steps", "batch_size", "learning_rate", "accumulation_steps")
        _positive(self, "training", "log_every", "save_every")
        for name in ("warmup_steps", "weight_decay", "max_grad_norm", "seed", "eval_every", "workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"training.{name}: wanted 0 or more, got {getattr(self, name)}")
        for name in ("initial_learning_rate", "final_learning_rate"):
            if not 0 <= getattr(self, name) <= self.learning_rate:
                raise ValueError(
                    f"training.{name}: wanted 0 to training.learning_rate = {self.learning_rate}, got "
                    f"{getattr(self, name)}"
                )
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"training.betas: wanted two numbers in [0, 1), got {list(self.betas)}")
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"training.warmup_steps: wanted fewer than training.steps = {self.steps}, got {self.warmup_steps}"
            )
        if self.batch_size % self.accumulation_steps:
            raise ValueError(
                f"training.accumulation_steps: wanted a divisor of training.batch_size = {self.batch_size}, "
                f"got {self.accumulation_steps}"
            )
        if self.save_every % self.log_every:
            raise ValueError(
                f"training.save_every: wanted a multiple of training.log_every = {self.log_every}, "
                f"got {self.save_every}"
            )
        if self.cuda_graphs and self.parallel.strategy == "fsdp":
            raise ValueError("training.cuda_graphs: wanted false beside training.parallel.strategy fsdp, got true")
        if self.cuda_graphs and self.activation_checkpointing:
            raise ValueError(  # torch's asks the GPU for its random state, which it does not tell while it records
                "training.cuda_graphs: wanted false beside training.activation_checkpointing, got true"
            )


@dataclass(frozen=True, kw_only=True)
class TaskEvaluation:
    """Evaluation on a task: sequences of each split are drawn until there are enough answers.

    Args:
        answers: at least so many answers a split, at the end.
        quick_answers: the same while training.
        batch_size: sequences a forward pass.
        seed: of the evaluation sequences. Splits are streams of their own: no seed repeats the training data.
    """

    answers: int = 20_000
    quick_answers: int = 1_000
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        _positive(self, "evaluation", "answers", "quick_answers", "batch_size")
        if self.seed < 0:
            raise ValueError(f"evaluation.seed: wanted 0 or more, got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class ByteEvaluation:
    """Evaluation on bytes: windows spread evenly over the validation files.

    Args:
        windows: so many (or all, if there are fewer) at the end.
        quick_windows: the same while training.
        batch_size: windows a forward pass.
    """

    windows: int = 256
    quick_windows: int = 32
    batch_size: int = 16

    def __post_init__(self) -> None:
        _positive(self, "evaluation", "windows", "quick_windows", "batch_size")


@dataclass(frozen=True, kw_only=True)
class TokenEvaluation:
    """Evaluation on tokens: sequences spread evenly over the validation documents, and long ones by position.

    Args:
        windows: so many (or all, if there are fewer) at the end.
        quick_windows: the same while training.
        batch_size: windows a forward pass.
        long_length: tokens of the long stretches on which the loss is measured by position at the end; None for none.
        long_windows: so many of them (or all, if there are fewer).
    """

    windows: int = 256
    quick_windows: int = 32
    batch_size: int = 8
    long_length: int | None = None
    long_windows: int = 32

    def __post_init__(self) -> None:
        _positive(self, "evaluation", "windows", "quick_windows", "batch_size", "long_length", "long_windows")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole recipe; exactly one of ``task`` and ``data`` is given.

    ``initial`` is a folder of save_pretrained, "" for random weights. A task is then written in the model's tokens: its
    tokenizer's, or bytes.
    """

    name: str
    training: Training
    model: Mapping[str, Any]
    evaluation: TaskEvaluation | ByteEvaluation | TokenEvaluation
    task: Task | None = None
    task_name: str | None = None
    data: ByteData | TokenData | None = None
    mixers: tuple[Mixer, ...] = ("path",)
    description: str = ""
    initial: str = ""

    def __post_init__(self) -> None:
        if self.training.cuda_graphs and isinstance(self.data, TokenData) and self.data.packing == "documents":
            raise ValueError(
                "training.cuda_graphs: wanted false beside data.packing documents, whose boundaries differ from batch "
                "to batch, got true"
            )

    def to_mapping(self) -> dict[str, Any]:
        """Plain data that loads to this recipe again, every default written out."""
        source = (
            {"task": {"name": self.task_name, **strict.plain(self.task)}}
            if self.task is not None
            else {"data": strict.plain(self.data)}
        )
        return {
            "name": self.name,
            "description": self.description,
            "mixers": list(self.mixers),
            "initial": self.initial,
            **source,
            "model": strict.plain(self.model),
            "training": strict.plain(self.training),
            "evaluation": strict.plain(self.evaluation),
        }

    def to_yaml(self) -> str:
        """:meth:`to_mapping` as YAML, keys in reading order."""
        return yaml.safe_dump(self.to_mapping(), sort_keys=False, allow_unicode=True)


@dataclass(frozen=True, kw_only=True)
class _Document:
    """The keys at the top of a recipe file."""

    training: Training
    model: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    description: str = ""
    mixers: tuple[Mixer, ...] = ("path",)
    initial: str = ""
    task: Mapping[str, Any] | None = None
    data: Mapping[str, Any] | None = None
    evaluation: Mapping[str, Any] = field(default_factory=dict)


def recipe_from_mapping(values: object, name: str = "") -> Recipe:
    """A recipe from plain data. ``name`` serves where the data has none.

    Raises:
        ValueError: naming the key, what came and what is wanted.
    """
    document = strict.build(_Document, values)
    name = document.name or name
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"name: wanted letters, digits, '.', '_' and '-' (it names the run folder), got {name!r}")
    if (document.task is None) == (document.data is None):
        raise ValueError(f"task: wanted either task or data, got {'both' if document.task is not None else 'neither'}")
    if not document.mixers or len(set(document.mixers)) != len(document.mixers):
        raise ValueError(f"mixers: wanted one or several different ones, got {list(document.mixers)}")
    if document.initial and document.model:
        raise ValueError(f"model: wanted nothing beside initial, whose model it is, got {sorted(document.model)}")
    for key in _DERIVED_MODEL_KEYS:
        if key in document.model:
            raise ValueError(f"model.{key}: follows from the rest of the recipe and cannot be set")
    task: Task | None = None
    task_name = None
    if document.task is not None:
        options = dict(document.task)
        task_name = options.pop("name", None)
        if not isinstance(task_name, str):
            raise ValueError(f"task.name: wanted the name of a task, got {task_name!r}")
        task = strict.build(task_class(task_name), options, "task")
    data = None if document.data is None else text_data(document.data)
    evaluation: type[TaskEvaluation | ByteEvaluation | TokenEvaluation] = TaskEvaluation
    if data is not None:
        evaluation = TokenEvaluation if isinstance(data, TokenData) else ByteEvaluation
    return Recipe(
        name=name,
        description=document.description,
        mixers=document.mixers,
        initial=document.initial,
        task=task,
        task_name=task_name,
        data=data,
        model=dict(document.model),
        training=document.training,
        evaluation=strict.build(evaluation, document.evaluation, "evaluation"),
    )


def text_data(values: Mapping[str, Any]) -> ByteData | TokenData:
    """Bytes, unless there is a key that only tokens have."""
    own = {"tokenizer", "files", "dataset"}
    return strict.build(TokenData, values, "data") if own & values.keys() else strict.build(ByteData, values, "data")


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe.

    Args:
        source: path of a YAML file, or the name of a recipe shipped with the package (``flip_flop_demo``).
        overrides: ``key.sub=value``, the value written as in YAML: ``training.steps=100``, ``mixers=[path]``.

    Raises:
        FileNotFoundError: if there is neither such a file nor such a shipped recipe.
        ValueError: naming the key, what came and what is wanted.
    """
    values, name = read_recipe_file(source)
    return recipe_from_mapping(override(values, overrides), name)


def read_recipe_file(source: str | Path, kind: str = "") -> tuple[dict[str, Any], str]:
    """The plain data of a YAML file or a shipped recipe of this kind, and its name; raises as :func:`load_recipe`."""
    text, name = _read(source, kind)
    try:
        values = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{source}: wanted a mapping of keys at the top, got {type(values).__name__}")
    return values, name


def override(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of nested plain data with ``key.sub=value`` items applied in order; see :func:`load_recipe`."""
    result: dict[str, Any] = copy.deepcopy(dict(values))
    for item in overrides:
        key, equals, value = item.partition("=")
        parts = key.split(".")
        if not equals or not all(parts):
            raise ValueError(f"override: wanted key.sub=value, got {item!r}")
        section = result
        for n, part in enumerate(parts[:-1]):
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise ValueError(f"{'.'.join(parts[: n + 1])}: holds a value, not keys, so {key} cannot be set")
        try:
            section[parts[-1]] = yaml.load(value, Loader=_Loader)
        except yaml.YAMLError as error:
            raise ValueError(f"{key}: not a valid YAML value: {value!r}") from error
    return result


def shipped_recipes(kind: str = "") -> tuple[str, ...]:
    """Names of the recipes inside the package: of training, or of the kind ``convert``."""
    folder = resources.files("path_attention") / "recipes" / kind
    return tuple(sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml")))


def _read(source: str | Path, kind: str) -> tuple[str, str]:
    path = Path(source)
    if path.is_file():
        return path.read_text(encoding="utf-8"), path.stem
    if str(source) in shipped_recipes(kind):
        file = resources.files("path_attention") / "recipes" / kind / f"{source}.yaml"
        return file.read_text(encoding="utf-8"), str(source)
    raise FileNotFoundError(
        f"no recipe {str(source)!r}: neither a file nor one of the shipped recipes ({', '.join(shipped_recipes(kind))})"
    )


class _Loader(yaml.SafeLoader):
    """YAML where 3e-3 is a number (YAML 1.1 wants 3.0e-3 and takes the rest for text) and keys are unique."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ValueError(f"{key}: given twice, again on line {key_node.start_mark.line + 1}")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+"), list("-+0123456789")
)
