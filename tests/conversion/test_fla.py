"""flash-linear-attention's PaTH models: the same function here, by its formulas written out, and by itself where it is
installed.

What differs from the paper: the logits and the sum of the log gates are scaled together by 1 / sqrt(D), and w is
divided by sqrt(|w|^2 + 1e-6).
"""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from path_attention.conversion import translate
from path_attention.models import PaTHForCausalLM
from tests.conversion.teachers import ids

LAYERS, HIDDEN, HEADS, VOCABULARY, INNER = 2, 32, 4, 50, 256

# Gates and grouped keys; low rank and full; with the convolution and without.
VARIANTS = list(itertools.product((False, True), (True, False), (True, False), (4, 2)))


def config(gate: bool, low_rank: bool, convolution: bool, kv_heads: int) -> dict[str, Any]:
    """config.json as flash-linear-attention 0.6.0 writes it, in what matters."""
    return {
        "architectures": ["PaTHAttentionForCausalLM"],
        "model_type": "path_attn",
        "attnres_block_size": None,
        "hidden_act": "swish",
        "hidden_ratio": 4,
        "hidden_size": HIDDEN,
        "intermediate_size": None,  # 2 / 3 * 4 * 32 = 85, and up to a multiple of 256
        "norm_eps": 1e-6,
        "num_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_kv_heads": kv_heads,
        "tie_word_embeddings": False,
        "use_forget_gate": gate,
        "use_low_rank_w": low_rank,
        "use_w_shortconv": convolution,
        "vocab_size": VOCABULARY,
    }


def weights(settings: dict[str, Any]) -> dict[str, Tensor]:
    """Random weights by flash-linear-attention's names. Projections of w are small, as they begin there, so that what
    is added to |w|^2 can be seen.
    """
    torch.manual_seed(0)
    kv = settings["num_kv_heads"] * HIDDEN // HEADS
    state = {"model.embeddings.weight": torch.randn(VOCABULARY, HIDDEN), "model.norm.weight": 1 + torch.rand(HIDDEN)}
    state["lm_head.weight"] = torch.randn(VOCABULARY, HIDDEN) / 8
    for n in range(LAYERS):
        layer = {
            "attn_norm.weight": 1 + torch.rand(HIDDEN),
            "mlp_norm.weight": 1 + torch.rand(HIDDEN),
            "attn.q_proj.weight": torch.randn(HIDDEN, HIDDEN) / 4,
            "attn.k_proj.weight": torch.randn(kv, HIDDEN) / 4,
            "attn.v_proj.weight": torch.randn(kv, HIDDEN) / 4,
            "attn.o_proj.weight": torch.randn(HIDDEN, HIDDEN) / 4,
            "attn.bt_proj.weight": torch.randn(kv * HEADS // HIDDEN, HIDDEN) / 4,
            "attn.bt_proj.bias": torch.randn(kv * HEADS // HIDDEN),
            "mlp.gate_proj.weight": torch.randn(INNER, HIDDEN) / 4,
            "mlp.up_proj.weight": torch.randn(INNER, HIDDEN) / 4,
            "mlp.down_proj.weight": torch.randn(HIDDEN, INNER) / 16,
        }
        if settings["use_low_rank_w"]:
            layer["attn.w_proj.0.weight"] = 0.02 * torch.randn(32, HIDDEN)
            layer["attn.w_proj.1.weight"] = 0.02 * torch.randn(kv, 32)
        else:
            layer["attn.w_proj.weight"] = 0.002 * torch.randn(kv, HIDDEN)
        if settings["use_w_shortconv"]:
            layer["attn.w_conv1d.weight"] = torch.randn(kv, 1, 3) / 2
        if settings["use_forget_gate"]:
            layer["attn.g_proj.weight"] = torch.randn(HEADS, HIDDEN) / 4
            layer["attn.g_proj.bias"] = torch.randn(HEADS)
        state |= {f"model.layers.{n}.{name}": tensor for name, tensor in layer.items()}
    return state


def saved(settings: dict[str, Any], state: dict[str, Tensor], folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def attention(x: Tensor, p: dict[str, Tensor], convolution: bool) -> Tensor:
    """One sequence (L, C), logit by logit, in float64."""
    length, dim = len(x), HIDDEN // HEADS
    w = x @ p["w_proj.weight"].T if "w_proj.weight" in p else x @ p["w_proj.0.weight"].T @ p["w_proj.1.weight"].T
    if convolution:
        taps = p["w_conv1d.weight"].squeeze(1)
        before = F.pad(w, (0, 0, 2, 0))
        w = F.silu(sum(taps[:, back] * before[back : back + length] for back in range(3)))  # type: ignore[arg-type]
    q, k, v, w = (y.unflatten(1, (-1, dim)) for y in (*(x @ p[f"{n}_proj.weight"].T for n in "qkv"), w))
    w = w / (w.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    beta = 2 * torch.sigmoid(x @ p["bt_proj.weight"].T + p["bt_proj.bias"])
    gates = torch.zeros(length, HEADS, dtype=x.dtype)
    if "g_proj.weight" in p:
        gates = torch.log(torch.sigmoid(x @ p["g_proj.weight"].T + p["g_proj.bias"]))
    out = torch.zeros(length, HEADS, dim, dtype=x.dtype)
    for head in range(HEADS):
        key_head = head * k.shape[1] // HEADS
        for i in range(length):
            row, logits = q[i, head].clone(), torch.full((length,), -torch.inf, dtype=x.dtype)
            for j in range(i, -1, -1):  # row is q_i H_i ... H_{j+1}
                logits[j] = (row @ k[j, key_head] + gates[j + 1 : i + 1, head].sum()) * dim**-0.5
                row = row - beta[j, key_head] * (row @ w[j, key_head]) * w[j, key_head]
            out[i, head] = logits.softmax(0) @ v[:, key_head]
    return out.flatten(1) @ p["o_proj.weight"].T


def logits(settings: dict[str, Any], state: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """The whole model, (B, L, V) float64."""
    state = {name: tensor.double() for name, tensor in state.items()}
    rows = []
    for row in tokens:
        x = state["model.embeddings.weight"][row]
        for n in range(LAYERS):
            layer = {k.removeprefix(f"model.layers.{n}."): y for k, y in state.items()}
            own = {k.removeprefix("attn."): y for k, y in layer.items() if k.startswith("attn.")}
            x = x + attention(norm(x, layer["attn_norm.weight"]), own, settings["use_w_shortconv"])
            y = norm(x, layer["mlp_norm.weight"])
            y = F.silu(y @ layer["mlp.gate_proj.weight"].T) * (y @ layer["mlp.up_proj.weight"].T)
            x = x + y @ layer["mlp.down_proj.weight"].T
        rows.append(norm(x, state["model.norm.weight"]) @ state["lm_head.weight"].T)
    return torch.stack(rows)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_same_function_and_back(variant: tuple[bool, bool, bool, int], tmp_path: Path) -> None:
    settings = config(*variant)
    state = weights(settings)
    source = saved(settings, state, tmp_path / "fla")
    translate(source, tmp_path / "ours")
    model = PaTHForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float64).eval()
    tokens = ids(1, 24)
    expected = logits(settings, state, tokens)
    # Both in float64, whose rounding leaves twelve digits after two layers.
    torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-10)
    back = translate(tmp_path / "ours", tmp_path / "back", to="path_attn")
    again = load_file(back / "model.safetensors")
    assert again.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.items())
    written = json.loads((back / "config.json").read_text())
    assert written["intermediate_size"] == INNER
    said = settings.keys() - {"attnres_block_size", "hidden_ratio", "intermediate_size"}
    assert {name: written[name] for name in said} == {name: settings[name] for name in said}


@torch.no_grad()
def test_the_conventions_matter(tmp_path: Path) -> None:
    """Read as the paper's, these weights would be another model: what the two fields of the configuration are for."""
    settings = config(True, True, True, 4)
    state = weights(settings)
    translate(saved(settings, state, tmp_path / "fla"), tmp_path / "ours")
    expected = logits(settings, state, ids(1, 24))
    for other in ({"w_norm_eps": 0.0}, {"scale_gate": False}):
        model = PaTHForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float64, **other).eval()
        assert (model(ids(1, 24)).logits - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    "change, message",
    [
        ({"attnres_block_size": 4}, "attnres_block_size: got 4"),
        ({"hidden_act": "powlu"}, "hidden_act: got 'powlu'"),
    ],
)
def test_what_we_do_not_have_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    settings = config(False, True, True, 4)
    source = saved(settings | change, weights(settings), tmp_path / "fla")
    with pytest.raises(ValueError, match=message):
        translate(source, tmp_path / "ours")


def test_a_bias_of_the_convolution_is_named(tmp_path: Path) -> None:
    settings = config(False, True, True, 4)
    bias = {"model.layers.1.attn.w_conv1d.bias": torch.zeros(HIDDEN)}
    source = saved(settings, weights(settings) | bias, tmp_path / "fla")
    with pytest.raises(ValueError, match=r"got tensor model\.layers\.1\.attn\.w_conv1d\.bias, which a path_attn"):
        translate(source, tmp_path / "ours")


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_against_flash_linear_attention_itself(
    variant: tuple[bool, bool, bool, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its classes and its own reference of attention, with its small kernels in Triton's interpreter."""
    pytest.importorskip("fla", reason="flash-linear-attention is not installed")
    from fla.layers import path_attn
    from fla.models.path_attn import PaTHAttentionConfig, PaTHAttentionForCausalLM
    from fla.ops.path_attn.naive import naive_path_attn
    from triton.runtime.autotuner import Autotuner

    def reference(q: Tensor, k: Tensor, v: Tensor, w: Tensor, beta: Tensor, g: Tensor | None, **_: Any) -> Any:
        gates = torch.zeros(q.shape[:3]) if g is None else g
        return naive_path_attn(q, k, v, w, beta, gates, q.shape[-1] ** -0.5, chunk_size=16), None

    def first(call: Any, quantiles: Any = None) -> list[float]:  # there is nothing to time
        call()
        return [1.0, 1.0, 1.0]

    monkeypatch.setattr(path_attn, "parallel_path_attn", reference)
    monkeypatch.setattr(Autotuner, "do_bench", property(lambda self: first))
    settings = config(*variant)
    source = saved(settings, weights(settings), tmp_path / "fla")
    plain = {"fuse_norm": False, "fuse_swiglu": False, "fuse_cross_entropy": False, "use_cache": False}
    theirs = PaTHAttentionForCausalLM(PaTHAttentionConfig(**(settings | plain))).eval()
    theirs.load_state_dict(load_file(source / "model.safetensors"))
    translate(source, tmp_path / "ours")
    ours = PaTHForCausalLM.from_pretrained(tmp_path / "ours").eval()
    expected = theirs(ids(2, 70), use_cache=False).logits
    error = (ours(ids(2, 70)).logits - expected).norm() / expected.norm()
    assert error < 50 * torch.finfo(torch.float32).eps  # two layers of sums of up to 256 terms, in another order
