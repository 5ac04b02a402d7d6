"""The tables that ``path-attention reproduce`` makes: recipes, rows, variants, seeds and what is measured."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from path_attention.tasks import Task
from path_attention.training.recipe import Recipe, TaskEvaluation, load_recipe


@dataclass(frozen=True, kw_only=True)
class Row:
    """A kind of model: a mixer, and what else it sets in the recipe."""

    name: str
    label: str
    mixer: str
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A version of the problem or of the model's size that all rows are trained on.

    Args:
        name: of the variant, part of the cell's folder.
        label: in tables and plots.
        recipe: name of a shipped recipe.
        overrides: of that recipe.
    """

    name: str
    label: str
    recipe: str
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One evaluation of the final model.

    Args:
        name: in the JSON, tables and plots.
        split: of the task.
        task: fields of the task that differ from those of training, such as the length; a number is the value, a text
            such as "*4" a multiple of training's.
        share: how many answers, as a share of the recipe's ``evaluation.answers``.
    """

    name: str
    split: str
    task: Mapping[str, int | str] = field(default_factory=dict)
    share: float = 1.0

    def of(self, task: Task) -> Task:
        """The task to evaluate on."""
        values: dict[str, Any] = {}
        for name, value in self.task.items():
            values[name] = int(value[1:]) * getattr(task, name) if isinstance(value, str) else value
        return dataclasses.replace(task, **values)  # type: ignore[type-var]


class GiveUp(NamedTuple):
    """Training ends where nothing is learned: where after a share of the steps the rate of wrong answers is above a
    limit still.
    """

    share: float
    above: float


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table: every row on every variant with every seed.

    Args:
        name: as on the command line.
        title: of the report.
        shows: what a number is: the rate of wrong answers, the rate of right ones, or the number of letters of a word
            up to which 90 % of the words have no wrong answer.
        rows, variants, measures: see there; a column each pair of a variant and a measure. The first measure is the one
            looked at while training.
        seeds: how many, from 0.
        overrides: of all recipes.
        quick: further ones for a CPU and minutes.
        quick_variants: the names of those variants that the quick version has.
        stop_at: training ends early where the rate of wrong answers of the first measure is at most this; None never.
        give_up: and where that rate tells that no more is to be expected; None never.
        published: label -> the paper's numbers in the order of the columns.
        remark: what must be known to compare with the paper.
    """

    name: str
    title: str
    shows: Literal["errors", "accuracy", "solved"]
    rows: tuple[Row, ...]
    variants: tuple[Variant, ...]
    measures: tuple[Measure, ...]
    seeds: int = 3
    overrides: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()
    quick_variants: tuple[str, ...] = ()
    stop_at: float | None = None
    give_up: GiveUp | None = None
    published: Mapping[str, Sequence[str]] = field(default_factory=dict)
    remark: str = ""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model to train: its place in the table, and all that training needs."""

    table: str
    row: Row
    variant: Variant
    seed: int
    recipe: Recipe
    measures: tuple[Measure, ...]
    stop_at: float | None
    give_up: GiveUp | None

    def ends(self, step: int, wrong: float) -> bool:
        """Whether training ends after ``step`` steps where so large a rate of the answers is wrong."""
        if self.stop_at is not None and wrong <= self.stop_at:
            return True
        return self.give_up is not None and wrong > self.give_up.above and step >= self.give_up.share * self.steps

    @property
    def steps(self) -> int:
        return self.recipe.training.steps

    @property
    def looks(self) -> bool:
        """Whether training looks at its answers on the way."""
        return bool(self.recipe.training.eval_every) and (self.stop_at is not None or self.give_up is not None)

    @property
    def name(self) -> str:
        return f"{self.variant.name}-{self.row.name}-{self.seed}"

    def folder(self, runs: Path) -> Path:
        return runs / self.table / self.name

    @property
    def cost(self) -> int:
        """Of a training step, in relation to those of the same table; it decides the order alone.

        In layers; twice for stick-breaking, which writes its matrix of weights out, and three times for several
        reflections a token, whose leaves are some forty torch operators in place of one kernel.
        """
        model = self.recipe.model
        weight = 3 if model.get("num_reflections", 1) > 1 else 2 if self.row.mixer == "stick_breaking" else 1
        return weight * int(model.get("num_hidden_layers", 1))

    @property
    def task(self) -> Task:
        assert self.recipe.task is not None
        return self.recipe.task

    @property
    def evaluation(self) -> TaskEvaluation:
        assert isinstance(self.recipe.evaluation, TaskEvaluation)
        return self.recipe.evaluation


_MIXERS = (
    Row(name="path", label="PaTH", mixer="path"),
    Row(name="path_fox", label="PaTH-FoX", mixer="path_fox"),
    Row(name="fox", label="FoX", mixer="fox"),
    Row(name="stick_breaking", label="SBA", mixer="stick_breaking"),
    Row(name="rope", label="RoPE", mixer="rope"),
    Row(name="alibi", label="ALiBi", mixer="alibi"),
    Row(name="none", label="no position encoding", mixer="none"),
)
# The paper makes w by a projection of low rank and does not say of which; the model's default is 32.
_FULL_RANK = (
    Row(name="path_full", label="PaTH, full rank", mixer="path", overrides=("model.w_rank=null",)),
    Row(name="path_fox_full", label="PaTH-FoX, full rank", mixer="path_fox", overrides=("model.w_rank=null",)),
)
_TWICE = ("model.w_rank=null", "model.num_reflections=2")
_TWO_REFLECTIONS = (
    Row(name="path_2", label="PaTH, full rank, R = 2", mixer="path", overrides=_TWICE),
    Row(name="path_fox_2", label="PaTH-FoX, full rank, R = 2", mixer="path_fox", overrides=_TWICE),
)

_FLIP_FLOP_SPLITS = ("in_distribution", "sparse", "dense")
_TABLE1 = Table(
    name="table1",
    title="Flip-flop language modelling: wrong reads (table 1)",
    shows="errors",
    rows=_MIXERS,
    variants=(Variant(name="flip_flop", label="flip-flop", recipe="flip_flop"),),
    measures=(
        *(Measure(name=split.replace("_", " "), split=split) for split in _FLIP_FLOP_SPLITS),
        # Beyond the paper: eight times the length of training; fewer answers, for a sequence costs eight times as much.
        *(
            Measure(name=f"{split.replace('_', ' ')}, 8 x length", split=split, task={"length": "*8"}, share=0.1)
            for split in _FLIP_FLOP_SPLITS
        ),
    ),
    # Large batches, because a million reads of the sparse split are 280,000 sequences.
    overrides=("training.precision=bfloat16", "evaluation.batch_size=1024"),
    quick=(
        "task.length=64",
        "training.precision=float32",
        "training.steps=300",
        "training.learning_rate=3e-3",
        "training.batch_size=32",
        "training.eval_every=100",
        "evaluation.answers=2000",
        "evaluation.quick_answers=500",
        "evaluation.batch_size=64",
    ),
    published={
        "RoPE, paper": ("6.9 %", "40.3 %", "0.01 %"),
        "SBA, paper": ("9.6 %", "38.9 %", "0 %"),
        "FoX, paper": ("8.3 %", "36.3 %", "0 %"),
        "PaTH, paper": ("0 %", "0.0001 %", "0 %"),
    },
    remark="The paper does not say how long, at which learning rate or on how many sequences it trained. The columns "
    "of eight times the length are not in the paper.",
)

_MQRAR = Table(
    name="mqrar",
    title="MQRAR-N-back: right answers (figure 2, top)",
    shows="accuracy",
    rows=_MIXERS,
    variants=tuple(
        Variant(name=f"back{n}", label=f"N = {n}", recipe="mqrar", overrides=(f"task.back={n}",)) for n in (1, 2, 3, 4)
    ),
    measures=(Measure(name="held out", split="held_out"),),
    seeds=2,
    quick=(
        "task.length=64",
        "task.num_pairs=4",
        "task.num_queries=16",
        "task.vocabulary=32",
        "model.hidden_size=64",
        "model.intermediate_size=128",
        "training.precision=float32",
        "training.compile=false",
        "training.steps=400",
        "training.learning_rate=3e-3",
        "training.batch_size=32",
        "training.warmup_steps=50",
        "training.eval_every=200",
        "evaluation.answers=2000",
        "evaluation.quick_answers=500",
    ),
    quick_variants=("back1", "back2"),
    stop_at=0.001,
    # All 13 models with more than 98 % wrong after a third of 14,000 steps had as much later on
    # (results/mqrar_rank32.json, made without this rule).
    give_up=GiveUp(share=1 / 3, above=0.98),
    remark="The figure has no numbers in the text: PaTH succeeds for N below 4, SBA and FoX struggle. The paper's "
    "number of queries is not known; with 128 a sequence has 128, 97, 68 and 43 answers for N = 1 ... 4.",
)

_A5 = Table(
    name="a5",
    title="Words in A5: letters solved at 90 % (figure 2, bottom)",
    shows="solved",
    rows=_MIXERS + _FULL_RANK + _TWO_REFLECTIONS,
    variants=tuple(
        Variant(
            name=f"layers{n}",
            label=f"{n} layer{'s' if n > 1 else ''}",
            recipe="a5",
            overrides=(f"model.num_hidden_layers={n}",),
        )
        for n in (1, 2, 3, 4)
    ),
    measures=(Measure(name="held out", split="held_out"),),
    quick=(
        "task.group=S3",
        "task.word_length=8",
        "model.hidden_size=64",
        "model.num_attention_heads=2",
        "model.intermediate_size=128",
        "training.precision=float32",
        "training.steps=300",
        "training.learning_rate=3e-3",
        "training.batch_size=64",
        "training.warmup_steps=50",
        "training.eval_every=100",
        "evaluation.answers=4000",
        "evaluation.quick_answers=800",
        "evaluation.batch_size=128",
    ),
    quick_variants=("layers1", "layers2"),
    stop_at=0.0005,
    remark="The figure has no numbers in the text. Models are trained on words of 20 letters with the product after "
    "every letter as the answer; a word is solved up to its first wrong answer.",
)

_LENGTH = Table(
    name="length",
    title="Words four times as long as in training: letters solved at 90 %",
    shows="solved",
    rows=_MIXERS + _FULL_RANK + _TWO_REFLECTIONS,
    variants=(
        Variant(name="s5_swaps", label="swaps of S5, 1 layer", recipe="s5_swaps"),
        Variant(
            name="a5",
            label="generators of A5, 2 layers",
            recipe="s5_swaps",
            overrides=("task.group=A5", "model.num_hidden_layers=2"),
        ),
    ),
    measures=(
        Measure(name="length of training", split="held_out"),
        Measure(name="4 x length", split="held_out", task={"word_length": "*4"}),
    ),
    quick=(
        "task.group=S3",
        "task.word_length=12",
        "model.hidden_size=64",
        "model.intermediate_size=128",
        "training.precision=float32",
        "training.steps=400",
        "training.learning_rate=3e-3",
        "training.batch_size=64",
        "training.warmup_steps=50",
        "training.eval_every=100",
        "evaluation.answers=4000",
        "evaluation.quick_answers=800",
        "evaluation.batch_size=128",
    ),
    quick_variants=("s5_swaps",),
    remark="Not in the paper. Every model is trained on 64 letters; theorem 2.1 says that one PaTH layer of two heads "
    "can decide words of swaps of any length.",
)

TABLES: Mapping[str, Table] = MappingProxyType({t.name: t for t in (_TABLE1, _MQRAR, _A5, _LENGTH)})


def cells(
    name: str,
    *,
    quick: bool = False,
    seeds: int | None = None,
    rows: Sequence[str] = (),
    overrides: Sequence[str] = (),
) -> list[Cell]:
    """The cells of a table in the order in which they are done: seed by seed, so that a table that is cut off has all
    of its rows; within a seed the expensive ones first, so that processes that share them end together.

    Args:
        name: of the table.
        quick: the version for a CPU: smaller problems, fewer variants, one seed. Its runs are kept apart.
        seeds: how many instead of the table's.
        rows: names of the rows wanted; empty for all.
        overrides: of the recipes, applied last: ``training.steps=100``.

    Raises:
        ValueError: naming the argument, what was given and what is wanted.
    """
    if name not in TABLES:
        raise ValueError(f"table: got {name!r}; wanted one of {', '.join(TABLES)}")
    table = TABLES[name]
    known = [row.name for row in table.rows]
    if unknown := [row for row in rows if row not in known]:
        raise ValueError(f"--rows: got {unknown[0]!r}; wanted some of {', '.join(known)}")
    count = (1 if quick else table.seeds) if seeds is None else seeds
    if count < 1:
        raise ValueError(f"--seeds: got {count}; wanted at least 1")
    made = [
        Cell(
            table=f"{table.name}-quick" if quick else table.name,
            row=row,
            variant=variant,
            seed=seed,
            recipe=_recipe(table, row, variant, seed, quick, overrides),
            measures=table.measures,
            stop_at=table.stop_at,
            give_up=table.give_up,
        )
        for seed in range(count)
        for variant in table.variants
        if not quick or not table.quick_variants or variant.name in table.quick_variants
        for row in table.rows
        if not rows or row.name in rows
    ]
    return sorted(made, key=lambda cell: (cell.seed, -cell.cost))


def _recipe(table: Table, row: Row, variant: Variant, seed: int, quick: bool, overrides: Sequence[str]) -> Recipe:
    recipe = load_recipe(
        variant.recipe,
        (
            *table.overrides,
            *variant.overrides,
            *(table.quick if quick else ()),
            *row.overrides,
            f"mixers=[{row.mixer}]",
            f"training.seed={seed}",
            *overrides,
        ),
    )
    if recipe.task is None or not isinstance(recipe.evaluation, TaskEvaluation):
        raise ValueError(f"task: {table.name} wants a synthetic task, got data")
    if not re.fullmatch(r"[\w]+", row.name + variant.name):
        raise AssertionError("names of rows and variants are parts of file names")
    return recipe
