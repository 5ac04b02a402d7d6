"""The tokens of a collection of documents on disk: written once, a little at a time, read through memory maps.

    FOLDER/corpus.json              sizes, and what the tokens were made from; its presence means that all is there
           train.tokens             tokens of all documents end to end, a separator before each; uint16 or uint32
           train.starts             int64: where each document's separator stands
           train.groups             int64: the group of each document
           validation.*             the same of what is held out
           tokenizer/               as save_pretrained writes it

While it is being written the folder is called FOLDER.partial and has state.json instead of corpus.json: how much of
each file counts, and where the documents were left. Whoever goes on cuts the files there.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from path_attention.data.documents import CacheIncomplete, Document, Documents
from path_attention.data.tokenizer import Encoder

TokenSplit = Literal["train", "validation"]
SPLITS: tuple[TokenSplit, ...] = ("train", "validation")
CORPUS, STATE, TOKENIZER, HASHES = "corpus.json", "state.json", "tokenizer", "hashes"
# Text that is encoded at once: for every core enough that the longest document keeps the others waiting for a short
# time only; 2 MiB of text are about 150 MB while they are being encoded.
BATCH_BYTES = 2**21 * max(4, os.cpu_count() or 1)
# Seconds after which what is written is made to count: what an interruption costs at most.
COMMIT_SECONDS = 10.0

Progress = Callable[[int, int | None], None]


class Writer:
    """Writes the cache of a collection, or what is left of it.

    Args:
        folder: of the finished cache.
        documents: the collection.
        encoder: makes tokens of text.
        separator: the token before every document.
        max_tokens: of training, after which no more documents are read; None for all.
        deduplicate: leave out documents whose text was there before.
    """

    def __init__(
        self,
        folder: Path,
        documents: Documents,
        encoder: Encoder,
        separator: int,
        max_tokens: int | None = None,
        deduplicate: bool = False,
    ) -> None:
        self.folder = folder
        self.partial = folder.with_name(f"{folder.name}.partial")
        self.documents, self.encoder, self.separator = documents, encoder, separator
        self.max_tokens, self.deduplicate = max_tokens, deduplicate
        self.counts: dict[str, dict[str, int]] = {s: {"tokens": 0, "documents": 0} for s in SPLITS}
        self.repeated = self.bytes = 0
        self.seen: set[bytes] = set()
        self.files: dict[str, Any] = {}

    def run(self, facts: dict[str, Any], save_tokenizer: Callable[[Path], Any], progress: Progress | None) -> None:
        """Writes the whole cache.

        Args:
            facts: what else corpus.json says.
            save_tokenizer: called with the folder it is to be saved in.
            progress: called with the bytes that were read, or tokens where they are limited, and how many there are.

        Raises:
            CacheIncomplete: the disk is full, or not ours to write on; nothing looks whole.
            ValueError: a document that cannot be read.
        """
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            reader = self._resume()
            committed = time.monotonic()
            for batch in self._batches(reader):
                self._write(batch)
                if progress is not None:
                    progress(*self._progress())
                if time.monotonic() - committed > COMMIT_SECONDS:
                    self._commit()
                    committed = time.monotonic()
            self._commit()
            self._finish(facts, save_tokenizer)
        except OSError as error:
            raise CacheIncomplete(
                f"{self.partial}: {error.strerror or error}; {self._disk()}. What was written counts: the same command "
                "goes on there. Another place: data.cache, or the variable PATH_ATTENTION_CACHE"
            ) from error
        finally:
            for file in self.files.values():
                # What it still holds back did not count, and an error that matters is on its way already.
                with contextlib.suppress(OSError):
                    file.close()

    def _disk(self) -> str:
        tokens = sum(c["tokens"] for c in self.counts.values())
        try:
            free = shutil.disk_usage(self.folder.parent).free
        except OSError:
            return f"{tokens:,} tokens were read"
        return f"{tokens:,} tokens were read, {free / 2**20:,.0f} MiB are free there"

    def _progress(self) -> tuple[int, int | None]:
        if self.max_tokens is not None:
            return self.counts["train"]["tokens"], self.max_tokens
        return self.documents.done, self.documents.total

    def _resume(self) -> Iterator[Document]:
        state = None
        if (self.partial / STATE).is_file():
            state = json.loads((self.partial / STATE).read_text())
            self.counts, self.repeated, self.bytes = state["counts"], state["repeated"], state["bytes"]
        self._cut()
        if self.deduplicate:
            stored = (self.partial / HASHES).read_bytes()
            self.seen = {stored[n : n + 8] for n in range(0, len(stored), 8)}
        return self.documents.read(None if state is None else state["documents"])

    def _names(self) -> list[tuple[str, int]]:
        """Every file and how many of its bytes count."""
        found = [(HASHES, 8 * (sum(c["documents"] for c in self.counts.values())))] if self.deduplicate else []
        for split in SPLITS:
            count = self.counts[split]
            found.append((f"{split}.tokens", self.encoder.dtype.itemsize * count["tokens"]))
            found += [(f"{split}.{column}", 8 * count["documents"]) for column in ("starts", "groups")]
        return found

    def _cut(self) -> None:
        for name, size in self._names():
            file = self.files[name] = open(self.partial / name, "ab")  # noqa: SIM115 (closed by run)
            file.truncate(size)

    def _batches(self, reader: Iterator[Document]) -> Iterator[list[Document]]:
        """Documents that are to be written, BATCH_BYTES of text at a time."""
        batch, size = [], 0
        for document in reader:
            if not document.text:
                continue
            batch.append(document)
            size += len(document.text)
            if size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
                if self.max_tokens is not None and self.counts["train"]["tokens"] >= self.max_tokens:
                    return
        if batch:
            yield batch

    def _write(self, batch: list[Document]) -> None:
        if self.deduplicate:
            batch = [document for document in batch if self._is_new(document.text)]
        encoded = self.encoder([document.text for document in batch])
        for split in SPLITS:
            self._append(
                split,
                [(d, t) for d, t in zip(batch, encoded, strict=True) if d.held_out == (split == "validation")],
            )
        self.bytes += sum(len(document.text.encode()) for document in batch)

    def _is_new(self, text: str) -> bool:
        digest = hashlib.sha256(text.encode()).digest()[:8]
        if digest in self.seen:
            self.repeated += 1
            return False
        self.seen.add(digest)
        self.files[HASHES].write(digest)
        return True

    def _append(self, split: TokenSplit, found: list[tuple[Document, npt.NDArray[Any]]]) -> None:
        if not found:
            return
        count = self.counts[split]
        mark = np.array([self.separator], dtype=self.encoder.dtype)
        lengths = [1 + len(tokens) for _, tokens in found]
        starts = count["tokens"] + np.concatenate([[0], np.cumsum(lengths)[:-1]])
        self.files[f"{split}.tokens"].write(np.concatenate([x for _, tokens in found for x in (mark, tokens)]).data)
        self.files[f"{split}.starts"].write(starts.astype(np.int64).data)
        self.files[f"{split}.groups"].write(np.array([d.group for d, _ in found], dtype=np.int64).data)
        count["tokens"] += sum(lengths)
        count["documents"] += len(found)

    def _commit(self) -> None:
        """What was written so far counts."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        state = {
            "counts": self.counts,
            "repeated": self.repeated,
            "bytes": self.bytes,
            "documents": self.documents.state(),
        }
        _write_whole(self.partial / STATE, json.dumps(state))

    def _finish(self, facts: dict[str, Any], save_tokenizer: Callable[[Path], Any]) -> None:
        for file in self.files.values():
            file.close()
        save_tokenizer(self.partial / TOKENIZER)
        numbers: dict[str, Any] = {
            **facts,
            "vocab_size": self.encoder.size,
            "dtype": self.encoder.dtype.name,
            "separator": self.separator,
            "bytes": self.bytes,
            "repeated_documents": self.repeated,
        }
        numbers |= self.counts
        _write_whole(self.partial / CORPUS, json.dumps(numbers, indent=1) + "\n")
        (self.partial / STATE).unlink()
        (self.partial / HASHES).unlink(missing_ok=True)
        os.rename(self.partial, self.folder)


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


class Tokens:
    """A finished cache, through memory maps.

    Raises:
        ValueError: its files are not as long as it says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts: dict[str, Any] = json.loads((folder / CORPUS).read_text())
        dtype = np.dtype(self.facts["dtype"])
        self.tokens = {s: self._map(f"{s}.tokens", dtype, self.facts[s]["tokens"]) for s in SPLITS}
        self.starts = {s: self._map(f"{s}.starts", np.dtype(np.int64), self.facts[s]["documents"]) for s in SPLITS}
        self.groups = {s: self._map(f"{s}.groups", np.dtype(np.int64), self.facts[s]["documents"]) for s in SPLITS}

    def _map(self, name: str, dtype: np.dtype[Any], length: int) -> npt.NDArray[Any]:
        path = self.folder / name
        size = path.stat().st_size if path.is_file() else -1
        if size != length * dtype.itemsize:
            wanted = length * dtype.itemsize
            raise ValueError(f"{path}: got {size} bytes, wanted {wanted}; the cache is damaged: delete {self.folder}")
        # numpy cannot map an empty file.
        return np.memmap(path, dtype, mode="r") if length else np.empty(0, dtype)

    def group_bounds(self, split: TokenSplit) -> npt.NDArray[np.int64]:
        """(groups + 1,) positions where the documents of each group begin, and the end; groups stand together."""
        starts, groups = self.starts[split], self.groups[split]
        first = np.flatnonzero(np.diff(groups, prepend=-1))
        return np.append(starts[first], len(self.tokens[split])).astype(np.int64)

    def document_bounds(self, split: TokenSplit, start: int, length: int) -> npt.NDArray[np.int64]:
        """Boundaries of the documents within ``length`` tokens from ``start``: 0, where each further one begins, and
        ``length``.
        """
        starts = self.starts[split]
        first, last = np.searchsorted(starts, [start, start + length], side="left")
        inner = starts[first:last] - start
        return np.concatenate([[0], inner[inner > 0], [length]]).astype(np.int64)
