"""JSON files of results that are written row by row, and continued by the same command."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def resume(fresh: dict[str, Any], path: Path | None, keys: Sequence[str]) -> dict[str, Any]:
    """The results that the file has, where all ``keys`` say that they are of the same kind; fresh ones without a file.

    Raises:
        FileExistsError: it holds results of other sources, versions, options or devices.
    """
    if path is None or not path.exists():
        return fresh
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for key in keys:
        if found.get(key) != fresh[key]:
            given = f"{key} {found.get(key)}, not {fresh[key]}"
            raise FileExistsError(f"--out: {path} has results of {given}: name another file, or remove it")
    return found


def write(result: dict[str, Any], path: Path | None) -> None:
    """All of it, whole or not at all."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        part.replace(path)
