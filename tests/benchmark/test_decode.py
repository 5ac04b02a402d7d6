"""The benchmark of the cache checks before it times, and writes down what it found."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from path_attention.benchmark import decode
from path_attention.benchmark.operator import WrongResult
from path_attention.cache import PathCache


def test_shapes_are_written_as_they_are_read() -> None:
    for text in ("16x8192x32x64", "4x512x32/8x128"):
        assert str(decode.Shape.parse(text)) == text
    for text in ("16x8192", "1x2x3x4x5", "1x2x3/2x4", "0x1x1x1", "axbxcxd"):
        with pytest.raises(ValueError, match="--shapes: wanted"):
            decode.Shape.parse(text)


def test_a_wrong_cache_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = PathCache.attend

    def off_by_little(self: PathCache, q: Tensor, k: Tensor, v: Tensor, w: Tensor, beta: Tensor) -> Tensor:
        return right(self, q, k, v, w, 0.999 * beta)

    monkeypatch.setattr(PathCache, "attend", off_by_little)
    with pytest.raises(WrongResult, match="Nothing was timed"):
        decode.check_steps("cpu")


def test_what_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {
        "vocab_size": 9,
        "hidden_size": 16,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    monkeypatch.setitem(decode.MODELS, "small", tiny)
    out, plot = tmp_path / "new" / "decode.json", tmp_path / "decode.png"
    decode.run_decode_benchmark(shapes=["2x150x4/2x16"], repeats=2, out=out, plot=plot)
    found = json.loads(out.read_text())
    row = found["rows"][0]
    assert row["step_ratio"] > 0
    assert row["prefill"]["path"]["repeats"] == 2
    assert [x["batch"] for x in found["models"]] == [1, 16]
    assert all(x["path"] > 0 and x["others"] == ["rope"] for x in found["models"])
    assert plot.stat().st_size > 0
    told = capsys.readouterr().out
    lines = ["check ...", "2x150x4/2x16 ...", "small model, batch 1 ...", "small model, batch 16 ..."]
    assert told.splitlines()[:4] == lines  # each before it is timed
    assert "2x150x4/2x16" in told.partition(lines[-1])[2]


def test_tokens_of_a_model_by_calls() -> None:
    """The protocol of flash-linear-attention's model is that of ours: every call gets what the one before returned."""
    pytest.importorskip("transformers")
    from path_attention.benchmark.fla_decode import seconds_of_calls
    from path_attention.models import PaTHConfig, PaTHForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    model = PaTHForCausalLM(PaTHConfig(num_attention_heads=2, **sizes)).eval()
    lengths = []
    forward = model.forward

    def count(ids: torch.Tensor, **options: Any) -> Any:
        cache = options.get("past_key_values")
        lengths.append((ids.shape[1], options["attention_mask"].shape[1], cache.get_seq_length() if cache else 0))
        return forward(ids, **options)

    model.forward = count
    assert seconds_of_calls(model, torch.ones(2, 5, dtype=torch.long), tokens=2, repeats=3, warm=1) > 0
    assert lengths == [(5, 5, 0), *((1, 6 + n, 5 + n) for n in range(7))]
