"""The PaTH language model: pre-norm decoder, RMSNorm, SwiGLU, and whichever token mixer the configuration names.

Modules are named as Llama's, so that a Llama checkpoint of the same shape loads into a ``rope`` model, and into any
other but for what that mixer adds.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from path_attention.checks import bad, check_flag
from path_attention.layers.attention import Attention
from path_attention.layers.mixers import build_mixer
from path_attention.layers.operator import OperatorAttention
from path_attention.layers.padding import Padding, sequence_boundaries
from path_attention.layers.short_convolution import ShortConvolution
from path_attention.models.cache_path import LayerCache, check_cache
from path_attention.models.configuration_path import PaTHConfig
from path_attention.ops.arguments import check_tensor

if TYPE_CHECKING:
    from path_attention.distributed.context import ContextParallel, Layout


class PaTHMLP(nn.Module):
    """SwiGLU: W_down (SiLU(W_gate x) * W_up x)."""

    def __init__(self, config: PaTHConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class PaTHDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: PaTHConfig, mixer: str) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = build_mixer(config, mixer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = PaTHMLP(config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        normed = self.input_layernorm(hidden_states)
        hidden_states = hidden_states + self.self_attn(normed, attention_mask, cu_seqlens=cu_seqlens, cache=cache)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class PaTHPreTrainedModel(PreTrainedModel):
    config: PaTHConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PaTHDecoderLayer"]  # noqa: RUF012 (transformers reads plain class attributes)
    # No attention of transformers or of a serving engine can stand in for ours: it knows nothing of w and beta.
    _supports_sdpa = False
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = False

    # The ContextParallel that shares every sequence, where they are split: Any, for transformers evaluates annotations.
    context: Any = None

    def set_context_parallel(self, group: Any, layout: "Layout | None" = None) -> None:
        """From now on every sequence is split over the processes of ``group``; None: no longer.

        Each process then passes its shard of input_ids and labels, as :meth:`ContextParallel.shard` cuts them, and gets
        the logits of its shard and the loss of whole sequences. Boundaries in cu_seqlens are those of the whole row.

        Args:
            group: a process group, a DeviceMesh of one dimension such as mesh["context"], a :class:`ContextParallel`,
                or None.
            layout: which pieces a process holds, see :class:`ContextParallel`; None means "zigzag".

        Raises:
            ValueError: a mixer that needs whole sequences, or what :class:`ContextParallel` raises.
        """
        mixers = [module for module in self.modules() if isinstance(module, Attention)]
        # Those that cannot refuse, before any other has been set.
        for mixer in sorted(mixers, key=lambda mixer: mixer.supports_context_parallel):
            mixer.set_context_parallel(group, layout)
        for module in self.modules():
            if isinstance(module, PaTHPreTrainedModel):
                module.context = mixers[0].context

    def set_recompute(self, recompute: bool) -> None:
        """Whether attention by the PaTH operator computes again for the gradients what False keeps from the forward
        pass: see ``recompute`` of :func:`path_attention.path_attention`. True is what a new model does.

        Raises:
            ValueError: recompute is neither True nor False.
        """
        check_flag("recompute", recompute)
        for module in self.modules():
            if isinstance(module, OperatorAttention):
                module.recompute = recompute

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return False  # transformers guesses it from the source text, and serving engines trust the guess

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # linear layers and embeddings: normal(0, initializer_range), biases 0; norms 1
        if isinstance(module, ShortConvolution):
            init.uniform_(module.weight, -module.bound, module.bound)


class PaTHModel(PaTHPreTrainedModel):
    """The decoder without its head.

    A padded batch is packed into one row of its real tokens at the start and padded again at the end, so that padding
    costs nothing and changes nothing.
    """

    def __init__(self, config: PaTHConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(PaTHDecoderLayer(config, mixer) for mixer in config.mixers)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the decoder.

        Args:
            input_ids: (B, L), or inputs_embeds (B, L, C) instead.
            attention_mask: (B, L), 1 for real tokens, 0 for padding; with a cache (B, L + tokens in it).
            position_ids: counted anew here, but for one thing: without mask or boundaries, each 0 in a single row
                starts a packed sequence, as transformers' padding-free collators mean it.
            past_key_values: the tokens before these, which these are added to: DynamicCache(config=model.config), or a
                StaticCache.
            use_cache: make such a cache where none is given. Asked for only: a pass of training or scoring has no use
                for one.
            cu_seqlens: (N + 1,) boundaries of N sequences packed into one row (B = 1). With a cache of PaTH, sequence n
                goes on with sequence n of the cache; some may be empty.
            cu_seq_lens_q: the same, by the name that transformers' padding-free collators use.
            output_hidden_states: return the input of every layer and the output of the last.
            output_attentions: return every layer's attention matrix: quadratic in L, for looking at.

        Raises:
            ValueError: arguments that do not go together.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids: got both or neither of input_ids and inputs_embeds; wanted exactly one")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if self.context is not None:
            self._check_split(attention_mask, position_ids, output_attentions)
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if cu_seq_lens_q is not None:
            if cu_seqlens is not None:
                raise bad("cu_seq_lens_q", "one beside cu_seqlens", "at most one of the two")
            cu_seqlens = cu_seq_lens_q
        if position_ids is not None:
            _check_positions(position_ids, x)
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None:
            if output_attentions:
                raise bad("output_attentions", "True beside a cache", "False, or use_cache=False")
            if self.context is not None:
                raise bad("past_key_values", "a cache under context parallelism", "None, or whole sequences")
            cu_seqlens = sequence_boundaries(cu_seqlens, x)
            return self._continue(x, attention_mask, cu_seqlens, past_key_values, bool(output_hidden_states))
        if cu_seqlens is None and attention_mask is None and position_ids is not None and len(x) == 1 and not x.is_meta:
            cu_seqlens = _restarts(position_ids)
        cu_seqlens = sequence_boundaries(cu_seqlens, x, 1 if self.context is None else self.context.size)
        padding = None if attention_mask is None else Padding.from_mask(attention_mask, x)
        if padding is not None:
            if cu_seqlens is not None:
                raise ValueError("attention_mask: got padding beside cu_seqlens; wanted at most one of the two")
            x, cu_seqlens = padding.unpad(x), padding.cu_seqlens

        states: list[Tensor] = [x]
        weights: list[Tensor] = []
        for layer in self._decoder_layers():
            if output_attentions:
                weights.append(layer.self_attn.attention_weights(layer.input_layernorm(x), cu_seqlens=cu_seqlens))
            x = layer(x, cu_seqlens=cu_seqlens)
            if output_hidden_states:
                states.append(x)
        x = states[-1] = self.norm(x)
        if padding is not None:
            states = [padding.pad(state) for state in states]
            weights = [padding.pad_weights(weight) for weight in weights]
        return BaseModelOutputWithPast(
            last_hidden_state=states[-1],
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=tuple(weights) if output_attentions else None,
        )

    def _decoder_layers(self) -> list[PaTHDecoderLayer]:
        return cast("list[PaTHDecoderLayer]", self.layers)

    def _continue(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        cache: Cache,
        output_hidden_states: bool,
    ) -> BaseModelOutputWithPast:
        """The tokens x (B, L, C) after those of the cache, and into it."""
        sequences = len(x) if cu_seqlens is None else len(cu_seqlens) - 1
        types = [layer.self_attn.cache_type for layer in self._decoder_layers()]
        check_cache(cache, types, sequences)
        if cu_seqlens is not None and "full_attention" in types:
            raise bad("cu_seqlens", "boundaries beside a cache", "None: keys and values have a row each")
        if attention_mask is not None and cu_seqlens is not None:
            raise ValueError("attention_mask: got one beside cu_seqlens; wanted at most one of the two")
        if attention_mask is not None and (attention_mask.dim() != 2 or len(attention_mask) != len(x)):
            shape = tuple(attention_mask.shape)
            raise ValueError(
                f"attention_mask: got shape {shape}; wanted ({len(x)}, tokens of the cache and the new ones)"
            )
        states = [x]
        shared: dict[str, Any] = {}
        for index, layer in enumerate(self._decoder_layers()):
            x = layer(x, attention_mask, cu_seqlens, LayerCache(cache, index, shared))
            states.append(x)
        x = states[-1] = self.norm(x)
        hidden_states = tuple(states) if output_hidden_states else None
        return BaseModelOutputWithPast(last_hidden_state=x, past_key_values=cache, hidden_states=hidden_states)

    @staticmethod
    def _check_split(
        attention_mask: Tensor | None, position_ids: Tensor | None, output_attentions: bool | None
    ) -> None:
        """What cannot be had of sequences that are split over processes."""
        if attention_mask is not None and not bool((attention_mask != 0).all()):
            raise ValueError(
                "attention_mask: got padding beside context parallelism; wanted none: pad at the end, which changes "
                "nothing before it, with labels of -100"
            )
        if position_ids is not None:
            raise ValueError("position_ids: got some beside context parallelism; wanted None, or cu_seqlens")
        if output_attentions:
            raise ValueError("output_attentions: got True beside context parallelism; wanted whole sequences")


# (hidden states (B, L, C), the head, labels or None) -> a loss.
Objective = Callable[[Tensor, nn.Linear, Tensor | None], Tensor]


class PaTHForCausalLM(PaTHPreTrainedModel, GenerationMixin):
    """The decoder with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: PaTHConfig) -> None:
        super().__init__(config)
        self.model = PaTHModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        objective: "Objective | None" = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run the model; see :class:`PaTHModel` for the arguments that are not here.

        Args:
            labels: (B, L) token ids, -100 where none counts, as at the first token of a packed sequence; shifted here:
                position t is scored on the label of t + 1.
            logits_to_keep: compute the logits of the last so many positions only (0: all), or of these positions.
            objective: the loss in place of cross entropy on labels, made of the last hidden states and the head, so
                that the logits of all tokens need not be there at once: they are None then.

        Under context parallelism the loss, the mean over all labels of the whole sequences, is the same on every
        process of the group; averaging gradients over processes, as FSDP and DDP do, then gives its gradient.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            cu_seqlens=cu_seqlens,
            cu_seq_lens_q=cu_seq_lens_q,
            **kwargs,
        )
        if objective is not None:
            made = objective(outputs.last_hidden_state, self.lm_head, labels)
            return CausalLMOutputWithPast(loss=made, hidden_states=outputs.hidden_states)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            if self.context is None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            else:
                loss = self._shared_loss(self.context, logits, labels, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @staticmethod
    def create_masks_for_generate(
        config: PaTHConfig, inputs_embeds: Tensor, attention_mask: Tensor | None, past_key_values: Cache, **_: Any
    ) -> Tensor | None:
        """The mask of a static cache as it came, not one of queries and keys: (B, tokens so far), or (B, capacity).

        A step of one token has a mask of one shape, whichever step it is, so that it is compiled once: none where all
        layers are PaTH's, whose cache holds real tokens only, and the padding of the prompt for keys and values.
        """
        if attention_mask is None or inputs_embeds.shape[1] > 1:
            return attention_mask
        if set(config.layer_types) == {"path_attention"}:
            return None
        missing = past_key_values.get_max_length() - attention_mask.shape[1]
        return nn.functional.pad(attention_mask, (0, missing), value=1)

    def _shared_loss(
        self,
        context: "ContextParallel",
        logits: Tensor,
        labels: Tensor,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        **kwargs: Any,
    ) -> Tensor:
        """The loss of sequences whose shards these are: the label after a piece's last token is on another process."""
        if shift_labels is None:
            shift_labels = context.next_tokens(labels, ignore_index)
        if num_items_in_batch is None:
            num_items_in_batch = context.sum((shift_labels != ignore_index).sum())
        total = self.loss_function(
            logits=logits,
            labels=labels,
            vocab_size=self.config.vocab_size,
            shift_labels=shift_labels,
            num_items_in_batch=1,  # the sum
            ignore_index=ignore_index,
            **kwargs,
        )
        return context.sum(total) / num_items_in_batch

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        *,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The new tokens with a cache; the whole sequence at every step without one."""
        if self.context is not None:
            raise bad("generate", "a model under context parallelism", "set_context_parallel(None) first")
        if past_key_values is not None:
            kwargs |= {"past_key_values": past_key_values, "attention_mask": attention_mask}
            parent: Any = super()
            return parent.prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        passed_on = ("output_attentions", "output_hidden_states")
        inputs = {name: kwargs[name] for name in passed_on if name in kwargs}
        inputs |= {"attention_mask": attention_mask, "logits_to_keep": 1}
        if inputs_embeds is None:
            return inputs | {"input_ids": input_ids}
        # generate() hands over the prompt's embeddings every time, and the tokens it has added since, perhaps after the
        # prompt's tokens. The mask, or without one the positions, cover the prompt and the added tokens.
        covered = kwargs["position_ids"] if attention_mask is None else attention_mask
        added = covered.shape[-1] - inputs_embeds.shape[1]
        new = self.model.embed_tokens(input_ids[:, input_ids.shape[1] - added :])
        return inputs | {"inputs_embeds": torch.cat([inputs_embeds, new], dim=1)}


def _check_positions(position_ids: Tensor, x: Tensor) -> None:
    check_tensor("position_ids", position_ids)
    batch, length = x.shape[:2]
    if tuple(position_ids.shape) not in ((length,), (1, length), (batch, length)):
        raise bad("position_ids", f"shape {tuple(position_ids.shape)}", f"({batch}, {length}), one for each token")


def _restarts(position_ids: Tensor) -> Tensor | None:
    """(L,) or (1, L) positions -> the boundaries of the sequences packed there, None if it is one."""
    restarts = (position_ids.flatten().cpu() == 0)[1:].nonzero().squeeze(1) + 1
    if not len(restarts):
        return None
    return torch.cat([torch.tensor([0]), restarts, torch.tensor([position_ids.numel()])])
