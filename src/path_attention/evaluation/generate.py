"""``path-attention generate``: text from a trained model, token by token."""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from path_attention.data.bytes import SEPARATOR, VOCAB_SIZE
from path_attention.integrations import generate_batch
from path_attention.models import PaTHForCausalLM
from path_attention.training.run import FINAL, RECIPE

Encode = Callable[[str], list[int]]
Decode = Callable[[Sequence[int]], str]


def load(model: Path) -> tuple[PaTHForCausalLM, Encode, Decode]:
    """A model from its folder, or from a run folder, with what makes its tokens out of text and text out of them.

    Raises:
        FileNotFoundError: no model there.
        ValueError: a model whose tokens nothing in its folder explains.
    """
    folder = model / FINAL if (model / FINAL).is_dir() else model
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{model}: no model here; wanted a folder with config.json, or runs/NAME/MIXER")
    loaded = PaTHForCausalLM.from_pretrained(folder).eval()
    return loaded, *_vocabulary(folder, loaded.config.vocab_size)


def _vocabulary(folder: Path, size: int) -> tuple[Encode, Decode]:
    if (folder / "tokenizer_config.json").is_file():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        return tokenizer.encode, lambda tokens: str(tokenizer.decode(list(tokens)))
    if (folder.parent / RECIPE).is_file():
        from path_attention.training import load_recipe

        task: Any = load_recipe(str(folder.parent / RECIPE)).task
        if task is not None:
            return _characters(task.tokens)
    if size == VOCAB_SIZE:
        return _encode_bytes, _decode_bytes
    raise ValueError(f"{folder}: {size} tokens, and neither a tokenizer nor a recipe that says what they mean")


def _encode_bytes(text: str) -> list[int]:
    return [SEPARATOR, *text.encode()]


def _decode_bytes(tokens: Sequence[int]) -> str:
    return bytes(token for token in tokens if token < SEPARATOR).decode(errors="replace")


def _characters(names: Sequence[str]) -> tuple[Encode, Decode]:
    def encode(text: str) -> list[int]:
        unknown = sorted(set(text) - set(names))
        if unknown:
            raise ValueError(f"--prompt: got {unknown}, which are no tokens of the model; wanted {' '.join(names)}")
        return [names.index(character) for character in text]

    return encode, lambda tokens: "".join(names[token] for token in tokens)


def generate(
    model: Path,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    device: str,
    out: TextIO | None = None,
) -> float:
    """Write a continuation of every prompt to ``out`` (stdout) and return tokens a second.

    One prompt: each token as it comes. Several: each continuation, with its prompt, when it is done.

    Raises:
        ValueError: what the model cannot continue; a device that is not there.
    """
    if not _is_there(device):
        raise ValueError(f"--device: wanted cpu, or another device that this machine has, got {device!r}")
    out = sys.stdout if out is None else out
    loaded, encode, decode = load(model)
    ids = [encode(prompt) for prompt in prompts]
    if not all(ids):
        raise ValueError("--prompt: got an empty one; wanted at least one token")
    loaded.to(device)  # type: ignore[arg-type]
    generator = torch.Generator(device).manual_seed(seed)
    made: list[list[int]] = [[] for _ in prompts]
    shown = 0
    start = time.perf_counter()
    for request, token, is_last in _tokens(loaded, ids, max_new_tokens, temperature, generator):
        made[request].append(token)
        if len(prompts) == 1:
            text = decode(made[0])
            # A character may take several tokens: what is not one yet is held back.
            whole = len(text) if is_last else len(text.rstrip("\ufffd"))
            out.write(text[shown:whole])
            shown = max(shown, whole)
        elif is_last:
            out.write(f"[{request + 1}] {prompts[request]}{decode(made[request])}\n")
        out.flush()
    seconds = time.perf_counter() - start
    if len(prompts) == 1:
        out.write("\n")
    return sum(map(len, made)) / seconds


def _is_there(device: str) -> bool:
    try:
        torch.empty(0, device=device)
        torch.Generator(device)
    except (RuntimeError, AssertionError, NotImplementedError):  # torch's, by kind of device and how it was built
        return False
    return True


def _tokens(
    model: PaTHForCausalLM, prompts: list[list[int]], count: int, temperature: float, generator: torch.Generator
) -> Any:
    if set(model.config.layer_types) == {"path_attention"}:
        for new in generate_batch(model, prompts, max_new_tokens=count, temperature=temperature, generator=generator):
            yield new.request, new.token, new.is_last
        return
    for request, prompt in enumerate(prompts):  # keys and values have no packed form here: one after another
        yield from _one_by_one(model, request, prompt, count, temperature, generator)


@torch.no_grad()
def _one_by_one(
    model: PaTHForCausalLM, request: int, prompt: list[int], count: int, temperature: float, generator: torch.Generator
) -> Any:
    feed, cache = torch.tensor([prompt], device=model.device), None
    ends = model.generation_config.eos_token_id
    stop = [] if ends is None else [ends] if isinstance(ends, int) else ends
    for n in range(count):
        out = model(feed, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, logits = out.past_key_values, out.logits[0, -1].float()
        if temperature:
            token = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
        else:
            token = int(logits.argmax())
        yield request, token, n == count - 1 or token in stop
        if token in stop:
            return
        feed = torch.tensor([[token]], device=model.device)
