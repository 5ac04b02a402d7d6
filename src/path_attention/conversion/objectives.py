"""What the stages minimise, a few tokens' logits at a time."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Tokens whose logits are in memory at once. With a vocabulary of 49,152, SmolLM2's, each float32 array of them takes
# 200 MB, of which six are alive at a time; the matrix products are large enough for any GPU.
CHUNK = 1024


class _ChunkedDivergence(torch.autograd.Function):
    """Gradients are made together with the value, chunk by chunk, so that no logits are kept or made twice."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, student: Tensor, student_head: Tensor, teacher: Tensor, teacher_head: Tensor, chunk: int
    ) -> Tensor:
        total = student.new_zeros((), dtype=torch.float32)
        d_student, d_head = torch.empty_like(student), torch.zeros_like(student_head, dtype=torch.float32)
        for start in range(0, len(student), chunk):
            part = slice(start, start + chunk)
            ours = nn.functional.linear(student[part], student_head).float().log_softmax(-1)
            theirs = nn.functional.linear(teacher[part], teacher_head).float().log_softmax(-1)
            probability = theirs.exp()
            total += (probability * (theirs - ours)).sum()
            # Of a matrix product's operands autocast takes care; without it they must be of one dtype.
            d_logits = ours.exp_().sub_(probability).to(student_head.dtype)
            d_student[part] = d_logits @ student_head
            d_head += d_logits.T @ student[part].to(student_head.dtype)
        ctx.save_for_backward(d_student, d_head.to(student_head.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        d_student, d_head = ctx.saved_tensors
        return d_total * d_student, d_total * d_head, None, None, None


def divergence(
    student: Tensor, student_head: Tensor, teacher: Tensor, teacher_head: Tensor, chunk: int = CHUNK
) -> Tensor:
    """Sum over tokens of KL(teacher || student) = sum_v p_v (log p_v - log q_v), in nats, float32.

    p is softmax(teacher teacher_head^T), which gets no gradient, q the same of the student. Logits of ``chunk`` tokens
    are in memory at a time, in the forward pass and after it.

    Args:
        student: last hidden states (..., C).
        student_head: (V, C).
        teacher: (..., C'), tokens as the student's.
        teacher_head: (V, C').
        chunk: tokens.

    Raises:
        ValueError: other tokens, or another vocabulary.
    """
    if student.shape[:-1] != teacher.shape[:-1] or len(student_head) != len(teacher_head):
        got = f"{tuple(student.shape)} and {tuple(teacher.shape)}, {len(student_head)} and {len(teacher_head)} tokens"
        raise ValueError(f"teacher: got {got}; wanted the student's positions and vocabulary")
    teacher, teacher_head = teacher.detach().flatten(0, -2), teacher_head.detach()
    value: Tensor = _ChunkedDivergence.apply(student.flatten(0, -2), student_head, teacher, teacher_head, chunk)
    return value


def output_error(student: Tensor, teacher: Tensor) -> Tensor:
    """|student - teacher|^2 / |teacher|^2, float32: the mean squared error of attention outputs (B, L, C) in units of
    the teacher's mean square, so that layers whose outputs are large and small ones count alike.
    """
    student, teacher = student.float(), teacher.float()
    return (student - teacher).square().sum() / teacher.square().sum().clamp(min=torch.finfo(torch.float32).tiny)
