"""lm-evaluation-harness on local models, without a network."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from path_attention import cli
from path_attention.data.tokenizer import train_bpe
from path_attention.evaluation import harness
from path_attention.evaluation.perplexity import measure_positions, stretches_of
from path_attention.evaluation.questions import fitting, kind
from path_attention.models import PaTHConfig, PaTHForCausalLM

pytest.importorskip("lm_eval")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_bpe([" ".join(f"word{n} Mary went to the garden." for n in range(50))], 320)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = PaTHConfig(vocab_size=len(tokenizer), max_position_embeddings=512, initializer_range=0.3, **sizes)  # type: ignore[arg-type]
    PaTHForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network is asked, and nothing is left in the user's caches."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app(), ["evaluate", *(str(a) for a in arguments)])


def test_model_that_knows_the_answers_scores_one(tmp_path: Path) -> None:
    """What the harness asks is prompt and prefix, word for word, and it stops and scores answers as the kinds say."""
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    names, answers, asked = ("needle_multivalue", "phone_book", "story_2"), {}, []

    def count(text: str) -> int:
        return len(text.split())

    tasks = harness.write_questions(tmp_path, names, [600], count, samples=4)
    assert tasks == ["needle_multivalue_600", "phone_book_600", "story_2_600"]
    for name in names:
        for question in fitting(name, kind(name), count, 600, seed=0, samples=4):
            answers[question.prompt + question.prefix] = question.answers

    class Knowing(LM):
        """Right about all questions but those of story_2, which it answers by "garden"."""

        def generate_until(self, requests, disable_tqdm=False):  # type: ignore[no-untyped-def]
            asked.extend(request.args for request in requests)
            found = []
            for prompt, options in (request.args for request in requests):
                is_story = prompt.endswith("Answer:")
                assert options["max_gen_toks"] == (16 if is_story else 50 if prompt.endswith(":") else 128)
                found.append(" garden" if is_story else " " + ", ".join(answers[prompt]))
            return found

        def loglikelihood(self, requests, disable_tqdm=False):  # type: ignore[no-untyped-def]
            raise NotImplementedError

        loglikelihood_rolling = loglikelihood

    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = simple_evaluate(model=Knowing(), tasks=tasks, task_manager=manager, bootstrap_iters=0, log_samples=False)
    assert found is not None
    scores = {task: values["score,none"] for task, values in found["results"].items()}
    assert len(asked) == 12
    assert all(prompt in answers for prompt, _ in asked)
    gardens = [a == ("garden",) for prompt, a in answers.items() if prompt.endswith("Answer:")]
    assert scores == {tasks[0]: 1.0, tasks[1]: 1.0, tasks[2]: sum(gardens) / 4}


def test_questions_of_a_model_folder(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "numbers.json"
    small = ["--samples", 2, "--batch-size", 2, "--device", "cpu"]
    result = call(model, "--tasks", "story_1,phone_book", "--lengths", "900,1400", *small, "--out", out)
    assert result.exit_code == 0, result.output
    numbers = json.loads(out.read_text())
    assert list(numbers["tasks"]) == ["story_1_900", "story_1_1400", "phone_book_900", "phone_book_1400"]
    assert all(v["samples"] == 2 and 0 <= v["score"] <= 1 for v in numbers["tasks"].values())
    assert (numbers["max_length"], numbers["mixer"], numbers["dtype"]) == (1400, "path", "float32")
    assert re.search(r"story_1_1400\s*│ score\s*│", result.stdout)


def test_an_interruption_keeps_what_was_asked(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hours of questions are written down task by task, and the same command asks the rest."""
    out, whole = tmp_path / "numbers.json", tmp_path / "whole.json"
    arguments = [model, "--tasks", "story_1,story_2", "--lengths", "1400", "--samples", 2, "--device", "cpu", "--out"]
    assert call(*arguments, whole).exit_code == 0
    asked: list[str] = []
    metrics = harness._metrics

    def killed(values: dict[str, Any], samples: Any) -> dict[str, float]:
        asked.append(values["alias"])
        if len(asked) == 2:
            raise KeyboardInterrupt
        return metrics(values, samples)

    monkeypatch.setattr(harness, "_metrics", killed)
    assert call(*arguments, out).exit_code == 1
    assert list(json.loads(out.read_text())["tasks"]) == ["story_1_1400"]
    assert call(*arguments, out).exit_code == 0
    assert asked == ["story_1_1400", "story_2_1400", "story_2_1400"]
    assert json.loads(out.read_text())["tasks"] == json.loads(whole.read_text())["tasks"]
    # Those of another seed, or of another model, are no continuation.
    result = call(*arguments, out, "--seed", 1)
    assert result.exit_code == 2
    assert "has results of seed 0, not 1" in result.stderr
    other = PaTHForCausalLM.from_pretrained(model)
    other.lm_head.weight.data[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    for file in model.glob("tokenizer*"):
        (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
    result = call(tmp_path / "other", *arguments[1:], out)
    assert result.exit_code == 2
    assert "has results of weights" in result.stderr


def test_tasks_of_ones_own(model: Path, tmp_path: Path) -> None:
    """The harness measures what a direct computation gives: log-likelihoods and word perplexities of a local file."""
    texts = ["Mary went to the garden.", "word3 Mary word4"]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (tmp_path / "own.yaml").write_text(
        "task: own\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list: [{metric: bits_per_byte}]\n"
    )
    loaded, tokenizer = harness.load_model(model, CPU, "float32")
    found = harness.run_tasks(loaded, tokenizer, ["own"], folder=tmp_path, max_length=512)
    bits = 0.0
    for text in texts:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
        bits += loaded(ids, labels=ids).loss.item() * (ids.shape[1] - 1) / torch.tensor(2.0).log().item()
    assert found["own"]["bits_per_byte"] == pytest.approx(bits / sum(map(len, texts)), rel=1e-5)


def test_perplexity_of_local_text(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for n in range(3):
        (text / f"{n}.txt").write_text(
            " ".join(f"word{k} Mary went to the garden." for k in range(30 * n, 30 * n + 60))
        )
    out = tmp_path / "positions.json"
    result = call(model, "--text", text, "--length", 256, "--stretches", 4, "--out", out, "--device", "cpu")
    assert result.exit_code == 0, result.output
    numbers = json.loads(out.read_text())
    loaded, tokenizer = harness.load_model(model, CPU, "float32")
    documents = [torch.tensor(tokenizer(p.read_text())["input_ids"]).numpy() for p in sorted(text.iterdir())]
    rows = stretches_of(documents, tokenizer.bos_token_id, 256, 4)
    assert len(rows) == 4
    assert numbers["positions"]["losses"] == pytest.approx(measure_positions(loaded, rows).losses, abs=1e-5)
    assert (tmp_path / "positions.png").stat().st_size > 10_000
    assert numbers["trained_length"] == 512


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["{model}", "--tasks", "no_such_task"],
            "tasks: the harness knows no no_such_task; made here are needle_single",
        ),
        (["{model}", "--tasks", "story_1", "--lengths", "many"], "--lengths: wanted whole numbers"),
        (["{model}", "--tasks", "story_1", "--lengths", "50"], "lengths: wanted more than 50 tokens"),
        (["{model}", "--tasks", "story_1", "--text", "x"], "--tasks: wanted either"),
        (["{model}", "--tasks", "story_1", "--samples", "0"], "--samples: wanted at least 1, got 0"),
        (["{model}", "--tasks", "story_1", "--dtype", "int8"], "--dtype: wanted auto, float32 or bfloat16"),
        (["{model}", "--text", "nowhere", "--length", "256"], "--text: no file or folder nowhere"),
        (["{model}", "--text", "README.md", "--length", "100"], "length: wanted a multiple of 2048, or of 32, got 100"),
        (["{model}", "--text", "README.md", "--length", "1048576"], "--length: wanted at most"),
        (["{model}", "--tasks", "story_1", "--haystack", "nowhere"], "--haystack: no file nowhere"),
        (["{cut}", "--tasks", "story_1"], "the weights cannot be read"),
        (["{empty}", "--tasks", "story_1"], "no model here"),
        (["{bare}", "--tasks", "story_1"], "no tokenizer here"),
        (
            ["{other}", "--tasks", "story_1"],
            "tokens, the model knows 100; wanted the tokenizer that it was trained with",
        ),
    ],
)
def test_mistakes_are_one_line(model: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    bare, other, empty, cut = (tmp_path / name for name in ("bare", "other", "empty", "cut"))
    for folder in (bare, other, empty, cut):
        folder.mkdir()
    for file in model.iterdir():
        if file.name in ("config.json", "model.safetensors"):
            (bare / file.name).write_bytes(file.read_bytes())
        (other / file.name).write_bytes(file.read_bytes())
        (cut / file.name).write_bytes(file.read_bytes()[: 1000 if file.suffix == ".safetensors" else None])
    config = (other / "config.json").read_text()
    (other / "config.json").write_text(re.sub(r'"vocab_size": \d+', '"vocab_size": 100', config))
    result = call(*(a.format(model=model, bare=bare, other=other, empty=empty, cut=cut) for a in arguments))
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
