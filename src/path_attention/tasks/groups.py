"""Finite permutation groups: elements, multiplication table, cycle notation."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import torch
from torch import Tensor

Permutation = tuple[int, ...]  # p[i] is where i goes, from 0

# The multiplication table is the square of this; a model has as many output tokens.
MAX_ORDER = 2000


@dataclass(frozen=True, eq=False)
class Group:
    """A permutation group and the elements that generate it.

    Args:
        elements: in lexicographic order, so that the identity is element 0.
        table: (n, n) int64; table[a, b] is the element a∘b, which applies b first.
        generators: (m,) int64, the generators and their inverses without repetition, in order of appearance.
    """

    elements: tuple[Permutation, ...]
    table: Tensor
    generators: Tensor

    @property
    def names(self) -> tuple[str, ...]:
        """The elements in cycle notation, from 1; the identity is e."""
        return tuple(cycles(p) for p in self.elements)


def compose(a: Permutation, b: Permutation) -> Permutation:
    """a∘b: b first."""
    return tuple(a[i] for i in b)


def inverse(a: Permutation) -> Permutation:
    return tuple(sorted(range(len(a)), key=a.__getitem__))


def cycles(permutation: Permutation) -> str:
    """Cycle notation, from 1: (1 2 3)(4 5), without fixed points; e for the identity."""
    seen: set[int] = set()
    text = ""
    for start in range(len(permutation)):
        cycle = []
        while start not in seen:
            seen.add(start)
            cycle.append(str(start + 1))
            start = permutation[start]
        if len(cycle) > 1:
            text += f"({' '.join(cycle)})"
    return text or "e"


def from_cycles(text: str, degree: int) -> Permutation:
    """The permutation of ``degree`` things that a text in cycle notation names, as :func:`cycles` writes it.

    Raises:
        ValueError: it is no product of disjoint cycles of numbers from 1 to degree.
    """
    found = [[int(x) - 1 for x in cycle.split()] for cycle in re.findall(r"\(([\d ]+)\)", text)]
    moved = [x for cycle in found for x in cycle]
    well_formed = re.fullmatch(r"\s*(\([\d ]+\)\s*)+", text)
    if not well_formed or len(set(moved)) != len(moved) or not all(0 <= x < degree for x in moved):
        raise ValueError(f"generators: wanted disjoint cycles such as '(1 2 3)(4 5)', got {text!r}")
    permutation = list(range(degree))
    for cycle in found:
        for here, there in zip(cycle, cycle[1:] + cycle[:1], strict=True):
            permutation[here] = there
    return tuple(permutation)


def named_generators(name: str) -> tuple[str, ...]:
    """Generators of S3, A5, Z60, ...: all swaps of Sn; (1 2 k) of An, as in arXiv 2505.16381; one cycle of Zn.

    Raises:
        ValueError: the name is none of these.
    """
    found = re.fullmatch(r"([SAZ])(\d+)", name)
    degree = int(found[2]) if found else 0
    if found and found[1] == "S" and degree >= 2:
        return tuple(f"({a} {b})" for a, b in combinations(range(1, degree + 1), 2))
    if found and found[1] == "A" and degree >= 3:
        return tuple(f"(1 2 {k})" for k in range(3, degree + 1))
    if found and found[1] == "Z" and degree >= 2:
        return ("(" + " ".join(str(k) for k in range(1, degree + 1)) + ")",)
    raise ValueError(f"group: wanted S2, S3, ..., A3, A4, ... or Z2, Z3, ..., or generators beside it, got {name!r}")


@lru_cache(maxsize=32)
def generate_group(generators: Sequence[str]) -> Group:
    """The group that permutations in cycle notation generate.

    Raises:
        ValueError: a generator is none, or the group has more than MAX_ORDER elements.
    """
    degree = max((int(n) for text in generators for n in re.findall(r"\d+", text)), default=0)
    given = [from_cycles(text, degree) for text in generators]
    if not given:
        raise ValueError("generators: wanted at least one, got none")
    letters = list(dict.fromkeys(p for g in given for p in (g, inverse(g))))
    identity = tuple(range(degree))
    found, new = {identity}, [identity]
    while new:
        new = list({compose(p, g) for p in new for g in letters} - found)
        found.update(new)
        if len(found) > MAX_ORDER:
            raise ValueError(f"generators: wanted a group of at most {MAX_ORDER} elements, got a larger one")
    elements = tuple(sorted(found))
    number = {p: n for n, p in enumerate(elements)}
    table = torch.tensor([[number[compose(a, b)] for b in elements] for a in elements])
    return Group(elements, table, torch.tensor([number[p] for p in letters]))
