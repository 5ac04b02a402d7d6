"""Rounding of the operator in half precision beside softmax attention's, written to results/cpu_accuracy.json.

    python benchmarks/accuracy.py --out results/cpu_accuracy.json

Relative Frobenius error of the output (also of its last eighth of rows, which the longest products of transitions
reach) and of every gradient, against the definition in float64 on the same rounded q, k and v. Softmax attention is
torch's own, causal, in the same dtype, against float64 on the same q, k and v.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from path_attention import path_attention
from path_attention.benchmark.contenders import Operands, Setting, causal_softmax_attention, make_operands
from path_attention.benchmark.measure import environment, forward_backward
from path_attention.ops import path_attention_reference

BETAS = {"uniform in [0, 2]": (0.0, 2.0), "uniform in [1.9, 2]": (1.9, 2.0), "2": (2.0, 2.0)}
NAMES = ("out", "q", "k", "v", "w", "beta")


def errors(found: tuple[Tensor | None, ...], exact: tuple[Tensor | None, ...]) -> dict[str, float]:
    """By name, the output and the gradients that there are; and the output's last eighth of rows."""

    def relative(x: Tensor, y: Tensor) -> float:
        return float((x.double() - y).norm() / y.norm())

    pairs = zip(NAMES, found, exact, strict=True)
    result = {name: relative(x, y) for name, x, y in pairs if x is not None and y is not None}
    out, exact_out = found[0], exact[0]
    assert out is not None
    assert exact_out is not None
    tail = slice(-(out.shape[1] // 8), None)
    return {**result, "out, last eighth": relative(out[:, tail], exact_out[:, tail])}


def row(setting: Setting, beta: str) -> dict[str, Any]:
    low, high = BETAS[beta]
    made = make_operands(setting)
    operands = made._replace(beta=(low + (high - low) / 2 * made.beta.detach()).requires_grad_())
    exact_operands = Operands(*(x.detach().double().requires_grad_() for x in operands))
    d_out = torch.randn(operands.q.shape, generator=torch.Generator().manual_seed(1)).to(setting.dtype)
    path = errors(
        forward_backward(path_attention, operands, d_out),
        forward_backward(path_attention_reference, exact_operands, d_out.double()),
    )
    softmax = errors(
        forward_backward(causal_softmax_attention, operands, d_out),
        forward_backward(causal_softmax_attention, exact_operands, d_out.double()),
    )
    return {
        "dtype": str(setting.dtype).removeprefix("torch."),
        "length": setting.length,
        "beta": beta,
        "path": path,
        "softmax": softmax,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 2048])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    base = Setting(length=0, query_heads=1, heads=1)
    rows = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for length in arguments.lengths:
            for beta in BETAS:
                rows.append(row(replace(base, length=length, dtype=dtype), beta))
                found = rows[-1]
                print(
                    f"{found['dtype']:9} {length:5} beta {beta:20} out {found['path']['out']:.2e} "
                    f"(last eighth {found['path']['out, last eighth']:.2e}) softmax {found['softmax']['out']:.2e}",
                    flush=True,
                )
    result = {"benchmark": "accuracy", **environment(), "heads": base.heads, "dim": base.dim}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
