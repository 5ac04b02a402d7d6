"""The GPU benchmark with CPU functions in place of kernels and clock: what it times, writes and continues from."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from path_attention import path_attention
from path_attention.benchmark import cuda_contenders, cuda_measure, cuda_operator
from path_attention.benchmark.contenders import causal_softmax_attention
from path_attention.benchmark.cuda_contenders import CUDA_CONTENDERS, CudaContender, make_arguments
from path_attention.benchmark.cuda_measure import CudaTimes, DeviceLost, Exact
from path_attention.benchmark.operator import WrongResult
from path_attention.benchmark.shapes import Shape

SHAPE = "2x70x4/2x16"


def path(q: Tensor, k: Tensor, v: Tensor, w: Tensor, beta: Tensor, g: Tensor) -> Tensor:
    return path_attention(q, k, v, w, beta)


def path_fox(*given: Tensor) -> Tensor:
    return path_attention(*given)


def off_by_little(q: Tensor, k: Tensor, v: Tensor, w: Tensor, beta: Tensor, g: Tensor) -> Tensor:
    return path_attention(q, k, v, w, 0.9 * beta)


def failing(*given: Tensor) -> Tensor:
    raise RuntimeError("out of shared memory\nRequired: more")


def fake(name: str, formula: Any, function: Callable[..., Tensor], *, ours: bool = False) -> CudaContender:
    return CudaContender(name, name, formula, function, lambda shape, given: None, ours)


CUDNN = fake("cudnn", "softmax", causal_softmax_attention)
OURS = fake("path_triton", "path", path, ours=True)
FOX = fake("path_fox_triton", "path_fox", path_fox, ours=True)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A CPU that passes for a GPU; its keys: alive, contenders, timed (calls of the clock), gpu."""
    state: dict[str, Any] = {"alive": True, "contenders": [CUDNN, OURS, FOX], "timed": [], "gpu": "a GPU"}

    def clock(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, CudaTimes | Exception]:
        state["timed"].append(list(functions))
        for function in functions.values():
            function()
        ms = 1.0 if len(state["timed"]) % 2 else 3.0
        return {name: CudaTimes(ms * (n + 1), ms, 9.0, repeats, 1, "graph") for n, name in enumerate(functions)}

    monkeypatch.setattr(cuda_measure, "time_in_turn", clock)
    monkeypatch.setattr(cuda_measure, "peak_extra_bytes", lambda function: 2**20)
    monkeypatch.setattr(cuda_measure, "device_is_alive", lambda: state["alive"])
    monkeypatch.setattr(cuda_operator, "without", lambda names: state["contenders"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: state["gpu"])
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return state


def benchmark(out: Path | None = None, shapes: tuple[str, ...] = (SHAPE,)) -> dict[str, Any]:
    return cuda_operator.run_cuda_operator_benchmark(shapes=shapes, repeats=2, device="cpu", out=out, commit="abc")


def test_the_exact_result_is_that_of_each_formula() -> None:
    """In float64 a right function is off by 1e-16 times some hundred operations; w, beta and g are float32, and so are
    their gradients: half of float32's eps."""
    given = make_arguments(Shape.parse(SHAPE), torch.float64, "cpu")
    d_out = torch.randn_like(given.q)
    exact = Exact(given, d_out)
    for contender in (CUDNN, OURS, FOX):
        errors = exact.errors(contender.formula, cuda_measure.run(contender, given, d_out))
        assert errors["output"] < 1e-12, contender.name
        assert errors["gradients"] <= torch.finfo(torch.float32).eps / 2, contender.name


def test_what_is_written(machine: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "operator.json"
    benchmark(out)
    found = json.loads(out.read_text())
    assert {"command", "date", "commit", "machine", "versions", "gpu", "dtype", "options", "rows"} <= found.keys()
    row = found["rows"][0]
    assert row["shape"] == SHAPE
    ours = row["contenders"]["path_triton"]
    assert ours["forward"] == {
        "median_ms": 2, "min_ms": 1, "max_ms": 9, "repeats": 2, "calls": 1, "timed_by": "graph"
    }  # fmt: skip
    assert ours["backward"]["median_ms"] == ours["forward_backward"]["median_ms"] - 2 == 4
    assert ours["forward_ratio"] == ours["backward_ratio"] == ours["forward_backward_ratio"] == 2
    assert ours["memory_ratio"] == 1
    assert 0 < ours["errors"]["output"] < 0.01
    assert f"{SHAPE}   (auto: path forward torch" in capsys.readouterr().out


def test_a_wrong_result_is_not_timed(machine: dict[str, Any], tmp_path: Path) -> None:
    machine["contenders"] = [CUDNN, fake("path_triton", "path", off_by_little, ours=True), FOX]
    with pytest.raises(WrongResult, match=rf"{SHAPE} path_triton"):
        benchmark(tmp_path / "operator.json")
    row = json.loads((tmp_path / "operator.json").read_text())["rows"][0]
    assert "wrong: output and gradients" in row["contenders"]["path_triton"]["failed"]
    assert machine["timed"] == [["cudnn", "path_fox_triton"]] * 2


def test_a_rival_that_fails_is_a_finding(machine: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    machine["contenders"] = [CUDNN, OURS, fake("fla_path", "path", failing), fake("fla_x", "path", off_by_little)]
    row = benchmark()["rows"][0]
    assert row["contenders"]["fla_path"] == {"failed": "RuntimeError: out of shared memory"}
    assert "wrong" in row["contenders"]["fla_x"]["failed"]
    assert row["wrong"] == []  # of this library's
    assert machine["timed"] == [["cudnn", "path_triton"]] * 2
    assert "fla_path - RuntimeError: out of shared memory" in capsys.readouterr().out


def test_finished_shapes_are_not_measured_again(machine: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "operator.json"
    benchmark(out)
    benchmark(out, (SHAPE, "1x70x2x16"))
    assert len(machine["timed"]) == 4
    assert [row["shape"] for row in json.loads(out.read_text())["rows"]] == [SHAPE, "1x70x2x16"]


def test_results_of_another_gpu_are_not_continued(machine: dict[str, Any], tmp_path: Path) -> None:
    benchmark(tmp_path / "operator.json")
    machine["gpu"] = "another"
    with pytest.raises(FileExistsError, match="results of gpu a GPU, not another"):
        benchmark(tmp_path / "operator.json")


def test_who_broke_the_device_is_left_out_next_time(machine: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "operator.json"
    machine["contenders"] = [CUDNN, OURS, fake("fla_path", "path", failing)]
    machine["alive"] = False
    with pytest.raises(DeviceLost, match="fla_path broke the device"):
        benchmark(out, ("1x70x2x16", SHAPE))
    machine["alive"] = True
    benchmark(out, ("1x70x2x16", SHAPE))
    first, second = json.loads(out.read_text())["rows"]
    assert "broke the device" in first["contenders"]["fla_path"]["left_out"]
    assert "failed" in second["contenders"]["fla_path"]


def test_the_figure(machine: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    benchmark(tmp_path / "operator.json", tuple(f"1x{n}x2x16" for n in (16, 32, 64)))
    assert (tmp_path / "operator.png").read_bytes().startswith(b"\x89PNG")


def test_operands_that_do_not_fit(
    machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_much(*given: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(cuda_operator, "make_arguments", too_much)
    row = benchmark()["rows"][0]
    assert row["contenders"]["path_triton"] == {"left_out": "operands: OutOfMemoryError: CUDA out of memory"}
    assert machine["timed"] == []
    assert "path_triton - operands: OutOfMemoryError" in capsys.readouterr().out


# --- the clock -------------------------------------------------------------------------------------------------------


def test_times_are_taken_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be captured is timed by events and says so; what cannot run at all is its error."""
    calls: list[str] = []
    ms = {"short": 0.5, "long": 1e3, "host": 4.0}

    class Graph:
        def __init__(self, function: Callable[[], str]) -> None:
            self.replay = function

    def capture(function: Callable[[], str], pool: object) -> Graph:
        if function() == "host":
            raise RuntimeError("called a synchronizing CUDA operation")
        return Graph(function)

    def milliseconds(function: Callable[[], str], count: int) -> float:
        name = function()
        calls.append(name)
        return ms[name]

    monkeypatch.setattr(cuda_measure, "capture", capture)
    monkeypatch.setattr(cuda_measure, "_milliseconds", milliseconds)
    monkeypatch.setattr(cuda_measure, "device_is_alive", lambda: True)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))

    def broken() -> str:
        raise ValueError("no such kernel")

    names = ("short", "long", "host")
    found = cuda_measure.time_in_turn({**{name: lambda name=name: name for name in names}, "broken": broken}, 5)
    assert calls == ["short", "short", "long", "long", "host", "host", *names * 3, *("short", "host") * 2]
    assert isinstance(found["broken"], ValueError)
    short, long, host = (found[name] for name in names)
    assert isinstance(short, CudaTimes)
    assert isinstance(long, CudaTimes)
    assert isinstance(host, CudaTimes)
    assert (short.calls, short.timed_by, short.repeats) == (4, "graph", 5)  # 2 ms of calls
    assert (long.calls, long.repeats) == (1, cuda_measure.FEWEST_REPEATS)  # a second is over
    assert host.timed_by == "events: RuntimeError: called a synchronizing CUDA operation"


# --- the contenders --------------------------------------------------------------------------------------------------


def test_contenders_are_left_out_by_name_and_by_group() -> None:
    assert [x.name for x in cuda_contenders.without(())] == [x.name for x in CUDA_CONTENDERS]
    assert not any(x.name.startswith("fla_") for x in cuda_contenders.without(["fla"]))
    named = {x.name for x in cuda_contenders.without(["path", "flash", "fla_fox"])}
    assert {"path_fox_triton", "path_fox_hopper", "fla_path", "flex"} < named
    assert not named & {"path_triton", "path_hopper", "path_sdpa", "flash", "fla_fox"}
    with pytest.raises(ValueError, match=r"--without: wanted some of .* got 'cudnn'"):
        cuda_contenders.without(["cudnn"])


def test_why_a_contender_does_not_run() -> None:
    shape = Shape.parse(SHAPE)
    given = make_arguments(shape, torch.bfloat16, "cpu")
    reasons = {x.name: x.unsupported_reason(shape, given) for x in CUDA_CONTENDERS}
    assert reasons["cudnn"] is None
    assert "CUDA" in str(reasons["path_hopper"])
    flex = next(x for x in CUDA_CONTENDERS if x.name == "flex")
    assert cuda_operator._reason(flex, shape, given, True) is None
    assert "compiled anew" in str(cuda_operator._reason(flex, shape, given, False))
