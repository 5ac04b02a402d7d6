"""Synthetic tasks: data made on the fly from a seed, an oracle, a score."""

from path_attention.tasks.base import IGNORED, Examples, Score, Task, register, task_class, task_names
from path_attention.tasks.flip_flop import FlipFlop

__all__ = ["IGNORED", "Examples", "FlipFlop", "Score", "Task", "register", "task_class", "task_names"]
