"""The divergence in chunks equals the whole one, in value, gradient and not in memory; errors of outputs."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from path_attention.conversion.objectives import divergence, output_error
from path_attention.models import PaTHConfig, PaTHForCausalLM
from tests.conversion.teachers import SHAPE, ids


def operands(tokens: int = 23, vocabulary: int = 31) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    shapes = ((2, tokens, 8), (vocabulary, 8), (2, tokens, 12), (vocabulary, 12))
    made = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    return made[0], made[1], made[2], made[3]


# One chunk, several with a rest, chunks of one token.
@pytest.mark.parametrize("chunk", [100, 10, 1])
def test_divergence_and_its_gradient(chunk: int) -> None:
    student, head, hidden, teacher_head = operands()
    found = divergence(student, head, hidden, teacher_head, chunk)
    p, q = ((x @ w.T).log_softmax(-1) for x, w in ((hidden, teacher_head), (student, head)))
    expected = nn.functional.kl_div(q, p, log_target=True, reduction="sum")
    # Logits are brought to float32, which is what models give: that rounding is all the difference.
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    found = torch.autograd.grad(3 * found, (student, head))
    expected = torch.autograd.grad(3 * expected, (student, head))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(b.abs().max()))


def test_divergence_from_oneself_is_zero() -> None:
    student, head, _, _ = operands()
    value = divergence(student, head, student, head)
    assert abs(value.item()) < 1e-4
    assert float(torch.autograd.grad(value, head)[0].abs().max()) < 1e-5


class Largest(TorchDispatchMode):
    """The most elements that a tensor made while it watches has."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor):
                self.size = max(self.size, x.numel())
        return out


def test_logits_of_a_chunk_are_the_largest_there_are() -> None:
    student, head, hidden, teacher_head = operands(tokens=500, vocabulary=300)
    with Largest() as largest:
        divergence(student, head, hidden, teacher_head, 50).backward()
    assert largest.size == 50 * 300


def test_other_vocabularies_are_refused() -> None:
    student, head, hidden, teacher_head = operands()
    with pytest.raises(ValueError, match="wanted the student's positions and vocabulary"):
        divergence(student, head, hidden, teacher_head[1:])
    with pytest.raises(ValueError, match="wanted the student's positions and vocabulary"):
        divergence(student, head, hidden[:, 1:], teacher_head)


def test_model_with_an_objective_of_its_own() -> None:
    torch.manual_seed(0)
    model, x = PaTHForCausalLM(PaTHConfig(**SHAPE)), ids()

    def last(states: Tensor, head: nn.Linear, labels: Tensor | None) -> Tensor:
        assert labels is x
        return head(states)[:, -1].logsumexp(-1).sum()

    out = model(x, labels=x, objective=last)
    assert out.logits is None
    torch.testing.assert_close(out.loss, model(x).logits[:, -1].logsumexp(-1).sum())


def test_error_is_in_units_of_the_teacher() -> None:
    out = torch.randn(2, 5, 8)
    assert output_error(out, out) == 0
    assert output_error(torch.zeros_like(out), out) == 1
    assert output_error(1.1 * out, out) == pytest.approx(0.01, rel=1e-4)
    assert output_error(1.1e3 * out, 1e3 * out) == pytest.approx(0.01, rel=1e-4)
    assert output_error(torch.zeros(3), torch.zeros(3)) == 0
