"""The open tokens in torch: their rows in the order of time, and how one is put behind them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from path_attention.ops.arguments import LOWEST_GATE
from path_attention.ops.history.state import Rows, State, Tokens, places, step_places


@dataclass(frozen=True)
class Open:
    """n open tokens of b sequences that agree in length and fold, oldest first, in the dtype of the computation."""

    k: Tensor  # (b, H, n, D)
    v: Tensor  # (b, H, n, DV)
    w: Tensor  # (b, H, n * R, D)
    a: Tensor  # (b, H, n * R, n * R)
    y: Tensor  # (b, H, n * R, n)
    g: Tensor | None  # (b, HQ, n)

    @classmethod
    def read(cls, state: State, rows: Rows, folded: int, count: int) -> "Open":
        token = places(state, folded, count)
        step = step_places(state, token)
        wide = state.w.dtype
        later = torch.arange(count, device=token.device).repeat_interleave(state.reflections)[:, None]
        y = state.y[rows][:, :, step][..., token]
        return cls(
            k=state.k[rows][:, :, token].to(wide),
            v=state.v[rows][:, :, token].to(wide),
            w=state.w[rows][:, :, step],
            a=state.a[rows][:, :, step][..., step].tril(),
            y=torch.where(later > later.new_tensor(range(count)), y, 0),
            g=state.g[rows][:, :, token] if state.gated else None,
        )

    @property
    def beta(self) -> Tensor:
        return self.a.diagonal(dim1=-2, dim2=-1)

    def pass_all(self, q: Tensor) -> Tensor:
        """Queries (b, H, rows, D) behind the newest token, moved to the left edge of the oldest."""
        return q - ((q @ self.w.mT) @ self.a) @ self.w

    def logits(self, q: Tensor) -> Tensor:
        """(b, H, rows, n) of such queries, without gates."""
        return q @ self.k.mT - (q @ self.w.mT) @ self.y


def append_token(state: State, rows: Rows, folded: int, length: int, tokens: Tokens) -> Open:
    """Put the token of ``tokens`` (T = 1) behind the open ones, and read them all.

    T A = D and T Y = D Z, row by row: a_s = beta_s (e_s - sum_{r<s} (w_s . w_r) a_r), and the same of Y.
    """
    n, wide, reflections = length - folded, state.w.dtype, state.reflections
    token = places(state, folded, n + 1)
    step = step_places(state, token)
    before = Open.read(state, rows, folded, n)
    k, v = tokens.k.transpose(1, 2), tokens.v.transpose(1, 2)
    g = None if tokens.g is None else clamp_gates(tokens.g.transpose(1, 2), wide)
    for x, new in ((state.k, k), (state.v, v), (state.g, g)):
        if new is not None:
            put(x, rows, token[n:], new)
    w, a, y = before.w, before.a, before.y
    for r in range(reflections):
        new = tokens.w[:, 0, r].to(wide)[:, :, None]  # (b, H, 1, D)
        beta = tokens.beta[:, 0, r].to(wide)[:, :, None, None]
        x = new @ w.mT
        a_row = torch.cat([-beta * (x @ a), beta], -1)
        y_row = beta * (new @ before.k.mT - x @ y)
        own = n * reflections + r
        put(state.w, rows, step[own : own + 1], new)
        put_row(state.a, rows, step[own], step[: own + 1], a_row.squeeze(2))
        put_row(state.y, rows, step[own], token[:n], y_row.squeeze(2))
        w = torch.cat([w, new], 2)
        a = torch.cat([torch.nn.functional.pad(a, (0, 1)), a_row], 2)
        y = torch.cat([y, y_row], 2)
    return Open(
        k=torch.cat([before.k, k.to(wide)], 2),
        v=torch.cat([before.v, v.to(wide)], 2),
        w=w,
        a=a,
        y=torch.nn.functional.pad(y, (0, 1)),  # a key comes after its own token's transition
        g=None if g is None or before.g is None else torch.cat([before.g, g], 2),
    )


def set_open(
    state: State, rows: Rows, folded: int, k: Tensor, v: Tensor, w: Tensor, beta: Tensor, g: Tensor | None
) -> None:
    """Make these the open tokens: k and v (b, H, n, ...), w and beta (b, H, n * R, ...), g (b, HQ, n)."""
    n = k.shape[2]
    if not n:
        return
    token = places(state, folded, n)
    step = step_places(state, token)
    put(state.k, rows, token, k)
    put(state.v, rows, token, v)
    put(state.w, rows, step, w)
    if g is not None:
        put(state.g, rows, token, g)
    a, y = factors(k, w, beta)
    for x, columns, value in ((state.a, step, a), (state.y, token, y)):
        if isinstance(rows, slice):
            x[:, :, step[:, None], columns] = value.to(x.dtype)
        else:
            x[rows[:, None, None], :, step[:, None], columns] = value.permute(0, 2, 3, 1).to(x.dtype)


def factors(k: Tensor, w: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """A (..., n * R, n * R) and Y (..., n * R, n) of tokens k (..., n, D), w (..., n * R, D), beta (..., n * R).

    In float64: near-parallel reflections with beta near 2 make T's condition number some 1e4 (ops/leaf.py).
    """
    wide = w.dtype if w.device.type == "mps" else torch.float64
    w, beta, k = w.to(wide), beta.to(wide), k.to(wide)
    n = k.shape[-2]
    token = torch.arange(n, device=w.device)
    after = token.repeat_interleave(w.shape[-2] // n)[:, None] > token
    # solve_triangular reads the strict lower triangle only: the unit diagonal of T is implied.
    t = (w @ w.mT) * beta[..., None]
    a = torch.linalg.solve_triangular(t, torch.diag_embed(beta), upper=False, unitriangular=True)
    return a, a @ ((w @ k.mT) * after)


def clamp_gates(g: Tensor, dtype: torch.dtype) -> Tensor:
    """Gates in this dtype, none so low that a sum of them is -inf."""
    return g.to(dtype).clamp_min(LOWEST_GATE)


def gates_after(g: Tensor) -> Tensor:
    """(..., n) -> the sum over the tokens after each one.

    Not a running sum less the token's own gate: small gates would be lost beside a large one.
    """
    return torch.nn.functional.pad(g[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1)


def put(x: Tensor, rows: Rows, where: Tensor, value: Tensor) -> None:
    """x[rows, :, where] = value for x (B, heads, O, ...) and value (b, heads, n, ...), rounded to the dtype of x."""
    value = value.to(x.dtype)
    if isinstance(rows, slice):
        x[:, :, where] = value
    else:
        x[rows[:, None], :, where] = value.transpose(1, 2)


def put_row(x: Tensor, rows: Rows, row: Tensor, columns: Tensor, value: Tensor) -> None:
    """x[rows, :, row, columns] = value for x (B, heads, O, O) and value (b, heads, n)."""
    if isinstance(rows, slice):
        x[:, :, row, columns] = value
    else:
        x[rows[:, None], :, row, columns] = value.transpose(1, 2)
