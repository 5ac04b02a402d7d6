"""The cache on a GPU: its kernels in every dtype, steps in CUDA graphs, and what the host may do between them.

The oracle is the torch backend in float64 there, which test_path_attention.py holds to the definition. Tolerances are
those of test_cache.py: in half precision the error of softmax attention on the same q, k and v.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from path_attention import PathCache, path_attention
from path_attention.cache import CacheError

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

HALF_FACTOR = 1.5
# Of float32 kernels, whose products of many transitions have a few times the rounding of plain attention (3e-7).
FLOAT32_TOLERANCE = 5e-6


def make(
    length: int,
    *,
    batch: int = 1,
    query_heads: int = 2,
    heads: int = 2,
    dim: int = 64,
    value_dim: int | None = None,
    reflections: int | None = None,
    gate: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    beta: tuple[float, float] = (0.0, 2.0),
) -> dict[str, Tensor]:
    generator = torch.Generator("cuda").manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, length, *shape, generator=generator, device="cuda")

    steps = (heads,) if reflections is None else (reflections, heads)
    strength = torch.rand(batch, length, *steps, generator=generator, device="cuda")
    made = {
        "q": normal(query_heads, dim).to(dtype),
        "k": normal(heads, dim).to(dtype),
        "v": normal(heads, value_dim or dim).to(dtype),
        "w": torch.nn.functional.normalize(normal(*steps, dim), dim=-1),
        "beta": beta[0] + (beta[1] - beta[0]) * strength,
    }
    if gate:
        made["g"] = torch.nn.functional.logsigmoid(normal(query_heads) + 2)
    return made


def part(inputs: dict[str, Tensor], start: int, end: int) -> dict[str, Tensor]:
    return {name: x[:, start:end].contiguous() for name, x in inputs.items()}


def in_pieces(cache: PathCache, inputs: dict[str, Tensor], counts: Sequence[int]) -> Tensor:
    outs, start = [], 0
    for count in counts:
        outs.append(cache.attend(**part(inputs, start, start + count)))
        start += count
    return torch.cat(outs, 1)


def error(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact).norm() / exact.norm())


def exact_of(inputs: dict[str, Tensor]) -> Tensor:
    return path_attention(**{name: x.double() for name, x in inputs.items()}, backend="torch")


def allowed(inputs: dict[str, Tensor], last: int | None = None) -> float:
    """The error of softmax attention in the dtype of q, of the last so many rows."""
    if inputs["q"].dtype == torch.float32:
        return FLOAT32_TOLERANCE
    given = [inputs[name].transpose(1, 2) for name in "qkv"]
    keys = given[1].shape[2]
    last = last or keys
    given[0] = given[0][:, :, -last:]
    visible = torch.ones(last, keys, dtype=torch.bool, device="cuda").tril(keys - last)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = q.shape[1] != k.shape[1]
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, visible, enable_gqa=grouped)

    return HALF_FACTOR * error(attend(*given), attend(*(x.double() for x in given)))


# Together: every dtype and width of tile; grouped queries, gates, two reflections; chunks that are finished and
# suffixes; short calls of 1 to 16 tokens and longer ones; many rows a head.
CASES: dict[str, tuple[dict[str, Any], int | None, list[int]]] = {
    "bfloat16": ({"batch": 2, "query_heads": 4}, 128, [1000, *[1] * 40, 5, 16, 100, 1]),
    "gates, float16": ({"gate": True, "dtype": torch.float16}, 64, [600, *[1] * 40, 3]),
    "float32": ({"gate": True, "dtype": torch.float32, "dim": 32}, 64, [300, *[1] * 20, 7]),
    "128": ({"dim": 128, "query_heads": 8, "batch": 3}, None, [700, *[1] * 20, 16]),
    "256, two reflections": ({"dim": 256, "value_dim": 200, "reflections": 2}, 128, [300, *[1] * 20, 2]),
    "odd dims": ({"dim": 40, "value_dim": 24, "heads": 1, "query_heads": 3, "gate": True}, 64, [200, *[1] * 20, 4]),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_steps_equal_one_pass(case: tuple[dict[str, Any], int | None, list[int]]) -> None:
    options, chunk, counts = case
    inputs = make(sum(counts), **options)
    got = in_pieces(PathCache(chunk=chunk), inputs, counts)
    assert error(got, exact_of(inputs)) <= allowed(inputs)


# Prompts that the operator's own pass folds: whole chunks, an open one, a part of a page; in parts along sequences and
# heads. Dtypes, of which bfloat16 keys move by other products; one width of the operator's rows and two.
PROMPTS: dict[str, tuple[dict[str, Any], int | None]] = {
    "64": ({"batch": 3, "query_heads": 8, "length": 4955}, None),
    "64, float16, gates": ({"batch": 2, "gate": True, "dtype": torch.float16, "length": 700}, 128),
    "128, gates": ({"dim": 128, "heads": 4, "query_heads": 4, "gate": True, "length": 9001}, None),
    "odd dims": ({"dim": 40, "value_dim": 24, "heads": 1, "query_heads": 3, "length": 650}, 256),
}


@pytest.mark.parametrize("case", PROMPTS.values(), ids=PROMPTS.keys())
def test_prompts_folded_from_the_operators_pass(
    case: tuple[dict[str, Any], int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the fold that follows the operator where gradients are wanted; then in steps."""
    from path_attention.ops.engines import cuda
    from path_attention.ops.kernels import decode

    options, chunk = case
    monkeypatch.setattr(cuda, "PART", 160)
    calls: list[int] = []
    fold_spans = decode.fold_spans
    monkeypatch.setattr(decode, "fold_spans", lambda *x: (calls.append(1), fold_spans(*x)))
    inputs = make(**options)
    length = options["length"] - 3
    found, other = PathCache(chunk=chunk), PathCache(chunk=chunk)
    prompt = part(inputs, 0, length)
    out = found.attend(**prompt)
    assert calls
    calls.clear()
    wanted = other.attend(**{**prompt, "v": prompt["v"].requires_grad_()})
    assert not calls
    assert torch.equal(out, wanted.detach())
    a, b = found.state, other.state
    assert a.facts() == b.facts()
    whole = a.facts()[0][0] // a.chunk
    products = [torch.cat([x.products[x.chunks[:, :whole].long()], x.product[:, None]], 1) for x in (a, b)]
    torch.testing.assert_close(*products, rtol=0, atol=100 * 2.0**-22)
    with torch.no_grad():
        steps = [[x.attend(**part(inputs, t, t + 1)) for t in range(length, length + 3)] for x in (found, other)]
    exact = exact_of(inputs)[:, length:]
    errors = [error(torch.cat(x, 1), exact) for x in steps]
    print(f"error {errors[0]:.2e}, after the fold {errors[1]:.2e}, allowed {allowed(inputs, 3):.2e}")
    assert errors[0] <= allowed(inputs, 3)


def captured(
    cache: PathCache, like: dict[str, Tensor]
) -> tuple[Callable[[dict[str, Tensor]], Tensor], dict[str, Tensor]]:
    """A step as a CUDA graph: the function that replays it, and the buffers it reads."""
    buffers = {name: x.clone() for name, x in like.items()}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cache.attend(**buffers)

    def replay(tokens: dict[str, Tensor]) -> Tensor:
        for name, x in tokens.items():
            buffers[name].copy_(x)
        graph.replay()
        return out.clone()

    return replay


@torch.no_grad()
def test_steps_in_a_cuda_graph() -> None:
    """Captured once, right for every length: across folds, finished chunks, and to the end of the memory."""
    inputs = make(400, batch=2, query_heads=4, gate=True)
    cache = PathCache(chunk=64, capacity=400)
    outs = [cache.attend(**part(inputs, 0, 100)), cache.attend(**part(inputs, 100, 101))]  # compiles
    places = {name: x.data_ptr() for name, x in cache.state.tensors().items()}
    replay = captured(cache, part(inputs, 101, 102))
    outs += [replay(part(inputs, t, t + 1)) for t in range(101, 300)]
    cache.crop(5)
    outs = [*outs[:-5], *[replay(part(inputs, t, t + 1)) for t in range(295, 400)]]
    assert error(torch.cat(outs, 1), exact_of(inputs)) <= allowed(inputs)
    assert {name: x.data_ptr() for name, x in cache.state.tensors().items()} == places
    assert bool(replay(part(inputs, 0, 1)).isnan().all())
    with pytest.raises(CacheError, match="the cache is full"):
        assert cache.lengths
    assert cache.lengths == [400, 400]


@torch.no_grad()
def test_ten_thousand_steps_in_bfloat16() -> None:
    """beta = 2 keeps the length of every row, so that errors of the first keys are still there at the end."""
    length, last = 10_000, 256
    inputs = make(length, heads=2, beta=(2.0, 2.0))
    cache = PathCache(capacity=length)
    cache.attend(**part(inputs, 0, 1))
    cache.attend(**part(inputs, 1, 2))
    replay = captured(cache, part(inputs, 2, 3))
    outs = [replay(part(inputs, t, t + 1)) for t in range(2, length)][-last:]
    found = error(torch.cat(outs, 1), exact_of(inputs)[:, -last:])
    print(f"error {found:.2e}, allowed {allowed(inputs, last):.2e}")
    assert found <= allowed(inputs, last)


@torch.no_grad()
def test_131072_tokens_with_beta_2() -> None:
    """A prompt and some steps in bfloat16, against the same in float32."""
    length, last = 131_072, 8
    inputs = make(length, heads=1, query_heads=1, beta=(2.0, 2.0))
    cache = PathCache()
    cache.attend(**part(inputs, 0, length - last))
    outs = [cache.attend(**part(inputs, t, t + 1)) for t in range(length - last, length)]
    wide = {name: x.float() for name, x in inputs.items()}
    other = PathCache()
    other.attend(**part(wide, 0, length - last))
    expected = [other.attend(**part(wide, t, t + 1)) for t in range(length - last, length)]
    found = error(torch.cat(outs, 1), torch.cat(expected, 1).double())
    print(f"error {found:.2e}, memory {cache.nbytes() / (length * 64 * 4):.3f}")
    assert found <= allowed(inputs, last)


@torch.no_grad()
def test_the_host_does_not_wait_in_a_step() -> None:
    inputs = make(400, query_heads=4)
    cache = PathCache(chunk=64)
    in_pieces(cache, inputs, [100, *[1] * 100])  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for t in range(200, 400):  # new pages, finished chunks
            cache.attend(**{name: x[:, t : t + 1] for name, x in inputs.items()})
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
def test_sequences_of_different_lengths_that_share_pages() -> None:
    """Packed calls with none, one, some and many tokens; a prompt that all share; beams; what is taken back."""
    inputs = make(1000, query_heads=4, gate=True)
    lengths, new = [300, 20, 64, 0], [1, 0, 16, 70]
    starts = [0, 350, 500, 700]
    cache = PathCache(chunk=64)

    def packed(first: list[int], counts: list[int]) -> Tensor:
        at = torch.cat([torch.arange(s + f, s + f + c) for s, f, c in zip(starts, first, counts, strict=True)])
        ends = torch.tensor([0, *counts]).cumsum(0)
        return cache.attend(**{name: x[:, at.cuda()] for name, x in inputs.items()}, cu_seqlens=ends)

    packed([0] * 4, lengths)
    out = packed(lengths, new).split(new, 1)
    now = [a + b for a, b in zip(lengths, new, strict=True)]
    cache.select([3, 0, 0, 2])
    fork = cache.fork()
    order = [3, 0, 0, 2]
    rows = [torch.tensor([starts[r] + now[r] + t for r in order]).cuda() for t in range(20)]
    for one in (cache, fork):
        steps = [one.attend(**{name: x[0, at][:, None].contiguous() for name, x in inputs.items()}) for at in rows]
    for place, row in enumerate(order):
        whole = part(inputs, starts[row], starts[row] + now[row] + 20)
        got = torch.cat([out[row], torch.cat([x[place : place + 1] for x in steps], 1)], 1)
        assert error(got, exact_of(whole)[:, lengths[row] :]) <= allowed(inputs)
    cache.crop(3)
    again = [cache.attend(**{name: x[0, at][:, None].contiguous() for name, x in inputs.items()}) for at in rows[-3:]]
    assert error(torch.cat(again, 1), torch.cat(steps[-3:], 1).double()) <= 1e-2


@torch.no_grad()
def test_a_saved_cache_goes_on_and_moves_between_devices() -> None:
    inputs = make(300)
    cache = PathCache(chunk=64)
    in_pieces(cache, inputs, [280, 1, 1])
    loaded = PathCache.from_state_dict({name: x.cpu() for name, x in cache.state_dict().items()}).to("cuda")
    out = loaded.attend(**part(inputs, 282, 283))
    assert torch.equal(out, cache.attend(**part(inputs, 282, 283)))


def test_what_does_not_go_with_the_cache_is_named() -> None:
    inputs = make(40)
    cache = PathCache(chunk=64, capacity=64)
    cache.attend(**part(inputs, 0, 30))
    with pytest.raises(CacheError, match="q: got device cpu; wanted cuda:0"):
        cache.attend(**{name: x.cpu() for name, x in part(inputs, 30, 31).items()})
    with torch.no_grad(), pytest.raises(CacheError, match="more than 16 tokens"):
        captured(cache, make(20))
    grown = PathCache()
    grown.attend(**part(inputs, 0, 30))
    with torch.no_grad(), pytest.raises(CacheError, match="capacity: got None"):
        captured(grown, part(inputs, 30, 31))
    cache.attend(**part(inputs, 30, 31))


def model(mixer: str, **options: object) -> Any:
    pytest.importorskip("transformers")
    from path_attention.models import PaTHConfig, PaTHForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2}
    config = PaTHConfig(mixer=mixer, num_attention_heads=4, num_key_value_heads=2, **sizes, **options)
    return PaTHForCausalLM(config).cuda().eval()


@pytest.mark.parametrize("mixer", ["path", "path_fox"])
def test_generation_in_every_mode(mixer: str) -> None:
    """In float32, where a cache makes no other token the likeliest."""
    m = model(mixer)
    x = torch.randint(1, 61, (2, 150), generator=torch.Generator().manual_seed(1)).cuda()
    mask = torch.ones_like(x)
    mask[0, :30] = 0

    def tokens(**options: object) -> Tensor:
        return m.generate(x, attention_mask=mask, **{"max_new_tokens": 24, "do_sample": False, **options})

    expected = tokens(use_cache=False)
    assert torch.equal(tokens(), expected)
    assert torch.equal(tokens(cache_implementation="static", disable_compile=True), expected)
    assert torch.equal(tokens(prefill_chunk_size=40), expected)
    assert torch.equal(tokens(num_beams=3), tokens(num_beams=3, use_cache=False))
    one = m.generate(x[1:], max_new_tokens=24, do_sample=False, assistant_model=model(mixer))
    assert torch.equal(one, expected[1:])


def test_requests_in_a_running_batch() -> None:
    from path_attention.integrations import generate_batch

    m = model("path")
    x = torch.randint(1, 61, (4, 200), generator=torch.Generator().manual_seed(2)).tolist()
    beginning = x[0][:100]
    prompts = [beginning + row[:length] for row, length in zip(x, (3, 100, 1, 64), strict=True)]
    found: list[list[int]] = [[] for _ in prompts]
    for new in generate_batch(m, prompts, max_new_tokens=12, slots=2):
        found[new.request].append(new.token)
    for prompt, got in zip(prompts, found, strict=True):
        whole = m.generate(torch.tensor([prompt]).cuda(), max_new_tokens=12, do_sample=False, use_cache=False)
        assert got == whole[0, len(prompt) :].tolist()


@pytest.mark.slow
def test_compiled_generation() -> None:
    """generate() compiles steps of a static cache by itself, and torch puts them into CUDA graphs."""
    m = model("path")
    x = torch.randint(1, 61, (2, 90), generator=torch.Generator().manual_seed(1)).cuda()
    expected = m.generate(x, max_new_tokens=12, do_sample=False, use_cache=False)
    out = m.generate(x, max_new_tokens=12, do_sample=False, cache_implementation="static", disable_compile=False)
    assert torch.equal(out, expected)
