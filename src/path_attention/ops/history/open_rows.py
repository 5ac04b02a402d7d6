"""The open tokens in torch: their rows in the order of time, how tokens are put behind them, how queries pass them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from path_attention.ops.arguments import LOWEST_GATE
from path_attention.ops.history.state import Rows, State, places, step_places


@dataclass(frozen=True)
class Open:
    """n open tokens of b sequences that agree in length and fold, oldest first, in the dtype of the computation."""

    k: Tensor  # (b, H, n, D)
    v: Tensor  # (b, H, n, DV)
    w: Tensor  # (b, H, n * R, D)
    beta: Tensor  # (b, H, n * R)
    g: Tensor | None  # (b, HQ, n)

    @classmethod
    def read(cls, state: State, rows: Rows, folded: int, count: int) -> "Open":
        token = places(state, folded, count)
        step, wide = step_places(state, token), state.w.dtype
        return cls(
            k=state.k[rows][:, :, token].to(wide),
            v=state.v[rows][:, :, token].to(wide),
            w=state.w[rows][:, :, step],
            beta=state.beta[rows][:, :, step],
            g=state.g[rows][:, :, token] if state.gated else None,
        )

    def pass_all(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (b, H, rows, n), without gates, of queries (b, H, rows, D) behind the newest token; and these queries
        moved to the left edge of the oldest:

            T = I + strictLower(D W W^T)      A = T^{-1} D      x = q W^T
            logits = q K^T - x A strictTril(W K^T)              q_left = q - x A W

        In float64: near-parallel reflections with beta near 2 make T's condition number some 1e4 (ops/leaf.py).
        """
        wide = q.dtype if q.device.type == "mps" else torch.float64
        w, k, beta, x = self.w.to(wide), self.k.to(wide), self.beta.to(wide), q.to(wide)
        n = k.shape[2]
        token = torch.arange(n, device=w.device)
        after = token.repeat_interleave(w.shape[2] // n)[:, None] > token
        # (x A)^T = D T^{-T} x^T; solve_triangular reads the strict upper triangle only: the unit diagonal is implied.
        t = (w @ w.mT) * beta[..., None]
        xa = (torch.linalg.solve_triangular(t.mT, (x @ w.mT).mT, upper=True, unitriangular=True) * beta[..., None]).mT
        logits = x @ k.mT - xa @ ((w @ k.mT) * after)
        return logits.to(q.dtype), (x - xa @ w).to(q.dtype)


def put_open(
    state: State, rows: Rows, folded: int, first: int, k: Tensor, v: Tensor, w: Tensor, beta: Tensor, g: Tensor | None
) -> None:
    """Put tokens behind the ``first`` open ones: k, v (b, H, n, ...), w, beta (b, H, n * R, ...), g (b, HQ, n)."""
    token = places(state, folded, k.shape[2], first)
    step = step_places(state, token)
    for x, where, value in ((state.k, token, k), (state.v, token, v), (state.w, step, w), (state.beta, step, beta)):
        _put(x, rows, where, value)
    if g is not None:
        _put(state.g, rows, token, g)


def _put(x: Tensor, rows: Rows, where: Tensor, value: Tensor) -> None:
    """x[rows, :, where] = value for x (B, heads, O, ...) and value (b, heads, n, ...), rounded to the dtype of x."""
    value = value.to(x.dtype)
    if isinstance(rows, slice):
        x[:, :, where] = value
    else:
        x[rows[:, None], :, where] = value.transpose(1, 2)


def clamp_gates(g: Tensor, dtype: torch.dtype) -> Tensor:
    """Gates in this dtype, none so low that a sum of them is -inf."""
    return g.to(dtype).clamp_min(LOWEST_GATE)


def gates_after(g: Tensor) -> Tensor:
    """(..., n) -> the sum over the tokens after each one.

    Not a running sum less the token's own gate: small gates would be lost beside a large one.
    """
    return torch.nn.functional.pad(g[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1)
