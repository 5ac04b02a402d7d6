"""The process that test_compile.py starts: every kernel of a call is compiled for Hopper and none is launched; no GPU.

    python -m tests.ops.kernels.ahead_of_time '{"backend": "hopper", "dim": 64}' ...

An argument is a call as run_engine takes it, or what else ``backend`` names; ``--only hopper.`` leaves out kernels of
which the name begins otherwise. The engine runs as it is on tensors that nobody computes, so that signatures, constants
and launch options are those of real launches. stdout has a JSON list, an object for each compiled variant of a kernel.
"""

import argparse
import contextlib
import io
import json
import re
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

# Sixteen leaves: four levels, and every kernel has something to do.
LENGTH = 1024
CHANNELS = 2048
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
# C7510 to C7519: ptxas made products wait for one another.
_WARNING = re.compile(r"C75\d\d|[Pp]otential [Pp]erformance [Ll]oss|warning")


class Hopper:
    """As much of a driver as compiling asks for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def compile_instead_of_launching(found: list[dict[str, Any]], only: str) -> None:
    """Replace launches from here on by compilations, whose results go to ``found``; a variant counts once. Those of
    kernels whose name does not begin with ``only`` are left out.
    """
    triton.runtime.driver.set_active(Hopper())  # type: ignore[arg-type]
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True  # one from Triton's cache has no log
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        module = self.fn.__module__.partition("kernels.")[2]
        name = f"{module}.{self.fn.__name__}"
        if not name.startswith(only):
            return
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if log.getvalue():  # else it is compiled already
            found.append(describe(name, kernel, log.getvalue()))

    JITFunction.run = compile_only


def describe(name: str, kernel: Any, log: str) -> dict[str, Any]:
    spills = _SPILLS.search(log)
    assert spills, f"{name}: ptxas tells nothing of spills: {log}"
    warnings = [line.strip() for line in log.splitlines() if _WARNING.search(line)]
    return {
        "kernel": name,
        "spilled_bytes": int(spills[1]) + int(spills[2]),
        "shared_bytes": kernel.metadata.shared,
        "warnings": warnings,
    }


def run_engine(
    backend: str,
    dim: int,
    group: int = 1,
    gated: bool = False,
    packed: bool = False,
    dtype: str = "bfloat16",
    reflections: int = 1,
    length: int = LENGTH,
    heads: int | None = None,
    kept: bool = False,
) -> None:
    """A forward and a backward pass of the CUDA engine; CHANNELS columns of queries if not said otherwise.

    kept: the former keeps what the latter else computes again.
    """
    from path_attention.ops.engines import cuda

    heads = heads or CHANNELS // dim // group
    q = torch.zeros(1, length, heads * group, dim, dtype=getattr(torch, dtype))
    k = torch.zeros(1, length, heads, dim, dtype=q.dtype)
    w, beta = torch.zeros(1, length, reflections, heads, dim), torch.zeros(1, length, reflections, heads)
    g = torch.zeros(1, length, heads * group) if gated else None
    ends = torch.tensor([0, length]) if packed else None
    room = None
    if kept:
        room = torch.empty(cuda.kept_bytes(backend, q, k, k, w, g, ends), dtype=torch.uint8)  # type: ignore[arg-type]
    out, log_sum_exp = cuda.forward(backend, q, k, k, w, beta, g, ends, 1.0, kept=room)  # type: ignore[arg-type]
    cuda.backward(backend, out, q, k, k, w, beta, g, out, log_sum_exp, ends, 1.0, room)  # type: ignore[arg-type]


def run_pairs(dim: int, group: int = 1) -> None:
    """A forward and a backward pass of a pair of pieces."""
    from path_attention.ops.kernels import pairs

    heads = CHANNELS // dim // group
    q = torch.zeros(1, heads * group, LENGTH, dim, dtype=torch.bfloat16)
    k, gate = torch.zeros(1, heads, LENGTH, dim, dtype=torch.bfloat16), torch.zeros(1, heads * group, LENGTH)
    operands = pairs.Operands(q, k, k, gate, gate)
    out, log_sum_exp = pairs.forward(operands)
    pairs.backward(operands, out, log_sum_exp, log_sum_exp)


def run_hopper_pairs(dim: int, group: int = 1, gated: bool = False) -> None:
    """The same by the kernels for Hopper."""
    from path_attention.ops.kernels.hopper import pairs

    heads = CHANNELS // dim // group
    q = torch.zeros(1, LENGTH, heads * group, dim, dtype=torch.float16)
    k, v = (torch.zeros(1, LENGTH, heads, dim, dtype=x) for x in (torch.float16, torch.bfloat16))
    numbers = torch.zeros(1, LENGTH, heads * group)
    gates = (numbers, numbers.permute(2, 0, 1).contiguous()) if gated else (None, None)
    x = pairs.Operands(q, k, v, *gates, first_key=0)
    pairs.forward(x, q.float(), numbers, 0)
    found = (k.float(), v.float(), gates[1])
    pairs.backward(x, q.bfloat16(), numbers, numbers, torch.ones(1), 0, *found)


def run_edges(dim: int, by_hopper: bool = False) -> None:
    """Rows at the edges of pieces, and back."""
    from path_attention.ops.engines import edges

    heads = CHANNELS // dim
    q = torch.zeros(1, LENGTH, heads, dim, dtype=torch.bfloat16)
    w, beta = torch.zeros(1, LENGTH, 1, heads, dim), torch.zeros(1, LENGTH, 1, heads)
    found = edges.edges(q, q, w, beta, LENGTH, 1.0, by_hopper)
    edges.add_backward(q, q, w, beta, LENGTH, 1.0, found, (q, q, w, beta), by_hopper)


def run_convolve_normalise(dim: int, dtype: str = "bfloat16", packed: bool = False, width: int = 3) -> None:
    """w of the layer, and back."""
    from path_attention.ops.kernels import convolve_normalise

    x = torch.zeros(1, LENGTH, CHANNELS // dim * dim, dtype=getattr(torch, dtype))
    weight, positions = torch.zeros(x.shape[2], width), torch.arange(LENGTH) if packed else None
    w = convolve_normalise.forward(x, weight, positions, dim, 1e-6, 0.0)
    convolve_normalise.backward(w, x, weight, positions, dim, 1e-6, 0.0)


def run_decode(dim: int, group: int = 1) -> None:
    """A prompt, folded from the operator's pass and by itself, a step that folds and a long call of a cache."""
    from path_attention import PathCache
    from path_attention.ops.history import serve
    from path_attention.ops.history.state import Tokens
    from path_attention.ops.kernels import decode
    from path_attention.ops.kernels.linear import Spans

    q = torch.zeros(1, 207, 2 * group, dim, dtype=torch.bfloat16)
    k, beta = torch.zeros(1, 207, 2, dim, dtype=torch.bfloat16), torch.zeros(1, 207, 2)
    cache = PathCache(chunk=128, capacity=400)
    cache.attend(q, k, k, k.float(), beta)  # in torch: this process has no GPU
    serve.DEVICES = frozenset({"cpu"})
    decode._is_hopper = lambda device: True  # type: ignore[assignment]
    cache.attend(*(x[:, :1] for x in (q, k, k, k.float(), beta)))
    tokens = Tokens(q, k, k, k.float()[:, :, None], beta[:, :, None], None, 1.0)
    decode.fold_tokens(cache.state, None, 0, 192, tokens)
    tail = decode.fold_tail(cache.state, 176, tokens)
    nodes = torch.zeros(2 * 4, 2, dim, dim, dtype=torch.float16)
    spans = Spans(torch.zeros(4, 64, 2, dim, dtype=torch.float16), nodes, nodes)
    decode.fold_spans(cache.state, 176, tail, spans, k.flatten(0, 1), 4, 0, 0)
    decode.attend_history(cache.state, torch.zeros(1, 2, 64 * group, dim), None)


if __name__ == "__main__":
    compiled: list[dict[str, Any]] = []
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calls", nargs="+")
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    compile_instead_of_launching(compiled, arguments.only)
    for call in arguments.calls:
        options = json.loads(call)
        others = {
            "pairs": run_pairs,
            "hopper_pairs": run_hopper_pairs,
            "edges": run_edges,
            "decode": run_decode,
            "convolve_normalise": run_convolve_normalise,
        }
        if options["backend"] in others:
            others[options.pop("backend")](**options)
        else:
            run_engine(**options)
    print(json.dumps(compiled))
