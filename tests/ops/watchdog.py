"""Runs a process that may hang, as a kernel that waits for ever hangs its process: it is killed, and the last line that
it wrote is reported.
"""

import queue
import subprocess
import threading
import time
from collections.abc import Sequence


class Hang(AssertionError):
    """A process wrote nothing for too long, or took too long in all."""


def run_watched(command: Sequence[str], *, idle_seconds: float, total_seconds: float) -> list[str]:
    """What the command wrote, line by line, stderr among it.

    Raises:
        Hang: no line came for ``idle_seconds``, or no end in ``total_seconds``; the process is gone by then.
        AssertionError: it ended with another code than 0.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    came: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read, args=(process, came), daemon=True).start()
    lines: list[str] = []
    end = time.monotonic() + total_seconds
    try:
        while True:
            line = came.get(timeout=max(0.0, min(idle_seconds, end - time.monotonic())))
            if line is None:
                break
            lines.append(line)
    except queue.Empty:
        last = lines[-1] if lines else "nothing"
        raise Hang(f"killed after {len(lines)} lines, the last one: {last}") from None
    finally:
        process.kill()  # does nothing to one that has ended
        process.wait()
    assert process.returncode == 0, "\n".join(lines[-20:])
    return lines


def _read(process: subprocess.Popen[str], came: "queue.Queue[str | None]") -> None:
    assert process.stdout is not None
    for line in process.stdout:
        came.put(line.rstrip())
    process.wait()
    came.put(None)
