"""Documents one after another: out of text, JSONL and Parquet files, or out of a Hugging Face dataset as it streams.

Every reader can say where it is and go on from there, so that a long tokenisation survives an interruption. Which
documents are held out for validation is known before any is read: a document never moves when others are added behind
it, and a tokenizer can be trained without them.
"""

import gzip
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

# What a file's text is in, by the end of its name; every other file is one document.
_RECORDS = (".jsonl", ".jsonl.gz", ".ndjson", ".parquet")

Part = Literal["all", "none", "some"]


class CacheIncomplete(RuntimeError):
    """Not all documents could be read or written; what was stays, for the next try."""


class Document(NamedTuple):
    """A text and where it belongs."""

    text: str
    group: int  # what is held out together, by number
    held_out: bool


class Documents(ABC):
    """Documents in a fixed order.

    Attributes:
        identity: plain data that tells this collection from others.
        total: bytes that reading goes through; None where nobody knows.
        done: bytes gone through so far.
    """

    identity: Any
    total: int | None
    done: int = 0

    @abstractmethod
    def read(self, state: Any = None) -> Iterator[Document]:
        """The documents; with a ``state``, those after it.

        Raises:
            ValueError: naming the file, the line and what is wrong with it.
        """

    @abstractmethod
    def state(self) -> Any:
        """Where reading is, plain data: behind the last document that was read."""


class Split:
    """Which documents are held out.

    Args:
        part: all of them, none, or ``some``: the first, and of every further 1 / fraction in a row one by the seed.
        fraction: in (0, 1).
        seed: of the choice.
    """

    def __init__(self, part: Part, fraction: float = 0.0, seed: int = 0) -> None:
        self.part, self.seed = part, seed
        self.row = max(2, round(1 / fraction)) if part == "some" else 0
        self.identity = [part, fraction, seed]

    def is_held_out(self, number: int) -> bool:
        """Whether document ``number`` is."""
        if self.part != "some":
            return self.part == "all"
        row, place = divmod(number, self.row)
        return place == (_hash(f"{self.seed}:{row}") % self.row if row else 0)

    def held_out_groups(self, sizes: dict[str, int], fraction: float) -> set[str]:
        """The groups that are held out where documents stay with their group: in the order of a hash of their names
        each that does not take their bytes over the fraction.

        Raises:
            ValueError: none is as small as that.
        """
        if self.part != "some":
            return set(sizes) if self.part == "all" else set()
        room, chosen = fraction * sum(sizes.values()), set()
        for name in sorted(sizes, key=lambda name: _hash(f"{self.seed}:{name}")):
            if sizes[name] <= room:
                chosen.add(name)
                room -= sizes[name]
        if not chosen:
            raise ValueError(
                f"data.validation.fraction: no folder is as small as {fraction:g} of all {len(sizes)}; wanted a larger "
                "fraction, or data.validation.by=document"
            )
        return chosen


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


class FileDocuments(Documents):
    """The documents of files.

    Args:
        files: each with the name of its group; groups stand together.
        text_field: of JSONL and Parquet, the field that holds the text.
        split: which documents are held out.
        fraction: see :meth:`Split.held_out_groups`.
        by_group: hold out whole groups; the group of a document is otherwise the document itself.
    """

    def __init__(
        self, files: Sequence[tuple[Path, str]], text_field: str, split: Split, fraction: float, by_group: bool
    ) -> None:
        self.files, self.text_field, self.split, self.by_group = files, text_field, split, by_group
        stats = [path.stat() for path, _ in files]
        self.sizes = [stat.st_size for stat in stats]
        self.total = sum(self.sizes)
        # A changed, added or removed file makes another corpus.
        listing = [
            [str(path), group, stat.st_size, stat.st_mtime_ns] for (path, group), stat in zip(files, stats, strict=True)
        ]
        digest = hashlib.sha256(json.dumps(listing).encode()).hexdigest()
        self.identity = ["files", digest, text_field, by_group, split.identity]
        by_name: dict[str, int] = {}
        for (_, group), size in zip(files, self.sizes, strict=True):
            by_name[group] = by_name.get(group, 0) + size
        self.groups = {name: number for number, name in enumerate(by_name)}
        self.held_out = split.held_out_groups(by_name, fraction) if by_group else set()
        self._file = self._record = self._number = 0

    def read(self, state: Any = None) -> Iterator[Document]:
        self._file, skip, self._number = (0, 0, 0) if state is None else state
        self.done = sum(self.sizes[: self._file])
        while self._file < len(self.files):
            path, group = self.files[self._file]
            self._record = 0
            for text in _readable(path, self.text_field):
                self._record += 1
                if self._record <= skip:
                    continue
                number = self._number
                self._number += 1
                if self.by_group:
                    yield Document(text, self.groups[group], group in self.held_out)
                else:
                    yield Document(text, number, self.split.is_held_out(number))
            self.done += self.sizes[self._file]
            self._file, self._record, skip = self._file + 1, 0, 0

    def state(self) -> Any:
        return [self._file, self._record, self._number]


class HubDocuments(Documents):
    """The documents of a dataset that the ``datasets`` library can stream: a name on the Hub, or a folder.

    Args:
        name: what ``datasets.load_dataset`` takes.
        config: name of one of its configurations; "" for the default.
        part: of the dataset, such as "train".
        revision: a commit or tag; "" for the newest.
        text_field: the column that holds the text.
        split: which documents are held out.
    """

    total = None

    def __init__(self, name: str, config: str, part: str, revision: str, text_field: str, split: Split) -> None:
        self.name, self.config, self.part, self.revision = name, config, part, revision
        self.text_field, self.split = text_field, split
        self.identity = ["dataset", name, config, part, revision, text_field, split.identity]
        self._stream: Any = None
        self._number = 0

    def read(self, state: Any = None) -> Iterator[Document]:
        self._stream = self._open()
        self._number = 0
        if state is not None:
            self._stream.load_state_dict(state["stream"])
            self._number = state["number"]
        for record in self._records():
            if self.text_field not in record:
                raise ValueError(f"data.text_field: {self.name} has no {self.text_field!r}; it has {', '.join(record)}")
            text = _text(record[self.text_field], self.text_field, self.name)
            number = self._number
            self._number += 1
            self.done += len(text)
            yield Document(text, number, self.split.is_held_out(number))

    def state(self) -> Any:
        return {"stream": self._stream.state_dict(), "number": self._number}

    def _records(self) -> Iterator[Any]:
        try:
            yield from self._stream
        except OSError as error:  # the network
            raise CacheIncomplete(
                f"data.dataset: {self.name}: {error}. What was read counts: the same command goes on there"
            ) from error

    def _open(self) -> Any:
        import datasets

        try:
            return datasets.load_dataset(
                self.name, self.config or None, split=self.part, revision=self.revision or None, streaming=True
            )
        except (OSError, ValueError) as error:  # not found, no network, no such part
            raise ValueError(f"data.dataset: {self.name}: {' '.join(str(error).split())}") from error


class Chain(Documents):
    """One collection after another."""

    def __init__(self, parts: Sequence[Documents]) -> None:
        self.parts = parts
        self.identity = [part.identity for part in parts]
        known = [part.total for part in parts if part.total is not None]
        self.total = sum(known) if len(known) == len(parts) else None
        self._part = 0

    @property
    def done(self) -> int:  # type: ignore[override]
        return sum(part.done for part in self.parts)

    def read(self, state: Any = None) -> Iterator[Document]:
        self._part, inner = (0, None) if state is None else state
        for part in self.parts[: self._part]:
            part.done = part.total or 0
        while self._part < len(self.parts):
            yield from self.parts[self._part].read(inner)
            self._part, inner = self._part + 1, None

    def state(self) -> Any:
        # Behind the last part there is nothing to open.
        last = self._part >= len(self.parts)
        return [self._part, None if last else self.parts[self._part].state()]


def find_files(
    paths: Sequence[Path], include: Sequence[str], exclude: Sequence[str], *, key: str = "data.paths"
) -> list[tuple[Path, str]]:
    """Files, each with the name of its group, sorted within each path.

    A path that is a file is taken as it is and is a group of its own. Of a folder, the files that match a pattern of
    ``include`` and none of ``exclude``, relative to it; the group is the first folder under it, or the file itself.
    Groups are called NUMBER:NAME by the number of the path: the same wherever the paths lie.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: nothing matches.
    """
    found: dict[Path, str] = {}
    for number, path in enumerate(paths):
        if path.is_file():
            found.setdefault(path.resolve(), f"{number}:{path.name}")
            continue
        if not path.is_dir():
            raise FileNotFoundError(f"{key}: no file or folder {path}")
        excluded = {p for pattern in exclude for p in path.glob(pattern)}
        matched = {p for pattern in include for p in path.glob(pattern) if p.is_file()} - excluded
        for p in sorted(matched, key=lambda p: p.relative_to(path).parts):
            # A file under two of the paths is one file.
            found.setdefault(p.resolve(), f"{number}:{p.relative_to(path).parts[0]}")
    if not found:
        raise ValueError(f"{key}: no file in {[str(p) for p in paths]} matches {list(include)} without {list(exclude)}")
    groups = {name: n for n, name in enumerate(dict.fromkeys(found.values()))}
    return sorted(found.items(), key=lambda item: groups[item[1]])


def _readable(path: Path, text_field: str) -> Iterator[str]:
    try:
        yield from _texts(path, text_field)
    except (OSError, EOFError) as error:  # EOFError: a gzip file that was cut off
        raise ValueError(f"{path}: cannot be read: {error}") from error


def _texts(path: Path, text_field: str) -> Iterator[str]:
    """The documents of one file. Bytes that are no UTF-8 become U+FFFD."""
    name = path.name.lower()
    if name.endswith(".parquet"):
        yield from _parquet(path, text_field)
    elif name.endswith(_RECORDS):
        yield from _json_lines(path, text_field)
    else:
        reader: Callable[..., Any] = gzip.open if name.endswith(".gz") else open
        with reader(path, "rb") as file:
            yield file.read().decode(errors="replace")


def _json_lines(path: Path, text_field: str) -> Iterator[str]:
    reader: Callable[..., Any] = gzip.open if path.name.lower().endswith(".gz") else open
    with reader(path, "rt", encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: no JSON: {error}") from error
            if not isinstance(record, dict) or text_field not in record:
                has = ", ".join(record) if isinstance(record, dict) else type(record).__name__
                raise ValueError(f"{path}, line {number}: data.text_field: no {text_field!r}; it has {has}")
            yield _text(record[text_field], text_field, f"{path}, line {number}")


def _text(value: Any, text_field: str, where: str) -> str:
    """What a record holds; nothing is an empty text."""
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where}: data.text_field: {text_field!r} holds {type(value).__name__}, not text")
    return value or ""


def _parquet(path: Path, text_field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        file = parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: no Parquet: {' '.join(str(error).split())}") from error
    if text_field not in file.schema_arrow.names:
        raise ValueError(f"{path}: data.text_field: no {text_field!r}; it has {', '.join(file.schema_arrow.names)}")
    for batch in file.iter_batches(columns=[text_field]):
        for text in batch.column(0).to_pylist():
            yield _text(text, text_field, str(path))
