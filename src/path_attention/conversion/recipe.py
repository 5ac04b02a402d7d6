"""What a conversion is, in one YAML file: the student, how it begins, and up to three stages of training.

Stages are the ``training`` section of a training recipe with a few keys of their own; a stage that is not given is
left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml

from path_attention.conversion.objectives import CHUNK
from path_attention.data import ByteData, TokenData
from path_attention.training import strict
from path_attention.training.recipe import Mixer, Training, override, read_recipe_file, text_data

# Fields of the student that follow from the teacher.
_STUDENT_KEYS = ("w_rank", "conv_size", "num_reflections", "w_norm_eps", "scale_gate", "qk_norm")


@dataclass(frozen=True, kw_only=True)
class Initialisation:
    """How the student's new parameters begin; all others are the teacher's. In layers whose mixer has no RoPE, queries
    and keys are no longer rotated, and that is all that is taken away.

    Args:
        beta: of every token at the start, in (0, 2): with 0 transitions would be the identity, for ever, since the
            gradient of beta's bias is beta (1 - beta / 2) times that of beta, and that of w is proportional to beta.
            nearest: before any training the loss on ``evaluation.quick_windows`` is measured for a few of them, and the
            one with the lowest is taken.
        w: key makes w_t of the keys: w's projection is the key's, or its best approximation of the rank it has; random
            leaves it as in a new model. With w along its key, a token erases from the keys before it what is like its
            own, so that of like keys the latest counts most: some of what RoPE told the teacher.
        gate: mean number of tokens a forget gate reaches back, one number a head from the first to the last of these,
            spaced evenly in the logarithm.

    docs/conversion.md has the losses before training of these and others.
    """

    beta: float | Literal["nearest"] = 0.3
    w: Literal["key", "random"] = "key"
    gate: tuple[float, ...] = (8.0, 256.0)

    def __post_init__(self) -> None:
        known = self.beta == "nearest" if isinstance(self.beta, str) else 0 < self.beta < 2
        if not known:
            raise ValueError(f"initialisation.beta: wanted a number in (0, 2) or nearest, got {self.beta}")
        if len(self.gate) != 2 or min(self.gate) <= 0:
            raise ValueError(f"initialisation.gate: wanted two numbers above 0, got {list(self.gate)}")


@dataclass(frozen=True, kw_only=True)
class Stage(Training):
    """A stage of training.

    Args:
        length: tokens of a sequence; None means the data's.

    The others are those of :class:`path_attention.training.recipe.Training`.
    """

    length: int | None = None

    section: ClassVar[str] = "continued"  # the recipe's key

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except ValueError as error:
            raise ValueError(str(error).replace("training.", f"{self.section}.")) from error
        if self.length is not None and self.length < 2:
            raise ValueError(f"{self.section}.length: wanted at least 2 tokens, got {self.length}")
        if self.parallel.strategy != "ddp":
            raise ValueError(f"{self.section}.parallel: wanted nothing: a conversion runs on one device")


@dataclass(frozen=True, kw_only=True)
class Align(Stage):
    """Stage 1: each new layer's attention output is made like the teacher's, on the teacher's hidden states.

    Args:
        layers_at_once: layers trained together; None: all, in one pass. Fewer take less memory, and each group another
            pass over the teacher's layers up to it. Layers do not depend on one another, so the result is the same but
            for ``max_grad_norm``, which is the norm over a group.
    """

    layers_at_once: int | None = None

    section: ClassVar[str] = "align"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers_at_once is not None and self.layers_at_once < 1:
            raise ValueError(f"align.layers_at_once: wanted at least 1, got {self.layers_at_once}")
        for name in ("compile", "activation_checkpointing"):
            if getattr(self, name):
                raise ValueError(f"align.{name}: wanted false: one layer's attention is computed at a time")


@dataclass(frozen=True, kw_only=True)
class Distill(Stage):
    """Stage 2: all parameters, by the divergence of the student's next-token distribution from the teacher's.

    Args:
        attention_learning_rate: of the new layers' attention, where it is to be another than ``learning_rate``.
        chunk: tokens whose logits are in memory at once.
    """

    attention_learning_rate: float | None = None
    chunk: int = CHUNK

    section: ClassVar[str] = "distill"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("attention_learning_rate", "chunk"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"distill.{name}: wanted a number above 0, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What is measured after every stage, on the validation files.

    Args:
        windows: so many windows (or all, if there are fewer).
        quick_windows: the same while training, and for ``initialisation.beta: nearest``.
        batch_size: windows a forward pass.
        lengths: further lengths at which teacher and student are compared at the end.
        tokens: tokens of text read at each of these.
    """

    windows: int = 64
    quick_windows: int = 8
    batch_size: int = 4
    lengths: tuple[int, ...] = ()
    tokens: int = 262_144

    def __post_init__(self) -> None:
        for name in ("windows", "quick_windows", "batch_size", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"evaluation.{name}: wanted at least 1, got {getattr(self, name)}")
        if any(length < 2 for length in self.lengths):
            raise ValueError(f"evaluation.lengths: wanted numbers of at least 2, got {list(self.lengths)}")


@dataclass(frozen=True, kw_only=True)
class ConversionRecipe:
    """A whole conversion.

    Args:
        mixer: of the layers that are converted: path, path_fox, fox; or rope, the control that keeps the teacher's.
        keep_rope: layers that keep RoPE, by number from 0; negative ones count from the end.
        data: text, as a training recipe has it; ``tokenizer`` is the source's unless another is named.
        model: fields of the student that the teacher does not have: w_rank, conv_size, num_reflections, ...
        initialisation, align, distill, evaluation: see there.
        continued: stage 3, plain training on the text.
        dtype: of the weights that are written; source means the source's.
    """

    mixer: Mixer = "path"
    keep_rope: tuple[int, ...] = ()
    data: Mapping[str, Any] | None = None
    description: str = ""
    model: Mapping[str, Any] = field(default_factory=dict)
    initialisation: Initialisation = field(default_factory=Initialisation)
    align: Align | None = None
    distill: Distill | None = None
    continued: Stage | None = None
    evaluation: Measure = field(default_factory=Measure)
    dtype: Literal["source", "float32", "bfloat16", "float16"] = "source"

    def __post_init__(self) -> None:
        if self.mixer not in ("path", "path_fox", "fox", "rope"):
            raise ValueError(f"mixer: wanted path, path_fox, fox or rope, got {self.mixer!r}")
        strict.check_keys(self.model, _STUDENT_KEYS, "model")
        if self.data is None and (self.align or self.distill or self.continued):
            raise ValueError("data: missing; wanted the text that the stages train on")
        if self.data is None and self.beta_is_measured:
            raise ValueError("data: missing; wanted the text that initialisation.beta: nearest is measured on")
        if self.data is not None:
            self.text("tokenizer")

    @property
    def beta_is_measured(self) -> bool:
        """Whether the student has betas, and the nearest to the teacher is to be found."""
        return self.mixer in ("path", "path_fox") and self.initialisation.beta == "nearest"

    def text(self, tokenizer: str, length: int | None = None) -> ByteData | TokenData:
        """The text in windows of another length, where one is given.

        Args:
            tokenizer: a folder, for text in tokens that names none.
            length: tokens.

        Raises:
            ValueError: naming the key.
        """
        values = dict(self.data or {})
        if "files" in values or "dataset" in values:
            values = {"tokenizer": tokenizer, **values}
        if length is not None:
            values["length"] = length
        data = text_data(values)
        if isinstance(data, TokenData) and data.packing != "plain":
            raise ValueError(f"data.packing: wanted plain for a conversion, got {data.packing!r}")
        return data

    def layer_mixers(self, layers: int) -> list[str]:
        """The mixer of every layer of a student of so many.

        Raises:
            ValueError: ``keep_rope`` names a layer that is not there, or all of them.
        """
        kept = set()
        for layer in self.keep_rope:
            if not -layers <= layer < layers:
                raise ValueError(f"keep_rope: wanted layers of {layers}, counted from 0, got {layer}")
            kept.add(layer % layers)
        if len(kept) == layers and self.mixer != "rope":
            raise ValueError(f"keep_rope: wanted fewer than all {layers} layers; mixer: rope keeps them all")
        return ["rope" if layer in kept else self.mixer for layer in range(layers)]

    def to_mapping(self) -> dict[str, Any]:
        """Plain data that loads to this recipe again, every default written out."""
        plain: dict[str, Any] = strict.plain(self)
        return plain

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_mapping(), sort_keys=False, allow_unicode=True)


def load_conversion(source: str | Path, overrides: Sequence[str] = ()) -> ConversionRecipe:
    """A recipe from a YAML file or, by name, one of those shipped in ``recipes/convert``.

    Raises:
        FileNotFoundError, ValueError: as :func:`path_attention.training.load_recipe`.
    """
    values, _ = read_recipe_file(source, "convert")
    return strict.build(ConversionRecipe, override(values, overrides))
