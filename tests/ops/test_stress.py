"""A deadlock or a race is worse than slowness: many launches of the Hopper kernels with checks, under a watchdog."""

import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.ops.watchdog import Hang, run_watched

# Head dim and query heads of a key head: the kernels' variants. A process each, all at once: they compile side by side
# and disturb one another on the GPU.
VARIANTS = [(64, 1), (64, 4), (128, 1), (128, 2)]
LAUNCHES = 250  # of each
# A launch takes milliseconds, but before the first one some twenty-five kernels are compiled, a second or two each.
IDLE_SECONDS, TOTAL_SECONDS = 120.0, 300.0


def test_a_hang_is_killed_and_reported() -> None:
    hangs = "import time\nprint('launch 7', flush=True)\nwhile True: time.sleep(1)"
    start = time.monotonic()
    with pytest.raises(Hang, match="the last one: launch 7"):
        run_watched([sys.executable, "-c", hangs], idle_seconds=1, total_seconds=20)
    assert time.monotonic() - start < 10


def test_one_that_is_busy_for_ever_is_killed_too() -> None:
    busy = "import time\nwhile True: print('busy', flush=True); time.sleep(0.05)"
    with pytest.raises(Hang, match="busy"):
        run_watched([sys.executable, "-c", busy], idle_seconds=5, total_seconds=1)


def test_a_failure_is_reported_with_what_was_written() -> None:
    with pytest.raises(AssertionError, match="launch 3\nout differs"):
        run_watched([sys.executable, "-c", "print('launch 3\\nout differs'); exit(1)"], idle_seconds=9, total_seconds=9)


def test_one_that_ends_is_read_to_its_end() -> None:
    assert run_watched([sys.executable, "-c", "print(1); print(2)"], idle_seconds=9, total_seconds=9) == ["1", "2"]


@pytest.mark.gpu
@pytest.mark.slow
def test_a_thousand_launches() -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")

    def watched(variant: tuple[int, int]) -> list[str]:
        command = [sys.executable, "-m", "tests.ops.stress", *map(str, variant), str(LAUNCHES)]
        return run_watched(command, idle_seconds=IDLE_SECONDS, total_seconds=TOTAL_SECONDS)

    with ThreadPoolExecutor(len(VARIANTS)) as pool:
        for lines in pool.map(watched, VARIANTS):
            assert sum(line.partition(":")[0].isdigit() for line in lines) == LAUNCHES
