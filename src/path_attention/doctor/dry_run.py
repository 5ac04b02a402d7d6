"""A step of a recipe's training without its text: the memory that a process needs, by formula and by measurement.

States are known beforehand: with S processes that share N parameters a process holds

    4 N / S  weights  +  4 N / S  gradients  +  8 N / S  moments of AdamW        bytes, all in float32,

and for a while the weights of the layer it works on, of the next one, and of what is in no layer, in full. What a
layer keeps for the backward pass is measured: models of one and of two layers, of the recipe's width, make a step on
random tokens. The rest of the layers take as much as the second one.
"""

import dataclasses
import gc
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from path_attention.distributed.processes import Place
from path_attention.doctor.check import Check
from path_attention.evaluation.perplexity import precision_context
from path_attention.training import Recipe, load_recipe, parallel
from path_attention.training.recipe import Training

# Bytes of a parameter's weight, gradient and two moments.
STATES = 16
# Seconds of a step of a small number of layers, its compilation included.
STEP_SECONDS = 300.0
# Shards are rounded up to whole rows, and scalars are on every process: computed and counted states may differ by this.
ROUNDING = 0.02
# Of the memory of a device that a step may need: the allocator's rounding and NCCL's buffers want the rest.
USABLE = 0.95


class Measured(NamedTuple):
    """Bytes of one process, the largest of all."""

    states: int
    kept: int  # for the backward pass of one micro-batch
    peak: int | None  # of a step, None on a CPU


def dry_run(place: Place, name: str) -> list[Check]:
    """Raises a ValueError where the recipe does not fit the number of processes."""
    recipe = load_recipe(name)
    settings, sequences = _settings(place, recipe)
    config = _config(recipe)
    parallel.check_model(settings, config, _length(recipe))
    mesh = parallel.make_mesh(settings, place.device) if settings.parallel.strategy == "fsdp" else None
    shards = mesh["data"].size() * mesh["context"].size() if mesh is not None else 1
    in_layer, outside = _parameters(config, settings.parallel.tensor)
    layers = config.num_hidden_layers
    # One sequence on a CPU: what it keeps is counted, and goes with the number of sequences.
    tried = sequences if place.device.type == "cuda" else 1
    measured = []
    for n in (1, 2):
        with place.step(f"recipe {name}: a step of {n} of its layers", STEP_SECONDS):
            measured.append(_measure(place, recipe, config, settings, mesh, n, tried))
    first, second = measured
    kept = (first.kept + (layers - 1) * (second.kept - first.kept)) * sequences // tried
    states = STATES * (layers * in_layer + outside) / shards
    gathered = 4 * (2 * in_layer + outside) if shards > 1 else 0
    total = (
        f"{(layers * in_layer + outside) / 1e6:.1f}M parameters, mixer {config.mixer}, {sequences} x "
        f"{_length(recipe)} tokens a micro-batch, parameters over {shards}"
    )
    return [
        Check(f"recipe {name}", "ok", total),
        _states(name, second.states, STATES * (2 * in_layer + outside) / shards, states),
        _whole(place, name, layers, measured, states + gathered + kept, kept),
    ]


def _settings(place: Place, recipe: Recipe) -> tuple[Training, int]:
    """The recipe's, and the sequences of a micro-batch of one share of the data."""
    settings = recipe.training
    both = settings.parallel.tensor * settings.parallel.context
    if place.size % both:
        raise ValueError(
            f"training.parallel: wanted processes that tensor x context = {both} divides, got {place.size}"
        )
    shares = place.size // both * settings.accumulation_steps
    if settings.batch_size % shares:
        raise ValueError(
            f"training.batch_size: wanted a multiple of {place.size // both} shares of the data x "
            f"{settings.accumulation_steps} accumulation steps, got {settings.batch_size}"
        )
    if place.device.type != "cuda":
        settings = dataclasses.replace(settings, compile=False)
    return settings, settings.batch_size // shares


def _length(recipe: Recipe) -> int:
    source: Any = recipe.data if recipe.data is not None else recipe.task
    return int(source.length)


def _config(recipe: Recipe) -> Any:
    """Of the first mixer. A vocabulary that only the tokenizer knows is taken to be the model's default."""
    from path_attention.models import PaTHConfig
    from path_attention.training.run import model_config

    class Unopened:
        """What is known of a source before its text is read."""

        def model_settings(self) -> dict[str, Any]:
            given: Any = recipe.data
            trained_here = given is not None and getattr(given, "tokenizer", None) == "bpe"
            return {"vocab_size": given.vocab_size} if trained_here else {"vocab_size": PaTHConfig().vocab_size}

    return model_config(recipe, Unopened(), recipe.mixers[0])  # type: ignore[arg-type]


def _model(config: Any, layers: int, device: str) -> Any:
    from path_attention.models import PaTHForCausalLM

    config = type(config).from_dict({**config.to_dict(), "num_hidden_layers": layers})
    with torch.device(device):
        return PaTHForCausalLM(config)


def _parameters(config: Any, tensor: int) -> tuple[int, int]:
    """Of a layer, by the processes of tensor parallelism that share most of them, and outside of the layers."""
    one, two = (sum(p.numel() for p in _model(config, n, "meta").parameters()) for n in (1, 2))
    return (two - one) // tensor, one - (two - one)


def _measure(
    place: Place, recipe: Recipe, config: Any, settings: Training, mesh: DeviceMesh | None, layers: int, sequences: int
) -> Measured:
    gc.collect()
    torch.manual_seed(0)
    model = _model(config, layers, str(place.device))
    parallel.prepare(model.train(), settings, mesh)
    fused = place.device.type == "cuda"  # as the trainer does it
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, fused=fused)
    ids = torch.randint(config.vocab_size, (sequences, _length(recipe)), device=place.device)
    if model.context is not None:
        ids = model.context.shard(ids)
    if place.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(place.device)
    counter = _Kept(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "path_attention: .*torch backend serves")
        # As a training that accumulates: its last micro-batch has gradients and moments beside it.
        for _ in range(2):
            with counter, precision_context(settings.precision, place.device):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
    peak = torch.cuda.max_memory_allocated(place.device) if place.device.type == "cuda" else None
    moments = [x for state in optimizer.state.values() for x in state.values()]
    held = [*model.parameters(), *(p.grad for p in model.parameters()), *moments]
    found = Measured(sum(_local(x).nbytes for x in held), counter.bytes // 2, peak)
    del model, optimizer, loss, moments, held
    everyone = place.all(found)
    return Measured(
        max(x.states for x in everyone),
        max(x.kept for x in everyone),
        None if peak is None else max(x.peak for x in everyone),
    )


def _local(x: Any) -> Tensor:
    found: Tensor = x.to_local() if isinstance(x, DTensor) else x
    return found


class _Kept:
    """Bytes that autograd keeps for the backward pass, parameters aside; each storage once in a pass."""

    def __init__(self, model: Any) -> None:
        self.bytes = 0
        self._own = {_local(p).untyped_storage().data_ptr() for p in model.parameters()}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda x: x)

    def _keep(self, x: Tensor) -> Tensor:
        if isinstance(x, DTensor) or x.untyped_storage().data_ptr() in self._seen:
            return x
        storage = x.untyped_storage()
        self._seen.add(storage.data_ptr())
        self.bytes += storage.nbytes()
        return x

    def __enter__(self) -> None:
        self._seen = set(self._own)
        self._hooks.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)


def _gib(x: float) -> str:
    return f"{x / 2**30:.2f} GiB" if x >= 2**29 else f"{x / 2**20:.2f} MiB"


def _states(name: str, counted: int, computed_small: float, computed: float) -> Check:
    off = abs(counted - computed_small) / computed_small
    text = (
        f"{_gib(computed)} a process computed; of two layers {_gib(computed_small)} computed, {_gib(counted)} counted"
    )
    return Check(f"recipe {name}: states", "ok" if off <= ROUNDING else "failed", text)


def _whole(place: Place, name: str, layers: int, measured: list[Measured], computed: float, kept: float) -> Check:
    title = f"recipe {name}: a step"
    text = f"{_gib(computed)} a process computed, {_gib(kept)} of it for the backward pass of {layers} layers"
    first, second = (x.peak for x in measured)
    if first is None or second is None:
        return Check(title, "note", f"{text}; a peak is measured on GPUs alone")
    needed = first + (layers - 1) * (second - first)
    there = torch.cuda.get_device_properties(place.device).total_memory
    text += (
        f"; {_gib(needed)} by the peaks of one layer, {_gib(first)}, and two, {_gib(second)}; there are {_gib(there)}"
    )
    if needed > USABLE * there:
        return Check(title, "failed", f"{text}: does not fit; more accumulation_steps make micro-batches smaller")
    return Check(title, "ok", text)
