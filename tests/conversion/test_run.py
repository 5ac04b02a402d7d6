"""The whole conversion in miniature: what it leaves, that it learns, and that it can be killed anywhere."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from path_attention.conversion import ConversionRecipe, convert, run, stages
from path_attention.conversion.initialise import BETAS
from path_attention.data.tokenizer import train_bpe
from path_attention.training import strict
from path_attention.training.recipe import override
from path_attention.training.trainer import METRICS, read_metrics
from tests.training.tiny import without_time

STAGE = {
    "steps": 8,
    "batch_size": 4,
    "learning_rate": 1e-2,
    "log_every": 2,
    "save_every": 2,
    "max_grad_norm": 0.0,  # so that layers do not depend on one another in stage 1
    "device": "cpu",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level teacher and text."""
    folder = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    shape = {"vocab_size": 257, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.2}
    model = LlamaForCausalLM(LlamaConfig(**shape, **heads))
    for layer in model.model.layers:  # attention that looks at something, so that it matters where
        layer.self_attn.q_proj.weight.data *= 8
    model.save_pretrained(folder / "teacher")
    (folder / "text").mkdir()
    for n in range(4):
        (folder / "text" / f"{n}.txt").write_text("".join(f"{n} bottles and {k % 7} more; " for k in range(60)))
    return folder


def recipe(place: Path, *changes: str) -> ConversionRecipe:
    values: dict[str, Any] = {
        "data": {"path": str(place / "text"), "length": 32, "validation_fraction": 0.25, "cache": str(place / "cache")},
        "model": {"w_rank": 4},
        "align": {**STAGE, "eval_every": 4},
        "distill": {**STAGE, "attention_learning_rate": 2e-2, "chunk": 20, "eval_every": 4},
        "continued": {**STAGE, "length": 48},
        "evaluation": {"windows": 8, "quick_windows": 2, "batch_size": 2, "lengths": [64, 128], "tokens": 256},
    }
    return strict.build(ConversionRecipe, override(values, changes))


@pytest.fixture(scope="module")
def finished(place: Path) -> Path:
    """An uninterrupted conversion."""
    convert(place / "teacher", place / "finished", recipe(place))
    return place / "finished"


def results(target: Path) -> dict[str, Any]:
    """What was measured, without what no two runs share."""
    found = json.loads((target / "conversion" / "results.json").read_text())
    return {name: x for name, x in found.items() if not name.endswith(" speed")}


def test_every_stage_lowers_what_it_is_about(finished: Path) -> None:
    found = results(finished)
    before, after = found["align-000-002 before"], found["align-000-002 after"]
    assert before.keys() == after.keys() == {"0", "1", "2"}
    assert all(after[n] < before[n] for n in before)
    for name, key in (("distill", "loss"), ("continued", "loss")):
        losses = [entry[key] for entry in read_metrics(finished / "conversion" / name / METRICS) if key in entry]
        assert losses[-1] < losses[0]
    assert found["continued"]["loss"] < found["teacher"]["loss"]  # a random teacher knows less than its text
    assert set(found["by_length"]["teacher"]["perplexity"]) == {"32", "64", "128"}


def test_what_is_written(finished: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished)
    assert model.config.mixer == "path"
    assert model.config.w_rank == 4
    x = torch.arange(40)[None]
    assert model.generate(x, max_new_tokens=5, do_sample=False).shape == (1, 45)
    card = (finished / "README.md").read_text()
    assert "after stage 2, distillation" in card
    assert "path-attention" in card
    assert str(finished.parent) not in card.split("The recipe")[0]  # a folder of this machine says nothing to others
    for name in ("report.html", "layers.png", "losses.png", "lengths.png", "recipe.yaml", "results.json"):
        assert (finished / "conversion" / name).is_file()
    assert not list(finished.glob("**/checkpoint-*"))
    assert not list(finished.glob("**/*partial*"))


class Killed(BaseException):
    """Stands for whatever ends a process."""


# (stage, optimiser steps it has done): before any checkpoint, between two, right behind one, at the last step.
@pytest.mark.parametrize("stage, step", [("align", 0), ("align", 5), ("distill", 6), ("continued", 7)])
def test_killed_in_any_stage_it_ends_like_an_uninterrupted_one(
    place: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, step: int
) -> None:
    length = {"align": 32, "distill": 32, "continued": 48}[stage]
    passed = {"align": 0, "distill": 1, "continued": 0}[stage]  # stages of this length that come first
    original, calls = stages.TextSource.example, 0

    def example(self: stages.TextSource, seed: int, index: int) -> dict[str, torch.Tensor]:
        nonlocal calls
        if self.length == length:
            calls += 1
            if calls == 4 * (8 * passed + step) + 1:
                raise Killed
        return original(self, seed, index)

    with monkeypatch.context() as patch:
        patch.setattr(stages.TextSource, "example", example)
        with pytest.raises(Killed):
            convert(place / "teacher", tmp_path / "target", recipe(place))
    assert not (tmp_path / "target" / "config.json").exists()
    convert(place / "teacher", tmp_path / "target", recipe(place))
    assert results(tmp_path / "target") == results(finished)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "target", finished))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for folder in ("align-000-002", "distill", "continued"):
        curves = [read_metrics(f / "conversion" / folder / METRICS) for f in (tmp_path / "target", finished)]
        assert without_time(curves[0]) == without_time(curves[1])


def test_killed_while_writing_it_is_written_again(place: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "conversion", tmp_path / "target" / "conversion")
    (tmp_path / "target" / "partial-0").mkdir()
    shutil.copy(finished / "model.safetensors", tmp_path / "target")
    convert(place / "teacher", tmp_path / "target", recipe(place))
    assert not (tmp_path / "target" / "partial-0").exists()
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "target", finished))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("layers", [1, 2])
def test_layers_one_by_one_end_as_in_one_pass(place: Path, finished: Path, tmp_path: Path, layers: int) -> None:
    """No layer's gradient has another layer in it, so the groups change only what is in memory."""
    without = ["distill=null", "continued=null"]
    convert(place / "teacher", tmp_path / "target", recipe(place, f"align.layers_at_once={layers}", *without))
    groups = [{}, {0: [0], 1: [1], 2: [2]}, {0: [0, 1], 2: [2]}][layers]
    whole = load_file(finished / "conversion" / "align-000-002" / "final.safetensors")
    for group in groups.values():
        part = load_file(tmp_path / f"target/conversion/align-{group[0]:03}-{group[-1]:03}/final.safetensors")
        assert all(torch.equal(tensor, whole[name]) for name, tensor in part.items())


def test_activations_computed_again_change_nothing(place: Path, finished: Path, tmp_path: Path) -> None:
    """What is kept for the gradients is a matter of memory; the stage behind keeps everything again."""
    convert(place / "teacher", tmp_path / "target", recipe(place, "distill.activation_checkpointing=true"))
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "target", finished))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("mixer", ["rope", "fox", "path_fox"])
def test_controls_go_through_the_same_stages(place: Path, tmp_path: Path, mixer: str) -> None:
    found = convert(place / "teacher", tmp_path / "target", recipe(place, f"mixer={mixer}", "continued=null"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "target").config.mixer == mixer
    if mixer == "rope":  # the teacher itself: nothing to align, and nothing to learn from itself
        assert not any(name.startswith("align-") for name in found)
        assert found["initial"] == found["align"] == found["teacher"]
        losses = [e["loss"] for e in read_metrics(tmp_path / "target/conversion/distill" / METRICS) if "loss" in e]
        assert max(losses) < 1e-6


def test_hybrid_keeps_layers_as_they_are(place: Path, tmp_path: Path) -> None:
    found = convert(place / "teacher", tmp_path / "target", recipe(place, "keep_rope=[0, -1]", "continued=null"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "target").config.mixers == ["rope", "path", "rope"]
    assert set(found["align-001-001 after"]) == {"1"}
    assert abs(found["initial"]["loss"] - found["teacher"]["loss"]) < abs(
        results(place / "finished")["initial"]["loss"] - found["teacher"]["loss"]
    )


# A few of the layers, gates, groups of layers.
@pytest.mark.parametrize("changes", [[], ["mixer=path_fox", "keep_rope=[1]", "align.layers_at_once=1"]])
def test_nearest_beta_is_the_lowest_loss_and_stays_when_resumed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: list[str]
) -> None:
    """Each loss is what a student that begins with that number has; the student has the lowest of them."""
    shared = ["distill=null", "continued=null", "evaluation.windows=2", "evaluation.lengths=[]", *changes]
    wanted = recipe(place, *shared, "initialisation.beta=nearest")
    found = convert(place / "teacher", tmp_path / "whole", wanted)
    losses = {float(beta): loss for beta, loss in found["beta"]["losses"].items()}
    assert tuple(losses) == BETAS
    assert len(set(losses.values())) == len(BETAS)
    assert found["beta"]["windows"] == 2
    assert losses[found["beta"]["nearest"]] == min(losses.values()) == found["initial"]["loss"]
    for beta in (BETAS[0], BETAS[-1]):
        number = recipe(place, *shared, "align=null", f"initialisation.beta={beta}")
        assert convert(place / "teacher", tmp_path / f"{beta}", number)["initial"]["loss"] == losses[beta]
    assert "beta, before training" in (tmp_path / "whole/conversion/report.html").read_text()
    assert f"began at beta {found['beta']['nearest']}" in (tmp_path / "whole/README.md").read_text()

    def killed(*_: object) -> None:
        raise Killed

    target = tmp_path / "again"
    with monkeypatch.context() as patch:
        patch.setattr(stages.TextSource, "example", killed)
        with pytest.raises(Killed):
            convert(place / "teacher", target, wanted)
    with monkeypatch.context() as patch:
        patch.setattr(run._Conversion, "_by_beta", killed)  # not measured a second time
        convert(place / "teacher", target, wanted)
    assert results(target) == results(tmp_path / "whole")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (target, tmp_path / "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_nearest_beta_asks_for_text_only_where_there_are_betas(place: Path, tmp_path: Path) -> None:
    without = ["align=null", "distill=null", "continued=null", "initialisation.beta=nearest"]
    with pytest.raises(ValueError, match=r"data: missing; wanted the text that initialisation\.beta: nearest"):
        recipe(place, *without, "data=null", "evaluation.lengths=[]")
    fox = recipe(place, *without, "data=null", "evaluation.lengths=[]", "mixer=fox", "model={}")
    assert "beta" not in convert(place / "teacher", tmp_path / "fox", fox)


def test_text_in_the_sources_own_tokens(place: Path, tmp_path: Path) -> None:
    """The source's tokenizer reads the text; a stage of another length cuts the same tokens anew."""
    tokenizer = train_bpe(((place / "text" / "0.txt").read_text() for _ in range(2)), 300)
    torch.manual_seed(0)
    shape = {"vocab_size": len(tokenizer) + 3, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2)).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    files = {"paths": [str(place / "text")], "include": ["**/*.txt"]}
    text = {"files": files, "length": 32, "validation": {"fraction": 0.25}, "cache": str(tmp_path / "cache")}
    changes = ["align.length=16", "continued=null", "evaluation.lengths=[64]", f"data={json.dumps(text)}"]
    found = convert(tmp_path / "teacher", tmp_path / "target", recipe(place, *changes))
    assert found["align-000-000 speed"]["tokens"] == 8 * 4 * 16
    assert found["distill speed"]["tokens"] == 8 * 4 * 32
    assert found["distill"]["tokens"] % 31 == 0
    assert set(found["by_length"]["student"]["perplexity"]) == {"32", "64"}
    assert (tmp_path / "target" / "tokenizer.json").is_file()
    with pytest.raises(ValueError, match=r"align\.length: the train documents hold"):
        convert(tmp_path / "teacher", tmp_path / "long", recipe(place, *changes, "align.length=100000"))
    # Taken up with text that has changed since, it would end as no uninterrupted conversion does.
    shutil.copytree(tmp_path / "target" / "conversion", tmp_path / "again" / "conversion")
    shutil.copytree(place / "text", tmp_path / "text")
    (tmp_path / "text" / "0.txt").write_text("other text " * 100)
    files["paths"][0] = str(tmp_path / "text")
    file = tmp_path / "again" / "conversion" / "recipe.yaml"
    file.write_text(file.read_text().replace(str(place / "text"), str(tmp_path / "text")))
    changes[-1] = f"data={json.dumps(text)}"
    with pytest.raises(ValueError, match="begun with other text"):
        convert(tmp_path / "teacher", tmp_path / "again", recipe(place, *changes))
    with pytest.raises(ValueError, match=r"data\.packing: wanted plain for a conversion"):
        recipe(place, f"data={json.dumps({**text, 'packing': 'documents'})}")


def test_another_recipe_or_source_is_refused(place: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "conversion", tmp_path / "conversion")
    with pytest.raises(ValueError, match=r"another recipe: align\.steps was 8, is 9"):
        convert(place / "teacher", tmp_path, recipe(place, "align.steps=9"))
    file = tmp_path / "conversion" / "source.json"
    file.write_text(file.read_text().replace('"family": "llama"', '"family": "mistral"'))
    with pytest.raises(ValueError, match="another source: family was 'mistral', is 'llama'"):
        convert(place / "teacher", tmp_path, recipe(place))
    with pytest.raises(FileExistsError, match="holds a model already"):
        convert(place / "teacher", finished, recipe(place))


@pytest.mark.parametrize(
    "change, message",
    [
        ("keep_rope=[3]", "keep_rope: wanted layers of 3, counted from 0, got 3"),
        ("keep_rope=[0, 1, 2]", "keep_rope: wanted fewer than all 3 layers"),
        ("mixer=alibi", "mixer: wanted path, path_fox, fox or rope, got 'alibi'"),
        ("mixer=pat", "mixer: wanted one of"),
        ("model.hidden_size=3", "model.hidden_size: unknown key"),
        ("model.conv_size=-1", "model: .*conv_size: got -1"),
        ("data=null", "data: missing"),
        ("align.steps=0", "align.steps: wanted a number above 0"),
        ("align.length=1", "align.length: wanted at least 2 tokens, got 1"),
        ("align.layers_at_once=0", "align.layers_at_once: wanted at least 1, got 0"),
        ("distill.chunk=0", "distill.chunk: wanted a number above 0"),
        ("initialisation.beta=0", r"initialisation.beta: wanted a number in \(0, 2\) or nearest, got 0"),
        ("initialisation.beta=.nan", r"initialisation.beta: wanted a number in \(0, 2\) or nearest, got nan"),
        ("initialisation.beta=near", "initialisation.beta: wanted a number or one of nearest, got 'near'"),
        ("initialisation.w=value", "initialisation.w: wanted one of key, random"),
        ("evaluation.lengths=[100000]", "evaluation.lengths: length: wanted at most"),
        ("data.path=/nowhere/at/all", "data.path: no folder"),
        ("data={files: {paths: [/nowhere]}}", "data.tokenizer: wanted one, for .* has none"),
        ("data.validation_fraction=2", "data.validation_fraction: wanted a number in"),
        ("align.compile=true", "align.compile: wanted false"),
        ("distill.parallel.strategy=fsdp", "distill.parallel: wanted nothing"),
        ("distill.save_every=3", r"distill\.save_every: wanted a multiple of distill\.log_every = 2"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(place: Path, tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        convert(place / "teacher", tmp_path / "target", recipe(place, change))
    assert not (tmp_path / "target").exists()


@pytest.mark.slow
def test_killed_for_good_it_goes_on(place: Path, finished: Path, tmp_path: Path) -> None:
    """SIGKILL, which no program hears, at whatever point it comes; as often as there are checkpoints to see."""
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe(place).to_yaml())
    target = tmp_path / "target"
    command = [sys.executable, "-m", "path_attention", "convert", str(place / "teacher"), str(target)]
    for stage in ("align-000-002", "distill"):
        process = subprocess.Popen([*command, "--recipe", str(file)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        while process.poll() is None and not list((target / "conversion" / stage).glob("checkpoint-*/complete")):
            time.sleep(0.01)
        process.kill()
        process.communicate()
    assert not (target / "config.json").exists()
    done = subprocess.run([*command, "--recipe", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert results(target) == results(finished)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (target, finished))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
