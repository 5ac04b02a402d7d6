"""A cache filled from the operator's own pass, in Triton's interpreter and float16, against one filled by the fold of a
prompt (test_decode.py), and its steps against the definition. On a GPU, tests/test_cache_cuda.py has bfloat16.
"""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from path_attention import PathCache, path_attention_reference
from path_attention.ops.history import serve
from path_attention.ops.history.state import PAGE, State, decode_pages, decode_rows, slots
from tests.ops.inputs import Inputs, Shape, relative_error
from tests.ops.test_path_attention import softmax_attention

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs Triton's interpreter: on a GPU, test_cache_cuda.py runs the kernels", allow_module_level=True)

from path_attention.ops.engines import cuda
from path_attention.ops.kernels import decode
from tests.ops.kernels.test_decode import in_pieces, inputs_of, part

# Output and steps go by float16 products of float16 operands: twice softmax attention's error, as test_engine.py has
# it where beta is 2, which the steps do not reach with either fold.
HALF_FACTOR = 2.0


@pytest.fixture(autouse=True)
def kernels_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "DEVICES", {"cpu"})


def prefilled(cache: PathCache, prompt: Inputs, monkeypatch: pytest.MonkeyPatch, engine: str) -> Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(serve, "choose", lambda *_, **__: engine)
        return cache.attend(**prompt)


def keys_of(state: State, due: int) -> tuple[Tensor, Tensor]:
    """(H, B, tokens, D): of finished chunks, and of the open one."""
    where, whole = slots(state, slice(None), 0, due), due // state.chunk * state.chunk
    finished, still_open = where[:, :whole], where[:, whole:]
    scales = state.key_scale[:, finished[:, ::PAGE] // PAGE], state.scale[:, :, : due - whole].transpose(0, 1)
    codes = state.keys[:, finished], state.keys.view(torch.int16)[:, still_open]
    return decode_pages(codes[0], scales[0]) if whole else codes[0].float(), decode_rows(codes[1], scales[1])


def check_states(a: State, b: State, due: int) -> None:
    """The same cache, but for float16 keys at the edges of leaves, and products of 22 bits in another order."""
    assert a.facts() == b.facts()
    assert a.facts()[0][0] == due
    finished, still_open = due // a.chunk, due % a.chunk
    if finished:
        where = a.chunks[:, :finished].long(), b.chunks[:, :finished].long()
        torch.testing.assert_close(a.products[where[0]], b.products[where[1]], rtol=0, atol=100 * 2.0**-22)
        torch.testing.assert_close(a.gate_totals[where[0]], b.gate_totals[where[1]])
    if still_open:
        torch.testing.assert_close(a.product, b.product, rtol=0, atol=100 * 2.0**-22)
        torch.testing.assert_close(a.gate_total, b.gate_total)
    where = [slots(x, slice(None), 0, due) for x in (a, b)]
    for name in ("values", "gates"):
        got, wanted = (getattr(x, name)[:, at] for x, at in zip((a, b), where, strict=True))
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=0 if name == "values" else 1e-5)
    for name in ("k", "v", "w", "beta", "g"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    for got, wanted in zip(keys_of(a, due), keys_of(b, due), strict=True):
        if wanted.numel():
            # Rounded to 11 bits at the leaf's edge, and where the chunk is finished again.
            torch.testing.assert_close(got, wanted, rtol=0, atol=float(wanted.abs().max()) * 1.5 * 2.0**-11)
            assert relative_error(got, wanted.double()) <= 0.5 * 2.0**-11


# Prompt, folded tokens of it. Chunks are 256 tokens: whole ones, a whole one and an open one of three leaves and a
# quarter, one that ends with the folded tokens, a page or less of an open one, a rest that keeps its last page open.
LENGTHS = {
    "whole leaves and a part of one": (490, 464),
    "chunk ends with the folded tokens": (273, 256),
    "chunk ends with the prompt": (256, 240),
    "one token past a chunk": (257, 240),
    "a chunk begun": (297, 272),
    "whole leaves": (213, 192),
    "less than a leaf": (33, 16),
}


@pytest.mark.parametrize("length, due", LENGTHS.values(), ids=LENGTHS.keys())
def test_the_state_is_that_of_the_fold(length: int, due: int, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = inputs_of(Shape(length, query_heads=1, heads=1, dim=16, value_dim=24), dtype=torch.float16)
    found = []
    for engine in ("triton", "torch"):
        cache = PathCache(chunk=256)
        prefilled(cache, prompt, monkeypatch, engine)
        found.append(cache.state)
    check_states(*found, due)


# Leaves times key heads of a part, and what else there is.
CASES: dict[str, tuple[int, int, dict[str, Any], dict[str, Any]]] = {
    "a head a part, groups, gates": (4, 128, {"length": 232, "batch": 2, "query_heads": 4}, {"gated": True}),
    "a sequence a part": (6, 64, {"length": 150, "batch": 2, "query_heads": 2, "dim": 24, "value_dim": 40}, {}),
    "beta 2, repeated w": (100, 256, {"length": 492, "query_heads": 1, "heads": 1, "dim": 24}, {"beta": "2"}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_prompts_and_steps_equal_the_definition(
    case: tuple[int, int, dict[str, Any], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    size, chunk, shape, options = case
    monkeypatch.setattr(cuda, "PART", size)
    inputs = inputs_of(Shape(**shape), dtype=torch.float16, **options)
    if options.get("beta") == "2":
        inputs["w"][:, 1:200:2] = inputs["w"][:, :200:2]
    length = shape["length"] - 2
    caches = {engine: PathCache(chunk=chunk) for engine in ("triton", "torch")}
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN: none of it may be read
    try:
        outs = {name: prefilled(x, part(inputs, 0, length), monkeypatch, name) for name, x in caches.items()}
        check_states(*(x.state for x in caches.values()), (length - 16) // 16 * 16)
        steps = [caches["triton"].attend(**part(inputs, t, t + 1)) for t in range(length, length + 2)]
    finally:
        torch.use_deterministic_algorithms(False)
    wide = {name: x.double() for name, x in inputs.items()}
    exact = path_attention_reference(**wide)
    plain = [x[name] for x in (inputs, wide) for name in "qkv"]
    allowed = HALF_FACTOR * relative_error(softmax_attention(*plain[:3]), softmax_attention(*plain[3:]))
    assert relative_error(outs["triton"], exact[:, :length]) <= allowed
    assert relative_error(torch.cat(steps, 1), exact[:, length:]) <= allowed


def test_what_is_left_to_the_operator_and_the_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients, packed rows, a chunk that ends with the sequence: as good, and in two."""
    inputs = inputs_of(Shape(128, query_heads=1, heads=1), dtype=torch.float16)

    def refuse(*_: object) -> None:
        raise AssertionError("folded from the operator's pass")

    monkeypatch.setattr(decode, "fold_spans", refuse)
    with pytest.raises(AssertionError, match="folded from"):
        prefilled(PathCache(chunk=64), inputs, monkeypatch, "triton")
    plain = in_pieces(PathCache(chunk=64), inputs, [128])
    ends = torch.tensor([0, 128])
    wants = {**inputs, "v": inputs["v"].clone().requires_grad_()}
    for cache, given in (
        (PathCache(chunk=64, rewind=0), inputs),
        (PathCache(chunk=64), {**inputs, "cu_seqlens": ends}),
        (PathCache(chunk=64), wants),
    ):
        out = prefilled(cache, given, monkeypatch, "triton")
        assert out.requires_grad == (given is wants)
        torch.testing.assert_close(out, plain)


def test_a_prompt_that_is_recorded_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it may be taken back, as of the caches that transformers records from the first token on."""
    inputs = inputs_of(Shape(100, heads=1, query_heads=1, dim=16, value_dim=16), dtype=torch.float16)
    cache = PathCache()
    cache.record()
    prefilled(cache, part(inputs, 0, 70), monkeypatch, "triton")
    assert cache.state.facts() == [(0, 70)]
    cache.attend(**part(inputs, 70, 75))
    cache.crop(40)
    out = cache.attend(**part(inputs, 35, 45))
    exact = path_attention_reference(**{name: x[:, :45].double() for name, x in inputs.items()})
    assert relative_error(out, exact[:, 35:]) <= 2e-3
