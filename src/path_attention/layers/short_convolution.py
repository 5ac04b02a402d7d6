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
        y = x * self.weight[:, -1]
        for back in range(1, min(self.width, x.shape[1])):
            earlier = nn.functional.pad(x[:, :-back], (0, 0, back, 0))
            y = y + torch.where((positions >= back)[:, None], earlier, 0) * self.weight[:, -1 - back]
        return nn.functional.silu(y)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, width={self.width}"
