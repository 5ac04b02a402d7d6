"""Inside a leaf: partial attention, rows moved to the leaf's edges, and the leaf's transition matrix.

Stack the vectors w of the leaf's B * R reflections into W and put D = diag(beta). With token(s) the token of step s,

    T = I + strictLower(D W W^T)                                               (unit lower triangular)
    X = Q W^T where token(s) <= i         Z = W K^T where token(s) > j         (0 elsewhere)
    U = T^{-1} D W                        Y = T^{-1} D Z

    logits = tril(Q K^T) - X Y            the products H_i ... H_{j+1} inside the leaf
    q_left  = Q - X U                     each query moved to the leaf's left edge
    k_right = K - Y^T W                   each key moved to the leaf's right edge
    P = I - W^T U                         the whole leaf: a row x at its right edge is x P at its left edge

(arXiv 2505.16381, section 3, there for one reflection a token and in other letters; docs/math.md has the derivation.)
Everything is float32 (float64 for float64 inputs), but T^{-1}, U and Y are made in float64 and then rounded: the leaf's
share of the arithmetic is linear in the length.

Shapes here: leaves of all heads in one batch dimension M = H * N; q rows of the G query heads of a group one after
another.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from path_attention.ops.sums import running_sum


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
    g: Tensor | None  # (M, G, B)


class LeafEdges(NamedTuple):
    q_left: Tensor  # (M, G*B, D)
    k_right: Tensor  # (M, B, D)
    product: Tensor  # P, (M, D, D)


class Factors(NamedTuple):
    """What takes a triangular inverse to make; the backward pass makes it once for its two visits to the leaves."""

    t_inverse: Tensor  # T^{-1}, (M, B*R, B*R)
    u: Tensor  # U, (M, B*R, D)
    y: Tensor  # Y, (M, B*R, B)


def _x_and_z(inputs: LeafInputs, masks: LeafMasks) -> tuple[Tensor, Tensor]:
    q, k, _, w, _, _ = inputs
    return (q @ w.mT).mul_(masks.x), (w @ k.mT).mul_(masks.z)


def _wide(x: Tensor) -> torch.dtype:
    """What T is made and inverted in. Near-parallel reflections with beta near 2 make its condition number some 1e4,
    and P, of norm 1 whatever it is, is what is left when large terms cancel: in float32 it was off by 4e-4, and the
    error of many leaves adds up. In float64, and rounded after, it costs a hundredth of the operator's time on a CPU.
    """
    return x.dtype if x.device.type == "mps" else torch.float64  # which Apple's GPUs do not have


def _factors(inputs: LeafInputs, z: Tensor) -> Factors:
    dtype, wide = inputs.w.dtype, _wide(inputs.w)
    w, beta = inputs.w.to(wide), inputs.beta.to(wide)
    # solve_triangular reads the strict lower triangle only: the unit diagonal of T is implied.
    identity = torch.eye(w.shape[1], dtype=wide, device=w.device)
    t_inverse = torch.linalg.solve_triangular(
        (w @ w.mT).mul_(beta[..., None]), identity.expand(w.shape[0], -1, -1), upper=False, unitriangular=True
    )
    a = t_inverse * beta[:, None, :]
    return Factors(t_inverse.to(dtype), (a @ w).to(dtype), (a @ z.to(wide)).to(dtype))


def _gates_between(g: Tensor) -> Tensor:
    """(M, G, B) -> (M, G, B, B): the sum of g over the tokens after the key, the column, up to the query, the row.

    Each is summed by itself: the difference of two running sums that share a large gate would have lost the small ones.
    """
    return running_sum(g[..., None].expand(*g.shape, g.shape[-1]).tril(-1), -2)


def sum_from_here(x: Tensor) -> Tensor:
    """Sums of the rows (dimension -2) from each to the last."""
    return running_sum(x.flip(-2), -2).flip(-2)


def _weights(
    inputs: LeafInputs, masks: LeafMasks, x: Tensor, y: Tensor, log_sum_exp: Tensor | None
) -> tuple[Tensor, Tensor]:
    """exp(logits - log_sum_exp), 0 above the diagonal, and the log_sum_exp: the leaf's own where None is given."""
    q, k, _, _, _, g = inputs
    logits = torch.baddbmm(q @ k.mT, x, y, alpha=-1)
    if g is not None:
        logits += _gates_between(g).flatten(1, 2)
    logits.masked_fill_(masks.outside, float("-inf"))
    if log_sum_exp is None:
        log_sum_exp = logits.logsumexp(-1, keepdim=True)
    return logits.sub_(log_sum_exp).exp_(), log_sum_exp


def leaf_edges(inputs: LeafInputs, masks: LeafMasks) -> tuple[Tensor, ...]:
    """The fields of LeafEdges, rows moved to the leaf's edges and its product, and then those of Factors."""
    x, z = _x_and_z(inputs, masks)
    factors = _factors(inputs, z)
    return *_edges(inputs, x, factors), *factors


def _edges(inputs: LeafInputs, x: Tensor, f: Factors) -> LeafEdges:
    q, k, _, w, _, _ = inputs
    product = (w.mT @ f.u).neg_()
    product.diagonal(dim1=1, dim2=2).add_(1)
    return LeafEdges(
        q_left=torch.baddbmm(q, x, f.u, alpha=-1),
        k_right=torch.baddbmm(k, f.y.mT, w, alpha=-1),
        product=product,
    )


class LeafOutputs(NamedTuple):
    out: Tensor  # (M, G*B, DV): attention within the leaf
    log_sum_exp: Tensor  # (M, G*B, 1)
    q_left: Tensor
    k_right: Tensor
    product: Tensor


def leaf_forward(inputs: LeafInputs, masks: LeafMasks) -> LeafOutputs:
    """Attention within each leaf, and the edges."""
    x, z = _x_and_z(inputs, masks)
    factors = _factors(inputs, z)
    weights, log_sum_exp = _weights(inputs, masks, x, factors.y, None)
    return LeafOutputs(weights @ inputs.v, log_sum_exp, *_edges(inputs, x, factors))


class LeafGradients(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    w: Tensor
    beta: Tensor
    g: Tensor | None  # (M, G, B)


def leaf_backward(
    inputs: LeafInputs,
    masks: LeafMasks,
    out: Tensor,  # (M, G*B, DV) and log_sum_exp (M, G*B, 1): of the whole attention, not the leaf's alone
    log_sum_exp: Tensor,
    d_out: Tensor,  # (M, G*B, DV)
    d_q_left: Tensor,
    d_k_right: Tensor,
    d_product: Tensor,
    t_inverse: Tensor,  # the factors, as leaf_edges gives them
    u: Tensor,
    y: Tensor,
) -> LeafGradients:
    """Gradients of :func:`leaf_forward`.

    U and Y solve T U = D W and T Y = D Z. With G = T^{-T} dU and likewise F for Y, the gradients of D W and D Z are G
    and F, and that of T is -(G U^T + F Y^T) below the diagonal.
    """
    q, k, v, w, beta, g = inputs
    d_out = d_out.to(q.dtype)
    delta = (d_out * out).sum(-1, keepdim=True)
    x, z = _x_and_z(inputs, masks)
    weights, _ = _weights(inputs, masks, x, y, log_sum_exp)
    d_v = weights.mT @ d_out
    d_logits = (d_out @ v.mT).sub_(delta).mul_(weights)  # 0 above the diagonal, as weights are

    # logits = tril(Q K^T) - X Y,  q_left = Q - X U,  k_right = K - Y^T W,  P = I - W^T U. Every term has a minus sign:
    # d_x, d_u, d_y and what follows from them hold the negated gradients, d_w and the results the true ones.
    d_x = (d_logits @ y.mT).baddbmm_(d_q_left, u.mT).mul_(masks.x)
    d_u = (x.mT @ d_q_left).baddbmm_(w, d_product)
    d_y = (x.mT @ d_logits).baddbmm_(w, d_k_right.mT)
    d_w = (u @ d_product.mT).baddbmm_(y, d_k_right).neg_()

    # U = T^{-1} D W,  Y = T^{-1} D Z
    d_u, d_y = t_inverse.mT @ d_u, t_inverse.mT @ d_y
    d_t = (d_u @ u.mT).baddbmm_(d_y, y.mT).tril_(-1)
    gram = w @ w.mT
    d_beta = (d_t * gram).sum(-1) - (d_u * w).sum(-1) - (d_y * z).sum(-1)
    d_gram = d_t.mul_(beta[..., None])
    d_w.baddbmm_(d_gram, w).baddbmm_(d_gram.mT, w).addcmul_(d_u, beta[..., None], value=-1)
    d_z = d_y.mul_(beta[..., None]).mul_(masks.z)

    # X = Q W^T,  Z = W K^T
    d_w.baddbmm_(d_x.mT, q, alpha=-1).baddbmm_(d_z, k, alpha=-1)
    d_q = torch.baddbmm(d_q_left, d_logits, k).baddbmm_(d_x, w, alpha=-1)
    d_k = torch.baddbmm(d_k_right, d_logits.mT, q).baddbmm_(d_z.mT, w, alpha=-1)
    d_g = None
    if g is not None:
        from_here = sum_from_here(d_logits.unflatten(1, g.shape[1:]))
        d_g = from_here.tril_(-1).sum(-1)  # g_s is in the logits of queries from s on and keys before s
    return LeafGradients(d_q, d_k, d_v, d_w, d_beta, d_g)
