"""Everything about decoding that needs a GPU, in a few minutes: compile, test, tune, benchmark.

    python benchmarks/cuda_decode.py --out results/NAME.json

1. In parallel processes: the kernels of every shape and launch below are compiled into Triton's cache on disk, and
   tests/test_cache_cuda.py runs.
2. Launches of the step's kernel are timed in turn on each shape (benchmark/decode.py keeps those of kernels/decode.py).
3. ``path-attention benchmark decode --device cuda``, with plot.
4. With ``--only fla``: tokens a second of flash-linear-attention's PaTH model, added to a NAME.json that is there.

NAME.json has the benchmark, NAME.tune.json the launches, NAME.tests.txt what pytest said; each is written as it comes.
``--only`` runs some of the parts. The last lines are a summary.
"""

import argparse
import json
import multiprocessing
import subprocess
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from path_attention.benchmark import results_file
from path_attention.benchmark.decode import SHAPES, Shape, run_decode_benchmark
from path_attention.benchmark.decode_times import STEPS, _capture, _milliseconds, operands
from path_attention.benchmark.measure import environment
from path_attention.cache import PathCache
from path_attention.ops.history import Tokens
from path_attention.ops.kernels import decode
from path_attention.ops.kernels.decode import FoldLaunch, Launch

PARTS = ("compile", "tests", "tune", "benchmark")
OTHER_PARTS = ("fla",)  # only where it is asked for
# Launches to compare, by width. Programs a multiprocessor change only the grid: they cost no compilation.
VARIANTS = {
    64: [
        replace(decode.LAUNCHES[64], num_warps=warps, stages=stages, registers=registers)
        for warps, stages, registers in (
            (4, 3, 128),
            (4, 4, 128),
            (4, 5, 128),
            (4, 4, 168),
            (4, 4, None),
            (2, 4, 168),
            (2, 4, None),
            (2, 5, None),
            (8, 4, 64),
            (8, 4, 128),
        )
    ],
    128: [
        replace(decode.LAUNCHES[128], num_warps=warps, stages=stages, registers=registers)
        for warps, stages, registers in (
            (8, 3, 128),
            (8, 4, 128),
            (8, 5, 128),
            (4, 3, 128),
            (4, 4, 128),
            (4, 4, 168),
            (4, 4, None),
            (4, 5, None),
        )
    ],
}
PROGRAMS = (1, 2, 3, 4, 8)
# Launches of the kernels that fold prompts, by width.
FOLDS = {
    64: [FoldLaunch(*x) for x in ((4, 128, 4, 3), (4, 168, 4, 3), (4, None, 4, 3), (8, 128, 4, 2), (4, 168, 8, 3))],
    128: [FoldLaunch(*x) for x in ((8, None, 8, 2), (8, 168, 8, 2), (4, None, 8, 2), (8, None, 8, 1))],
}
REPEATS = 5
# Groups of tests that run at once: each compiles kernels of its own.
TESTS = (
    "steps_equal and (bfloat16 or gates)",
    "steps_equal and (float32 or 128 or odd)",
    "steps_equal and 256",
    "graph or wait or thousand or 131072",
)
# Processes that compile at once.
WORKERS = 8


def shapes() -> list[Shape]:
    return [Shape.parse(text) for text in SHAPES["cuda"].split(",")]


def width(shape: Shape) -> int:
    return 64 if shape.dim <= 64 else 128


def step_once(shape: Shape, launch: Launch) -> None:
    """Compile what a step of this shape takes, on few tokens."""
    decode.LAUNCHES = {wide: launch for wide in decode.LAUNCHES}
    small = replace(shape, length=700)
    given = operands(small, small.length, torch.bfloat16, "cuda")
    cache = PathCache(capacity=small.length + 64)
    cache.attend(*given)
    for seed in range(2):
        cache.attend(*operands(small, 1, torch.bfloat16, "cuda", seed=seed))
    torch.cuda.synchronize()


def prefill_once(shape: Shape) -> None:
    """Compile what a prefill of this shape takes: the operator's backends go by the length."""
    PathCache().attend(*operands(replace(shape, batch=1), shape.length, torch.bfloat16, "cuda"))
    torch.cuda.synchronize()


def fold_once(shape: Shape, launch: FoldLaunch) -> None:
    """Compile one launch of the fold of a prompt that the operator's pass does not fold."""
    decode.FOLD_LAUNCHES = {**decode.FOLD_LAUNCHES, width(shape): launch}
    fold_prompt(*filled(replace(shape, batch=1, length=700)))
    torch.cuda.synchronize()


def filled(shape: Shape) -> tuple[PathCache, Tokens]:
    """A cache after a prompt, and the prompt."""
    q, k, v, w, beta = operands(shape, shape.length, torch.bfloat16, "cuda")
    cache = PathCache(capacity=shape.length)
    cache.attend(q, k, v, w, beta)
    return cache, Tokens(q, k, v, w[:, :, None], beta[:, :, None], None, 1.0)


def fold_prompt(cache: PathCache, tokens: Tokens) -> None:
    """Fold the prompt into its cache once more, in two kernels."""
    decode.fold_tokens(cache.state, None, 0, tokens.q.shape[1] - cache.open_lengths[0], tokens)


def compile_all(pool: ProcessPoolExecutor) -> list[Future[None]]:
    seen, jobs = set(), []
    for shape in shapes():
        group = shape.query_heads // shape.heads
        for launch in {decode.LAUNCHES[width(shape)], *VARIANTS[width(shape)]}:
            if (key := (shape.dim, group, launch)) not in seen:
                seen.add(key)
                jobs.append(pool.submit(step_once, shape, launch))
    for shape in {width(shape): shape for shape in shapes()}.values():
        jobs += [pool.submit(fold_once, shape, launch) for launch in FOLDS[width(shape)]]
    return [pool.submit(prefill_once, shape) for shape in shapes()] + jobs


def start_tests() -> list[subprocess.Popen[str]]:
    rest = " and ".join(f"not ({group})" for group in TESTS)
    command = [sys.executable, "-m", "pytest", "tests/test_cache_cuda.py", "-q", "-rfE", "-s", "-p", "no:cacheprovider"]
    return [
        subprocess.Popen([*command, "-k", group], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for group in (*TESTS, rest)
    ]


def finish_tests(running: list[subprocess.Popen[str]], path: Path) -> str:
    found = [process.communicate()[0] for process in running]
    path.write_text("\n".join(found))
    lines = [line for text in found for line in text.splitlines()]
    shown = [line for line in lines if line.startswith(("FAILED", "ERROR", "error "))]
    return "\n".join(shown + [text.strip().splitlines()[-1] for text in found if text.strip()])


@torch.no_grad()
def tune(path: Path) -> list[str]:
    """Milliseconds of a step by launch, beside torch's attention; the best of each shape, in words."""
    result: dict[str, Any] = {**environment(), "gpu": torch.cuda.get_device_name(), "rows": []}
    lines = []
    for shape in shapes():
        rows = tune_shape(shape)
        result["rows"].append({"shape": str(shape), "launches": rows})
        path.write_text(json.dumps(result, indent=1) + "\n")
        timed = sorted((row for row in rows if "path" in row), key=lambda row: row["path"])
        own = next((row for row in timed if row["is_own"]), timed[-1])
        best = ", ".join(f"{row['path']:.4f} {_words(row)}" for row in timed[:3])
        lines.append(f"{shape}: softmax {timed[0]['softmax']:.4f} ms, own launch {own['path']:.4f}; best {best}")
        torch.cuda.empty_cache()
        result["rows"][-1]["folds"] = folds = tune_fold(shape)
        lines.append("  fold of the prompt, ms by FoldLaunch: " + ", ".join(f"{k} {v:.3f}" for k, v in folds.items()))
        path.write_text(json.dumps(result, indent=1) + "\n")
    return lines


@torch.no_grad()
def tune_fold(shape: Shape) -> dict[str, float]:
    """Milliseconds of folding the whole prompt, by launch: what a prefill takes beside the operator where its own pass
    does not fill the cache (packed prompts, gradients).
    """
    cache, tokens = filled(shape)
    own, found = dict(decode.FOLD_LAUNCHES), {}
    for launch in FOLDS[width(shape)]:
        decode.FOLD_LAUNCHES = {width(shape): launch}
        times = []
        for _ in range(REPEATS + 1):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            fold_prompt(cache, tokens)
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        found[str(tuple(launch))] = sorted(times[1:])[REPEATS // 2]
    decode.FOLD_LAUNCHES = own
    return found


def _words(row: dict[str, Any]) -> str:
    return (
        f"(warps {row['num_warps']}, stages {row['stages']}, registers {row['registers']}, programs {row['programs']})"
    )


def tune_shape(shape: Shape) -> list[dict[str, Any]]:
    own = decode.LAUNCHES[width(shape)]
    launches = [replace(x, programs=n) for x in VARIANTS[width(shape)] for n in PROGRAMS]
    launches = [own, *(x for x in launches if x != own)]
    steps = STEPS * (REPEATS + 1)
    given = operands(shape, shape.length - steps // 2, torch.bfloat16, "cuda")
    token = operands(shape, 1, torch.bfloat16, "cuda", seed=1)
    cache = PathCache(capacity=shape.length + steps)
    cache.attend(*given)
    before = {name: x.clone() for name, x in cache.state.tensors().items()}
    k, v = (x.transpose(1, 2).contiguous() for x in given[1:3])
    del given
    one, grouped = token[0].transpose(1, 2), shape.query_heads != shape.heads
    softmax = _capture(lambda: torch.nn.functional.scaled_dot_product_attention(one, k, v, enable_gqa=grouped))
    rows = []
    for launch in launches:
        row: dict[str, Any] = {**asdict(launch), "is_own": launch == own}
        decode.LAUNCHES = {wide: launch for wide in decode.LAUNCHES}
        for name, x in cache.state.tensors().items():
            x.copy_(before[name])  # every launch has the same lengths before it
        try:
            graph = _capture(lambda: cache.attend(*token))
        except Exception as error:
            rows.append(row | {"error": f"{type(error).__name__}: {error}"[:200]})  # does not fit: a result too
            continue
        times = [(_milliseconds(softmax, 8), _milliseconds(graph, STEPS)) for _ in range(REPEATS)]
        medians = [sorted(x)[REPEATS // 2] for x in zip(*times, strict=True)]
        rows.append(row | {"softmax": medians[0], "path": medians[1]})
    return rows


def add_fla(path: Path, limit: float) -> list[str]:
    """Tokens a second of flash-linear-attention's model beside ours, in the rows of ``path``; a process for each."""
    result = json.loads(path.read_text())
    lines = []
    for row in result["models"]:
        setting = [f"--{name}={row[name]}" for name in ("model", "batch", "prompt")]
        command = [sys.executable, "-m", "path_attention.benchmark.fla_decode", *setting]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            row["left_out"]["fla"] = f"not done in {limit:.0f} s"
        else:
            if done.returncode:
                row["left_out"]["fla"] = (done.stderr.strip().splitlines() or ["no message"])[-1]
            else:
                row["fla"] = json.loads(done.stdout.splitlines()[-1])["tokens_per_second"]
                row["others"] = [*(x for x in row["others"] if x != "fla"), "fla"]
                row["left_out"].pop("fla", None)
        results_file.write(result, path)
        found = f"{row['fla']:.0f} tokens/s" if "fla" in row else row["left_out"]["fla"]
        lines.append(f"batch {row['batch']}: PaTH {row['path']:.0f} tokens/s, flash-linear-attention's model {found}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the benchmark; others stand beside it")
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {', '.join(PARTS + OTHER_PARTS)}")
    parser.add_argument("--fla-limit", type=float, default=150.0, help="seconds for each batch of part fla")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--prompt", type=int, default=4096, help="tokens before those that whole models make")
    parser.add_argument("--model", default="760m", help="whole models, or none")
    parser.add_argument("--commit", help="of the sources, where git does not tell")
    arguments = parser.parse_args()
    parts = arguments.only.split(",")
    if not set(parts) <= set(PARTS + OTHER_PARTS):
        parser.error(f"--only: got {arguments.only}; wanted some of {', '.join(PARTS + OTHER_PARTS)}")
    out: Path = arguments.out
    if "fla" in parts and "benchmark" not in parts and not out.exists():
        parser.error(f"--only fla: {out} is not there; wanted the JSON of part benchmark, to whose rows it adds")
    out.parent.mkdir(parents=True, exist_ok=True)
    summary, begun = [], time.perf_counter()

    def log(text: str) -> None:
        print(f"[{time.perf_counter() - begun:.0f} s] {text}", flush=True)

    running = start_tests() if "tests" in parts else []
    if "compile" in parts:
        with ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context("spawn")) as pool:
            for job in compile_all(pool):
                if (error := job.exception()) is not None:
                    log(f"compile: {type(error).__name__}: {str(error)[:300]}")
        log("compiled")
    if running:
        summary.append(finish_tests(running, out.with_suffix(".tests.txt")))
        log("tested")
        print(summary[-1], flush=True)
    launches = dict(decode.LAUNCHES)
    if "tune" in parts:
        summary += tune(out.with_suffix(".tune.json"))
        log("tuned")
    decode.LAUNCHES = launches
    if "benchmark" in parts:
        model = None if arguments.model == "none" else arguments.model
        run_decode_benchmark(
            device="cuda",
            repeats=arguments.repeats,
            model=model,
            prompt=arguments.prompt,
            out=out,
            plot=out.with_suffix(".png"),
            commit=arguments.commit,
        )
        log("timed")
    if "fla" in parts:
        summary += add_fla(out, arguments.fla_limit)
        log("flash-linear-attention")
    print("\n".join(summary))


if __name__ == "__main__":
    main()
