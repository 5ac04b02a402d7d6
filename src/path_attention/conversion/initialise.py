"""The student as it begins: the teacher's weights, and new ones that change as little as they can."""

import math

import torch
from torch import Tensor, nn

from path_attention.conversion.checkpoint import on_meta
from path_attention.conversion.recipe import Initialisation
from path_attention.layers import PaTHAttention, rotary_frequencies
from path_attention.layers.attention import Attention
from path_attention.layers.decay import ForgettingAttention
from path_attention.models import PaTHConfig, PaTHForCausalLM


@torch.no_grad()
def student_of(teacher: PaTHForCausalLM, config: PaTHConfig, options: Initialisation, seed: int) -> PaTHForCausalLM:
    """A student on the CPU, in float32.

    Args:
        teacher: whose weights are copied, on any device.
        config: the student's: the teacher's but for what its mixers add.
        options: how the new parameters begin.
        seed: of those that begin at random.
    """
    student = on_meta(config)
    shared = teacher.state_dict()
    state = {name: shared[name].float().cpu().clone() for name in student.state_dict() if name in shared}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for prefix, module in student.named_modules():
            own = [f"{prefix}.{name}" for name, _ in module.named_parameters(recurse=False)]
            if own and not any(name in state for name in own):
                module.to_empty(device="cpu")
                student._init_weights(module)
                state |= {name: parameter for name, parameter in student.named_parameters() if name in own}
    student.load_state_dict(state, assign=True)
    student.tie_weights()
    for attention in new_attentions(student).values():
        _begin(attention, config, options)
    return student


def new_attentions(student: PaTHForCausalLM) -> dict[int, Attention]:
    """The layers whose mixer is not the teacher's, by number."""
    layers = student.model.layers
    mixers = enumerate(student.config.mixers)
    return {n: layers[n].self_attn for n, mixer in mixers if mixer != "rope"}  # type: ignore[misc, union-attr]


def _begin(attention: Attention, config: PaTHConfig, options: Initialisation) -> None:
    if isinstance(attention, PaTHAttention):
        if options.w == "key":
            _take_w_from_keys(attention)
        nn.init.zeros_(attention.beta_proj.weight)
        nn.init.constant_(attention.beta_proj.bias, math.log(options.beta / (2 - options.beta)))
    if options.rope == "mean":
        _turn_keys(attention, mean_rotation(config, options.distance))
    if isinstance(attention, ForgettingAttention | PaTHAttention) and attention.gate_proj is not None:
        nn.init.zeros_(attention.gate_proj.weight)
        reach = torch.logspace(math.log10(options.gate[0]), math.log10(options.gate[1]), attention.num_heads)
        scale = attention.gate_scale if isinstance(attention, PaTHAttention) else 1.0
        # scale * log sigmoid(b) = -1 / reach, solved for b.
        attention.gate_proj.bias.copy_(-torch.log(torch.expm1(1 / (scale * reach))))


def _take_w_from_keys(attention: PaTHAttention) -> None:
    """w_t along SiLU(k_t), for the first reflection: others would stay equal to it for ever."""
    key = attention.k_proj.weight
    if attention.w_rank is None:
        attention.w_proj.weight[: len(key)] = key
    else:
        u, s, v = torch.linalg.svd(key, full_matrices=False)
        rank = min(attention.w_rank, len(s))
        attention.w_down_proj.weight[:rank] = s[:rank].sqrt()[:, None] * v[:rank]
        attention.w_up_proj.weight[: len(key)] = 0
        attention.w_up_proj.weight[: len(key), :rank] = u[:, :rank] * s[:rank].sqrt()
    if attention.w_conv is not None:
        attention.w_conv.weight[: len(key)] = 0
        attention.w_conv.weight[: len(key), -1] = 1


def mean_rotation(config: PaTHConfig, distance: int) -> Tensor:
    """Complex (D / 2,): the mean over n = 0 ... distance - 1 of exp(-i n f), for the frequencies f of the teacher.

    With pairs of dimensions as complex numbers, RoPE's logit at distance n is Re(conj(q) k exp(-i n f)): of all maps of
    keys that do not depend on n, this one is nearest to it in the mean square.
    """
    assert config.head_dim is not None
    frequencies = rotary_frequencies(config.head_dim, config.rope_theta, config.rotary_scaling).double()
    return torch.exp(-1j * frequencies * torch.arange(distance)[:, None]).mean(0)


def _turn_keys(attention: Attention, factor: Tensor) -> None:
    """Keys multiplied by a complex number a pair of dimensions.

    A norm of the keys stands after their projection and has one number a dimension: there the real part has to do.
    """
    if attention.k_norm is not None:
        attention.k_norm.weight.mul_(factor.real.float().repeat(2))
        return
    for parameter in (attention.k_proj.weight, attention.k_proj.bias):
        if parameter is not None:
            left, right = parameter.double().unflatten(0, (attention.num_kv_heads, 2, -1)).unbind(1)
            turn = factor.reshape(-1, *[1] * (parameter.dim() - 1))
            turned = torch.complex(left, right) * turn
            parameter.copy_(torch.stack([turned.real, turned.imag], 1).flatten(0, 2).reshape(parameter.shape))
