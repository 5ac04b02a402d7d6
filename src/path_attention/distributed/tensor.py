"""Tensor parallelism: the heads and the width of every layer shared by several processes.

Every process has all tokens. Of each layer it computes some of the heads, and some of the columns of the MLP's width,
and the processes add up what these give:

    attention   q, k, v, w, beta and gates of a process's heads; W_o of those heads; sum over the processes
    MLP         W_gate and W_up of a part of the width; W_down of it; sum over the processes

PaTH needs nothing more: a head's transitions are made of its own w and beta. Norms, embeddings and the low-rank
projection that all heads' w start from are the same on every process, and so are their gradients.
"""

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from path_attention.layers.attention import Attention
from path_attention.layers.decay import ALiBiAttention
from path_attention.layers.path import PaTHAttention

# Linear layers whose columns are heads, by their names in a decoder layer.
_OF_HEADS = ("q_proj", "k_proj", "v_proj", "w_up_proj", "w_proj", "beta_proj", "gate_proj")


def tensor_parallel(model: Any, mesh: DeviceMesh) -> None:
    """Share the layers of a model among the processes of ``mesh``, in place. Its forward takes and gives whole tensors.

    Call it before ``fully_shard`` and before an optimiser sees the parameters. Sharded parameters become DTensors. Who
    compiles layers does so with ``dynamic=False``: torch 2.13 cannot trace DTensors of lengths that vary.

    Args:
        model: :class:`path_attention.models.PaTHForCausalLM` or ``PaTHModel``, the same on every process.
        mesh: of one dimension, as mesh["tensor"].

    Raises:
        ValueError: heads or width do not divide among the processes, or the mixer cannot be shared.
    """
    if (reason := unsupported_reason(model.config, mesh.size())) is not None:
        raise ValueError(reason)
    for layer in model.base_model.layers:
        _share_attention(layer.self_attn, mesh)
        plan = {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()}
        parallelize_module(layer.mlp, mesh, plan)


def unsupported_reason(config: Any, size: int) -> str | None:
    """Why a model of this configuration cannot be shared among ``size`` processes; None if it can."""
    if size == 1:
        return None
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(config, name) % size:
            return (
                f"{name}: got {getattr(config, name)}; wanted a multiple of the {size} processes of tensor parallelism"
            )
    if config.mixer == "alibi":
        return "mixer: got alibi, whose slopes need all heads in one process; wanted another, or no tensor parallelism"
    if config.num_reflections > 1 and config.mixer in ("path", "path_fox"):
        return f"num_reflections: got {config.num_reflections}; wanted 1 with tensor parallelism"
    return None


def _share_attention(attention: Attention, mesh: DeviceMesh) -> None:
    assert not isinstance(attention, ALiBiAttention)
    plan: dict[str, Any] = {
        name: ColwiseParallel() for name in _OF_HEADS if isinstance(getattr(attention, name, None), nn.Linear)
    }
    parallelize_module(attention, mesh, plan | {"o_proj": RowwiseParallel()})
    attention.num_heads //= mesh.size()
    attention.num_kv_heads //= mesh.size()
    for norm in (attention.q_norm, attention.k_norm):
        if norm is not None:
            norm.group = mesh.get_group()
    if isinstance(attention, PaTHAttention) and attention.w_conv is not None:
        weight = attention.w_conv.weight  # (channels, width): channels are heads
        attention.w_conv.weight = nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]))
        attention.w_conv.is_shared = True


class _SumOfGradients(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def sum_gradients(x: Tensor, group: Any) -> Tensor:
    """x itself; its gradient is the sum of those that the processes of the group have for their copies."""
    return _SumOfGradients.apply(x, group)
