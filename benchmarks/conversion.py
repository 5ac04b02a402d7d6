"""A conversion from beginning to end: a RoPE teacher is trained on the Python packages of this machine, converted by
both stages on at most a tenth of its tokens, and compared with itself, with a control, and with a model trained from
scratch on as many tokens.

    python benchmarks/conversion.py --out results              # one GPU, about 12 minutes; the same command goes on
    python benchmarks/conversion.py --size cpu --out results   # 1M parameters, about an hour on two cores
    python benchmarks/conversion.py --size tiny --out FOLDER   # every part of it in miniature, a minute
    python benchmarks/conversion.py --figure --out results     # the picture alone, from the JSON
    python benchmarks/conversion.py --betas nearest,0.3 --seeds 2 --out results   # both stages from several beginnings

Parts, each done once (their results are kept in WORK/NAME.json, and training is resumed from checkpoints):

    teacher      a byte-level BPE and a Llama with RoPE, written as a transformers checkpoint
    memory       one step of each stage, and of plain training, with random weights in SmolLM2-1.7B's shape, length 4096
    beginnings   the loss of students before any training, for several ways to begin
    path, fox    students: before training, after stage 1, after stage 2; perplexity by length to 8 times the training's
    scratch      the student's architecture from random weights on the tokens of both stages
    flip_flop, variable_tracking
                 teacher and students after a short continued training on each, written in the teacher's tokens

Writes OUT/conversion.json and OUT/conversion.png after every part, or OUT/cpu_conversion.json and so on. With --betas
only the teacher, beginnings and the first student from each of these: OUT/conversion_betas.json and so on.
"""

import argparse
import json
import math
import statistics
import sysconfig
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor

from path_attention.benchmark.measure import environment
from path_attention.conversion import Checkpoint, convert, student_of, translate
from path_attention.conversion.initialise import BETAS, new_attentions
from path_attention.conversion.objectives import divergence
from path_attention.conversion.recipe import ConversionRecipe, Initialisation
from path_attention.conversion.report import STAGES
from path_attention.conversion.run import by_length
from path_attention.conversion.stages import Alignment, TextSource
from path_attention.evaluation.plots import COLOURS
from path_attention.evaluation.tables import NAMES
from path_attention.models import PaTHConfig, PaTHForCausalLM
from path_attention.training import recipe_from_mapping, strict
from path_attention.training.recipe import text_data
from path_attention.training.run import machine, train, write_whole

# All packages beside torch: some 100 MB of Python on a machine that trains models; or one that is always there.
PACKAGES = Path(torch.__file__).parents[1]
EXCLUDED = ("**/test/**/*", "**/tests/**/*")
# More text than the teacher reads is not put into tokens.
MOST_TOKENS = 80_000_000

# Sizes of everything. gpu: 30M parameters, 66M tokens for the teacher, 6.6M for a student. cpu: 1.1M, 6.1M and 0.6M.
SIZES: dict[str, dict[str, Any]] = {
    "gpu": {
        "path": str(PACKAGES),
        "validation": 0.02,
        "by": "folder",  # whole packages
        "vocabulary": 8192,
        "length": 1024,
        "model": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8},
        "teacher": {"steps": 2000, "batch_size": 32, "learning_rate": 2e-3},
        "align": {"steps": 640, "batch_size": 8, "length": 512, "learning_rate": 2e-3},
        "distill": {"steps": 480, "batch_size": 8, "learning_rate": 2e-4},
        "task": {"steps": 300, "batch_size": 32, "learning_rate": 3e-4},
        "task_length": 512,
        "windows": 128,
        "tokens": 524288,
        "answers": 20000,
        "memory": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 32},
        "memory_length": 4096,
        "memory_vocabulary": 49152,
    },
    "cpu": {
        "path": str(PACKAGES / "transformers"),
        "validation": 0.05,
        "by": "document",
        "vocabulary": 2048,
        "length": 256,
        "model": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 2},
        "teacher": {"steps": 1500, "batch_size": 16, "learning_rate": 3e-3},
        "align": {"steps": 480, "batch_size": 2, "length": 256, "learning_rate": 3e-3},
        "distill": {"steps": 340, "batch_size": 4, "learning_rate": 2e-4},
        "task": {"steps": 300, "batch_size": 8, "learning_rate": 1e-3},
        "task_length": 128,
        "windows": 64,
        "tokens": 65536,
        "answers": 5000,
    },
    "tiny": {
        "path": sysconfig.get_path("stdlib") + "/email",
        "validation": 0.3,
        "by": "document",
        "vocabulary": 512,
        "length": 64,
        "model": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2},
        "teacher": {"steps": 60, "batch_size": 8, "learning_rate": 3e-3},
        "align": {"steps": 8, "batch_size": 4, "length": 64, "learning_rate": 3e-3},
        "distill": {"steps": 8, "batch_size": 4, "learning_rate": 5e-4},
        "task": {"steps": 10, "batch_size": 4, "learning_rate": 1e-3},
        "task_length": 64,
        "windows": 8,
        "tokens": 4096,
        "answers": 200,
        "memory": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
        "memory_length": 128,
        "memory_vocabulary": 1000,
    },
}
# As cpu, at four times the length, in fewer steps, about half an hour: where a small beta is the nearest.
SIZES["cpu_long"] = {
    **SIZES["cpu"],
    "length": 1024,
    "teacher": {"steps": 700, "batch_size": 4, "learning_rate": 3e-3},
    "align": {"steps": 160, "batch_size": 2, "length": 512, "learning_rate": 3e-3},
    "distill": {"steps": 120, "batch_size": 1, "learning_rate": 2e-4},
    "windows": 32,
}
TASKS = ("flip_flop", "variable_tracking")
# Ways to begin whose losses are compared: mixer, fields of Initialisation, fields of the student.
FULL: dict[str, Any] = {"w_rank": None, "conv_size": 0}
BEGINNINGS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    *(("path", {"beta": beta}, FULL) for beta in BETAS),
    *(("path", {"beta": beta, "w": "random"}, FULL) for beta in (0.001, 0.3, 1.0)),
    ("path", {}, {"w_rank": 32, "conv_size": 3}),
    ("path_fox", {}, FULL),
    ("fox", {}, {}),
    ("path", {}, {**FULL, "keep_rope": (0,)}),
    ("path", {}, {**FULL, "keep_rope": (-1,)}),
    ("path", {}, {**FULL, "keep_rope": (0, -1)}),
]


class Experiment:
    """The parts, in order; each result is kept in a file of its own."""

    def __init__(self, work: Path, size: str, students: tuple[str, ...], console: Console) -> None:
        self.work, self.students, self.console = work, students, console
        self.sizes, self.on_gpu = SIZES[size], size == "gpu"
        self.device = torch.device("cuda" if self.on_gpu else "cpu")
        self.precision = "bfloat16" if self.on_gpu else "float32"
        work.mkdir(parents=True, exist_ok=True)

    def once(self, name: str, part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of a part, from its file if it is done."""
        file = self.work / f"{name}.json"
        if not file.is_file():
            start = time.monotonic()
            found = part()
            self.console.print(f"{name}: done in {time.monotonic() - start:.0f} s")
            write_whole(file, json.dumps({**found, "seconds_of_part": round(time.monotonic() - start, 1)}, indent=1))
        loaded: dict[str, Any] = json.loads(file.read_text())
        return loaded

    def run(self, report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """All parts; ``report`` is given what there is after each of them."""
        found: dict[str, Any] = {}

        def add(place: dict[str, Any], key: str, name: str, part: Callable[[], dict[str, Any]]) -> None:
            place[key] = self.once(name, part)
            report(found)

        add(found, "teacher", "teacher", self.teacher)
        if "memory" in self.sizes:
            add(found, "memory", "memory", self.memory)
        add(found, "beginnings", "beginnings", self.beginnings)
        for name in self.students:
            add(found.setdefault("students", {}), name, name, lambda name=name: self.student(name))
        add(found, "scratch", "scratch", self.scratch)
        for task in TASKS:
            for name in ("teacher", *self.students):
                rates = found.setdefault(task, {})
                add(rates, name, f"{task}-{name}", lambda task=task, name=name: self.task(task, name))
        return found

    def run_betas(
        self, betas: list[float | str], seeds: int, report: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any]:
        """Both stages from several betas; a seed is that of the stages, and so of the order of the text."""
        found: dict[str, Any] = {"teacher": self.once("teacher", self.teacher)}
        found["beginnings"], found["betas"] = self.once("beginnings", self.beginnings), []
        for seed in range(seeds):
            for beta in betas:
                row = self.once(f"beta-{beta}-{seed}", lambda beta=beta, seed=seed: self.from_beta(beta, seed))
                found["betas"].append(row)
                report(found)
        return found

    def from_beta(self, beta: float | str, seed: int) -> dict[str, Any]:
        whole = self.conversion(self.students[0])
        assert whole.align is not None
        assert whole.distill is not None
        recipe = replace(
            whole,
            initialisation=Initialisation(beta=beta),  # type: ignore[arg-type]
            align=replace(whole.align, seed=seed),
            distill=replace(whole.distill, seed=seed),
            evaluation=replace(whole.evaluation, lengths=()),
        )
        results = self.converted(self.work / f"student-beta-{beta}-{seed}", recipe)
        losses = {when: results[when]["loss"] for when in ("teacher", "initial", "align", "distill")}
        return {"beta": beta, "seed": seed, **losses, **({"nearest": results["beta"]} if "beta" in results else {})}

    # --- data and teacher --------------------------------------------------------------------------------------------

    def data(self) -> dict[str, Any]:
        """The text; in the tokens of a BPE for the teacher and the control, in the source's for students: the same."""
        files = {"paths": (self.sizes["path"],), "include": ("**/*.py",), "exclude": EXCLUDED}
        held = {"fraction": self.sizes["validation"], "by": self.sizes["by"]}
        text = {"files": files, "validation": held, "max_tokens": MOST_TOKENS, "cache": str(self.work / "cache")}
        return {**text, "length": self.sizes["length"]}

    def bpe(self) -> dict[str, Any]:
        return {**self.data(), "tokenizer": "bpe", "vocab_size": self.sizes["vocabulary"]}

    def training(self, steps: int, **changes: Any) -> dict[str, Any]:
        """What all trainings share."""
        every = max(1, steps // 8)
        shared = {"steps": steps, "warmup_steps": min(100, steps // 10), "weight_decay": 0.1, "betas": (0.9, 0.95)}
        shared |= {"log_every": every, "save_every": every, "precision": self.precision}
        return {**shared, "workers": 4 if self.on_gpu else 0, "device": "auto" if self.on_gpu else "cpu", **changes}

    def recipe(self, name: str, **sections: Any) -> Any:
        windows = {"windows": self.sizes["windows"], "quick_windows": 8, "batch_size": 8}
        return recipe_from_mapping({"name": name, "evaluation": windows, **sections})

    def teacher(self) -> dict[str, Any]:
        model = {**self.sizes["model"], "tie_word_embeddings": True}
        recipe = self.recipe(
            "teacher",
            mixers=["rope"],
            data=self.bpe(),
            model=model,
            training=self.training(**self.sizes["teacher"]),
        )
        (run,) = train(recipe, self.work / "runs", console=self.console)
        if not (self.work / "teacher" / "config.json").exists():
            translate(run.folder / "final", self.work / "teacher", to="llama")
        tokens = recipe.training.steps * recipe.training.batch_size * self.sizes["length"]
        corpus = text_data(self.bpe()).open()
        found = {"facts": run.facts, "tokens": tokens, "measurements": strict.plain(run.measurements)}
        return {**found, "corpus": {split: corpus.tokens(split) for split in ("train", "validation")}}

    # --- students and the control ------------------------------------------------------------------------------------

    def conversion(self, mixer: str) -> ConversionRecipe:
        length = self.sizes["length"]
        align, distill = (self.training(**self.sizes[stage], weight_decay=0.0) for stage in ("align", "distill"))
        values = {
            "mixer": mixer,
            "data": self.data(),
            "model": FULL if mixer.startswith("path") else {},
            "align": align,
            "distill": distill,
            "evaluation": {
                "windows": self.sizes["windows"],
                "batch_size": 8,
                "lengths": [2 * length, 4 * length, 8 * length],
                "tokens": self.sizes["tokens"],
            },
        }
        return strict.build(ConversionRecipe, values)

    def student(self, mixer: str) -> dict[str, Any]:
        return self.converted(self.work / f"student-{mixer}", self.conversion(mixer))

    def converted(self, target: Path, recipe: ConversionRecipe) -> dict[str, Any]:
        if (target / "config.json").is_file():  # finished, and cut off before it was written down
            done: dict[str, Any] = json.loads((target / "conversion" / "results.json").read_text())
            return done
        return convert(self.work / "teacher", target, recipe, console=self.console)

    def scratch(self) -> dict[str, Any]:
        """The first student's architecture on the tokens of both stages."""
        mixer, length = self.students[0], self.sizes["length"]
        conversion = self.conversion(mixer)
        assert conversion.align is not None
        assert conversion.distill is not None
        tokens = sum(s.steps * s.batch_size * (s.length or length) for s in (conversion.align, conversion.distill))
        batch = self.sizes["distill"]["batch_size"]
        recipe = self.recipe(
            "scratch",
            mixers=[mixer],
            data=self.bpe(),
            model={**self.sizes["model"], **conversion.model, "tie_word_embeddings": True},
            training=self.training(
                **{**self.sizes["teacher"], "steps": tokens // (batch * length), "batch_size": batch}
            ),
        )
        (run,) = train(recipe, self.work / "runs", console=self.console)
        model = PaTHForCausalLM.from_pretrained(run.folder / "final", dtype=torch.float32)
        return {
            "facts": run.facts,
            "tokens": tokens,
            "measurements": strict.plain(run.measurements),
            "by_length": self.lengths(model),
        }

    def lengths(self, model: PaTHForCausalLM) -> dict[str, Any]:
        return by_length(model.to(self.device), self.text())  # type: ignore[arg-type]

    def text(self) -> TextSource:
        corpus = text_data(self.bpe()).open()
        return TextSource(corpus, self.conversion(self.students[0]).evaluation, self.precision)  # type: ignore[arg-type]

    def beginnings(self) -> dict[str, Any]:
        """Losses at the training length before anything is trained."""
        checkpoint, text = Checkpoint(self.work / "teacher"), self.text()
        teacher = checkpoint.load()

        def loss(model: PaTHForCausalLM) -> float:
            return text.evaluate(model.to(self.device))["validation"].value  # type: ignore[arg-type]

        rows: list[dict[str, Any]] = []
        for mixer, options, fields in BEGINNINGS:
            kept = fields.get("keep_rope", ())
            recipe = ConversionRecipe(mixer=mixer, keep_rope=kept)  # type: ignore[arg-type]
            mixers = recipe.layer_mixers(checkpoint.config.num_hidden_layers)
            own = {name: x for name, x in fields.items() if name != "keep_rope"}
            own |= {"mixer": mixer, "layer_mixers": mixers if kept else None}
            student = student_of(teacher, PaTHConfig(**(checkpoint.fields | own)), Initialisation(**options), 0)
            rows.append({"mixer": mixer, **options, **fields, "loss": loss(student)})
        return {"teacher": loss(teacher), "rows": rows}

    def task(self, task: str, name: str) -> dict[str, Any]:
        """Error rates after a short continued training on a task, from the teacher or from a student."""
        if name == "teacher":
            initial, mixer = self.work / "runs/teacher/rope/final", "rope"
        else:
            initial, mixer = self.work / f"student-{name}", name
        recipe = recipe_from_mapping(
            {
                "name": f"{task}-{name}",
                "mixers": [mixer],
                "initial": str(initial),
                "task": {"name": task, "length": self.sizes["task_length"]},
                "training": self.training(**self.sizes["task"]),
                "evaluation": {"answers": self.sizes["answers"], "batch_size": 32},
            }
        )
        (run,) = train(recipe, self.work / "runs", console=self.console)
        return {"facts": run.facts, "measurements": strict.plain(run.measurements)}

    # --- memory and speed --------------------------------------------------------------------------------------------

    def memory(self) -> dict[str, Any]:
        """Bytes and time of a step of each kind, batch 1, for the shape of SmolLM2-1.7B."""
        device = self.device
        fields = {**self.sizes["memory"], "vocab_size": self.sizes["memory_vocabulary"], "tie_word_embeddings": True}
        length = self.sizes["memory_length"]
        ids = torch.randint(fields["vocab_size"], (1, length), device=device)
        half = torch.bfloat16 if self.on_gpu else torch.float32
        with device:
            teacher = PaTHForCausalLM(PaTHConfig(**fields, mixer="rope")).to(half).eval().requires_grad_(False)
        found: dict[str, Any] = {
            "shape": fields,
            "length": length,
            "parameters": sum(p.numel() for p in teacher.parameters()),
        }
        config = PaTHConfig(**fields, mixer="path", **FULL)
        for name, student_config, build in (
            ("align", config, self.alignment),
            ("distill", config, self.distillation),
            ("plain", config, self.plain),
            ("plain_rope", PaTHConfig(**fields, mixer="rope"), self.plain),
        ):
            student = student_of(teacher, student_config, Initialisation(), 0)
            found[name] = self.steps(device, *build(teacher, student), ids, length)
            del student
        return found

    @staticmethod
    def alignment(teacher: PaTHForCausalLM, student: PaTHForCausalLM) -> tuple[Any, Callable[[Tensor], Tensor]]:
        model = Alignment(teacher, new_attentions(student), student.config)
        return model, lambda ids: model(ids).loss

    @staticmethod
    def distillation(teacher: PaTHForCausalLM, student: PaTHForCausalLM) -> tuple[Any, Callable[[Tensor], Tensor]]:
        def loss(ids: Tensor) -> Tensor:
            with torch.no_grad():
                wanted = teacher.model(input_ids=ids).last_hidden_state

            def objective(states: Tensor, head: Any, _: Any) -> Tensor:
                return divergence(states, head.weight, wanted, teacher.lm_head.weight) / ids.numel()

            return student(input_ids=ids, objective=objective).loss

        return student, loss

    @staticmethod
    def plain(teacher: PaTHForCausalLM, student: PaTHForCausalLM) -> tuple[Any, Callable[[Tensor], Tensor]]:
        return student, lambda ids: student(input_ids=ids, labels=ids).loss

    @staticmethod
    def steps(
        device: torch.device, model: Any, loss: Callable[[Tensor], Tensor], ids: Tensor, length: int
    ) -> dict[str, Any]:
        """Five steps with AdamW on float32 weights: the peak of all, the median time of those after two."""
        model.to(device).train().requires_grad_(True)
        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=on_gpu)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
                value = loss(ids)
            value.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if on_gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        assert math.isfinite(value.item())
        seconds = statistics.median(times[2:])
        peak = torch.cuda.max_memory_allocated() if on_gpu else None
        return {"peak_bytes": peak, "seconds": seconds, "tokens_per_second": length / seconds, "loss": value.item()}


def stage_losses(found: dict[str, Any]) -> list[tuple[str, str, float]]:
    """(whose, when, loss) of everything that reads held-out text at the training length."""
    rows = []
    for mixer, results in found["students"].items():
        for when in STAGES:
            if when in results and (when != "teacher" or mixer == next(iter(found["students"]))):
                whose = "rope" if when == "teacher" else mixer
                rows.append((whose, "teacher" if when == "teacher" else STAGES[when], results[when]["loss"]))
    if "scratch" in found:
        rows.append(("none", "from scratch, as many tokens", found["scratch"]["measurements"]["validation"]["value"]))
    return rows


def _error_rates(found: dict[str, Any], name: str) -> dict[tuple[str, str], float]:
    """Percent of wrong answers of one model, by task and split: those of tasks that it has learned."""
    return {
        (task, split): 100 * measured["value"]
        for task in TASKS
        if name in found.get(task, {})
        for split, measured in found[task][name]["measurements"].items()
    }


def figure(found: dict[str, Any]) -> Figure:
    """Losses at the training length by stage; perplexity by length; state tracking. Of the parts that are done."""
    made = Figure(figsize=(15, 4.4), layout="constrained")
    stages, lengths, reads = made.subplots(1, 3, width_ratios=(1.3, 1.1, 1.5))
    rows = stage_losses(found)
    for n, (whose, _, loss) in enumerate(rows):
        stages.barh(n, loss, color=COLOURS[whose])
        stages.text(loss, n, f" {loss:.3f}", va="center", fontsize=8)
    stages.set_yticks(
        range(len(rows)),
        [f"{NAMES[w]}: {when}" if w not in ("rope", "none") else when for w, when, _ in rows],
        fontsize=8,
    )
    stages.invert_yaxis()
    stages.set_xlabel("loss on held-out text (nats a token)")
    first = next(iter(found["students"].values()))
    curves = {"teacher, RoPE": ("rope", first["by_length"]["teacher"])}
    if "scratch" in found:
        curves["from scratch"] = ("none", found["scratch"]["by_length"])
    curves |= {f"student, {NAMES[m]}": (m, r["by_length"]["student"]) for m, r in found["students"].items()}
    for label, (mixer, curve) in curves.items():
        points = {int(n): x for n, x in curve["perplexity"].items()}
        lengths.plot(list(points), list(points.values()), "o-", color=COLOURS[mixer], label=label)
    lengths.set_xscale("log", base=2)
    lengths.set_yscale("log")
    lengths.set_xticks(list(points), [f"{n:,}" for n in points])
    lengths.set_xlabel("tokens read")
    lengths.set_ylabel("perplexity")
    lengths.legend(frameon=False, fontsize=8)
    rates = {name: _error_rates(found, name) for name in ("teacher", *found["students"])}
    columns = list(dict.fromkeys(column for of_model in rates.values() for column in of_model))
    for n, (name, of_model) in enumerate(rates.items()):
        whose = "rope" if name == "teacher" else name
        places = [k + 0.8 * (n + 0.5) / len(rates) - 0.4 for k, column in enumerate(columns) if column in of_model]
        reads.bar(places, list(of_model.values()), 0.8 / len(rates), color=COLOURS[whose], label=NAMES[whose])
        for place, rate in zip(places, of_model.values(), strict=True):
            reads.text(place, rate, f"{rate:.2g}", ha="center", va="bottom", fontsize=7)
    names = [f"{task},\n{split}".replace("_", "\n") for task, split in columns]
    reads.set_xticks(range(len(columns)), names, fontsize=7)
    reads.set_ylabel("wrong answers, %")
    if columns:
        reads.legend(frameon=False, fontsize=8, title="continued from", title_fontsize=8, loc="upper left")
    for axis in (stages, lengths, reads):
        axis.spines[["top", "right"]].set_visible(False)
    return made


def draw(found: dict[str, Any], file: Path) -> None:
    figure(found).savefig(file.with_suffix(".png"), dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON and the picture")
    parser.add_argument("--work", type=Path, help="folder of everything in between; runs/conversion-SIZE by default")
    parser.add_argument("--students", default="path,fox", help="mixers; the first is the one trained from scratch too")
    parser.add_argument("--size", choices=list(SIZES), default="gpu")
    parser.add_argument("--figure", action="store_true", help="run nothing: draw the picture of OUT's JSON again")
    parser.add_argument("--betas", help="only this: betas that the first student begins at, numbers or nearest")
    parser.add_argument("--seeds", type=int, default=1, help="so many conversions from each of them")
    arguments = parser.parse_args()
    name = "conversion" if arguments.size == "gpu" else f"{arguments.size}_conversion"
    file = arguments.out / f"{name}.json"
    if arguments.figure:
        draw(json.loads(file.read_text()), file)
        return
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    start = time.monotonic()
    work = arguments.work or Path(f"runs/conversion-{arguments.size}")
    students = tuple(arguments.students.split(","))
    experiment = Experiment(work, arguments.size, students, Console(highlight=False))
    arguments.out.mkdir(parents=True, exist_ok=True)

    def report(found: dict[str, Any]) -> None:
        result = {"benchmark": "conversion", **environment(), **machine(experiment.device)}
        result |= {"sizes": {**experiment.sizes, "path": "the folder of Python packages"}, **found}
        write_whole(file, json.dumps(result, indent=1) + "\n")
        if "students" in found:
            draw(found, file)

    if arguments.betas:
        file = arguments.out / f"{name}_betas.json"
        betas = [beta if beta == "nearest" else float(beta) for beta in arguments.betas.split(",")]
        for row in experiment.run_betas(betas, arguments.seeds, report)["betas"]:
            print(row)
        return
    found = experiment.run(report)
    for whose, when, loss in stage_losses(found):
        print(f"{whose:9} {when:32} loss {loss:.4f} perplexity {math.exp(loss):.3f}")
    print(f"{time.monotonic() - start:.0f} s; written to {arguments.out}")


if __name__ == "__main__":
    main()
