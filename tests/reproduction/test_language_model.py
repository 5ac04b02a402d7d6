"""Language models by mixer in miniature: stops and goes on, and the report is made from the JSON alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from path_attention import cli
from path_attention.reproduction import language_model
from path_attention.training import run
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
    assert first.exit_code == 1, first.output
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


def test_models_in_the_json_are_finished_though_their_runs_are_gone(tiny: list[object], tmp_path: Path) -> None:
    """A machine that is lost takes the run folders with it: what was written to --out must be enough to go on."""
    file = tmp_path / "out" / "language-model-quick.json"
    assert call(*tiny, "--rows", "path", "--commit", "abc123").exit_code == 0
    first = json.loads(file.read_text())["models"]["path"]
    shutil.rmtree(tmp_path / "runs")
    result = call(*tiny, "training.save_every=6", "training.log_every=6")
    assert result.exit_code == 2
    assert "training.log_every was 2, is 6" in result.stderr  # nobody's numbers are mixed with those of another recipe
    result = call(*tiny, "mixers=[rope,path]", "--commit", "def456")
    assert result.exit_code == 0, result.output
    assert "path: finished already in" in result.stdout
    assert not (tmp_path / "runs" / "python_code_quick" / "path").exists()
    numbers = json.loads(file.read_text())
    assert list(numbers["models"]) == ["rope", "path"]
    assert numbers["models"]["path"] == first
    report = file.with_suffix(".md").read_text()
    for text in ("RoPE: cpu", "commit def456", "PaTH: cpu", "commit abc123"):
        assert text in report
    # Other text is another result, and is refused before anything is trained.
    (tmp_path / "text" / "more.txt").write_text("other words " * 50)
    result = call(*tiny, "mixers=[rope,path,fox]")
    assert result.exit_code == 2
    assert "another corpus" in result.stderr
    assert "--out" in result.stderr


def test_json_has_every_model_as_soon_as_it_is_finished(
    tiny: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while the second model is trained, the first one's numbers are there."""
    begun = []

    def killed(recipe: Any, source: Any, mixer: str, *rest: Any) -> Any:
        begun.append(mixer)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return train_one(recipe, source, mixer, *rest)

    train_one = run._train_one
    monkeypatch.setattr(run, "_train_one", killed)
    assert call(*tiny).exit_code == 1
    assert begun == ["rope", "path"]
    numbers = json.loads((tmp_path / "out" / "language-model-quick.json").read_text())
    assert list(numbers["models"]) == ["rope"]
    assert numbers["missing"] == ["path"]
    # A model is not begun when the time is up, as long as another one was trained in the same call.
    monkeypatch.setattr(run, "_train_one", train_one)
    shutil.rmtree(tmp_path / "out")
    result = call(*tiny, "training.log_every=6", "training.save_every=6", "name=short", "--time-limit", 1e-3)
    assert result.exit_code == 1, result.output
    assert "path: not begun, time is up" in result.stdout
    assert json.loads((tmp_path / "out" / "language-model-quick.json").read_text())["missing"] == ["path"]


def test_what_does_not_fit_is_named(tiny: list[object], tmp_path: Path) -> None:
    for arguments, message in {
        ("--rows", "sba"): "--rows: no sba; there are rope, path",
        ("--seeds", "2"): "--seeds: wanted none for language-model",
        ("--device", "tpu"): "--device: wanted cpu",
        ("--time-limit", "0"): "--time-limit: wanted a number above 0",
        ("evaluation.long_length=null",): "evaluation.long_length: wanted a number of tokens",
    }.items():
        result = call(*tiny, *arguments)
        assert result.exit_code == 2
        assert message in result.stderr
    other = tmp_path / "language-model.json"
    for text, message in {"{}": "wanted the JSON of language-model", "{": "no JSON"}.items():
        other.write_text(text)
        with pytest.raises(ValueError, match=message):
            language_model.read(other)
