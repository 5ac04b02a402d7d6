"""Triton kernel of a step of decoding: one token's transitions and gates from what the layer's projections gave.

    w    = normalise(SiLU(sum_{j < width} weight[:, width - 1 - j] * x_{t - j}))      x: the inputs of the convolution
    beta = 2 sigmoid(.)        g = log sigmoid(.)

As some 40 operators of torch these would take longer to launch than the attention takes.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=("heads", "query_heads", "window"))
def transition_kernel(
    p_x,  # (B, heads, D): this token's input of the convolution; heads = R * H
    p_beta,  # (B, heads)
    p_gate,  # (B, HQ) or None
    p_weight,  # (heads * D, width)
    p_ring,  # (B, window, heads, D): earlier inputs, token t at place t mod window; this one is added
    p_length,  # (B,): tokens before this one
    p_w,  # out (B, heads, D) float32
    p_new_beta,  # out (B, heads) float32
    p_g,  # out (B, HQ) float32 or None
    heads,
    query_heads,
    window,
    eps,  # what a shorter w is divided by
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_GATES: tl.constexpr,
):
    """One head of one sequence; the first also makes the gates of its sequence."""
    i_head = tl.program_id(0) % heads
    i_sequence = tl.program_id(0) // heads
    o = tl.arange(0, BLOCK_D)
    m = o < D
    s_length = tl.load(p_length + i_sequence)
    i_row = tl.program_id(0).to(tl.int64) * D
    i_ring = i_sequence.to(tl.int64) * window
    b_x = tl.load(p_x + i_row + o, mask=m, other=0.0)
    p_taps = p_weight + (i_head * D + o) * WIDTH
    b_y = b_x.to(tl.float32) * tl.load(p_taps + WIDTH - 1, mask=m, other=0.0).to(tl.float32)
    for back in tl.static_range(1, WIDTH):
        i_place = i_ring + (s_length + window - back) % window
        b_past = tl.load(p_ring + (i_place * heads + i_head) * D + o, mask=m, other=0.0).to(tl.float32)
        b_y += b_past * tl.load(p_taps + WIDTH - 1 - back, mask=m, other=0.0).to(tl.float32)
    i_place = i_ring + s_length % window
    tl.store(p_ring + (i_place * heads + i_head) * D + o, b_x.to(p_ring.dtype.element_ty), mask=m)
    b_y = b_y * tl.sigmoid(b_y)
    s_norm = tl.sqrt(tl.sum(b_y * b_y))
    tl.store(p_w + i_row + o, b_y / tl.maximum(s_norm, eps), mask=m)
    s_beta = tl.load(p_beta + tl.program_id(0)).to(tl.float32)
    tl.store(p_new_beta + tl.program_id(0), 2 * tl.sigmoid(s_beta))
    if p_gate is not None:
        if i_head == 0:
            o_gate = tl.arange(0, BLOCK_GATES)
            m_gate = o_gate < query_heads
            b_gate = tl.load(p_gate + i_sequence * query_heads + o_gate, mask=m_gate, other=0.0).to(tl.float32)
            b_small = tl.exp(-tl.abs(b_gate))
            # log(1 + x) of a small x is x - x^2 / 2; 1 + x would have rounded it away.
            b_log = tl.where(b_small < 1e-3, b_small * (1 - b_small / 2), tl.log(1 + b_small))
            tl.store(p_g + i_sequence * query_heads + o_gate, tl.minimum(b_gate, 0.0) - b_log, mask=m_gate)
