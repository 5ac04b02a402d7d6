"""Whole language models by mixer: tokens a second of a training step, and one pass over a long sequence.

    python benchmarks/language_model.py --out results/NAME.json

The models are those of the paper's size (760M, 24 layers of 24 heads x 64), with random weights; RoPE's attention is
cuDNN's, where it serves. A training step is forward, backward, clipping and AdamW under bfloat16 autocast with float32
weights, layers and loss compiled as `training.compile` does it, on random tokens. The long pass is that of the
evaluation by position: no gradient, the loss of every token, logits of some thousand tokens at a time.

Models are measured one after another, and the first one again at the end: how far its two numbers are apart is what
differences between others may owe to the machine. A model whose first loss is not that of random guessing, or whose
step is not finite, is not timed. --size tiny --device cpu tries the script out.
"""

import argparse
import gc
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from path_attention.benchmark.measure import environment
from path_attention.evaluation.perplexity import precision_context, token_losses
from path_attention.models import PaTHConfig, PaTHForCausalLM
from path_attention.reproduction.language_model import fastest_attention
from path_attention.training import parallel
from path_attention.training.recipe import Training

SIZES: dict[str, dict[str, Any]] = {
    "760m": {},  # PaTHConfig's defaults
    "50m": {  # of the recipe python_code
        "vocab_size": 8192,
        "hidden_size": 640,
        "num_hidden_layers": 8,
        "num_attention_heads": 10,
        "intermediate_size": 1728,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 128,
    },
}
# The loss of random weights is the logarithm of the vocabulary plus half the variance of the logits, about 0.3 here.
FIRST_LOSS_TOLERANCE = 1.0


def build(size: str, mixer: str, device: torch.device) -> Any:
    torch.manual_seed(0)
    with torch.device(device):  # on the device at once: seconds instead of a minute
        return PaTHForCausalLM(PaTHConfig(mixer=mixer, use_cache=False, **SIZES[size]))


def tokens(model: Any, batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(model.config.vocab_size, (batch, length), generator=generator)
    return ids.to(model.device)


class Step:
    """A training step of a model, ready to be called."""

    def __init__(self, model: Any, batch: int, length: int, compile: bool) -> None:
        settings = Training(steps=1, batch_size=batch, learning_rate=1e-4, compile=compile)
        parallel.prepare(model.train(), settings, None)
        self.model, self.ids = model, tokens(model, batch, length)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)

    def __call__(self) -> Tensor:
        with precision_context("bfloat16", self.model.device):
            loss: Tensor = self.model(input_ids=self.ids, labels=self.ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    taken = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        taken.append(time.perf_counter() - start)
    return taken


def peak_mib(device: torch.device) -> int | None:
    return round(torch.cuda.max_memory_allocated(device) / 2**20) if device.type == "cuda" else None


def forget(device: torch.device) -> None:
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def check_loss(loss: float, model: Any) -> None:
    wanted = math.log(model.config.vocab_size)
    if not abs(loss - wanted) < FIRST_LOSS_TOLERANCE:
        raise SystemExit(f"{model.config.mixer}: first loss {loss}, wanted about {wanted:.2f}: not timed")


def training(options: argparse.Namespace, mixer: str, device: torch.device) -> dict[str, Any]:
    step = Step(build(options.size, mixer, device), options.batch, options.length, options.compile)
    started = time.perf_counter()
    first = float(step())
    check_loss(first, step.model)
    compiled = time.perf_counter() - started
    for _ in range(2):
        last = float(step())
    if not math.isfinite(last):
        raise SystemExit(f"{mixer}: the loss is {last} after three steps: not timed")
    taken = seconds(step, device, options.repeats)
    rate = options.batch * options.length / statistics.median(taken)
    return {
        "mixer": mixer,
        "parameters": sum(p.numel() for p in step.model.parameters()),
        "tokens_per_second": round(rate, 1),
        "step_ms": {"median": 1e3 * statistics.median(taken), "min": 1e3 * min(taken), "max": 1e3 * max(taken)},
        "first_call_s": round(compiled, 1),
        "peak_memory_mib": peak_mib(device),
    }


def long_pass(model: Any, length: int, device: torch.device) -> dict[str, Any]:
    ids = tokens(model, 1, length)

    def run() -> float:
        with precision_context("bfloat16", device):
            return float(token_losses(model, ids).mean())

    check_loss(run(), model)
    forget(device)
    taken = seconds(run, device, 2)
    return {
        "mixer": model.config.mixer,
        "length": length,
        "seconds": round(min(taken), 4),
        "tokens_per_second": round(length / min(taken), 1),
        "peak_memory_mib": peak_mib(device),
    }


def report(rows: list[dict[str, Any]], row: dict[str, Any]) -> None:
    rows.append(row)
    print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="760m")
    parser.add_argument("--mixers", default="rope,path,path_fox,fox", help="the first is what others are compared with")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a training step")
    parser.add_argument("--length", type=int, default=4096, help="of a training step; 0 leaves training out")
    parser.add_argument("--long", default="4096,16384,65536", help="lengths of one pass; empty leaves them out")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device, mixers = torch.device(options.device), options.mixers.split(",")
    trained: list[dict[str, Any]] = []
    passes: list[dict[str, Any]] = []
    with fastest_attention():
        for mixer in [*mixers, mixers[0]] if options.length else []:
            forget(device)
            report(trained, training(options, mixer, device))
        for mixer in mixers if options.long else []:
            forget(device)
            with torch.no_grad():
                model = build(options.size, mixer, device).eval()
                for length in (int(n) for n in options.long.split(",")):
                    report(passes, long_pass(model, length, device))
            del model
    base = statistics.mean(r["tokens_per_second"] for r in trained if r["mixer"] == mixers[0]) if trained else None
    for row in trained:
        row[f"of_{mixers[0]}"] = round(row["tokens_per_second"] / base, 4)
    numbers = {
        "benchmark": "language_model",
        **environment(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "size": options.size,
        "batch": options.batch,
        "length": options.length,
        "compile": options.compile,
        "training": trained,
        "long": passes,
    }
    for row in trained:
        print(f"{row['mixer']:10} {row['tokens_per_second']:12,.0f} tokens/s  {row[f'of_{mixers[0]}']:.3f}")
    if options.out is not None:
        options.out.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
