"""Language models by mixer in miniature: stops and goes on, and the report is made from the JSON alone."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from path_attention import cli
from path_attention.reproduction import language_model
from tests.training.texts import write_texts


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app(), ["reproduce", "language-model", "--quick", *(str(a) for a in arguments)])


@pytest.fixture
def tiny(tmp_path: Path) -> list[object]:
    text = write_texts(tmp_path / "text")
    changes = [
        f"data.files={{paths: ['{text}'], include: ['**/*.txt']}}",
        f"data.cache={tmp_path / 'cache'}",
        "data.vocab_size=280",
        "data.length=32",
        "model={hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 16}",
        "mixers=[rope,path]",
        "training={steps: 6, batch_size: 2, learning_rate: 1e-2, log_every: 2, eval_every: 3, save_every: 2}",
        "evaluation={windows: 4, quick_windows: 2, batch_size: 2, long_length: 256, long_windows: 3}",
    ]
    return [*changes, "--device", "cpu", "--runs", tmp_path / "runs", "--out", tmp_path / "out"]


def test_it_stops_in_time_and_the_same_command_ends_with_a_report(tiny: list[object], tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = call(*tiny, "--time-limit", 1e-3)
    assert first.exit_code == 0, first.output
    assert "rope: stopped at step 2 of 6; the same command goes on" in first.stdout
    assert json.loads((out / "language-model-quick.json").read_text())["missing"] == ["rope", "path"]
    assert not (out / "language-model-quick.md").exists()
    assert call(*tiny, "--rows", "rope").exit_code == 0
    result = call(*tiny)
    assert result.exit_code == 0, result.output
    numbers = json.loads((out / "language-model-quick.json").read_text())
    assert list(numbers["models"]) == ["rope", "path"]
    assert numbers["missing"] == []
    assert [step for step, _ in numbers["models"]["path"]["losses"]] == [2, 4, 6]
    assert numbers["corpus"]["train"]["tokens"] > 1000
    report = (out / "language-model-quick.md").read_text()
    for text in (
        "| RoPE |",
        "| PaTH |",
        "3 stretches of 256",
        "Loss of whole stretches against RoPE's",
        "The quick version",
    ):
        assert text in report

    # The report anew, from the JSON alone.
    made = {p.name: p.read_bytes() for p in out.iterdir()}
    assert len(made) == 4
    for path in out.iterdir():
        if path.suffix != ".json":
            path.unlink()
    again = CliRunner().invoke(
        cli.app(), ["reproduce", str(out / "language-model-quick.json"), "--report-only", "--runs", "nowhere"]
    )
    assert again.exit_code == 0, again.output
    assert {p.name: p.read_bytes() for p in out.iterdir()} == made


def test_what_does_not_fit_is_named(tiny: list[object], tmp_path: Path) -> None:
    for arguments, message in {
        ("--rows", "sba"): "--rows: no sba; there are rope, path",
        ("--seeds", "2"): "--seeds: wanted none for language-model",
        ("--device", "tpu"): "--device: wanted cpu",
    }.items():
        result = call(*tiny, *arguments)
        assert result.exit_code == 2
        assert message in result.stderr
    other = tmp_path / "language-model.json"
    other.write_text("{}")
    with pytest.raises(ValueError, match="wanted the JSON of language-model"):
        language_model.read(other)
