"""The Triton kernels of a cache's step in Triton's interpreter, float32 and float16, against the definition.

Every case begins with a prefill in torch and goes on in kernels. bfloat16 is what the interpreter cannot do: on a GPU
tests/test_cache_cuda.py has it.
"""

import os
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from path_attention import PathCache, path_attention_reference
from path_attention.ops.history import serve
from path_attention.ops.history.state import PAGE, Tokens, decode_pages, decode_rows, slots
from tests.ops.inputs import Inputs, Shape, make_inputs, relative_error
from tests.ops.test_path_attention import softmax_attention

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs Triton's interpreter: on a GPU, test_cache_cuda.py runs the kernels", allow_module_level=True)

from path_attention.ops.kernels import decode

# Ten times the rounding of one float32 operation, for some hundred of them in a row.
FLOAT32_TOLERANCE = 1e-6
# As tests/test_cache.py has it.
HALF_FACTOR = 1.5


@pytest.fixture(autouse=True)
def kernels_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "DEVICES", {"cpu"})
    pieces = {width: replace(launch, programs=2) for width, launch in decode.LAUNCHES.items()}
    monkeypatch.setattr(decode, "LAUNCHES", pieces)  # of several pages, and not one for each


def inputs_of(shape: Shape, **options: object) -> Inputs:
    return {name: x.detach() for name, x in make_inputs(shape, side_dtype=torch.float32, **options).items()}


def part(inputs: Inputs, start: int, end: int) -> Inputs:
    return {name: x[:, start:end] for name, x in inputs.items()}


def in_pieces(cache: PathCache, inputs: Inputs, counts: Sequence[int]) -> Tensor:
    outs, start = [], 0
    for count in counts:
        outs.append(cache.attend(**part(inputs, start, start + count)))
        start += count
    return torch.cat(outs, 1)


def check(got: Tensor, inputs: Inputs) -> None:
    """Error against the definition, and in float16 against softmax attention's own."""
    wide = {name: x.double() for name, x in inputs.items()}
    error = relative_error(got, path_attention_reference(**wide)[:, : got.shape[1]])
    if got.dtype == torch.float32:
        assert error <= FLOAT32_TOLERANCE
        return
    plain = [x[name] for x in (inputs, wide) for name in "qkv"]
    assert error <= HALF_FACTOR * relative_error(softmax_attention(*plain[:3]), softmax_attention(*plain[3:]))


# A chunk is 64 tokens here, and the first fold after the prefill comes with the second or third step.
CASES = {
    "grouped queries": ({"length": 203, "batch": 2, "query_heads": 4, "heads": 2}, {}, [190, 1, 1, 1, 1, 5]),
    "gates, two reflections, odd dims": (
        {"length": 200, "query_heads": 3, "heads": 1, "dim": 24, "value_dim": 20, "reflections": 2},
        {"gated": True},
        [190, 1, 1, 1, 5],
    ),
    "finished chunks and suffixes": ({"length": 620, "query_heads": 1, "heads": 1}, {"gated": True}, [606, 1, 1, 1, 7]),
    "float16, a chunk is finished": (
        {"length": 218, "query_heads": 2, "heads": 1},
        {"dtype": torch.float16, "gated": True, "beta": "2"},
        [205, 1, 1, 1, 1, 1, 6],
    ),
    "wide": (
        {"length": 104, "query_heads": 1, "heads": 1, "dim": 128, "value_dim": 72},
        {"dtype": torch.float16},
        [95, 1, 1, 3],
    ),
    "many rows": ({"length": 136, "query_heads": 8, "heads": 1}, {}, [104, 16, 16]),
    "long calls": ({"length": 230, "query_heads": 2, "heads": 1}, {"gated": True}, [150, 60, 1, 1, 17]),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_steps_equal_the_definition(case: tuple[dict, dict, list[int]]) -> None:
    shape, options, counts = case
    inputs = inputs_of(Shape(**shape), **{"dtype": torch.float32, **options})
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN: none of it may be read
    try:
        got = in_pieces(PathCache(chunk=64), inputs, counts)
    finally:
        torch.use_deterministic_algorithms(False)
    check(got, part(inputs, 0, sum(counts)))


@pytest.mark.parametrize("beta", ["uniform", "2"])
@pytest.mark.parametrize("counts", [[300], [120, 100, 60, 20]], ids=["a prompt", "pieces that end anywhere"])
def test_prompts_are_folded_by_a_kernel(counts: list[int], beta: str) -> None:
    """Whole chunks, and chunks that are continued: the queries after them see what is left. Repeated w: ops/leaf.py."""
    shape = Shape(302, query_heads=2, heads=1, dim=24, value_dim=40)
    inputs = inputs_of(shape, gated=True, dtype=torch.float16, beta=beta)
    inputs["w"][:, 1:200:2] = inputs["w"][:, :200:2]
    check(in_pieces(PathCache(chunk=128), inputs, [*counts, 1, 1]), inputs)


@pytest.mark.parametrize("counts", [[211], [90, 121]], ids=["a prompt", "a chunk that goes on"])
def test_folded_prompts_have_the_state_of_the_torch_engine(counts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two float16 parts hold 22 bits: products are as exact as in float32 but for some hundred roundings, and keys but
    for the one to their pages. Launched for one chunk of one head after another, as prompts are whose pages do not all
    fit between the kernels.
    """
    inputs = inputs_of(Shape(211, batch=2, query_heads=2, heads=2, dim=16, value_dim=24), dtype=torch.float16)
    monkeypatch.setattr(decode, "FOLD_BYTES", 0)
    found = []
    for devices in ({"cpu"}, set()):
        monkeypatch.setattr(serve, "DEVICES", devices)
        cache = PathCache(chunk=128)
        in_pieces(cache, inputs, counts)
        found.append(cache.state)
    a, b = found
    assert a.facts() == b.facts() == [(192, 211)] * 2
    for name in ("product", "products"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=100 * 2.0**-22)
    where = [slots(x, slice(None), 0, 192) for x in found]
    assert torch.equal(a.values[:, where[0]], b.values[:, where[1]])
    finished, still_open = [], []
    for x, at in zip(found, where, strict=True):
        finished.append(decode_pages(x.keys[:, at[:, :128]], x.key_scale[:, at[:, :128:PAGE] // PAGE]))
        still_open.append(decode_rows(x.keys.view(torch.int16)[:, at[:, 128:]], x.scale[:, :, :64].transpose(0, 1)))
    # Both round, while the chunk is open to a 32767th of a key's largest number, at the end to 11 bits.
    for keys, bits in ((finished, 10), (still_open, 14)):
        torch.testing.assert_close(*keys, rtol=2.0**-bits, atol=float(keys[1].abs().max()) * 2.0**-14)


def test_more_open_tokens_than_a_tile() -> None:
    inputs = inputs_of(Shape(160, query_heads=1, heads=1), gated=True, dtype=torch.float32)
    cache = PathCache(chunk=64, rewind=60)
    check(in_pieces(cache, inputs, [155, 1, 1, 3]), inputs)
    assert cache.state.room > 64


def test_sequences_without_folded_tokens() -> None:
    """Each has one piece all the same, which attends to its open tokens; beside one of many pages."""
    inputs = inputs_of(Shape(90, batch=2, query_heads=2, heads=1), gated=True, dtype=torch.float32)
    cache = PathCache(chunk=64)
    cache.attend(**part(inputs, 0, 86))
    cache.crop([0, 86])
    again = {name: torch.cat([x[:1, 86:90], x[1:, :4]]) for name, x in inputs.items()}
    got = torch.cat([cache.attend(**part(again, t, t + 1)) for t in range(4)], 1)
    exact = path_attention_reference(**{name: x.double() for name, x in inputs.items()})
    assert relative_error(got, torch.cat([exact[:1, 86:90], exact[1:, :4]])) <= FLOAT32_TOLERANCE


def test_packed_calls_of_different_lengths() -> None:
    """No token, one, some, and more than a short call has, of sequences of different lengths."""
    shape = Shape(330, query_heads=2, heads=1, dim=8, value_dim=8)
    supply = inputs_of(shape, gated=True, dtype=torch.float32)
    before, new = [100, 30, 64, 7], [1, 0, 3, 20]
    starts = [0, 110, 160, 250]
    cache = PathCache(chunk=64)

    def packed(first: list[int], counts: list[int]) -> Tensor:
        at = torch.cat([torch.arange(s + f, s + f + c) for s, f, c in zip(starts, first, counts, strict=True)])
        ends = torch.tensor([0, *counts]).cumsum(0)
        return cache.attend(**{name: x[:, at] for name, x in supply.items()}, cu_seqlens=ends)

    packed([0] * 4, before)
    out = packed(before, new).split(new, 1)
    out_again = packed([a + b for a, b in zip(before, new, strict=True)], [1, 1, 1, 1]).split(1, 1)
    for row, start in enumerate(starts):
        whole = part(supply, start, start + before[row] + new[row] + 1)
        exact = path_attention_reference(**{name: x.double() for name, x in whole.items()})
        got = torch.cat([out[row], out_again[row]], 1)
        assert relative_error(got, exact[:, before[row] :]) <= FLOAT32_TOLERANCE


def test_taking_back_and_sharing() -> None:
    inputs = inputs_of(Shape(150, query_heads=1, heads=1), dtype=torch.float32)
    exact = path_attention_reference(**{name: x.double() for name, x in inputs.items()})
    cache = PathCache(chunk=64)
    cache.attend(**part(inputs, 0, 120))
    cache.attend(**part(inputs, 0, 4))
    cache.crop(4)
    cache.select([0, 0])
    fork = cache.fork()
    twice = {name: x.expand(2, *x.shape[1:]) for name, x in inputs.items()}
    for one in (cache, fork):
        got = torch.cat([one.attend(**part(twice, t, t + 1)) for t in range(120, 124)], 1)
        assert relative_error(got, exact[:, 120:124].expand_as(got)) <= FLOAT32_TOLERANCE
    cache.crop([0, 124 - 64])
    got = cache.attend(**{name: torch.cat([x[:, 124:126], x[:, 64:66]]) for name, x in inputs.items()})
    assert relative_error(got, torch.cat([exact[:, 124:126], exact[:, 64:66]])) <= FLOAT32_TOLERANCE


def tokens_of(inputs: Inputs) -> Tokens:
    w, beta = inputs["w"].unsqueeze(2), inputs["beta"].unsqueeze(2)
    return Tokens(*(inputs[x] for x in "qkv"), w, beta, inputs.get("g"), inputs["q"].shape[3] ** -0.5)


def test_a_step_without_room_leaves_its_sequence_as_it_was() -> None:
    """The host does not look where a step is replayed: results are NaN, the others go on, and the next look tells."""
    inputs = inputs_of(Shape(72, batch=2, query_heads=1, heads=1), gated=True, dtype=torch.float32)
    cache = PathCache(chunk=64, capacity=70)
    cache.attend(**part(inputs, 0, 70))
    cache.crop([0, 4])
    before = {name: x.clone() for name, x in cache.state.tensors().items()}
    out = decode.step(cache.state, tokens_of(part(inputs, 66, 68)), None, 2, 16, capacity=70)
    assert bool(out[0].isnan().all())
    assert bool(torch.isfinite(out[1]).all())
    for name in ("length", "folded", "k", "v", "w", "beta", "g", "product"):
        assert torch.equal(getattr(cache.state, name)[0], before[name][0]), name
    with pytest.raises(
        ValueError, match="q: got tokens of a replayed step behind 70; wanted 70 in all: the cache is full"
    ):
        cache.attend(**part(inputs, 68, 69))
    assert cache.lengths == [70, 68]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_state_is_that_of_the_torch_engine(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """After steps with a fold: what a cache was told by kernels, torch can go on with, and the other way round."""
    inputs = inputs_of(Shape(108, query_heads=2, heads=1), gated=True, dtype=dtype)
    found = []
    for devices in ({"cpu"}, set()):
        monkeypatch.setattr(serve, "DEVICES", devices)
        cache = PathCache(chunk=64)
        in_pieces(cache, inputs, [95, 1, 1])
        found.append((cache, cache.state))
    (kernel, a), (_, b) = found
    assert a.facts() == b.facts() == [(80, 97)]
    where = slots(a, slice(None), 64, 80)[0]
    for name in ("values", "gates"):
        torch.testing.assert_close(getattr(a, name)[:, where], getattr(b, name)[:, where])
    torch.testing.assert_close(a.product, b.product)
    keys = [x.keys[:, where] for x in (a, b)]
    if a.coded:
        keys = [decode_rows(k.view(torch.int16), x.scale[0, :, : 80 - 64]) for k, x in zip(keys, (a, b), strict=True)]
    torch.testing.assert_close(*keys, rtol=0, atol=float(keys[1].abs().max()) * 2**-14)
    monkeypatch.setattr(serve, "DEVICES", set())
    got = torch.cat([kernel.attend(**part(inputs, t, t + 1)) for t in range(97, 108)], 1)
    exact = path_attention_reference(**{name: x.double() for name, x in inputs.items()})[:, 97:]
    assert relative_error(got, exact) <= (FLOAT32_TOLERANCE if dtype == torch.float32 else 1e-3)
