"""The append-only cache of PaTH attention: state with verbs, for generation.

What it holds and how it is read is :mod:`path_attention.ops.history`; docs/generation.md has memory and costs. A
finished chunk never changes, so sequences share chunks: a fork or a beam copies its table and its open tokens, and
nothing else.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from path_attention.ops import history
from path_attention.ops.arguments import validate_arguments
from path_attention.ops.dyadic import LEAF
from path_attention.ops.history import State, Tokens
from path_attention.ops.path_attention import path_attention

# Tokens that can be taken back at any time. Drafts of speculative decoding are 5 to 20 tokens long; every token more is
# kept as an open row, which costs 4 times the memory of a cached one.
REWIND = 32
# A finished chunk keeps a (D x D) matrix in float32, which weighs as much as the bfloat16 keys and values of D tokens:
# at 16 D tokens a chunk that is 1/16 of the cache, and a query's D^2 multiply-adds a chunk are 1/32 of attending to it.
CHUNK_PER_DIM = 16


def default_chunk(head_dim: int) -> int:
    """Tokens a chunk: CHUNK_PER_DIM * head_dim, as a power of two, at least one leaf."""
    return max(LEAF, 1 << (CHUNK_PER_DIM * head_dim - 1).bit_length())


class CacheError(ValueError):
    """What was asked of a cache does not go with it; the cache is as it was."""


def _bad(name: str, got: object, wanted: str) -> CacheError:
    return CacheError(f"{name}: got {got}; wanted {wanted}")


class Blocks:
    """Memory of the folded tokens, one chunk a block, shared by all forks of a cache; counts who uses each block."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors  # the fields history.BLOCK_FIELDS
        self.uses = [0] * len(tensors["keys"])

    def take(self, count: int) -> list[int]:
        """The numbers of ``count`` free blocks, now used once; more memory is made if there are too few.

        Exactly as many as are missing: a block is needed every C tokens, so the copy that growing takes is C times
        rarer than a step, each of which reads all that is copied.
        """
        free = [n for n, uses in enumerate(self.uses) if not uses]
        if len(free) < count:
            more = count - len(free)
            for name, x in self.tensors.items():
                self.tensors[name] = torch.cat([x, x.new_zeros(more, *x.shape[1:])])
            free += range(len(self.uses), len(self.uses) + more)
            self.uses += [0] * more
        taken = free[:count]
        self.share(taken)
        return taken

    def share(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self.uses[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self.uses[block] -= 1

    def copy(self, source: int) -> int:
        """A new block with the contents of ``source``."""
        (target,) = self.take(1)
        for x in self.tensors.values():
            if x.numel():
                x[target] = x[source]
        return target


class PathCache:
    """Keys, values and transitions of a batch of sequences, to which tokens are added at the end.

    For any split of a sequence into calls of :meth:`attend`, the outputs are those of one call of
    :func:`path_attention.path_attention` on all of it, up to the rounding of softmax attention. Sequences may differ in
    length. The first call fixes shapes, dtypes and the device.

    Args:
        chunk: C, tokens that share a right edge; a power of two, at least 64. None means 16 * head_dim, made a power of
            two.
        rewind: tokens that :meth:`crop` can take back at any time, at least 0.
        capacity: tokens a sequence at most. All memory is then allocated at the first call and none is ever moved, as
            torch.compile and CUDA graphs want it; None for memory that grows.

    Raises:
        CacheError: a ValueError that names the argument, what was given and what is wanted.
    """

    def __init__(self, *, chunk: int | None = None, rewind: int = REWIND, capacity: int | None = None) -> None:
        if chunk is not None and (chunk < LEAF or chunk & (chunk - 1)):
            raise _bad("chunk", chunk, f"a power of two of at least {LEAF}")
        if rewind < 0:
            raise _bad("rewind", rewind, "at least 0")
        if capacity is not None and capacity < 1:
            raise _bad("capacity", capacity, "at least 1, or None")
        self.chunk = chunk
        self.rewind = rewind
        self.capacity = capacity
        self.recorded: int | None = None  # tokens since record() or the last crop, all of which may be taken back
        self._state: State | None = None
        self._blocks: Blocks | None = None

    # --- what there is ---

    @property
    def state(self) -> State:
        """The tensors, for kernels and for looking at."""
        if self._state is None or self._blocks is None:
            raise _bad("cache", "one without tokens", "one that attend() was called on")
        for name, x in self._blocks.tensors.items():  # a fork may have made more memory
            setattr(self._state, name, x)
        return self._state

    @property
    def is_empty(self) -> bool:
        return self._state is None

    @property
    def batch_size(self) -> int:
        return 0 if self._state is None else len(self._state.length)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [] if self._state is None else self._state.length.tolist()

    @property
    def keep(self) -> int:
        """Tokens that may be taken back and so are not folded."""
        return max(self.rewind, self.recorded or 0)

    def nbytes(self) -> int:
        """Bytes of all tensors; blocks shared by forks are in the number of each of them."""
        return 0 if self._state is None else sum(x.numel() * x.element_size() for x in self.state.tensors().values())

    # --- adding tokens ---

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        w: Tensor,
        beta: Tensor,
        g: Tensor | None = None,
        *,
        scale: float | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Add tokens at the end of every sequence and attend: (B, T, HQ, DV) in the dtype of q.

        Arguments are those of :func:`path_attention.path_attention`, of the T new tokens of each of the B sequences; or
        with ``cu_seqlens`` (B + 1,) packed into one row, for sequences that get different numbers of tokens, perhaps
        none. The first call (prefill) is differentiable; the cache itself passes no gradients on.

        Raises:
            CacheError: tokens that do not go with the cache: another batch size, shape, dtype or device; too many for
                its capacity; or gradients wanted of a later call.
        """
        arguments = validate_arguments(q, k, v, w, beta, g, scale=scale, cu_seqlens=cu_seqlens)
        q, k, v, _, _, g, _ = arguments
        scale = q.shape[3] ** -0.5 if arguments.scale is None else arguments.scale
        tokens = Tokens(q, k, v, *arguments.reflections(), g, scale)
        if torch.compiler.is_compiling() and self.capacity is not None and self._state is not None:
            self._check(tokens, [1] * (q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1))
            if cu_seqlens is None:
                # Lengths are on the device and in no guard: one compiled step serves them all.
                return history.append_operator(*tokens, self.keep, *self._state.tensors().values())
        return self._attend_on_host(tokens, cu_seqlens)

    @torch.compiler.disable
    def _attend_on_host(self, tokens: Tokens, cu_seqlens: Tensor | None) -> Tensor:
        q, k, v, w, beta, g, scale = tokens
        counts = [q.shape[1]] * q.shape[0] if cu_seqlens is None else cu_seqlens.diff().tolist()
        self._check(tokens, counts)
        before = self.lengths or [0] * len(counts)
        if self.capacity is not None and max(a + b for a, b in zip(before, counts, strict=True)) > self.capacity:
            raise _bad("q", f"{max(counts)} tokens behind {max(before)}", f"{self.capacity} in all: the cache is full")
        first = not any(self.lengths)
        wants_gradients = any(x is not None and x.requires_grad for x in (q, k, v, w, beta, g))
        if not first and torch.is_grad_enabled() and wants_gradients:
            raise _bad("q", "tensors that want gradients", "torch.no_grad(): a cache passes no gradients on")
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            self._reserve(tokens, counts)
            if cu_seqlens is None and not first:
                return history.append(self.state, tokens, self.keep)
            if cu_seqlens is None:
                history.absorb(self.state, slice(None), tokens, self.keep)
            elif not first:
                return history.append_packed(self.state, tokens, counts, self.keep)
            else:
                history.absorb_packed(self.state, tokens, counts, self.keep)
        return path_attention(q, k, v, w, beta, g, scale=scale, cu_seqlens=cu_seqlens)

    def _check(self, tokens: Tokens, counts: list[int]) -> None:
        if self._state is None:
            return
        s, q, k, v = self._state, tokens.q, tokens.k, tokens.v
        if len(counts) != self.batch_size:
            raise _bad("q", f"tokens of {len(counts)} sequences", f"{self.batch_size}, the batch size of the cache")
        if q.dtype != s.k.dtype:
            raise _bad("q", f"dtype {q.dtype}", f"{s.k.dtype}, that of the cache")
        if q.device != s.k.device:
            raise _bad("q", f"device {q.device}", f"{s.k.device}, that of the cache")
        heads, dim, value_dim = s.k.shape[1], s.k.shape[3], s.v.shape[3]
        if k.shape[2:] != (heads, dim):
            raise _bad("k", f"{k.shape[2]} heads of {k.shape[3]}", f"{heads} heads of {dim}, those of the cache")
        if v.shape[3] != value_dim:
            raise _bad("v", f"value_dim {v.shape[3]}", f"{value_dim}, that of the cache")
        if tokens.w.shape[2] != s.reflections:
            raise _bad("w", f"{tokens.w.shape[2]} reflections a token", f"{s.reflections}, those of the cache")
        if (tokens.g is not None) != s.gated or (s.gated and q.shape[2] != s.g.shape[1]):
            wanted = f"gates of {s.g.shape[1]} query heads" if s.gated else "None: the cache has no gates"
            raise _bad("g", "none" if tokens.g is None else f"gates of {q.shape[2]} query heads", wanted)

    # --- memory ---

    def _reserve(self, tokens: Tokens, counts: list[int]) -> None:
        """Room for these tokens. Nothing that is there changes."""
        if self.recorded is not None:
            self.recorded += max(counts, default=0)
        if self._state is None:
            self._allocate(tokens, len(counts))
        assert self._state is not None
        assert self._blocks is not None
        state = self._state
        room = state.k.shape[2]
        if LEAF + self.keep > room:
            _grow_open_rows(state, LEAF + self.keep)
        if self.capacity is not None:
            return
        wanted = [
            -(-max(before + count - self.keep, 0) // state.chunk)
            for before, count in zip(state.length.tolist(), counts, strict=True)
        ]
        tables = self._tables()
        if all(len(table) >= blocks for table, blocks in zip(tables, wanted, strict=True)):
            return
        # The last block of each sequence behind all others: what is finished lies together, and what is open.
        for spare in (1, 0):
            for table, blocks in zip(tables, wanted, strict=True):
                if blocks - spare > len(table):
                    table += self._blocks.take(blocks - spare - len(table))
        self._set_tables(tables)

    def _allocate(self, tokens: Tokens, batch: int) -> None:
        k, v = tokens.k, tokens.v
        heads, dim, value_dim, reflections = *k.shape[2:], v.shape[3], tokens.w.shape[2]
        chunk = self.chunk or default_chunk(dim)
        per_sequence = 0 if self.capacity is None else -(-self.capacity // chunk)
        count, rows = batch * per_sequence, LEAF + self.keep
        gate_heads = 0 if tokens.g is None else tokens.q.shape[2]
        exact = torch.promote_types(k.dtype, torch.float32)

        def empty(*shape: int, dtype: torch.dtype = exact) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=k.device)

        self._blocks = Blocks(
            {
                "keys": empty(count, heads, chunk, dim, dtype=k.dtype),
                "values": empty(count, heads, chunk, value_dim, dtype=k.dtype),
                "products": empty(count, heads, dim, dim),
                "gates": empty(count, gate_heads, chunk),
                "gate_totals": empty(count, gate_heads),
            }
        )
        # Where memory is fixed, a kernel finds its way by itself; where it grows, the host has to know the lengths.
        place = k.device if self.capacity is not None else torch.device("cpu")
        table = torch.arange(count, device=place).view(batch, per_sequence)
        self._blocks.uses = [1] * count
        self._state = State(
            **self._blocks.tensors,
            table=table,
            length=torch.zeros(batch, dtype=torch.int64, device=place),
            folded=torch.zeros(batch, dtype=torch.int64, device=place),
            product=empty(batch, heads, dim, dim),
            gate_total=empty(batch, gate_heads),
            low=empty(batch, heads, chunk if k.dtype != exact else 0, dim, dtype=k.dtype),
            k=empty(batch, heads, rows, dim, dtype=k.dtype),
            v=empty(batch, heads, rows, value_dim, dtype=k.dtype),
            w=empty(batch, heads, rows * reflections, dim),
            beta=empty(batch, heads, rows * reflections),
            g=empty(batch, gate_heads, rows),
            u=empty(batch, heads, rows * reflections, dim),
            y=empty(batch, heads, rows * reflections, rows),
        )

    def _tables(self) -> list[list[int]]:
        """The blocks of every sequence; unused entries of the table are -1."""
        assert self._state is not None
        return [[block for block in row if block >= 0] for row in self._state.table.tolist()]

    def _set_tables(self, tables: list[list[int]]) -> None:
        assert self._state is not None
        width = max((len(table) for table in tables), default=0)
        rows = [table + [-1] * (width - len(table)) for table in tables]
        self._state.table = torch.tensor(rows, dtype=torch.int64).view(len(tables), width)

    # --- taking back, copying, choosing ---

    def record(self) -> None:
        """From here on keep every new token open until the next :meth:`crop`, however many they are."""
        if self.recorded is None:
            self.recorded = 0

    def crop(self, count: int | Sequence[int]) -> None:
        """Remove the last ``count`` tokens of every sequence, or so many of each.

        Possible back to where the open tokens begin: the last ``rewind`` tokens at least, or all since :meth:`record`;
        and back to the end of any finished chunk, or to nothing. Keys between these have moved on with the tokens after
        them, and a transition that is a projection cannot be undone.

        Raises:
            CacheError: fewer tokens than that, or a length that cannot be gone back to.
        """
        lengths = self.lengths
        counts = [count] * len(lengths) if isinstance(count, int) else list(count)
        if len(counts) != len(lengths):
            raise _bad("count", f"{len(counts)} numbers", f"{len(lengths)}, one for each sequence")
        targets = [length - removed for length, removed in zip(lengths, counts, strict=True)]
        folded = [] if self._state is None else self._state.folded.tolist()
        for length, target, fold in zip(lengths, targets, folded, strict=True):
            if not 0 <= target <= length:
                raise _bad("count", length - target, f"0 to {length}, the tokens there are")
            if target < fold and target % self.state.chunk:
                raise _bad(
                    "count",
                    f"{length - target} of {length} tokens",
                    f"at most {length - fold}, or a multiple of {self.state.chunk} left; "
                    "record() before the tokens keeps any number",
                )
        if self._state is not None:
            folds = [min(a, b) for a, b in zip(folded, targets, strict=True)]
            self._state.length.copy_(torch.tensor(targets))
            self._state.folded.copy_(torch.tensor(folds))
            self._drop_unused(folds)
        if self.recorded is not None:
            self.recorded = 0

    def _drop_unused(self, folds: list[int]) -> None:
        """Give blocks back that hold no folded token."""
        if self.capacity is not None:
            return
        tables = self._tables()
        for table, fold in zip(tables, folds, strict=True):
            first = -(-fold // self.state.chunk)
            self._blocks_in_use().release(table[first:])
            del table[first:]
        self._set_tables(tables)

    def _blocks_in_use(self) -> Blocks:
        assert self._blocks is not None
        return self._blocks

    def clear(self, sequence: int) -> None:
        """Forget all tokens of one sequence, whose place another can take."""
        self.crop([length if row == sequence else 0 for row, length in enumerate(self.lengths)])

    def select(self, index: Sequence[int] | Tensor) -> None:
        """Make the sequences those of ``index``, in this order, with repetition where it repeats: reorders beams, drops
        and repeats sequences. Finished chunks are shared, not copied, unless the capacity is fixed.

        Raises:
            CacheError: no such sequence; or another number of them where the capacity is fixed.
        """
        chosen = [int(x) for x in index]
        if any(not 0 <= x < self.batch_size for x in chosen):
            raise _bad("index", chosen, f"sequences of 0 to {self.batch_size - 1}")
        state = self.state
        if self.capacity is not None:
            if len(chosen) != self.batch_size:
                raise _bad(
                    "index", f"{len(chosen)} sequences", f"{self.batch_size}: a cache of fixed capacity keeps them"
                )
            blocks = state.table[torch.tensor(chosen)].flatten()
            for name in history.BLOCK_FIELDS:
                x = getattr(state, name)
                x.copy_(x[blocks])
            for name in history.ROW_FIELDS:
                if name != "table":
                    x = getattr(state, name)
                    x.copy_(x[torch.tensor(chosen)])
            return
        old = self._tables()
        tables = [list(old[x]) for x in chosen]
        for table in tables:
            self._blocks_in_use().share(table)
        for table in old:
            self._blocks_in_use().release(table)
        for name in history.ROW_FIELDS:
            setattr(state, name, getattr(state, name)[torch.tensor(chosen, dtype=torch.int64)])
        self._own_open_blocks(tables)

    def _own_open_blocks(self, tables: list[list[int]]) -> None:
        """A chunk that is still open gets a block of its own."""
        state, blocks = self.state, self._blocks_in_use()
        for table, fold in zip(tables, state.folded.tolist(), strict=True):
            for n in range(fold // state.chunk, len(table)):
                if blocks.uses[table[n]] > 1:
                    blocks.release([table[n]])
                    table[n] = blocks.copy(table[n])
        self._set_tables(tables)

    def fork(self) -> "PathCache":
        """A second cache with the same tokens that goes on by itself: finished chunks are shared, the rest is copied.

        Raises:
            CacheError: of a cache of fixed capacity, whose memory is its own.
        """
        if self.capacity is not None:
            raise _bad("capacity", self.capacity, "None: a cache of fixed capacity cannot share memory")
        other = PathCache(chunk=self.chunk, rewind=self.rewind)
        other.recorded = self.recorded
        if self._state is not None:
            tables = self._tables()
            other._blocks = self._blocks_in_use()
            other._state = State(
                **other._blocks.tensors,
                **{name: getattr(self._state, name).clone() for name in history.ROW_FIELDS},
            )
            for table in tables:
                other._blocks.share(table)
            other._own_open_blocks(tables)
        return other

    def reset(self) -> None:
        """Forget all tokens; a fixed capacity keeps its memory."""
        if self.capacity is not None and self._state is not None:
            self._state.length.zero_()
            self._state.folded.zero_()
        elif self._state is not None:
            self._release()
            self._state = self._blocks = None
        self.recorded = None if self.recorded is None else 0

    def _release(self) -> None:
        for table in self._tables():
            self._blocks_in_use().release(table)

    def __del__(self) -> None:
        # What a fork leaves behind is free for the others. Fields are missing where __init__ raised.
        if getattr(self, "_state", None) is not None and self.capacity is None:
            self._release()

    def to(self, device: torch.device | str) -> "PathCache":
        """Move all tensors (not those of a fork). Returns self."""
        if self._state is not None and self._blocks is not None:
            self._blocks.tensors = {name: x.to(device) for name, x in self._blocks.tensors.items()}
            for name in history.ROW_FIELDS:
                if self.capacity is not None or name not in ("table", "length", "folded"):
                    setattr(self._state, name, getattr(self._state, name).to(device))
        return self

    # --- saving ---

    def state_dict(self) -> dict[str, Tensor]:
        """All there is as plain tensors, for torch.save or safetensors: each used block once."""
        settings = torch.tensor([self.chunk or 0, self.rewind, self.capacity or 0])
        if self._state is None:
            return {"settings": settings}
        used = sorted({block for table in self._tables() for block in table})
        rows = {name: getattr(self._state, name).clone() for name in history.ROW_FIELDS}
        number = {block: n for n, block in enumerate(used)} | {-1: -1}
        rows["table"].copy_(
            torch.tensor([[number[x] for x in row] for row in rows["table"].tolist()]).view_as(rows["table"])
        )
        blocks = {name: getattr(self.state, name)[used] for name in history.BLOCK_FIELDS}
        return {"settings": settings, **blocks, **rows}

    @classmethod
    def from_state_dict(cls, saved: Mapping[str, Tensor]) -> "PathCache":
        """The cache that :meth:`state_dict` was taken of, on the device of the tensors.

        Raises:
            CacheError: tensors are missing.
        """
        if "settings" not in saved:
            raise _bad("saved", "no settings", "what state_dict() gives")
        chunk, rewind, capacity = saved["settings"].tolist()
        cache = cls(chunk=chunk or None, rewind=rewind, capacity=capacity or None)
        if len(saved) == 1:
            return cache
        missing = [name for name in (*history.BLOCK_FIELDS, *history.ROW_FIELDS) if name not in saved]
        if missing:
            raise _bad("saved", f"no {', '.join(missing)}", "what state_dict() gives")
        cache._blocks = Blocks({name: saved[name].clone() for name in history.BLOCK_FIELDS})
        cache._state = State(**cache._blocks.tensors, **{name: saved[name].clone() for name in history.ROW_FIELDS})
        if capacity:
            cache._blocks.uses = [1] * len(saved["keys"])
        else:
            for name in ("table", "length", "folded"):
                setattr(cache._state, name, getattr(cache._state, name).cpu())
            for table in cache._tables():
                cache._blocks.share(table)
        return cache


def _grow_open_rows(state: State, rows: int) -> None:
    """Make room for so many open rows."""
    more, reflections = rows - state.k.shape[2], state.reflections
    pad = torch.nn.functional.pad
    state.k, state.v = pad(state.k, (0, 0, 0, more)), pad(state.v, (0, 0, 0, more))
    state.w, state.u = pad(state.w, (0, 0, 0, more * reflections)), pad(state.u, (0, 0, 0, more * reflections))
    state.beta = pad(state.beta, (0, more * reflections))
    state.y = pad(state.y, (0, more, 0, more * reflections))
    if state.gated:
        state.g = pad(state.g, (0, more))
