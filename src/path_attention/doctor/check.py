"""What a check found, and the table of all."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "note", "failed"]


@dataclass(frozen=True)
class Check:
    """One line of the table; a note is worth reading and no failure."""

    name: str
    state: State
    found: str

    def __str__(self) -> str:
        return f"{self.state:7} {self.name:34} {self.found}"


Tell = Callable[[Check], None]


def show(check: Check) -> None:
    print(check, flush=True)


def failed(checks: list[Check]) -> bool:
    return any(check.state == "failed" for check in checks)
