"""The cache: for any schedule of calls, outputs are those of the definition on the whole sequence."""

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from path_attention import PathCache, path_attention, path_attention_reference
from path_attention.cache import CacheError, default_chunk
from path_attention.ops.history import Tokens
from path_attention.ops.history import state as history
from path_attention.ops.history.memory import Pool
from tests.ops.inputs import BETAS, FLOAT64_TOLERANCE, Inputs, Shape, make_inputs, relative_error
from tests.ops.test_path_attention import softmax_attention

# Two leaves: with 300 tokens chunks that are finished, open, and not yet begun.
CHUNK = 128


def inputs_of(shape: Shape, **options: object) -> Inputs:
    return {name: x.detach() for name, x in make_inputs(shape, **options).items()}


def part(inputs: Inputs, start: int, end: int) -> Inputs:
    return {name: x[:, start:end] for name, x in inputs.items()}


def in_pieces(cache: PathCache, inputs: Inputs, lengths: Sequence[int]) -> Tensor:
    outs, start = [], 0
    for length in lengths:
        outs.append(cache.attend(**part(inputs, start, start + length)))
        start += length
    return torch.cat(outs, 1)


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=FLOAT64_TOLERANCE, atol=FLOAT64_TOLERANCE)


# One call; steps alone; a prefill that ends inside a leaf, on a leaf, on a chunk; chunks over leaf and chunk
# boundaries; prefill of one token; a chunk that finishes two chunks at once.
SPLITS = {
    "one call": [300],
    "steps": [1] * 300,
    "prefill and steps": [150, *[1] * 150],
    "leaf, chunk, steps": [64, 64, *[1] * 172],
    "chunks": [7, 130, 63, 1, 99],
    "one token first": [1, 298, 1],
}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(
    "shape",
    [
        Shape(300, batch=2, query_heads=4, heads=2, dim=16, value_dim=16),
        Shape(300, query_heads=1, heads=1, dim=8, value_dim=12),
        Shape(300, query_heads=2, heads=1, dim=8, value_dim=8, reflections=2),
    ],
    ids=["grouped queries", "wider values", "two reflections"],
)
def test_any_split_equals_the_definition(shape: Shape, split: str, gated: bool) -> None:
    inputs = inputs_of(shape, gated=gated)
    cache = PathCache(chunk=CHUNK)
    close(in_pieces(cache, inputs, SPLITS[split]), path_attention_reference(**inputs))
    assert cache.lengths == [300] * shape.batch


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("rewind", [0, 1, 100])
def test_extreme_strengths_and_rewinds(beta: str, rewind: int) -> None:
    inputs = inputs_of(Shape(400, dim=8, value_dim=8), beta=beta)
    inputs["w"][:, 1::3] = inputs["w"][:, :-1:3]  # repeated directions
    cache = PathCache(chunk=64, rewind=rewind)
    close(in_pieces(cache, inputs, [130, *[1] * 270]), path_attention_reference(**inputs))


def test_scale_is_given_at_every_call() -> None:
    inputs = inputs_of(Shape(100, dim=8, value_dim=8))
    cache = PathCache(chunk=64)
    outs = [cache.attend(**part(inputs, a, b), scale=0.7) for a, b in ((0, 90), (90, 91), (91, 100))]
    close(torch.cat(outs, 1), path_attention_reference(**inputs, scale=0.7))


class Oracle:
    """What a cache should hold: the tokens of every sequence; and the definition of the newest of them."""

    def __init__(self, sequences: list[Inputs]) -> None:
        self.sequences = sequences

    def add(self, new: list[Inputs]) -> list[Tensor]:
        outs = []
        for row, tokens in enumerate(new):
            whole = {name: torch.cat([self.sequences[row][name], x], 1) for name, x in tokens.items()}
            self.sequences[row] = whole
            count = tokens["q"].shape[1]
            outs.append(path_attention_reference(**whole)[:, whole["q"].shape[1] - count :] if count else tokens["v"])
        return outs

    def crop(self, count: int) -> None:
        self.sequences = [part(x, 0, x["q"].shape[1] - count) for x in self.sequences]

    def select(self, index: list[int]) -> None:
        self.sequences = [dict(self.sequences[n]) for n in index]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_random_schedules(seed: int, gated: bool) -> None:
    """Prefill, chunk, step, crop, reorder, fork and saving in any order, with sequences of different lengths."""
    choose = random.Random(seed)
    shape = Shape(2000, query_heads=2, heads=1, dim=4, value_dim=4, reflections=2 if seed % 2 else None)
    supply = inputs_of(shape, gated=gated, seed=seed)
    position = 0

    def take(count: int) -> Inputs:
        nonlocal position
        position += count
        assert position <= shape.length
        return part(supply, position - count, position)

    batch = 3
    pairs = [(PathCache(chunk=64, rewind=20), Oracle([take(0) for _ in range(batch)]))]
    for _ in range(12):
        n = choose.randrange(len(pairs))
        cache, oracle = pairs[n]
        action = choose.choice(["pieces", "pieces", "step", "chunk", "crop", "select", "fork", "save"])
        if cache.is_empty:
            action = "pieces"
        if action == "pieces":
            new = [take(choose.choice([0, 1, 30, 70])) for _ in range(cache.batch_size or batch)]
            ends = torch.tensor([0] + [x["q"].shape[1] for x in new]).cumsum(0)
            if ends[-1] == 0:
                continue
            packed = {name: torch.cat([x[name] for x in new], 1) for name in supply}
            out = cache.attend(**packed, cu_seqlens=ends)
            close(out, torch.cat([x for x in oracle.add(new) if x.shape[1]], 1))
        elif action in ("step", "chunk"):
            new = [take(1 if action == "step" else 40) for _ in range(cache.batch_size)]
            out = cache.attend(**{name: torch.cat([x[name] for x in new]) for name in supply})
            close(out, torch.cat(oracle.add(new)))
        elif action == "crop":
            count = min(choose.randrange(21), *cache.lengths)
            # What a crop before this one took is no longer open.
            count = min([count, *(a - b for a, b in zip(cache.lengths, cache.state.folded.tolist(), strict=True))])
            cache.crop(count)
            oracle.crop(count)
        elif action == "select":
            index = [choose.randrange(cache.batch_size) for _ in range(3)]
            cache.select(index)
            oracle.select(index)
        elif action == "fork":
            copied = Oracle([dict(x) for x in oracle.sequences])
            pairs.append((cache.fork(), copied))
        else:
            pairs[n] = (PathCache.from_state_dict(cache.state_dict()), oracle)
    for cache, oracle in pairs:
        new = [take(1) for _ in range(cache.batch_size)]
        out = cache.attend(**{name: torch.cat([x[name] for x in new]) for name in supply})
        close(out, torch.cat(oracle.add(new)))


def finished_parts(cache: PathCache, chunks: int) -> dict[str, Tensor]:
    """All that is kept of the first finished chunks of sequence 0."""
    state, tokens = cache.state, chunks * cache.state.chunk
    slots, pages = history.slots(state, slice(0, 1), 0, tokens)[0], state.pages[0, : tokens // history.PAGE].long()
    found = {name: getattr(state, name)[:, slots] for name in ("keys", "values", "gates")}
    products = {name: getattr(state, name)[state.chunks[0, :chunks].long()] for name in ("products", "gate_totals")}
    return found | products | {"key_scale": state.key_scale[:, pages]}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_finished_chunks_are_never_modified_and_shared_by_forks(dtype: torch.dtype) -> None:
    side_dtype = torch.promote_types(dtype, torch.float32)
    inputs = inputs_of(Shape(700, dim=8, value_dim=8), gated=True, dtype=dtype, side_dtype=side_dtype)
    cache = PathCache(chunk=CHUNK)
    cache.attend(**part(inputs, 0, 300))
    assert int(cache.state.folded[0]) // CHUNK == 2
    before = finished_parts(cache, 2)
    fork = cache.fork()
    for one, start in ((cache, 300), (fork, 350)):
        for t in range(start, start + 200):
            one.attend(**part(inputs, t, t + 1))
    for one in (cache, fork):
        assert all(torch.equal(x, before[name]) for name, x in finished_parts(one, 2).items())
    shared = 2 * CHUNK // history.PAGE
    pages = [x.state.pages[0][x.state.pages[0] >= 0].tolist() for x in (cache, fork)]
    assert pages[0][:shared] == pages[1][:shared]
    assert set(pages[0][shared:]).isdisjoint(pages[1][shared:])
    used = sum(1 for uses in cache._pages.uses if uses)
    del fork, one
    assert sum(1 for uses in cache._pages.uses if uses) < used


def test_pages_are_copied_when_they_change_not_when_they_are_shared() -> None:
    """Beams that step together share all folded tokens until the next fold, and finished chunks after it."""
    inputs = inputs_of(Shape(200, dim=8, value_dim=8))
    cache = PathCache(chunk=CHUNK)
    cache.attend(**part(inputs, 0, 160))  # folds 144: one chunk, and 16 tokens of the next
    before = cache._pages.uses.copy()
    cache.select([0, 0, 0])
    assert [3 * uses for uses in before] == cache._pages.uses
    beams = {name: x.expand(3, *x.shape[1:]) for name, x in inputs.items()}
    for t in range(160, 200):
        close(cache.attend(**part(beams, t, t + 1)), path_attention_reference(**part(beams, 0, t + 1))[:, t:])
    tables = cache.state.pages[:, :3].tolist()
    assert tables[0][:2] == tables[1][:2] == tables[2][:2]
    assert len({row[2] for row in tables}) == 3


def test_crop_goes_back_to_any_recorded_token_and_to_finished_chunks() -> None:
    inputs = inputs_of(Shape(600, dim=8, value_dim=8))
    exact = path_attention_reference(**inputs)
    cache = PathCache(chunk=64, rewind=16)
    cache.attend(**part(inputs, 0, 300))
    cache.record()
    cache.attend(**part(inputs, 300, 500))
    cache.crop(190)
    close(cache.attend(**part(inputs, 310, 600)), exact[:, 310:])
    cache.crop(290)  # recorded since the last crop
    assert cache.lengths == [310]
    cache.crop(0)
    for t in range(310, 420):
        close(cache.attend(**part(inputs, t, t + 1)), exact[:, t : t + 1])
    cache.crop(110)
    cache.crop(310 - 128)
    assert cache.lengths == [128]
    close(cache.attend(**part(inputs, 128, 600)), exact[:, 128:])
    cache.crop(600)
    close(cache.attend(**inputs), exact)


def test_fixed_capacity_equals_growing_memory_and_never_moves() -> None:
    inputs = inputs_of(Shape(200, batch=2, dim=8, value_dim=8), gated=True)
    cache = PathCache(chunk=64, capacity=200)
    out = [cache.attend(**part(inputs, 0, 100))]
    places = {name: x.data_ptr() for name, x in cache.state.tensors().items()}
    out += [cache.attend(**part(inputs, t, t + 1)) for t in range(100, 200)]
    close(torch.cat(out, 1), path_attention_reference(**inputs))
    cache.select([1, 1])
    cache.crop(3)
    assert {name: x.data_ptr() for name, x in cache.state.tensors().items()} == places
    swapped = {name: x[[1, 1]] for name, x in inputs.items()}
    close(cache.attend(**part(swapped, 197, 200)), path_attention_reference(**swapped)[:, 197:])
    with pytest.raises(CacheError, match="q: got 1 tokens behind 200; wanted 200 in all: the cache is full"):
        cache.attend(**part(inputs, 0, 1))
    cache.reset()
    close(cache.attend(**inputs), path_attention_reference(**inputs))


def test_compiled_steps_in_one_graph() -> None:
    inputs = inputs_of(Shape(140, batch=2, dim=8, value_dim=8), gated=True)
    exact = path_attention_reference(**inputs)
    cache = PathCache(chunk=64, capacity=140)
    cache.attend(**part(inputs, 0, 60))
    torch.compiler.reset()
    step = torch.compile(lambda tokens: 1 * cache.attend(**tokens), fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for t in range(60, 140):
            close(step(part(inputs, t, t + 1)), exact[:, t : t + 1])
        with pytest.raises(ValueError, match="the cache is full"):
            step(part(inputs, 0, 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_nothing_unwritten_is_read(dtype: torch.dtype) -> None:
    """Fresh memory, which torch then fills with NaN, leaves no trace."""
    side_dtype = torch.promote_types(dtype, torch.float32)
    inputs = inputs_of(Shape(230, dim=8, value_dim=8), gated=True, dtype=dtype, side_dtype=side_dtype)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        out = in_pieces(PathCache(chunk=CHUNK), inputs, [100, *[1] * 80, 50])
    finally:
        torch.use_deterministic_algorithms(False)
    assert bool(torch.isfinite(out).all())


# Half precision: as tests/ops/test_precision.py has it, output against softmax attention's own error in that dtype.
HALF_FACTOR = 1.5


@pytest.mark.parametrize("beta", ["uniform", "2"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rounding_is_that_of_softmax_attention(dtype: torch.dtype, gated: bool, beta: str) -> None:
    inputs = inputs_of(Shape(513, dim=32, value_dim=32), gated=gated, beta=beta, dtype=dtype, side_dtype=torch.float32)
    wide = {name: x.double() for name, x in inputs.items()}
    exact = path_attention_reference(**wide)
    got = in_pieces(PathCache(chunk=CHUNK), inputs, [200, 113, *[1] * 200])
    assert got.dtype == dtype
    plain = [x[name] for x in (inputs, wide) for name in "qkv"]
    yardstick = relative_error(softmax_attention(*plain[:3]), softmax_attention(*plain[3:]))
    factor = HALF_FACTOR
    if dtype == torch.float32:
        yardstick, factor = max(yardstick, relative_error(path_attention_reference(**inputs), exact)), 4.0
    assert relative_error(got, exact) <= factor * yardstick


def test_near_parallel_reflections_do_not_drift() -> None:
    """Two a token with beta = 2 and 0.01 between them turn by 0.02, and the inverse of T is large (docs/numerics.md).

    Folds apply them one after another, so that what they lose does not add up: steps are as exact as one pass.
    """
    inputs = inputs_of(Shape(900, query_heads=1, heads=1, reflections=2), beta="2", dtype=torch.float32)
    w = inputs["w"]
    first = w[:, :1, :1]
    second = torch.nn.functional.normalize(first + 0.01 * w[:, 1:2, :1], dim=-1)
    inputs["w"] = torch.cat([first, second], 2).expand_as(w).contiguous()
    exact = path_attention(**{name: x.double() for name, x in inputs.items()})
    got = in_pieces(PathCache(chunk=CHUNK), inputs, [64, *[1] * 836])
    assert relative_error(got, exact) <= 2 * relative_error(path_attention(**inputs), exact)


@pytest.mark.slow
def test_ten_thousand_steps_in_bfloat16() -> None:
    """The last tokens of 10,000 single steps against the definition, to which nothing was rounded on the way.

    beta = 2 keeps the length of every row, so that errors of the first keys are still there at the end.
    """
    length, last = 10_000, 64
    shape = Shape(length, query_heads=1, heads=1, dim=16, value_dim=16)
    inputs = inputs_of(shape, beta="2", dtype=torch.bfloat16, side_dtype=torch.float32)
    wide = {name: x.double() for name, x in inputs.items()}
    exact = path_attention(**wide)[:, -last:]  # equal to the definition within 1e-11, and not quadratic in memory
    got = in_pieces(PathCache(), inputs, [1] * length)[:, -last:]
    plain = [x[name] for x in (inputs, wide) for name in "qkv"]
    yardstick = relative_error(softmax_attention(*plain[:3])[:, -last:], softmax_attention(*plain[3:])[:, -last:])
    # Softmax attention rounds its weights and its output; a cache its output and, less, its keys.
    assert relative_error(got, exact) <= yardstick


# PathCache.nbytes() over the bytes of keys and values, one bfloat16 sequence of one head: 1/32 for the products, half a
# page, and what a sequence takes once: places for 48 open tokens of twice the memory of a folded one, P of the open
# chunk (D tokens) and the scales of its keys (32), some 190 tokens at D = 64 and 260 at 128.
@pytest.mark.parametrize("length, ratio", [(4096, 1.07), (8192, 1.06), (32768, 1.05)])
@pytest.mark.parametrize("dim", [64, 128])
def test_memory(dim: int, length: int, ratio: float) -> None:
    zeros = torch.zeros(1, 1, 1, dim, dtype=torch.bfloat16)
    for last in (0, default_chunk(dim) // 2 + 1):  # behind finished chunks, and with half a chunk open
        cache = PathCache()
        cache._reserve(_tokens(zeros), [length + last])
        assert cache.nbytes() <= ratio * (length + last) * 2 * dim * 2


@pytest.mark.parametrize("dim", [64, 128])
def test_memory_as_it_grows(dim: int) -> None:
    """Tokens one by one: room that is not used yet is bounded too."""
    zeros, cache = torch.zeros(1, 1, 1, dim, dtype=torch.bfloat16), PathCache()
    cache._reserve(_tokens(zeros), [8192 - 1])
    cache._known = [(8192 - 32, 8192 - 1)]
    for length in range(8192, 16384, 16):
        cache._known = [(length - 32, length - 1)]
        cache._reserve(_tokens(zeros), [1])
        assert cache.nbytes() <= 1.08 * length * 2 * dim * 2  # 1.6 % of it not used yet


def test_a_call_makes_memory_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For all sequences: growing copies what is there, and once for each would make a prefill quadratic in them."""
    grown: list[int] = []
    grow = Pool._grow
    monkeypatch.setattr(Pool, "_grow", lambda pool, more: (grown.append(more), grow(pool, more)))
    cache = PathCache(chunk=64)
    inputs = inputs_of(Shape(180, batch=5, dim=8, value_dim=8))
    cache.attend(**inputs)
    assert grown == [5 * 3, 5 * 2]  # pages and chunks


def _tokens(x: Tensor) -> Tokens:
    return Tokens(x, x, x, x.float()[:, :, None], x[..., 0].float()[:, :, None], None, 1.0)


def test_prefill_is_differentiable_and_later_calls_say_that_they_are_not() -> None:
    leaves = make_inputs(Shape(70, dim=8, value_dim=8))
    cache = PathCache(chunk=64)
    out = cache.attend(**leaves)
    out.sum().backward()
    assert leaves["w"].grad is not None
    with pytest.raises(CacheError, match="q: got tensors that want gradients"):
        cache.attend(**part(leaves, 0, 1))


def test_what_does_not_go_with_the_cache_is_named_and_leaves_it_unharmed() -> None:
    shape = Shape(90, batch=2, query_heads=4, heads=2, dim=8, value_dim=8)
    inputs, gated = inputs_of(shape), inputs_of(shape, gated=True)
    cache = PathCache(chunk=64, rewind=4)
    cache.attend(**part(inputs, 0, 80))
    new = part(inputs, 80, 81)
    one = {name: x[:1] for name, x in new.items()}
    single = {name: x.float() for name, x in new.items()}
    meta = {name: x.to("meta") for name, x in new.items()}
    fewer = inputs_of(Shape(1, batch=2, query_heads=4, heads=4, dim=8, value_dim=8))
    wider = inputs_of(Shape(1, batch=2, query_heads=4, heads=2, dim=8, value_dim=9))
    twice = inputs_of(Shape(1, batch=2, query_heads=4, heads=2, dim=8, value_dim=8, reflections=2))
    before = {name: x.clone() for name, x in cache.state.tensors().items()}
    for tokens, message in (
        (one, "q: got tokens of 1 sequences; wanted 2"),
        (single, "q: got dtype torch.float32; wanted torch.float64"),
        (meta, "q: got device meta; wanted cpu"),
        (fewer, "k: got 4 heads of 8; wanted 2 heads of 8"),
        (wider, "v: got value_dim 9; wanted 8"),
        (twice, "w: got 2 reflections a token; wanted 1"),
        (part(gated, 80, 81), "g: got gates of 4 query heads; wanted None"),
    ):
        with pytest.raises(CacheError, match=message):
            cache.attend(**tokens)
    for count, message in (
        (81, "count: got 81; wanted 0 to 80"),
        (-1, "count: got -1"),
        (40, "count: got 40 of 80 tokens; wanted at most 16, or a multiple of 64 left"),
        ([1], "count: got 1 numbers; wanted 2"),
    ):
        with pytest.raises(CacheError, match=message):
            cache.crop(count)
    with pytest.raises(CacheError, match="index: got"):
        cache.select([2, 0])
    assert all(torch.equal(x, before[name]) for name, x in cache.state.tensors().items())
    close(cache.attend(**part(inputs, 80, 90)), path_attention_reference(**inputs)[:, 80:])
    for options, message in (({"chunk": 100}, "chunk"), ({"rewind": -1}, "rewind"), ({"capacity": 0}, "capacity")):
        with pytest.raises(CacheError, match=f"{message}: got"):
            PathCache(**options)
    fixed = PathCache(chunk=64, capacity=90)
    fixed.attend(**part(inputs, 0, 80))
    with pytest.raises(CacheError, match="capacity: got 90; wanted None"):
        fixed.fork()
    with pytest.raises(CacheError, match="index: got 1 sequences; wanted 2"):
        fixed.select([0])
    with pytest.raises(CacheError, match="saved: got no settings"):
        PathCache.from_state_dict({})
