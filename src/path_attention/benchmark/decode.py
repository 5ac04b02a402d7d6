"""``path-attention benchmark decode``: what a cached token costs, beside a cache of plain keys and values.

For each shape a step of one token a sequence (PathCache against torch's attention on keys and values of that size) and
the prefill that made the cache (against torch's causal attention); then tokens a second of whole models. On a GPU steps
are CUDA graphs. A cache whose steps differ from the definition is not timed at all.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from path_attention.benchmark import results_file
from path_attention.benchmark.contenders import Setting, make_operands
from path_attention.benchmark.measure import environment
from path_attention.benchmark.operator import ERROR_FACTOR, WrongResult
from path_attention.benchmark.shapes import Shape
from path_attention.cache import PathCache
from path_attention.ops import path_attention_reference

# Finished chunks of the least size, an open one and open tokens.
CHECKED_LENGTH, CHECKED_STEPS, CHECKED_CHUNK = 700, 100, 128
# In half precision a step may have this many times the error of softmax attention (tests/test_cache.py: 1.5).
HALF_FACTOR = 2.0
# Head dim and tokens of the check: a step's kernels are compiled for the width, and interpreted ones are slow.
CHECKED_DIM = {"cpu": 16, "cuda": 64}
# What is timed where nothing is said. On a GPU the shapes of docs/generation.md.
SHAPES = {
    "cpu": "1x4096x8x64,4x4096x8x64,1x16384x8x64,4x4096x8/2x64",
    "cuda": "16x8192x32x64,8x32768x16x128,1x131072x8x64,16x8192x32/8x64,16x8192x32/8x128",
}
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
MODEL = {"cpu": "small", "cuda": "760m"}

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
BATCHES = (1, 16)


def check_steps(device: str, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """Relative errors of steps and of a prefill against the definition in float64.

    Raises:
        WrongResult: they are more than rounding: that of the definition in float32, or of softmax attention in dtype.
    """
    dim = CHECKED_DIM[torch.device(device).type]
    operands = make_operands(Setting(CHECKED_LENGTH, heads=2, query_heads=4, dim=dim, dtype=dtype))
    given = [x.detach() for x in operands]
    wide = [x.double() for x in given]
    exact = path_attention_reference(*wide)
    cache, first = PathCache(chunk=CHECKED_CHUNK), CHECKED_LENGTH - CHECKED_STEPS
    moved = [x.to(device) for x in given]
    parts = [cache.attend(*(x[:, :first] for x in moved))]
    parts += [cache.attend(*(x[:, t : t + 1] for x in moved)) for t in range(first, CHECKED_LENGTH)]

    def error(x: Tensor, y: Tensor) -> float:
        return float((x.cpu().double() - y).norm() / y.norm())

    def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    errors = {"prefill": error(parts[0], exact[:, :first]), "steps": error(torch.cat(parts[1:], 1), exact[:, first:])}
    if dtype == torch.float32:
        allowed = ERROR_FACTOR * error(path_attention_reference(*given), exact)
    else:
        allowed = HALF_FACTOR * error(softmax(*given[:3]), softmax(*wide[:3]))
    for name, found in errors.items():
        if not found <= allowed:
            raise WrongResult(f"{name} of the cache: error {found:.1e}, allowed {allowed:.1e}. Nothing was timed.")
    return errors


def run_decode_benchmark(
    *,
    shapes: Sequence[str] | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    repeats: int = 10,
    model: str | None = "default",
    prompt: int = 512,
    out: Path | str | None = None,
    plot: Path | str | None = None,
    commit: str | None = None,
) -> dict[str, Any]:
    """Check, then time every shape and the models; print tables; write JSON and a plot where asked to.

    Args:
        shapes: as :meth:`Shape.parse` reads them; None for SHAPES of the device.
        dtype: float32, bfloat16 or float16; None for DTYPES of the device.
        device: cpu or cuda.
        repeats: timed repetitions of each.
        model: a name of MODELS, "default" for MODEL of the device, None for no models.
        prompt: tokens before those that the models make.
        out: JSON file, written after every row.
        plot: PNG file.
        commit: of the sources, where git does not tell.

    Raises:
        ValueError: an argument of another form.
        WrongResult: before anything is timed.
    """
    from path_attention.benchmark.decode_times import time_models, time_shape

    kind = device.partition(":")[0]
    if kind not in SHAPES:
        raise ValueError(f"--device: got {device!r}; wanted cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: got cuda, which this machine does not have")
    dtype = DTYPES[kind] if dtype is None else dtype
    parsed = [Shape.parse(text) for text in (SHAPES[kind].split(",") if shapes is None else shapes)]
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype: wanted float32, bfloat16 or float16, got {dtype!r}")
    model = MODEL[kind] if model == "default" else model
    if model is not None and model not in MODELS:
        raise ValueError(f"--model: wanted one of {', '.join(MODELS)}, got {model!r}")
    if prompt < 1:
        raise ValueError(f"--prompt: wanted at least 1, got {prompt}")
    path, plot = (None if x is None else Path(x) for x in (out, plot))
    results_file.check(path)
    results_file.check(plot, "--plot")
    precision: torch.dtype = getattr(torch, dtype)
    result: dict[str, Any] = {**environment(), "benchmark": "decode", "dtype": dtype, "device": device}
    if commit is not None:
        result["commit"] = commit
    if kind == "cuda":
        result["machine"]["gpu"] = torch.cuda.get_device_name(device)
        result["versions"]["triton"] = _triton_version()
    print("check ...", flush=True)
    result |= {"errors": check_steps(device, precision), "rows": [], "models": []}
    for shape in parsed:
        print(f"{shape} ...", flush=True)
        result["rows"].append(time_shape(shape, precision, device, repeats))
        results_file.write(result, path)
    for batch in BATCHES if model is not None else ():
        assert model is not None
        print(f"{model} model, batch {batch} ...", flush=True)
        result["models"].append(time_models(model, MODELS[model], batch, prompt, precision, device))
        results_file.write(result, path)
    _print(result)
    if plot is not None:
        plot.parent.mkdir(parents=True, exist_ok=True)
        _plot(result).savefig(plot, dpi=130)
    return result


def _triton_version() -> str:
    import triton

    return str(triton.__version__)


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    gpu = result["machine"].get("gpu", result["device"])
    table = Table(title=f"{result['dtype']} on {gpu}, torch {result['versions']['torch']}")
    columns = ("shape", "step ms", "softmax", "ratio", "prefill ms", "softmax", "ratio", "memory")
    for column in columns:
        table.add_column(column, no_wrap=True, justify="left" if column == "shape" else "right")
    for row in result["rows"]:
        cells = [row["shape"]]
        for part in ("step", "prefill"):
            cells += [f"{row[part][name]['median_ms']:.3g}" for name in ("path", "softmax")]
            cells.append(f"{row[part + '_ratio']:.2f}")
        table.add_row(*cells, f"{row['bytes_ratio']:.3f}")
    # Never narrower than the table, so that it can be read from a file.
    console = Console(width=max(100, Console().width))
    console.print(table)
    for row in result["models"]:
        others = "; ".join(f"{name} {row[name]:.0f}, ratio {row['path'] / row[name]:.2f}" for name in row["others"])
        setting = f"{row['model']} model, batch {row['batch']}, after {row['prompt']} tokens"
        console.print(f"{setting}: PaTH {row['path']:.0f} tokens/s; {others}")
        for name, reason in row["left_out"].items():
            console.print(f"  {name} left out: {reason}")


def _plot(result: dict[str, Any]) -> Any:
    """Ratios to plain keys and values, a group of bars for each shape."""
    from matplotlib.figure import Figure

    rows = result["rows"]
    figure = Figure(figsize=(1.6 + 1.8 * len(rows), 3.2), layout="constrained")
    axis = figure.subplots()
    parts = {"step_ratio": "step", "prefill_ratio": "prefill", "bytes_ratio": "memory"}
    for n, (part, title) in enumerate(parts.items()):
        bars = axis.bar([x + 0.27 * (n - 1) for x in range(len(rows))], [row[part] for row in rows], 0.25, label=title)
        axis.bar_label(bars, fmt="%.2f", fontsize=7)
    axis.axhline(1, color="black", lw=0.8)
    axis.set_xticks(range(len(rows)), [row["shape"] for row in rows], fontsize=8)
    axis.set_ylabel("times that of keys and values alone")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper right", ncols=3, fontsize=8, frameon=False)
    return figure
