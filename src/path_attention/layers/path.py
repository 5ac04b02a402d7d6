"""The PaTH attention layer (arXiv 2505.16381, section 2.2): what makes w, beta and g out of the tokens."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from path_attention.autocast import without_autocast
from path_attention.checks import check_flag, check_integer, check_number
from path_attention.layers.operator import OperatorAttention, PaTHInputs, at_least_float32
from path_attention.layers.padding import token_positions
from path_attention.layers.short_convolution import ConvolutionState, ShortConvolution, has_kernels
from path_attention.ops.convolve_normalise import MOST_HEAD_DIM, MOST_WIDTH, convolve_normalise

# A w shorter than this is padding or next to it and stays as it is; it bounds the gradient of the norm at 0.
NORM_EPS = 1e-6


class PaTHAttention(OperatorAttention):
    """Attention whose position encoding is a product of Householder-like matrices made from the tokens.

        w_t    = normalise(SiLU(convolve(W_up W_down x_t)))       one unit vector a reflection and key/value head
        beta_t = 2 sigmoid(W_beta x_t + b_beta)                    in (0, 2)
        g_t    = log sigmoid(W_gate x_t + b_gate)                  PaTH-FoX only, one a query head
        out    = W_o path_attention(q, k, v, w, beta, g)

    w, beta and g are float32 at least, whatever the model runs in: rounding them makes the products of many transitions
    drift.

    Args:
        hidden_size: C.
        num_heads: query heads, HQ.
        num_kv_heads: key/value heads, H, a divisor of num_heads; None means num_heads.
        head_dim: D; None means hidden_size // num_heads.
        w_rank: rank of the projection that makes w; None means full rank (one matrix ``w_proj``), which the authors
            use with grouped queries, where it costs little.
        conv_size: tokens of the causal convolution over w, this one included; 0 leaves it (and its SiLU) out.
        num_reflections: R transitions a token; one is the paper's, two can make a rotation.
        use_forget_gate: PaTH-FoX.
        scale_gate: g_t is divided by sqrt(D), as flash-linear-attention's models have it; the paper's is not.
        w_norm_eps: w is divided by sqrt(|w|^2 + w_norm_eps), as flash-linear-attention's models have it with 1e-6; 0 is
            the paper's unit vector.
        qk_norm: RMS norm of every query and key head, in training and everywhere else.
        bias: biases of the q, k and v projections.
        output_bias: bias of the output projection.
        norm_eps: epsilon of the q/k norm.

    Raises:
        ValueError: naming the argument, what was given and what is wanted.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        w_rank: int | None = 32,
        conv_size: int = 3,
        num_reflections: int = 1,
        use_forget_gate: bool = False,
        scale_gate: bool = False,
        w_norm_eps: float = 0.0,
        qk_norm: bool = False,
        bias: bool = False,
        output_bias: bool = False,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__(
            hidden_size,
            num_heads,
            num_kv_heads,
            head_dim,
            qk_norm=qk_norm,
            bias=bias,
            output_bias=output_bias,
            norm_eps=norm_eps,
        )
        if w_rank is not None:
            check_integer("w_rank", w_rank, 1, "an integer, at least 1, or None for full rank")
        check_integer("conv_size", conv_size, 0, "an integer, at least 0 (0 for no convolution)")
        check_integer("num_reflections", num_reflections, 1)
        check_flag("use_forget_gate", use_forget_gate)
        check_flag("scale_gate", scale_gate)
        check_number("w_norm_eps", w_norm_eps, zero=True)
        self.gate_scale = self.head_dim**-0.5 if scale_gate else 1.0
        self.w_norm_eps = w_norm_eps
        self.num_reflections = num_reflections
        transitions = num_reflections * self.num_kv_heads
        channels = transitions * self.head_dim
        if w_rank is None:
            self.w_proj = nn.Linear(hidden_size, channels, bias=False)
        else:
            self.w_down_proj = nn.Linear(hidden_size, w_rank, bias=False)
            self.w_up_proj = nn.Linear(w_rank, channels, bias=False)
        self.w_rank = w_rank
        self.w_conv = ShortConvolution(channels, conv_size) if conv_size else None
        self.beta_proj = nn.Linear(hidden_size, transitions)
        self.gate_proj = nn.Linear(hidden_size, num_heads) if use_forget_gate else None
        nn.init.zeros_(self.beta_proj.bias)  # beta near 1 at the start: the middle of its range
        if self.gate_proj is not None:
            nn.init.zeros_(self.gate_proj.bias)  # as the forgetting transformer has it

    def project(
        self, hidden_states: Tensor, cu_seqlens: Tensor | None = None, convolution: ConvolutionState | None = None
    ) -> PaTHInputs:
        """(B, L, C) -> what the operator takes: for attention maps, and for caches.

        ``convolution``: what the convolution of w has seen before these tokens, which are offered to it; with
        cu_seqlens it has a row for each packed sequence.
        """
        q, k, v = self._project(hidden_states)
        w = self.w_proj(hidden_states) if self.w_rank is None else self.w_up_proj(self.w_down_proj(hidden_states))
        beta = self.beta_proj(hidden_states)
        gate = None if self.gate_proj is None else self.gate_proj(hidden_states)
        shape = (self.num_reflections, self.num_kv_heads)
        if convolution is not None and cu_seqlens is None and self._is_kernels(w):
            assert self.w_conv is not None
            w, beta, g = convolution.step(self.w_conv, w, beta, gate, self.head_dim, NORM_EPS)
            g = None if g is None else self.gate_scale * g
            return PaTHInputs(q, k, v, w.unflatten(2, (*shape, self.head_dim)), beta.unflatten(2, shape), g)
        w = self._w(w, cu_seqlens, convolution).unflatten(2, (*shape, self.head_dim))
        beta = 2 * at_least_float32(beta).sigmoid().unflatten(2, shape)
        g = None if gate is None else self.gate_scale * F.logsigmoid(at_least_float32(gate))
        return PaTHInputs(q, k, v, w, beta, g)

    def _is_kernels(self, w: Tensor) -> bool:
        """Whether one kernel makes the transitions of one more token: what torch.compile cannot put together itself."""
        wanted = w.shape[1] == 1 and not self.w_norm_eps and not (torch.is_grad_enabled() and w.requires_grad)
        return wanted and not torch.compiler.is_compiling() and has_kernels(w)

    def _is_fused(self, w: Tensor) -> bool:
        """Whether one kernel each way makes w without a cache. Pieces of a split sequence are left to torch."""
        if self.w_conv is None or self.context is not None:
            return False
        return has_kernels(w) and self.head_dim <= MOST_HEAD_DIM and self.w_conv.width <= MOST_WIDTH

    def _w(self, w: Tensor, cu_seqlens: Tensor | None, convolution: ConvolutionState | None) -> Tensor:
        """What the projection gave -> (B, L, R * H * D) float32 at least, unit vectors (shorter with w_norm_eps)."""
        if convolution is None and self._is_fused(w):
            assert self.w_conv is not None
            positions = None if cu_seqlens is None else token_positions(cu_seqlens, w.shape[1], w.device)
            least, added = (0.0, self.w_norm_eps) if self.w_norm_eps else (NORM_EPS, 0.0)
            return convolve_normalise(w, self.w_conv.local_weight, positions, self.head_dim, least, added)
        with without_autocast(w.device):
            w = at_least_float32(w)
            if self.w_conv is not None and convolution is not None:
                lengths = None if cu_seqlens is None else cu_seqlens.diff().tolist()
                w = self.w_conv.continue_from(convolution, w, lengths)
            elif self.w_conv is not None:
                w = self._convolve(self.w_conv, w, cu_seqlens)
            w = w.unflatten(2, (-1, self.head_dim))
            if self.w_norm_eps:
                return (w * torch.rsqrt(w.square().sum(-1, keepdim=True) + self.w_norm_eps)).flatten(2)
            return F.normalize(w, dim=-1, eps=NORM_EPS).flatten(2)

    def _convolve(self, convolution: ShortConvolution, w: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        positions = token_positions(cu_seqlens, w.shape[1] * self.num_processes, w.device)
        back = convolution.width - 1
        if self.context is None or back == 0:
            return convolution(w, positions)
        before = self.context.before(w, back)
        pieces, positions = self.context.split(w), self.context.split(self.context.shard(positions, dim=0), dim=0)
        out = [
            # What comes before a piece is convolved too, from nothing, and left out.
            convolution(torch.cat([earlier, piece.transpose(0, 1)], dim=1), F.pad(position, (back, 0)))[:, back:]
            for earlier, piece, position in zip(before, pieces, positions, strict=True)
        ]
        return torch.cat(out, dim=1)
