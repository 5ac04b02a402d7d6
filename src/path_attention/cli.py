"""The command ``path-attention``.

Exit codes: 0 done, 1 something failed, 2 a mistake in what was asked for (one line on stderr, no traceback).
Everything heavy is imported inside the commands, so that ``--help`` answers at once.
"""

# Annotations stay text, so that this module can be imported, and say what is missing, where typer is not installed.
from __future__ import annotations

import functools
import importlib.metadata
import os
import sys
from collections.abc import Callable
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
# Modules that the extra brings: where one is missing, installing the extra is the remedy.
_EXTRA = ("accelerate", "matplotlib", "numpy", "rich", "transformers", "typer", "yaml")
# RuntimeErrors whose message is all there is to say; by name, for importing them would import half of transformers.
_FAILURES = ("TrainingDiverged", "WrongResult")
_INSTALL = "pip install 'path-attention[train]'"
_RUNS = Path("runs")


def main() -> None:
    """Entry point of the command."""
    if typer is None:
        sys.exit(_fail(f"the command line needs packages that are not installed: {_INSTALL}", FAILED))
    app()()


def app() -> Any:
    """The typer application."""
    application = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
    application.callback(invoke_without_command=True)(_common)
    application.command(context_settings={"allow_interspersed_args": True})(_checked(train))
    application.command()(_checked(evaluate))
    application.command()(_checked(generate))
    application.command()(_checked(recipes))
    application.command()(_checked(demo))
    application.command()(_checked(task))
    application.command(context_settings={"allow_interspersed_args": True})(_checked(reproduce))
    benchmark = typer.Typer(no_args_is_help=True, help="Time and memory.")
    benchmark.callback()(lambda: None)
    benchmark.command("operator")(_checked(benchmark_operator))
    benchmark.command("decode")(_checked(benchmark_decode))
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
) -> None:
    """Train what a recipe describes; continue it where it was interrupted.

    Writes runs/NAME/report.html, and into runs/NAME/MIXER the resolved recipe, metrics.jsonl, TensorBoard logs,
    checkpoints, the final model and its evaluation.json.
    """
    from path_attention.training import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    console = _console()
    _quiet()
    from path_attention.evaluation.report import write_report
    from path_attention.training.run import train as train_recipe

    finished = train_recipe(loaded, runs, restart=restart, console=console)
    _show(console, finished)
    report = write_report(finished, runs / loaded.name, title=loaded.description or loaded.name)
    console.print(f"report: {report}")


def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder: runs/NAME, or runs/NAME/MIXER for one of its models.")],
) -> None:
    """Evaluate a finished run's final model again and write its evaluation.json."""
    _quiet()
    from path_attention.training import run as runs

    console = _console()
    folders = runs.run_folders(run)
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
    name: Annotated[str, typer.Argument(help="flip_flop, group_words, mqar, mqrar or phone_book.")],
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
    table: Annotated[str, typer.Argument(help="table1, mqrar, a5 or length; or a JSON file with --report-only.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to its recipes: training.steps=100 ...", metavar="KEY=VALUE")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A small version, minutes on a CPU.")] = False,
    seeds: Annotated[int | None, typer.Option(help="Number of seeds; by default the table's.")] = None,
    rows: Annotated[str, typer.Option(help="Rows wanted, separated by commas; all if empty.")] = "",
    time_limit: Annotated[
        float | None, typer.Option(help="Seconds after which to stop in good order, to be continued by the next call.")
    ] = None,
    processes: Annotated[int | None, typer.Option(help="Processes that share the models.")] = None,
    concurrent: Annotated[
        int | None, typer.Option(help="Models at a time in a process, on a GPU each on a stream of its own.")
    ] = None,
    graphs: Annotated[bool, typer.Option(help="Record the training step as a CUDA graph.")] = True,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default a GPU where there is one.")] = None,
    runs: Annotated[Path, typer.Option(help="Folder of checkpoints and of each model's result.")] = _RUNS / "reproduce",
    out: Annotated[Path, typer.Option(help="Folder of the JSON, the report and the plot.")] = Path("results"),
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Make the report anew from the JSON; train nothing.")
    ] = False,
) -> None:
    """Reproduce a state-tracking result of the paper, all mixers, several seeds.

    Finished models are never trained again; a call that was cut off is continued by the same call.
    """
    _quiet()
    from path_attention.reproduction import command as reproduction

    console = _console()
    if report_only:
        path = Path(table) if table.endswith(".json") else out / f"{table}{'-quick' if quick else ''}.json"
        reproduction.remake(path, path.parent, console)
        return
    plan = reproduction.default_plan(
        runs, device=device, processes=processes, concurrent=concurrent, use_graphs=graphs, time_limit=time_limit
    )
    parts = ["path-attention reproduce", table, *(overrides or ()), *(["--quick"] if quick else [])]
    parts += [f"--seeds {seeds}"] if seeds is not None else []
    parts += [f"--rows {rows}"] if rows else []
    reproduction.reproduce(
        table,
        quick=quick,
        seeds=seeds,
        rows=[row for row in rows.split(",") if row],
        overrides=overrides or (),
        plan=plan,
        out=out,
        command=" ".join(parts),
        console=console,
    )


def benchmark_operator(
    lengths: Annotated[str, typer.Option(help="Sequence lengths, separated by commas.")] = "1024,4096,16384",
    repeats: Annotated[int, typer.Option(help="Timed repetitions of each; the median is reported.")] = 10,
    out: Annotated[Path | None, typer.Option(help="JSON file to write the numbers to.")] = None,
) -> None:
    """Time and memory of the operator on this machine against torch's attention."""
    try:
        parsed = tuple(int(length) for length in lengths.split(","))
    except ValueError:
        raise ValueError(f"--lengths: wanted whole numbers separated by commas, got {lengths!r}") from None
    if repeats < 1 or min(parsed) < 1:
        raise ValueError(f"--lengths and --repeats: wanted numbers above 0, got {lengths} and {repeats}")
    from path_attention.benchmark import run_operator_benchmark

    run_operator_benchmark(lengths=parsed, repeats=repeats, out=out)


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
            code = _fail(f"{package} is not installed: {_INSTALL}", FAILED)
        except (ValueError, FileNotFoundError) as error:
            code = _fail(str(error), MISTAKE)
        except KeyboardInterrupt:
            code = _fail("interrupted; the same command continues where it stopped", FAILED)
        except RuntimeError as error:
            if type(error).__name__ not in _FAILURES:
                raise
            code = _fail(str(error), FAILED)
        else:
            return
        raise typer.Exit(code)

    return checked


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
    from path_attention.evaluation.tables import runs_table

    console.print(runs_table(runs))


if __name__ == "__main__":
    main()
