"""The student as it begins: the teacher's weights, and new ones that change as little as they can."""

import math

import torch
from torch import nn

from path_attention.conversion.checkpoint import on_meta
from path_attention.conversion.recipe import Initialisation
from path_attention.layers import PaTHAttention
from path_attention.layers.attention import Attention
from path_attention.layers.decay import ForgettingAttention
from path_attention.models import PaTHConfig, PaTHForCausalLM

# Those that ``beta: nearest`` tries, for which docs/conversion.md has losses: next to no transition, a whole
# projection, and between them the optima of the teachers that were measured, 0.04 and 0.1. Seven, so that it
# costs no more than what is measured after a stage: 7 times ``quick_windows``, 8 by default, are fewer than 64 windows.
BETAS = (0.001, 0.04, 0.1, 0.2, 0.3, 0.4, 1.0)


@torch.no_grad()
def student_of(teacher: PaTHForCausalLM, config: PaTHConfig, options: Initialisation, seed: int) -> PaTHForCausalLM:
    """A student on the CPU, in float32.

    Args:
        teacher: whose weights are copied, on any device.
        config: the student's: the teacher's but for what its mixers add.
        options: how the new parameters begin.
        seed: of those that begin at random.

    Raises:
        ValueError: ``options.beta`` is no number: what is nearest is measured on text.
    """
    if isinstance(options.beta, str):
        raise ValueError(f"options.beta: wanted a number, got {options.beta!r}, which is measured on text by convert")
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
        _begin(attention, options)
    set_beta(student, options.beta)
    return student


def new_attentions(student: PaTHForCausalLM) -> dict[int, Attention]:
    """The layers whose mixer is not the teacher's, by number."""
    layers = student.model.layers
    mixers = enumerate(student.config.mixers)
    return {n: layers[n].self_attn for n, mixer in mixers if mixer != "rope"}  # type: ignore[misc, union-attr]


def set_beta(student: PaTHForCausalLM, beta: float) -> None:
    """The same beta for every token, in every layer that has one: beta = 2 sigmoid(b), solved for the bias b."""
    for attention in new_attentions(student).values():
        if isinstance(attention, PaTHAttention):
            nn.init.zeros_(attention.beta_proj.weight)
            nn.init.constant_(attention.beta_proj.bias, math.log(beta / (2 - beta)))


def _begin(attention: Attention, options: Initialisation) -> None:
    if isinstance(attention, PaTHAttention) and options.w == "key":
        _take_w_from_keys(attention)
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
