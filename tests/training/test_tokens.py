"""Training on tokens: kills at any point cost nothing, documents do not mix, and what does not fit is named."""

import contextlib
import functools
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from path_attention.evaluation.perplexity import measure_positions
from path_attention.models import PaTHForCausalLM
from path_attention.training.recipe import Recipe, TokenEvaluation
from path_attention.training.run import DATA, EVALUATION, FINAL, Run, Unfinished, evaluate, train
from path_attention.training.source import TokenSource, TrainingSet, open_source
from path_attention.training.trainer import METRICS, read_metrics
from tests.training.test_run import weights
from tests.training.texts import over_texts, write_texts
from tests.training.tiny import without_time


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts") / "text")


@pytest.fixture(scope="module")
def finished(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An uninterrupted run, which reads its training windows more than once."""
    recipe = over_texts(texts, "training.batch_size=40")
    assert open_source(recipe).sequences < 20 * 40  # type: ignore[operator]
    (run,) = train(recipe, tmp_path_factory.mktemp("runs"))
    return run


def _train(recipe: Recipe, runs: Path) -> None:
    """In a process of its own, slowed down so that it can be met in the middle of anything."""
    torch.set_num_threads(1)
    original = TokenSource.example

    def example(self: TokenSource, seed: int, index: int) -> dict[str, Any]:
        time.sleep(0.001)
        return original(self, seed, index)

    TokenSource.example = example  # type: ignore[method-assign]
    train(recipe, runs)


@pytest.mark.slow
def test_kills_at_random_points_leave_no_trace(finished: Run, texts: Path, tmp_path: Path) -> None:
    """SIGKILL after random times, until the run is through: losses, evaluations and weights are, bit for bit, those of
    a run that nobody killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    generator, kills = random.Random(0), 0
    folder = tmp_path / "tiny" / "path"
    while True:
        process = context.Process(target=_train, args=(over_texts(texts, "training.batch_size=40"), tmp_path))
        process.start()
        before = len(read_metrics(folder / METRICS))
        # A kill comes once the run has done something new, which is written every five steps, and then at any time
        # within the next five: 40 pauses of a millisecond each, on the fastest machine. So no run of 20 survives two.
        while process.is_alive() and len(read_metrics(folder / METRICS)) <= before:
            time.sleep(0.005)
        process.join(generator.uniform(0, 0.2))
        if not process.is_alive():
            break
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
        assert kills < 30
    assert process.exitcode == 0
    assert kills >= 2
    run = Run.read(folder)
    assert without_time(read_metrics(folder / METRICS)) == without_time(read_metrics(finished.folder / METRICS))
    assert run.measurements == finished.measurements
    assert all(torch.equal(tensor, weights(finished)[name]) for name, tensor in weights(run).items())


def test_no_sequence_is_lost_or_seen_twice(texts: Path) -> None:
    """In every epoch each window once; also where workers and other batches ask for them."""
    source = open_source(over_texts(texts))
    assert isinstance(source, TokenSource)
    count = source.sequences
    assert count is not None
    seen = []
    for workers in (0, 2):
        data = TrainingSet(source, seed=3, size=2 * count)
        loader = torch.utils.data.DataLoader(data, batch_size=7, num_workers=workers, collate_fn=source.collate)
        seen.append(torch.cat([batch["input_ids"] for batch in loader]))
    assert torch.equal(*seen)
    grid = torch.stack([torch.from_numpy(source.corpus.read("train", n * 16)) for n in range(count)])
    for epoch in seen[0].split(count):
        assert sorted(epoch.tolist()) == sorted(grid.tolist())


@pytest.mark.parametrize("mixer", ["path_fox", "rope"])
def test_packed_documents_do_not_mix(texts: Path, mixer: str) -> None:
    """The loss of a packed batch is that of its documents one by one."""
    from path_attention.training.run import model_config

    recipe = over_texts(texts, "data.packing=documents", "data.length=200")
    source = open_source(recipe)
    model = PaTHForCausalLM(model_config(recipe, source, mixer)).eval()
    examples = [source.example(0, n) for n in range(3)]
    batch = source.collate(examples)
    assert batch["input_ids"].shape == (1, 600)
    assert len(batch["cu_seqlens"]) > 5  # documents begin within the sequences
    total, count = 0.0, 0
    for example in examples:
        for first, last in zip(example["bounds"][:-1], example["bounds"][1:], strict=True):
            part = example["input_ids"][None, first:last]
            if last - first > 1:
                total += model(part, labels=part).loss.item() * int(last - first - 1)
                count += int(last - first - 1)
    assert model(**batch).loss.item() == pytest.approx(total / count, rel=1e-5)


def test_run_holds_its_tokenizer_and_speed(finished: Run, texts: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(finished.folder / FINAL)
    model = PaTHForCausalLM.from_pretrained(finished.folder / FINAL)
    assert len(tokenizer) == model.config.vocab_size == 280
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert finished.facts["tokens"] == 20 * 40 * 16
    assert finished.facts["tokens_per_second"] > 0
    measured = finished.measurements["validation"]
    assert measured.unit == "nats per token"
    assert 0 < measured.value < math.log(280)
    assert measured.count == 20 * 15
    assert evaluate(finished.folder).measurements == finished.measurements


def test_long_contexts_are_measured_at_the_end(texts: Path, tmp_path: Path) -> None:
    long = ["evaluation.long_length=128", "evaluation.long_windows=3", "data.validation={by: folder, fraction: 0.3}"]
    recipe = over_texts(texts, "training.steps=5", "training.eval_every=0", *long)
    (run,) = train(recipe, tmp_path)
    source = open_source(recipe)
    assert isinstance(source, TokenSource)
    starts = source.corpus.long_starts(128, 3)
    model = PaTHForCausalLM.from_pretrained(run.folder / FINAL)
    stretches = [source.corpus.read("validation", s, 128) for s in starts]
    assert run.positions == measure_positions(model, stretches)
    assert run.positions.stretches == 3
    for length, message in ((130, "length: wanted a multiple of"), (1 << 20, "length: wanted at most")):
        with pytest.raises(ValueError, match=message):
            open_source(over_texts(texts, *long[1:], f"evaluation.long_length={length}"))


def test_time_limit_stops_at_a_checkpoint_and_the_next_call_goes_on(finished: Run, texts: Path, tmp_path: Path) -> None:
    recipe = over_texts(texts, "training.batch_size=40")
    for step in (5, 10, 15):
        with pytest.raises(Unfinished, match=f"stopped at step {step} of 20; the same command goes on"):
            train(recipe, tmp_path, time_limit=1e-3)
    (run,) = train(recipe, tmp_path, time_limit=1e-3)  # the last step needs no stop
    assert without_time(read_metrics(run.folder / METRICS)) == without_time(read_metrics(finished.folder / METRICS))
    assert all(torch.equal(tensor, weights(finished)[name]) for name, tensor in weights(run).items())


def test_sigterm_stops_in_good_order(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = TokenSource.example

    def example(self: TokenSource, seed: int, index: int) -> dict[str, Any]:
        if index == 25:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, seed, index)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(TokenSource, "example", example)
    with pytest.raises(Unfinished, match="stopped at step 10"):
        train(over_texts(texts), tmp_path)
    assert signal.getsignal(signal.SIGTERM) is before
    assert (tmp_path / "tiny" / "path" / "checkpoint-10" / "complete").is_file()


def test_how_the_work_is_done_may_change_in_the_middle(finished: Run, texts: Path, tmp_path: Path) -> None:
    """Micro-batches, checkpointed activations and workers change the order of sums at most."""
    recipe = over_texts(texts, "training.batch_size=40")
    with pytest.raises(Unfinished):
        train(recipe, tmp_path, time_limit=1e-3)
    changes = ["training.accumulation_steps=4", "training.activation_checkpointing=true", "training.workers=1"]
    (run,) = train(over_texts(texts, "training.batch_size=40", *changes), tmp_path)
    found, wanted = (read_metrics(r.folder / METRICS) for r in (run, finished))
    losses = [[e["loss"] for e in entries if "loss" in e] for entries in (found, wanted)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow  # tracing takes seconds
@pytest.mark.parametrize("mixer, packing", [("path_fox", "documents"), ("rope", "plain")])
def test_compiled_layers_and_loss_train_alike(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mixer: str, packing: str
) -> None:
    """Traced as for a compiler, but run by torch's own kernels: what compiling costs is not what is tested here."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(
        torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    )
    losses = []
    for compiled in ("false", "true"):
        changes = [f"mixers=[{mixer}]", f"data.packing={packing}", f"training.compile={compiled}"]
        changes += ["training.steps=4", "training.log_every=1", "training.save_every=4", "training.eval_every=2"]
        (run,) = train(over_texts(texts, f"name=compiled-{compiled}", *changes), tmp_path)
        losses.append([e.get("loss", e.get("eval_validation")) for e in read_metrics(run.folder / METRICS)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(losses[0]) == 6


def test_other_text_under_the_same_recipe_is_refused(texts: Path, tmp_path: Path) -> None:
    own = write_texts(tmp_path / "own" / "text")
    with pytest.raises(Unfinished):
        train(over_texts(own), tmp_path / "runs", time_limit=1e-3)
    (own / "folder0" / "00.txt").write_text("something else " * 50)
    with pytest.raises(ValueError, match="was begun with other data"):
        train(over_texts(own), tmp_path / "runs")
    assert json.loads((tmp_path / "runs/tiny/path" / DATA).read_text()).keys() == {"key"}


def test_checkpoint_of_another_configuration_is_refused(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(Unfinished):
        train(over_texts(texts), tmp_path, time_limit=1e-3)
    file = tmp_path / "tiny/path/checkpoint-5/config.json"
    file.write_text(file.read_text().replace('"intermediate_size": 32', '"intermediate_size": 48'))
    with pytest.raises(ValueError, match=r"another configuration: intermediate_size was 48, is 32$"):
        train(over_texts(texts), tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match=r"checkpoint-5: wanted a checkpoint with config\.json"):
        train(over_texts(texts), tmp_path)


def test_damaged_checkpoint_is_named_and_the_one_before_serves(
    finished: Run, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, folder = over_texts(texts, "training.batch_size=40"), tmp_path / "tiny" / "path"
    for _ in range(2):
        with pytest.raises(Unfinished):
            train(recipe, tmp_path, time_limit=1e-3)
    (file,) = folder.glob("checkpoint-10/state/*.distcp")
    os.truncate(file, 1000)
    with pytest.raises(ValueError, match=r"checkpoint-10: the checkpoint is damaged \(.*\); remove it"):
        train(recipe, tmp_path)
    shutil.rmtree(folder / "checkpoint-10")
    assert torch.equal(*(weights(run)["model.embed_tokens.weight"] for run in (train(recipe, tmp_path)[0], finished)))


@pytest.mark.parametrize(
    "change, message",
    [
        ("data.vocab_size=290", r"initial: the text has 290 tokens, the model in .*final knows 280"),
        ("data.vocab_size=270", r"data\.tokenizer: wanted that of the model to start from"),
    ],
)
def test_text_in_other_tokens_than_the_first_models_is_refused(
    finished: Run, texts: Path, tmp_path: Path, change: str, message: str
) -> None:
    """With more tokens the model has no embedding, with others it would read something else."""
    changes = [f"initial={finished.folder / FINAL}", "model={}", "training.steps=2", "training.warmup_steps=0"]
    with pytest.raises(ValueError, match=message):
        train(over_texts(texts, *changes, change), tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert train(over_texts(texts, *changes), tmp_path)[0].facts["steps"] == 2


def test_data_shorter_than_a_batch_is_refused(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data: the training documents make \d+ sequences .* fewer than one batch"):
        train(over_texts(texts, "training.batch_size=100000"), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change, message",
    [
        ("training.parallel.context=2", r"training\.parallel\.strategy: wanted fsdp"),
        ("training.parallel.strategy=fsdp", r"training\.parallel\.strategy: fsdp wants processes started by torchrun"),
        ("training.parallel.tensor=0", r"training\.parallel\.tensor: wanted a number above 0"),
        ("training.final_learning_rate=1", r"training\.final_learning_rate: wanted 0 to training\.learning_rate"),
        ("data.tokeniser=x", r"data\.tokeniser: unknown key; did you mean tokenizer\?"),
        ("data.files.path=x", r"data\.files\.path: unknown key; did you mean paths\?"),
        ("evaluation.long_length=0", r"evaluation\.long_length: wanted a number above 0"),
        ("model.vocab_size=300", r"model\.vocab_size: follows from the rest of the recipe"),
    ],
)
def test_settings_that_do_not_fit_are_named(texts: Path, tmp_path: Path, change: str, message: str) -> None:
    with contextlib.suppress(KeyError):
        del os.environ["RANK"]
    with pytest.raises(ValueError, match=message):
        train(over_texts(texts, change), tmp_path)


def test_recipe_of_tokens_is_plain_data_again(texts: Path) -> None:
    from path_attention.training import recipe_from_mapping

    recipe = over_texts(texts, "evaluation.long_length=64")
    assert recipe_from_mapping(recipe.to_mapping()) == recipe
    assert isinstance(recipe.evaluation, TokenEvaluation)


def test_evaluation_is_written_last(finished: Run) -> None:
    assert (finished.folder / EVALUATION).stat().st_mtime_ns >= max(
        p.stat().st_mtime_ns for p in (finished.folder / FINAL).iterdir()
    )
