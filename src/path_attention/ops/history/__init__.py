"""What a cache of PaTH attention holds, and the two things done with it: attend to it, add to it.

state.py says what there is and why; append.py does both in torch (open_rows.py, fold.py, read.py).
"""

from path_attention.ops.history.append import absorb, absorb_packed, append, append_packed, prefill
from path_attention.ops.history.fold import refresh_suffix
from path_attention.ops.history.operator import append_long_operator, append_operator
from path_attention.ops.history.serve import kernels_serve, unsupported_reason
from path_attention.ops.history.state import FIELDS, SHORT, State, Tokens

__all__ = [
    "FIELDS",
    "SHORT",
    "State",
    "Tokens",
    "absorb",
    "absorb_packed",
    "append",
    "append_long_operator",
    "append_operator",
    "append_packed",
    "kernels_serve",
    "prefill",
    "refresh_suffix",
    "unsupported_reason",
]
