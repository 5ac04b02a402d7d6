"""Processes that share a training, and a model: the losses of one process, and checkpoints that any number reads."""

import multiprocessing
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from path_attention.models import PaTHConfig
from path_attention.training.parallel import SharedBatches, check_model
from path_attention.training.recipe import Parallel, Recipe, Training
from path_attention.training.run import FINAL, Run, Unfinished, train
from path_attention.training.trainer import METRICS, TrainingDiverged, read_metrics, training_arguments
from tests.training.test_run import weights
from tests.training.texts import over_texts, write_texts

# What each of four processes trains. Six steps: training multiplies rounding errors.
STEPS = ["training.steps=6", "training.log_every=1", "training.save_every=2", "training.eval_every=3"]
STEPS += ["training.batch_size=8", "model.num_key_value_heads=2"]
FSDP = "training.parallel.strategy=fsdp"
MESHES = {
    "data": [FSDP],
    "context": [FSDP, "training.parallel.context=2", "data.packing=documents", "mixers=[path_fox]"],
    "all": [
        "training.parallel={strategy: fsdp, tensor: 2, context: 2}",
        "training.activation_checkpointing=true",
        "model.qk_norm=true",
    ],
    "rope": [
        FSDP,
        "training.parallel.tensor=2",
        "training.accumulation_steps=2",
        "mixers=[rope]",
        "model.tie_word_embeddings=true",
    ],
}
# What one process leaves for four, and four for one.
LEFT = ["training.parallel.tensor=2", "training.parallel.context=2"]


def recipe(texts: Path, *changes: str) -> Recipe:
    return over_texts(texts, *STEPS, *changes)


def alone(texts: Path, *changes: str) -> Recipe:
    """The same for one process."""
    return recipe(texts, *(c for c in changes if "parallel" not in c and "accumulation" not in c))


def stopped(one: Recipe, runs: Path, steps: int) -> None:
    """Train some steps of a recipe and stop."""
    for _ in range(steps):
        with pytest.raises(Unfinished):
            train(one, runs, time_limit=1e-3)


def _work(rank: int, texts: Path, runs: Path, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    try:
        for name, changes in MESHES.items():
            train(recipe(texts, *changes), runs / name)
        # Four processes go on where one stopped, as a plain model, and stop where one is to go on.
        train(recipe(texts, FSDP, *LEFT), runs / "one for four")
        stopped(recipe(texts, FSDP, *LEFT), runs / "four for one", 3)
        diverging = recipe(
            texts, FSDP, "training.learning_rate=1e30", "training.warmup_steps=0", "training.eval_every=0"
        )
        with pytest.raises(TrainingDiverged, match=r"diverged at step 2: .*loss (nan|inf).*Last good checkpoint: none"):
            train(diverging, runs / "diverged")
    finally:
        dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return int(s.getsockname()[1])


def assert_same_training(found: Run, wanted: Run) -> None:
    """Losses, gradient norms, evaluations and weights, but for rounding.

    Sums in another order differ by a few 1e-7; Adam divides by the root of squares that may be as small, so that single
    weights move by up to the learning rate, 1e-2, where their gradients are noise. Most are alike.
    """
    a, b = (read_metrics(run.folder / METRICS) for run in (found, wanted))
    assert [e["step"] for e in a] == [e["step"] for e in b]
    for name in ("loss", "grad_norm", "eval_validation", "learning_rate"):
        values = [[e[name] for e in entries if name in e] for entries in (a, b)]
        assert values[0] == pytest.approx(values[1], rel=1e-4), name
        assert len(values[0]) >= 2
    expected = weights(wanted)
    assert weights(found).keys() == expected.keys()
    for name, tensor in weights(found).items():
        far = (tensor - expected[name]).abs() > 1e-4 * expected[name].abs().max()
        assert far.float().mean() < 0.02, name
    assert found.measurements["validation"].value == pytest.approx(wanted.measurements["validation"].value, rel=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="this build of torch has no gloo")
def test_four_processes_train_as_one(tmp_path: Path) -> None:
    texts, runs = write_texts(tmp_path / "text"), tmp_path / "runs"
    stopped(alone(texts), runs / "one for four", 3)
    multiprocessing.set_forkserver_preload([__name__])  # four processes import transformers once
    torch.multiprocessing.start_processes(_work, args=(texts, runs, free_port()), nprocs=4, start_method="forkserver")
    for name, changes in MESHES.items():
        (wanted,) = train(alone(texts, *changes), tmp_path / "alone" / name)
        assert_same_training(Run.read(runs / name / "tiny" / wanted.mixer), wanted)
        assert (runs / name / "tiny" / wanted.mixer / FINAL / "tokenizer_config.json").is_file()
    (wanted,) = train(alone(texts), tmp_path / "alone" / "left")
    assert_same_training(Run.read(runs / "one for four" / "tiny" / "path"), wanted)
    (found,) = train(alone(texts), runs / "four for one")
    assert len(read_metrics(found.folder / METRICS)) == len(read_metrics(wanted.folder / METRICS))
    assert_same_training(found, wanted)


def test_processes_share_the_batches_of_one() -> None:
    """Two of three sequences each, of 24: every step of six has the sequences it has alone."""
    shares = [list(SharedBatches(24, 3, rank, 2)) for rank in range(2)]
    assert [a + b for a, b in zip(*shares, strict=True)] == [list(range(n, n + 6)) for n in range(0, 24, 6)]
    assert len(SharedBatches(24, 3, 1, 2)) == 4


@pytest.mark.parametrize(
    "mixer, parallel, message",
    [
        ("rope", {"context": 2}, r"parallel\.context: the mixer rope needs whole sequences"),
        ("path", {"context": 3}, r"parallel\.context: wanted a length that two pieces for each of 3 processes divide"),
        ("path", {"tensor": 3}, r"parallel\.tensor: num_attention_heads: got 4; wanted a multiple of the 3"),
        ("alibi", {"tensor": 2}, r"parallel\.tensor: mixer: got alibi"),
        ("path", {"tensor": 2, "num_reflections": 2}, r"parallel\.tensor: num_reflections: got 2; wanted 1"),
    ],
)
def test_models_that_cannot_be_shared_are_named(mixer: str, parallel: dict[str, int], message: str) -> None:
    reflections = parallel.pop("num_reflections", 1)
    config = PaTHConfig(
        hidden_size=16, num_attention_heads=4, intermediate_size=24, mixer=mixer, num_reflections=reflections
    )
    shared = Parallel(strategy="fsdp", **parallel)
    settings = Training(steps=1, batch_size=1, learning_rate=1.0, parallel=shared)
    with pytest.raises(ValueError, match=rf"^training\.{message}"):
        check_model(settings, config, 16)


def test_processes_without_an_accelerator_work_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Training(steps=1, batch_size=4, learning_rate=1e-3)
    there = [False, True]
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: there[0])
    # Only of a device that is known to be the CPU does accelerate make a process group by gloo.
    assert training_arguments(settings, tmp_path).use_cpu
    # On another device, where it makes none, each process would train the whole model by itself, in one folder.
    del there[0]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"training\.device: got auto with 2 processes, of which transformers makes 1"):
        training_arguments(settings, tmp_path)
