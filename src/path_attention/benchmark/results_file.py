"""JSON files of results that are written row by row, and continued by the same command."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def check(path: Path | None, option: str = "--out") -> None:
    """Before anything is measured: whether a file can be written there, as far as names tell.

    Raises:
        ValueError: it is a folder, or lies in what is none.
    """
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{option}: wanted a file, got the folder {path}")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise ValueError(f"{option}: wanted a file in a folder, got {path}, and {above} is none")


def resume(fresh: dict[str, Any], path: Path | None, keys: Sequence[str]) -> dict[str, Any]:
    """The results that the file has, where all ``keys`` say that they are of the same kind; fresh ones without a file.

    Raises:
        ValueError: no file can be written there.
        FileExistsError: it holds results of other sources, versions, options or devices, or is damaged.
    """
    check(path)
    if path is None or not path.exists():
        return fresh
    found = _read(path)
    for key in keys:
        if found.get(key) != fresh[key]:
            given = f"{key} {found.get(key)}, not {fresh[key]}"
            raise FileExistsError(f"--out: {path} has results of {given}: name another file, or remove it")
    for key, value in fresh.items():  # what rows are added to
        if isinstance(value, dict | list) and not isinstance(found.get(key), type(value)):
            raise FileExistsError(f"--out: {path} has no {key}: name another file, or remove it")
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one too
        raise FileExistsError(f"--out: {path} is not JSON ({error}): name another file, or remove it") from error
    if not isinstance(found, dict):
        raise FileExistsError(f"--out: {path} has no results: name another file, or remove it")
    return found


def write(result: dict[str, Any], path: Path | None) -> None:
    """All of it, whole or not at all."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        part.replace(path)
