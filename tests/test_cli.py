"""The command line: exit codes, one-line errors, and every verb in miniature."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from path_attention import cli
from tests.training.tiny import TINY


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app(), [str(a) for a in arguments])


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY))
    return file


def test_help_of_every_verb() -> None:
    overview = call("--help")
    assert overview.exit_code == 0
    for verb in (
        ["train"],
        ["convert"],
        ["evaluate"],
        ["recipes"],
        ["demo"],
        ["task"],
        ["reproduce"],
        ["generate"],
        ["benchmark", "operator"],
        ["benchmark", "decode"],
    ):
        assert verb[0] in overview.stdout
        result = call(*verb, "--help")
        assert result.exit_code == 0, verb
        assert "Usage" in result.stdout


def test_help_does_not_import_transformers() -> None:
    """It takes seconds, which --help has no use for."""
    code = "import sys; from path_attention import cli; cli.app(); sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_missing_extra_is_named() -> None:
    code = "import sys; sys.modules['typer'] = None; from path_attention.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert result.returncode == 1
    assert "pip install 'path-attention[train]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_missing_package_in_a_command_is_named(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "path_attention.training.trainer", raising=False)
    for name in [n for n in sys.modules if n.startswith("path_attention.models")]:
        monkeypatch.delitem(sys.modules, name)
    result = call("train", recipe, "--runs", recipe.parent / "runs")
    assert result.exit_code == 1
    assert "transformers is not installed: pip install 'path-attention[train]'" in result.stderr


def test_missing_package_of_another_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.training.texts import over_texts, write_texts

    recipe = over_texts(write_texts(tmp_path / "text")).to_mapping()
    recipe["data"] |= {"files": None, "dataset": {"name": "somebody/something"}}
    (tmp_path / "hub.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setitem(sys.modules, "datasets", None)
    result = call("train", tmp_path / "hub.yaml", "--runs", tmp_path / "runs")
    assert result.exit_code == 1
    assert "datasets is not installed: pip install 'path-attention[data]'" in result.stderr


def test_training_on_tokens_stops_in_time_and_goes_on(tmp_path: Path) -> None:
    from tests.training.texts import over_texts, write_texts

    recipe = over_texts(write_texts(tmp_path / "text"), "training.steps=10", "mixers=[rope]")
    (tmp_path / "tokens.yaml").write_text(recipe.to_yaml())
    options = [tmp_path / "tokens.yaml", "--runs", tmp_path / "runs"]
    result = call("train", *options, "--time-limit", 0.001)
    assert result.exit_code == 1
    assert result.stderr == "path-attention: rope: stopped at step 5 of 10; the same command goes on\n"
    result = call("train", *options)
    assert result.exit_code == 0, result.output
    assert "perplexity" in result.stdout
    prompt = ["--prompt", "def return", "--max-new-tokens", 3]
    assert call("generate", tmp_path / "runs/tiny/rope", *prompt).exit_code == 0  # by the tokenizer that was saved


def test_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", call("--version").stdout)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "nothing"], "no recipe 'nothing'"),
        (["train", "{recipe}", "training.stesp=3"], "training.stesp: unknown key"),
        (["train", "{recipe}", "steps"], "wanted key.sub=value"),
        (["train", "{recipe}", "model.hiden_size=3"], "model.hiden_size: unknown key"),
        (["train", "{recipe}", "--time-limit", "0"], "--time-limit: wanted a number above 0"),
        (["evaluate", "{folder}"], "no run here"),
        (["demo", "training.steps=x"], "training.steps: wanted a whole number"),
        (["benchmark", "operator", "--lengths", "many"], "--lengths"),
        (["benchmark", "decode", "--shapes", "many"], "--shapes: wanted BATCHxLENGTHxHEADSxDIM, got 'many'"),
        (["benchmark", "decode", "--dtype", "int8"], "--dtype"),
        (["generate", "{folder}", "--prompt", "w1"], "no model here"),
        (["convert", "{folder}", "{folder}/target", "--recipe", "quick"], "no checkpoint here"),
        (
            ["convert", "{folder}", "{folder}/target", "--recipe", "slow"],
            "neither a file nor one of the shipped recipes",
        ),
        (["convert", "{folder}", "{folder}/target", "--recipe", "quick", "mixers=[path]"], "mixers: unknown key"),
        (["convert", "{folder}", "{folder}/target", "mixer=path"], "--recipe: wanted one to change by mixer=path"),
        (
            ["convert", "{folder}", "{folder}/target", "--recipe", "quick", "--to", "llama"],
            "--to: wanted path_attention",
        ),
        (["generate", "{folder}"], "--prompt: wanted either --prompt or --prompts"),
        (["generate", "{folder}", "--prompts", "{folder}/none"], "/none: No such file or directory"),
        (["generate", "{folder}", "--prompt", "w1", "--device", "foo"], "that this machine has, got 'foo'"),
        (["generate", "{folder}", "--prompt", "w1", "--device", "cuda:99"], "that this machine has, got 'cuda:99'"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(recipe: Path, arguments: list[str], message: str) -> None:
    filled = [a.format(recipe=recipe, folder=recipe.parent) for a in arguments]
    result = call(*filled, *(["--runs", recipe.parent / "runs"] if arguments[0] in ("train", "demo") else []))
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Errno" not in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (recipe.parent / "runs").exists()


def test_benchmark_passes_its_options_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import path_attention.benchmark

    given = {}
    monkeypatch.setattr(path_attention.benchmark, "run_operator_benchmark", lambda **options: given.update(options))
    result = call("benchmark", "operator", "--lengths", "64,128", "--repeats", 3, "--out", tmp_path / "x.json")
    assert result.exit_code == 0, result.output
    assert given == {"lengths": (64, 128), "repeats": 3, "out": tmp_path / "x.json"}


def test_an_interruption_promises_to_go_on_where_that_is_so(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("path_attention.training.run.train", interrupted)
    monkeypatch.setattr("path_attention.benchmark.run_operator_benchmark", interrupted)
    training, timing = call("train", recipe), call("benchmark", "operator")
    assert (training.exit_code, timing.exit_code) == (1, 1)
    assert "interrupted; the same command continues where it stopped" in training.stderr
    assert timing.stderr == "path-attention: interrupted\n"  # on a CPU every length is measured again


def test_a_folder_that_cannot_be_written_is_one_line(recipe: Path) -> None:
    place = recipe.parent / "file"
    place.touch()
    result = call("train", recipe, "--runs", place)
    assert result.exit_code == 1
    assert re.fullmatch(r"path-attention: .*file.*: Not a directory\n", result.stderr)


def test_unknown_verb_and_missing_argument_exit_2() -> None:
    for arguments in (["fly"], ["train"], ["train", "a", "--fly"]):
        assert call(*arguments).exit_code == 2


def test_recipes_are_listed() -> None:
    assert "flip_flop_demo" in call("recipes").stdout


def test_train_then_evaluate(recipe: Path) -> None:
    runs = recipe.parent / "runs"
    result = call("train", recipe, "training.steps=5", "training.eval_every=0", "--runs", runs)
    assert result.exit_code == 0, result.output
    assert "PaTH" in result.stdout
    assert (runs / "tiny" / "report.html").is_file()
    file = runs / "tiny" / "path" / "evaluation.json"
    numbers = json.loads(file.read_text())["measurements"]
    assert set(numbers) == {"in_distribution", "sparse", "dense"}
    file.write_text(file.read_text().replace('"value": ', '"value": 1'))  # so that it is seen to be written anew
    result = call("evaluate", runs / "tiny")
    assert result.exit_code == 0, result.output
    assert json.loads(file.read_text())["measurements"] == numbers


def test_generate_from_a_run(recipe: Path) -> None:
    runs = recipe.parent / "runs"
    small = ["training.steps=5", "training.eval_every=0", "mixers=[path,rope]", "--runs", runs]
    assert call("train", recipe, *small).exit_code == 0
    for mixer in ("path", "rope"):
        result = call("generate", runs / "tiny" / mixer, "--prompt", "w1", "--max-new-tokens", 5)
        assert result.exit_code == 0, result.output
        assert re.fullmatch(r"[wri01]{5}\n", result.stdout)
        assert "tokens/s" in result.stderr
        file = recipe.parent / "prompts.txt"
        file.write_text("w1\ni0r\n")
        result = call("generate", runs / "tiny" / mixer / "final", "--prompts", file, "--max-new-tokens", 3)
        lines = sorted(result.stdout.splitlines())
        assert re.fullmatch(r"\[1\] w1[wri01]{3}", lines[0])
        assert re.fullmatch(r"\[2\] i0r[wri01]{3}", lines[1])
    assert call("generate", runs / "tiny" / "path", "--prompt", "xyz").exit_code == 2


def test_byte_recipe(tmp_path: Path) -> None:
    for n in range(4):
        (tmp_path / f"{n}.txt").write_text("to be or not to be " * 20)
    values = {k: v for k, v in TINY.items() if k not in ("task", "evaluation")}
    values["data"] = {"path": str(tmp_path), "length": 16, "cache": str(tmp_path / "cache")}
    file = tmp_path / "bytes.yaml"
    file.write_text(yaml.safe_dump(values))
    result = call("train", file, "training.steps=5", "training.eval_every=5", "--runs", tmp_path / "runs")
    assert result.exit_code == 0, result.output
    measured = json.loads((tmp_path / "runs/tiny/path/evaluation.json").read_text())["measurements"]["validation"]
    assert measured["unit"] == "bits per byte"
    assert 0 < measured["value"] < 9  # an even guess costs 8.006
    result = call("generate", tmp_path / "runs/tiny/path", "--prompt", "to be", "--max-new-tokens", 4)
    assert result.exit_code == 0, result.output


def test_demo_in_miniature(tmp_path: Path) -> None:
    small = ["task.length=32", "training.steps=10", "training.warmup_steps=2", "training.eval_every=5"]
    small += ["training.save_every=10", "evaluation.answers=50", "evaluation.quick_answers=20", "model.hidden_size=16"]
    result = call("demo", "--out", tmp_path / "demo", "--runs", tmp_path / "runs", *small)
    assert result.exit_code == 0, result.output
    for text in ("PaTH, paper", "40.3 %", "0.0001 %", "SBA, paper"):
        assert text in result.stdout
    page = (tmp_path / "demo" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    # Self-contained: nothing is fetched from anywhere.
    assert not re.search(r'(src|href)="(?!data:|https://arxiv.org)', page)
    assert "<link" not in page
    assert "<script" not in page
    numbers = json.loads((tmp_path / "demo" / "metrics.json").read_text())
    assert set(numbers["runs"]) == {"path", "rope"}
    assert numbers["published"]["RoPE"] == [0.069, 0.403, 0.0001]


def test_convert_there_and_back(tmp_path: Path) -> None:
    from tests.conversion.teachers import save, teacher

    source = save(teacher("llama"), tmp_path / "llama")
    result = call("convert", source, tmp_path / "target")
    assert result.exit_code == 2
    assert "--recipe: wanted one to convert a RoPE model by: a YAML file or one of quick, two_stage" in result.stderr
    small = ["data=null", "align=null", "distill=null", "evaluation.lengths=[]"]
    result = call("convert", source, tmp_path / "target", "--recipe", "quick", *small)
    assert result.exit_code == 0, result.output
    assert "written to" in result.stdout
    result = call("convert", source, tmp_path / "target", "--recipe", "quick", *small)
    assert result.exit_code == 2
    assert "holds a model already" in result.stderr
    result = call("convert", tmp_path / "target", tmp_path / "fla", "--to", "path_attn")
    assert result.exit_code == 2
    assert "w_norm_eps: got 0.0; wanted 1e-06" in result.stderr
    assert not (tmp_path / "fla").exists()
