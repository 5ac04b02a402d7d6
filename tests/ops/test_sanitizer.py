"""Every memory access of the kernels, looked at by NVIDIA's compute-sanitizer: a small case of each route.

    compute-sanitizer --tool memcheck python -m tests.ops.test_sanitizer triton 64

does one of them by hand.
"""

import os
import shutil
import subprocess
import sys

import pytest
import torch

SANITIZER = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
# A kernel runs some hundred times slower under it, but before the first one some twenty are compiled.
TIMEOUT = 400.0
# What compute-sanitizer ends with where it found something.
FOUND = 86


def small_case(backend: str, dim: int) -> None:
    """Sequences of no, one and several leaves, the last one partly filled, with groups of heads, forward and back."""
    from path_attention import path_attention, unsupported_reason
    from tests.ops.test_cuda import make

    if backend == "sdpa":  # whole trees only
        inputs, ends = make((1, 256, 4, 2, dim), torch.bfloat16), None
    else:
        inputs = make((1, 400, 4, 2, dim), torch.bfloat16, gate=True)
        ends = torch.tensor([0, 0, 65, 66, 400])
    reason = unsupported_reason(backend, *inputs, cu_seqlens=ends)
    assert reason is None, reason
    out = path_attention(*inputs, cu_seqlens=ends, backend=backend)
    torch.autograd.grad(out, [x for x in inputs if x is not None], torch.ones_like(out))
    torch.cuda.synchronize()
    assert bool(out.isfinite().all())


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(SANITIZER is None or not torch.cuda.is_available(), reason="needs a GPU and compute-sanitizer")
@pytest.mark.parametrize(
    "backend, dim", [("triton", 64), ("triton", 80), ("sdpa", 64), ("hopper", 64), ("hopper", 128)]
)
def test_no_access_is_out_of_bounds(backend: str, dim: int) -> None:
    if backend == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    # Each tensor an allocation of its own: beside one of torch's pool an access past the end would find memory.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    program = [sys.executable, "-m", "tests.ops.test_sanitizer", backend, str(dim)]
    command = [str(SANITIZER), "--tool", "memcheck", "--error-exitcode", str(FOUND), *program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


if __name__ == "__main__":
    small_case(sys.argv[1], int(sys.argv[2]))
