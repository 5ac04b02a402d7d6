"""The benchmark of whole language models, in miniature: rows are written as they come, and a later call goes on."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "language_model.py"
TINY = ["--size", "tiny", "--device", "cpu", "--batch", "1", "--length", "32", "--long", "64", "--repeats", "1"]


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_language_model", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(
        sys, "argv", [str(SCRIPT), *TINY, "--no-compile", "--commit", "abc", *(str(a) for a in arguments)]
    )
    script.main()


def rows(out: Path, part: str) -> list[tuple[str, int]]:
    return [(row["mixer"], row["call"]) for row in json.loads(out.read_text())[part]]


def test_what_is_measured_stays_and_the_same_command_goes_on(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    read = script.one_pass

    def killed(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "one_pass", killed)
    with pytest.raises(SystemExit, match="interrupted; the same command goes on"):
        call(script, monkeypatch, "--out", out)
    # What the paper's claim is about comes first, between two measurements of what it is compared with.
    assert rows(out, "training") == [("rope", 1), ("path", 1), ("rope", 1)]
    assert rows(out, "long") == []
    monkeypatch.setattr(script, "one_pass", read)
    call(script, monkeypatch, "--out", out)
    # The machine may be another one: rope is measured again, for the others alone.
    assert rows(out, "training")[3:] == [("rope", 2), ("path_fox", 2), ("fox", 2), ("rope", 2)]
    assert rows(out, "long") == [("path", 2), ("rope", 2), ("fox", 2), ("path_fox", 2)]
    found = json.loads(out.read_text())["training"]
    for of_call in (1, 2):
        base = [row["tokens_per_second"] for row in found if (row["mixer"], row["call"]) == ("rope", of_call)]
        for row in (row for row in found if row["call"] == of_call):
            assert row["of_rope"] == pytest.approx(row["tokens_per_second"] / (sum(base) / 2), abs=1e-4)
    before = out.read_bytes()
    call(script, monkeypatch, "--out", out)
    assert json.loads(out.read_text()) == json.loads(before)  # nothing was left
    with pytest.raises(SystemExit, match="results of commit abc, not def"):
        call(script, monkeypatch, "--commit", "def", "--out", out)


def test_a_row_that_fails_leaves_the_others_and_is_tried_again(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    read = script.one_pass

    def full(size: str, mixer: str, *rest: Any) -> Any:
        if mixer == "path":
            raise torch.OutOfMemoryError("no memory")
        return read(size, mixer, *rest)

    monkeypatch.setattr(script, "one_pass", full)
    with pytest.raises(SystemExit, match="path: OutOfMemoryError: no memory"):
        call(script, monkeypatch, "--mixers", "rope,path", "--out", out)
    assert [("failed" in row) for row in json.loads(out.read_text())["long"]] == [True, False]
    monkeypatch.setattr(script, "one_pass", read)
    call(script, monkeypatch, "--mixers", "rope,path", "--out", out)
    assert rows(out, "long") == [("rope", 1), ("path", 2)]
    call(script, monkeypatch, "--mixers", "path_fox", "--time-limit", 0, "--out", out)
    assert len(rows(out, "training")) == 3  # no row was begun


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", 0], "--repeats: wanted a number from 1 on, got 0"),
        (["--batch", 0], "--batch: wanted a number from 1 on, got 0"),
        (["--length", -4], "--length: wanted a number from 0 on, got -4"),
        (["--long", "128,0"], r"--long: wanted numbers above 0, got \[128, 0\]"),
        (["--time-limit", -1], "--time-limit: wanted a number from 0 on, got -1"),
        (["--mixers", ""], "--mixers: no ''; there are path"),
        (["--device", "tpu"], "--device: wanted cpu or cuda, got 'tpu'"),
    ],
)
def test_mistakes_are_named_before_anything_is_measured(
    arguments: list[object],
    message: str,
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="2"):
        call(script, monkeypatch, *arguments)
    assert re.search(message, capsys.readouterr().err)


def test_a_damaged_file_is_named(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    out.write_text('{"benchmark": ')
    with pytest.raises(SystemExit, match=r"--out: .*out\.json is not JSON"):
        call(script, monkeypatch, "--out", out)
    with pytest.raises(SystemExit, match="--out: wanted a file, got the folder"):
        call(script, monkeypatch, "--out", tmp_path)


def test_a_training_step_that_keeps_what_it_else_computes_again(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told: list[bool] = []
    prepare = script.parallel.prepare

    def watched(model: Any, settings: Any, mesh: Any) -> None:
        told.append(settings.recompute_attention)
        prepare(model, settings, mesh)

    monkeypatch.setattr(script.parallel, "prepare", watched)
    out = tmp_path / "out.json"
    call(script, monkeypatch, "--mixers", "rope,path,path_kept", "--out", out)
    assert rows(out, "training") == [("rope", 1), ("path", 1), ("rope", 1), ("path_kept", 1), ("rope", 1)]
    assert told == [True, True, True, False, True]
    assert rows(out, "long") == [("path", 1), ("rope", 1)]


def test_the_other_implementation_is_trained_as_it_comes(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None if name == "fla" else find(name))
    with pytest.raises(SystemExit, match="2"):
        call(script, monkeypatch, "--mixers", "rope,fla")
    assert "--mixers: fla is flash-linear-attention's model, which is not installed" in capsys.readouterr().err

    # It has no CPU kernels: a model of ours in its place shows which rows it gets.
    def other(sizes: dict[str, int], dtype: torch.dtype, device: str) -> Any:
        assert (sizes, dtype, device) == (script.SIZES["tiny"], torch.float32, "cpu")
        return script.PaTHForCausalLM(script.PaTHConfig(mixer="path", **sizes)).eval()

    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: find("torch") if name == "fla" else find(name))
    monkeypatch.setattr(script.fla_decode, "build", other)
    compiled: list[bool] = []
    step = script.Step

    def watched(model: Any, batch: int, length: int, compile: bool, cuda_graphs: bool, recompute: bool) -> Any:
        compiled.append(compile)
        return step(model, batch, length, False, False)

    monkeypatch.setattr(script, "Step", watched)
    out = tmp_path / "out.json"
    call(script, monkeypatch, "--compile", "--mixers", "rope,fla", "--out", out)
    assert rows(out, "training") == [("rope", 1), ("fla", 1), ("rope", 1)]
    assert compiled == [True, False, True]
    assert rows(out, "long") == [("rope", 1)]
