"""The baseline: PaTH attention written down in the shortest way, all L x L matrices in memory.

One UT transform over the whole sequence (arXiv 2505.16381, section 3.1). With the vectors w stacked into W and
D = diag(beta),

    T = I + strictLower(D W W^T)
    logits = tril(Q K^T) - tril(Q W^T) T^{-1} D strictTril(W K^T) .

Memory is quadratic in the length, and the triangular solve makes the time cubic.
"""

import torch
from torch import Tensor


def full_matrix_path_attention(q: Tensor, k: Tensor, v: Tensor, w: Tensor, beta: Tensor) -> Tensor:
    """The operator for as many query as key heads and one reflection a token. (B, L, H, ...) as it has them."""
    q, k, v, w = (x.transpose(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v, w))
    strength = beta.transpose(1, 2)[..., None]
    # solve_triangular reads the strict lower triangle only: the unit diagonal of T is implied.
    solved = torch.linalg.solve_triangular(
        strength * (w @ w.mT), strength * (w @ k.mT).tril(-1), upper=False, unitriangular=True
    )
    logits = q @ k.mT - (q @ w.mT).tril() @ solved
    above = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return (logits.masked_fill(above, float("-inf")).softmax(-1) @ v).transpose(1, 2)
