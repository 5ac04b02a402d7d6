"""Words in a group: what is the product so far? For A5 and S5 this is complete for the complexity class NC1.

Source: Merrill, Petty and Sabharwal, "The Illusion of State in State-Space Models" (arXiv 2404.08819), for the tagging
of every position; the PaTH paper (arXiv 2505.16381, section 4.1) for words in generators and for the question whether a
word is the identity.

A sequence is ``# x_1 x_2 ... x_n =`` with letters x_t from the group. After x_t the answer is the element
x_1∘x_2∘...∘x_t (the rightmost is applied first), or, asked once after the last letter, whether the
whole product is the identity.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from path_attention.tasks.base import IGNORED, TRAIN, Sequences, Task, register
from path_attention.tasks.groups import Group, generate_group, named_generators
from path_attention.tasks.random import integers, uniform

# One residue of so many belongs to the held-out words: 20 % of them, as in Merrill et al.
HELD_OUT = 5


@register("group_words")
@dataclass(frozen=True, kw_only=True)
class GroupWords(Task):
    """The task of this module's docstring.

    Training and held-out words are disjoint: with the letters numbered 0 ... m - 1, the sum of a word's numbers modulo
    m says which they are. The letters stay uniform, for any m - 1 of a word's letters leave that sum open.

    Args:
        group: S3, A5, Z60, ...: a named group; a label where ``generators`` are given.
        generators: of any permutation group, in cycle notation: ["(1 2 3)", "(3 4 5)"].
        letters: of what words are made: the generators and their inverses, or all elements. The generators of Sn are
            all its swaps, those of An (1 2 3), (1 2 4), ..., (1 2 n), those of Zn one cycle.
        answer: "product" after every letter, or "identity": at the end, whether the word is the identity; half of the
            words are. Within each half all words are equally likely.
        word_length: n.

    Raises:
        ValueError: for a group or a length that there is not.
    """

    group: str = "A5"
    generators: tuple[str, ...] | None = None
    letters: Literal["generators", "all"] = "generators"
    answer: Literal["product", "identity"] = "product"
    word_length: int = 20

    def __post_init__(self) -> None:
        if self.word_length < 1:
            raise ValueError(f"group_words: word_length must be at least 1, got {self.word_length}")
        alphabet = len(self._letters)
        if alphabet < 2:
            raise ValueError(f"group_words: generators must give at least 2 letters with inverses, got {alphabet}")
        if self.answer == "identity":
            for split in (TRAIN, *self.splits):
                if bool((self._chances(split)[:, self.word_length, 0, 0] == 0).any()):
                    raise ValueError(
                        f"group_words: word_length {self.word_length} leaves no {split} words that are the identity, "
                        "or none that are not"
                    )

    @property
    def permutations(self) -> Group:
        """The group itself."""
        return generate_group(self.generators or named_generators(self.group))

    @property
    def splits(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("held_out",)

    @property
    def length(self) -> int:  # type: ignore[override]
        return self.word_length + 2

    @property
    def tokens(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*self.permutations.names, "#", "=", *(("no", "yes") if self.answer == "identity" else ()))

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        return len(self.permutations.elements) + (4 if self.answer == "identity" else 2)

    @property
    def _letters(self) -> Tensor:
        """(m,) the elements that words are made of."""
        group = self.permutations
        return group.generators if self.letters == "generators" else torch.arange(len(group.elements))

    def generate(self, seed: int, indices: Tensor, split: str = TRAIN) -> Sequences:
        stream, order = self._stream(split), len(self.permutations.elements)
        draws = uniform(seed, stream, indices, self.word_length + 1)
        letters = self._letters.to(indices.device)
        table = self.permutations.table.to(indices.device)
        if self.answer == "product":
            chosen = self._words(draws, split)
        else:
            chosen = self._conditional_words(draws, split, letters, table)
        word = letters[chosen]
        input_ids = torch.cat(
            [torch.full_like(word[:, :1], order), word, torch.full_like(word[:, :1], order + 1)], dim=1
        )
        products = prefix_products(word, table)
        answers = torch.full_like(input_ids, IGNORED)
        if self.answer == "product":
            answers[:, 2:] = products  # after x_t, which is at position t: at t + 1
            return Sequences(input_ids, answers, answers)
        # The question is asked by the last letter; "=" is where its answer would stand.
        answers[:, -1] = order + 2 + (products[:, -1] == 0)
        return Sequences(input_ids, answers, answers)

    def _residues(self, split: str) -> range:
        """Which sums of letter numbers, modulo their number m, a split's words have."""
        alphabet = len(self._letters)
        held_out = -(-alphabet // HELD_OUT)
        return range(held_out, alphabet) if split == TRAIN else range(held_out)

    def _words(self, draws: Tensor, split: str) -> Tensor:
        """Numbers of letters (N, n), uniform over a split's words."""
        alphabet, residues = len(self._letters), self._residues(split)
        free = integers(draws[:, : self.word_length - 1], alphabet)
        residue = residues.start + integers(draws[:, self.word_length - 1], len(residues))
        last = (residue - free.sum(1)) % alphabet
        return torch.cat([free, last[:, None]], dim=1)

    def _conditional_words(self, draws: Tensor, split: str, letters: Tensor, table: Tensor) -> Tensor:
        """The same, uniform over those that are the identity in half of the sequences, over the others in the rest.

        Letter by letter, each with the probability that a word that has begun so ends as it should.
        """
        alphabet = len(letters)
        chances = self._chances(split).to(draws.device)
        wanted = integers(draws[:, -1], 2)
        product = torch.zeros_like(wanted)
        residue = torch.zeros_like(wanted)
        numbers = torch.arange(alphabet, device=draws.device)
        chosen = []
        for t in range(self.word_length):
            products, residues = table[product[:, None], letters], (residue[:, None] + numbers) % alphabet
            weight = chances[wanted[:, None], self.word_length - 1 - t, products, residues].cumsum(1)
            letter = (weight <= draws[:, t : t + 1] * weight[:, -1:]).sum(1).clamp_max(alphabet - 1)
            product = products.gather(1, letter[:, None]).squeeze(1)
            residue = (residue + letter) % alphabet
            chosen.append(letter)
        return torch.stack(chosen, dim=1)

    def _chances(self, split: str) -> Tensor:
        return _chances(
            self.generators or named_generators(self.group), self.letters, self.word_length, self._residues(split)
        )

    def oracle(self, input_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The right answers, -100 elsewhere, (N, T) like ``input_ids``: permutations composed one by one.

        Raises:
            ValueError: a sequence is not # x_1 ... x_n =.
        """
        elements = self.permutations.elements
        start, end = len(elements), len(elements) + 1
        answers = np.full_like(input_ids, IGNORED)
        for n, sequence in enumerate(input_ids.tolist()):
            if sequence[0] != start or sequence[-1] != end or not all(x < start for x in sequence[1:-1]):
                raise ValueError(f"group_words: sequence {n} is not a word between # and =")
            state = list(range(len(elements[0])))
            for t, letter in enumerate(sequence[1:-1], start=1):
                state = [state[i] for i in elements[letter]]
                if self.answer == "product":
                    answers[n, t + 1] = elements.index(tuple(state))
            if self.answer == "identity":
                answers[n, -1] = end + 1 + (state == sorted(state))
        return answers


def prefix_products(word: Tensor, table: Tensor) -> Tensor:
    """x_1∘...∘x_t for every t, (N, n) like ``word``: multiplication is associative, so log2(n) rounds suffice."""
    product = word.clone()
    step = 1
    while step < word.shape[1]:
        product[:, step:] = table[product[:, :-step], product[:, step:]]
        step *= 2
    return product


@lru_cache(maxsize=16)
def _chances(generators: tuple[str, ...], letters: str, length: int, residues: range) -> Tensor:
    """(2, length + 1, order, m): the probability that a product and a residue become, by r more uniform letters, a
    product that is not (first index 0) or is (1) the identity and a residue among ``residues``; second index r.
    """
    group = generate_group(generators)
    alphabet = group.generators if letters == "generators" else torch.arange(len(group.elements))
    order, size = len(group.elements), len(alphabet)
    last = torch.zeros(2, order, size, dtype=torch.float64)
    last[0, 1:, residues.start : residues.stop] = 1
    last[1, 0, residues.start : residues.stop] = 1
    found = [last]
    after = (torch.arange(size)[:, None] + torch.arange(size)) % size  # [residue, letter]
    for _ in range(length):
        found.append(found[-1][:, group.table[:, alphabet][:, None, :], after[None]].mean(-1))
    return torch.stack(found, dim=1)
