"""The append-only cache of PaTH attention: state with verbs, for generation.

What it holds and how it is read is :mod:`path_attention.ops.history`; docs/generation.md has memory and costs. A
finished chunk never changes, so sequences share its pages: a fork or a beam copies its tables and its open tokens, and
pages of the open chunk when they next change.
"""

from collections.abc import Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor

from path_attention.ops import history
from path_attention.ops.arguments import validate_arguments
from path_attention.ops.dyadic import LEAF
from path_attention.ops.history import State, Tokens
from path_attention.ops.history.memory import Pool
from path_attention.ops.history.state import (
    CHUNK_FIELDS,
    PAGE,
    PAGE_FIELDS,
    ROW_FIELDS,
    SUFFIX,
    TABLES,
    folds,
    open_room,
)
from path_attention.ops.path_attention import needs_gradient, path_attention, refuse_forward_mode

# Tokens that can be taken back at any time. Drafts of speculative decoding are 5 to 20 tokens long, and are recorded.
# Every token more is kept as an open row, which costs twice the memory of a folded one.
REWIND = 16
# Entries of a table are added so many at a time: 4096 tokens.
TABLE_WIDTH = 64
# A finished chunk keeps a (D x D) matrix in float32, which weighs as much as the half-precision keys and values of D
# tokens: at 32 D tokens a chunk that is 1/32 of the cache, and a query's D^2 multiply-adds a chunk are 1/64 of
# attending to it. A fold moves the keys of the open chunk, at most 2 D of them a token.
CHUNK_PER_DIM = 32


def default_chunk(head_dim: int) -> int:
    """Tokens a chunk: CHUNK_PER_DIM * head_dim, as a power of two, at least one leaf."""
    return max(LEAF, 1 << (CHUNK_PER_DIM * head_dim - 1).bit_length())


class CacheError(ValueError):
    """What was asked of a cache does not go with it; the cache is as it was."""


def _bad(name: str, got: object, wanted: str) -> CacheError:
    return CacheError(f"{name}: got {got}; wanted {wanted}")


class PathCache:
    """Keys, values and transitions of a batch of sequences, to which tokens are added at the end.

    For any split of a sequence into calls of :meth:`attend`, the outputs are those of one call of
    :func:`path_attention.path_attention` on all of it, up to the rounding of softmax attention. Sequences may differ in
    length. The first call fixes shapes, dtypes and the device.

    Args:
        chunk: C, tokens that share a right edge; a power of two, at least 64. None means 32 * head_dim, made a power of
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
        self._pages: Pool | None = None
        self._chunks: Pool | None = None
        # Where memory grows the host knows what is on the device, and need not ask.
        self._known: list[tuple[int, int]] = []  # (folded, length) of each sequence
        self._tables: dict[str, list[list[int]]] = {}  # State.pages and State.chunks

    # --- what there is ---

    @property
    def state(self) -> State:
        """The tensors, for kernels and for looking at."""
        if self._state is None or self._pages is None or self._chunks is None:
            raise _bad("cache", "one without tokens", "one that attend() was called on")
        for name, x in (self._pages.tensors | self._chunks.tensors).items():  # a fork may have made more memory
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
        """Tokens of each sequence. Where memory is fixed, the host waits for the device."""
        return [length for _, length in self._facts()]

    @property
    def device_lengths(self) -> Tensor:
        """(B,) int32: tokens of each sequence, where the other tensors are."""
        assert self._state is not None
        return self._state.length

    @property
    def open_lengths(self) -> list[int]:
        """Tokens of each sequence that are still open: any number of these can be taken back."""
        return [length - fold for fold, length in self._facts()]

    def _facts(self) -> list[tuple[int, int]]:
        """(folded, length) of each sequence. Steps of a fixed cache may be replayed without a word to the host.

        Raises:
            CacheError: such a step found no room.
        """
        if self._state is None or self.capacity is None:
            return self._known
        folded, length, full = torch.stack([self._state.folded, self._state.length, self._state.full]).tolist()
        if any(full):
            self._state.full.zero_()
            raise _bad("q", f"tokens of a replayed step behind {max(length)}", self._wanted_room)
        return list(zip(folded, length, strict=True))

    @property
    def _wanted_room(self) -> str:
        return f"{self.capacity} in all: the cache is full"

    @property
    def keep(self) -> int:
        """Tokens that may be taken back and so are not folded."""
        return max(self.rewind, self.recorded or 0)

    def nbytes(self) -> int:
        """Bytes of all tensors; pages shared by forks are in the number of each of them."""
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
                its capacity; or gradients wanted of a later call. Steps replayed from a CUDA graph cannot raise: their
                results are NaN where there is no room, and the next call of any method that asks for lengths raises.
        """
        arguments = validate_arguments(q, k, v, w, beta, g, scale=scale, cu_seqlens=cu_seqlens)
        q, k, v, _, _, g, _ = arguments
        scale = q.shape[3] ** -0.5 if arguments.scale is None else arguments.scale
        tokens = Tokens(q, k, v, *arguments.reflections(), g, scale)
        if torch.compiler.is_compiling() and self.capacity is not None and self._state is not None:
            self._check(tokens, [1] * (q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1))
            if cu_seqlens is None:
                # Lengths are on the device and in no guard: one compiled step serves them all.
                operator = history.append_operator if q.shape[1] <= history.SHORT else history.append_long_operator
                return operator(*tokens, self.keep, self.capacity, *self._state.tensors().values())
        if q.is_cuda and torch.cuda.is_current_stream_capturing():
            return self._attend_captured(tokens, cu_seqlens)
        return self._attend_on_host(tokens, cu_seqlens)

    def _attend_captured(self, tokens: Tokens, cu_seqlens: Tensor | None) -> Tensor:
        """A step of a CUDA graph: right for every length, and for its kernels to see whether there is room."""
        if self.capacity is None or self._state is None:
            raise _bad("capacity", self.capacity, "a number, and a cache with tokens, for a step that is captured")
        reason = history.unsupported_reason(self._state)
        if reason is None and cu_seqlens is not None:
            reason = "cu_seqlens is read on the host"
        if reason is None and tokens.q.shape[1] > history.SHORT:
            reason = f"more than {history.SHORT} tokens of a sequence are"
        if reason is not None:
            raise _bad("q", "tokens in a CUDA graph", f"a call outside of it: {reason}")
        self._check(tokens, [tokens.q.shape[1]] * len(tokens.q))
        with torch.no_grad(), torch.autocast("cuda", enabled=False):
            return history.append(self._state, tokens, self.keep, capacity=self.capacity)

    @torch.compiler.disable
    def _attend_on_host(self, tokens: Tokens, cu_seqlens: Tensor | None) -> Tensor:
        q, k, v, w, beta, g, scale = tokens
        counts = [q.shape[1]] * q.shape[0] if cu_seqlens is None else cu_seqlens.diff().tolist()
        self._check(tokens, counts)
        before = self._facts() or [(0, 0)] * len(counts)
        longest = max(length + count for (_, length), count in zip(before, counts, strict=True))
        if self.capacity is not None and longest > self.capacity:
            behind = max(length for _, length in before)
            raise _bad("q", f"{max(counts)} tokens behind {behind}", self._wanted_room)
        first = not any(length for _, length in before)
        inputs = (q, k, v, w, beta, g)
        wants_gradients = needs_gradient(*inputs)
        if not first and wants_gradients:
            raise _bad("q", "tensors that want gradients", "torch.no_grad(): a cache passes no gradients on")
        if first:
            refuse_forward_mode(*inputs)
        if self.recorded is not None:
            self.recorded += max(counts, default=0)  # before anything asks how many stay open
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            packed = None if cu_seqlens is None else counts
            if first:
                out = self._add_first(tokens, counts, packed is not None, wants_gradients)
            else:
                self._reserve(tokens, counts)
                out = self._add(tokens, packed, before)
            self._known = [
                (fold + folds(fold, length, count, self.keep), length + count)
                for (fold, length), count in zip(before, counts, strict=True)
            ]
            history.refresh_suffix(self.state, before, self._known)
        return path_attention(q, k, v, w, beta, g, scale=scale, cu_seqlens=cu_seqlens) if out is None else out

    def _add_first(self, tokens: Tokens, counts: list[int], is_packed: bool, wants_gradients: bool) -> Tensor | None:
        """The first tokens, so many of each sequence; their attention, or None if that is left to the operator."""

        def room() -> State:
            self._reserve(tokens, counts)
            return self.state

        if is_packed:
            history.absorb_packed(room(), tokens, counts, self.keep)
        elif wants_gradients or (out := history.prefill(room, tokens, self.keep)) is None:
            history.absorb(room(), tokens, self.keep)
        else:
            return out
        return None

    def _add(self, tokens: Tokens, counts: list[int] | None, facts: list[tuple[int, int]]) -> Tensor:
        """More tokens, packed by ``counts`` if given: their attention."""
        if counts is None:
            return history.append(self.state, tokens, self.keep, facts=facts)
        return history.append_packed(self.state, tokens, counts, self.keep, facts=facts)

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
        if self._state is None:
            self._allocate(tokens, len(counts))
        state = self.state
        if open_room(self.keep) > state.room:
            _grow_open_rows(state, self._facts(), open_room(self.keep))
        if self.capacity is None:
            self._reserve_pages(counts)

    def _reserve_pages(self, counts: list[int]) -> None:
        """Pages and chunks for what these calls fold; and none that is written to is another's too."""
        changed, chunk = False, self.state.chunk
        missing: dict[str, list[int]] = {"pages": [], "chunks": []}  # of each sequence
        for row, ((fold, length), count) in enumerate(zip(self._known, counts, strict=True)):
            due = folds(fold, length, count, self.keep)
            if due:
                changed |= self._own_open_chunk(self._tables["pages"][row], fold)
            wanted = {"pages": -(-(fold + due) // PAGE), "chunks": (fold + due) // chunk}
            for name, n in wanted.items():
                missing[name].append(max(0, n - len(self._tables[name][row])) if due else 0)
        for name, pool in self._pools().items():
            if total := sum(missing[name]):
                taken, changed = iter(pool.take(total)), True
                for table, count in zip(self._tables[name], missing[name], strict=True):
                    table += islice(taken, count)
        if changed:
            self._write_tables()

    def _own_open_chunk(self, table: list[int], fold: int) -> bool:
        """Copy those pages of the chunk that is still open that others use too; whether there were any."""
        pool = self._pools()["pages"]
        first = fold // self.state.chunk * self.state.chunk // PAGE
        shared = [n for n in range(first, len(table)) if pool.uses[table[n]] > 1]
        if not shared:  # to look for no free pages takes as long as for many, and every sequence would
            return False
        own = pool.copy([table[n] for n in shared])
        pool.release(table[n] for n in shared)
        for n, page in zip(shared, own, strict=True):
            table[n] = page
        return True

    def _allocate(self, tokens: Tokens, batch: int) -> None:
        k, v = tokens.k, tokens.v
        heads, dim, value_dim, reflections = *k.shape[2:], v.shape[3], tokens.w.shape[2]
        chunk = self.chunk or default_chunk(dim)
        capacity = self.capacity or 0
        pages, chunks, room = batch * -(-capacity // PAGE), batch * (capacity // chunk), open_room(self.keep)
        groups = capacity // chunk // SUFFIX if k.is_cuda else 0
        gate_heads = 0 if tokens.g is None else tokens.q.shape[2]
        wide = torch.promote_types(k.dtype, torch.float32)
        coded = k.dtype != wide

        def empty(*shape: int, dtype: torch.dtype = wide) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=k.device)

        self._pages = Pool(
            {
                "keys": (empty(heads, pages * PAGE, dim, dtype=torch.float16 if coded else wide), 1, PAGE),
                "key_scale": (empty(heads if coded else 0, pages), 1, 1),
                "values": (empty(heads, pages * PAGE, value_dim, dtype=k.dtype), 1, PAGE),
                "gates": (empty(gate_heads, pages * PAGE), 1, PAGE),
            }
        )
        self._chunks = Pool(
            {
                "products": (empty(chunks, heads, dim, dim), 0, 1),
                "gate_totals": (empty(chunks, gate_heads), 0, 1),
            }
        )
        numbers = [torch.arange(n, dtype=torch.int32, device=k.device).view(batch, -1) for n in (pages, chunks)]
        self._known = [(0, 0)] * batch
        self._tables = {name: [[] for _ in range(batch)] for name in TABLES}
        self._state = State(
            **self._pages.tensors,
            **self._chunks.tensors,
            pages=numbers[0],
            chunks=numbers[1],
            length=empty(batch, dtype=torch.int32),
            folded=empty(batch, dtype=torch.int32),
            covered=empty(batch, dtype=torch.int32),
            suffix=empty(batch, groups, heads, dim, dim),
            suffix_gate=empty(batch, groups, gate_heads),
            product=empty(batch, heads, dim, dim),
            gate_total=empty(batch, gate_heads),
            scale=empty(batch, heads, chunk) if coded else empty(batch, 0, chunk),
            k=empty(batch, heads, room, dim, dtype=k.dtype),
            v=empty(batch, heads, room, value_dim, dtype=k.dtype),
            w=empty(batch, heads, room * reflections, dim),
            beta=empty(batch, heads, room * reflections),
            g=empty(batch, gate_heads, room),
            full=empty(batch, dtype=torch.int32),
        )

    def _write_tables(self) -> None:
        """Bring the tables to the device; entries that are not in use are -1."""
        assert self._state is not None
        for name, rows in self._tables.items():
            old = getattr(self._state, name)
            width = max((len(row) for row in rows), default=0)
            width = max(-(-width // TABLE_WIDTH) * TABLE_WIDTH, old.shape[1])
            table = torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.int32)
            table = table.view(len(rows), width)
            if table.shape == old.shape:
                old.copy_(table, non_blocking=True)
            else:
                setattr(self._state, name, table.to(old.device, non_blocking=True))

    def _pools(self) -> dict[str, Pool]:
        assert self._pages is not None
        assert self._chunks is not None
        return {"pages": self._pages, "chunks": self._chunks}

    # --- taking back, copying, choosing ---

    def record(self) -> None:
        """From here on keep every new token open until the next :meth:`crop`, however many they are.

        Raises:
            CacheError: of a cache of fixed capacity, whose open tokens have a place each: say rewind when making it.
        """
        if self.capacity is not None:
            raise _bad("capacity", self.capacity, "None, or rewind=... tokens that can be taken back at any time")
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
        facts = self._facts()
        counts = [count] * len(facts) if isinstance(count, int) else list(count)
        if len(counts) != len(facts):
            raise _bad("count", f"{len(counts)} numbers", f"{len(facts)}, one for each sequence")
        found = []
        for (fold, length), removed in zip(facts, counts, strict=True):
            target = length - removed
            if not 0 <= target <= length:
                raise _bad("count", removed, f"0 to {length}, the tokens there are")
            if target < fold and target % self.state.chunk:
                raise _bad(
                    "count",
                    f"{removed} of {length} tokens",
                    f"at most {length - fold}, or a multiple of {self.state.chunk} left; "
                    "record() before the tokens keeps any number",
                )
            found.append((min(fold, target), target))
        if self._state is not None and any(counts):
            self._set_facts(found)
            if self.capacity is None:
                self._drop_unused()
        if self.recorded is not None:
            self.recorded = 0

    def _set_facts(self, facts: list[tuple[int, int]]) -> None:
        state = self.state
        for x, values in zip((state.folded, state.length), zip(*facts, strict=True), strict=True):
            x.copy_(torch.tensor(values, dtype=torch.int32), non_blocking=True)
        history.refresh_suffix(state, None, facts)
        self._known = facts

    def _drop_unused(self) -> None:
        """Give pages and chunks back that hold no folded token."""
        for name, pool in self._pools().items():
            for table, (fold, _) in zip(self._tables[name], self._known, strict=True):
                first = -(-fold // PAGE) if name == "pages" else fold // self.state.chunk
                pool.release(table[first:])
                del table[first:]
        self._write_tables()

    def clear(self, sequence: int) -> None:
        """Forget all tokens of one sequence, whose place another can take."""
        self.crop([length if row == sequence else 0 for row, length in enumerate(self.lengths)])

    def select(self, index: Sequence[int] | Tensor) -> None:
        """Make the sequences those of ``index``, in this order, with repetition where it repeats: reorders beams, drops
        and repeats sequences. Pages are shared, not copied, unless the capacity is fixed.

        Raises:
            CacheError: no such sequence; or another number of them where the capacity is fixed.
        """
        chosen = [int(x) for x in index]
        if any(not 0 <= x < self.batch_size for x in chosen):
            raise _bad("index", chosen, f"sequences of 0 to {self.batch_size - 1}")
        state = self.state
        where = torch.tensor(chosen, dtype=torch.int64).to(state.k.device, non_blocking=True)
        if self.capacity is not None:
            if len(chosen) != self.batch_size:
                raise _bad(
                    "index", f"{len(chosen)} sequences", f"{self.batch_size}: a cache of fixed capacity keeps them"
                )
            for name, pool in self._pools().items():
                pool.arrange(getattr(state, name)[where].flatten().tolist())
            for name in ROW_FIELDS:
                if name not in TABLES:
                    x = getattr(state, name)
                    x.copy_(x[where])
            return
        old, self._tables = self._tables, self._copy_tables(chosen)
        for name, pool in self._pools().items():
            for table in self._tables[name]:
                pool.share(table)
            for table in old[name]:
                pool.release(table)
        for name in ROW_FIELDS:
            setattr(state, name, getattr(state, name)[where])
        self._known = [self._known[x] for x in chosen]

    def _copy_tables(self, rows: Sequence[int]) -> dict[str, list[list[int]]]:
        return {name: [list(table[row]) for row in rows] for name, table in self._tables.items()}

    def fork(self) -> "PathCache":
        """A second cache with the same tokens that goes on by itself: pages are shared, the open tokens are copied.

        Raises:
            CacheError: of a cache of fixed capacity, whose memory is its own.
        """
        if self.capacity is not None:
            raise _bad("capacity", self.capacity, "None: a cache of fixed capacity cannot share memory")
        other = PathCache(chunk=self.chunk, rewind=self.rewind)
        other.recorded = self.recorded
        if self._state is not None:
            other._pages, other._chunks, other._known = self._pages, self._chunks, list(self._known)
            copies = {name: x.clone() if name in ROW_FIELDS else x for name, x in self.state.tensors().items()}
            other._state = State(**copies)
            other._tables = self._copy_tables(range(self.batch_size))
            for name, tables in self._tables.items():
                for table in tables:
                    self._pools()[name].share(table)
        return other

    def reset(self) -> None:
        """Forget all tokens; a fixed capacity keeps its memory."""
        if self.capacity is not None and self._state is not None:
            self._set_facts([(0, 0)] * self.batch_size)
        elif self._state is not None:
            self._release()
            self._state = self._pages = self._chunks = None
            self._known, self._tables = [], {}
        self.recorded = None if self.recorded is None else 0

    def _release(self) -> None:
        for name, tables in self._tables.items():
            for table in tables:
                self._pools()[name].release(table)

    def __del__(self) -> None:
        # What a fork leaves behind is free for the others. Fields are missing where __init__ raised.
        if getattr(self, "_state", None) is not None and self.capacity is None:
            self._release()

    def to(self, device: torch.device | str) -> "PathCache":
        """Move all tensors (not those of a fork). Returns self."""
        if self._state is not None:
            for pool in self._pools().values():
                pool.to(device)
            for name in ROW_FIELDS:
                setattr(self._state, name, getattr(self._state, name).to(device))
            history.refresh_suffix(self.state, None, self._facts())
        return self

    # --- saving ---

    def state_dict(self) -> dict[str, Tensor]:
        """All there is as plain tensors, for torch.save or safetensors: each used page once."""
        settings = torch.tensor([self.chunk or 0, self.rewind, self.capacity or 0])
        if self._state is None:
            return {"settings": settings}
        saved = {name: getattr(self.state, name).clone() for name in ROW_FIELDS}
        for name, pool in self._pools().items():
            table = saved[name]
            used, numbers = table.unique(return_inverse=True)
            first = int(len(used) > 0 and int(used[0]) < 0)  # -1 stands for no piece and is none
            saved[name] = (numbers - first).to(torch.int32).view_as(table)
            saved |= pool.select(used[first:].tolist())
        return {"settings": settings, **saved}

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
        missing = [name for name in history.FIELDS if name not in saved]
        if missing:
            raise _bad("saved", f"no {', '.join(missing)}", "what state_dict() gives")
        state = cache._state = State(**{name: saved[name].clone() for name in history.FIELDS})
        cache._known = state.facts()
        cuts = {"keys": (1, PAGE), "key_scale": (1, 1), "values": (1, PAGE), "gates": (1, PAGE)}
        cache._tables = {
            name: [[piece for piece in row if piece >= 0] for row in getattr(state, name).tolist()] for name in TABLES
        }
        cache._pages = Pool({name: (getattr(state, name), *cuts[name]) for name in PAGE_FIELDS})
        cache._chunks = Pool({name: (getattr(state, name), 0, 1) for name in CHUNK_FIELDS})
        for name, pool in cache._pools().items():
            for table in cache._tables[name]:
                pool.share(table)
        return cache


def _grow_open_rows(state: State, facts: list[tuple[int, int]], room: int) -> None:
    """Make places for so many open tokens. The places of those there are change with their number."""
    old, reflections = state.room, state.reflections
    token = torch.arange(old, device=state.k.device)
    folded = torch.tensor([fold for fold, _ in facts], device=state.k.device)[:, None]
    source, target = (folded + token) % old, (folded + token) % room

    def steps(where: Tensor) -> Tensor:
        return (where[..., None] * reflections + torch.arange(reflections, device=where.device)).flatten(1)

    def move(x: Tensor, size: int, before: Tensor, after: Tensor) -> Tensor:
        """x (B, heads, places, ...) with ``size`` places."""
        shape = (*before.shape[:1], 1, before.shape[1], *[1] * (x.dim() - 3))
        taken = x.gather(2, before.view(shape).expand_as(x))
        return x.new_zeros(*x.shape[:2], size, *x.shape[3:]).scatter_(2, after.view(shape).expand_as(taken), taken)

    state.k, state.v, state.g = (move(x, room, source, target) for x in (state.k, state.v, state.g))
    source, target = steps(source), steps(target)
    state.w, state.beta = (move(x, room * reflections, source, target) for x in (state.w, state.beta))
