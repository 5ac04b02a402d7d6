"""Layers and models over split sequences: the loss and the gradients of one process, together with FSDP2."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from path_attention import PaTHAttention
from path_attention.distributed import ContextParallel
from path_attention.layers.decay import ForgettingAttention
from path_attention.models import PaTHConfig, PaTHForCausalLM
from tests.distributed.processes import in_processes, with_processes
from tests.ops.inputs import assert_same

LENGTH, HIDDEN = 72, 16
IGNORED = -100


def model(mixer: str = "path_fox") -> PaTHForCausalLM:
    torch.manual_seed(0)
    config = PaTHConfig(
        vocab_size=30,
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,  # large, so that attention has something to say
        mixer=mixer,
    )
    return PaTHForCausalLM(config).double()


def rows() -> tuple[Tensor, Tensor]:
    """Two sequences and their labels, of which the pieces count different numbers, and the sequences the same."""
    ids = torch.randint(30, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, : LENGTH // 3] = IGNORED
    labels[:, LENGTH // 2] = IGNORED
    return ids, labels


def gradients(m: torch.nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in m.named_parameters() if p.grad is not None}
    return {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in found.items()}


def check_step(mesh: DeviceMesh, *, packed: bool, checkpointing: bool) -> None:
    """Sequences over the mesh's first dimension, each split over its second, parameters over both."""
    ids, labels = rows()
    cu_seqlens = torch.tensor([0, 5, 30, LENGTH]) if packed else None
    whole = model()
    losses = [whole(ids[i : i + 1], labels=labels[i : i + 1], cu_seqlens=cu_seqlens).loss for i in range(2)]
    torch.stack(losses).mean().backward()

    split = model()
    if checkpointing:
        split.gradient_checkpointing_enable({"use_reentrant": False})
    split.set_context_parallel(mesh["context"])
    for layer in split.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(split, mesh=mesh)
    context = ContextParallel(mesh["context"])
    mine = mesh.get_local_rank("data")
    shard = [context.shard(x[mine : mine + 1]) for x in (ids, labels)]
    out = split.train()(shard[0], labels=shard[1], cu_seqlens=cu_seqlens)
    out.loss.backward()
    # transformers takes the loss in float32.
    torch.testing.assert_close(out.loss, losses[mine].detach(), rtol=1e-6, atol=0)
    assert_same(gradients(split), gradients(whole), tolerance=1e-6)


def check_layer(context: ContextParallel, *, conv_size: int, packed: bool, fox: bool = False) -> None:
    """In float64: the output and every gradient, where the processes' gradients add up."""

    def layer() -> torch.nn.Module:
        torch.manual_seed(0)
        if fox:
            return ForgettingAttention(HIDDEN, 4, 2).double()
        return PaTHAttention(HIDDEN, 4, 2, conv_size=conv_size, num_reflections=2).double()

    generator = torch.Generator().manual_seed(2)
    x, d_out = (torch.randn(1, LENGTH, HIDDEN, dtype=torch.float64, generator=generator) for _ in range(2))
    cu_seqlens = torch.tensor([0, 1, 10, 19, LENGTH]) if packed else None  # 9 tokens are a piece of four processes

    whole, wanted_x = layer(), x.clone().requires_grad_()
    wanted = whole(wanted_x, cu_seqlens=cu_seqlens)
    wanted.backward(d_out)
    split, got_x = layer(), context.shard(x).requires_grad_()
    split.set_context_parallel(context)
    got = split(got_x, cu_seqlens=cu_seqlens)
    got.backward(context.shard(d_out))
    for p in split.parameters():
        dist.all_reduce(p.grad, group=context.group)
    assert_same(
        {"out": context.unshard(got.detach()), "x": context.unshard(got_x.grad), **gradients(split)},
        {"out": wanted.detach(), "x": wanted_x.grad, **gradients(whole)},
    )
    assert copy.deepcopy(split).context is context  # a copy belongs to the same processes
    split.set_context_parallel(None)
    torch.testing.assert_close(split(x, cu_seqlens=cu_seqlens), wanted, rtol=0, atol=0)


def check_loss(context: ContextParallel) -> None:
    """The same on every process, over all labels or over as many as the caller counts, and with shifted labels."""
    ids, labels = rows()
    shard, shard_labels = context.shard(ids), context.shard(labels)
    m = model("fox")
    wanted = m(ids, labels=labels).loss
    shifted = context.shard(torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED))
    m.set_context_parallel(context)
    for options in ({}, {"shift_labels": shifted}):
        loss = m(shard, labels=shard_labels, **options).loss
        torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
    count = int((labels[:, 1:] != IGNORED).sum())
    loss = m(shard, labels=shard_labels, num_items_in_batch=2 * count).loss
    torch.testing.assert_close(loss, wanted / 2, rtol=1e-6, atol=0)


def check_refusals(context: ContextParallel) -> None:
    ids = rows()[0]
    shard = context.shard(ids)
    for mixer in ("rope", "none", "stick_breaking"):
        with pytest.raises(ValueError, match="needs whole sequences"):
            model(mixer).set_context_parallel(context)
    m = model()
    m.set_context_parallel(context)
    padding = torch.ones_like(shard)
    m(shard, attention_mask=padding)  # no padding at all
    padding[:, 0] = 0
    refused = {
        "attention_mask: got padding": {"attention_mask": padding},
        "position_ids: got": {"position_ids": torch.arange(shard.shape[1])[None]},
        "output_attentions: got": {"output_attentions": True},
    }
    for message, options in refused.items():
        with pytest.raises(ValueError, match=message):
            m(shard, **options)
    with pytest.raises(ValueError, match="generate: got"):
        m.generate(shard, max_new_tokens=1)
    attention = m.model.layers[0].self_attn
    hidden = torch.zeros(1, 2, HIDDEN, dtype=torch.float64)
    with pytest.raises(ValueError, match="attention_weights: got"):
        attention.attention_weights(hidden)
    with pytest.raises(ValueError, match="attention_mask: got"):
        attention(hidden, torch.ones(1, 2))
    with pytest.raises(ValueError, match="pieces of 1 tokens"):  # the convolution looks back two
        attention(hidden)


def work(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))
    check_step(mesh, packed=False, checkpointing=False)
    check_step(mesh, packed=True, checkpointing=True)
    everyone = ContextParallel(dist.group.WORLD)
    check_layer(everyone, conv_size=3, packed=False)
    check_layer(everyone, conv_size=4, packed=True)
    check_layer(everyone, conv_size=1, packed=False)
    check_layer(everyone, conv_size=0, packed=True, fox=True)
    check_layer(ContextParallel(mesh["context"], "contiguous"), conv_size=3, packed=True)
    check_loss(everyone)
    check_refusals(everyone)


@pytest.mark.slow  # four processes each import transformers
@with_processes
def test_split_model_equals_whole(tmp_path: Path) -> None:
    in_processes(work, tmp_path)
