"""Training steps of a small model, its parameters sharded over the processes, against the same steps of one process."""

import copy
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from path_attention.distributed.processes import Place
from path_attention.doctor.check import Check
from path_attention.doctor.together import shared_folder
from path_attention.training import checkpoint, parallel
from path_attention.training.recipe import Parallel, Training

NAMES = ("data", "context", "tensor")
# Relative. In float32 sums in another order differ by some 1e-6 here; a part that is left out, or counted twice, by
# tenths.
TOLERANCE = 1e-4
# Tokens of a sequence for each process that shares it, and sequences for each share of the data.
TOKENS_EACH, SEQUENCES_EACH = 16, 2


def small_model(device: torch.device, seed: int = 0) -> Any:
    """Of two layers with reflections and gates, the same on every process."""
    from path_attention.models import PaTHConfig, PaTHForCausalLM

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = PaTHConfig(mixer="path_fox", intermediate_size=64, use_cache=False, **sizes)
    model: torch.nn.Module = PaTHForCausalLM(config)
    return model.to(device)


def _settings(context: int) -> Training:
    return Training(steps=1, batch_size=1, learning_rate=1e-3, parallel=Parallel(strategy="fsdp", context=context))


def _optimizer(model: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def _full(x: Any) -> Tensor:
    found: Tensor = x.full_tensor() if isinstance(x, DTensor) else x
    return found.detach()


def _backward(model: Any, ids: Tensor, count: int, factor: int) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "path_attention: .*torch backend serves")  # float32 on a GPU: small enough
        loss: Tensor = model(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(count)).loss
        (loss * factor).backward()
    return loss.detach()


class Shared:
    """The small model, prepared as the trainer does it, and its share of the sequences."""

    def __init__(self, place: Place, context: int) -> None:
        self.place = place
        mesh = init_device_mesh(place.device.type, (place.size // context, context, 1), mesh_dim_names=NAMES)
        self.shares = mesh["data"].size()
        generator = torch.Generator().manual_seed(1)
        shape = (SEQUENCES_EACH * self.shares, TOKENS_EACH * context)
        self.ids = torch.randint(64, shape, generator=generator).to(place.device)
        self.count = self.ids.shape[0] * (self.ids.shape[1] - 1)  # every token but the first of a sequence is a label
        self.model = small_model(place.device)
        parallel.prepare(self.model, _settings(context), mesh)
        self.optimizer = _optimizer(self.model)
        rows = self.ids.chunk(self.shares)[mesh["data"].get_local_rank()]
        self.part = rows if self.model.context is None else self.model.context.shard(rows)

    def backward(self) -> Tensor:
        """The loss of all sequences: the processes of a context group have the same one of theirs."""
        loss = _backward(self.model, self.part, self.count, self.shares)
        return torch.stack(self.place.all(loss.cpu())).sum() * self.shares / self.place.size

    def step(self) -> None:
        norm = parallel.gradient_norm(self.model.parameters())
        parallel.clip_gradients(self.model.parameters(), 1.0, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()


def step(place: Place, context: int) -> Check:
    """Loss and gradients of one step of all processes against one; then the optimiser's step."""
    name = "FSDP2 step" if context == 1 else "FSDP2 x context parallel step"
    shared = Shared(place, context)
    alone = small_model(place.device)
    wanted = _backward(alone, shared.ids, shared.count, 1).cpu()
    loss = shared.backward()
    errors = {"loss": float((loss - wanted).abs() / wanted)}
    for (parameter, p), q in zip(shared.model.named_parameters(), alone.parameters(), strict=True):
        exact = q.grad
        errors[parameter] = float((_full(p.grad) - exact).norm() / exact.norm().clamp(min=1e-12))
    shared.step()
    worst = max(errors, key=lambda key: errors[key])
    mesh = f"{shared.shares} x {context} (data x context)"
    text = f"{mesh}: loss and gradients differ from one process by {errors[worst]:.1e} at most ({worst})"
    return Check(name, "ok" if errors[worst] <= TOLERANCE else "failed", text)


def checkpoint_for_others(place: Place, folder: Path | None) -> Check:
    """Weights and moments after a step, written by all processes and read by half of them, or by one."""
    shared = Shared(place, 1)
    shared.backward()
    shared.step()
    where = shared_folder(place, folder)
    checkpoint.save(shared.model, shared.optimizer, where)
    if place.rank == 0:
        shared.model.config.save_pretrained(where)
    saved = _state(shared.model, shared.optimizer)
    place.wait()
    readers = max(1, place.size // 2)
    group = dist.new_group(list(range(readers)))
    differing: list[str] = []
    if place.rank < readers:
        loaded = _read(place, where, group)
        differing = [name for name, x in saved.items() if not torch.equal(x, loaded[name])]
    place.wait()
    if place.rank == 0:
        shutil.rmtree(where)
    text = f"saved by {place.size}, read by {readers}: weights and moments"
    if differing:
        return Check("checkpoint", "failed", f"{text} differ: {', '.join(differing[:4])}")
    return Check("checkpoint", "ok", f"{text} are the same")


def _read(place: Place, where: Path, group: Any) -> dict[str, Tensor]:
    """A model of other weights, sharded over the group, after it has read the checkpoint."""
    from torch.distributed.fsdp import fully_shard

    model = copy.deepcopy(small_model(place.device, seed=2))
    if dist.get_world_size(group) > 1:
        fully_shard(model, mesh=DeviceMesh.from_group(group, place.device.type))
    optimizer = _optimizer(model)
    checkpoint.load(model, optimizer, where, group)
    return _state(model, optimizer)


def _state(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = {}
    for name, p in model.named_parameters():
        found[name] = _full(p).clone()
        for moment in ("exp_avg", "exp_avg_sq"):
            found[f"{name}.{moment}"] = _full(optimizer.state[p][moment]).clone()
    return found
