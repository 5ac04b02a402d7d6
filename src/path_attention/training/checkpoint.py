"""Checkpoints of a training's state: weights and the optimiser's moments, by torch.distributed.checkpoint.

They hold whole tensors under the names of the parameters, in as many files as processes wrote them, and are read by any
number of processes, sharded in any way.
"""

import json
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.optim import Optimizer

# The folder within a checkpoint.
STATE = "state"
# Of a configuration, what changes nothing in the weights.
_NOT_COMPARED = ("transformers_version", "architectures", "dtype", "use_cache", "bos_token_id", "eos_token_id")

# Moments under the name of their parameter: groups may be others when they are read.
_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


def save(model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
    """Write FOLDER/state; every process calls it."""
    weights, moments = get_state_dict(model, optimizer, options=_OPTIONS)
    state = {"model": weights, "optimizer": moments}
    with _alone_or_not() as alone:
        dcp.save(state, checkpoint_id=folder / STATE, no_dist=alone)


def load(model: nn.Module, optimizer: Optimizer, folder: Path, group: dist.ProcessGroup | None = None) -> None:
    """Read FOLDER/state into the model and the optimiser; every process calls it, or every one of ``group``.

    Raises:
        ValueError: it is the checkpoint of a model of another configuration, or none of ours, or damaged.
    """
    check_configuration(model, folder)
    if not (folder / STATE).is_dir():
        raise ValueError(f"{folder}: wanted a checkpoint with a folder {STATE!r}, got one of another kind")
    weights, moments = get_state_dict(model, optimizer, options=_OPTIONS)
    state: dict[str, Any] = {"model": weights, "optimizer": moments}
    try:
        with _alone_or_not() as alone:
            dcp.load(state, checkpoint_id=folder / STATE, process_group=group, no_dist=alone)
    except (CheckpointException, OSError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise ValueError(
            f"{folder}: the checkpoint is damaged ({reason}); remove it; the same command goes on from the one before"
        ) from error
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=_OPTIONS
    )


@contextmanager
def _alone_or_not() -> Iterator[bool]:
    """Whether this process is the only one, and then no warning that it is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield not dist.is_initialized()


def check_configuration(model: Any, folder: Path) -> None:
    """Raises a ValueError if config.json of a checkpoint is that of another model."""
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder}: wanted a checkpoint with config.json, got none")
    old, new = json.loads(file.read_text(encoding="utf-8")), json.loads(model.config.to_json_string(use_diff=False))
    changed = [
        f"{key} was {old[key]!r}, is {new[key]!r}"
        for key in sorted(old.keys() & new.keys())
        if old[key] != new[key] and key not in _NOT_COMPARED
    ]
    if changed:
        raise ValueError(f"{folder}: the checkpoint of another configuration: {'; '.join(changed)}")


def whole_weights(model: nn.Module) -> dict[str, Any]:
    """All weights on the CPU of the first process; empty on the others, all of which call it."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
