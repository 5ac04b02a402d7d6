"""The smallest recipe that is one: a second of training."""

from typing import Any

from path_attention.training import Recipe, recipe_from_mapping
from path_attention.training.recipe import override

TINY = {
    "name": "tiny",
    "mixers": ["path"],
    "task": {"name": "flip_flop", "length": 16},
    "model": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
    "training": {
        "steps": 20,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "log_every": 5,
        "eval_every": 10,
        "save_every": 5,
        "device": "cpu",
    },
    "evaluation": {"answers": 100, "quick_answers": 20, "batch_size": 8},
}


def tiny(*overrides: str) -> Recipe:
    """The recipe, with ``key.sub=value`` changes."""
    return recipe_from_mapping(override(TINY, overrides))


def without_time(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics without the things that no two runs share."""
    return [{k: v for k, v in entry.items() if k not in ("seconds", "tokens_per_second")} for entry in entries]
