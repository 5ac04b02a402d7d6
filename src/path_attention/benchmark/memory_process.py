"""The process that ``measure.peak_memory`` starts: one contender, one setting, one number on stdout.

python -m path_attention.benchmark.memory_process NAME SETTING_AS_JSON
"""

import json
import sys

import torch

from path_attention.benchmark.contenders import Setting, contender, make_operands
from path_attention.benchmark.measure import CLEAR_PEAK, STATUS, forward_backward


def _resident(key: str) -> int:
    """VmRSS, the memory held now, or VmHWM, its peak, in bytes."""
    line = next(x for x in STATUS.read_text().splitlines() if x.startswith(key))
    return 1024 * int(line.split()[1])


def measure(name: str, setting: Setting) -> int:
    """Bytes that forward and backward add at most to what the process holds before, the inputs included in that."""
    function = contender(name).function
    warm_up = make_operands(Setting(length=256))  # code, thread pools and their buffers
    forward_backward(function, warm_up, torch.ones_like(warm_up.q))
    operands = make_operands(setting)
    d_out = torch.ones_like(operands.q)
    CLEAR_PEAK.write_text("5")  # sets VmHWM back to VmRSS
    before = _resident("VmRSS")
    forward_backward(function, operands, d_out)
    return _resident("VmHWM") - before


if __name__ == "__main__":
    given = json.loads(sys.argv[2])
    print(measure(sys.argv[1], Setting(**{**given, "dtype": getattr(torch, given["dtype"])})))
