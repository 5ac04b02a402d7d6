"""Language modelling over a folder of text files, by bytes or by a tokenizer.

Tokens are the 256 byte values, or a tokenizer's, and a separator in front of every document. The files are read once
into a cache of two memory-mapped arrays, the tokens of all documents end to end and where each begins; separators are
put in on reading, so a byte of text takes a byte of disk. Files, not stretches of text, are divided between training
and validation.
"""

import hashlib
import json
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

SEPARATOR = 256
VOCAB_SIZE = 257

Split = Literal["train", "validation"]


@dataclass(frozen=True)
class Alphabet:
    """What the documents of a corpus are made of.

    Args:
        name: names the cache; two alphabets of one name encode alike.
        vocab_size: number of different tokens.
        separator: the token in front of every document.
        dtype: of the tokens in the cache.
        encode: the bytes of some documents -> the tokens of each.
    """

    name: str
    vocab_size: int
    separator: int
    dtype: type[np.unsignedinteger]
    encode: Callable[[Sequence[bytes]], Sequence[npt.NDArray[Any]]]


def _as_bytes(texts: Sequence[bytes]) -> list[npt.NDArray[Any]]:
    return [np.frombuffer(text, np.uint8) for text in texts]


BYTES = Alphabet("bytes", VOCAB_SIZE, SEPARATOR, np.uint8, _as_bytes)

# Files are read and encoded so many bytes at a time: enough for a tokenizer to share among all cores.
_ENCODED_AT_ONCE = 1 << 24


@dataclass(frozen=True, kw_only=True)
class ByteData:
    """Which text, and how it is cut.

    Args:
        path: folder; ``~`` and ``${stdlib}`` (the sources of the running Python's standard library) are expanded.
        include: glob patterns of the files, relative to the folder.
        exclude: glob patterns of those to leave out again.
        length: tokens L of a window.
        validation_fraction: share of the files held out, at least one, in (0, 1).
        split_seed: decides which.
        tokenizer: folder of a tokenizer that transformers loads; "" means bytes.
        cache: folder of the cache; "" means PATH_ATTENTION_CACHE, else XDG_CACHE_HOME or ~/.cache, path-attention.

    Raises:
        ValueError: for a length below 2, a fraction outside (0, 1) or an unknown ``${...}``.
    """

    path: str
    include: tuple[str, ...] = ("**/*.txt",)
    exclude: tuple[str, ...] = ()
    length: int = 512
    validation_fraction: float = 0.1
    split_seed: int = 0
    tokenizer: str = ""
    cache: str = ""

    def __post_init__(self) -> None:
        if self.length < 2:
            raise ValueError(f"data.length: wanted at least 2 tokens, got {self.length}")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"data.validation_fraction: wanted a number in (0, 1), got {self.validation_fraction}")
        if not self.include:
            raise ValueError("data.include: wanted at least one glob pattern, got none")
        rest = self.path.replace("${stdlib}", "")
        if "${" in rest:
            raise ValueError(f"data.path: only ${{stdlib}} is known, got {self.path!r}")

    def folder(self) -> Path:
        """``path`` with everything expanded."""
        return Path(self.path.replace("${stdlib}", sysconfig.get_path("stdlib"))).expanduser()

    def cache_folder(self) -> Path:
        """Where caches of this and other corpora are kept."""
        if self.cache:
            return Path(self.cache).expanduser()
        if own := os.environ.get("PATH_ATTENTION_CACHE"):
            return Path(own)
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "path-attention"

    def files(self) -> list[Path]:
        """The files, sorted by relative path.

        Raises:
            FileNotFoundError: if the folder does not exist.
            ValueError: if no file matches.
        """
        folder = self.folder()
        if not folder.is_dir():
            raise FileNotFoundError(f"data.path: no folder {folder}")
        excluded = {p for pattern in self.exclude for p in folder.glob(pattern)}
        found = {p for pattern in self.include for p in folder.glob(pattern) if p.is_file()} - excluded
        if not found:
            raise ValueError(
                f"data.include: no file in {folder} matches {list(self.include)} without {list(self.exclude)}"
            )
        return sorted(found, key=lambda p: p.relative_to(folder).as_posix())

    def open(
        self, progress: Callable[[int, int], None] | None = None, alphabet: Alphabet | None = None
    ) -> "ByteCorpus":
        """The corpus, from the cache or, the first time, from the files.

        Args:
            progress: called with bytes done and bytes in all while the cache is built.
            alphabet: other tokens than those of ``tokenizer``, or bytes.

        Raises:
            FileNotFoundError, ValueError: see :meth:`files`; also if there is only one file, which cannot be split, or
                if either part is shorter than one window.
        """
        folder, files = self.folder(), self.files()
        if alphabet is None:
            alphabet = tokenizer_alphabet(Path(self.tokenizer).expanduser()) if self.tokenizer else BYTES
        if len(files) < 2:
            raise ValueError(f"data.include: wanted at least 2 files, to split them, got only {files[0]}")
        names = [p.relative_to(folder).as_posix() for p in files]
        stats = [p.stat() for p in files]
        # A changed, added or removed file is another corpus; old caches are left to be found again.
        listing = [[n, s.st_size, s.st_mtime_ns] for n, s in zip(names, stats, strict=True)]
        key = hashlib.sha256(json.dumps([str(folder.resolve()), listing]).encode()).hexdigest()[:24]
        cache = self.cache_folder() / f"{alphabet.name}-{key}"
        if not cache.is_dir():
            _build(cache, files, sum(s.st_size for s in stats), progress, alphabet)
        return ByteCorpus(cache, names, self, alphabet)


def _build(
    cache: Path,
    files: Sequence[Path],
    total: int,
    progress: Callable[[int, int], None] | None,
    alphabet: Alphabet,
) -> None:
    """Writes the cache beside its place and renames it there, so that a cache that exists is whole."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{cache.name}.partial-", dir=cache.parent))
    try:
        starts, done = [0], 0
        with open(partial / "bytes.bin", "wb") as out:
            for texts in _read_some(files):
                for tokens in alphabet.encode(texts):
                    out.write(tokens.astype(alphabet.dtype, copy=False).tobytes())
                    starts.append(starts[-1] + len(tokens))
                done += sum(map(len, texts))
                if progress is not None:
                    progress(done, total)
            out.flush()
            os.fsync(out.fileno())
        np.save(partial / "starts.npy", np.array(starts, dtype=np.int64))
        try:
            os.rename(partial, cache)
        except OSError:
            if not cache.is_dir():  # else another process was faster, and its cache is as good
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _read_some(files: Sequence[Path]) -> Iterator[list[bytes]]:
    texts: list[bytes] = []
    for path in files:
        texts.append(path.read_bytes())
        if sum(map(len, texts)) >= _ENCODED_AT_ONCE:
            yield texts
            texts = []
    yield texts


# The file that says what a tokenizer is: of the tokenizers library, of sentencepiece, of the first byte-level BPEs.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def tokenizer_alphabet(folder: Path) -> Alphabet:
    """The alphabet of a tokenizer's folder; documents begin with its token for the beginning of a sequence, or for the
    end where it has none. Bytes that are no UTF-8 are replaced.

    Raises:
        FileNotFoundError: no tokenizer there.
        ValueError: one without such a token.
    """
    from transformers import AutoTokenizer

    files = [folder / name for name in TOKENIZERS if (folder / name).is_file()]
    if not files:
        raise FileNotFoundError(f"data.tokenizer: no tokenizer in {folder}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    separator = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if separator is None:
        raise ValueError(f"data.tokenizer: {folder} has neither a token for the beginning of a text nor for the end")
    # A text may be longer than the model's context: it is cut into windows afterwards.
    tokenizer.model_max_length = 1 << 62

    def encode(texts: Sequence[bytes]) -> list[npt.NDArray[Any]]:
        decoded = [text.decode("utf-8", errors="replace") for text in texts]
        if not decoded:
            return []
        return [np.array(ids, dtype=dtype) for ids in tokenizer(decoded, add_special_tokens=False)["input_ids"]]

    size = len(tokenizer)
    dtype = np.uint16 if size <= 1 << 16 else np.uint32
    key = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
    return Alphabet(f"tokens-{key}", size, separator, dtype, encode)


class ByteCorpus:
    """The text of a :class:`ByteData`, split by file, in windows of its ``length`` tokens.

    Each split is one stream of tokens: for every one of its documents the separator, then its bytes.
    """

    def __init__(self, cache: Path, names: Sequence[str], data: ByteData, alphabet: Alphabet = BYTES) -> None:
        self.length = data.length
        self.vocab_size, self.separator = alphabet.vocab_size, alphabet.separator
        self.is_bytes = alphabet is BYTES
        size = (cache / "bytes.bin").stat().st_size
        # numpy cannot map an empty file; a corpus of empty files is refused below for being too short.
        file = cache / "bytes.bin"
        self._bytes = np.memmap(file, alphabet.dtype, mode="r") if size else np.empty(0, alphabet.dtype)
        self._starts = np.load(cache / "starts.npy")
        by_hash = sorted(
            range(len(names)), key=lambda n: hashlib.sha256(f"{data.split_seed}:{names[n]}".encode()).digest()
        )
        held_out = min(max(1, round(data.validation_fraction * len(names))), len(names) - 1)
        self._documents = {"validation": np.sort(by_hash[:held_out]), "train": np.sort(by_hash[held_out:])}
        self.files = {s: tuple(names[n] for n in documents) for s, documents in self._documents.items()}
        # Where each document's separator stands in its split's stream, and the stream's length.
        self._offsets = {
            s: np.concatenate([[0], np.cumsum(self._starts[d + 1] - self._starts[d] + 1)])
            for s, d in self._documents.items()
        }
        for s in ("train", "validation"):
            if self.tokens(s) < self.length:
                raise ValueError(
                    f"data.length: the {s} files hold {self.tokens(s)} tokens, fewer than one window of {self.length}"
                )

    def tokens(self, split: Split) -> int:
        """Length of a split's stream, separators included."""
        return int(self._offsets[split][-1])

    def read(self, split: Split, start: int, length: int | None = None) -> npt.NDArray[np.int64]:
        """``length`` (by default L) tokens of a split's stream from position ``start``, int64."""
        length = self.length if length is None else length
        window = np.empty(length, dtype=np.int64)
        offsets, documents = self._offsets[split], self._documents[split]
        n = int(np.searchsorted(offsets, start, side="right")) - 1
        filled = 0
        while filled < length:
            skipped = start + filled - int(offsets[n])  # tokens of document n that lie before the window
            first, last = int(self._starts[documents[n]]), int(self._starts[documents[n] + 1])
            if skipped == 0:
                window[filled] = self.separator
                filled += 1
            else:
                first += skipped - 1
            text = self._bytes[first : min(last, first + length - filled)]
            window[filled : filled + len(text)] = text
            filled += len(text)
            n += 1
        return window

    def training_window(self, seed: int, index: int, length: int | None = None) -> npt.NDArray[np.int64]:
        """Window number ``index`` of the training data under a seed: a uniformly drawn place, int64 (L,).

        A function of (seed, index) alone, so that any batch can be had without those before it.
        """
        length = self.length if length is None else length
        generator = np.random.Generator(np.random.Philox(key=(seed, 0), counter=(0, 0, 0, index)))
        return self.read("train", int(generator.integers(self.tokens("train") - length + 1)), length)

    def validation_starts(self, windows: int, length: int | None = None) -> list[int]:
        """Where ``windows`` windows that do not overlap, spread evenly over the validation files, begin.

        All there are, where there are fewer.
        """
        length = self.length if length is None else length
        available = self.tokens("validation") // length
        chosen = np.arange(min(windows, available)) * available // max(1, min(windows, available))
        return [int(n) * length for n in chosen]
