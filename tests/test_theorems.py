"""The networks of the theorems, on random and on adversarial inputs up to length 4096, against plain programs."""

from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor

from path_attention.tasks import FlipFlop
from path_attention.tasks.flip_flop import IGNORE, ONE, READ, WRITE, ZERO
from path_attention.theorems import ELEMENTS, START, SWAPS, FlipFlopNetwork, SwapNetwork

Word = list[tuple[int, int]]


def token(x: int, y: int) -> int:
    return SWAPS.index((x, y)) + 1


def identities(word: Word) -> list[bool]:
    """After "#" and after every swap: is everything where it was?"""
    state, found = list(range(ELEMENTS)), [True]
    for x, y in word:
        state[x], state[y] = state[y], state[x]
        found.append(state == list(range(ELEMENTS)))
    return found


def random_word(length: int, generator: torch.Generator) -> Word:
    return [SWAPS[n] for n in torch.randint(len(SWAPS), (length,), generator=generator).tolist()]


def check_words(network: SwapNetwork, words: list[Word]) -> Tensor:
    """Every prefix of every word; returns the smallest distance from the boundary, relative to 1 / (t + 1)."""
    ids = torch.tensor([[START, *(token(x, y) for x, y in word)] for word in words])
    with torch.no_grad():
        out = network(ids)
    wanted = torch.tensor([identities(word) for word in words])
    # The first token is all there is to attend to: both heads give it 1.
    assert torch.equal(out[:, 1:] > 0, wanted[:, 1:])
    return (out[:, 1:].abs() * torch.arange(2, ids.shape[1] + 1)).min()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
# Within a leaf of the operator, at its edges, several levels of leaves, and the longest.
@pytest.mark.parametrize("length", [1, 2, 9, 63, 64, 65, 300, 4096])
def test_swap_network_on_random_words(dtype: torch.dtype, length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    network = SwapNetwork().to(dtype)
    words = [random_word(length - 1 or 1, generator) for _ in range(4)]
    words += [(half := random_word(length // 2 + 1, generator)) + half[::-1] for _ in range(4)]  # ends as the identity
    for group in {len(word): [w for w in words if len(w) == len(word)] for word in words}.values():
        check_words(network, group)


def test_swap_network_on_all_permutations() -> None:
    """Every permutation of five elements is reached, so every value of sum_i i pi(i) is met, 54 included."""
    network = SwapNetwork().double()
    seen, words = set(), []
    for target in permutations(range(ELEMENTS)):
        state, word = list(range(ELEMENTS)), []
        for place in range(ELEMENTS):
            other = state.index(target[place])
            if other != place:
                state[place], state[other] = state[other], state[place]
                word.append((place, other))
        assert tuple(state) == target
        seen.add(tuple(state))
        # Padded with a swap and its inverse, so that all words are of one length.
        words.append(word + [(0, 1)] * 2 * ((6 - len(word)) // 2) + ([(3, 4)] if len(word) % 2 else []))
    assert len(seen) == 120
    for length in {len(word) for word in words}:
        check_words(network, [word for word in words if len(word) == length])


def adversarial_words(length: int) -> dict[str, Word]:
    """Words whose prefixes are hard in different ways."""
    swap, cycle = (0, 1), [(n, n + 1) for n in range(ELEMENTS - 1)]  # the cycle has order 5
    return {
        "one swap again and again: every second prefix": [swap] * length,
        "the same two elements named in both orders": [(2, 3), (3, 2)] * (length // 2),
        "one swap at the very beginning, undone at the very end": [swap, *[(2, 3), (2, 3)] * (length // 2 - 1), swap],
        "never undone, the nearest miss (54 of 55)": [(3, 4), *[(0, 1), (0, 1)] * (length // 2)],
        "a cycle of five: every twentieth prefix": cycle * (length // 4),
        "the farthest permutation and back": [(0, 4), (1, 3)] * (length // 2),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", adversarial_words(4))
def test_swap_network_on_adversarial_words(kind: str, dtype: torch.dtype) -> None:
    word = adversarial_words(4095)[kind]
    margin = check_words(SwapNetwork().to(dtype), [word])
    # exp(-4) for sharpness 8: what exact arithmetic leaves is 1 - exp(-4) or more, relative to 1 / (t + 1).
    assert margin > 0.9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("split", ["train", "sparse", "dense"])
@pytest.mark.parametrize("length", [4, 62, 64, 66, 512, 4096])
def test_flip_flop_network_on_random_sequences(length: int, split: str, dtype: torch.dtype) -> None:
    task = FlipFlop(length=length)
    check_flip_flop(FlipFlopNetwork().to(dtype), task.examples(length, range(4), split).input_ids)


def check_flip_flop(network: FlipFlopNetwork, ids: np.ndarray) -> None:
    answers = torch.from_numpy(FlipFlop().oracle(ids))[:, 1:]
    with torch.no_grad():
        out = network(torch.from_numpy(ids))[:, :-1]
    asked = answers != -100
    assert bool(asked.any())
    wanted = torch.where(answers == ONE, 1.0, -1.0).to(out.dtype)
    # Sure of itself, not just on the right side.
    torch.testing.assert_close(out[asked], wanted[asked], rtol=0, atol=1e-3)


def pairs(*parts: tuple[int, int]) -> np.ndarray:
    return np.array([[t for part in parts for t in part]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("first", [ZERO, ONE])
def test_flip_flop_network_on_adversarial_sequences(first: int, dtype: torch.dtype) -> None:
    other = ZERO + ONE - first
    network = FlipFlopNetwork().to(dtype)
    middle = 2046  # pairs between the first and the last: length 4096
    sequences = {
        "one write, then thousands of ignored other bits": [(WRITE, first), *[(IGNORE, other)] * middle, (READ, first)],
        "as many writes of the other bit before": [*[(WRITE, other)] * middle, (WRITE, first), (READ, first)],
        "writes in turn, read at once": [(WRITE, first), (READ, first), (WRITE, other), (READ, other)] * (middle // 4),
        "a read after every ignored bit": [(WRITE, first), *[(IGNORE, other), (READ, first)] * (middle // 2)],
        "the shortest": [(WRITE, first), (READ, first)],
    }
    for name, parts in sequences.items():
        try:
            check_flip_flop(network, pairs(*parts))
        except AssertionError as error:
            raise AssertionError(name) from error
