"""The benchmark checks before it times, times in turn, and writes down where its numbers come from."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from path_attention import path_attention
from path_attention.benchmark import measure, operator, run_operator_benchmark
from path_attention.benchmark.contenders import CONTENDERS, Contender, Setting, contender
from path_attention.benchmark.full_matrix import full_matrix_path_attention
from tests.ops.inputs import Shape, assert_same, make_inputs, oracle, out_and_gradients


@pytest.mark.parametrize("length", [1, 2, 65, 150])
def test_the_full_matrix_baseline_equals_the_definition(length: int) -> None:
    inputs = make_inputs(Shape(length, batch=2))
    assert_same(out_and_gradients(full_matrix_path_attention, inputs), oracle(inputs))


def test_every_contender_equals_its_definition() -> None:
    errors = operator.check_contenders(Setting(length=0, dim=16))
    assert errors.keys() == {x.name for x in CONTENDERS}


def test_a_wrong_contender_is_not_timed() -> None:
    def off_by_little(q: Tensor, k: Tensor, v: Tensor, w: Tensor, beta: Tensor) -> Tensor:
        return path_attention(q, k, v, w, 0.999 * beta)

    wrong: Contender = replace(contender("path"), name="wrong", function=off_by_little)
    with pytest.raises(operator.WrongResult, match=r"wrong: the output at length 300 .* Nothing was timed"):
        operator.check_contenders(Setting(length=0, dim=16), (CONTENDERS[0], wrong))


def test_times_are_taken_in_turn() -> None:
    calls: list[str] = []
    functions = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    times = measure.time_interleaved(functions, repeats=3, seconds_each=60)
    assert calls == ["a", "b"] * 4  # one to warm up
    assert all(x.repeats == 3 and x.min_ms <= x.median_ms <= x.max_ms for x in times.values())


def test_a_slow_contender_is_called_less_often() -> None:
    times = measure.time_interleaved({"slow": lambda: torch.randn(2**16), "fast": lambda: None}, 50, 1e-9)
    assert times["slow"].repeats == 1


def test_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(operator, "peak_memory", lambda name, setting: 2**20)
    out = tmp_path / "new" / "operator.json"
    run_operator_benchmark(lengths=(70,), repeats=2, out=out)
    found = json.loads(out.read_text())
    assert {"command", "date", "commit", "machine", "versions", "setting", "errors", "rows"} <= found.keys()
    assert [row["contender"] for row in found["rows"]] == [x.name for x in CONTENDERS]
    row = found["rows"][1]
    assert row["forward_backward"]["repeats"] == 2
    assert row["forward_backward_ratio"] > 0
    assert row["peak_extra_bytes"] == 2**20
    assert "PaTH, full matrix" in capsys.readouterr().out


def test_what_does_not_run_says_why() -> None:
    baseline = contender("path_full_matrix")
    assert baseline.unsupported_reason(Setting(length=4096)) is None
    assert "quadratic" in str(baseline.unsupported_reason(Setting(length=8192)))
    assert "heads" in str(baseline.unsupported_reason(Setting(length=64, heads=2)))


@pytest.mark.slow  # a process that imports torch
def test_peak_memory_of_a_quadratic_and_a_linear_attention() -> None:
    setting = Setting(length=2048, query_heads=1, heads=1, dim=16)
    quadratic, linear = (measure.peak_memory(name, setting) for name in ("path_full_matrix", "path"))
    if quadratic is None or linear is None:
        pytest.skip("this system does not tell a process its peak memory")
    assert quadratic > 4 * setting.length**2
    assert linear < quadratic / 2


@pytest.mark.parametrize(
    "program, arguments, command",
    [
        ("/somewhere/bin/path-attention", ["benchmark", "operator"], "path-attention benchmark operator"),
        ("/somewhere/path_attention/__main__.py", ["demo"], "path-attention demo"),
        (
            "/here/benchmarks/accuracy.py",
            ["--out", "results/x.json"],
            "python benchmarks/accuracy.py --out results/x.json",
        ),
        ("benchmarks/accuracy.py", ["--out", "/here/x.json"], "python benchmarks/accuracy.py --out x.json"),
    ],
)
def test_the_command_names_no_folder_of_this_machine(
    program: str, arguments: list[str], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", [program, *arguments])
    assert measure.environment()["command"] == command
