"""How a student begins: its betas, w along its keys, gates that reach back so far."""

import math
from pathlib import Path

import pytest
import torch

from path_attention.conversion import Checkpoint, student_of
from path_attention.conversion.initialise import new_attentions
from path_attention.conversion.recipe import Initialisation
from path_attention.layers import PaTHAttention
from path_attention.models import PaTHConfig, PaTHForCausalLM
from tests.conversion.teachers import save, teacher


def students(tmp_path: Path, name: str = "llama", **fields: object) -> tuple[PaTHForCausalLM, PaTHForCausalLM]:
    """A teacher, and its student with the options and fields that are not those of Initialisation."""
    checkpoint = Checkpoint(save(teacher(name), tmp_path))
    known = Initialisation.__dataclass_fields__
    options = Initialisation(**{key: x for key, x in fields.items() if key in known})  # type: ignore[arg-type]
    config = PaTHConfig(**(checkpoint.fields | {key: x for key, x in fields.items() if key not in known}))
    loaded = checkpoint.load()
    return loaded, student_of(loaded, config, options, seed=0)


def attention_of(student: PaTHForCausalLM) -> PaTHAttention:
    attention = student.model.layers[0].self_attn
    assert isinstance(attention, PaTHAttention)
    return attention


@pytest.mark.parametrize("beta", [0.04, 1.0, 1.9])
def test_every_beta_is_what_was_asked_for(tmp_path: Path, beta: float) -> None:
    _, student = students(tmp_path, beta=beta)
    found = attention_of(student).project(torch.randn(2, 9, 32)).beta
    torch.testing.assert_close(found, torch.full_like(found, beta))


def test_what_is_measured_on_text_is_refused_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"options\.beta: wanted a number, got 'nearest'"):
        students(tmp_path, beta="nearest")
    with pytest.raises(ValueError, match=r"initialisation\.beta: wanted a number in \(0, 2\) or nearest, got near"):
        Initialisation(beta="near")  # type: ignore[arg-type]


# Full rank and low; with the convolution, whose SiLU bends w, and without; a bias of the keys is not in w.
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_w_is_along_the_keys(tmp_path: Path, name: str) -> None:
    _, student = students(tmp_path, name, w_rank=None, conv_size=0)
    attention, x = attention_of(student), torch.randn(1, 9, 32)
    key = attention.k_proj(x) - (0 if attention.k_proj.bias is None else attention.k_proj.bias)
    expected = torch.nn.functional.normalize(key.unflatten(2, (2, -1)), dim=-1)
    torch.testing.assert_close(attention.project(x).w[:, :, 0], expected)
    _, student = students(tmp_path, name, w_rank=32, conv_size=3)
    attention = attention_of(student)
    expected = torch.nn.functional.normalize(torch.nn.functional.silu(key).unflatten(2, (2, -1)), dim=-1)
    torch.testing.assert_close(attention.project(x).w[:, :, 0], expected, rtol=1e-4, atol=1e-5)


def test_low_rank_is_the_best_there_is(tmp_path: Path) -> None:
    _, student = students(tmp_path, w_rank=5)
    attention = attention_of(student)
    key = attention.k_proj.weight
    error = (attention.w_up_proj.weight @ attention.w_down_proj.weight - key).square().sum()
    torch.testing.assert_close(error, torch.linalg.svdvals(key)[5:].square().sum())  # Eckart and Young


def test_further_reflections_begin_at_random(tmp_path: Path) -> None:
    _, student = students(tmp_path, w_rank=None, conv_size=0, num_reflections=2)
    w = attention_of(student).project(torch.randn(1, 9, 32)).w
    assert (w[:, :, 0] - w[:, :, 1]).norm(dim=-1).min() > 0.1


@pytest.mark.parametrize("mixer", ["path_fox", "fox"])
@pytest.mark.parametrize("scale_gate", [False, True])
def test_gates_reach_back_so_far(tmp_path: Path, mixer: str, scale_gate: bool) -> None:
    _, student = students(tmp_path, mixer=mixer, scale_gate=scale_gate, gate=(8.0, 1000.0))
    gates = student.model.layers[0].self_attn.project(torch.randn(1, 3, 32)).g[0]
    reach = torch.logspace(math.log10(8), 3, 4)
    torch.testing.assert_close(-1 / gates, reach.expand(3, 4), rtol=1e-3, atol=0)


def test_what_the_teacher_has_is_the_teachers(tmp_path: Path) -> None:
    loaded, student = students(tmp_path, "mistral", layer_mixers=["rope", "path", "rope"])
    assert list(new_attentions(student)) == [1]
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(student.state_dict()[name], tensor), name


def test_random_parts_follow_the_seed_alone(tmp_path: Path) -> None:
    loaded, student = students(tmp_path, w="random")
    torch.manual_seed(5)
    state = torch.get_rng_state()
    again, other = (student_of(loaded, student.config, Initialisation(w="random"), seed=n) for n in (0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    key = "model.layers.0.self_attn.w_up_proj.weight"
    assert torch.equal(student.state_dict()[key], again.state_dict()[key])
    assert not torch.equal(student.state_dict()[key], other.state_dict()[key])
