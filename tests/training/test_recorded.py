"""Recorded passes end where others do, bit for bit, whatever comes between them; and what cannot be recorded."""

import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from path_attention import cli
from path_attention.conversion.recipe import Align
from path_attention.models import PaTHConfig, PaTHForCausalLM
from path_attention.training import recorded, trainer
from path_attention.training import source as sources
from path_attention.training.recipe import Training
from path_attention.training.recorded import EAGER_STEPS, GraphCaptureFailed, RecordedPasses
from path_attention.training.run import EVALUATION, train
from path_attention.training.trainer import DIVERGENCE, METRICS, TrainingDiverged, read_metrics
from tests.training.test_run import Interruption, interrupt_at, weights
from tests.training.tiny import tiny, without_time

GRAPHS = "training.cuda_graphs=true"


class Again:
    """In the place of a CUDA graph: does again what was recorded, into the memory that it left its results in.

    As there, recording computes nothing, and a replay knows the memory of gradients but not whose they are.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.recordings = self.replays = 0

    def eagerly(self, function: Callable[[], Tensor]) -> Tensor:
        return function()

    def record(self, function: Callable[[], Tensor]) -> Tensor:
        assert all(p.grad is None for p in self.parameters)
        self.recordings += 1
        self.function, self.loss = function, function()
        self.gradients = [p.grad for p in self.parameters]
        for x in (self.loss, *(x for x in self.gradients if x is not None)):
            x.fill_(torch.nan)
        return self.loss

    def replay(self) -> None:
        self.replays += 1
        before = [p.grad for p in self.parameters]
        for p in self.parameters:
            p.grad = None
        self.loss.copy_(self.function())
        for p, memory, grad in zip(self.parameters, self.gradients, before, strict=True):
            if memory is not None:
                assert p.grad is not None
                memory.copy_(p.grad)
            p.grad = grad


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[Again]:
    """Trainings record on a CPU; the recorders of all there were."""
    made: list[Again] = []

    class Passes(RecordedPasses):
        def __init__(self, passes: Any, parameters: Iterable[nn.Parameter], _: object) -> None:
            parameters = list(parameters)
            made.append(Again(parameters))
            super().__init__(passes, parameters, made[-1])

    monkeypatch.setattr(recorded, "recorder_for", lambda device: device)
    monkeypatch.setattr(recorded, "RecordedPasses", Passes)
    return made


def metrics(run: Any) -> list[dict[str, Any]]:
    return without_time(read_metrics(run.folder / METRICS))


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("training.accumulation_steps=2",),
        ("training.accumulation_steps=4", "model.tie_word_embeddings=true"),
        ("training.precision=bfloat16",),
    ],
    ids=["plain", "two micro-batches", "four micro-batches", "bfloat16"],
)
def test_recorded_training_ends_bit_for_bit_like_one_that_is_not(
    tmp_path: Path, recorders: list[Again], changes: tuple[str, ...]
) -> None:
    """Evaluations and checkpoints in between, and casts of weights that have changed since the recording, included."""
    (plain,) = train(tiny(*changes), tmp_path / "plain")
    assert not recorders
    (found,) = train(tiny(*changes, GRAPHS), tmp_path / "recorded")
    micro_batches = 20 * tiny(*changes).training.accumulation_steps
    assert [(r.recordings, r.replays) for r in recorders] == [(1, micro_batches - EAGER_STEPS)]
    assert metrics(found) == metrics(plain)
    assert found.measurements == plain.measurements
    wanted = weights(plain)
    assert all(torch.equal(x, wanted[name]) for name, x in weights(found).items())


@pytest.mark.parametrize("step", [13, 2])
def test_interrupted_recorded_training_ends_like_one_without_either(
    tmp_path: Path, recorders: list[Again], monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """The option may also change on the way: it is no part of what a run is."""
    (plain,) = train(tiny(), tmp_path / "plain")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4 * step)
        with pytest.raises(Interruption):
            train(tiny(GRAPHS) if step == 13 else tiny(), tmp_path / "recorded")
    assert not (tmp_path / "recorded" / "tiny" / "path" / EVALUATION).exists()
    (found,) = train(tiny(GRAPHS), tmp_path / "recorded")
    assert recorders[-1].recordings == 1
    assert metrics(found) == metrics(plain)
    wanted = weights(plain)
    assert all(torch.equal(x, wanted[name]) for name, x in weights(found).items())


def test_what_is_known_of_a_diverged_step_is_the_same(
    tmp_path: Path, recorders: list[Again], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = trainer.RecipeTrainer.compute_loss

    def compute_loss(self: Any, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        loss = original(self, model, inputs, *args, **kwargs)
        return loss * torch.where(inputs["input_ids"].sum() == bad, torch.nan, 1.0)

    steps = [sources.TaskSource.example(sources.open_source(tiny()), 0, n)["input_ids"] for n in range(80)]  # type: ignore[arg-type]
    sums = [int(torch.stack(steps[4 * n : 4 * n + 4]).sum()) for n in range(20)]
    bad = next(x for n, x in enumerate(sums) if n > EAGER_STEPS and sums.count(x) == 1)
    monkeypatch.setattr(trainer.RecipeTrainer, "compute_loss", compute_loss)
    known = []
    for name, changes in (("plain", ()), ("recorded", (GRAPHS,))):
        with pytest.raises(TrainingDiverged, match=f"diverged at step {sums.index(bad) + 1}: .*gradient"):
            train(tiny(*changes), tmp_path / name)
        known.append((tmp_path / name / "tiny" / "path" / DIVERGENCE).read_text())
    assert recorders[-1].replays
    assert known[1] == known[0]


def model() -> PaTHForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return PaTHForCausalLM(PaTHConfig(vocab_size=32, use_cache=False, **shape))  # type: ignore[arg-type]


def passes_of(one: nn.Module) -> Callable[[dict[str, Tensor]], Tensor]:
    def passes(inputs: dict[str, Tensor]) -> Tensor:
        loss: Tensor = one(**inputs).loss
        loss.backward()
        return loss.detach()

    return passes


# Sequences of the micro-batches of each step, after those that warm up; the recorded ones have three.
STEPS = ([3], [3], [3], [3, 3, 3], [2], [3, 2], [2, 3], [2, 3, 3], [3, 2, 3], [3])


@pytest.mark.parametrize("set_to_none", [True, False])
def test_batches_of_other_shapes_run_as_they_are(set_to_none: bool) -> None:
    """In any order within a step, and with gradients that are zero rather than none at its beginning."""
    found: list[list[Tensor]] = []
    for record in (False, True):
        one = model()
        recorder = Again(one.parameters())
        passes: Callable[[dict[str, Tensor]], Tensor] = passes_of(one)
        if record:
            passes = RecordedPasses(passes, one.parameters(), recorder)
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        generator = torch.Generator().manual_seed(1)
        losses = []
        for sizes in (*[[3]] * EAGER_STEPS, *STEPS):
            for size in sizes:
                ids = torch.randint(32, (size, 8), generator=generator)
                losses.append(passes({"input_ids": ids, "labels": ids}))
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
        found.append([*losses, *one.parameters()])
        assert recorder.replays == (sum(sizes.count(3) for sizes in STEPS) if record else 0)
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_a_loss_is_its_callers_and_gradients_are_the_graphs() -> None:
    """So that a loss that is kept does not change, and an optimiser finds gradients where they were recorded."""
    one = model()
    passes = RecordedPasses(passes_of(one), one.parameters(), Again(one.parameters()))
    losses, places = [], []
    for n in range(EAGER_STEPS + 2):
        ids = torch.full((1, 4), n)
        losses.append(passes({"input_ids": ids, "labels": ids}))
        places.append([p.grad.data_ptr() for p in one.parameters() if p.grad is not None])
        one.zero_grad()
    assert len({float(loss) for loss in losses}) == len(losses)
    assert places[-1] == places[-2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ("training.parallel={strategy: fsdp}",),
            "training.cuda_graphs: wanted false beside training.parallel.strategy fsdp, got true",
        ),
        (
            ("training.parallel={strategy: fsdp, context: 2}",),
            "training.cuda_graphs: wanted false beside training.parallel.strategy fsdp, got true",
        ),
        (
            ("training.activation_checkpointing=true",),
            "training.cuda_graphs: wanted false beside training.activation_checkpointing, got true",
        ),
        (
            (
                "task=null",
                "data={files: {paths: [x]}, tokenizer: bpe, vocab_size: 300, length: 16, packing: documents}",
                "evaluation={}",
            ),
            "training.cuda_graphs: wanted false beside data.packing documents",
        ),
    ],
)
def test_what_cannot_be_recorded_is_refused(changes: tuple[str, ...], message: str) -> None:
    tiny(*changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny(*changes, GRAPHS)


def test_several_processes_and_several_gpus_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for processes in (1, 2):
        with monkeypatch.context() as patch:
            patch.setenv("RANK", "0")
            patch.setenv("WORLD_SIZE", str(processes))
            with pytest.raises(ValueError, match=rf"training\.cuda_graphs: wanted false .*SIZE {processes}\), got"):
                train(tiny(GRAPHS), tmp_path)
    assert not any(tmp_path.iterdir())
    monkeypatch.setattr(trainer.TrainingArguments, "n_gpu", property(lambda self: 3))
    for stage, section in ((Training, "training"), (Align, "align")):
        settings = stage(steps=1, batch_size=3, learning_rate=0.1, device="cpu", cuda_graphs=True)
        with pytest.raises(ValueError, match=rf"{section}\.cuda_graphs: wanted false, or one GPU .*true with 3 GPUs"):
            trainer.training_arguments(settings, tmp_path)


def test_without_a_gpu_the_option_has_no_effect_and_says_so_once(tmp_path: Path) -> None:
    recorded._warn_of_no_graphs.cache_clear()
    few = ("training.steps=5", "training.eval_every=0", "mixers=[rope,none]")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = train(tiny(*few, GRAPHS), tmp_path / "recorded")
    assert [str(w.message) for w in caught if "cuda_graphs" in str(w.message)] == [
        "training.cuda_graphs: no effect on the device cpu: steps run as they are"
    ]
    plain = train(tiny(*few), tmp_path / "plain")
    assert [run.measurements for run in found] == [run.measurements for run in plain]


def test_a_recording_that_fails_says_what_to_do(
    tmp_path: Path, recorders: list[Again], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Tensor:
        raise GraphCaptureFailed("operation not permitted when stream is capturing")

    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(tiny(GRAPHS, "training.log_every=1", "training.save_every=1").to_yaml())
    monkeypatch.setattr(Again, "record", fails)
    result = CliRunner().invoke(cli.app(), ["train", str(recipe), "--runs", str(tmp_path)])
    assert result.exit_code == cli.FAILED
    assert (
        f"training.cuda_graphs: step {EAGER_STEPS + 1} could not be recorded: operation not permitted" in result.stderr
    )
    assert "Traceback" not in result.output
    arguments = ["train", str(recipe), "training.cuda_graphs=false", "--runs", str(tmp_path)]
    assert CliRunner().invoke(cli.app(), arguments).exit_code == 0


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() != 1, reason="needs one CUDA device")
@pytest.mark.parametrize("compile", ["false", "true"])
@pytest.mark.parametrize("mixer", ["path", "path_fox", "rope"])
def test_losses_on_a_gpu_are_those_of_steps_that_are_not_recorded(tmp_path: Path, mixer: str, compile: str) -> None:
    """A CUDA graph launches the same kernels: losses agree to what atomics and the order of sums in them leave."""
    changes = (
        f"mixers=[{mixer}]",
        f"training.compile={compile}",
        "training.device=auto",
        "training.precision=bfloat16",
        "training.accumulation_steps=2",
        "training.log_every=1",
        "task.length=128",
        "model.hidden_size=128",
        "model.num_hidden_layers=2",
    )
    losses = []
    for name in ("plain", "recorded"):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "training.cuda_graphs")
            (run,) = train(tiny(*changes, *([GRAPHS] if name == "recorded" else [])), tmp_path / name)
        losses.append(torch.tensor([entry["loss"] for entry in read_metrics(run.folder / METRICS) if "loss" in entry]))
    assert len(losses[0]) == 20
    torch.testing.assert_close(losses[1], losses[0], rtol=0.05, atol=0.01)


WAITS = """
import torch
from path_attention.training.recorded import EAGER_STEPS, GraphCaptureFailed, RecordedPasses, recorder_for

layer = torch.nn.Linear(4, 4, device="cuda")

def passes(inputs):
    loss = layer(inputs["x"]).sum()
    loss.backward()
    float(loss)  # which the host waits for
    return loss.detach()

step = RecordedPasses(passes, layer.parameters(), recorder_for(torch.device("cuda")))
x = torch.ones(3, 4, device="cuda")
for _ in range(EAGER_STEPS):
    step({"x": x})
try:
    step({"x": x})
except GraphCaptureFailed as error:
    print("refused:", error, flush=True)
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_waits_for_the_gpu_cannot_be_recorded() -> None:
    """In a process of its own, which is best left then; the message is that of what waited."""
    done = subprocess.run([sys.executable, "-c", WAITS], capture_output=True, text=True, timeout=300)
    found = re.search("refused: .*", done.stdout)
    assert found is not None, done.stderr
    assert "captur" in found[0]
