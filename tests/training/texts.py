"""A small corpus in files, and the smallest recipe over it that is one."""

import random
from pathlib import Path
from typing import Any

from path_attention.training import Recipe, recipe_from_mapping
from path_attention.training.recipe import override
from tests.training.tiny import TINY

WORDS = ["def", "return", "class", "import", "self", "none", "true", "for", "while", "else", "print", "value"]


def write_texts(folder: Path, files: int = 30) -> Path:
    """Files of 20 to 80 words, in folders of five."""
    for n in range(files):
        path = folder / f"folder{n // 5}" / f"{n:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(" ".join(random.Random(n).choices(WORDS, k=20 + 2 * n)))
    return folder


def over_texts(folder: Path, *overrides: str) -> Recipe:
    """Of sequences of 16 tokens, with ``key.sub=value`` changes."""
    values: dict[str, Any] = {k: v for k, v in TINY.items() if k not in ("task", "evaluation")}
    values["data"] = {
        "files": {"paths": [str(folder)]},
        "tokenizer": "bpe",
        "vocab_size": 280,
        "length": 16,
        "validation": {"fraction": 0.2},
        "cache": str(folder.parent / "cache"),
    }
    values["evaluation"] = {"windows": 20, "quick_windows": 6, "batch_size": 4}
    return recipe_from_mapping(override(values, overrides))
