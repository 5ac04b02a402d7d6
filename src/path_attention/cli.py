"""The command ``path-attention``.

Exit codes: 0 done, 1 something failed, 2 a mistake in what was asked for (one line on stderr, no traceback).
Everything heavy is imported inside the commands, so that ``--help`` answers at once.
"""

# Annotations stay text, so that this module can be imported, and say what is missing, where typer is not installed.
from __future__ import annotations

import errno
import functools
import importlib.metadata
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
except ModuleNotFoundError:
    typer = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from rich.console import Console

    from path_attention.training.run import Run

FAILED, MISTAKE = 1, 2
# Modules that an extra brings: where one is missing, installing the extra is the remedy.
_EXTRA = dict.fromkeys(
    ("accelerate", "filelock", "matplotlib", "numpy", "rich", "tokenizers", "transformers", "typer", "yaml"), "train"
) | {"datasets": "data", "pyarrow": "data", "lm_eval": "eval"}
# RuntimeErrors whose message is all there is to say; by name, for importing them would import half of transformers.
_FAILURES = (
    "CacheIncomplete",
    "DeviceLost",
    "GraphCaptureFailed",
    "NotWritten",
    "TrainingDiverged",
    "Unfinished",
    "WrongResult",
)
# Full, or not ours to write or read: nothing that a traceback would tell more about.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR)
# What begins anew after Ctrl-C, on some devices or with some options at least; all others go on where they stopped.
_ANEW = ("evaluate", "generate", "recipes", "task", "benchmark_operator", "benchmark_decode", "doctor")
_RUNS = Path("runs")


def main() -> None:
    """Entry point of the command."""
    if typer is None:
        sys.exit(_fail(f"the command line needs packages that are not installed: {_install('train')}", FAILED))
    app()()


def app() -> Any:
    """The typer application."""
    application = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
    application.callback(invoke_without_command=True)(_common)
    application.command(context_settings={"allow_interspersed_args": True})(_checked(train))
    application.command(context_settings={"allow_interspersed_args": True})(_checked(convert))
    application.command()(_checked(evaluate))
    application.command()(_checked(generate))
    application.command()(_checked(recipes))
    application.command()(_checked(demo))
    application.command()(_checked(task))
    application.command(context_settings={"allow_interspersed_args": True})(_checked(reproduce))
    application.command()(_checked(doctor))
    benchmark = typer.Typer(no_args_is_help=True, help="Time and memory.")
    benchmark.callback()(lambda: None)
    benchmark.command("operator")(_checked(benchmark_operator))
    benchmark.command("decode")(_checked(benchmark_decode))
    benchmark.command("scaling")(_checked(benchmark_scaling))
    benchmark.command("training-scaling")(_checked(benchmark_training_scaling))
    application.add_typer(benchmark, name="benchmark")
    return application


def _common(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """PaTH attention: train by recipe, evaluate, and see the difference.

    Start with: path-attention demo
    """
    if version:
        print(importlib.metadata.version("path-attention"))
        raise typer.Exit


def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe (see: recipes).")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Changes to it: training.steps=100 mixers=\\[path] ...", metavar="KEY=VALUE"),
    ] = None,
    runs: Annotated[Path, typer.Option(help="Folder of the run folders.")] = _RUNS,
    restart: Annotated[
        bool, typer.Option("--restart", help="Start anew; an existing run folder is moved aside, never deleted.")
    ] = False,
    time_limit: Annotated[
        float | None, typer.Option(help="Seconds after which to stop with a checkpoint; the same command goes on.")
    ] = None,
) -> None:
    """Train what a recipe describes; continue it where it was interrupted.

    Writes runs/NAME/report.html, and into runs/NAME/MIXER the resolved recipe, metrics.jsonl, TensorBoard logs,
    checkpoints, the final model and its evaluation.json. Several processes: torchrun -m path_attention train ...
    """
    from path_attention.training import load_recipe

    if time_limit is not None and not time_limit > 0:
        raise ValueError(f"--time-limit: wanted a number above 0, got {time_limit}")
    loaded = load_recipe(recipe, overrides or ())
    console = _console()
    _quiet()
    from path_attention.evaluation.report import write_report
    from path_attention.training.run import train as train_recipe

    finished = train_recipe(loaded, runs, restart=restart, time_limit=time_limit, console=console)
    _show(console, finished)
    if os.environ.get("RANK", "0") != "0":
        return
    report = write_report(finished, runs / loaded.name, title=loaded.description or loaded.name)
    console.print(f"report: {report}")


def convert(
    source: Annotated[str, typer.Argument(help="A folder with config.json and safetensors, or a name on the hub.")],
    target: Annotated[Path, typer.Argument(help="A new folder, or that of an interrupted conversion.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Changes to the recipe: mixer=path_fox distill.steps=1000 ...", metavar="KEY=VALUE"),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="How to convert a RoPE model: a YAML file, or a shipped recipe (see: recipes).")
    ] = None,
    to: Annotated[
        str, typer.Option(help="Write this format, train nothing: path_attention, path_attn (fla), llama, ...")
    ] = "path_attention",
) -> None:
    """Convert a pretrained RoPE model to PaTH, or write a model in another format.

    RoPE models: Llama, Mistral, Qwen2, Qwen3, and this library's own; with --recipe. The student, a model card and a
    report go into TARGET; an interrupted conversion continues with the same command.

    Without --recipe a model is only written anew: flash-linear-attention's PaTH models (path_attn) in this library's
    format, and this library's models in the format that --to names.
    """
    from path_attention.training import shipped_recipes

    if recipe is None and overrides:
        raise ValueError(f"--recipe: wanted one to change by {overrides[0]}")
    if recipe is not None and to != "path_attention":
        raise ValueError(f"--to: wanted path_attention beside --recipe, got {to}")
    _quiet()
    from path_attention.conversion import convert as by_recipe
    from path_attention.conversion import find, is_rope, load_conversion, translate

    if recipe is not None:
        by_recipe(source, target, load_conversion(recipe, overrides or ()), console=_console())
        return
    if to == "path_attention" and is_rope(find(source)):
        shipped = ", ".join(shipped_recipes("convert"))
        raise ValueError(f"--recipe: wanted one to convert a RoPE model by: a YAML file or one of {shipped}")
    translate(source, target, to=to, console=_console())


def evaluate(
    model: Annotated[
        Path, typer.Argument(help="A run folder runs/NAME or runs/NAME/MIXER; with --tasks or --text also a model's.")
    ],
    tasks: Annotated[
        str,
        typer.Option(help="Questions made here (needle_single, phone_book, story_1 ...) and tasks of the harness."),
    ] = "",
    lengths: Annotated[str, typer.Option(help="Of the questions made here, in tokens, separated by commas.")] = "4096",
    samples: Annotated[int, typer.Option(help="Questions of each kind and length.")] = 96,
    haystack: Annotated[Path | None, typer.Option(help="A text to hide things in, instead of a few sentences.")] = None,
    limit: Annotated[int | None, typer.Option(help="Documents of each of the harness's tasks at most.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a prompt at most; by default the model's.")] = None,
    batch_size: Annotated[int, typer.Option(help="Requests at a time.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the questions.")] = 0,
    text: Annotated[
        list[Path] | None, typer.Option(help="Text, JSONL or Parquet, file or folder: perplexity by position.")
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens of a stretch of --text, read in one pass.")] = 65536,
    stretches: Annotated[int, typer.Option(help="Stretches at most.")] = 32,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default a GPU where there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16; auto is bfloat16 on a GPU.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="JSON file to write to, and beside it the plot of --text.")] = None,
) -> None:
    """Evaluate a finished run again as its recipe says, or a model by questions and by perplexity.

    --tasks asks by lm-evaluation-harness: its own tasks by name, and questions about long texts that are made here,
    without a network: all of the latter by --tasks questions. --text measures perplexity by position and by length.
    """
    _quiet()
    console = _console()
    if tasks and text:
        raise ValueError("--tasks: wanted either --tasks or --text, got both")
    numbers = {"--samples": samples, "--batch-size": batch_size, "--length": length, "--stretches": stretches}
    numbers |= {"--limit": limit or 1, "--max-length": max_length or 1}
    for option, number in numbers.items():
        if number < 1:
            raise ValueError(f"{option}: wanted at least 1, got {number}")
    if tasks or text:
        from path_attention.evaluation import command

        place = command.place(device, dtype)
        if text:
            command.by_position(model, text, length, stretches, place, out, console)
            return
        command.by_tasks(
            model,
            [task for task in tasks.split(",") if task],
            lengths=lengths,
            samples=samples,
            haystack=haystack,
            limit=limit,
            max_length=max_length,
            batch_size=batch_size,
            seed=seed,
            place=place,
            out=out,
            console=console,
        )
        return
    from path_attention.training import run as runs

    folders = runs.run_folders(model)
    finished = [runs.evaluate(folder, console=console) for folder in folders]
    _show(console, finished)
    for one in finished:
        console.print(f"written to {one.folder / runs.EVALUATION}")


def generate(
    model: Annotated[Path, typer.Argument(help="A folder of save_pretrained, or a run folder runs/NAME/MIXER.")],
    prompt: Annotated[str | None, typer.Option(help="Text to continue; its tokens are shown as they come.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file with a prompt on every line.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of each continuation.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draws at a temperature above 0.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
) -> None:
    """Continue one prompt, or all of a file at once, and say how many tokens a second it took."""
    if (prompt is None) == (prompts is None):
        raise ValueError("--prompt: wanted either --prompt or --prompts")
    if max_new_tokens < 1 or temperature < 0:
        given = f"{max_new_tokens} and {temperature}"
        raise ValueError(f"--max-new-tokens, --temperature: wanted at least 1 and 0, got {given}")
    texts = [prompt] if prompt is not None else [x for x in Path(str(prompts)).read_text().splitlines() if x]
    if not texts:
        raise ValueError(f"--prompts: wanted a prompt on every line, got none in {prompts}")
    _quiet()
    from path_attention.evaluation.generate import generate as run

    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    rate = run(model, texts, **options, device=device)
    print(f"{rate:.0f} tokens/s", file=sys.stderr)


def recipes() -> None:
    """List the recipes shipped with the package."""
    from path_attention.training import load_recipe, shipped_recipes

    for name in shipped_recipes():
        print(f"{name:20} {load_recipe(name).description}")
    from path_attention.conversion.recipe import load_conversion

    for name in shipped_recipes("convert"):
        print(f"{'convert ' + name:20} {load_conversion(name).description}")


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("demo"),
    runs: Annotated[Path, typer.Option(help="Folder of the run folders.")] = _RUNS,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Changes to the recipe flip_flop_demo: training.seed=1 ...", metavar="KEY=VALUE"),
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Start anew; an existing run folder is moved aside, never deleted.")
    ] = False,
) -> None:
    """Train PaTH and RoPE on flip-flop language modelling and show the difference.

    A few minutes on two CPU cores; an interrupted demo continues where it stopped.
    """
    _quiet()
    from path_attention.evaluation.demo import run_demo

    run_demo(out, runs, overrides or (), restart=restart, console=_console())


def task(
    name: Annotated[str, typer.Argument(help="flip_flop, group_words, mqar, mqrar, phone_book, variable_tracking.")],
    options: Annotated[
        list[str] | None, typer.Argument(help="Fields of the task: length=64 ...", metavar="KEY=VALUE")
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Print an annotated example.")] = False,
    split: Annotated[str, typer.Option(help="train, or one of the task's splits.")] = "train",
    seed: Annotated[int, typer.Option(help="Of the data.")] = 0,
    index: Annotated[int, typer.Option(help="Which sequence.")] = 0,
) -> None:
    """Describe a synthetic task, and show one of its sequences."""
    from path_attention.tasks import task_class
    from path_attention.tasks.describe import describe, show_example
    from path_attention.training import strict
    from path_attention.training.recipe import override

    made: Any = strict.build(task_class(name), override({}, options or ()), "task")
    if seed < 0 or index < 0:
        raise ValueError(f"--seed and --index: wanted 0 or more, got {seed} and {index}")
    print(describe(name, made))
    if show:
        print(show_example(made, seed, index, split))


def reproduce(
    table: Annotated[
        str, typer.Argument(help="table1, mqrar, a5, length, language-model; a JSON file with --report-only.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to its recipes: training.steps=100 ...", metavar="KEY=VALUE")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A small version, minutes on a CPU.")] = False,
    seeds: Annotated[int | None, typer.Option(help="Number of seeds; by default the table's.")] = None,
    rows: Annotated[str, typer.Option(help="Rows wanted, separated by commas; all if empty.")] = "",
    time_limit: Annotated[
        float | None, typer.Option(help="Seconds after which to stop in good order, to be continued by the next call.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(help="Processes that share the models: by default one a GPU, on a CPU one a core.")
    ] = None,
    concurrent: Annotated[
        int | None, typer.Option(help="Models at a time in a process, on a GPU each on a stream of its own.")
    ] = None,
    graphs: Annotated[bool, typer.Option(help="Record the training step as a CUDA graph.")] = True,
    device: Annotated[
        str | None,
        typer.Option(help="cpu; cuda, for all visible GPUs; cuda:1, for one of them. By default GPUs where there are."),
    ] = None,
    runs: Annotated[Path, typer.Option(help="Folder of checkpoints and of each model's result.")] = _RUNS / "reproduce",
    out: Annotated[Path, typer.Option(help="Folder of the JSON, the report and the plot.")] = Path("results"),
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Make the report anew from the JSON; train nothing.")
    ] = False,
    commit: Annotated[str | None, typer.Option(help="Of the sources, where git does not tell.")] = None,
) -> None:
    """Reproduce a result of the paper: state tracking, all mixers, several seeds; or language models of code.

    Finished models are never trained again: those in the table's JSON, or in the run folder. A call that was cut off is
    continued by the same call; rows and seeds that it does not ask for stay in the table.
    """
    _quiet()
    from path_attention.reproduction import command as reproduction
    from path_attention.reproduction.tables import TABLES

    console = _console()
    if table.removesuffix(".json").rpartition("/")[2].removesuffix("-quick") == "language-model":
        unfit = {"--seeds": seeds, "--processes": processes, "--concurrent": concurrent}
        if given := [option for option, value in unfit.items() if value is not None]:
            raise ValueError(f"{given[0]}: wanted none for language-model, whose models are trained one after another")
        if time_limit is not None and not time_limit > 0:
            raise ValueError(f"--time-limit: wanted a number above 0, got {time_limit}")
        limits: dict[str, Any] = {"time_limit": time_limit, "device": device, "commit": commit}
        _language_model(table, overrides or (), quick, rows, runs, out, report_only, console, **limits)
        return
    if report_only:
        path = Path(table) if table.endswith(".json") else out / f"{table}{'-quick' if quick else ''}.json"
        reproduction.remake(path, path.parent, console)
        return
    if table not in TABLES:
        raise ValueError(f"table: got {table!r}; wanted one of {', '.join(TABLES)}, language-model")
    parts = ["path-attention reproduce", table, *(overrides or ()), *(["--quick"] if quick else [])]
    parts += [f"--seeds {seeds}"] if seeds is not None else []
    parts += [f"--rows {rows}"] if rows else []
    plan = reproduction.default_plan(
        runs,
        device=device,
        processes=processes,
        concurrent=concurrent,
        use_graphs=graphs,
        time_limit=time_limit,
        command=" ".join(parts),
        commit=commit,
    )
    complete = reproduction.reproduce(
        table,
        quick=quick,
        seeds=seeds,
        rows=[row for row in rows.split(",") if row],
        overrides=overrides or (),
        plan=plan,
        out=out,
        console=console,
    )
    if not complete:
        raise typer.Exit(FAILED)


def _language_model(
    table: str,
    overrides: Sequence[str],
    quick: bool,
    rows: str,
    runs: Path,
    out: Path,
    report_only: bool,
    console: Console,
    *,
    time_limit: float | None,
    device: str | None,
    commit: str | None,
) -> None:
    from path_attention.reproduction import language_model

    if report_only:
        path = Path(table) if table.endswith(".json") else out / f"{table}{'-quick' if quick else ''}.json"
        for written in language_model.write(language_model.read(path), path.parent):
            console.print(f"written: {written}", soft_wrap=True)
        return
    if device not in (None, "cpu"):
        raise ValueError(f"--device: wanted cpu, or nothing for a GPU where there is one, got {device!r}")
    changes = [*overrides, *(["training.device=cpu"] if device == "cpu" else [])]
    parts = ["path-attention reproduce language-model", *overrides, *(["--quick"] if quick else [])]
    parts += [f"--rows {rows}"] if rows else []
    complete = language_model.reproduce(
        quick=quick,
        rows=[row for row in rows.split(",") if row],
        overrides=changes,
        runs=runs,
        out=out,
        time_limit=time_limit,
        command=" ".join(parts),
        console=console,
        commit=commit,
    )
    if not complete:
        raise typer.Exit(FAILED)


def benchmark_operator(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    lengths: Annotated[
        str | None, typer.Option(help="On the CPU: sequence lengths, separated by commas.  [1024,4096,16384]")
    ] = None,
    shapes: Annotated[
        str | None,
        typer.Option(help="On a GPU: BATCHxLENGTHxHEADSxDIM, HEADS or QUERY/KEY, by commas; else those of the docs."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="On a GPU: under a minute, fewer shapes, no flex and no fla.")
    ] = False,
    without: Annotated[str, typer.Option(help="On a GPU: leave out some, by commas: flex, fla, path_sdpa ...")] = "",
    repeats: Annotated[
        int | None, typer.Option(help="Timed repetitions of each; the median is reported.  [10; on a GPU 7]")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="JSON file to write the numbers to; on a GPU with a figure, and continued.")
    ] = None,
    commit: Annotated[str | None, typer.Option(help="On a GPU: of the sources, where git does not tell.")] = None,
) -> None:
    """Time, memory and error of the operator on this machine beside other attentions."""
    if repeats is not None and repeats < 1:
        raise ValueError(f"--repeats: wanted a number above 0, got {repeats}")
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"--device: got {device!r}; wanted cpu or cuda")
    elsewhere = {"--lengths": lengths} if kind == "cuda" else {"--shapes": shapes, "--quick": quick}
    elsewhere |= {} if kind == "cuda" else {"--without": without, "--commit": commit}
    for option, given in elsewhere.items():
        if given:
            raise ValueError(f"{option}: not with --device {device}")
    if kind == "cpu":
        _benchmark_operator_on_cpu(lengths or "1024,4096,16384", repeats or 10, out)
        return
    _benchmark_operator_on_gpu(device, shapes, quick, without, repeats, out, commit)


def _benchmark_operator_on_cpu(lengths: str, repeats: int, out: Path | None) -> None:
    try:
        parsed = tuple(int(length) for length in lengths.split(","))
    except ValueError:
        raise ValueError(f"--lengths: wanted whole numbers separated by commas, got {lengths!r}") from None
    if min(parsed) < 1:
        raise ValueError(f"--lengths: wanted numbers above 0, got {lengths}")
    from path_attention.benchmark import run_operator_benchmark

    run_operator_benchmark(lengths=parsed, repeats=repeats, out=out)


def _benchmark_operator_on_gpu(
    device: str,
    shapes: str | None,
    quick: bool,
    without: str,
    repeats: int | None,
    out: Path | None,
    commit: str | None,
) -> None:
    import torch

    if not torch.cuda.is_available():
        raise ValueError(f"--device: got {device}, which this machine does not have")
    from path_attention.benchmark.cuda_operator import run_cuda_operator_benchmark

    run_cuda_operator_benchmark(
        shapes=None if shapes is None else shapes.split(","),
        quick=quick,
        left_out=[name for name in without.split(",") if name],
        repeats=repeats,
        device=device,
        out=out,
        commit=commit,
    )


def benchmark_decode(
    shapes: Annotated[
        str | None,
        typer.Option(help="BATCHxLENGTHxHEADSxDIM, HEADS or QUERY/KEY, separated by commas; else those of the docs."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; else float32 on cpu and bfloat16 on cuda.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    repeats: Annotated[int, typer.Option(help="Timed repetitions of each; the median is reported.")] = 10,
    model: Annotated[str, typer.Option(help="Whole models: small, 760m, none; else small on cpu, 760m on cuda.")] = (
        "default"
    ),
    prompt: Annotated[int, typer.Option(help="Tokens before those that the models make.")] = 512,
    out: Annotated[Path | None, typer.Option(help="JSON file to write the numbers to.")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG file to draw the ratios into.")] = None,
) -> None:
    """A step and a prefill of the cache against plain keys and values, and tokens a second of whole models."""
    if repeats < 1:
        raise ValueError(f"--repeats: wanted at least 1, got {repeats}")
    from path_attention.benchmark.decode import run_decode_benchmark

    whole = None if model == "none" else model
    options: dict[str, Any] = {"dtype": dtype, "device": device, "repeats": repeats, "model": whole, "prompt": prompt}
    run_decode_benchmark(shapes=None if shapes is None else shapes.split(","), **options, out=out, plot=plot)


def benchmark_scaling(
    device: Annotated[str, typer.Option(help="cuda, or cpu to try it out.")] = "cuda",
    ranks: Annotated[str | None, typer.Option(help="Numbers of devices, by commas; else 1, 2, 4, 8.")] = None,
    lengths: Annotated[str | None, typer.Option(help="Tokens in all, by commas; else 32768 and doubling.")] = None,
    heads: Annotated[int, typer.Option(help="Query and key heads.")] = 32,
    head_dim: Annotated[int, typer.Option(help="Of each.")] = 64,
    per_device: Annotated[int | None, typer.Option(help="Tokens of a device, weak scaling.  [65536]")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Two lengths, bfloat16 alone, not the longest.")] = False,
    repeats: Annotated[int | None, typer.Option(help="Timed repetitions of each.  [5; quick 2]")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file, with a figure beside it; continued if there.")] = None,
    commit: Annotated[str | None, typer.Option(help="Of the sources, where git does not tell.")] = None,
) -> None:
    """The operator over a sequence that several devices share: equality, time, memory, the longest sequence."""
    if min(repeats or 1, heads, head_dim) < 1:
        raise ValueError("--repeats, --heads, --head-dim: wanted numbers above 0")
    from path_attention.benchmark.scaling import run_scaling_benchmark

    run_scaling_benchmark(
        device=device,
        ranks=_numbers("--ranks", ranks),
        lengths=_numbers("--lengths", lengths),
        heads=heads,
        dim=head_dim,
        per_device=per_device,
        quick=quick,
        repeats=repeats,
        out=out,
        commit=commit,
    )


def benchmark_training_scaling(
    device: Annotated[str, typer.Option(help="cuda; cpu tries it out with a tiny model.")] = "cuda",
    ranks: Annotated[str | None, typer.Option(help="Numbers of devices, by commas; else 1, 2, 4, 8.")] = None,
    lengths: Annotated[str | None, typer.Option(help="Tokens of a sequence, by commas; else 4096, 16384.")] = None,
    mixer: Annotated[str, typer.Option(help="path or path_fox.")] = "path",
    compile: Annotated[bool, typer.Option(help="torch.compile, as the recipe has it.")] = True,
    quick: Annotated[bool, typer.Option("--quick", help="One shape, fewer repeats, nothing compiled.")] = False,
    parts: Annotated[str, typer.Option(help="Some of them, by commas.")] = "steps,checkpoint,restart",
    out: Annotated[Path | None, typer.Option(help="JSON file, with a figure beside it; continued if there.")] = None,
    commit: Annotated[str | None, typer.Option(help="Of the sources, where git does not tell.")] = None,
) -> None:
    """The paper's 760M model by FSDP2 and context parallelism on several devices; checkpoints; a killed process."""
    _quiet()
    from path_attention.benchmark.training_scaling import run_training_scaling

    run_training_scaling(
        device=device,
        ranks=_numbers("--ranks", ranks),
        lengths=_numbers("--lengths", lengths),
        mixer=mixer,
        compile=compile,
        quick=quick,
        parts=[part for part in parts.split(",") if part],
        out=out,
        commit=commit,
    )


def _numbers(option: str, text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(x) for x in text.split(",")]
    except ValueError:
        raise ValueError(f"{option}: wanted whole numbers separated by commas, got {text!r}") from None


def doctor(
    distributed: Annotated[
        bool, typer.Option("--distributed", help="Several processes: those of torchrun, or one for each GPU here.")
    ] = False,
    processes: Annotated[int | None, typer.Option(help="How many to start here; else one for each GPU.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default a GPU where there is one.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Try out a step of it: a YAML file, or a shipped one.")] = None,
    folder: Annotated[Path | None, typer.Option(help="One that all processes see; for the checkpoint.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds after which a step hangs.")] = 60.0,
) -> None:
    """Check this machine, or with --distributed a cluster, before a long job; exit code 1 if something is wrong.

    Versions, devices, which backend serves which call, and whether each device computes the definition. With
    --distributed: collectives and their bandwidth, context parallelism against one process, FSDP2, a checkpoint read by
    another number of processes, and with --recipe the memory of its step. On several machines: torchrun ... -m
    path_attention doctor --distributed --folder SHARED
    """
    beside = {"--processes": processes, "--device": device, "--recipe": recipe, "--folder": folder}
    if not distributed and (given := [option for option, value in beside.items() if value is not None]):
        raise ValueError(f"{given[0]}: wanted --distributed beside it")
    if not timeout > 0:
        raise ValueError(f"--timeout: wanted a number above 0, got {timeout}")
    from path_attention.doctor import examine, examine_together

    if distributed:
        well = examine_together(processes=processes, device=device, recipe=recipe, folder=folder, seconds=timeout)
    else:
        well = examine()
    if not well:
        raise typer.Exit(FAILED)


def _checked(command: Callable[..., None]) -> Callable[..., None]:
    """The command with its foreseeable failures turned into one line on stderr and an exit code."""

    @functools.wraps(command)
    def checked(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package not in _EXTRA:
                raise
            code = _fail(f"{package} is not installed: {_install(_EXTRA[package])}", FAILED)
        except (ValueError, FileNotFoundError, FileExistsError) as error:
            code = _fail(_said(error), MISTAKE)
        except OSError as error:
            if error.errno not in _DISK:
                raise
            code = _fail(f"{error.filename or 'writing'}: {error.strerror}", FAILED)
        except KeyboardInterrupt:
            anew = command.__name__ in _ANEW
            code = _fail(f"interrupted{'' if anew else '; the same command continues where it stopped'}", FAILED)
        except RuntimeError as error:
            if type(error).__name__ not in _FAILURES:
                raise
            code = _fail(str(error), FAILED)
        else:
            return
        raise typer.Exit(code)

    return checked


def _said(error: Exception) -> str:
    """Without the number, and the quotes around the name, of an error of the operating system."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _install(extra: str) -> str:
    return f"pip install 'path-attention[{extra}]'"


def _fail(message: str, code: int) -> int:
    print(f"path-attention: {message}", file=sys.stderr)
    return code


def _console() -> Console:
    from rich.console import Console

    # Of several processes of one training (torchrun, accelerate launch) one speaks.
    return Console(highlight=False, quiet=os.environ.get("RANK", "0") != "0")


def _quiet() -> None:
    """No bars and hints of transformers' own: they would tear up the bar that shows the training."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _show(console: Console, runs: list[Run]) -> None:
    from path_attention.evaluation.tables import length_table, runs_table

    console.print(runs_table(runs))
    positions = {run.mixer: losses for run in runs if (losses := run.positions) is not None}
    if positions:
        console.print(length_table(positions))


if __name__ == "__main__":
    main()
