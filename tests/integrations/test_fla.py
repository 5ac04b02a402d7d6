"""flash-linear-attention's function by our operator: its formula, its keys for decoding, and its modules patched."""

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from path_attention import path_attention_reference
from path_attention.integrations import fla
from tests.ops.inputs import Shape, make_inputs

SHAPES = [Shape(130, batch=2), Shape(200, query_heads=4, heads=2, dim=24, value_dim=20), Shape(1)]


def moved(k: Tensor, w: Tensor, beta: Tensor) -> Tensor:
    """Keys at the end of a sequence, one transition after another: what its decoding does to them token by token."""
    keys = k.clone()
    for t in range(1, k.shape[1]):
        along = (keys[:, :t] * w[:, t, None]).sum(-1, keepdim=True)
        keys[:, :t] -= beta[:, t, None, :, None] * along * w[:, t, None]
    return keys


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_scale_multiplies_the_gates_too(shape: Shape, gated: bool) -> None:
    inputs = make_inputs(shape, gated=gated)
    for x in inputs.values():
        x.requires_grad_()
    out, keys = fla.parallel_path_attn(**inputs, scale=0.3)
    assert keys is None
    given = {**inputs, "g": inputs["g"] * 0.3} if gated else inputs
    expected = path_attention_reference(**given, scale=0.3)
    d_out = torch.randn_like(out)
    zeros = {"allow_unused": True, "materialize_grads": True}  # one token meets no transition
    found = torch.autograd.grad(out, list(inputs.values()), d_out, **zeros)
    wanted = torch.autograd.grad(expected, list(inputs.values()), d_out, **zeros)
    for x, y in zip((out, *found), (expected, *wanted), strict=True):
        assert (x - y).norm() <= 1e-12 * (1 + y.norm())


@pytest.mark.parametrize("shape", SHAPES)
def test_keys_stand_at_the_end(shape: Shape) -> None:
    inputs = make_inputs(shape)
    _, keys = fla.parallel_path_attn(**inputs, use_cache=True)
    assert keys is not None
    expected = moved(inputs["k"], inputs["w"], inputs["beta"])
    assert (keys - expected).norm() <= 1e-12 * expected.norm()


def test_keys_of_packed_sequences_stand_at_their_own_ends() -> None:
    ends = [0, 1, 1, 70, 200]
    inputs = make_inputs(Shape(200))
    out, keys = fla.parallel_path_attn(**inputs, cu_seqlens=torch.tensor(ends), use_cache=True)
    assert keys is not None
    for first, last in ((0, 1), (1, 70), (70, 200)):
        own = {name: x[:, first:last] for name, x in inputs.items()}
        alone, keys_alone = fla.parallel_path_attn(**own, use_cache=True)
        torch.testing.assert_close(out[:, first:last], alone)
        torch.testing.assert_close(keys[:, first:last], keys_alone)


def test_a_step_of_decoding_goes_on_from_the_keys() -> None:
    """As its layer decodes: cached keys take the new token's transition, then plain attention."""
    inputs = make_inputs(Shape(90))
    before = {name: x[:, :-1] for name, x in inputs.items()}
    _, keys = fla.parallel_path_attn(**before, use_cache=True)
    assert keys is not None
    w, beta = inputs["w"][:, -1:], inputs["beta"][:, -1:]
    keys = keys - beta[..., None] * (keys * w).sum(-1, keepdim=True) * w
    keys = torch.cat([keys, inputs["k"][:, -1:]], 1)
    logits = torch.einsum("bhd,bjhd->bhj", inputs["q"][:, -1], keys) * inputs["q"].shape[-1] ** -0.5
    step = torch.einsum("bhj,bjhd->bhd", logits.softmax(-1), inputs["v"])
    out, _ = fla.parallel_path_attn(**inputs)
    torch.testing.assert_close(out[:, -1], step)


def test_patch_replaces_the_function_wherever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def theirs() -> None: ...

    for name in ("fla", "fla.layers", fla.LAYER, *fla.MODULES):
        module = ModuleType(name)
        if name not in ("fla", "fla.layers"):
            module.parallel_path_attn = theirs  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    fla.patch()
    fla.patch()
    for name in (fla.LAYER, *fla.MODULES):
        assert sys.modules[name].parallel_path_attn is fla.parallel_path_attn
        assert not hasattr(sys.modules[name], "parallel_path_attention")


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fla", "fla.layers", fla.LAYER):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    with pytest.raises(RuntimeError, match="wanted a version of flash-linear-attention"):
        fla.patch()
