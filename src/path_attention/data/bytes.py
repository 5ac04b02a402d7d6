"""Byte-level language modelling over a folder of text files.

Tokens are the 256 byte values and a separator in front of every document. The files are read once into a cache of two
memory-mapped arrays, the bytes of all documents end to end and where each begins; separators are put in on reading, so
a byte of text takes a byte of disk. Files, not stretches of text, are divided between training and validation.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from path_attention.data.places import cache_folder, check_places, expand

SEPARATOR = 256
VOCAB_SIZE = 257

Split = Literal["train", "validation"]


@dataclass(frozen=True, kw_only=True)
class ByteData:
    """Which text, and how it is cut.

    Args:
        path: folder; ``~``, ``${stdlib}`` and ``${site_packages}`` (the sources of the running Python's standard
            library, and of what is installed) are expanded.
        include: glob patterns of the files, relative to the folder.
        exclude: glob patterns of those to leave out again.
        length: tokens L of a window.
        validation_fraction: share of the files held out, at least one, in (0, 1).
        split_seed: decides which.
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
    cache: str = ""

    def __post_init__(self) -> None:
        if self.length < 2:
            raise ValueError(f"data.length: wanted at least 2 tokens, got {self.length}")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"data.validation_fraction: wanted a number in (0, 1), got {self.validation_fraction}")
        if not self.include:
            raise ValueError("data.include: wanted at least one glob pattern, got none")
        check_places(self.path, "data.path")

    def folder(self) -> Path:
        """``path`` with everything expanded."""
        return expand(self.path)

    def cache_folder(self) -> Path:
        """Where caches of this and other corpora are kept."""
        return cache_folder(self.cache)

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

    def open(self, progress: Callable[[int, int], None] | None = None) -> "ByteCorpus":
        """The corpus, from the cache or, the first time, from the files.

        Args:
            progress: called with bytes done and bytes in all while the cache is built.

        Raises:
            FileNotFoundError, ValueError: see :meth:`files`; also if there is only one file, which cannot be split, or
                if either part is shorter than one window.
        """
        folder, files = self.folder(), self.files()
        if len(files) < 2:
            raise ValueError(f"data.include: wanted at least 2 files, to split them, got only {files[0]}")
        names = [p.relative_to(folder).as_posix() for p in files]
        stats = [p.stat() for p in files]
        # A changed, added or removed file is another corpus; old caches are left to be found again.
        listing = [[n, s.st_size, s.st_mtime_ns] for n, s in zip(names, stats, strict=True)]
        key = hashlib.sha256(json.dumps([str(folder.resolve()), listing]).encode()).hexdigest()[:24]
        cache = self.cache_folder() / f"bytes-{key}"
        if not cache.is_dir():
            _build(cache, files, sum(s.st_size for s in stats), progress)
        return ByteCorpus(cache, names, self)


def _build(cache: Path, files: Sequence[Path], total: int, progress: Callable[[int, int], None] | None) -> None:
    """Writes the cache beside its place and renames it there, so that a cache that exists is whole."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{cache.name}.partial-", dir=cache.parent))
    try:
        starts, done = [0], 0
        with open(partial / "bytes.bin", "wb") as out:
            for path in files:
                done += out.write(path.read_bytes())
                starts.append(done)
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


class ByteCorpus:
    """The text of a :class:`ByteData`, split by file, in windows of its ``length`` tokens.

    Each split is one stream of tokens: for every one of its documents the separator, then its bytes.
    """

    vocab_size = VOCAB_SIZE

    def __init__(self, cache: Path, names: Sequence[str], data: ByteData) -> None:
        self.length = data.length
        size = (cache / "bytes.bin").stat().st_size
        # numpy cannot map an empty file; a corpus of empty files is refused below for being too short.
        self._bytes = np.memmap(cache / "bytes.bin", np.uint8, mode="r") if size else np.empty(0, np.uint8)
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
        """``length`` tokens (by default L) of a split's stream from position ``start``, int64."""
        length = self.length if length is None else length
        window = np.empty(length, dtype=np.int64)
        offsets, documents = self._offsets[split], self._documents[split]
        n = int(np.searchsorted(offsets, start, side="right")) - 1
        filled = 0
        while filled < length:
            skipped = start + filled - int(offsets[n])  # tokens of document n that lie before the window
            first, last = int(self._starts[documents[n]]), int(self._starts[documents[n] + 1])
            if skipped == 0:
                window[filled] = SEPARATOR
                filled += 1
            else:
                first += skipped - 1
            text = self._bytes[first : min(last, first + length - filled)]
            window[filled : filled + len(text)] = text
            filled += len(text)
            n += 1
        return window

    def training_window(self, seed: int, index: int) -> npt.NDArray[np.int64]:
        """Window number ``index`` of the training data under a seed: a uniformly drawn place, int64 (L,).

        A function of (seed, index) alone, so that any batch can be had without those before it.
        """
        generator = np.random.Generator(np.random.Philox(key=(seed, 0), counter=(0, 0, 0, index)))
        return self.read("train", int(generator.integers(self.tokens("train") - self.length + 1)))

    def validation_starts(self, windows: int, length: int | None = None) -> list[int]:
        """Where ``windows`` windows that do not overlap, spread evenly over the validation files, begin.

        All there are, where there are fewer.
        """
        length = self.length if length is None else length
        available = self.tokens("validation") // length
        chosen = np.arange(min(windows, available)) * available // max(1, min(windows, available))
        return [int(n) * length for n in chosen]
