"""Synthetic tasks: data made on the fly from a seed, an oracle, a score."""

from path_attention.tasks.base import (
    IGNORED,
    Examples,
    Score,
    Sequences,
    Task,
    register,
    score,
    task_class,
    task_names,
)
from path_attention.tasks.flip_flop import FlipFlop
from path_attention.tasks.group_words import GroupWords
from path_attention.tasks.phone_book import PhoneBook
from path_attention.tasks.recall import AssociativeRecall, RecencyRecall
from path_attention.tasks.variable_tracking import VariableTracking

__all__ = [
    "IGNORED",
    "AssociativeRecall",
    "Examples",
    "FlipFlop",
    "GroupWords",
    "PhoneBook",
    "RecencyRecall",
    "Score",
    "Sequences",
    "Task",
    "VariableTracking",
    "register",
    "score",
    "task_class",
    "task_names",
]
