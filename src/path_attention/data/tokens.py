"""Language modelling over documents in tokens: which documents, which tokenizer, how sequences are cut.

Documents are tokenised once, into a cache (:mod:`path_attention.data.token_cache`). Those of a split follow one another
in a stream, a separator before each, which is cut into windows of ``length`` tokens; a last piece that is shorter is
left out. In every epoch each window of training comes once, in an order that the seed and the epoch decide, so that any
sequence of a training can be had without those before it.
"""

import functools
import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from path_attention.data import tokenizer as tokenizers
from path_attention.data.documents import Chain, Documents, FileDocuments, HubDocuments, Split, find_files
from path_attention.data.places import cache_folder, check_places, expand
from path_attention.data.token_cache import CORPUS, SPLITS, TOKENIZER, Progress, Tokens, TokenSplit, Writer

# A byte-level BPE is trained on so much text at most, an even choice of the training documents: the merges of a
# vocabulary of some ten thousand are settled long before, and 100 MB take seconds.
BPE_BYTES = 100_000_000
# Part of every cache's name: caches of another layout are not found.
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Files:
    """Documents in files: JSONL and Parquet by the end of the name, also gzipped JSONL; everything else is a text.

    Args:
        paths: files and folders; ``~``, ``${stdlib}`` and ``${site_packages}`` are expanded.
        include: glob patterns of the files, relative to a folder.
        exclude: glob patterns of those to leave out again.
        text_field: of JSONL and Parquet, the field that holds the text.
    """

    paths: tuple[str, ...]
    include: tuple[str, ...] = ("**/*.txt", "**/*.md", "**/*.jsonl", "**/*.jsonl.gz", "**/*.parquet")
    exclude: tuple[str, ...] = ()
    text_field: str = "text"

    def __post_init__(self) -> None:
        for name in ("paths", "include"):
            if not getattr(self, name):
                raise ValueError(f"data.files.{name}: wanted at least one, got none")
        for path in self.paths:
            check_places(path, "data.files.paths")


@dataclass(frozen=True, kw_only=True)
class HubDataset:
    """Documents of a dataset that the ``datasets`` library can stream.

    Args:
        name: on the Hugging Face Hub, or a folder with such a dataset.
        config: name of one of its configurations.
        split: the part to train on.
        revision: a commit or tag; "" for the newest.
        text_field: the column that holds the text.
    """

    name: str
    config: str = ""
    split: str = "train"
    revision: str = ""
    text_field: str = "text"


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What is held out.

    Args:
        fraction: share of the documents, or of the bytes by ``folder``, in (0, 1).
        by: document, one of every 1 / fraction in a row; or folder, the first one under a path, as a package is.
        seed: decides which.
        paths: files and folders of their own instead, read like those of training.
        split: of a dataset, a part of its own instead.
    """

    fraction: float = 0.01
    by: Literal["document", "folder"] = "document"
    seed: int = 0
    paths: tuple[str, ...] = ()
    split: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise ValueError(f"data.validation.fraction: wanted a number in (0, 1), got {self.fraction}")
        for path in self.paths:
            check_places(path, "data.validation.paths")


@dataclass(frozen=True, kw_only=True)
class TokenData:
    """Which documents, in which tokens, in sequences of which length.

    Args:
        tokenizer: a folder, a name on the Hub, or ``bpe`` for a byte-level BPE trained on the training documents.
        vocab_size: of that BPE.
        files: the documents, or
        dataset: the documents.
        length: tokens L of a sequence.
        packing: ``plain``, attention reaches over the documents of a sequence; ``documents``, it stays in its own.
        validation: what is held out.
        max_tokens: of training; documents after them are not read. None for all.
        deduplicate: leave out documents whose very text was there before. Remembers 8 bytes of every document.
        cache: folder of the cache; "" means PATH_ATTENTION_CACHE, else XDG_CACHE_HOME or ~/.cache, path-attention.

    Raises:
        ValueError: naming the key.
    """

    tokenizer: str
    vocab_size: int | None = None
    files: Files | None = None
    dataset: HubDataset | None = None
    length: int = 2048
    packing: Literal["plain", "documents"] = "plain"
    validation: Validation = Validation()
    max_tokens: int | None = None
    deduplicate: bool = False
    cache: str = ""

    def __post_init__(self) -> None:
        if (self.files is None) == (self.dataset is None):
            raise ValueError(f"data.files: wanted files or dataset, got {'neither' if self.files is None else 'both'}")
        if self.length < 2:
            raise ValueError(f"data.length: wanted at least 2 tokens, got {self.length}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"data.max_tokens: wanted at least 1, or nothing, got {self.max_tokens}")
        is_bpe = self.tokenizer == tokenizers.BPE
        if is_bpe != (self.vocab_size is not None):
            wanted = "the size of the BPE" if is_bpe else f"nothing: the tokenizer {self.tokenizer!r} has its own"
            raise ValueError(f"data.vocab_size: wanted {wanted}, got {self.vocab_size}")
        if self.vocab_size is not None and self.vocab_size < tokenizers.SMALLEST_VOCABULARY:
            raise ValueError(
                f"data.vocab_size: wanted at least {tokenizers.SMALLEST_VOCABULARY}, the bytes and the end of text, "
                f"got {self.vocab_size}"
            )
        if self.validation.paths and self.files is None:
            raise ValueError("data.validation.paths: wanted data.files beside them, got a dataset: give a split of it")
        if self.validation.split and self.dataset is None:
            raise ValueError("data.validation.split: wanted data.dataset beside it, got files: give paths")
        if self.validation.by == "folder" and self.files is None:
            raise ValueError("data.validation.by: wanted document for a dataset, got 'folder'")

    def documents(self) -> Documents:
        """The documents.

        Raises:
            FileNotFoundError, ValueError: a path does not exist, nothing matches.
        """
        held = self.validation
        if self.dataset is not None:
            d = self.dataset
            if not held.split:
                return self._of_dataset(d.split, Split("some", held.fraction, held.seed))
            return Chain([self._of_dataset(held.split, Split("all")), self._of_dataset(d.split, Split("none"))])
        assert self.files is not None
        if not held.paths:
            return self._of_files(self.files.paths, Split("some", held.fraction, held.seed), "data.files.paths")
        # What is held out comes first: max_tokens may end the reading of the rest.
        return Chain(
            [
                self._of_files(held.paths, Split("all"), "data.validation.paths"),
                self._of_files(self.files.paths, Split("none"), "data.files.paths"),
            ]
        )

    def _of_files(self, paths: tuple[str, ...], split: Split, key: str) -> FileDocuments:
        assert self.files is not None
        found = find_files([expand(p) for p in paths], self.files.include, self.files.exclude, key=key)
        held = self.validation
        return FileDocuments(found, self.files.text_field, split, held.fraction, held.by == "folder")

    def _of_dataset(self, part: str, split: Split) -> HubDocuments:
        assert self.dataset is not None
        d = self.dataset
        return HubDocuments(d.name, d.config, part, d.revision, d.text_field, split)

    def open(self, progress: Callable[[str], Progress] | None = None) -> "TokenCorpus":
        """The corpus, from the cache or, the first time, from the documents.

        Of several processes one writes the cache, and the others wait for it.

        Args:
            progress: called with what is being done, gives what hears of its progress.

        Raises:
            FileNotFoundError, ValueError: see :meth:`documents`; no document has a text, or a part is shorter than a
                sequence.
            CacheIncomplete: the disk is full, or the network gone.
        """
        from filelock import FileLock

        documents, root = self.documents(), cache_folder(self.cache)
        root.mkdir(parents=True, exist_ok=True)
        if self.tokenizer == tokenizers.BPE:
            assert self.vocab_size is not None
            folder = root / f"bpe-{_key(documents.identity, self.vocab_size, BPE_BYTES)}"
            with FileLock(f"{folder}.lock"):
                if not folder.is_dir():
                    _train_bpe(folder, documents, self.vocab_size, progress and progress("training a tokenizer"))
            tokenizer = tokenizers.load_tokenizer(str(folder))
        else:
            tokenizer = tokenizers.load_tokenizer(self.tokenizer)
        encoder = tokenizers.Encoder(tokenizer)
        key = _key(documents.identity, encoder.identity, self.max_tokens, self.deduplicate)
        folder = root / f"tokens-{key}"
        with FileLock(f"{folder}.lock"):
            if not (folder / CORPUS).is_file():
                mark = tokenizers.separator(tokenizer)
                writer = Writer(folder, documents, encoder, mark, self.max_tokens, self.deduplicate)
                writer.run({"key": key}, tokenizer.save_pretrained, progress and progress("tokenising"))
        return TokenCorpus(Tokens(folder), self, tokenizer)


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([FORMAT, *parts]).encode()).hexdigest()[:24]


def _train_bpe(folder: Path, documents: Documents, vocab_size: int, progress: Progress | None) -> None:
    """Trains on the training documents alone and writes the tokenizer beside its place first."""
    total = documents.total
    share = 1.0 if total is None else min(1.0, BPE_BYTES / max(1, total))

    def chosen() -> Iterator[str]:
        read, owed = 0, 0.0
        for document in documents.read():
            if document.held_out:
                continue
            owed += share * len(document.text)  # documents are taken whenever their share has added up
            if owed >= len(document.text) * 0.5:
                owed -= len(document.text)
                read += len(document.text)
                yield document.text
            if progress is not None:
                progress(documents.done, total)
            if read >= BPE_BYTES:
                return

    tokenizer = tokenizers.train_bpe(chosen(), vocab_size)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.partial-", dir=folder.parent) as partial:
        tokenizer.save_pretrained(f"{partial}/{TOKENIZER}")
        os.rename(f"{partial}/{TOKENIZER}", folder)


class TokenCorpus:
    """The tokens of a :class:`TokenData` in windows of its ``length`` tokens.

    Raises:
        ValueError: a part has fewer tokens than one window.
    """

    def __init__(self, tokens: Tokens, data: TokenData, tokenizer: Any) -> None:
        self.cache, self.tokenizer = tokens, tokenizer
        self.length, self.packing = data.length, data.packing
        self.vocab_size = int(tokens.facts["vocab_size"])
        for split in SPLITS:
            if self.tokens(split) < self.length:
                raise ValueError(
                    f"data.length: the {split} documents hold {self.tokens(split)} tokens, fewer than one sequence of "
                    f"{self.length}; wanted more text, a smaller length, or another data.validation"
                )

    @property
    def key(self) -> str:
        """Tells this corpus from one of other documents, another split or another tokenizer."""
        return str(self.cache.facts["key"])

    def tokens(self, split: TokenSplit) -> int:
        """Length of a split's stream, separators included."""
        return len(self.cache.tokens[split])

    def windows(self, split: TokenSplit) -> int:
        """How many a split has."""
        return self.tokens(split) // self.length

    def read(self, split: TokenSplit, start: int, length: int | None = None) -> npt.NDArray[np.int64]:
        """``length`` tokens (by default L) of a split's stream from position ``start``."""
        return self.cache.tokens[split][start : start + (length or self.length)].astype(np.int64)

    def training_start(self, seed: int, index: int) -> int:
        """Where window number ``index`` of a training begins; a function of (seed, index) alone."""
        windows = self.windows("train")
        epoch, place = divmod(index, windows)
        return int(_order(windows, seed, epoch)[place]) * self.length

    def validation_starts(self, windows: int) -> list[int]:
        """Where ``windows`` windows spread evenly over the validation stream begin; all, where there are fewer."""
        return _spread(np.arange(self.windows("validation")) * self.length, windows)

    def long_starts(self, length: int, windows: int) -> list[int]:
        """Where ``windows`` stretches of ``length`` validation tokens, each within one group, begin, evenly chosen.

        A group is what is held out together: a document, or a folder, whose documents follow one another.

        Raises:
            ValueError: no group has as many tokens.
        """
        bounds = self.cache.group_bounds("validation")
        starts = [
            first + n * length for first, last in itertools.pairwise(bounds) for n in range((last - first) // length)
        ]
        if not starts:
            longest = int(np.diff(bounds).max())
            raise ValueError(
                f"length: wanted at most {longest}, the tokens of the longest document that is held out, got {length}"
            )
        return _spread(np.array(starts), windows)


def _spread(starts: npt.NDArray[np.int64], wanted: int) -> list[int]:
    count = min(wanted, len(starts))
    return [int(s) for s in starts[np.arange(count) * len(starts) // count]]


@functools.lru_cache(maxsize=2)
def _order(windows: int, seed: int, epoch: int) -> npt.NDArray[np.uint32]:
    """The order of an epoch's windows: 4 bytes a window, 50 MB for 50 billion tokens of 4096 each."""
    generator = np.random.Generator(np.random.Philox(key=(seed, epoch)))
    return generator.permutation(np.arange(windows, dtype=np.uint32))
