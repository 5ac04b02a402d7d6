"""PaTH's cache as transformers knows caches: layers that ``DynamicCache(config=...)``, ``StaticCache(...)`` and so
``generate()`` pick by the configuration's ``layer_types``.

Layers of the other mixers are transformers' own, of plain keys and values.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, StaticLayer

from path_attention.cache import CacheError, PathCache
from path_attention.layers.padding import Padding
from path_attention.layers.path import PaTHInputs
from path_attention.layers.short_convolution import ConvolutionState, ShortConvolution
from path_attention.ops.history.state import open_room


class _PathLayer(CacheLayerMixin):
    """What the growing and the fixed layer share. ``keys`` and ``values`` are the blocks of the PathCache."""

    path: PathCache
    supports_early_init = False  # shapes of w, beta and g are known from the first tokens only

    def __init__(self, path: PathCache) -> None:
        self.path = path
        self.seen = 0  # tokens with padding; the static layer counts in a tensor
        self.real: Tensor | None = None  # (B, seen), where there was padding
        self.convolution_state: ConvolutionState | None = None
        self.record_past = False

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        return not self.path.is_empty

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        return None if self.path.is_empty else self.path.state.keys

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        return None if self.path.is_empty else self.path.state.values

    @property
    def batch_size(self) -> int:
        if self.path.is_empty:
            raise AttributeError("batch_size")  # transformers asks with hasattr
        return self.path.batch_size

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the first tokens bring everything."""

    def update(  # type: ignore[override]
        self,
        key_states: Tensor,
        value_states: Tensor,
        inputs: PaTHInputs | None = None,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        length: int = 0,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Add tokens and attend: the attention's output instead of keys, which only PathCache can read.

        Raises:
            CacheError: called by another model than PaTH's, or with what does not go with the cache.
        """
        if inputs is None:
            raise CacheError("past_key_values: got a PaTH cache; wanted one of keys and values for this model")
        if attention_mask is not None and not torch.compiler.is_compiling():
            wanted = (inputs.q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1, self.seen + length)
            # Beside layers of keys and values, a step with a fixed capacity comes with a mask of that length.
            if tuple(attention_mask.shape) not in (wanted, (wanted[0], self.get_max_length())):
                shape = tuple(attention_mask.shape)
                raise CacheError(
                    f"attention_mask: got shape {shape}; wanted {wanted}: tokens of the cache and new ones"
                )
        first = self.path.is_empty
        out = self.path.attend(*inputs, cu_seqlens=cu_seqlens)
        self._take_in()
        self._count(length)
        self._note_padding(cu_seqlens is not None, attention_mask, length)
        if first:
            self._allocated()
        return out, None

    def _count(self, length: int) -> None:
        self.seen += length

    def _note_padding(self, padded: bool, attention_mask: Tensor | None, length: int) -> None:
        """Remember which tokens are real, once some are not: a crop counts both kinds."""
        if padded and attention_mask is not None:
            self.real = attention_mask != 0
        elif self.real is not None:
            self.real = torch.cat([self.real, self.real.new_ones(len(self.real), length)], 1)

    def _allocated(self) -> None:
        """After the first tokens."""

    def convolution(self, batch: int, module: ShortConvolution, like: Tensor) -> ConvolutionState:
        """The state of the layer's convolution over w, made at the first call. It can go back as far as the cache."""
        window = module.width - 1 + open_room(self.path.keep)
        state = self.convolution_state
        if state is None:
            state = self.convolution_state = ConvolutionState(batch, module.weight.shape[0], window, like)
        elif batch != len(state.rows):
            raise CacheError(f"hidden_states: got a batch of {batch}; wanted {len(state.rows)}, that of the cache")
        if not self.path.is_empty:
            state.length = self.path.device_lengths
        if self.record_past:
            state.widen(window + like.shape[1])
        return state

    def _take_in(self) -> None:
        """Let the convolution hold its new rows: only now, for the cache may have refused the tokens."""
        if self.convolution_state is not None:
            self.convolution_state.length = self.path.device_lengths
            self.convolution_state.take_in()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return int(self.get_seq_length()) + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def activate_past_recording(self) -> None:
        """Any number of tokens from here on can be taken back by the next crop."""
        self.record_past = True
        self.path.record()

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last ``-tokens_to_remove`` tokens back: see :meth:`PathCache.crop` for how many that may be.

        Raises:
            CacheError: a positive number, or more than can be taken back; nothing is removed then.
        """
        if tokens_to_remove > 0:
            raise CacheError(f"tokens_to_remove: got {tokens_to_remove}; wanted a negative number of tokens, or 0")
        count = -tokens_to_remove
        if count > self.seen:
            raise CacheError(f"tokens_to_remove: got {-count}; wanted at most the {self.seen} tokens there are")
        counts = [count] * self.path.batch_size
        if self.real is not None and count:
            counts = self.real[:, self.seen - count :].sum(1).tolist()
        state = self.convolution_state
        if state is not None and count != self.seen:
            for removed, kept in zip(counts, self.path.open_lengths, strict=True):
                if removed > kept:
                    wanted = f"at most {kept}, or all: the convolution of w looks no further back"
                    raise CacheError(f"tokens_to_remove: got {-count}; wanted {wanted}")
        self.path.crop(counts)
        if state is not None and count == self.seen:
            state.rows.zero_()
        self.seen -= count
        if self.real is not None:
            self.real = self.real[:, : self.seen]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.path.is_empty:
            return
        chosen = torch.arange(self.path.batch_size)[indices.cpu()]  # a mask, numbers from the end: as tensors have it
        self.path.select(chosen)
        if self.convolution_state is not None:
            self._choose_rows(self.convolution_state, chosen)
        if self.real is not None:
            self.real = self.real[chosen.to(self.real.device)]

    @staticmethod
    def _choose_rows(state: ConvolutionState, chosen: Tensor) -> None:
        state.rows = state.rows[chosen.to(state.rows.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(self.path.batch_size).repeat_interleave(repeats))

    def clear(self, sequence: int) -> None:
        """Forget one sequence of a packed cache."""
        self.path.clear(sequence)
        if self.convolution_state is not None:
            self.convolution_state.forget(sequence)

    def reset(self) -> None:
        self.path.reset()
        self.seen, self.real = 0, None
        if self.convolution_state is not None:
            self.convolution_state.rows.zero_()

    def offload(self) -> None:
        if not self.path.is_empty:
            self._device = self.path.state.k.device
            self.path.to("cpu")

    def prefetch(self) -> None:
        if not self.path.is_empty and hasattr(self, "_device"):
            self.path.to(self._device)

    def state_dict(self) -> dict[str, Tensor]:
        """All there is as plain tensors."""
        saved = {f"path.{name}": x for name, x in self.path.state_dict().items()} | {"seen": torch.tensor(self.seen)}
        if self.real is not None:
            saved["real"] = self.real
        if self.convolution_state is not None:
            saved["convolution"] = self.convolution_state.rows
        return saved

    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        """The inverse of :meth:`state_dict`."""
        path = {name.removeprefix("path."): x for name, x in saved.items() if name.startswith("path.")}
        self.path = PathCache.from_state_dict(path)
        self.seen, self.real = int(saved["seen"]), saved.get("real")
        if "convolution" in saved:
            rows = saved["convolution"]
            self.convolution_state = ConvolutionState(len(rows), rows.shape[2], rows.shape[1], rows)
            self.convolution_state.rows = rows.clone()


class PathCacheLayer(_PathLayer, DynamicLayer):  # type: ignore[misc] # update returns the output
    """A PathCache that grows."""

    _layer_type = "path_attention"
    is_croppable = True

    def __init__(self, **_: Any) -> None:
        super().__init__(PathCache())

    def reset(self) -> None:
        super().reset()
        self.convolution_state = None

    def get_max_length(self) -> int:
        return -1


class StaticPathCacheLayer(_PathLayer, StaticLayer):  # type: ignore[misc, override] # as above
    """A PathCache of fixed capacity: memory never moves, lengths are on the device, one compiled step serves all."""

    _layer_type = "path_attention"

    def __init__(self, max_cache_len: int, **_: Any) -> None:
        super().__init__(PathCache(capacity=max_cache_len))
        self.max_cache_len = max_cache_len
        self.cumulative_length = torch.tensor(0)

    def _count(self, length: int) -> None:
        self.cumulative_length.add_(length)

    def _note_padding(self, padded: bool, attention_mask: Tensor | None, length: int) -> None:
        """Nothing to remember: transformers does not crop static caches."""

    @property
    def seen(self) -> int:
        return int(self.cumulative_length)

    @seen.setter
    def seen(self, count: int) -> None:
        if hasattr(self, "cumulative_length"):
            self.cumulative_length.fill_(count)

    def _allocated(self) -> None:
        self.cumulative_length = self.cumulative_length.to(self.path.state.k.device)
        tensors = [*self.path.state.tensors().values(), self.cumulative_length]
        if self.convolution_state is not None:
            tensors.append(self.convolution_state.rows)
        for x in tensors:
            torch._dynamo.mark_static_address(x)  # CUDA graphs may then write to them

    @staticmethod
    def _choose_rows(state: ConvolutionState, chosen: Tensor) -> None:
        state.rows.copy_(state.rows[chosen.to(state.rows.device)])

    def get_seq_length(self) -> int:
        return self.cumulative_length  # type: ignore[return-value] # a tensor, as transformers' static layer has it

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len, 0

    def get_max_length(self) -> int:
        return self.max_cache_len


class LayerCache:
    """One layer of a transformers cache, as a token mixer uses it.

    Args:
        cache: of all layers.
        index: the layer.
        shared: what all layers of one call find out once.
    """

    def __init__(self, cache: Cache, index: int, shared: dict[str, Any]) -> None:
        self.cache, self.index, self.shared = cache, index, shared

    def padding(self, attention_mask: Tensor | None, hidden_states: Tensor) -> Padding | None:
        """Where the real ones of the new tokens are, None where all are; mask (B, those before + L)."""
        length = hidden_states.shape[1]
        # Whoever compiles a step gives every sequence a token: looking at the mask would make the host wait.
        if attention_mask is None or (length == 1 and torch.compiler.is_compiling()):
            return None
        if "padding" not in self.shared:
            new = attention_mask[:, attention_mask.shape[1] - length :]
            self.shared["padding"] = Padding.from_mask(new, hidden_states)
        return self.shared["padding"]

    @property
    def length(self) -> Any:
        """Tokens before the new ones, padding included: a number, or a tensor on the device."""
        return self.cache.get_seq_length(self.index)

    def convolution(self, batch: int, module: ShortConvolution, like: Tensor) -> ConvolutionState:
        layer = self.cache.layers[self.index]
        assert isinstance(layer, _PathLayer)
        return layer.convolution(batch, module, like)

    def attend(
        self, inputs: PaTHInputs, cu_seqlens: Tensor | None, attention_mask: Tensor | None, length: int
    ) -> Tensor:
        """Of PaTH: see :meth:`PathCacheLayer.update`."""
        options = {"cu_seqlens": cu_seqlens, "attention_mask": attention_mask, "length": length}
        out, _ = self.cache.update(inputs.k, inputs.v, self.index, inputs=inputs, **options)
        return out

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Of keys and values: add (B, H, T, D), return all."""
        return self.cache.update(k, v, self.index)


def check_cache(cache: Any, types: list[str], batch: int) -> None:
    """Raise unless ``cache`` is one for layers of these types and for this batch.

    Raises:
        CacheError: naming what was given and what is wanted; nothing is changed.
    """
    wanted = "DynamicCache(config=model.config) or StaticCache(config=model.config, ...)"
    if not isinstance(cache, Cache):
        raise CacheError(f"past_key_values: got {type(cache).__name__}; wanted {wanted}")
    layers = cache.layers
    if "path_attention" in types:
        if len(layers) != len(types):
            raise CacheError(f"past_key_values: got {len(layers)} layers; wanted {len(types)}: {wanted}")
        for layer, kind in zip(layers, types, strict=True):
            if (kind == "path_attention") != isinstance(layer, _PathLayer):
                raise CacheError(f"past_key_values: got layers of {type(layer).__name__} for {kind}; wanted {wanted}")
    for layer in layers:
        if isinstance(layer, _PathLayer) and not layer.path.is_empty and layer.path.batch_size != batch:
            held = layer.path.batch_size
            raise CacheError(f"past_key_values: got a cache of {held} sequences; wanted {batch}, the batch of the call")


def save_cache(cache: Cache, file: str | Path) -> None:
    """Write a cache of growing layers to a safetensors file, to go on with later.

    Raises:
        CacheError: a layer that cannot be saved.
    """
    tensors: dict[str, Tensor] = {}
    for n, layer in enumerate(cache.layers):
        if isinstance(layer, _PathLayer):
            saved = layer.state_dict()
        elif type(layer) is DynamicLayer:
            held = {"keys": layer.keys, "values": layer.values}
            saved = {name: x for name, x in held.items() if x is not None}
        else:
            raise CacheError(f"cache: got a layer {type(layer).__name__}; wanted layers of DynamicCache")
        tensors |= {f"layers.{n}.{name}": x.contiguous() for name, x in saved.items()}
    save_file(tensors, str(file), metadata={"format": "path_attention.cache", "layers": str(len(cache.layers))})


def load_cache(config: PreTrainedConfig, file: str | Path, device: torch.device | str = "cpu") -> DynamicCache:
    """The cache that :func:`save_cache` wrote, for a model of this configuration.

    Raises:
        CacheError: the file is of another kind, or of a model with other layers.
    """
    cache = DynamicCache(config=config)
    with safe_open(str(file), "pt", device=str(device)) as opened:
        metadata = opened.metadata() or {}
        if metadata.get("format") != "path_attention.cache" or int(metadata["layers"]) != len(cache.layers):
            raise CacheError(
                f"file: got {metadata}; wanted a cache of {len(cache.layers)} layers that save_cache wrote"
            )
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it has no iteration)
    for n, layer in enumerate(cache.layers):
        prefix = f"layers.{n}."
        saved = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
        if isinstance(layer, _PathLayer) != ("seen" in saved) and saved:
            raise CacheError(f"file: got {sorted(saved)} in layer {n}; wanted a layer of {type(layer).__name__}")
        if isinstance(layer, _PathLayer):
            layer.load_state_dict(saved)
        elif saved:
            assert isinstance(layer, DynamicLayer)
            layer.update(saved["keys"], saved["values"])
    return cache
