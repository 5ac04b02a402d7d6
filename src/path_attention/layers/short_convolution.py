"""A causal depthwise convolution over a few tokens, that stops at the boundaries of packed sequences."""

import math

import torch
from torch import Tensor, nn

from path_attention.checks import check_integer


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
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.reset_parameters()

    @property
    def bound(self) -> float:
        """Initial weights are uniform in plus or minus this, as torch initialises a depthwise Conv1d."""
        return 1 / math.sqrt(self.width)

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.weight, -self.bound, self.bound)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x (B, L, channels) and positions (L,), each token's index in its own sequence -> (B, L, channels)."""
        weight = self.weight
        if hasattr(weight, "to_local"):  # a DTensor, under tensor parallelism: the channels of this process
            weight = weight.to_local()
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
        parts = [x] if lengths is None else list(x.split(lengths, 1))
        state.offered = parts
        out = []
        for row, part in enumerate(parts):
            before = state.rows if lengths is None else state.rows[row : row + 1]
            seen = torch.full((part.shape[1] + back,), back, device=x.device)
            out.append(self(torch.cat([before[:, before.shape[1] - back :], part], 1), seen)[:, back:])
        return torch.cat(out, 1)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, width={self.width}"


class ConvolutionState:
    """The last inputs of a short convolution: what it needs to go on, and what it may be taken back by.

    Args:
        batch: sequences, B.
        channels: of the convolution.
        window: rows kept, at least those the convolution looks back to.
        like: a tensor of the dtype and device of its inputs.
    """

    def __init__(self, batch: int, channels: int, window: int, like: Tensor) -> None:
        self.rows = like.new_zeros(batch, window, channels)  # zeros are what comes before the first token
        self.offered: list[Tensor] = []  # one tensor of all sequences, or one for each

    def take_in(self) -> None:
        """Hold the rows that were offered last."""
        for row, x in enumerate(self.offered):
            part = slice(row, row + 1) if len(self.offered) > 1 else slice(None)  # one of all sequences is the batch
            if x.shape[1]:
                self.rows[part] = torch.cat([self.rows[part], x.detach()], 1)[:, x.shape[1] :]
        self.offered = []

    def crop(self, counts: list[int]) -> None:
        """Forget the last so many rows of each sequence; rows that are gone from the window come back as zeros."""
        for row, count in enumerate(counts):
            if count:
                rows = self.rows[row]
                self.rows[row] = torch.cat([torch.zeros_like(rows[:count]), rows[: len(rows) - count]])

    def widen(self, window: int) -> None:
        """Keep more rows from now on."""
        more = window - self.rows.shape[1]
        if more > 0:
            self.rows = nn.functional.pad(self.rows, (0, 0, more, 0))
