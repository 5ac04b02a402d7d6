"""``path-attention doctor [--distributed]``."""

import os
from pathlib import Path

import torch.distributed as dist

from path_attention.distributed.processes import Place, ProcessesFailed, Team, backend_of, device_of
from path_attention.doctor.check import Check, failed, show
from path_attention.doctor.machine import devices, examine_machine
from path_attention.doctor.together import checks_together

# Processes where there are no GPUs to count.
CPU_PROCESSES = 2


def examine() -> bool:
    """This machine, without other processes: prints a table; whether all is well."""
    found = []
    for check in examine_machine():
        show(check)
        found.append(check)
    return _verdict(found)


def examine_together(
    *,
    processes: int | None = None,
    device: str | None = None,
    recipe: str | None = None,
    folder: Path | None = None,
    seconds: float = 60.0,
) -> bool:
    """The processes of a launcher (torchrun), or as many of this machine as it has GPUs; whether all is well.

    Args:
        processes: how many to start here; None for one for each GPU, or CPU_PROCESSES.
        device: cuda or cpu; None for a GPU where there is one.
        recipe: a training to be tried out: a shipped one, or a file.
        folder: one that all processes see, for the checkpoint; None for the system's folder for temporary files.
        seconds: limit of a step.

    Raises:
        ValueError: processes or a device that are not there.
    """
    kind = device or devices()[0].type
    _check_request(kind, processes, recipe)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        if processes is not None:
            raise ValueError(f"--processes: wanted none beside those of the launcher, got {processes}")
        return _as_one_of_many(kind, recipe, folder, seconds)
    size = processes or (len(devices()) if kind == "cuda" else CPU_PROCESSES)
    try:
        with Team(size, kind, seconds) as team:
            return _verdict(team.run(_checks, folder, recipe)[0])
    except ProcessesFailed as error:
        for line in str(error).splitlines():
            show(Check("processes", "failed", line))
        return _verdict([Check("processes", "failed", str(error))])


def _check_request(kind: str, processes: int | None, recipe: str | None) -> None:
    if kind not in ("cpu", "cuda") or (kind == "cuda" and devices()[0].type != "cuda"):
        raise ValueError(f"--device: wanted cpu, or cuda where there is a GPU, got {kind!r}")
    most = len(devices()) if kind == "cuda" else None
    if processes is not None and (processes < 1 or (most is not None and processes > most)):
        raise ValueError(f"--processes: wanted 1 to {most or 'some'}, one for each GPU, got {processes}")
    if recipe is not None:
        from path_attention.training import load_recipe

        load_recipe(recipe)  # its mistakes are the user's, and said before anything starts


def _checks(place: Place, folder: Path | None, recipe: str | None) -> list[Check]:
    return checks_together(place, folder, recipe, show)


def _as_one_of_many(kind: str, recipe: str | None, folder: Path | None, seconds: float) -> bool:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    place = Place(rank, size, device_of(kind, int(os.environ.get("LOCAL_RANK", rank))), seconds, _say, _say)
    place.join(backend_of(kind))
    checks = _checks(place, folder, recipe)
    place.wait()
    dist.destroy_process_group()
    return _verdict(checks) if rank == 0 else not failed(checks)


def _say(text: str) -> None:
    print(f"path-attention: {text}", flush=True)


def _verdict(checks: list[Check]) -> bool:
    wrong = [check.name for check in checks if check.state == "failed"]
    print(f"{len(checks)} checks: " + (f"{len(wrong)} failed" if wrong else "all is well"), flush=True)
    return not wrong
