"""Runs: exact resumption, what a run folder holds, what is refused, what stops a run."""

import contextlib
import functools
import json
import math
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from path_attention.training import Recipe, checkpoint, recipe_from_mapping, trainer
from path_attention.training import source as sources
from path_attention.training.divergence import examine
from path_attention.training.recipe import override
from path_attention.training.run import EVALUATION, FINAL, RECIPE, Run, evaluate, read_recipe, run_folders, train
from path_attention.training.source import open_source
from path_attention.training.trainer import DIVERGENCE, METRICS, TrainingDiverged, last_checkpoint, read_metrics
from tests.training.tiny import TINY, tiny, without_time


class Interruption(Exception):
    """Stands for whatever ends a process."""


def interrupt_at(monkeypatch: pytest.MonkeyPatch, index: int) -> None:
    """Makes the training data end the run when sequence ``index`` is asked for."""
    original = sources.TaskSource.example

    def example(self: sources.TaskSource, seed: int, n: int) -> dict[str, torch.Tensor]:
        if n == index:
            raise Interruption
        return original(self, seed, n)

    monkeypatch.setattr(sources.TaskSource, "example", example)


def weights(run: Run) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run.folder / FINAL / "model.safetensors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An uninterrupted run."""
    return train(tiny(), tmp_path_factory.mktemp("runs"))[0]


# 13 steps in: past the checkpoint of step 10 and between two logged losses. 2: before any checkpoint.
@pytest.mark.parametrize("step", [13, 2])
def test_interrupted_run_ends_bit_for_bit_like_an_uninterrupted_one(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4 * step)
        with pytest.raises(Interruption):
            train(tiny(), tmp_path)
    assert not (tmp_path / "tiny" / "path" / EVALUATION).exists()
    resumed = train(tiny(), tmp_path)[0]
    assert without_time(read_metrics(resumed.folder / METRICS)) == without_time(read_metrics(finished.folder / METRICS))
    assert resumed.measurements == finished.measurements
    expected = weights(finished)
    assert weights(resumed).keys() == expected.keys()
    for name, tensor in weights(resumed).items():
        assert torch.equal(tensor, expected[name]), name


def test_half_written_checkpoint_is_not_resumed_from(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4 * 13)
        with pytest.raises(Interruption):
            train(tiny(), tmp_path)
    folder = tmp_path / "tiny" / "path"
    broken = folder / "checkpoint-15"
    broken.mkdir()
    (broken / "model.safetensors").write_bytes(b"half")
    assert last_checkpoint(folder) == folder / "checkpoint-10"
    resumed = train(tiny(), tmp_path)[0]
    assert resumed.measurements == finished.measurements


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Files can grow to ``size`` bytes: what a full disk does to those who write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("what", ["checkpoint", "model"])
def test_full_disk_stops_the_run_and_leaves_nothing_that_looks_whole(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    folder = tmp_path / "tiny" / "path"
    of, name = (checkpoint, "save") if what == "checkpoint" else (trainer.RecipeTrainer, "save_model")
    write, calls = getattr(of, name), 0

    def on_full_disk(*arguments: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        last = calls == 2 if what == "checkpoint" else not options.get("_internal_call")
        with full_disk(5000) if last else contextlib.nullcontext():
            write(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(of, name, on_full_disk)
        message = "the checkpoint of step 10" if what == "checkpoint" else "the trained model"
        last = 5 if what == "checkpoint" else 20
        with pytest.raises(
            trainer.NotWritten, match=f"{message} could not be written: .*MiB are free there.*checkpoint-{last}"
        ):
            train(tiny(), tmp_path)
    assert last_checkpoint(folder) == folder / f"checkpoint-{last}"
    assert not (folder / FINAL).exists()
    resumed = train(tiny(), tmp_path)[0]
    assert resumed.measurements == finished.measurements
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in finished.folder.iterdir())


def test_run_interrupted_after_its_last_step_is_only_evaluated(finished: Run, tmp_path: Path) -> None:
    folder = tmp_path / "tiny" / "path"
    shutil.copytree(finished.folder, folder)
    (folder / EVALUATION).unlink()
    shutil.rmtree(folder / FINAL)
    again = train(tiny(), tmp_path)[0]
    assert again.measurements == finished.measurements
    assert read_metrics(folder / METRICS) == read_metrics(finished.folder / METRICS)
    assert all(torch.equal(tensor, weights(finished)[name]) for name, tensor in weights(again).items())


def test_run_folder_holds_the_recipe_the_losses_the_model_and_its_evaluation(finished: Run) -> None:
    assert read_recipe(finished.folder) == tiny()
    entries = read_metrics(finished.folder / METRICS)
    assert [e["step"] for e in entries if "loss" in e] == [5, 10, 15, 20]
    assert [e["step"] for e in entries if "eval_sparse" in e] == [10, 20]
    assert [e["seconds"] for e in entries] == sorted(e["seconds"] for e in entries)
    assert Run.read(finished.folder) == finished
    assert set(finished.measurements) == {"in_distribution", "sparse", "dense"}
    for measured in finished.measurements.values():
        assert measured.count >= 100
        assert measured.errors is not None
        assert measured.value == measured.errors / measured.count
    assert finished.facts["steps"] == 20
    assert len(list(finished.folder.glob("checkpoint-*"))) == 2


def test_evaluation_of_the_saved_model_gives_the_numbers_again(finished: Run) -> None:
    before = finished.folder.joinpath(EVALUATION).read_text()
    assert evaluate(finished.folder) == finished
    assert finished.folder.joinpath(EVALUATION).read_text() == before


def test_finished_run_is_not_trained_again_and_restart_moves_it_aside(tmp_path: Path) -> None:
    recipe = tiny("training.steps=3", "training.eval_every=0")
    first = train(recipe, tmp_path)[0]
    stamp = (first.folder / FINAL / "model.safetensors").stat().st_mtime_ns
    assert train(recipe, tmp_path)[0] == first
    assert (first.folder / FINAL / "model.safetensors").stat().st_mtime_ns == stamp
    again = train(recipe, tmp_path, restart=True)[0]
    assert again.measurements == first.measurements
    assert Run.read(tmp_path / "tiny.1" / "path").measurements == first.measurements


def test_another_recipe_in_the_same_folder_is_refused(finished: Run) -> None:
    runs = finished.folder.parent.parent
    with pytest.raises(ValueError, match=r"another recipe: training\.seed was 0, is 1\..*--restart"):
        train(tiny("training.seed=1"), runs)
    # What does not change this model is no other recipe.
    assert train(tiny("description=the same"), runs)[0] == finished


def test_several_mixers_share_everything_but_the_mixer(tmp_path: Path) -> None:
    runs = train(tiny("mixers=[path,rope]", "training.steps=3", "training.eval_every=0"), tmp_path)
    assert [r.mixer for r in runs] == ["path", "rope"]
    assert run_folders(tmp_path / "tiny") == [r.folder for r in runs]
    assert read_recipe(runs[0].folder) == read_recipe(runs[1].folder)
    assert {r.facts["seed"] for r in runs} == {0}


def test_accumulated_micro_batches_are_the_whole_batch(finished: Run, tmp_path: Path) -> None:
    """The loss is a mean over labels, whichever micro-batch they fall into; sums in another order differ by rounding.

    Only the first losses are compared: training multiplies rounding errors.
    """
    split = train(tiny("training.accumulation_steps=4", "training.steps=5", "training.eval_every=0"), tmp_path)[0]
    # Another number of steps is another schedule, so the whole batches are trained for five steps too.
    whole = train(tiny("name=whole", "training.steps=5", "training.eval_every=0"), tmp_path)[0]
    losses = [read_metrics(r.folder / METRICS)[0]["loss"] for r in (split, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_bfloat16_is_autocast_over_float32_weights(finished: Run, tmp_path: Path) -> None:
    run = train(tiny("training.precision=bfloat16", "training.eval_every=0"), tmp_path)[0]
    assert {t.dtype for t in weights(run).values()} == {torch.float32}
    rounded, exact = (read_metrics(r.folder / METRICS)[0]["loss"] for r in (run, finished))
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.05)  # a bfloat16 has 8 bits; five steps of them


def test_loss_that_is_not_finite_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from path_attention.models import PaTHForCausalLM

    original = PaTHForCausalLM.forward
    calls = 0

    @functools.wraps(original)  # the Trainer looks at the signature to see what the model takes
    def forward(self: PaTHForCausalLM, *args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        output = original(self, *args, **kwargs)  # type: ignore[arg-type]
        if calls > 12:
            output.loss = output.loss * float("nan")
        return output

    monkeypatch.setattr(PaTHForCausalLM, "forward", forward)
    message = (
        r"diverged at step 13: the gradient's norm is nan, the loss nan; first not finite: the loss, from finite "
        r"outputs of all layers. Sequences 48 to 51 of the data; .*divergence\.json has more. "
        r"Last good checkpoint: .*checkpoint-10"
    )
    with pytest.raises(TrainingDiverged, match=message):
        train(tiny("training.eval_every=0"), tmp_path)
    folder = tmp_path / "tiny" / "path"
    assert not (folder / "checkpoint-15").exists()
    known = json.loads((folder / DIVERGENCE).read_text())
    assert (known["step"], known["sequences"], known["last_good_checkpoint"]) == (13, [48, 52], "checkpoint-10")
    (process,) = known["processes"]
    assert process["outputs"][0]["rms"] > 0
    assert process["losses"] == ["nan"]  # in words that every reader of JSON knows
    # The weights are those before the step; the gradients are not finite.
    assert all(found["not_finite"] == 0 for found in process["weights"].values())
    assert all(found["not_finite"] > 0 for found in process["gradients"].values())
    assert process["weights"].keys() == process["gradients"].keys()


@pytest.mark.parametrize(
    "name, value, first",
    [
        ("model.layers.1.mlp.up_proj.weight", math.nan, "the weights of model.layers.1.mlp.up_proj.weight"),
        ("model.layers.1.mlp.up_proj.weight", 1e38, "the output of layer 1"),
        ("lm_head.weight", 3e38, "the loss, from finite outputs of all layers"),
    ],
)
def test_first_number_that_is_not_finite_is_found(name: str, value: float, first: str) -> None:
    from path_attention.models import PaTHConfig, PaTHForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = PaTHForCausalLM(PaTHConfig(vocab_size=5, **sizes))  # type: ignore[arg-type]
    model.get_parameter(name).data.fill_(value)
    ids = torch.tensor([[1, 2, 3, 4]])
    found = examine(model, [{"input_ids": ids, "labels": ids}], lambda batch: model(**batch).loss)
    assert found["first"] == first


def test_model_section_is_checked_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.hiden_size: unknown key; did you mean hidden_size\?"):
        train(tiny("model.hiden_size=3"), tmp_path)
    with pytest.raises(ValueError, match="model: "):
        train(tiny("model.hidden_size=large"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_folders_that_hold_no_finished_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no finished run here"):
        Run.read(tmp_path)
    with pytest.raises(FileNotFoundError, match="no run here"):
        run_folders(tmp_path)
    (tmp_path / RECIPE).write_text(tiny().to_yaml())
    with pytest.raises(FileNotFoundError, match="interrupted"):
        Run.read(tmp_path)


def byte_model(folder: Path, mixer: str = "path", vocab_size: int = 257) -> Path:
    from path_attention.models import PaTHConfig, PaTHForCausalLM

    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(3)
    PaTHForCausalLM(PaTHConfig(vocab_size=vocab_size, mixer=mixer, **shape)).save_pretrained(folder)
    return folder


def from_model(folder: Path, *overrides: str) -> Recipe:
    values = {name: x for name, x in TINY.items() if name != "model"} | {"initial": str(folder)}
    return recipe_from_mapping(override(values, ["training.steps=3", "training.eval_every=0", *overrides]))


def test_training_starts_from_a_finished_model(tmp_path: Path) -> None:
    """With the smallest learning rate there is, what comes out is what went in; the task is written in its bytes."""
    folder = byte_model(tmp_path / "model")
    run = train(from_model(folder, "training.learning_rate=1e-30"), tmp_path / "runs")[0]
    before = load_file(folder / "model.safetensors")
    assert all(torch.allclose(tensor, before[name], rtol=0, atol=1e-20) for name, tensor in weights(run).items())
    source = open_source(from_model(folder))
    example = source.example(0, 0)
    assert set(bytes(example["input_ids"].tolist()).decode()) <= set("wri01")
    assert bytes(example["input_ids"][:1].tolist()) == b"w"
    labels = example["labels"]
    assert torch.equal(labels[labels != -100], example["input_ids"][labels != -100])
    assert read_recipe(run.folder).initial == str(folder)


def test_a_model_with_the_tasks_own_tokens_keeps_them(tmp_path: Path) -> None:
    source = open_source(from_model(byte_model(tmp_path, vocab_size=5)))
    assert int(source.example(0, 0)["input_ids"].max()) < 5


@pytest.mark.parametrize(
    "changes, message",
    [
        (["mixers=[rope]"], r"mixers: wanted \[path\], the mixer of the model"),
        (["initial=/nowhere/at/all"], "initial: no model in /nowhere/at/all|/nowhere/at/all/config.json"),
        (["model.hidden_size=8"], "model: wanted nothing beside initial"),
        (["task.name=phone_book", "task.length=null"], "task.length: unknown key"),
    ],
)
def test_what_does_not_go_with_an_initial_model(tmp_path: Path, changes: list[str], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(from_model(byte_model(tmp_path / "model"), *changes), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_task_without_tokens_in_the_model_is_named(tmp_path: Path) -> None:
    values = {"name": "x", "initial": str(byte_model(tmp_path)), "task": {"name": "phone_book"}}
    recipe = recipe_from_mapping(values | {"training": TINY["training"]})
    with pytest.raises(ValueError, match="the token 'Ada' is 3 tokens of the model"):
        open_source(recipe)
    byte_model(tmp_path / "other", vocab_size=100)
    recipe = recipe_from_mapping(values | {"training": TINY["training"], "initial": str(tmp_path / "other")})
    with pytest.raises(ValueError, match="has 100 tokens and no tokenizer to write the task in"):
        open_source(recipe)
