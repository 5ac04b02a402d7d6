"""Launcher of the kernel that makes one token's transitions and gates."""

import torch
from torch import Tensor

from path_attention.ops.kernels.launch import launch_kernel, next_power_of_2
from path_attention.ops.kernels.transition_kernels import transition_kernel


def step(
    x: Tensor,
    beta: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    ring: Tensor,
    length: Tensor,
    head_dim: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """w (B, 1, heads * D), beta (B, 1, heads) and g (B, 1, HQ) or None, float32; the ring takes x in.

    Args:
        x: (B, 1, heads * D), the token's input of the convolution.
        beta: (B, 1, heads), before its sigmoid.
        gate: (B, 1, HQ), before its log sigmoid, or None.
        weight: (heads * D, width) of the convolution.
        ring: (B, window, heads * D), earlier inputs, token t at place t mod window.
        length: (B,) tokens before this one.
        head_dim: D.
        eps: the least that w is divided by.
    """
    batch, _, channels = x.shape
    heads = channels // head_dim

    def like(y: Tensor) -> Tensor:
        return torch.empty(y.shape, dtype=torch.float32, device=y.device)

    w, new_beta, g = like(x), like(beta), None if gate is None else like(gate)
    query_heads = 1 if gate is None else gate.shape[2]
    launch_kernel(
        transition_kernel,
        (batch * heads,),
        p_x=x.contiguous(),
        p_beta=beta.contiguous(),
        p_gate=None if gate is None else gate.contiguous(),
        p_weight=weight,
        p_ring=ring,
        p_length=length,
        p_w=w,
        p_new_beta=new_beta,
        p_g=g,
        heads=heads,
        query_heads=query_heads,
        window=ring.shape[1],
        eps=eps,
        D=head_dim,
        BLOCK_D=next_power_of_2(head_dim),
        WIDTH=weight.shape[1],
        BLOCK_GATES=next_power_of_2(query_heads),
        num_warps=2,
    )
    return w, new_beta, g
