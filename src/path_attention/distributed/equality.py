"""Whether the operator over a split sequence is that of one process, on the processes and devices there are.

Every process computes the whole sequence alone, in the same dtype and in float64, and its own shard together with the
others. What is compared is the error against float64, of the output and of every gradient.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from path_attention.distributed.attention import path_attention_context_parallel
from path_attention.distributed.context import ContextParallel
from path_attention.distributed.processes import Place
from path_attention.ops import path_attention

NAMES = ("out", "q", "k", "v", "w", "beta", "g")
# How many times the error of one process a split sequence may have. Sums in another order, and one rounding more of
# rows that cross between pieces, make it 1 to 2 times; a wrong term is off by a hundred times and more. On a CPU one
# process rounds no rows, and bfloat16's one rounding makes several times its small error: there the floor decides.
FACTOR = 4.0


def arguments(
    length: int, heads: int, dim: int, dtype: torch.dtype, device: torch.device, *, gated: bool, seed: int = 0
) -> list[Tensor]:
    """q, k, v, w, beta and perhaps g of one sequence, the same on every process; w, beta and g in float32."""
    generator = torch.Generator().manual_seed(seed)  # of the CPU: the same numbers whatever the device

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, length, heads, *shape, generator=generator)

    q, k, v = (normal(dim).to(dtype) for _ in range(3))
    w = torch.nn.functional.normalize(normal(dim), dim=-1)
    beta = 2 * torch.rand(1, length, heads, generator=generator)
    gates = [torch.nn.functional.logsigmoid(normal() + 2)] if gated else []
    return [x.to(device) for x in (q, k, v, w, beta, *gates)]


def _results(function: Any, given: list[Tensor], d_out: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in given]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out.to(out.dtype))]


def _errors(found: list[Tensor], exact: list[Tensor]) -> dict[str, float]:
    """Relative, in the Frobenius norm."""
    norms = [(x.double() - y).norm() / y.norm() for x, y in zip(found, exact, strict=True)]
    return dict(zip(NAMES, (float(x) for x in norms), strict=False))


def compare(place: Place, length: int, heads: int, dim: int, dtype: torch.dtype, gated: bool) -> dict[str, Any]:
    """Errors of one process and of all together against float64, the same on every process, and what is ``wrong``.

    ``difference`` is that of the two results from each other, relative in the same norm.
    """
    context = ContextParallel(dist.group.WORLD)
    given = arguments(length, heads, dim, dtype, place.device, gated=gated)
    d_out = arguments(length, heads, dim, torch.float32, place.device, gated=False, seed=1)[0].to(dtype)
    exact = _results(path_attention, [x.double() for x in given], d_out.double())
    alone = _results(path_attention, given, d_out)
    shards = [context.shard(x) for x in given]

    def split(*leaves: Tensor) -> Tensor:
        return path_attention_context_parallel(*leaves, group=context)

    parts = _results(split, shards, context.shard(d_out))
    together = [context.unshard(x) for x in parts]
    errors, errors_alone = _errors(together, exact), _errors(alone, exact)
    floor = torch.finfo(dtype).eps / 2
    wrong = [name for name, error in errors.items() if not error <= FACTOR * max(errors_alone[name], floor)]
    return {
        "length": length,
        "dtype": str(dtype).removeprefix("torch."),
        "errors": errors,
        "errors_alone": errors_alone,
        "difference": _errors(together, [x.double() for x in alone]),
        "wrong": sorted({name for part in place.all(wrong) for name in part}),
    }
