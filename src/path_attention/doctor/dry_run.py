"""One step of a recipe's training without its text: the memory that a process needs, by formula and by measurement."""

from path_attention.distributed.processes import Place
from path_attention.doctor.check import Check


def dry_run(place: Place, name: str) -> list[Check]:
    raise NotImplementedError
