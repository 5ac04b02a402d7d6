"""``path-attention benchmark training-scaling``: the paper's language model on 1, 2, 4, 8 devices of a machine.

Tokens a second of a training step with FSDP2 alone, and together with context parallelism, for each device against
one; a checkpoint that n processes write and m read; and a training by torchrun of which one process is killed: it
starts again and ends as one that nobody disturbed.

Every step has as many tokens for each device, whatever their number. Finished rows are in the file at once, and the
same command goes on behind them.
"""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from path_attention.benchmark import restart, results_file, training_rows
from path_attention.benchmark.measure import environment
from path_attention.benchmark.operator import WrongResult
from path_attention.benchmark.scaling import chosen_ranks
from path_attention.benchmark.training_rows import Step
from path_attention.distributed.processes import ProcessesFailed, Team

RECIPE = "fineweb_edu_760m"
# (length, sequences for each device): the recipe's length, and the same tokens in one sequence.
SHAPES, QUICK_SHAPES = ((4096, 4), (16384, 1)), ((4096, 4),)
# What a CPU computes in seconds.
SMALL = (
    "model={hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 64}",
    "training.precision=float32",
)
SMALL_SHAPES = ((64, 2),)
REPEATS, QUICK_REPEATS = 8, 3
# Seconds of a step that names no limit of its own.
STEP_SECONDS = 120.0
_SAME = ("benchmark", "commit", "device", "devices", "versions", "options")


def run_training_scaling(
    *,
    device: str = "cuda",
    ranks: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
    mixer: str = "path",
    compile: bool = True,
    quick: bool = False,
    parts: Sequence[str] = ("steps", "checkpoint", "restart"),
    out: Path | str | None = None,
    commit: str | None = None,
) -> dict[str, Any]:
    """Measure everything; print the table; write JSON and a figure beside it.

    Args:
        device: cuda, or cpu for a tiny model.
        ranks: numbers of devices; None for those of 1, 2, 4, 8 that this machine has.
        lengths: tokens of a sequence, of those that are measured (SHAPES); None for all.
        mixer: path or path_fox.
        compile: torch.compile, as the recipe has it.
        quick: one shape, fewer repeats, nothing compiled; a process of a tiny model is killed.
        parts: of steps, checkpoint and restart.
        out: JSON file, written after every row. One that is there already is continued.
        commit: of the sources, where git does not tell.

    Raises:
        ValueError: devices that are not there, or an unknown length, part or mixer.
        FileExistsError: ``out`` holds results of another kind.
        WrongResult: at the end, where a loss, a checkpoint or a training that went on is not what it should be.
    """
    options = _options(device, ranks, lengths, mixer, compile and not quick, quick, parts)
    path = None if out is None else Path(out)
    result = results_file.resume(_describe(device, options, commit), path, _SAME)
    table = _Table(result, path)
    if "steps" in parts:
        for size in options["ranks"]:
            _steps(table, size, options)
    if "checkpoint" in parts and max(options["ranks"]) > 1:
        _checkpoints(table, options)
    if "restart" in parts:
        most = max(options["ranks"])
        plan = restart.PAPER if device == "cuda" and not quick else restart.TINY
        table.once({"kind": "restart", "ranks": most}, lambda: restart.scenario(most, device, plan))
    result["summary"] = summary(result)
    results_file.write(result, path)
    print_table(result)
    if path is not None:
        print(f"written to {path}")
        _draw(result, path.with_suffix(".png"))
    if wrong := [f"{r['kind']} on {r['ranks']}: {r['wrong']}" for r in result["rows"] if r.get("wrong")]:
        raise WrongResult("; ".join(wrong))
    return result


def _options(
    device: str,
    ranks: Sequence[int] | None,
    lengths: Sequence[int] | None,
    mixer: str,
    compile: bool,
    quick: bool,
    parts: Sequence[str],
) -> dict[str, Any]:
    if mixer not in ("path", "path_fox"):
        raise ValueError(f"--mixer: wanted path or path_fox, got {mixer!r}")
    if unknown := set(parts) - {"steps", "checkpoint", "restart"}:
        raise ValueError(f"--parts: wanted some of steps, checkpoint and restart, got {min(unknown)!r}")
    chosen = chosen_ranks(device, ranks)
    shapes = (QUICK_SHAPES if quick else SHAPES) if device == "cuda" else SMALL_SHAPES
    if unknown_lengths := set(lengths or ()) - {length for length, _ in shapes}:
        raise ValueError(f"--lengths: wanted some of {[x for x, _ in shapes]}, got {min(unknown_lengths)}")
    return {
        "ranks": list(chosen),
        "recipe": RECIPE,
        "changes": [] if device == "cuda" else list(SMALL),
        "mixer": mixer,
        "compile": compile and device == "cuda",
        "shapes": [list(shape) for shape in shapes if lengths is None or shape[0] in lengths],
        "repeats": QUICK_REPEATS if quick else REPEATS,
    }


def _describe(device: str, options: dict[str, Any], commit: str | None) -> dict[str, Any]:
    import torch
    import transformers

    result: dict[str, Any] = {"benchmark": "training_scaling", **environment()}
    result["commit"] = commit or result["commit"]
    result["versions"] |= {"transformers": transformers.__version__}
    names = ["cpu"]
    if device == "cuda":
        import triton

        result["versions"] |= {"cuda": torch.version.cuda, "triton": triton.__version__}
        names = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    return result | {"device": device, "devices": names, "options": options, "rows": []}


class _Table:
    """The rows of a result, written as they come."""

    def __init__(self, result: dict[str, Any], path: Path | None) -> None:
        self.result, self.path = result, path

    def once(self, key: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row of this key; made where there is none."""
        for row in self.result["rows"]:
            if all(row.get(name) == value for name, value in key.items()):
                found: dict[str, Any] = row
                return found
        try:
            row = key | make()
        except ProcessesFailed as error:
            row = key | {"failed": "out of memory" if error.out_of_memory else str(error)}
        self.result["rows"].append(row)
        results_file.write(self.result, self.path)
        print_row(row)
        return row


# --- steps -----------------------------------------------------------------------------------------------------------


def _work(options: dict[str, Any], context: int, shape: Sequence[int]) -> Step:
    return Step(
        options["recipe"], options["mixer"], tuple(options["changes"]), context, shape[0], shape[1], options["compile"]
    )


def _contexts(size: int, length: int, shapes: Sequence[Sequence[int]]) -> list[int]:
    """Processes that share a sequence: none and two; at the greatest length all of them."""
    if size == 1:
        return [1]
    longest = length == max(shape[0] for shape in shapes)
    return sorted({1, 2, size} if longest else {1, 2})


def _steps(table: _Table, size: int, options: dict[str, Any]) -> None:
    device = table.result["device"]
    team: Team | None = None

    def measured(work: Step) -> dict[str, Any]:
        nonlocal team
        team = team or Team(size, device, STEP_SECONDS)
        try:
            found: dict[str, Any] = team.run(training_rows.measure, work, options["repeats"])[0]
        except ProcessesFailed:
            team = None
            raise
        return found

    try:
        for shape in options["shapes"]:
            for context in _contexts(size, shape[0], options["shapes"]):
                key = {"kind": "step", "ranks": size, "context": context, "length": shape[0], "sequences": shape[1]}
                work = _work(options, context, shape)
                table.once(key, lambda work=work: measured(work))  # type: ignore[misc]
    finally:
        if team is not None:
            team.close()


# --- a checkpoint ----------------------------------------------------------------------------------------------------


def _checkpoints(table: _Table, options: dict[str, Any]) -> None:
    """Written by the most processes and read by half of them, and the other way round."""
    most = max(options["ranks"])
    for writers, readers in ((most, most // 2), (most // 2, most)):
        key = {"kind": "checkpoint", "ranks": writers, "readers": readers}
        table.once(key, lambda w=writers, r=readers: _checkpoint(table.result["device"], options, w, r))  # type: ignore[misc]


def _checkpoint(device: str, options: dict[str, Any], writers: int, readers: int) -> dict[str, Any]:
    """Weights, moments and the loss of the next step, before and after. The same tokens for both, nothing compiled."""
    length = options["shapes"][0][0]
    most = max(writers, readers)
    plain = options | {"compile": False}

    def work(size: int) -> Step:
        return _work(plain, 1, (length, most // size))

    with tempfile.TemporaryDirectory(prefix="path-attention-") as folder:
        where = str(Path(folder) / "checkpoint")
        with Team(writers, device, STEP_SECONDS) as team:
            saved = team.run(training_rows.save, work(writers), where)[0]
        with Team(readers, device, STEP_SECONDS) as team:
            loaded = team.run(training_rows.load, work(readers), where)[0]
        with suppress(FileNotFoundError):
            Path(where).rmdir()
    found = {"saved": saved, "loaded": loaded}
    if saved["fingerprint"] != loaded["fingerprint"]:
        return found | {"wrong": "weights or moments that were read are not those that were written"}
    # In another sharding sums have another order: under bfloat16 a loss keeps about three digits.
    if not abs(saved["next_loss"] - loaded["next_loss"]) <= 2e-3 * abs(saved["next_loss"]):
        return found | {"wrong": f"the next loss is {loaded['next_loss']}, not {saved['next_loss']}"}
    return found


# --- what follows from the rows --------------------------------------------------------------------------------------


def summary(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Tokens a second of a device as a share of what one device makes alone with the same tokens."""
    steps = [r for r in result["rows"] if r["kind"] == "step" and "tokens_per_second_each" in r]
    found = []
    for row in steps:
        alone = next((r for r in steps if r["ranks"] == 1 and r["length"] == row["length"]), None)
        if alone is not None and row["ranks"] > 1:
            share = row["tokens_per_second_each"] / alone["tokens_per_second_each"]
            names = ("ranks", "context", "length", "sequences")
            found.append({name: row[name] for name in names} | {"efficiency": round(share, 4)})
    return found


def print_row(row: dict[str, Any]) -> None:
    head = f"{row['ranks']:>2} x {row['kind']:10}"
    if "failed" in row or row.get("wrong"):
        print(f"{head} - {row.get('failed') or 'WRONG: ' + row['wrong']}", flush=True)
    elif row["kind"] == "step":
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:7.1f} GiB"
        mesh = f"{row['ranks'] // row['context']} x {row['context']} (data x context)"
        print(f"{head} {mesh}, {row['length']:>6} tokens: {row['tokens_per_second_each']:10,.0f} tokens/s each {peak}",
              flush=True)  # fmt: skip
    elif row["kind"] == "checkpoint":
        size = row["saved"]["bytes"] / 2**30
        times = (
            f"written in {row['saved']['seconds']:.1f} s, read by {row['readers']} in {row['loaded']['seconds']:.1f} s"
        )
        print(f"{head} {size:.2f} GiB {times}: the same", flush=True)
    else:
        print(f"{head} {row['found']}", flush=True)


def print_table(result: dict[str, Any]) -> None:
    print(f"\n{'devices':>7} {'data x context':>14} {'length':>7} {'tokens/s of a device, against one':>34}")
    for entry in summary(result):
        mesh = f"{entry['ranks'] // entry['context']} x {entry['context']}"
        print(f"{entry['ranks']:>7} {mesh:>14} {entry['length']:>7} {entry['efficiency']:>34.1%}")


def _draw(result: dict[str, Any], path: Path) -> None:
    try:
        from path_attention.benchmark.training_figure import draw
    except ModuleNotFoundError as error:
        print(f"no figure: {error.name} is not installed")
        return
    if draw(result, path):
        print(f"figure: {path}")
