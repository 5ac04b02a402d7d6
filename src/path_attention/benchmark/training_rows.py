"""What each process of ``path-attention benchmark training-scaling`` does: steps of the recipe's model, checkpoints."""

import gc
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from path_attention.benchmark.scaling_rows import timed
from path_attention.distributed.processes import Place
from path_attention.evaluation.perplexity import precision_context
from path_attention.training import checkpoint, load_recipe, parallel
from path_attention.training.recipe import Parallel, Training

# Seconds of a first step, its compilation included.
FIRST_SECONDS = 300.0
# Seconds to write or read a checkpoint.
CHECKPOINT_SECONDS = 300.0
# Seconds of the repeats of a step at most.
SECONDS_EACH = 12.0
# The loss of random weights is the logarithm of the vocabulary plus half the variance of the logits, about 0.3.
FIRST_LOSS_TOLERANCE = 1.0


@dataclass(frozen=True)
class Step:
    """A training step: a recipe's model on random tokens.

    Args:
        recipe: its name.
        mixer: of the model.
        changes: to the recipe, as on the command line.
        context: processes that share every sequence.
        length: of a sequence.
        sequences: for each process: so many times the processes in all.
        compile: torch.compile, as the recipe's training.compile.
    """

    recipe: str
    mixer: str
    changes: tuple[str, ...]
    context: int
    length: int
    sequences: int
    compile: bool


class Trained:
    """The model, its optimiser, and this process's share of the tokens; alone, without FSDP."""

    def __init__(self, place: Place, work: Step) -> None:
        from path_attention.models import PaTHConfig, PaTHForCausalLM

        recipe = load_recipe(work.recipe, [*work.changes, f"mixers=[{work.mixer}]"])
        self.place, self.work = place, work
        strategy = Parallel(strategy="fsdp", context=work.context) if place.size > 1 else Parallel()
        old = recipe.training
        self.settings = Training(
            steps=1, batch_size=work.sequences * place.size, learning_rate=old.learning_rate, betas=old.betas,
            weight_decay=old.weight_decay, max_grad_norm=old.max_grad_norm, precision=old.precision,
            compile=work.compile, activation_checkpointing=old.activation_checkpointing, parallel=strategy,
        )  # fmt: skip
        self.mesh = parallel.make_mesh(self.settings, place.device) if place.size > 1 else None
        torch.manual_seed(0)
        with torch.device(place.device):  # on the device at once: seconds instead of a minute
            self.model: Any = PaTHForCausalLM(PaTHConfig(mixer=work.mixer, use_cache=False, **dict(recipe.model)))
        self.parameters = sum(p.numel() for p in self.model.parameters())
        parallel.prepare(self.model.train(), self.settings, self.mesh)
        first, second = self.settings.betas
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, betas=(first, second), weight_decay=self.settings.weight_decay,
            fused=place.device.type == "cuda",
        )  # fmt: skip
        self.ids, self.count, self.shares = self._tokens()

    def _tokens(self) -> tuple[Tensor, Tensor, int]:
        """This process's tokens, the labels of all, and the shares of the data."""
        shares = 1 if self.mesh is None else self.mesh["data"].size()
        mine = 0 if self.mesh is None else self.mesh["data"].get_local_rank()
        generator = torch.Generator().manual_seed(1)
        shape = (self.settings.batch_size, self.work.length)
        ids = torch.randint(self.model.config.vocab_size, shape, generator=generator)
        part = ids.chunk(shares)[mine].to(self.place.device)
        if self.model.context is not None:
            part = self.model.context.shard(part)
        count = torch.tensor(shape[0] * (shape[1] - 1), device=self.place.device)
        return part, count, shares

    def step(self) -> Tensor:
        """Forward, backward, clipping and AdamW, as the trainer makes them; the loss over all processes' labels."""
        with precision_context(self.settings.precision, self.place.device):
            loss = self.model(input_ids=self.ids, labels=self.ids, num_items_in_batch=self.count).loss
        (loss * self.shares).backward()
        norm = parallel.gradient_norm(self.model.parameters())
        parallel.clip_gradients(self.model.parameters(), self.settings.max_grad_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def loss(self, mine: Tensor) -> float:
        return sum(self.place.all(float(mine))) * self.shares / self.place.size


def measure(place: Place, work: Step, repeats: int) -> dict[str, Any]:
    """Tokens a second of all processes and of each, and the bytes of the fullest device."""
    _forget(place)
    started = time.perf_counter()
    with place.step("building the model and its first step", FIRST_SECONDS):
        trained = Trained(place, work)
        first = trained.loss(trained.step())
    compiled = time.perf_counter() - started
    wanted = math.log(trained.model.config.vocab_size)
    if not abs(first - wanted) < FIRST_LOSS_TOLERANCE:
        return {"wrong": f"first loss {first}, wanted about {wanted:.2f}: not timed"}
    with place.step("steps", FIRST_SECONDS):
        second = trained.loss(trained.step())
        taken = timed(place, trained.step, repeats, SECONDS_EACH)
        last = trained.loss(trained.step())
    if not math.isfinite(last):
        return {"wrong": f"the loss is {last} after some steps: not timed"}
    peak = max(place.all(torch.cuda.max_memory_allocated(place.device))) if place.device.type == "cuda" else None
    rate = trained.settings.batch_size * work.length / taken["median_ms"] * 1e3
    return {
        "parameters": trained.parameters,
        "losses": [first, second, last],
        "step_ms": taken,
        "first_s": round(compiled, 1),
        "tokens_per_second": round(rate, 1),
        "tokens_per_second_each": round(rate / place.size, 1),
        "peak_bytes": peak,
    }


def _forget(place: Place) -> None:
    gc.collect()
    torch.compiler.reset()
    if place.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(place.device)


# --- a checkpoint for another number of processes --------------------------------------------------------------------


def save(place: Place, work: Step, folder: str) -> dict[str, Any]:
    """A step, and its weights and moments in a folder; their fingerprint, and the loss of the next step."""
    _forget(place)
    with place.step("building the model and its first step", FIRST_SECONDS):
        trained = Trained(place, work)
        trained.step()
    where = Path(folder)
    with place.step("saving", CHECKPOINT_SECONDS):
        seconds = _timed_once(place, lambda: checkpoint.save(trained.model, trained.optimizer, where))
    if place.rank == 0:
        trained.model.config.save_pretrained(where)
    return _after(place, trained, where, seconds)


def load(place: Place, work: Step, folder: str) -> dict[str, Any]:
    """The same numbers of what is read from the folder, which is then removed."""
    _forget(place)
    where = Path(folder)
    with place.step("building the model", FIRST_SECONDS):
        trained = Trained(place, work)
    with place.step("loading", CHECKPOINT_SECONDS):
        seconds = _timed_once(place, lambda: checkpoint.load(trained.model, trained.optimizer, where))
    found = _after(place, trained, where, seconds)
    if place.rank == 0:
        shutil.rmtree(where)
    return found


def _after(place: Place, trained: Trained, where: Path, seconds: float) -> dict[str, Any]:
    found = {"seconds": round(seconds, 2), "fingerprint": fingerprint(trained)}
    place.wait()
    found["bytes"] = sum(f.stat().st_size for f in where.rglob("*") if f.is_file())
    with place.step("the next step", FIRST_SECONDS):
        found["next_loss"] = trained.loss(trained.step())
    return found


def _timed_once(place: Place, function: Any) -> float:
    place.wait()
    start = time.perf_counter()
    function()
    place.wait()
    return time.perf_counter() - start


def fingerprint(trained: Trained) -> str:
    """Of all weights and moments: the sum of their bits, the same for every way of sharding, exactly.

    Each number's bits are multiplied by an odd number that its tensor and its place within decide, so that an exchange
    shows.
    """
    total = torch.zeros((), dtype=torch.int64, device=trained.place.device)
    for n, p in enumerate(trained.model.parameters()):
        moments = trained.optimizer.state[p]
        for m, x in enumerate((p, moments["exp_avg"], moments["exp_avg_sq"])):
            total += _bits(x, 3 * n + m)
    if trained.place.size > 1:
        dist.all_reduce(total)
    return f"{int(total) & (2**64 - 1):016x}"


def _bits(x: Any, which: int) -> Tensor:
    """Of this process's part of a tensor, sharded along its first dimension or whole."""
    first, rows = 0, x.shape[0]
    local = x.detach()
    if isinstance(x, DTensor):
        local = x.to_local().detach()
        mesh = x.device_mesh
        each = -(-rows // mesh.size())  # as torch.chunk
        first = each * mesh.get_local_rank()
    if local.numel() == 0:
        return torch.zeros((), dtype=torch.int64, device=local.device)
    width = local[0].numel()
    place = torch.arange(first * width, first * width + local.numel(), device=local.device)
    bits = local.contiguous().flatten().view(torch.int32).to(torch.int64)
    return (bits * (2 * (place + which * 1_000_003) + 1)).sum()
