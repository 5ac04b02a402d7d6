"""Tokens a second of flash-linear-attention's PaTH model, of the sizes of ours and with random weights.

    python -m path_attention.benchmark.fla_decode --model 760m --batch 1 --prompt 4096

A process of its own, which prints a JSON object: its kernels are tuned for minutes at worst, and whoever starts it sets
the limit. Its cache grows by copies at every token and a CUDA graph cannot hold it, so tokens are eager calls.
"""

import argparse
import json
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from path_attention.benchmark.decode import MODELS

TOKENS, REPEATS = 64, 3
# Before anything is timed: kernels are compiled for the first tokens, and again for a length that changes.
WARM = 8


def build(sizes: dict[str, int], dtype: torch.dtype, device: str) -> Any:
    """flash-linear-attention's model in the sizes that PaTHConfig has.

    Raises:
        ImportError: flash-linear-attention is not installed.
    """
    from fla.models import PaTHAttentionConfig, PaTHAttentionForCausalLM

    from path_attention.models import PaTHConfig

    ours: Any = PaTHConfig(**sizes)  # type: ignore[arg-type]
    config = PaTHAttentionConfig(
        vocab_size=ours.vocab_size,
        hidden_size=ours.hidden_size,
        intermediate_size=ours.intermediate_size,
        num_hidden_layers=ours.num_hidden_layers,
        num_heads=ours.num_attention_heads,
        num_kv_heads=ours.num_key_value_heads,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return PaTHAttentionForCausalLM(config).to(dtype).eval()


@torch.no_grad()
def seconds_of_calls(model: Any, ids: Tensor, tokens: int, repeats: int, warm: int) -> float:
    """Median of stretches of so many greedy tokens, each a call of the model with its cache."""
    mask = torch.ones_like(ids)
    out = model(ids, attention_mask=mask, use_cache=True, logits_to_keep=1)

    def make(count: int) -> float:
        nonlocal out, mask
        start = time.perf_counter()
        for _ in range(count):
            token = out.logits[:, -1:].argmax(-1)
            mask = torch.cat([mask, torch.ones_like(token)], 1)
            cache = out.past_key_values
            out = model(token, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
        if ids.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    make(warm)
    return statistics.median(make(tokens) for _ in range(repeats))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="760m", choices=sorted(MODELS))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=4096)
    arguments = parser.parse_args()
    model = build(MODELS[arguments.model], torch.bfloat16, "cuda")
    ids = torch.randint(1, model.config.vocab_size, (arguments.batch, arguments.prompt), device="cuda")
    seconds = seconds_of_calls(model, ids, TOKENS, REPEATS, WARM)
    print(json.dumps({"tokens_per_second": arguments.batch * TOKENS / seconds}))


if __name__ == "__main__":
    main()
