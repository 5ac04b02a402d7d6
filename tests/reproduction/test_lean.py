"""The lean loop trains as the Trainer does, and an interrupted training ends as an uninterrupted one."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from path_attention.autocast import with_tf32
from path_attention.reproduction.lean import Evaluation, LeanTraining
from path_attention.tasks import IGNORED
from path_attention.training import Recipe, load_recipe, recipe_from_mapping
from path_attention.training.recipe import override
from path_attention.training.run import train
from path_attention.training.trainer import METRICS, TrainingDiverged, read_metrics
from tests.training.tiny import TINY

CPU = torch.device("cpu")
DECAYED = ("training.weight_decay=0.1", "training.log_every=1", "training.save_every=20", "training.eval_every=0")
RECALL = {
    "task": {"name": "mqrar", "length": 32, "num_pairs": 4, "num_queries": 6, "vocabulary": 20},
}


def recipe(*overrides: str, **changes: object) -> Recipe:
    return recipe_from_mapping(override({**TINY, **changes}, [*DECAYED, *overrides]))


def finished(one: LeanTraining) -> LeanTraining:
    while not one.done:
        one.advance(one.settings.steps)
    one.check()
    return one


@pytest.mark.parametrize("changes", [{}, RECALL], ids=["logits everywhere", "logits of few labels"])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_losses_are_those_of_the_trainer(tmp_path: Path, schedule: str, changes: dict[str, object]) -> None:
    """Same weights, sequences, rates, decay and clipping. What differs is the order of float32 sums in the loss."""
    one = recipe(f"training.schedule={schedule}", **changes)
    (run,) = train(one, tmp_path)
    wanted = [entry["loss"] for entry in read_metrics(run.folder / METRICS) if "loss" in entry]
    found = finished(LeanTraining(one, CPU)).losses.tolist()
    assert len(found) == 20
    assert found == pytest.approx(wanted, rel=1e-4)  # the Trainer logs losses as they are; 20 steps magnify rounding


def test_evaluation_is_that_of_the_trainer(tmp_path: Path) -> None:
    one = recipe("evaluation.answers=150")
    (run,) = train(one, tmp_path)
    trained = finished(LeanTraining(one, CPU))
    for split, measured in run.measurements.items():
        # The Trainer's evaluation goes on until there are enough; ours on as many sequences.
        evaluation = Evaluation(trained, trained.task, split, 1)
        evaluation.total = measured.sequences
        for _ in evaluation.batches():
            pass
        result = evaluation.result()
        assert result["count"] == measured.count
        # Models whose losses differ by rounding may differ in an answer that is a toss-up.
        assert abs(result["errors"] - measured.errors) <= 2


def test_right_up_to_counts_sequences_without_an_error_so_far() -> None:
    one = LeanTraining(
        recipe("training.steps=3", **{"task": {"name": "group_words", "group": "S3", "word_length": 4}}), CPU
    )
    evaluation = Evaluation(one, one.task, "held_out", 60)
    for _ in evaluation.batches():
        pass
    result = evaluation.result()
    made = one.task.generate(0, torch.arange(result["sequences"]), "held_out")
    with torch.no_grad():
        predictions = one.model(input_ids=made.input_ids).logits.argmax(-1)
    wrong = (made.answers[:, 1:] != IGNORED) & (predictions[:, :-1] != made.answers[:, 1:])
    assert result["errors"] == int(wrong.sum())
    assert result["sequences_wrong"] == int(wrong.any(1).sum())
    assert result["right_up_to"] == [int((~wrong[:, : t + 1].any(1)).sum()) for t in range(5)]


@pytest.mark.parametrize("stop", [1, 7, 20])
def test_interrupted_training_ends_as_an_uninterrupted_one(tmp_path: Path, stop: int) -> None:
    whole = finished(LeanTraining(recipe(), CPU))
    part = LeanTraining(recipe(), CPU)
    part.chunk = 3
    while part.step < stop:
        part.advance(stop)
    part.save(tmp_path / "checkpoint.pt")
    rest = LeanTraining(recipe(), CPU)
    rest.load(tmp_path / "checkpoint.pt")
    assert rest.step == stop
    finished(rest)
    assert torch.equal(rest.losses, whole.losses)
    for a, b in zip(rest.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_one_compilation_serves_a_mixer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all layers, of the next model too, and an evaluation asks for none; losses are those of layers as they are."""
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: list[object]) -> Callable[..., object]:
        compiled.append(graph)
        return graph.forward

    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda layer: compile_module(layer, backend=backend))
    torch.compiler.reset()
    changes = "model.num_hidden_layers=2", "mixers=[none]", "training.steps=4"
    plain = finished(LeanTraining(recipe(*changes), CPU))
    assert not compiled
    one = finished(LeanTraining(recipe(*changes, "training.compile=true"), CPU))
    torch.testing.assert_close(one.losses, plain.losses)
    count = len(compiled)
    assert count == 1
    for _ in Evaluation(one, one.task, "sparse", 20).batches():
        pass
    finished(LeanTraining(recipe(*changes, "training.compile=true", "training.seed=1"), CPU))
    assert len(compiled) == count


def test_divergence_is_seen() -> None:
    one = LeanTraining(recipe(), CPU)
    with torch.no_grad():
        one.model.lm_head.weight.fill_(float("inf"))
    one.advance(2)
    with pytest.raises(TrainingDiverged, match="at step 1"):
        one.check()


def test_bad_recipes_are_named() -> None:
    with pytest.raises(ValueError, match="accumulation_steps: wanted 1"):
        LeanTraining(recipe("training.accumulation_steps=2"), CPU)
    with pytest.raises(ValueError, match="synthetic task"):
        LeanTraining(load_recipe("stdlib_bytes"), CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mixer", ["path", "path_fox", "fox", "stick_breaking", "rope", "alibi", "none"])
@pytest.mark.parametrize("reflections", [1, 2])
def test_recorded_steps_are_those_that_are_not(mixer: str, reflections: int) -> None:
    """A CUDA graph launches the same kernels: losses agree to what atomics and the order of sums in them leave."""
    one = recipe(
        f"mixers=[{mixer}]",
        f"model.num_reflections={reflections}",
        "task.length=128",
        "training.precision=bfloat16",
        "model.hidden_size=64",
    )
    cuda = torch.device("cuda")
    recorded = finished(LeanTraining(one, cuda))
    assert recorded.graph is not None
    plain = finished(LeanTraining(one, cuda, use_graphs=False))
    assert plain.graph is None
    torch.testing.assert_close(recorded.losses, plain.losses, rtol=0.05, atol=0.01)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_sequences_are_the_same_on_the_gpu() -> None:
    one = recipe()
    for split in ("train", "sparse"):
        cpu = one.task.generate(3, torch.arange(20), split)
        gpu = one.task.generate(3, torch.arange(20, device="cuda"), split)
        assert all(torch.equal(a, b.cpu()) for a, b in zip(cpu, gpu, strict=True))


def test_the_precision_of_products_is_given_back() -> None:
    def diverges() -> None:
        with with_tf32(torch.device("cuda")):
            assert torch.get_float32_matmul_precision() == "high"
            raise TrainingDiverged("loss is nan")

    before = torch.get_float32_matmul_precision()
    with pytest.raises(TrainingDiverged):
        diverges()
    assert torch.get_float32_matmul_precision() == before


def test_float32_recipes_keep_float32_products() -> None:
    with LeanTraining(recipe("training.precision=float32"), CPU)._products():
        assert torch.get_float32_matmul_precision() == "highest"
