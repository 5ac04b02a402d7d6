"""``path-attention benchmark decode``: what a cached token costs, beside a cache of plain keys and values.

For each shape a step of one token a sequence (PathCache against torch's attention on keys and values of that size) and
the prefill that made the cache (against torch's causal attention); then tokens a second of whole models. A cache whose
steps differ from the definition is not timed at all.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from path_attention.benchmark.contenders import Setting, make_operands
from path_attention.benchmark.measure import environment, time_interleaved
from path_attention.benchmark.operator import ERROR_FACTOR, WrongResult
from path_attention.cache import PathCache
from path_attention.ops import path_attention_reference

# Whole chunks, an open one and open tokens, of the default chunk of a head of 16.
CHECKED_LENGTH, CHECKED_STEPS = 700, 100
# Time spent at most on repeats of one contender.
SECONDS_EACH = 30.0

# Configurations of whole models: name -> fields of PaTHConfig. 760m is PaTHConfig's default.
MODELS: dict[str, dict[str, int]] = {
    "small": {
        "vocab_size": 257,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    },
    "760m": {},
}


@dataclass(frozen=True)
class Shape:
    """batch x tokens in the cache x query/key heads x head_dim, as in the table and on the command line."""

    batch: int
    length: int
    query_heads: int
    heads: int
    dim: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """From "16x8192x32x64", or "16x8192x32/8x64" for grouped queries.

        Raises:
            ValueError: text of another form.
        """
        try:
            batch, length, heads, dim = text.split("x")
            query_heads, _, key_heads = heads.partition("/")
            shape = cls(int(batch), int(length), int(query_heads), int(key_heads or query_heads), int(dim))
        except ValueError:
            raise ValueError(f"--shapes: wanted BATCHxLENGTHxHEADSxDIM, got {text!r}") from None
        if min(asdict(shape).values()) < 1 or shape.query_heads % shape.heads:
            raise ValueError(f"--shapes: wanted numbers above 0, and key heads that divide query heads, got {text!r}")
        return shape

    def __str__(self) -> str:
        heads = str(self.heads) if self.heads == self.query_heads else f"{self.query_heads}/{self.heads}"
        return f"{self.batch}x{self.length}x{heads}x{self.dim}"

    def setting(self, dtype: torch.dtype, device: str) -> Setting:
        return Setting(self.length + 1, self.batch, self.query_heads, self.heads, self.dim, dtype, device)


def check_steps(device: str) -> dict[str, float]:
    """Relative errors of steps and of a prefill in float32 against the definition in float64.

    Raises:
        WrongResult: they are more than rounding.
    """
    operands = make_operands(Setting(CHECKED_LENGTH, heads=2, query_heads=4, dim=16, device=device))
    given = [x.detach() for x in operands]
    exact = path_attention_reference(*(x.double() for x in given))
    single = path_attention_reference(*given)
    cache, first = PathCache(), CHECKED_LENGTH - CHECKED_STEPS
    parts = [cache.attend(*(x[:, :first] for x in given))]
    parts += [cache.attend(*(x[:, t : t + 1] for x in given)) for t in range(first, CHECKED_LENGTH)]

    def error(x: Tensor, y: Tensor) -> float:
        return float((x.double() - y).norm() / y.norm())

    errors = {"prefill": error(parts[0], exact[:, :first]), "steps": error(torch.cat(parts[1:], 1), exact[:, first:])}
    allowed = ERROR_FACTOR * error(single, exact)
    for name, found in errors.items():
        if not found <= allowed:
            raise WrongResult(f"{name} of the cache: error {found:.1e}, allowed {allowed:.1e}. Nothing was timed.")
    return errors


def _synchronized(function: Callable[[], object], device: str) -> Callable[[], object]:
    if not device.startswith("cuda"):
        return function

    def run() -> None:
        function()
        torch.cuda.synchronize()

    return run


@torch.no_grad()
def time_shape(shape: Shape, dtype: torch.dtype, device: str, repeats: int) -> dict[str, Any]:
    """Times of step and prefill beside torch's attention, their ratios, and bytes of both caches."""
    given = [x.detach() for x in make_operands(shape.setting(dtype, device))]
    prompt, token = ([x[:, part] for x in given] for part in (slice(0, -1), slice(-1, None)))
    cache = PathCache()
    cache.attend(*prompt)
    q, k, v = (x.transpose(1, 2) for x in given[:3])
    k, v = k.contiguous(), v.contiguous()
    attention = partial(torch.nn.functional.scaled_dot_product_attention, enable_gqa=shape.query_heads != shape.heads)
    functions: dict[str, dict[str, Callable[[], object]]] = {
        "step": {
            "softmax": lambda: attention(q[:, :, -1:], k, v),
            "path": lambda: cache.attend(*token),
        },  # grows by the repeats, a few tokens
        "prefill": {
            "softmax": lambda: attention(q, k, v, is_causal=True),
            "path": lambda: PathCache().attend(*prompt),
        },
    }
    row: dict[str, Any] = {"shape": str(shape)}
    for part, pair in functions.items():
        ready = {name: _synchronized(function, device) for name, function in pair.items()}
        times = time_interleaved(ready, repeats, SECONDS_EACH)
        row[part] = {name: asdict(found) for name, found in times.items()}
        row[f"{part}_ratio"] = times["path"].median_ms / times["softmax"].median_ms
    row["bytes"] = {"path": cache.nbytes(), "softmax": 2 * k.numel() * k.element_size()}
    row["bytes_ratio"] = row["bytes"]["path"] / row["bytes"]["softmax"]
    return row


@torch.no_grad()
def time_models(name: str, batch: int, prompt: int, tokens: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Tokens a second that generate() makes after a prompt, for PaTH and RoPE models of one shape."""
    from path_attention.models import PaTHConfig, PaTHForCausalLM

    row: dict[str, Any] = {"model": name, "batch": batch, "prompt": prompt, "tokens": tokens}
    for mixer in ("rope", "path"):
        torch.manual_seed(0)
        model = PaTHForCausalLM(PaTHConfig(mixer=mixer, **MODELS[name])).to(device, dtype).eval()  # type: ignore[arg-type]
        ids = torch.randint(1, model.config.vocab_size, (batch, prompt), device=device)
        seconds = []
        for count in (1, tokens + 1):  # the difference leaves the prefill out
            start = time.perf_counter()
            _synchronized(lambda m=model, x=ids, n=count: m.generate(x, max_new_tokens=n, do_sample=False), device)()  # type: ignore[misc]
            seconds.append(time.perf_counter() - start)
        row[mixer] = batch * tokens / (seconds[1] - seconds[0])
    row["ratio"] = row["path"] / row["rope"]
    return row


def run_decode_benchmark(
    *,
    shapes: Sequence[str],
    dtype: str = "float32",
    device: str = "cpu",
    repeats: int = 10,
    model: str | None = "small",
    out: Path | str | None = None,
    plot: Path | str | None = None,
) -> dict[str, Any]:
    """Check, then time every shape and the models; print tables; write JSON and a plot where asked to.

    Raises:
        ValueError: an argument of another form.
        WrongResult: before anything is timed.
    """
    parsed = [Shape.parse(text) for text in shapes]
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype: wanted float32, bfloat16 or float16, got {dtype!r}")
    if model is not None and model not in MODELS:
        raise ValueError(f"--model: wanted one of {', '.join(MODELS)}, got {model!r}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("--device: got cuda, which this machine does not have")
    precision: torch.dtype = getattr(torch, dtype)
    result: dict[str, Any] = {**environment(), "dtype": dtype, "device": device, "errors": check_steps(device)}
    if device.startswith("cuda"):
        result["machine"]["gpu"] = torch.cuda.get_device_name(device)
    result["rows"] = [time_shape(shape, precision, device, repeats) for shape in parsed]
    result["models"] = []
    if model is not None:
        result["models"] = [time_models(model, batch, 512, 32, precision, device) for batch in (1, 16)]
    _print(result)
    if out is not None:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps(result, indent=1) + "\n")
    if plot is not None:
        Path(plot).parent.mkdir(parents=True, exist_ok=True)
        _plot(result).savefig(plot, dpi=130)
    return result


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result['dtype']} on {result['device']}, torch {result['versions']['torch']}")
    for column in ("shape", "step ms", "softmax", "ratio", "prefill ms", "softmax", "ratio", "memory"):
        table.add_column(column, no_wrap=True, justify="left" if column == "shape" else "right")
    for row in result["rows"]:
        cells = [row["shape"]]
        for part in ("step", "prefill"):
            cells += [f"{row[part][name]['median_ms']:.2f}" for name in ("path", "softmax")]
            cells.append(f"{row[part + '_ratio']:.2f}")
        table.add_row(*cells, f"{row['bytes_ratio']:.2f}")
    console = Console()
    console.print(table)
    for row in result["models"]:
        console.print(
            f"{row['model']} model, batch {row['batch']}, after {row['prompt']} tokens: PaTH {row['path']:.0f} tokens/s"
            f", RoPE {row['rope']:.0f}, ratio {row['ratio']:.2f}"
        )


def _plot(result: dict[str, Any]) -> Any:
    """Ratios to plain keys and values, a group of bars for each shape."""
    from matplotlib.figure import Figure

    rows = result["rows"]
    figure = Figure(figsize=(1.6 + 1.8 * len(rows), 3.2), layout="constrained")
    axis = figure.subplots()
    parts = {"step_ratio": "step", "prefill_ratio": "prefill", "bytes_ratio": "memory"}
    for n, (part, title) in enumerate(parts.items()):
        axis.bar([x + 0.27 * (n - 1) for x in range(len(rows))], [row[part] for row in rows], 0.25, label=title)
    axis.axhline(1, color="black", lw=0.8)
    axis.set_xticks(range(len(rows)), [row["shape"] for row in rows], fontsize=8)
    axis.set_ylabel("times that of keys and values alone")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8)
    return figure
