"""The PaTH paper's constructions as weights of our layer: networks that solve a task exactly, by design, at any length.

Theorem 2.1 of arXiv 2505.16381: one layer of two heads decides for every prefix of a word of swaps of five elements
whether it is the identity, a problem complete for NC1 (which is beyond softmax attention with a fixed position
encoding, unless TC0 = NC1). Theorem A.1: two layers solve flip-flop language modelling. docs/state_tracking.md tells
why they work.

The weights are those of :class:`path_attention.PaTHAttention` as it is: beta = 2 is 2 sigmoid(large), beta = 1 is
2 sigmoid(0), q carries the factor that the scale D^-0.5 takes away. Tokens come in as one-hot vectors.
"""

from itertools import permutations

import torch
from torch import Tensor, nn

from path_attention.layers.path import PaTHAttention

# Where a sigmoid has saturated: sigmoid(-SATURATED) = 7e-18, which leaves 2 and 0 as they are beside 1 in float64.
SATURATED = 40.0

ELEMENTS = 5
START = 0  # the token "#", first in every word
SWAPS = tuple(permutations(range(ELEMENTS), 2))  # token n + 1 swaps the elements SWAPS[n]


class SwapNetwork(nn.Module):
    """Theorem 2.1. Which prefixes of a word of swaps are the identity?

    The reflection along (e_x - e_y) / sqrt(2) with beta = 2 swaps the coordinates x and y. The key of "#" is (1, ...,
    5), and between it and a query stand the swaps of the prefix: they permute it to pi, and the query (1, ..., 5) meets
    it in sum_i i pi(i), which is 55 if pi is the identity and at most 54 otherwise. A sixth coordinate, which nothing
    moves, takes 54.5 off. All other keys are 0, so that the first head's attention to "#" exceeds 1 / (t + 1) exactly
    for the identity; the second head, with queries and keys of 0, attends 1 / (t + 1) to everything. The output is
    their difference.

    Args:
        sharpness: factor of the logits. Any positive number is right in exact arithmetic; a larger one leaves more room
            to rounding: the two cases are sharpness apart in the logit.
    """

    def __init__(self, sharpness: float = 8.0) -> None:
        super().__init__()
        dim, vocabulary = ELEMENTS + 1, 1 + len(SWAPS)
        self.attention = PaTHAttention(vocabulary, 2, head_dim=dim, w_rank=None, conv_size=0)
        ranks = torch.arange(1.0, dim)
        weights = {name: torch.zeros_like(p) for name, p in self.attention.named_parameters()}
        # Rows of a projection are output coordinates, head 1 before head 2; columns are tokens.
        weights["q_proj.weight"][:dim] = sharpness * dim**0.5 * torch.cat([ranks, torch.ones(1)])[:, None]
        weights["k_proj.weight"][:dim, START] = torch.cat([ranks, torch.tensor([-54.5])])
        weights["v_proj.weight"][0, START] = weights["v_proj.weight"][dim, START] = 1
        for token, (x, y) in enumerate(SWAPS, start=1):
            weights["w_proj.weight"][[x, y], token] = torch.tensor([1.0, -1.0])
        weights["beta_proj.bias"][:] = SATURATED
        weights["o_proj.weight"][0, [0, dim]] = torch.tensor([1.0, -1.0])
        self.attention.load_state_dict(weights)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, L) tokens, the first "#" -> (B, L), positive where the word up to there is the identity."""
        return self.attention(_one_hot(input_ids, self.attention))[..., 0]


class FlipFlopNetwork(nn.Module):
    """Theorem A.1. Which bit was written last?

    Layer 1: every instruction has the key e_1 and projects e_1 away (beta = 1) from the keys before it; bits look for
    e_1, and find only their own instruction. They learn a, how far it is a "w".

    Layer 2: bits with a = 1, those that were written, have the key e_1 and project e_1 away from the keys before them;
    everybody looks for e_1, and finds only the bit written last. It says +1 or -1.

    The tokens are those of :class:`path_attention.tasks.FlipFlop`: w, r, i, 0, 1.

    Args:
        sharpness: the logit of what is looked for; all others are 0 or less. Attention to them altogether is at most
            L exp(-sharpness).
    """

    WRITE, READ, IGNORE, ZERO, ONE, SEEN = range(6)  # tokens, and the coordinate that layer 1 writes a to

    def __init__(self, sharpness: float = 30.0) -> None:
        super().__init__()
        self.first = PaTHAttention(6, 1, head_dim=2, w_rank=None, conv_size=0)
        self.second = PaTHAttention(6, 1, head_dim=2, w_rank=None, conv_size=0)
        self.first.load_state_dict(self._first(sharpness))
        self.second.load_state_dict(self._second(sharpness))

    def _first(self, sharpness: float) -> dict[str, Tensor]:
        weights = {name: torch.zeros_like(p) for name, p in self.first.named_parameters()}
        instructions, bits = [self.WRITE, self.READ, self.IGNORE], [self.ZERO, self.ONE]
        weights["q_proj.weight"][0, bits] = sharpness * 2**0.5
        weights["k_proj.weight"][0, instructions] = 1
        weights["w_proj.weight"][0, instructions] = 1
        weights["w_proj.weight"][1, bits] = 1  # beside e_1: what bits project away matters to nobody
        weights["v_proj.weight"][0, self.WRITE] = 1
        weights["o_proj.weight"][self.SEEN, 0] = 1
        return weights  # beta_proj is 0: beta = 1

    def _second(self, sharpness: float) -> dict[str, Tensor]:
        weights = {name: torch.zeros_like(p) for name, p in self.second.named_parameters()}
        tokens, bits = list(range(self.SEEN)), [self.ZERO, self.ONE]
        # a + (1 for bits) - 1: 1 for written bits, 0 for other bits, at most 0 for instructions.
        written = torch.tensor([-1.0, -1.0, -1.0, 0.0, 0.0, 1.0])
        weights["q_proj.weight"][0, tokens] = sharpness * 2**0.5
        weights["k_proj.weight"][0] = written
        weights["w_proj.weight"][0] = written  # made a unit vector by the layer
        weights["beta_proj.weight"][0] = SATURATED * written  # less SATURATED: beta = 1 if written, 0 otherwise
        weights["beta_proj.bias"][:] = -SATURATED
        weights["v_proj.weight"][0, bits] = torch.tensor([-1.0, 1.0])
        weights["o_proj.weight"][0, 0] = 1
        return weights

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, L) tokens -> (B, L), near +1 where the bit written last is 1, near -1 where it is 0.

        At an "r" that is the bit to predict. At a "w", whose bit is yet to come, it is the bit written before.
        """
        x = _one_hot(input_ids, self.first)
        return self.second(x + self.first(x))[..., 0]


def _one_hot(input_ids: Tensor, layer: PaTHAttention) -> Tensor:
    weight = layer.q_proj.weight
    return nn.functional.one_hot(input_ids, layer.hidden_size).to(weight.dtype)
