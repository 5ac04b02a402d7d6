"""A causal depthwise convolution over a few tokens, that stops at the boundaries of packed sequences."""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from path_attention.checks import check_integer
from path_attention.ops.backends import has_triton

# Devices that the kernels run on. Triton's interpreter would be another: it is for tests to say so.
KERNEL_DEVICES = frozenset({"cuda"})


def has_kernels(x: Tensor) -> bool:
    """Whether kernels take inputs of a convolution like x."""
    return x.device.type in KERNEL_DEVICES and x.dtype != torch.float64 and has_triton()


class ShortConvolution(nn.Module):
    """y_t = SiLU(sum_{j < width} weight[:, width - 1 - j] * x_{t - j}), where x before its sequence's first token is 0.

    The paper gives w such a convolution of width 3 (arXiv 2505.16381, section 2.2), so that the transition of a token
    can depend on the tokens just before it. Weights are laid out as those of torch's depthwise Conv1d, without the
    middle dimension.
    """

    def __init__(self, channels: int, width: int = 3) -> None:
        super().__init__()
        check_integer("channels", channels, 1)
        check_integer("width", width, 1)
        self.width = width
        # Whether the weight is a DTensor. Under torch.compile it does not show: hasattr is False there (torch 2.13).
        self.is_shared = False
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.reset_parameters()

    @property
    def bound(self) -> float:
        """Initial weights are uniform in plus or minus this, as torch initialises a depthwise Conv1d."""
        return 1 / math.sqrt(self.width)

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.weight, -self.bound, self.bound)

    @property
    def local_weight(self) -> Tensor:
        """Of a DTensor, under tensor parallelism, the channels of this process."""
        if not self.is_shared and not hasattr(self.weight, "to_local"):
            return self.weight
        weight: Any = self.weight
        return cast(Tensor, weight.to_local())

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x (B, L, channels) and positions (L,), each token's index in its own sequence -> (B, L, channels)."""
        weight = self.local_weight
        y = x * weight[:, -1]
        for back in range(1, min(self.width, x.shape[1])):
            earlier = nn.functional.pad(x[:, :-back], (0, 0, back, 0))
            y = y + torch.where((positions >= back)[:, None], earlier, 0) * weight[:, -1 - back]
        return nn.functional.silu(y)

    def continue_from(self, state: "ConvolutionState", x: Tensor, lengths: list[int] | None = None) -> Tensor:
        """As forward, of tokens that come after those that ``state`` holds; it takes these in when told to.

        x (B, T, channels); or with ``lengths``, the new tokens of each of the B sequences packed into one row
        (1, sum of lengths, channels).
        """
        back = self.width - 1
        before = state.last(back).to(x.dtype)
        parts = [x] if lengths is None else list(x.split(lengths, 1))
        state.offered = parts
        out = []
        for row, part in enumerate(parts):
            own = before if lengths is None else before[row : row + 1]
            seen = torch.full((part.shape[1] + back,), back, device=x.device)
            out.append(self(torch.cat([own, part], 1), seen)[:, back:])
        return torch.cat(out, 1)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, width={self.width}"


class ConvolutionState:
    """The last inputs of a short convolution: what it needs to go on, and what it may be taken back by.

    Rows stand in a ring: that of token t of a sequence at place t mod window.

    Args:
        batch: sequences, B.
        channels: of the convolution.
        window: rows kept, at least those the convolution looks back to.
        like: a tensor of the dtype and device of its inputs.
    """

    def __init__(self, batch: int, channels: int, window: int, like: Tensor) -> None:
        self.rows = like.new_zeros(batch, window, channels)  # zeros are what comes before the first token
        self.length = torch.zeros(
            batch, dtype=torch.int32, device=like.device
        )  # tokens of each; whoever counts sets it
        self.offered: list[Tensor] = []  # one tensor of all sequences, or one for each

    @property
    def window(self) -> int:
        return self.rows.shape[1]

    def last(self, count: int) -> Tensor:
        """(B, count, channels): of the last tokens of each sequence."""
        token = self.length[:, None] - count + torch.arange(count, device=self.rows.device)
        return self.rows[torch.arange(len(self.rows), device=self.rows.device)[:, None], token % self.window]

    def step(
        self, convolution: ShortConvolution, x: Tensor, beta: Tensor, gate: Tensor | None, head_dim: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """w (B, 1, channels), each head_dim of them a unit vector, beta and gates of one more token a sequence from
        their projections, by one kernel. x is held at once: should the cache refuse the token, its place is free still.
        """
        from path_attention.ops.kernels import transition

        self.offered = []
        return transition.step(x, beta, gate, convolution.local_weight, self.rows, self.length, head_dim, eps)

    def take_in(self) -> None:
        """Hold the rows that were offered last; ``length`` counts them already."""
        for row, x in enumerate(self.offered):
            part = slice(row, row + 1) if len(self.offered) > 1 else slice(None)  # one of all sequences is the batch
            kept = x.detach()[:, max(0, x.shape[1] - self.window) :]
            token = self.length[part, None] - kept.shape[1] + torch.arange(kept.shape[1], device=x.device)
            sequence = torch.arange(len(self.rows), device=x.device)[part, None]
            self.rows[sequence, token % self.window] = kept.to(self.rows.dtype)
        self.offered = []

    def forget(self, sequence: int) -> None:
        """All rows of one sequence."""
        self.rows[sequence] = 0

    def widen(self, window: int) -> None:
        """Keep more rows from now on. ``length`` must be that of the rows."""
        if window <= self.window:
            return
        rows = self.rows.new_zeros(len(self.rows), window, self.rows.shape[2])
        token = self.length[:, None] - self.window + torch.arange(self.window, device=self.rows.device)
        rows[torch.arange(len(rows), device=rows.device)[:, None], token % window] = self.last(self.window)
        self.rows = rows
