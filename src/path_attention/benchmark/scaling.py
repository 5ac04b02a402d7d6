"""``path-attention benchmark scaling``: the operator over a sequence that 1, 2, 4, 8 devices of a machine share.

For every number of devices first whether output and gradients are those of one device; then time and memory at growing
lengths, and how much one forward and backward pass has memory for. Each number of devices has
processes of its own. A row for which memory runs out, or which does not end, is recorded; the rest gets new ones.
Finished rows are in the file at once, and the same command goes on behind them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from path_attention.benchmark import results_file
from path_attention.benchmark.measure import environment
from path_attention.benchmark.operator import WrongResult
from path_attention.benchmark.scaling_rows import Work, as_row, describe, forget, measure, warm_up, weigh
from path_attention.distributed import equality
from path_attention.distributed.processes import ProcessesFailed, Team

FORMULAS = ("path", "path_fox")
RANKS = (1, 2, 4, 8)
# 2048 channels, batch 1, as in the long rows of the operator's own benchmark.
HEADS, DIM, DTYPE = 32, 64, "bfloat16"
# By device: on a CPU it is tried out, not measured.
FIRST_LENGTH, LAST_LENGTH = {"cuda": 32768, "cpu": 256}, {"cuda": 2**22, "cpu": 1024}
# Weak scaling, and the search for the end of memory: so many tokens for each device.
PER_DEVICE = {"cuda": 65536, "cpu": 512}
# How much memory has room for is looked for in heads, of so many tokens a device: memory goes with tokens x heads but
# time with tokens^2 x heads, so that a pass takes seconds in place of minutes. First numbers of heads, whose memory
# tells the rest; and what is tried is a multiple of so many, which the parts of a call divide.
PROBES, HEADS_STEP = (32, 64), 16
# Shares of the heads that ought to fit, tried one after another: the allocator needs some room for its rounding.
SHARES = (0.96, 0.9, 0.8)
# Of the lengths that are compared with one process, for each device, and their heads.
EQUAL_PER_DEVICE, EQUAL_HEADS = {"cuda": 1024, "cpu": 32}, {"cuda": 4, "cpu": 2}
REPEATS, QUICK_REPEATS = 5, 2
# Seconds that a row may take by what the one before took; longer ones are left out.
ROW_SECONDS = 30.0
# Seconds after which a step that moves nothing is given up.
STEP_SECONDS = 120.0
_SAME = ("benchmark", "commit", "device", "devices", "versions", "options")


@dataclass(frozen=True)
class Options:
    """What is measured."""

    device: str
    ranks: tuple[int, ...]
    lengths: tuple[int, ...]  # of strong scaling; where memory ends them, they end
    per_device: int
    heads: int
    dim: int
    dtype: str
    repeats: int
    probes: tuple[int, int]  # 0 heads: the end of memory is not looked for
    equal: tuple[str, ...]  # dtypes in which several devices are compared with one

    def as_json(self) -> dict[str, Any]:
        return {name: list(x) if isinstance(x, tuple) else x for name, x in vars(self).items()}


def run_scaling_benchmark(
    *,
    device: str = "cuda",
    ranks: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
    heads: int = HEADS,
    dim: int = DIM,
    per_device: int | None = None,
    quick: bool = False,
    repeats: int | None = None,
    out: Path | str | None = None,
    commit: str | None = None,
) -> dict[str, Any]:
    """Check, time and weigh everything; print the table; write JSON and a figure beside it.

    Args:
        device: cuda or cpu; processes on a CPU talk through gloo.
        ranks: numbers of devices; None for those of RANKS that this machine has.
        lengths: tokens in all; None for FIRST_LENGTH and doubling while it fits.
        heads, dim: of the attention.
        per_device: tokens a device of weak scaling and of the search for the end of memory; None for PER_DEVICE, or
            for the first of the lengths that are given.
        quick: two lengths, fewer repeats, equality in the timed dtype alone, no search for the longest.
        repeats: timed measurements of each; fewer where they would take more than some seconds.
        out: JSON file, written after every row. One that is there already is continued.
        commit: of the sources, where git does not tell.

    Raises:
        ValueError: devices that are not there, or lengths that do not divide.
        FileExistsError: ``out`` holds results of another kind.
        WrongResult: at the end, where several devices do not compute what one does; their times were not taken.
    """
    options = _options(device, ranks, lengths, heads, dim, per_device, quick, repeats)
    fresh = _describe(options, commit)
    path = None if out is None else Path(out)
    result = results_file.resume(fresh, path, _SAME)
    rows = Rows(result, path)
    for size in options.ranks:
        with Devices(size, options, rows) as devices:
            _measure_all(devices, options)
    result["summary"] = summary(result)
    results_file.write(result, path)
    print_table(result)
    if path is not None:
        print(f"written to {path}")
        _draw(result, path.with_suffix(".png"))
    if wrong := [f"{r['formula']} {r['dtype']} on {r['ranks']}" for r in result["rows"] if r.get("wrong")]:
        raise WrongResult(f"unlike one device, and not timed: {', '.join(wrong)}")
    return result


def _options(
    device: str,
    ranks: Sequence[int] | None,
    lengths: Sequence[int] | None,
    heads: int,
    dim: int,
    per_device: int | None,
    quick: bool,
    repeats: int | None,
) -> Options:
    chosen = chosen_ranks(device, ranks)
    first, last = FIRST_LENGTH[device], LAST_LENGTH[device]
    doubling = [first * 2**n for n in range(20) if first * 2**n <= last]
    wanted = tuple(sorted(lengths or ((first, 4 * first) if quick else doubling)))
    if bad := [n for n in wanted if n < 1 or n % (2 * max(chosen))]:
        raise ValueError(f"--lengths: wanted multiples of {2 * max(chosen)}, two pieces a device, got {bad[0]}")
    if per_device is not None and (per_device < 1 or per_device % 2):
        raise ValueError(f"--per-device: wanted an even number of tokens, two pieces a device, got {per_device}")
    return Options(
        device=device,
        ranks=chosen,
        lengths=wanted,
        per_device=per_device or (PER_DEVICE[device] if lengths is None else wanted[0]),
        heads=heads,
        dim=dim,
        dtype=DTYPE,
        repeats=repeats or (QUICK_REPEATS if quick else REPEATS),
        probes=PROBES if device == "cuda" and not quick else (0, 0),
        equal=(DTYPE,) if quick else (DTYPE, "float32"),
    )


def devices_there(device: str) -> int | None:
    """How many devices this machine has; None where processes need none of their own.

    Raises:
        ValueError: none, or of another kind.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device: got {device!r}; wanted cpu or cuda")
    if device == "cpu":
        return None
    if not torch.cuda.is_available():
        raise ValueError("--device: got cuda, which this machine does not have")
    return torch.cuda.device_count()


def chosen_ranks(device: str, ranks: Sequence[int] | None) -> tuple[int, ...]:
    """Numbers of devices, ascending; None for those of RANKS that there are, on a CPU 1 and 2.

    Raises:
        ValueError: there are not so many devices, or none is asked for.
    """
    there = devices_there(device)
    chosen = tuple(sorted(set(ranks or [n for n in RANKS if n <= (there or 2)])))
    if min(chosen) < 1 or (there is not None and max(chosen) > there):
        wanted = "numbers above 0" if there is None else f"1 to {there}, the devices of this machine"
        raise ValueError(f"--ranks: wanted {wanted}, got {list(chosen)}")
    return chosen


def _describe(options: Options, commit: str | None) -> dict[str, Any]:
    result: dict[str, Any] = {"benchmark": "scaling", **environment()}
    result["commit"] = commit or result["commit"]
    count = devices_there(options.device)
    names = [torch.cuda.get_device_name(n) for n in range(count)] if count else ["cpu"]
    result |= {"device": options.device, "devices": names, "options": options.as_json(), "machines": {}, "rows": []}
    if options.device == "cuda":
        import triton

        result["versions"] |= {"cuda": torch.version.cuda, "triton": triton.__version__}
    return result


class Rows:
    """The rows of a result, written as they come."""

    def __init__(self, result: dict[str, Any], path: Path | None) -> None:
        self.result, self.path = result, path

    def find(self, **key: Any) -> dict[str, Any] | None:
        return next((r for r in self.result["rows"] if all(r.get(k) == v for k, v in key.items())), None)

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        self.result["rows"].append(row)
        results_file.write(self.result, self.path)
        print_row(row)
        return row


class Devices:
    """A number of devices, with processes once there is something to do, and new ones after a failure."""

    def __init__(self, size: int, options: Options, rows: Rows) -> None:
        self.size, self.options, self.rows = size, options, rows
        self.team: Team | None = None

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What the first process returns."""
        if self.team is None:
            self.team = Team(self.size, self.options.device, STEP_SECONDS)
            machine = self.team.run(describe)[0]
            self.rows.result["machines"][str(self.size)] = machine
            self.team.run(warm_up, self.options.heads, self.options.dim, self.options.dtype)
        try:
            self.team.run(forget)
            return self.team.run(function, *arguments)[0]
        except ProcessesFailed:
            self.team = None
            raise

    def attempt(self, function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
        """The result, or in its place why there is none."""
        try:
            found: dict[str, Any] = self.run(function, *arguments)
        except ProcessesFailed as error:
            if error.out_of_memory:
                return {"failed": "out of memory"}
            return {"failed": str(error)}
        return found

    def __enter__(self) -> "Devices":
        return self

    def __exit__(self, *_: object) -> None:
        if self.team is not None:
            self.team.close()


# --- rows ------------------------------------------------------------------------------------------------------------


def _measure_all(devices: Devices, options: Options) -> None:
    for formula in FORMULAS:
        right = all([_equal(devices, options, formula, dtype) for dtype in options.equal])
        if not right:
            continue
        before: dict[str, Any] | None = None
        for length in sorted({*options.lengths, options.per_device * devices.size}):
            before = _time(devices, options, formula, length, before)
    if max(options.probes):
        for formula in FORMULAS:
            _longest(devices, options, formula)


def _equal(devices: Devices, options: Options, formula: str, dtype: str) -> bool:
    """Whether several devices compute what one does; a row that says how nearly."""
    if devices.size == 1:
        return True
    key = {"kind": "equality", "formula": formula, "ranks": devices.size, "dtype": dtype}
    row = devices.rows.find(**key)
    if row is None:
        length = EQUAL_PER_DEVICE[options.device] * devices.size
        heads, gated = EQUAL_HEADS[options.device], formula == "path_fox"
        found = devices.attempt(equality.compare, length, heads, options.dim, getattr(torch, dtype), gated)
        row = devices.rows.add(key | found)
    return not row.get("wrong") and "failed" not in row


def _time(
    devices: Devices, options: Options, formula: str, length: int, before: dict[str, Any] | None
) -> dict[str, Any]:
    work = Work(formula, length, options.heads, options.dim, options.dtype)
    key = {"kind": "time", "ranks": devices.size, **as_row(work)}
    if (row := devices.rows.find(**key)) is not None:
        return row
    if (reason := _too_much(devices, length, before)) is not None:
        return devices.rows.add(key | {"left_out": reason})
    return devices.rows.add(key | devices.attempt(measure, work, options.repeats))


def _too_much(devices: Devices, length: int, before: dict[str, Any] | None) -> str | None:
    """Why a row is not tried, by the one before: memory goes with the length and time with its square."""
    if before is None:
        return None
    if "peak_bytes" not in before:
        return f"after {before['length']}: {before.get('failed') or before['left_out']}"
    times = length / before["length"]
    memory = devices.rows.result["machines"].get(str(devices.size), {}).get("memory_bytes")
    if memory and before["peak_bytes"] * times > memory:
        return f"would take about {before['peak_bytes'] * times / 2**30:.0f} GiB a device"
    seconds = 2.5 * before["forward_backward"]["median_ms"] / 1e3 * times**2  # two of both, and forward
    return f"would take about {seconds:.0f} s" if seconds > ROW_SECONDS else None


def _longest(devices: Devices, options: Options, formula: str) -> None:
    """The most heads that a forward and backward pass found memory for, by the memory of two smaller numbers."""
    length = options.per_device * devices.size
    key = {"kind": "longest", "formula": formula, "ranks": devices.size, "length": length}
    if devices.rows.find(**key) is not None:
        return

    def run(heads: int) -> dict[str, Any]:
        return devices.attempt(weigh, Work(formula, length, heads, options.dim, options.dtype))

    # Each is run twice: the first compiles what is left to compile, and opens connections.
    probes = [(run(heads), run(heads))[1] for heads in options.probes]
    if failed := [x["failed"] for x in probes if "failed" in x]:
        devices.rows.add(key | {"failed": failed[0]})
        return
    peaks = [x["peak_bytes"] for x in probes]
    each = (peaks[1] - peaks[0]) / (options.probes[1] - options.probes[0])
    fits = options.probes[0] + (devices.run(forget) - peaks[0]) / each
    tried: list[dict[str, Any]] = []
    for share in SHARES:
        heads = int(fits * share) // HEADS_STEP * HEADS_STEP
        seconds = probes[1]["first_ms"] / 1e3 * heads / options.probes[1]
        if seconds > 4 * ROW_SECONDS:
            devices.rows.add(key | {"left_out": f"{heads} heads would take about {seconds:.0f} s", "tried": tried})
            return
        found = run(heads)
        if "failed" not in found:
            # Of as many heads as are timed there is room for so many tokens.
            equivalent = {"equivalent_length": length * heads // options.heads, "bytes_per_head": each}
            devices.rows.add(key | {"heads": heads, **found, **equivalent, "tried": tried})
            return
        tried.append({"heads": heads, **found})
    devices.rows.add(key | {"failed": tried[-1]["failed"], "tried": tried})


# --- what follows from the rows --------------------------------------------------------------------------------------


def summary(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Efficiencies: for each formula, length and number of devices, of both directions.

    strong: the time of ``against`` devices by that of these, per device, for one length. weak: the same with lengths
    that grow with the devices, where work for each device grows with their number too.
    """
    rows = [r for r in result["rows"] if r["kind"] == "time" and "forward_backward" in r]
    found = []
    for row in rows:
        same = [r for r in rows if r["formula"] == row["formula"]]
        strong = min((r for r in same if r["length"] == row["length"]), key=lambda r: r["ranks"])
        entry: dict[str, Any] = {name: row[name] for name in ("formula", "ranks", "length")}
        if strong["ranks"] < row["ranks"]:
            entry |= {"strong": _efficiency(row, strong), "against": strong["ranks"]}
        per_device = result["options"]["per_device"]
        alone = next((r for r in same if r["ranks"] == 1 and r["length"] == per_device), None)
        if alone is not None and row["ranks"] > 1 and row["length"] == per_device * row["ranks"]:
            entry["weak"] = _efficiency(row, alone)
        if len(entry) > 3:
            found.append(entry)
    return found


def _efficiency(row: dict[str, Any], base: dict[str, Any]) -> dict[str, float]:
    """Attention's work by devices and time, as a share of the base's: work goes with the square of the length."""
    work = (row["length"] / base["length"]) ** 2 * base["ranks"] / row["ranks"]
    return {
        part: round(work * base[part]["median_ms"] / row[part]["median_ms"], 4)
        for part in ("forward", "forward_backward")
    }


def print_row(row: dict[str, Any]) -> None:
    head = f"{row['ranks']:>2} x {row['formula']:8} {row['kind']:8} {row.get('length', ''):>9}"
    if "failed" in row or "left_out" in row:
        print(f"{head} - {row.get('failed') or row['left_out']}", flush=True)
    elif row["kind"] == "equality":
        worst = max(row["errors"], key=lambda name: row["errors"][name])
        state = f"WRONG: {', '.join(row['wrong'])}" if row["wrong"] else "as one device"
        errors = f"error of {worst} {row['errors'][worst]:.1e}, of one {row['errors_alone'][worst]:.1e}"
        print(f"{head} {row['dtype']:8} {state}, {errors}", flush=True)
    else:
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:9.0f} MiB"
        times = "".join(f"{row[x]['median_ms']:11.2f}" for x in ("forward", "forward_backward") if x in row)
        heads = f"  {row['heads']} heads" if row["kind"] == "longest" else ""
        print(f"{head}{times or ' ' * 11 + format(row['first_ms'], '11.2f')} ms {peak}{heads}", flush=True)


def print_table(result: dict[str, Any]) -> None:
    """Efficiencies, a line for each formula, length and number of devices."""
    print(f"\n{'formula':9} {'length':>9} {'devices':>7} {'strong, fwd':>12} {'f+b':>6} {'weak, fwd':>10} {'f+b':>6}")
    for entry in sorted(summary(result), key=lambda e: (e["formula"], e["length"], e["ranks"])):
        cells = []
        for kind, width in (("strong", 12), ("weak", 10)):
            x = entry.get(kind, {})
            cells += [f"{x[part]:.1%}".rjust(w) if x else "-".rjust(w)
                      for part, w in (("forward", width), ("forward_backward", 6))]  # fmt: skip
        mark = f"  against {entry['against']}" if entry.get("against", 1) > 1 else ""
        print(f"{entry['formula']:9} {entry['length']:>9} {entry['ranks']:>7} {' '.join(cells)}{mark}")


def _draw(result: dict[str, Any], path: Path) -> None:
    try:
        from path_attention.benchmark.scaling_figure import draw
    except ModuleNotFoundError as error:
        print(f"no figure: {error.name} is not installed")
        return
    if draw(result, path):
        print(f"figure: {path}")
