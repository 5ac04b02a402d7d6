"""What measures and ends a training while it runs."""

import contextlib
import signal
import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

from path_attention.training.parallel import any_process


class Speed(TrainerCallback):
    """Tokens a second between two logged losses, without evaluations and checkpoints.

    Args:
        tokens: of a step, over all processes.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens, self.steps, self.rates = tokens, 0, []  # type: ignore[var-annotated]
        self.since: float | None = None

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(args.device)

    def on_step_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        if self.since is None:
            self.since = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        self.steps += 1

    def numbers(self, device: torch.device) -> dict[str, float]:
        """For the log of a loss; the next interval begins with the next step."""
        if self.since is None or not self.steps:
            return {}
        rate = self.steps * self.tokens / (time.monotonic() - self.since)
        self.rates.append(rate)
        self.since, self.steps = None, 0
        found = {"tokens_per_second": round(rate, 1)}
        if device.type == "cuda":
            found["peak_memory_mib"] = round(torch.cuda.max_memory_allocated(device) / 2**20)
        return found


class StopInTime(TrainerCallback):
    """Stops training with a checkpoint, when time is up or SIGTERM came, at the next step whose loss is logged: there a
    run that goes on logs what one without a stop would have.

    Args:
        deadline: of time.monotonic().
    """

    def __init__(self, deadline: float) -> None:
        self.deadline, self.told = deadline, False

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        with contextlib.suppress(ValueError):  # not the main thread: whoever runs it has his own signals
            self.before = signal.signal(signal.SIGTERM, self._terminate)

    def _terminate(self, *_: Any) -> None:
        self.told = True

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % int(args.logging_steps) or state.global_step >= state.max_steps:
            return
        if any_process(self.told or time.monotonic() >= self.deadline, args.device):  # all or none
            control.should_save = control.should_training_stop = True

    def close(self) -> None:
        """Gives SIGTERM back."""
        if hasattr(self, "before"):
            signal.signal(signal.SIGTERM, self.before)
