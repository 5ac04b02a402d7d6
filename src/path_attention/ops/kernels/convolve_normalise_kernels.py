"""Triton kernels that make every w of a call out of its projection, and back: convolution, SiLU and norm in one pass.

    c_t = sum_{j < WIDTH} taps_j * x_{t - j}              taps_j = weight[:, WIDTH - 1 - j]; x before its sequence is 0
    y_t = c_t * sigmoid(c_t)
    w_t = y_t / max(sqrt(|y_t|^2 + added), least)         each head by itself

    d_y_t    = (d_w_t - w_t (w_t . d_w_t)) / norm_t       without the second term where ``least`` is the norm
    d_c_t    = d_y_t * sigmoid(c_t) * (1 + c_t * (1 - sigmoid(c_t)))
    d_x_t    = sum_j taps_j * d_c_{t + j}                 of tokens of the same sequence
    d_taps_j = sum_t d_c_t * x_{t - j}

A program goes through its tokens in their order with a tile (heads, D) of one token at a time. What a token shares with
its neighbours, inputs on one side and incomplete gradients on the other, stays in registers, so that every number is
read and computed once, but for the WIDTH - 1 tokens before and after the program's own. Rows of GROUP tokens are read
before the first of them is used: these reads are what keeps the memory busy.
"""

# mypy: disable-error-code="assignment"
# Tuples of tiles grow in loops that are unrolled.

import triton
import triton.language as tl

from path_attention.ops.kernels.tiles import LOG2_E

# Numbers of a call: no kernel is compiled again for other ones.
NUMBERS = ("length", "blocks", "heads", "added", "least_square")


@triton.jit
def _tile(length, blocks, heads, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_HEADS: tl.constexpr, TOKENS):
    """The program's first token in its sequence and among all, its number among programs of the same heads, and its
    channels. Programs of the same tokens stand side by side: together they read whole rows.
    """
    head_blocks = tl.cdiv(heads, BLOCK_HEADS)
    i_block = tl.program_id(0) // head_blocks
    o_head = tl.program_id(0) % head_blocks * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    o_dim = tl.arange(0, BLOCK_D)[None, :]
    i_start = i_block % blocks * TOKENS
    i_row = (i_block // blocks).to(tl.int64) * length + i_start
    return i_start, i_row, i_block, o_head * D + o_dim, (o_head < heads) & (o_dim < D)


@triton.jit
def _is_between(i_token, i_first, i_end):
    """i_first <= i_token < i_end, as a tile (1, 1): Triton's interpreter takes no mask made with a number's bit."""
    o_token = i_token + tl.zeros((1, 1), tl.int32)
    return (o_token >= i_first) & (o_token < i_end)


@triton.jit
def _load_taps(p_weight, o, m, WIDTH: tl.constexpr):
    taps = ()
    for j in tl.static_range(WIDTH):
        taps = taps + (tl.load(p_weight + o * WIDTH + (WIDTH - 1 - j), mask=m, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def _load_rows(p, i_first, i_end, o, m, channels, COUNT: tl.constexpr):
    """Rows of tokens from i_first on, as they are; zeros from i_end on."""
    rows = ()
    for i in tl.static_range(COUNT):
        mask = m & _is_between(i_first + i, 0, i_end)
        rows = rows + (tl.load(p + (i_first + i) * channels + o, mask=mask, other=0.0),)
    return rows


@triton.jit
def _load_past(p, i_start, o, m, channels, WIDTH: tl.constexpr):
    """Rows of the tokens just before the program's, the nearest first."""
    past = ()
    for j in tl.static_range(1, WIDTH):
        mask = m & _is_between(-j, -i_start, 0)
        past = past + (tl.load(p - j * channels + o, mask=mask, other=0.0).to(tl.float32),)
    return past


@triton.jit
def _load_positions(p, i_first, i_end, COUNT: tl.constexpr):
    """Index of each token in its own sequence; without packed sequences zeros, which nobody reads."""
    positions = ()
    for i in tl.static_range(COUNT):
        if p is None:
            positions = positions + (0,)
        else:
            positions = positions + (tl.load(p + i_first + i, mask=i_first + i < i_end, other=0).to(tl.int32),)
    return positions


@triton.jit
def _own(b_x, s_position, j: tl.constexpr, PACKED: tl.constexpr):
    """A tile of two tokens j apart, zeros if the later one's sequence begins between them."""
    if PACKED:
        return tl.where(s_position >= j, b_x, 0.0)
    else:
        return b_x


@triton.jit
def _convolve(b_x, past, taps, s_position, WIDTH: tl.constexpr, PACKED: tl.constexpr):
    """c_t, and the inputs that it is made of, x_t first."""
    inputs = (b_x.to(tl.float32),)
    b_c = inputs[0] * taps[0]
    for j in tl.static_range(1, WIDTH):
        inputs = inputs + (_own(past[j - 1], s_position, j, PACKED),)
        b_c += inputs[j] * taps[j]
    return b_c, inputs


@triton.jit
def _sigmoid(b_x):
    """By a root, in five instructions for sm_90: tl.sigmoid's are twelve, as its division takes care of numbers that do
    not occur here, beside some 35 others for each number on the way back.
    """
    b_root = tl.rsqrt(1 + tl.exp2(b_x * -LOG2_E))
    return b_root * b_root


@triton.jit
def _scale(b_y, added, least_square):
    """(heads, 1): what y is multiplied by, and whether it depends on y. Not a number if y is none."""
    b_square = tl.sum(b_y * b_y, axis=1)[:, None] + added
    m_least = b_square < least_square
    return tl.rsqrt(tl.where(m_least, least_square, b_square)), ~m_least


@triton.jit
def _store_row(p, i_token, i_end, o, m, channels, b_x):
    """One token's row, if the token is one of the program's: 0 <= i_token < i_end."""
    mask = m & _is_between(i_token, 0, i_end)
    tl.store(p + i_token * channels + o, b_x.to(p.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=NUMBERS)
def convolve_normalise_kernel(
    p_x,  # (B, L, heads * D)
    p_weight,  # (heads * D, WIDTH)
    p_positions,  # (L,) or None
    p_w,  # out (B, L, heads * D) float32
    length,  # L
    blocks,  # of tokens in a sequence
    heads,
    added,
    least_square,  # least ** 2
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Some tokens of some heads."""
    PACKED: tl.constexpr = p_positions is not None
    i_start, i_row, _i_block, o, m = _tile(length, blocks, heads, D, BLOCK_D, BLOCK_HEADS, TOKENS)
    channels = heads * D
    p_x += i_row * channels
    p_w += i_row * channels
    if PACKED:
        p_positions += i_start
    s_rest = length - i_start
    taps = _load_taps(p_weight, o, m, WIDTH)
    past = _load_past(p_x, i_start, o, m, channels, WIDTH)
    for i_group in range(0, tl.minimum(s_rest, TOKENS), GROUP):
        rows = _load_rows(p_x, i_group, s_rest, o, m, channels, GROUP)
        positions = _load_positions(p_positions, i_group, s_rest, GROUP)
        for i in tl.static_range(GROUP):
            b_c, inputs = _convolve(rows[i], past, taps, positions[i], WIDTH, PACKED)
            b_y = b_c * _sigmoid(b_c)
            b_scale, _m_norm = _scale(b_y, added, least_square)
            _store_row(p_w, i_group + i, s_rest, o, m, channels, b_y * b_scale)
            past = inputs[: WIDTH - 1]


@triton.jit
def _d_convolved(b_c, b_d_w, added, least_square):
    """d_c_t from c_t and d_w_t."""
    b_sigmoid = _sigmoid(b_c)
    b_y = b_c * b_sigmoid
    b_scale, m_norm = _scale(b_y, added, least_square)
    b_along = tl.where(m_norm, tl.sum(b_y * b_d_w, axis=1)[:, None] * b_scale * b_scale, 0.0)
    b_d_y = (b_d_w - b_y * b_along) * b_scale
    return b_d_y * (b_sigmoid + b_y * (1 - b_sigmoid))


@triton.jit
def _add_to_inputs(b_d_c, waiting, taps, s_position, WIDTH: tl.constexpr, PACKED: tl.constexpr):
    """Gradients of x_t, x_{t-1}, ...: those that wait for d_c_t, with it. The last one is complete."""
    d_inputs = (b_d_c * taps[0],)
    for j in tl.static_range(1, WIDTH):
        d_inputs = d_inputs + (waiting[j - 1] + _own(b_d_c * taps[j], s_position, j, PACKED),)
    return d_inputs


@triton.jit
def _zeros(COUNT: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_D: tl.constexpr):
    tiles = ()
    for _i in tl.static_range(COUNT):
        tiles = tiles + (tl.zeros((BLOCK_HEADS, BLOCK_D), tl.float32),)
    return tiles


@triton.jit
def _accumulate(sums, b_d_c, inputs, WIDTH: tl.constexpr):
    added = ()
    for j in tl.static_range(WIDTH):
        added = added + (sums[j] + b_d_c * inputs[j],)
    return added


@triton.jit(do_not_specialize=NUMBERS)
def convolve_normalise_backward_kernel(
    p_d_w,  # (B, L, heads * D) float32
    p_x,  # (B, L, heads * D)
    p_weight,  # (heads * D, WIDTH)
    p_positions,  # (L,) or None
    p_d_x,  # out (B, L, heads * D)
    p_d_taps,  # out (B * blocks, WIDTH, heads * D) float32: each block's sum over its tokens
    length,  # L
    blocks,  # of tokens in a sequence
    heads,
    added,
    least_square,  # least ** 2
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Some tokens of some heads. The gradient of an input is complete WIDTH - 1 tokens later, so the program goes on
    that far past its own tokens.
    """
    # Tokens that fill up the last group are then past the sequence's end: they add nothing to the sums.
    tl.static_assert(TOKENS % GROUP == 0)
    PACKED: tl.constexpr = p_positions is not None
    i_start, i_row, i_block, o, m = _tile(length, blocks, heads, D, BLOCK_D, BLOCK_HEADS, TOKENS)
    channels = heads * D
    p_x += i_row * channels
    p_d_x += i_row * channels
    p_d_w += i_row * channels
    if PACKED:
        p_positions += i_start
    s_rest = length - i_start
    s_own = tl.minimum(s_rest, TOKENS)
    taps = _load_taps(p_weight, o, m, WIDTH)
    past = _load_past(p_x, i_start, o, m, channels, WIDTH)
    waiting = _zeros(WIDTH - 1, BLOCK_HEADS, BLOCK_D)
    d_taps = _zeros(WIDTH, BLOCK_HEADS, BLOCK_D)
    for i_group in range(0, s_own, GROUP):
        rows = _load_rows(p_x, i_group, s_rest, o, m, channels, GROUP)
        d_rows = _load_rows(p_d_w, i_group, s_rest, o, m, channels, GROUP)
        positions = _load_positions(p_positions, i_group, s_rest, GROUP)
        for i in tl.static_range(GROUP):
            b_c, inputs = _convolve(rows[i], past, taps, positions[i], WIDTH, PACKED)
            b_d_c = _d_convolved(b_c, d_rows[i], added, least_square)
            d_taps = _accumulate(d_taps, b_d_c, inputs, WIDTH)
            d_inputs = _add_to_inputs(b_d_c, waiting, taps, positions[i], WIDTH, PACKED)
            _store_row(p_d_x, i_group + i - (WIDTH - 1), s_own, o, m, channels, d_inputs[WIDTH - 1])
            past, waiting = inputs[: WIDTH - 1], d_inputs[: WIDTH - 1]
    i_after = tl.cdiv(s_own, GROUP) * GROUP
    rows = _load_rows(p_x, i_after, s_rest, o, m, channels, WIDTH - 1)
    d_rows = _load_rows(p_d_w, i_after, s_rest, o, m, channels, WIDTH - 1)
    positions = _load_positions(p_positions, i_after, s_rest, WIDTH - 1)
    for i in tl.static_range(WIDTH - 1):
        b_c, inputs = _convolve(rows[i], past, taps, positions[i], WIDTH, PACKED)
        b_d_c = _d_convolved(b_c, d_rows[i], added, least_square)
        d_inputs = _add_to_inputs(b_d_c, waiting, taps, positions[i], WIDTH, PACKED)
        _store_row(p_d_x, i_after + i - (WIDTH - 1), s_own, o, m, channels, d_inputs[WIDTH - 1])
        past, waiting = inputs[: WIDTH - 1], d_inputs[: WIDTH - 1]
    for j in tl.static_range(WIDTH):
        i_sum = (i_block.to(tl.int64) * WIDTH + WIDTH - 1 - j) * channels
        tl.store(p_d_taps + i_sum + o, d_taps[j], mask=m)
