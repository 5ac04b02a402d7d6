"""The process that test_stress.py watches: forward and backward passes of backend "hopper", each checked.

    python -m tests.ops.stress HEAD_DIM GROUP LAUNCHES

A line for each launch is written before it, so that the last one names what hung. Shapes are random, batches and packed
rows, and come again and again in random order. Results must equal those of backend "triton", computed once for each
shape, but for rounding. Every other launch has fresh memory filled with NaN, and every other two keep what their
backward pass needs.
"""

import random
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from path_attention import path_attention, unsupported_reason
from tests.ops.test_cuda import error, make, softmax_errors

SHAPES = 24
# Both backends keep within these factors of softmax attention's error (test_cuda.check), so they differ by twice that.
OUTPUT_FACTOR, GRADIENT_FACTOR = 2 * 1.5, 2 * 2.0
# Tokens times query heads of a shape at most: a launch takes a few ms.
MOST_ROWS = 32768


@dataclass(frozen=True)
class Case:
    name: str
    inputs: list[Tensor | None]
    cu_seqlens: Tensor | None
    d_out: Tensor

    def run(self, backend: str, recompute: bool = True) -> list[Tensor]:
        """The output and all gradients."""
        given = [x for x in self.inputs if x is not None]
        options = {"cu_seqlens": self.cu_seqlens, "backend": backend, "recompute": recompute}
        out = path_attention(*self.inputs, **options)  # type: ignore[arg-type]
        return [out.detach(), *torch.autograd.grad(out, given, self.d_out)]


def random_case(rng: random.Random, dim: int, group: int) -> Case:
    """Three leaves and more, so that the kernels for Hopper have levels to do; lengths of every remainder."""
    heads = rng.choice([2, 3, 6])  # Triton compiles anew for 1 and for multiples of 16
    most = MOST_ROWS // (heads * group)
    length = rng.randint(129, min(most, 4096))
    batch = rng.randint(1, max(1, min(4, most // length)))
    ends = None
    if rng.random() < 0.5:
        batch = 1
        inner = sorted(rng.choice([rng.randint(0, length), 64 * rng.randint(0, length // 64)]) for _ in range(6))
        ends = [0, *inner[: rng.randint(1, 6)], length]
    gate = rng.random() < 0.5
    beta = rng.choice(["uniform", "near 2", "2"])
    inputs = make((batch, length, heads * group, heads, dim), torch.bfloat16, beta, gate=gate)
    where = rng.choice(["cpu", "cuda"])
    cu_seqlens = None if ends is None else torch.tensor(ends, dtype=torch.int32, device=where)
    name = f"{batch} x {length} x {heads * group}/{heads} x {dim}{' gated' if gate else ''}"
    name += "" if ends is None else f" {ends} on {where}"
    assert unsupported_reason("hopper", *inputs, cu_seqlens=cu_seqlens) is None  # type: ignore[misc]
    assert inputs[0] is not None
    return Case(name, inputs, cu_seqlens, torch.randn_like(inputs[0]))


def main(dim: int, group: int, launches: int) -> None:
    rng = random.Random(100 * dim + group)
    cases = []
    for _ in range(SHAPES):
        case = random_case(rng, dim, group)
        print(f"triton: {case.name}", flush=True)
        expected = case.run("triton")
        assert all(bool(x.isfinite().all()) for x in expected), f"triton: {case.name}"
        cases.append((case, expected))
    small = make((1, 1024, group, 1, dim), torch.bfloat16)
    of_output, of_gradients = softmax_errors(small, torch.randn_like(small[0]))
    torch.utils.deterministic.fill_uninitialized_memory = True
    for launch in range(launches):
        case, expected = rng.choice(cases)
        is_poisoned = launch % 2 == 1
        print(f"{launch}: {case.name}{', fresh memory is NaN' if is_poisoned else ''}", flush=True)
        torch.use_deterministic_algorithms(is_poisoned, warn_only=True)  # only then is memory filled
        found = case.run("hopper", recompute=launch % 4 < 2)
        errors = [error(x, y) for x, y in zip(found, expected, strict=True)]  # waits for the launch
        allowed = [OUTPUT_FACTOR * of_output] + [GRADIENT_FACTOR * of_gradients] * (len(errors) - 1)
        for name, e, most in zip(("out", "q", "k", "v", "w", "beta", "g"), errors, allowed, strict=False):
            # A NaN is not at most anything.
            assert e <= most, f"{name} differs by {e:.1e}, allowed {most:.1e}: launch {launch}, {case.name}"


if __name__ == "__main__":
    main(*(int(x) for x in sys.argv[1:]))
