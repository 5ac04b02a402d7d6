"""Autocast, asked in a way that devices without one, such as meta, can answer; and tensor-float-32 likewise."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch


def _has_autocast(device: torch.device) -> bool:
    # torch.amp.is_autocast_available would know of every device, but torch.compile cannot follow it (torch 2.11).
    return device.type != "meta"


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast casts to on this device; None where it is off."""
    if not _has_autocast(device) or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A stretch of code that autocast leaves alone."""
    return torch.autocast(device.type, enabled=False) if _has_autocast(device) else nullcontext()


@contextmanager
def with_tf32(device: torch.device) -> Iterator[None]:
    """A stretch of code whose float32 products are rounded to tensor-float-32, 11 bits, on CUDA: for those of numbers
    that have no more.

    By torch's older interface: what reads it, such as a compiler, refuses to where only the newer one was used.
    """
    matmul = torch.backends.cuda.matmul
    if device.type != "cuda" or matmul.fp32_precision == "tf32":
        yield
        return
    before, before_newer = torch.get_float32_matmul_precision(), matmul.fp32_precision
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        matmul.fp32_precision = before_newer  # where nothing was set it would be "ieee" now


@contextmanager
def without_tf32(device: torch.device) -> Iterator[None]:
    """A stretch of code whose float32 products are not rounded to tensor-float-32, whatever the caller allowed.

    torch has two interfaces to that, which must not be mixed: what was set through one goes back through it.
    """
    matmul = torch.backends.cuda.matmul
    if device.type != "cuda" or matmul.fp32_precision != "tf32":
        yield
        return
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # set through the newer interface
        matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = "tf32"
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
