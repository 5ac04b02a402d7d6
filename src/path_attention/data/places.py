"""Where text lies on this machine, and where caches of it go."""

import os
import re
import sysconfig
from pathlib import Path

# What ${NAME} stands for in a recipe: folders that every Python has.
PLACES = {"stdlib": "stdlib", "site_packages": "purelib"}


def check_places(path: str, key: str) -> None:
    """Raises a ValueError that names the recipe's ``key`` for a ``${NAME}`` that is not known."""
    unknown = [name for name in re.findall(r"\$\{(.*?)\}", path) if name not in PLACES]
    if unknown or "${" in re.sub(r"\$\{.*?\}", "", path):
        known = " and ".join(f"${{{name}}}" for name in PLACES)
        raise ValueError(f"{key}: only {known} are known, got {path!r}")


def expand(path: str) -> Path:
    """``~``, ``${stdlib}`` and ``${site_packages}`` (of the running Python) expanded."""
    for name, scheme in PLACES.items():
        path = path.replace(f"${{{name}}}", sysconfig.get_path(scheme))
    return Path(path).expanduser()


def cache_folder(cache: str) -> Path:
    """``cache``; if it is empty PATH_ATTENTION_CACHE, else XDG_CACHE_HOME or ~/.cache, path-attention."""
    if cache:
        return Path(cache).expanduser()
    if own := os.environ.get("PATH_ATTENTION_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "path-attention"
