"""Errors of the caller, in one form: the argument's name, what was given and what is wanted."""

from math import inf
from numbers import Integral, Real
from typing import Any


def bad(name: str, got: object, wanted: str) -> ValueError:
    """The error to raise."""
    return ValueError(f"{name}: got {got}; wanted {wanted}")


def check_integer(name: str, value: object, least: int, wanted: str = "") -> None:
    """An integer of at least ``least``; ``wanted`` says it in other words."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise bad(name, repr(value), wanted or f"an integer, at least {least}")
    if int(value) < least:
        raise bad(name, value, wanted or f"at least {least}")


def check_number(name: str, value: Any, *, zero: bool, wanted: str = "") -> None:
    """A finite number above 0, or 0 too where ``zero`` says so."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not 0 <= value < inf or (value == 0 and not zero):
        raise bad(name, repr(value), wanted or f"a finite number {'of at least' if zero else 'above'} 0")


def check_flag(name: str, value: object) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise bad(name, repr(value), "True or False")
