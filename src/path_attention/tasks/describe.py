"""Tasks for people: what they are, and a sequence with its answers."""

import inspect
import textwrap

import numpy as np

from path_attention.tasks.base import IGNORED, TRAIN, Task
from path_attention.training import strict

# Sequences that statistics are made of.
SAMPLE = 200
WIDTH = 100


def describe(name: str, task: Task) -> str:
    """The task's own words, its fields, and how much it asks in each split."""
    module = inspect.getdoc(inspect.getmodule(type(task))) or ""
    lines = [f"{name}: {module}", ""]
    lines += [f"  {key} = {value}" for key, value in strict.plain(task).items()]
    lines += ["", f"{task.length} tokens a sequence, {task.vocab_size} different ones"]
    for split in (TRAIN, *task.splits):
        answers = task.examples(0, range(SAMPLE), split).answers
        asked = answers[answers != IGNORED]
        share = np.bincount(asked).max() / len(asked) if len(asked) else float("nan")
        lines.append(
            f"{split}: {len(asked) / SAMPLE:.2f} answers a sequence; the commonest one is right {100 * share:.1f} % of "
            "the time"
        )
    return "\n".join(lines)


def show_example(task: Task, seed: int, index: int, split: str) -> str:
    """A sequence in tokens; in brackets what is to be said after one, with a star if trained on but not scored."""
    made = task.examples(seed, [index], split)
    words = []
    for t, token in enumerate(made.input_ids[0]):
        words.append(task.tokens[token])
        if t + 1 < task.length and made.labels[0, t + 1] != IGNORED:
            star = "" if made.answers[0, t + 1] != IGNORED else "*"
            words[-1] += f"[{task.tokens[made.labels[0, t + 1]]}{star}]"
    head = f"\nSequence {index} of {split}, seed {seed}. [x]: the right answer after this token."
    if (made.labels != made.answers).any():
        head += " [x*]: trained on, not scored."
    # Tokens may hold blanks, as (1 2 3) does: they are not broken there.
    text = " ".join(word.replace(" ", "\u00a0") for word in words)
    lines = textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False)
    return "\n".join([head, "", *(line.replace("\u00a0", " ") for line in lines)])
