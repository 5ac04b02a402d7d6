"""How ``path-attention benchmark decode`` times: steps and prefills of one attention, tokens of whole models."""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from path_attention.benchmark.measure import Times, time_interleaved
from path_attention.benchmark.shapes import Shape, operands
from path_attention.cache import PathCache
from path_attention.ops import path_attention

# Time spent at most on repeats of one contender, and on a GPU on those of a prefill.
SECONDS_EACH = 30.0
GPU_SECONDS_EACH = 1.0
# Steps of one measurement in a CUDA graph: two folds of 16 tokens, so that each has its share of them.
STEPS = 32
# Tokens that a model makes while it is timed.
TOKENS = {"cpu": 32, "cuda": 64}
# Room in a static cache beside what is timed: steps before a graph is captured.
WARM_STEPS = 4


@torch.no_grad()
def time_shape(shape: Shape, dtype: torch.dtype, device: str, repeats: int) -> dict[str, Any]:
    """Times of step and prefill beside torch's attention, their ratios, and bytes of both caches."""
    on_gpu = device.startswith("cuda")
    given = operands(shape, shape.length, dtype, device)
    q, k, v = (x.transpose(1, 2).contiguous() for x in given[:3])
    attention = partial(torch.nn.functional.scaled_dot_product_attention, enable_gqa=shape.query_heads != shape.heads)
    prefills: dict[str, Callable[[], object]] = {
        "softmax": lambda: attention(q, k, v, is_causal=True),
        "path": lambda: PathCache().attend(*given),
    }
    if on_gpu:
        prefills["operator"] = lambda: path_attention(*given)  # what of it is attention
    times = {"prefill": _times(prefills, repeats, on_gpu)}
    cache = PathCache()
    cache.attend(*given)
    bytes_of = {"path": cache.nbytes(), "softmax": 2 * k.numel() * k.element_size()}
    token = operands(shape, 1, dtype, device, seed=1)
    one = token[0].transpose(1, 2)
    if on_gpu:
        del cache
        times["step"] = _time_graphs(
            {"softmax": lambda: attention(one, k, v)}, _fixed_cache(shape, given, repeats), token, repeats
        )
    else:
        steps: dict[str, Callable[[], object]] = {
            "softmax": lambda: attention(one, k, v),
            "path": lambda: cache.attend(*token),
        }
        times["step"] = _times(steps, repeats, on_gpu)  # the cache grows by the repeats, a few tokens
    row: dict[str, Any] = {"shape": str(shape), "bytes": bytes_of}
    row["bytes_ratio"] = bytes_of["path"] / bytes_of["softmax"]
    for part, found in times.items():
        row[part] = {name: asdict(x) for name, x in found.items()}
        row[f"{part}_ratio"] = found["path"].median_ms / found["softmax"].median_ms
    return row


def _fixed_cache(shape: Shape, given: list[Tensor], repeats: int) -> PathCache:
    """A cache of fixed memory with so many tokens that the timed steps have shape.length of them on average."""
    steps = (repeats + 1) * STEPS
    start = max(1, shape.length - steps // 2)
    cache = PathCache(capacity=start + steps + WARM_STEPS)
    cache.attend(*(x[:, :start] for x in given))
    return cache


def _times(functions: dict[str, Callable[[], object]], repeats: int, on_gpu: bool) -> dict[str, Times]:
    if not on_gpu:
        return time_interleaved(functions, repeats, SECONDS_EACH)
    ready = {name: _synchronized(function) for name, function in functions.items()}
    for function in ready.values():
        function()  # compiles
    return time_interleaved(ready, repeats, GPU_SECONDS_EACH)


def _synchronized(function: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        function()
        torch.cuda.synchronize()

    return run


def _capture(function: Callable[[], object], warm: int = WARM_STEPS // 2) -> torch.cuda.CUDAGraph:
    """The function as a CUDA graph, after some runs that compile what there is to compile."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def _milliseconds(graph: torch.cuda.CUDAGraph, steps: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(steps):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / steps


def _time_graphs(
    functions: dict[str, Callable[[], object]], cache: PathCache, token: list[Tensor], repeats: int
) -> dict[str, Times]:
    """A step of each, replayed STEPS times a measurement, in turn."""
    graphs = {name: _capture(function) for name, function in functions.items()}
    graphs["path"] = _capture(lambda: cache.attend(*token))
    found: dict[str, list[float]] = {name: [] for name in graphs}
    for graph in graphs.values():
        _milliseconds(graph, STEPS)
    for _ in range(repeats):
        for name, graph in graphs.items():
            found[name].append(_milliseconds(graph, STEPS) / 1e3)
    return {name: Times.of(seconds) for name, seconds in found.items()}


# --- whole models ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def time_models(
    name: str, sizes: dict[str, int], batch: int, prompt: int, dtype: torch.dtype, device: str
) -> dict[str, Any]:
    """Tokens a second after a prompt, of PaTH and RoPE models of one shape; on a GPU of transformers' Llama too.

    On a GPU a token is a CUDA graph over a static cache; elsewhere what generate() makes.
    """
    on_gpu = device.startswith("cuda")
    tokens = TOKENS["cuda" if on_gpu else "cpu"]
    row: dict[str, Any] = {"model": name, "batch": batch, "prompt": prompt, "tokens": tokens, "left_out": {}}
    contenders = ("path", "rope", "llama") if on_gpu else ("path", "rope")
    for contender in contenders:
        model = _build(contender, sizes, dtype, device)
        ids = torch.randint(1, model.config.vocab_size, (batch, prompt), device=device)
        try:
            seconds = _seconds_of_graph(model, ids, tokens) if on_gpu else _seconds_of_generate(model, ids, tokens)
        except Exception as error:
            if contender != "llama":
                raise
            row["left_out"][contender] = f"{type(error).__name__}: {error}".splitlines()[0]  # not ours to mend
        else:
            row[contender] = batch * tokens / seconds
        del model
        if on_gpu:
            torch.cuda.empty_cache()
    row["others"] = [x for x in contenders if x != "path" and x in row]
    row["ratio"] = row["path"] / row["rope"]
    return row


def _build(contender: str, sizes: dict[str, int], dtype: torch.dtype, device: str) -> Any:
    from path_attention.models import PaTHConfig, PaTHForCausalLM

    torch.manual_seed(0)
    config: Any = PaTHConfig(mixer="rope" if contender == "llama" else contender, **sizes)  # type: ignore[arg-type]
    kind: Any = PaTHForCausalLM
    if contender == "llama":
        from transformers import LlamaConfig, LlamaForCausalLM

        fields = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        same = {field: getattr(config, field) for field in (*fields, "num_key_value_heads", "max_position_embeddings")}
        config, kind = LlamaConfig(**same), LlamaForCausalLM
    with torch.device(device):
        return kind(config).to(dtype).eval()


class _Clock:
    """A streamer of generate() that notes when each token is there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _seconds_of_generate(model: Any, ids: Tensor, tokens: int) -> float:
    """From the first token, which the prefill makes, to the last."""
    clock = _Clock()
    model.generate(ids, min_new_tokens=tokens + 1, max_new_tokens=tokens + 1, do_sample=False, streamer=clock)
    _, first, *_, last = clock.times  # the prompt comes before all
    return last - first


def _seconds_of_graph(model: Any, ids: Tensor, tokens: int) -> float:
    """Median of three stretches of ``tokens`` greedy tokens, each token one replay."""
    from transformers import StaticCache

    room = ids.shape[1] + 4 * tokens + WARM_STEPS
    cache = StaticCache(config=model.config, max_cache_len=room)
    logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    token = logits[:, -1:].argmax(-1)

    def step() -> None:
        out = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token.copy_(out.logits[:, -1:].argmax(-1))

    graph = _capture(step)
    _milliseconds(graph, tokens)
    return statistics.median(_milliseconds(graph, tokens) * tokens / 1e3 for _ in range(3))
