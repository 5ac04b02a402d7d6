"""Shapes as the command line and the tables write them, and operands of one, made on the device that computes."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """batch x tokens x query/key heads x head_dim, as tables and the command line write it."""

    batch: int
    length: int
    query_heads: int
    heads: int
    dim: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """From "16x8192x32x64", or "16x8192x32/8x64" for grouped queries.

        Raises:
            ValueError: text of another form.
        """
        try:
            batch, length, heads, dim = text.split("x")
            query_heads, _, key_heads = heads.partition("/")
            shape = cls(int(batch), int(length), int(query_heads), int(key_heads or query_heads), int(dim))
        except ValueError:
            raise ValueError(f"--shapes: wanted BATCHxLENGTHxHEADSxDIM, got {text!r}") from None
        if min(asdict(shape).values()) < 1 or shape.query_heads % shape.heads:
            raise ValueError(f"--shapes: wanted numbers above 0, and key heads that divide query heads, got {text!r}")
        return shape

    def __str__(self) -> str:
        heads = str(self.heads) if self.heads == self.query_heads else f"{self.query_heads}/{self.heads}"
        return f"{self.batch}x{self.length}x{heads}x{self.dim}"


def operands(shape: Shape, length: int, dtype: torch.dtype, device: str, seed: int = 0) -> list[Tensor]:
    """q, k, v, w and beta of so many tokens, made where they are needed."""
    generator = torch.Generator(device).manual_seed(seed)
    rows = (shape.batch, length)

    def normal(heads: int) -> Tensor:
        return torch.randn(*rows, heads, shape.dim, generator=generator, device=device, dtype=torch.float32)

    q, k, v = (normal(n).to(dtype) for n in (shape.query_heads, shape.heads, shape.heads))
    w = torch.nn.functional.normalize(normal(shape.heads), dim=-1)
    beta = 2 * torch.rand(*rows, shape.heads, generator=generator, device=device)
    return [q, k, v, w, beta]
