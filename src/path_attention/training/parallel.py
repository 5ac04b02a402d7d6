"""How the processes of a training share it: a mesh of data x context x tensor, and FSDP2 over the first two.

    data      different sequences
    context   pieces of the same sequences (path_attention.distributed)
    tensor    heads and width of the same layers on the same tokens (path_attention.distributed.tensor)

Parameters, their gradients and the optimiser's states are sharded over data and context. The batch, and with it the
training, is the same for every mesh, but for the order in which sums are taken.
"""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.data import Sampler

from path_attention.training.recipe import Training


def check_processes(settings: Training) -> None:
    """Raises a ValueError where the processes there are cannot share a training as ``settings.parallel`` says."""
    parallel, processes = settings.parallel, int(os.environ.get("WORLD_SIZE", "1"))
    if settings.cuda_graphs and (processes > 1 or "RANK" in os.environ):  # DDP's hooks work on a stream of their own
        raise ValueError(
            f"training.cuda_graphs: wanted false under torchrun or accelerate launch (WORLD_SIZE {processes}), got true"
        )
    if parallel.strategy == "ddp":
        return
    if "RANK" not in os.environ:
        raise ValueError(
            "training.parallel.strategy: fsdp wants processes started by torchrun (one will do) or accelerate launch, "
            "got a plain one"
        )
    both = parallel.tensor * parallel.context
    if processes % both:
        raise ValueError(
            f"training.parallel: wanted a number of processes that tensor x context = {both} divides, got {processes}"
        )


def check_model(settings: Training, config: Any, length: int) -> None:
    """Raises a ValueError where a model of a configuration cannot be shared as ``settings.parallel`` says."""
    parallel = settings.parallel
    if parallel.tensor > 1:
        from path_attention.distributed.tensor import unsupported_reason

        if (reason := unsupported_reason(config, parallel.tensor)) is not None:
            raise ValueError(f"training.parallel.tensor: {reason}")
    if parallel.context > 1:
        from path_attention.layers.mixers import build_mixer

        with torch.device("meta"):
            supported = build_mixer(config).supports_context_parallel
        if not supported:
            raise ValueError(
                f"training.parallel.context: the mixer {config.mixer} needs whole sequences; wanted 1, or one of path, "
                "path_fox, fox and alibi"
            )
        if length % (2 * parallel.context):
            raise ValueError(
                f"training.parallel.context: wanted a length that two pieces for each of {parallel.context} processes "
                f"divide, got {length}"
            )


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any of the processes there are; all of them call it."""
    if not dist.is_initialized():
        return flag
    found = torch.tensor(int(flag), device=device)
    dist.all_reduce(found)
    return bool(found)


def make_mesh(settings: Training, device: torch.device) -> DeviceMesh:
    """The mesh of all processes."""
    parallel = settings.parallel
    if not dist.is_initialized():  # a single process: nobody had a use for a group so far
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    data = dist.get_world_size() // (parallel.tensor * parallel.context)
    shape = (data, parallel.context, parallel.tensor)
    return init_device_mesh(device.type, shape, mesh_dim_names=("data", "context", "tensor"))


def prepare(model: Any, settings: Training, mesh: DeviceMesh | None) -> None:
    """Everything a recipe wants done to a model before an optimiser sees its parameters, in place."""
    shared = None if mesh is None or mesh["tensor"].size() == 1 else mesh["tensor"]
    if shared is not None:
        from path_attention.distributed.tensor import tensor_parallel

        tensor_parallel(model, shared)
    if mesh is not None and mesh["context"].size() > 1:
        model.set_context_parallel(mesh["context"])
    if not settings.recompute_attention:
        model.set_recompute(False)
    if settings.activation_checkpointing:
        # transformers 5.23 has another name for it, and warns of the old one.
        name = "activation_checkpointing_enable"
        getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")({"use_reentrant": False})
    if settings.compile:
        # Layer by layer: they are alike, and one compilation serves all of them. Of shared layers for one shape each:
        # with DTensors and a second length torch 2.13 compiles until Python's recursion limit.
        for layer in model.base_model.layers:
            layer.compile(dynamic=None if shared is None else False)
        model.loss_function = torch.compile(model.loss_function)
    if mesh is not None:
        shard(model, mesh)


def shard(model: Any, mesh: DeviceMesh) -> None:
    """FSDP2 over the dimensions data and context of the mesh."""
    from torch.distributed.fsdp import fully_shard

    over = mesh["data"]
    if mesh["context"].size() > 1:
        over = mesh["data", "context"]._flatten("shard")
    for layer in model.base_model.layers:
        fully_shard(layer, mesh=over)
    fully_shard(model, mesh=over)


def by_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters that lie on the same mesh together: torch's fused and foreach operators take no others."""
    found: dict[Any, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        found[parameter.device_mesh if isinstance(parameter, DTensor) else None].append(parameter)
    return list(found.values())


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The norm of all gradients, over all processes that hold parts of them."""
    norms = []
    for group in by_mesh(parameters):
        gradients = [p.grad for p in group if p.grad is not None]
        if gradients:
            norm = get_total_norm(gradients)
            norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, norm: Tensor) -> None:
    """Scale gradients whose norm is ``norm`` down to ``max_norm``."""
    for group in by_mesh(parameters):
        clip_grads_with_norm_(group, max_norm, norm)


class SharedBatches(Sampler[list[int]]):
    """The micro-batches of one of ``shares`` processes: of every ``shares`` in a row, the one at its ``rank``."""

    def __init__(self, sequences: int, size: int, rank: int, shares: int) -> None:
        self.sequences, self.size, self.rank, self.shares = sequences, size, rank, shares

    def __len__(self) -> int:
        return self.sequences // (self.size * self.shares)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(len(self)):
            first = (batch * self.shares + self.rank) * self.size
            yield list(range(first, first + self.size))


def context_shard(batch: dict[str, Any], context: Any) -> dict[str, Any]:
    """A process's shard of a batch of whole sequences; boundaries stay those of the whole row."""
    return {name: x if name == "cu_seqlens" else context.shard(x) for name, x in batch.items()}
