"""What all token mixers of the attention kind share: projections, padding, packing.

Legend: B batch, L length, C hidden size, HQ query heads, H key/value heads, D head_dim.
"""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from path_attention.checks import bad, check_flag, check_integer, check_number
from path_attention.layers.padding import Padding, sequence_boundaries
from path_attention.ops.arguments import check_tensor

if TYPE_CHECKING:  # it knows of these layers
    from path_attention.distributed.context import ContextParallel, Layout


class HeadRMSNorm(nn.RMSNorm):
    """RMS norm in the dtype of its input, also where its weight has another, as under autocast: torch's fused kernel,
    which sums in float32, takes but one dtype.
    """

    group: Any = None  # the processes that share the heads under tensor parallelism

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        weight: Tensor = self.weight
        if self.group is not None:
            from path_attention.distributed.tensor import sum_gradients

            weight = sum_gradients(weight, self.group)
        return nn.functional.rms_norm(x, self.normalized_shape, weight.to(x.dtype), self.eps).to(x.dtype)


class Attention(nn.Module):
    """Projections q, k, v and o around an attention that a subclass defines in :meth:`attend`.

    Args:
        hidden_size: C.
        num_heads: query heads, HQ.
        num_kv_heads: key/value heads, H, a divisor of num_heads; None means num_heads.
        head_dim: D; None means hidden_size // num_heads.
        qk_norm: RMS norm of every query and key head, in training and everywhere else.
        bias: biases of the q, k and v projections.
        output_bias: bias of the output projection.
        norm_eps: epsilon of the q/k norm.

    Raises:
        ValueError: naming the argument, what was given and what is wanted.
    """

    cache_type = "full_attention"  # the kind of cache it wants, by transformers' name: keys and values
    supports_context_parallel = False
    context: "ContextParallel | None" = None  # the processes that share every sequence, where they are split

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        qk_norm: bool = False,
        bias: bool = False,
        output_bias: bool = False,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_integer("hidden_size", hidden_size, 1)
        check_integer("num_heads", num_heads, 1)
        divisor = f"a divisor of num_heads, {num_heads}"
        check_integer("num_kv_heads", num_kv_heads, 1, divisor)
        if num_heads % num_kv_heads:
            raise bad("num_kv_heads", num_kv_heads, divisor)
        for name, flag in (("qk_norm", qk_norm), ("bias", bias), ("output_bias", output_bias)):
            check_flag(name, flag)
        check_number("norm_eps", norm_eps, zero=True)
        if head_dim is None:
            if hidden_size % num_heads:
                raise ValueError(
                    f"head_dim: got None; wanted a number, because hidden_size {hidden_size} is no multiple of "
                    f"num_heads {num_heads}"
                )
            head_dim = hidden_size // num_heads
        check_integer("head_dim", head_dim, 1)
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=output_bias)
        self.q_norm = HeadRMSNorm(head_dim, eps=norm_eps) if qk_norm else None
        self.k_norm = HeadRMSNorm(head_dim, eps=norm_eps) if qk_norm else None

    def set_context_parallel(self, group: Any, layout: "Layout | None" = None) -> None:
        """From now on sequences are split over the processes of ``group``; None: no longer.

        ``hidden_states`` is then the process's shard of the length, as :meth:`ContextParallel.shard` cuts it, and
        cu_seqlens has the boundaries in the whole row.

        Args:
            group: a process group, a DeviceMesh of one dimension, a :class:`ContextParallel`, or None.
            layout: which pieces a process holds, see :class:`ContextParallel`; None means "zigzag".

        Raises:
            ValueError: this attention needs whole sequences, or what :class:`ContextParallel` raises.
        """
        if group is None:
            self.context = None
            return
        if not self.supports_context_parallel:
            raise ValueError(
                f"group: got one for {type(self).__name__}, which needs whole sequences on every process; wanted None, "
                "or attention by the PaTH operator (the mixers path, path_fox, fox and alibi)"
            )
        from path_attention.distributed.context import ContextParallel

        self.context = ContextParallel.of(group, layout)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        """Mix tokens causally.

        Args:
            hidden_states: (B, L, C).
            attention_mask: (B, L), 1 or True for real tokens and 0 or False for padding, which is as if absent: it
                changes no real token's output and its own output is 0.
            cu_seqlens: (N + 1,) boundaries of N sequences packed into one row (B = 1), first 0, last L. On the host it
                spares a wait for the device.
            cache: what these tokens come after, and are added to: a :class:`path_attention.models.LayerCache`. The mask
                is then of all tokens, (B, L + those before); with cu_seqlens, packed sequence n goes on with sequence n
                of the cache.

        Returns:
            (B, L, C).

        Raises:
            ValueError: types, shapes, values of the mask or boundaries that do not fit, or both a mask and cu_seqlens.
        """
        if cache is not None:
            if self.context is not None:
                raise bad("cache", "one under context parallelism", "None, or whole sequences")
            return self.o_proj(self.attend_cached(hidden_states, attention_mask, cu_seqlens, cache).flatten(2))
        padding = self._padding(hidden_states, attention_mask, cu_seqlens)
        if padding is not None:
            return padding.pad(self.forward(padding.unpad(hidden_states), cu_seqlens=padding.cu_seqlens))
        cu_seqlens = sequence_boundaries(cu_seqlens, hidden_states, self.num_processes)
        return self.o_proj(self.attend(hidden_states, cu_seqlens).flatten(2))

    def attention_weights(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """The attention matrix (B, HQ, L, L) of the same call, for looking at: time and memory are quadratic in L.

        Of whole sequences only: raises ValueError under context parallelism.
        """
        if self.context is not None:
            raise ValueError("attention_weights: got a sequence split over processes; wanted whole sequences")
        padding = self._padding(hidden_states, attention_mask, cu_seqlens)
        if padding is not None:
            return padding.pad_weights(self.weigh(padding.unpad(hidden_states), padding.cu_seqlens))
        return self.weigh(hidden_states, sequence_boundaries(cu_seqlens, hidden_states))

    @property
    def num_processes(self) -> int:
        """Those that share every sequence."""
        return 1 if self.context is None else self.context.size

    def attend(self, hidden_states: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """(B, L, C) -> (B, L, HQ, D)."""
        raise NotImplementedError

    def attend_cached(
        self, hidden_states: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None, cache: Any
    ) -> Tensor:
        """(B, L, C) -> (B, L, HQ, D), after the tokens of the cache and into it; mask (B, L + those before)."""
        raise NotImplementedError

    def weigh(self, hidden_states: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """(B, L, C) -> (B, HQ, L, L)."""
        raise NotImplementedError

    def _padding(
        self, hidden_states: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> Padding | None:
        check_tensor("hidden_states", hidden_states)
        if not hidden_states.is_floating_point():
            raise bad("hidden_states", f"dtype {hidden_states.dtype}", "a floating dtype")
        if hidden_states.dim() != 3 or hidden_states.shape[2] != self.hidden_size:
            wanted = f"(batch, length, {self.hidden_size})"
            raise bad("hidden_states", f"shape {tuple(hidden_states.shape)}", wanted)
        if attention_mask is None:
            return None
        if self.context is not None:
            raise ValueError("attention_mask: got one for a sequence split over processes; wanted None, or cu_seqlens")
        if cu_seqlens is not None:
            raise ValueError("attention_mask: got one beside cu_seqlens; wanted at most one of the two")
        return Padding.from_mask(attention_mask, hidden_states)

    def _project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, L, HQ, D), k (B, L, H, D), v (B, L, H, D), of one dtype."""
        q = self.q_proj(hidden_states).unflatten(2, (self.num_heads, self.head_dim))
        k = self.k_proj(hidden_states).unflatten(2, (self.num_kv_heads, self.head_dim))
        v = self.v_proj(hidden_states).unflatten(2, (self.num_kv_heads, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v
