"""What a cache of PaTH attention holds.

A sequence of L tokens is kept in two parts. The first ``folded`` tokens, a multiple of FOLD, are *folded*: their keys
stand at the right edge of their chunk of C tokens, in pages of PAGE tokens. A finished chunk also keeps its product P
and never changes again. In the last chunk, as long as it is open, the right edge is that of the last folded token. The
other tokens are *open*: their rows are kept as they came. A query goes left through them, one reflection after another,
or all at once by the inverse of a small triangular matrix (docs/math.md, section 2), and then from edge to edge,

    x <- x P_open,  x <- x P_c  for the finished chunks c from right to left,

one (D x D) product a chunk, and meets the keys of each chunk at its right edge: one read of K and V. As soon as FOLD
open tokens are more than the last ``keep``, which a rollback may take away, they are folded.

Half precision rounds a key once, when its chunk is finished, and not to the 8 bits of bfloat16: pages of finished
chunks are float16 times one power of two a page, 11 bits. Folding moves the keys of the open chunk to their new edge,
so until then they are 16-bit integers times one float a key, which a hundred moves round to less than float16 does.

Legend: B sequences, H key/value heads, G query heads for each of them, HQ = H G, C tokens a chunk, O open tokens at
most, R reflections a token, D key dim, DV value dim, N pages of S = N PAGE tokens; b sequences of the same length and
fold, worked on together.
"""

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

# Tokens a page, the unit of memory: half a page of each sequence is empty, which is 0.4 % of 8192 tokens.
PAGE = 64
# Tokens folded at once. Each fold reads and writes the keys of the open chunk: C / 16 keys a token. More would keep
# more tokens open, which every query passes one by one, and each of which takes the memory of 2 folded ones.
FOLD = 16
# Chunks whose suffix product is kept: see State.suffix. A query takes at most 3 single steps more from there.
SUFFIX = 4
# Widest rows that the Triton kernels serve: tiles of 64 keys and values, twice in shared memory.
MAX_DIM = 256
# And where many tokens are folded at once, which takes a product of D x D in registers.
MAX_FOLD_DIM = 128
# Tokens of one call that are put behind the open rows as they are; more become leaves and chunks at once.
SHORT = 16

Rows = slice | Tensor  # which of the B sequences: all of them, or by index


@dataclass
class State:
    """The tensors of one cache. Every one is contiguous; none is replaced while it is added to.

    Pages and chunks belong to whoever's table names them; all other fields have a row for each sequence. Fields of
    length 0 are not in use: gates where there are none; scales in float32 and float64; suffixes but on CUDA. Open
    tokens stand in a ring: token t at place t mod O.
    """

    keys: Tensor  # (H, S, D): of finished chunks float16, of open ones int16; float32 or float64 of such caches
    key_scale: Tensor  # (H, N) float32: times this, in pages of finished chunks
    values: Tensor  # (H, S, DV), dtype of the cache
    gates: Tensor  # (HQ, S) float32: sum of g from the token after this one to its chunk's right edge
    products: Tensor  # (chunks, H, D, D) float32: P of a finished chunk
    gate_totals: Tensor  # (chunks, HQ) float32: sum of g over a finished chunk
    pages: Tensor  # (B, pages) int32: the page of each PAGE folded tokens, -1 for none
    chunks: Tensor  # (B, chunks) int32: where the product of each finished chunk stands, -1 for none
    length: Tensor  # (B,) int32: tokens
    folded: Tensor  # (B,) int32: of these, in pages
    covered: Tensor  # (B,) int32: finished chunks that the suffixes take in, a multiple of SUFFIX
    suffix: Tensor  # (B, groups, H, D, D) float32: product of the covered chunks behind each SUFFIX of them
    suffix_gate: Tensor  # (B, groups, HQ) float32: sum of g over these
    product: Tensor  # (B, H, D, D) float32: P_open, of the folded tokens of the open chunk
    gate_total: Tensor  # (B, HQ) float32: sum of g over them
    scale: Tensor  # (B, H, C) float32: times this, each key of the open chunk
    k: Tensor  # (B, H, O, D) dtype of the cache: open tokens from here on
    v: Tensor  # (B, H, O, DV)
    w: Tensor  # (B, H, O * R, D) float32
    beta: Tensor  # (B, H, O * R) float32
    g: Tensor  # (B, HQ, O) float32
    full: Tensor  # (B,) int32: 1 where a step that the host did not check had no room, and left the sequence as it was

    @property
    def chunk(self) -> int:
        return self.scale.shape[2]

    @property
    def room(self) -> int:
        """O: open tokens there are places for."""
        return self.k.shape[2]

    @property
    def reflections(self) -> int:
        return self.w.shape[2] // self.k.shape[2]

    @property
    def gated(self) -> bool:
        return self.g.numel() > 0

    @property
    def coded(self) -> bool:
        """Keys are in another format than they came in."""
        return self.keys.dtype == torch.float16

    def tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def facts(self) -> list[tuple[int, int]]:
        """(folded, length) of each sequence; makes the host wait for a GPU."""
        return list(zip(self.folded.tolist(), self.length.tolist(), strict=True))


FIELDS = tuple(field.name for field in fields(State))
PAGE_FIELDS = ("keys", "key_scale", "values", "gates")
CHUNK_FIELDS = ("products", "gate_totals")
TABLES = ("pages", "chunks")
ROW_FIELDS = tuple(name for name in FIELDS if name not in PAGE_FIELDS + CHUNK_FIELDS)


class Tokens(NamedTuple):
    """T new tokens of each of some sequences; w (b, T, R, H, D) and beta (b, T, R, H) as the operator takes them."""

    q: Tensor
    k: Tensor
    v: Tensor
    w: Tensor
    beta: Tensor
    g: Tensor | None
    scale: float

    def of(self, rows: Rows) -> "Tokens":
        """Those of some sequences."""
        g = None if self.g is None else self.g[rows]
        q, k, v, w, beta = (x[rows] for x in (self.q, self.k, self.v, self.w, self.beta))
        return Tokens(q, k, v, w, beta, g, self.scale)

    def at(self, places: Tensor) -> "Tokens":
        """Of tokens packed into one row those at these places, (n,) -> (1, n, ...) or (b, n) -> (b, n, ...)."""
        where = places if places.dim() == 2 else places[None]
        g = None if self.g is None else self.g[0][where]
        q, k, v, w, beta = (x[0][where] for x in (self.q, self.k, self.v, self.w, self.beta))
        return Tokens(q, k, v, w, beta, g, self.scale)


def open_room(keep: int) -> int:
    """O that ``keep`` needs: that many tokens, those that wait to be folded, and those of one short call.

    48, 64, 96, 128, 192 and so on: kernels are compiled for it.
    """
    least = max(keep + FOLD, SHORT + FOLD) - 1 + SHORT
    power = 1 << (least - 1).bit_length()
    return power * 3 // 4 if least <= power * 3 // 4 else power


def folds(folded: int, length: int, count: int, keep: int) -> int:
    """Tokens that ``count`` new ones push out of the open rows of a sequence.

    A short call folds the oldest FOLD open tokens if as many as ``keep`` stay behind the new ones; a long one folds all
    that it may, new tokens too.
    """
    n = length - folded
    if count > SHORT:
        return max(0, n + count - keep) // FOLD * FOLD
    return FOLD if count and n >= FOLD and n + count - FOLD >= keep else 0


# --- the formats of keys ---------------------------------------------------------------------------------------------

# Keys of a page or a row smaller than this count as zeros.
TINY = 2.0**-100
LARGEST_CODE = 32767


def encode_pages(k: Tensor) -> tuple[Tensor, Tensor]:
    """Keys (..., pages * PAGE, D) -> float16 of at most 2^14, and a power of two a page (..., pages)."""
    paged = k.unflatten(-2, (-1, PAGE))
    scale = torch.exp2(paged.abs().amax((-2, -1)).clamp_min(TINY).log2().ceil() - 14)
    return (paged / scale[..., None, None]).half().flatten(-3, -2), scale


def decode_pages(codes: Tensor, scale: Tensor) -> Tensor:
    """The opposite of :func:`encode_pages`."""
    return (codes.unflatten(-2, (-1, PAGE)).float() * scale[..., None, None]).flatten(-3, -2)


def encode_rows(k: Tensor) -> tuple[Tensor, Tensor]:
    """Keys (..., D) -> int16, and a scale a key (...)."""
    scale = k.abs().amax(-1).clamp_min(TINY) / LARGEST_CODE
    return (k / scale[..., None]).round().short(), scale


def decode_rows(codes: Tensor, scale: Tensor) -> Tensor:
    """The opposite of :func:`encode_rows`."""
    return codes.float() * scale[..., None]


# --- places ----------------------------------------------------------------------------------------------------------


def slots(state: State, rows: Rows, first: int, end: int) -> Tensor:
    """(b, end - first): where tokens first ... end - 1 of these sequences stand in the pages."""
    token = torch.arange(first, end, device=state.pages.device)
    return state.pages[rows][:, token // PAGE].long() * PAGE + token % PAGE


def places(state: State, folded: int, count: int, first: int = 0) -> Tensor:
    """(count,): where the open tokens from number ``first`` on stand in the ring."""
    return (folded + first + torch.arange(count, device=state.k.device)) % state.room


def step_places(state: State, token_places: Tensor) -> Tensor:
    """The places of all reflections of these tokens in ``w`` and ``beta``."""
    each = torch.arange(state.reflections, device=token_places.device)
    return (token_places[:, None] * state.reflections + each).flatten()
