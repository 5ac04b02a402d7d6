"""Continuous batching: many requests of different lengths in one running batch, which they enter and leave at any step.

transformers' own ``generate_batch`` writes keys and values into pages through an attention function of q, k and v, and
refuses layer types that it does not know: there is no place for w, beta, or a state that is more than a page of keys.
So this is a small scheduler of our own over PathCache, whose blocks and tables are the pages: every step is one call of
the model on one packed row of tokens, whole prompts of those who enter beside one token of those who are under way.
A prompt that all requests begin with is computed once, and its finished chunks are shared.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from path_attention.models.cache_path import PathCacheLayer
from path_attention.models.modeling_path import PaTHForCausalLM

# Requests under way at once, by default: a step reads the weights once for all of them.
SLOTS = 16
# Shorter common beginnings are not worth a slot: one leaf.
SHARED_PREFIX = 64


@dataclass(frozen=True)
class NewToken:
    """One generated token."""

    request: int  # which prompt
    token: int
    is_last: bool


@dataclass
class _Active:
    request: int
    feed: list[int]  # what the model is to see next
    remaining: int


class _Batch:
    """A cache of a fixed number of slots, and who is in them. Slot ``slots`` holds the shared beginning."""

    def __init__(self, model: PaTHForCausalLM, slots: int, prefix: Sequence[int]) -> None:
        self.model, self.slots, self.prefix = model, slots, list(prefix)
        self.cache = DynamicCache(config=model.config)
        self.active: dict[int, _Active] = {}
        if self.prefix:
            self._forward({slots: self.prefix})

    @property
    def free(self) -> list[int]:
        return [slot for slot in range(self.slots) if slot not in self.active]

    @property
    def layers(self) -> list[PathCacheLayer]:
        return [layer for layer in self.cache.layers if isinstance(layer, PathCacheLayer)]

    def enter(self, requests: dict[int, _Active]) -> None:
        """Put requests into free slots, behind a copy of the shared beginning."""
        self.active |= requests
        if self.prefix and requests:
            index = [self.slots if slot in requests else slot for slot in range(self.slots + 1)]
            for layer in self.layers:
                layer.batch_select_indices(torch.tensor(index))

    def leave(self, slot: int) -> None:
        del self.active[slot]
        for layer in self.layers:
            layer.clear(slot)

    def step(self) -> tuple[list[int], Tensor]:
        """Feed what is to be fed: the slots that were, and their logits (slots, vocabulary)."""
        feeds = {slot: one.feed for slot, one in sorted(self.active.items())}
        return list(feeds), self._forward(feeds)

    def _forward(self, feeds: dict[int, list[int]]) -> Tensor:
        device = self.model.device
        ends = list(accumulate((len(feeds.get(slot, ())) for slot in range(self.slots + 1)), initial=0))
        ids = torch.tensor([[token for slot in sorted(feeds) for token in feeds[slot]]], device=device)
        last = torch.tensor([ends[slot + 1] - 1 for slot in sorted(feeds)], device=device)
        out = self.model(ids, cu_seqlens=torch.tensor(ends), past_key_values=self.cache, logits_to_keep=last)
        return out.logits[0].float()


def _choose(logits: Tensor, temperature: float, generator: torch.Generator | None) -> list[int]:
    if not temperature:
        return logits.argmax(-1).tolist()
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator).squeeze(1).tolist()


def _common_prefix(prompts: Sequence[Sequence[int]]) -> list[int]:
    """What all prompts begin with, but for one token of the shortest: each is to be fed something."""
    if len(prompts) < 2:
        return []
    length = min(len(prompt) for prompt in prompts) - 1
    first = list(prompts[0][:length])
    while any(list(prompt[: len(first)]) != first for prompt in prompts):
        first.pop()
    return first if len(first) >= SHARED_PREFIX else []


@torch.no_grad()
def _run(
    model: PaTHForCausalLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    slots: int,
    stop: frozenset[int],
    temperature: float,
    generator: torch.Generator | None,
) -> Iterator[NewToken]:
    batch = _Batch(model, min(slots, len(prompts)), _common_prefix(prompts))
    waiting = deque(_Active(n, list(x[len(batch.prefix) :]), max_new_tokens) for n, x in enumerate(prompts))
    while waiting or batch.active:
        batch.enter({slot: waiting.popleft() for slot in batch.free[: len(waiting)]})
        fed, logits = batch.step()
        for slot, token in zip(fed, _choose(logits, temperature, generator), strict=True):
            one = batch.active[slot]
            one.feed, one.remaining = [token], one.remaining - 1
            is_last = not one.remaining or token in stop
            if is_last:
                batch.leave(slot)
            yield NewToken(one.request, token, is_last)


def generate_batch(
    model: PaTHForCausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    slots: int = SLOTS,
    eos_token_id: int | Sequence[int] | None = None,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Iterator[NewToken]:
    """Continue every prompt, many at a time; tokens come as they are made.

    Args:
        model: of mixer "path" or "path_fox".
        prompts: token ids of each request, at least one.
        max_new_tokens: of each request.
        slots: requests under way at once; the others wait for a free one.
        eos_token_id: tokens that end a request; None takes the generation configuration's.
        temperature: 0 takes the likeliest token, otherwise tokens are drawn.
        generator: random numbers to draw with.

    Raises:
        ValueError: naming the argument, before anything is computed.
    """
    if set(model.config.layer_types) != {"path_attention"}:
        raise ValueError(f"model: got mixer {model.config.mixer!r}; wanted path or path_fox")
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("prompts: got an empty one or none; wanted at least one token in each")
    for name, value in (("max_new_tokens", max_new_tokens), ("slots", slots)):
        if value < 1:
            raise ValueError(f"{name}: got {value}; wanted at least 1")
    if temperature < 0:
        raise ValueError(f"temperature: got {temperature}; wanted at least 0")
    ends: Any = model.generation_config.eos_token_id if eos_token_id is None else eos_token_id
    stop = frozenset([] if ends is None else [ends] if isinstance(ends, int) else ends)
    return _run(model, prompts, max_new_tokens, slots, stop, temperature, generator)
