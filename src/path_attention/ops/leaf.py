"""Inside a leaf: partial attention, rows moved to the leaf's edges, and the leaf's transition matrix.

Stack the vectors w of the leaf's B * R reflections into W and put D = diag(beta). With token(s) the token of step s,

    T = I + strictLower(D W W^T)          A = T^{-1} D                         (lower triangular)
    X = Q W^T where token(s) <= i         Z = W K^T where token(s) > j         (0 elsewhere)

    logits = tril(Q K^T) - X A Z          the products H_i ... H_{j+1} inside the leaf
    q_left  = Q - X A W                   each query moved to the leaf's left edge
    k_right = K - (A Z)^T W               each key moved to the leaf's right edge
    P = I - W^T A W                       the whole leaf: a row x at its right edge is x P at its left edge

(arXiv 2505.16381, section 3, there for one reflection a token and in other letters; docs/math.md has the derivation.)
Everything is float32 (float64 for float64 inputs): the leaf's share of the arithmetic is linear in the length.

Shapes here: leaves of all heads in one batch dimension M = H * N; q rows of the G query heads of a group one after
another.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class LeafMasks:
    """Which entries of a leaf's matrices exist: X (G*B, B*R) and Z (B*R, B), multiplied in and so floating; and which
    logits (G*B, B) lie above the diagonal, boolean."""

    x: Tensor
    z: Tensor
    outside: Tensor

    @classmethod
    def build(cls, leaf: int, group: int, reflections: int, like: Tensor) -> "LeafMasks":
        token = torch.arange(leaf, device=like.device)
        query, step = token.repeat(group), token.repeat_interleave(reflections)
        return cls(
            x=(step[None, :] <= query[:, None]).to(like.dtype),
            z=(step[:, None] > token[None, :]).to(like.dtype),
            outside=token[None, :] > query[:, None],
        )


class LeafInputs(NamedTuple):
    q: Tensor  # (M, G*B, D), already times scale
    k: Tensor  # (M, B, D)
    v: Tensor  # (M, B, DV)
    w: Tensor  # (M, B*R, D)
    beta: Tensor  # (M, B*R)
    gate: Tensor | None  # (M, G, B): sum of g from the leaf's first token to this one


class LeafEdges(NamedTuple):
    q_left: Tensor  # (M, G*B, D)
    k_right: Tensor  # (M, B, D)
    product: Tensor  # P, (M, D, D)


class _Factors(NamedTuple):
    gram: Tensor  # W W^T
    t_inverse: Tensor  # T^{-1}
    a: Tensor  # A
    x: Tensor  # X
    z: Tensor  # Z
    xa: Tensor  # X A
    az: Tensor  # A Z


def _factors(inputs: LeafInputs, masks: LeafMasks) -> _Factors:
    q, k, _, w, beta, _ = inputs
    gram = w @ w.mT
    # solve_triangular reads the strict lower triangle only: the unit diagonal of T is implied.
    identity = torch.eye(w.shape[1], dtype=w.dtype, device=w.device)
    t_inverse = torch.linalg.solve_triangular(
        beta[..., None] * gram, identity.expand_as(gram), upper=False, unitriangular=True
    )
    a = t_inverse * beta[:, None, :]
    x = (q @ w.mT).mul_(masks.x)
    z = (w @ k.mT).mul_(masks.z)
    return _Factors(gram, t_inverse, a, x, z, x @ a, a @ z)


def _weights(inputs: LeafInputs, masks: LeafMasks, f: _Factors, log_sum_exp: Tensor | None) -> tuple[Tensor, Tensor]:
    """exp(logits - log_sum_exp), 0 above the diagonal, and the log_sum_exp: the leaf's own where None is given."""
    q, k, _, _, _, gate = inputs
    logits = torch.baddbmm(q @ k.mT, f.xa, f.z, alpha=-1)
    if gate is not None:
        logits += (gate[..., :, None] - gate[..., None, :]).flatten(1, 2)
    logits.masked_fill_(masks.outside, float("-inf"))
    if log_sum_exp is None:
        log_sum_exp = logits.logsumexp(-1, keepdim=True)
    return logits.sub_(log_sum_exp).exp_(), log_sum_exp


def leaf_edges(inputs: LeafInputs, masks: LeafMasks) -> LeafEdges:
    """Rows moved to the leaf's edges, and its product."""
    return _edges(inputs, _factors(inputs, masks))


def _edges(inputs: LeafInputs, f: _Factors) -> LeafEdges:
    q, k, _, w, _, _ = inputs
    identity = torch.eye(w.shape[2], dtype=w.dtype, device=w.device)
    return LeafEdges(
        q_left=torch.baddbmm(q, f.xa, w, alpha=-1),
        k_right=torch.baddbmm(k, f.az.mT, w, alpha=-1),
        product=identity - w.mT @ (f.a @ w),
    )


class LeafOutputs(NamedTuple):
    out: Tensor  # (M, G*B, DV): attention within the leaf
    log_sum_exp: Tensor  # (M, G*B, 1)
    q_left: Tensor
    k_right: Tensor
    product: Tensor


def leaf_forward(inputs: LeafInputs, masks: LeafMasks) -> LeafOutputs:
    """Attention within each leaf, and the edges."""
    f = _factors(inputs, masks)
    weights, log_sum_exp = _weights(inputs, masks, f, None)
    return LeafOutputs(weights @ inputs.v, log_sum_exp, *_edges(inputs, f))


class LeafGradients(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    w: Tensor
    beta: Tensor
    gate: Tensor | None  # (M, G, B): row sums less column sums of dS, the gradient of the summed gate


def leaf_backward(
    inputs: LeafInputs,
    masks: LeafMasks,
    out: Tensor,  # (M, G*B, DV) and log_sum_exp (M, G*B, 1): of the whole attention, not the leaf's alone
    log_sum_exp: Tensor,
    d_out: Tensor,  # (M, G*B, DV)
    d_q_left: Tensor,
    d_k_right: Tensor,
    d_product: Tensor,
) -> LeafGradients:
    """Gradients of :func:`leaf_forward`, its matrices computed again from the inputs.

    From d(T^{-1}) = -T^{-1} dT T^{-1}: with Y = T^{-T} dA the gradient of T is -Y A^T, and that of beta, through
    A = T^{-1} D alone, is the diagonal of Y.
    """
    q, k, v, w, beta, gate = inputs
    d_out = d_out.to(q.dtype)
    delta = (d_out * out).sum(-1, keepdim=True)
    f = _factors(inputs, masks)
    weights, _ = _weights(inputs, masks, f, log_sum_exp)
    d_v = weights.mT @ d_out
    d_logits = (d_out @ v.mT).sub_(delta).mul_(weights)  # 0 above the diagonal, as weights are

    # logits = Q K^T - (X A) Z,  q_left = Q - (X A) W
    d_xa = -torch.baddbmm(d_q_left @ w.mT, d_logits, f.z.mT)
    d_z = -(f.xa.mT @ d_logits)
    d_w = -(f.xa.mT @ d_q_left)
    # k_right = K - (A Z)^T W
    d_az = -(w @ d_k_right.mT)
    d_w.baddbmm_(f.az, d_k_right, alpha=-1)
    d_x = (d_xa @ f.a.mT).mul_(masks.x)
    d_a = torch.baddbmm(d_az @ f.z.mT, f.x.mT, d_xa)
    d_z.baddbmm_(f.a.mT, d_az).mul_(masks.z)
    # P = I - W^T A W
    w_dp = w @ d_product
    d_a.baddbmm_(w_dp, w.mT, alpha=-1)
    d_w.baddbmm_(f.a.mT, w_dp, alpha=-1).baddbmm_(f.a, w @ d_product.mT, alpha=-1)

    y = f.t_inverse.mT @ d_a
    d_scaled_gram = (y @ f.a.mT).neg_().tril_(-1)  # gradient of D W W^T below the diagonal
    d_beta = y.diagonal(dim1=-2, dim2=-1) + (d_scaled_gram * f.gram).sum(-1)
    d_gram = d_scaled_gram.mul_(beta[..., None])
    d_w.baddbmm_(d_gram, w).baddbmm_(d_gram.mT, w)

    d_w.baddbmm_(d_x.mT, q).baddbmm_(d_z, k)
    d_q = torch.baddbmm(d_q_left, d_logits, k).baddbmm_(d_x, w)
    d_k = torch.baddbmm(d_k_right, d_logits.mT, q).baddbmm_(d_z.mT, w)
    d_gate = None
    if gate is not None:
        d_logits = d_logits.unflatten(1, gate.shape[1:])
        d_gate = d_logits.sum(-1) - d_logits.sum(2)
    return LeafGradients(d_q, d_k, d_v, d_w, d_beta, d_gate)
