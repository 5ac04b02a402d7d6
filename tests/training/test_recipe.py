"""Recipes: what loads, what does not and what the error says, overrides, and the shipped ones."""

import re
from pathlib import Path

import pytest

from path_attention.training import load_recipe, recipe_from_mapping, shipped_recipes
from path_attention.training.recipe import override

GOOD = """
name: tiny
mixers: [path, rope]
task: {name: flip_flop, length: 16}
model: {hidden_size: 16}
training: {steps: 20, batch_size: 4, learning_rate: 3e-3, save_every: 10, log_every: 5}
"""


def load(tmp_path: Path, text: str, *overrides: str):  # type: ignore[no-untyped-def]
    file = tmp_path / "file_name.yaml"
    file.write_text(text)
    return load_recipe(file, overrides)


def test_values_arrive_typed(tmp_path: Path) -> None:
    recipe = load(tmp_path, GOOD)
    assert recipe.training.learning_rate == 0.003  # YAML 1.1 takes 3e-3 for text
    assert recipe.mixers == ("path", "rope")
    assert recipe.task.length == 16
    assert recipe.evaluation.answers == 20_000
    assert recipe.name == "tiny"
    assert load(tmp_path, GOOD.replace("name: tiny", "")).name == "file_name"


def test_resolved_recipe_loads_to_the_same(tmp_path: Path) -> None:
    recipe = load(tmp_path, GOOD)
    assert load(tmp_path, recipe.to_yaml()) == recipe
    assert recipe_from_mapping(recipe.to_mapping()) == recipe


def test_overrides(tmp_path: Path) -> None:
    recipe = load(tmp_path, GOOD, "training.steps=40", "mixers=[path_fox]", "task.clean=false", "model.head_dim=8")
    assert recipe.training.steps == 40
    assert recipe.mixers == ("path_fox",)
    assert recipe.task.clean is False
    assert recipe.model == {"hidden_size": 16, "head_dim": 8}
    original = {"a": {"b": 1}}
    assert override(original, ["a.b=2", "c.d=x=y"]) == {"a": {"b": 2}, "c": {"d": "x=y"}}
    assert original == {"a": {"b": 1}}


@pytest.mark.parametrize(
    "change, message",
    [
        ("training.stesp=3", "training.stesp: unknown key; did you mean steps?"),
        ("zebra=3", "zebra: unknown key; known here: "),
        ("training.steps=many", "training.steps: wanted a whole number, got 'many' (str)"),
        ("training.steps=2.5", "training.steps: wanted a whole number, got 2.5 (float)"),
        ("training.steps=true", "training.steps: wanted a whole number, got True (bool)"),
        ("training.steps=", "training.steps: wanted a whole number, got nothing"),
        ("training.steps=0", "training.steps: wanted a number above 0, got 0"),
        ("training.learning_rate='3e-3'", "training.learning_rate: wanted a number, got '3e-3' (str)"),
        ("training.learning_rate=-1.0", "training.learning_rate: wanted a number above 0, got -1.0"),
        ("training.schedule=cosin", "training.schedule: wanted one of cosine, linear, constant, got 'cosin' (str)"),
        ("training.warmup_steps=20", "training.warmup_steps: wanted fewer than training.steps = 20, got 20"),
        ("training.save_every=7", "training.save_every: wanted a multiple of training.log_every = 5, got 7"),
        ("training.accumulation_steps=3", "training.accumulation_steps: wanted a divisor of training.batch_size = 4"),
        ("training.betas=[0.9]", "training.betas: wanted two numbers in [0, 1), got [0.9]"),
        ("training.betas=[0.9,x]", "training.betas[1]: wanted a number, got 'x' (str)"),
        ("training.seed=-1", "training.seed: wanted 0 or more, got -1"),
        ("training=fast", "training: wanted a mapping of keys, got 'fast' (str)"),
        (
            "mixers=[path,ropes]",
            "mixers[1]: wanted one of path, path_fox, rope, none, fox, stick_breaking, alibi, got 'ropes' (str)",
        ),
        ("mixers=[]", "mixers: wanted one or several different ones, got []"),
        ("mixers=[path,path]", "mixers: wanted one or several different ones"),
        (
            "mixers=path",
            "mixers: wanted a list of one of path, path_fox, rope, none, fox, stick_breaking, alibi, got 'path' (str)",
        ),
        ("task.name=flop", "task.name: no task 'flop'; there are flip_flop"),
        ("task.name=3", "task.name: wanted the name of a task, got 3"),
        ("task.length=15", "flip_flop: length must be even and at least 4, got 15"),
        ("task.widht=3", "task.widht: unknown key"),
        ("task=null", "task: wanted either task or data, got neither"),
        ("data={path: x}", "task: wanted either task or data, got both"),
        ("model.vocab_size=7", "model.vocab_size: follows from the rest of the recipe"),
        ("evaluation.windows=7", "evaluation.windows: unknown key"),
        ("evaluation.answers=0", "evaluation.answers: wanted a number above 0, got 0"),
        ("name=a/b", "name: wanted letters, digits"),
        ("training.steps", "override: wanted key.sub=value, got 'training.steps'"),
        (".steps=3", "override: wanted key.sub=value, got '.steps=3'"),
        ("name.first=x", "name: holds a value, not keys, so name.first cannot be set"),
        ("training.steps=[1", "training.steps: not a valid YAML value: '[1'"),
    ],
)
def test_errors_name_key_value_and_wish(tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load(tmp_path, GOOD, change)
    assert "\n" not in str(caught.value)


def test_missing_and_repeated_keys(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="training: missing"):
        load(tmp_path, "task: {name: flip_flop}")
    with pytest.raises(ValueError, match=r"training\.batch_size: missing; wanted a whole number"):
        load(tmp_path, GOOD.replace("batch_size: 4,", ""))
    with pytest.raises(ValueError, match="steps: given twice, again on line 6"):
        load(tmp_path, GOOD.replace("batch_size: 4", "steps: 4"))


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not valid YAML"):
        load(tmp_path, "a: [")
    with pytest.raises(ValueError, match="wanted a mapping of keys at the top, got list"):
        load(tmp_path, "- a")
    with pytest.raises(FileNotFoundError, match=r"no recipe 'nothing'.*flip_flop_demo"):
        load_recipe("nothing")


def test_shipped_recipes_load() -> None:
    assert {"flip_flop_demo", "flip_flop", "stdlib_bytes"} <= set(shipped_recipes())
    for name in shipped_recipes():
        recipe = load_recipe(name)
        assert recipe.name == name
        assert recipe.description
