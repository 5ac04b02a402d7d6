"""Autocast, asked in a way that devices without one, such as meta, can answer."""

from contextlib import AbstractContextManager, nullcontext
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
