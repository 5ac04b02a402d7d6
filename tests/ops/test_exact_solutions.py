"""Problems that PaTH solves exactly with weights set by hand (arXiv 2505.16381, theorem 2.1 and appendix A).

They state what the operator can express, with reflections (beta = 2) and projections (beta = 1) of the size that
training rarely reaches exactly, over sequences of several leaves.
"""

import torch
from torch import Tensor

from path_attention import path_attention


def one_head(*rows: Tensor) -> tuple[Tensor, ...]:
    """(L, D) -> (1, L, 1, D) and (L,) -> (1, L, 1)."""
    return tuple(x[None, :, None] for x in rows)


def swap_network(word: list[tuple[int, int]]) -> tuple[Tensor, ...]:
    """Theorem 2.1: one head whose logit for the token "#" grows with the agreement of a word of swaps with identity.

    A swap [x, y] is the reflection along e_x - e_y, so the product of the transitions permutes the key of "#",
    (1, ..., 5), and q = n (1, ..., 5) meets it in n sum_i i pi(i): 55 n for the identity, at most 54 n otherwise. The
    sixth dimension takes 54.5 n off.
    """
    n = len(word)
    q = n * torch.tensor([1, 2, 3, 4, 5, 1.0], dtype=torch.float64).expand(n + 1, 6)
    k, v, w = (torch.zeros(n + 1, 6, dtype=torch.float64) for _ in range(3))
    k[0] = torch.tensor([1, 2, 3, 4, 5, -54.5])
    v[0, 0] = 1
    for t, (x, y) in enumerate(word, start=1):
        w[t, x], w[t, y] = 0.5**0.5, -(0.5**0.5)
    beta = torch.full((n + 1,), 2.0, dtype=torch.float64)
    return one_head(q, k, v, w, beta)


def test_words_of_swaps_of_five_elements() -> None:
    """Theorem 2.1: one layer decides whether a word of swaps is the identity, an NC1-complete problem.

    A second head with q = 0 attends uniformly, 1 / (n + 1) to "#"; the word is the identity iff the first attends more.
    Half of the words end with the swaps that undo them.
    """
    generator = torch.Generator().manual_seed(0)

    def random_word(length: int) -> list[tuple[int, int]]:
        pairs = [torch.randperm(5, generator=generator)[:2].tolist() for _ in range(length)]
        return [(x, y) for x, y in pairs]

    answers = set()
    for number in range(60):
        half = random_word(1 + number)
        word = half + half[::-1] if number % 2 else half
        permutation = list(range(5))
        for x, y in word:
            permutation[x], permutation[y] = permutation[y], permutation[x]
        identity = permutation == list(range(5))
        answers.add(identity)
        attention = path_attention(*swap_network(word), scale=1.0)[0, -1, 0, 0]
        assert (float(attention) > 1 / (len(word) + 1)) == identity, word
    assert answers == {True, False}


def flip_flop(length: int, ignore: float, generator: torch.Generator) -> tuple[list[str], list[int], list[int]]:
    """Instructions, bits, and at every pair the last written bit."""
    probabilities = torch.tensor([(1 - ignore) / 2, (1 - ignore) / 2, ignore])
    drawn = torch.multinomial(probabilities, length, replacement=True, generator=generator)
    instructions = ["w", *("wri"[i] for i in drawn[1:])]
    bits = torch.randint(2, (length,), generator=generator).tolist()
    memory, written = [], 0
    for t, instruction in enumerate(instructions):
        written = bits[t] if instruction == "w" else written
        bits[t] = written if instruction == "r" else bits[t]
        memory.append(written)
    return instructions, bits, memory


def test_flip_flop_in_two_layers() -> None:
    """Theorem A.1. Layer 1: each bit attends to its own instruction alone, because every instruction projects the
    direction of all instructions' keys away. Layer 2: bits that follow "w" alone have a key and
    project the earlier ones away, so that attention is one-hot on the last written bit."""
    generator = torch.Generator().manual_seed(1)
    for ignore in (0.8, 0.98, 0.1):
        instructions, bits, memory = flip_flop(256, ignore, generator)
        length = 2 * len(bits)
        is_instruction = torch.arange(length) % 2 == 0
        axis = torch.eye(2, dtype=torch.float64)
        # layer 1; v is one-hot in the instruction
        w = torch.where(is_instruction[:, None], axis[0], axis[1])
        k = torch.where(is_instruction[:, None], axis[0], 0.0)
        q = torch.where(is_instruction[:, None], 0.0, length * axis[0])
        v = torch.zeros(length, 3, dtype=torch.float64)
        v[::2] = torch.eye(3, dtype=torch.float64)[["wri".index(i) for i in instructions]]
        seen = path_attention(*one_head(q, k, v, w, torch.ones(length, dtype=torch.float64)), scale=1.0)[0, :, 0]
        assert torch.equal(seen[1::2].argmax(-1), v[::2].argmax(-1))
        # layer 2, on what layer 1 put out
        follows_write = ~is_instruction & (seen.argmax(-1) == 0)
        bit = torch.tensor(bits, dtype=torch.float64).repeat_interleave(2)[:, None]
        write = follows_write.double()
        keys = write[:, None] * axis[0]
        read = path_attention(*one_head((length * axis[0]).expand(length, 2), keys, bit, keys, write), scale=1.0)
        assert read[0, 1::2, 0, 0].round().long().tolist() == memory


def test_flip_flop_in_one_layer() -> None:
    """One head of three dimensions, w and beta of a bit set from the bit and its instruction (a short convolution).

    Only "w" tokens have a key, e_1. A token "w" projects e_2 away, a written 1 reflects e_1 onto e_2 (up to sign) and
    a written 0 does not: the query -c e_2 finds the key of the last "w" there iff the last written bit is 1.
    """
    generator = torch.Generator().manual_seed(2)
    for ignore in (0.8, 0.98, 0.1):
        instructions, bits, memory = flip_flop(256, ignore, generator)
        axis = torch.eye(3, dtype=torch.float64)
        length = 2 * len(bits)
        k, w = torch.zeros(2, length, 3, dtype=torch.float64)
        v, beta = torch.zeros(2, length, dtype=torch.float64)
        for t, (instruction, bit) in enumerate(zip(instructions, bits, strict=True)):
            if instruction == "w":
                k[2 * t], w[2 * t], v[2 * t], beta[2 * t] = axis[0], axis[1], 1, 1
                if bit == 1:
                    w[2 * t + 1], beta[2 * t + 1] = (axis[0] + axis[1]) / 2**0.5, 2
        q = (-30 * axis[1]).expand(length, 3)
        out = path_attention(*one_head(q, k, v[:, None], w, beta), scale=1.0)[0, 1::2, 0, 0]
        wanted = torch.tensor(memory)
        assert (out[wanted == 1] > 0.99).all()
        assert (out[wanted == 0] < 0.9).all()
