"""Token corpora: streams against documents tokenised one by one, the split, the cache, and what cannot be read."""

import gzip
import itertools
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from path_attention.data import Files, HubDataset, TokenCorpus, TokenData, Validation
from path_attention.data import token_cache as cache
from path_attention.data.documents import CacheIncomplete, Split
from path_attention.data.tokenizer import END_OF_TEXT, train_bpe

WORDS = ["def", "return", "class", "import", "self", "none", "true", "for", "while", "else", "print", "value"]


def text(n: int) -> str:
    """A document of its own length, with the name of the special token in some."""
    chosen = random.Random(n).choices(WORDS, k=10 + 3 * n)
    return " ".join(chosen) + (END_OF_TEXT if n % 4 == 0 else "") + f" {n}"


TEXTS = [text(n) for n in range(40)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(TEXTS, 300).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty files in eight folders."""
    for n, content in enumerate(TEXTS):
        path = tmp_path / "text" / f"folder{n // 5}" / f"{n:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return tmp_path / "text"


def data(folder: Path, tokenizer: Path, /, **changes: Any) -> TokenData:
    settings: dict[str, Any] = {
        "tokenizer": str(tokenizer),
        "files": Files(paths=(str(folder),)),
        "length": 32,
        "validation": Validation(fraction=0.25),
        "cache": str(folder.parent / "cache"),
    }
    return TokenData(**(settings | changes))


def decoded(corpus: TokenCorpus, split: cache.TokenSplit) -> list[str]:
    """A split's documents, from its tokens."""
    tokens, starts = corpus.cache.tokens[split], corpus.cache.starts[split]
    assert (tokens[starts] == corpus.tokenizer.bos_token_id).all()
    parts = np.split(np.asarray(tokens), starts[1:])
    return [corpus.tokenizer.decode([int(t) for t in part[1:]]) for part in parts]


def test_documents_come_back_each_on_its_side_of_the_split(folder: Path, tokenizer: Path) -> None:
    """What looks like the special token in a text is text: it comes back, and makes no boundary."""
    corpus = data(folder, tokenizer).open()
    split = Split("some", 0.25, 0)
    wanted = {
        "train": [t for n, t in enumerate(TEXTS) if not split.is_held_out(n)],
        "validation": [t for n, t in enumerate(TEXTS) if split.is_held_out(n)],
    }
    assert {s: decoded(corpus, s) for s in cache.SPLITS} == wanted
    assert len(wanted["validation"]) == 10  # one of every four in a row
    assert corpus.vocab_size == len(corpus.tokenizer) == 300


def test_windows_come_once_an_epoch_in_an_order_of_their_own(folder: Path, tokenizer: Path) -> None:
    corpus = data(folder, tokenizer).open()
    windows = corpus.windows("train")
    assert windows == corpus.tokens("train") // 32 > 20
    grid = [n * 32 for n in range(windows)]
    epochs = [[corpus.training_start(seed, e * windows + n) for n in range(windows)] for seed in (0, 1) for e in (0, 1)]
    assert all(sorted(epoch) == grid for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, grid]}) == 5
    # Any of them without those before it, in another process.
    again = data(folder, tokenizer).open()
    assert [again.training_start(1, n) for n in reversed(range(2 * windows))] == (epochs[2] + epochs[3])[::-1]
    stream = np.asarray(corpus.cache.tokens["train"])
    assert (corpus.read("train", epochs[0][3]) == stream[epochs[0][3] :][:32]).all()


def test_boundaries_are_where_documents_begin(folder: Path, tokenizer: Path) -> None:
    corpus = data(folder, tokenizer).open()
    for start in range(0, corpus.tokens("train") - 100, 7):
        tokens = corpus.read("train", start, 100)
        inner = [n for n in range(1, 100) if tokens[n] == corpus.tokenizer.bos_token_id]
        assert corpus.cache.document_bounds("train", start, 100).tolist() == [0, *inner, 100]


def test_folders_are_held_out_whole(folder: Path, tokenizer: Path) -> None:
    corpus = data(folder, tokenizer, validation=Validation(fraction=0.3, by="folder")).open()
    held_out = decoded(corpus, "validation")
    folders = {TEXTS.index(t) // 5 for t in held_out}
    assert held_out == [t for n, t in enumerate(TEXTS) if n // 5 in folders]
    total = sum(len(t.encode()) for t in TEXTS)
    assert 0 < sum(len(t.encode()) for t in held_out) <= 0.3 * total
    # Wherever the folders lie.
    moved = shutil.copytree(folder, folder.parent / "elsewhere" / "text")
    again = data(moved, tokenizer, validation=Validation(fraction=0.3, by="folder")).open()
    assert decoded(again, "validation") == held_out
    with pytest.raises(ValueError, match=r"data\.validation\.fraction: no folder is as small as 0\.001"):
        data(folder, tokenizer, validation=Validation(fraction=0.001, by="folder")).open()


def test_long_stretches_stay_within_a_group(folder: Path, tokenizer: Path) -> None:
    corpus = data(folder, tokenizer, validation=Validation(fraction=0.3, by="folder")).open()
    bounds = corpus.cache.group_bounds("validation")
    wanted = [first + n * 100 for first, last in itertools.pairwise(bounds) for n in range(int(last - first) // 100)]
    assert corpus.long_starts(100, 1000) == wanted
    assert len(corpus.long_starts(100, 2)) == 2
    with pytest.raises(ValueError, match=rf"wanted at most {np.diff(bounds).max()}.*got 100000"):
        corpus.long_starts(100_000, 1)


def write_as(kind: str, folder: Path) -> Path:
    """The documents of TEXTS in one file, or in a dataset of three."""
    folder.mkdir()
    if kind == "text":
        for n, content in enumerate(TEXTS):
            (folder / f"{n:02}.txt").write_text(content)
    elif kind == "jsonl":
        lines = [json.dumps({"id": n, "content": t}) for n, t in enumerate(TEXTS)]
        (folder / "all.jsonl").write_text("\n".join([*lines, ""]))
    elif kind == "jsonl.gz":
        with gzip.open(folder / "all.jsonl.gz", "wt") as file:
            file.writelines(json.dumps({"content": t}) + "\n" for t in TEXTS)
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        pyarrow = pytest.importorskip("pyarrow")
        for n in range(3):
            part = TEXTS[n * 14 : (n + 1) * 14]
            parquet.write_table(pyarrow.table({"content": part}), folder / f"train-{n}.parquet", row_group_size=5)
    return folder


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "dataset"])
def test_every_kind_of_file_holds_the_same_corpus(tmp_path: Path, tokenizer: Path, kind: str) -> None:
    plain = data(write_as("text", tmp_path / "text"), tokenizer).open()
    place = write_as("parquet" if kind == "dataset" else kind, tmp_path / kind)
    source: dict[str, Any] = {"files": Files(paths=(str(place),), text_field="content")}
    if kind == "dataset":
        pytest.importorskip("datasets")
        source = {"files": None, "dataset": HubDataset(name=str(place), text_field="content")}
    corpus = data(place, tokenizer, **source).open()
    for split in cache.SPLITS:
        np.testing.assert_array_equal(corpus.cache.tokens[split], plain.cache.tokens[split])
        np.testing.assert_array_equal(corpus.cache.starts[split], plain.cache.starts[split])


def interrupted_at(call: int, error: BaseException) -> Any:
    """Progress that ends the run when it is reported for the ``call``-th time."""
    calls = 0

    def of(name: str) -> Any:
        def report(done: int, total: int | None) -> None:
            nonlocal calls
            calls += 1
            if name == "tokenising" and calls == call:
                raise error

        return report

    return of


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few documents at a time, so that there are places to be interrupted at."""
    monkeypatch.setattr(cache, "BATCH_BYTES", 600)
    monkeypatch.setattr(cache, "COMMIT_SECONDS", -1.0)


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("kind", ["text", "jsonl", "dataset"])
@pytest.mark.parametrize("deduplicate", [False, True])
def test_interrupted_cache_goes_on_where_it_was(
    tmp_path: Path, tokenizer: Path, kind: str, deduplicate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every part of it is interrupted, and what was written without being counted is written anew."""
    place = write_as("parquet" if kind == "dataset" else kind, tmp_path / kind)
    source: dict[str, Any] = {"files": Files(paths=(str(place),), text_field="content"), "deduplicate": deduplicate}
    if kind == "dataset":
        pytest.importorskip("datasets")
        source |= {"files": None, "dataset": HubDataset(name=str(place), text_field="content")}
    whole = data(place, tokenizer, cache=str(tmp_path / "whole"), **source).open()
    tries = 0
    while True:
        # Every other batch only counts once the next one is there.
        monkeypatch.setattr(cache, "COMMIT_SECONDS", -1.0 if tries % 2 else 3600.0)
        try:
            corpus = data(place, tokenizer, **source).open(interrupted_at(2 + tries % 2, KeyboardInterrupt()))
            break
        except KeyboardInterrupt:
            tries += 1
            assert not list((tmp_path / "cache").glob("tokens-*[0-9a-f]"))  # nothing that looks whole
            assert tries < 60
    assert tries > 3
    assert corpus.cache.facts == whole.cache.facts
    for split in cache.SPLITS:
        np.testing.assert_array_equal(corpus.cache.tokens[split], whole.cache.tokens[split])
        np.testing.assert_array_equal(corpus.cache.starts[split], whole.cache.starts[split])
        np.testing.assert_array_equal(corpus.cache.groups[split], whole.cache.groups[split])


@pytest.mark.usefixtures("small_steps")
def test_full_disk_is_said_and_leaves_nothing_that_looks_whole(
    folder: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux has a device for it; the cache is written to it from the third batch on."""
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    original, batches = cache.Writer._write, 0

    def write(self: cache.Writer, batch: list[Any]) -> None:
        nonlocal batches
        batches += 1
        if batches == 3:
            self.files["train.tokens"] = full.open("wb")
        original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(cache.Writer, "_write", write)
        with pytest.raises(CacheIncomplete, match=r"No space left on device; .* tokens were read, .* MiB are free"):
            data(folder, tokenizer).open()
    root = folder.parent / "cache"
    assert [p.suffix for p in root.iterdir() if p.is_dir()] == [".partial"]
    assert sorted(decoded(data(folder, tokenizer).open(), "train")) == sorted(
        t for n, t in enumerate(TEXTS) if not Split("some", 0.25, 0).is_held_out(n)
    )


def test_cache_is_built_once_and_follows_what_it_is_made_of(folder: Path, tokenizer: Path) -> None:
    asked: list[str] = []

    def progress(name: str) -> Any:
        asked.append(name)
        return lambda done, total: None

    first = data(folder, tokenizer).open(progress)
    again = data(folder, tokenizer, length=16, packing="documents").open(progress)
    assert first.key == again.key
    assert asked == ["tokenising"]
    others = [
        {"validation": Validation(fraction=0.25, seed=1)},
        {"deduplicate": True},
        {"max_tokens": 500},
        {"tokenizer": "bpe", "vocab_size": 280},
    ]
    keys = {first.key, *(data(folder, tokenizer, **change).open().key for change in others)}
    (folder / "folder0" / "00.txt").write_text("another text " * 20)
    assert len(keys | {data(folder, tokenizer).open().key}) == 6


def test_damaged_cache_is_refused(folder: Path, tokenizer: Path) -> None:
    file = data(folder, tokenizer).open().cache.folder / "train.tokens"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(ValueError, match="the cache is damaged: delete"):
        data(folder, tokenizer).open()


def test_repeated_documents_are_left_out(folder: Path, tokenizer: Path) -> None:
    for n in (3, 8):
        (folder / "folder7" / f"copy{n}.txt").write_text(TEXTS[n])
    plain = data(folder, tokenizer).open()
    corpus = data(folder, tokenizer, deduplicate=True).open()
    assert corpus.cache.facts["repeated_documents"] == 2
    assert sorted(decoded(corpus, "train") + decoded(corpus, "validation")) == sorted(TEXTS)
    assert len(decoded(plain, "train") + decoded(plain, "validation")) == 42


@pytest.mark.usefixtures("small_steps")
def test_reading_ends_after_max_tokens_of_training(folder: Path, tokenizer: Path) -> None:
    corpus = data(folder, tokenizer, max_tokens=500).open()
    whole = data(folder, tokenizer).open()
    # At most a batch more: 600 characters are fewer tokens.
    assert 500 <= corpus.tokens("train") < 500 + 600 + 300
    np.testing.assert_array_equal(corpus.cache.tokens["train"], whole.cache.tokens["train"][: corpus.tokens("train")])


def test_validation_of_its_own(folder: Path, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_text("a text that is nowhere else " * 10)
    corpus = data(folder, tokenizer, validation=Validation(paths=(str(tmp_path / "held.txt"),)), max_tokens=10).open()
    assert decoded(corpus, "validation") == ["a text that is nowhere else " * 10]
    assert corpus.tokens("train") >= 10


def test_bpe_is_trained_without_what_is_held_out(folder: Path, tokenizer: Path) -> None:
    """A word that every held-out document repeats, and no other, gets no token of its own."""
    split = Split("some", 0.25, 0)
    for n in range(40):
        if split.is_held_out(n):
            (folder / f"folder{n // 5}" / f"{n:02}.txt").write_text("zyzzyva " * 200)
    corpus = data(folder, tokenizer, tokenizer="bpe", vocab_size=330).open()
    assert corpus.vocab_size == 330
    tokens = corpus.tokenizer.convert_ids_to_tokens(range(330))
    assert any("return" in t for t in tokens)
    assert not any("zyz" in t for t in tokens)
    assert "zyzzyva zyzzyva" in corpus.tokenizer.decode(corpus.read("validation", 0, 30))  # it is spelt, in bytes
    again = data(folder, tokenizer, tokenizer="bpe", vocab_size=330).open()
    assert again.tokenizer.get_vocab() == corpus.tokenizer.get_vocab()


def bad_documents(folder: Path) -> Iterator[tuple[str, Any, str]]:
    (folder / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    yield r"broken\.jsonl, line 2: no JSON", Files(paths=(str(folder / "broken.jsonl"),)), "x"
    (folder / "other.jsonl").write_text('{"content": "fine", "id": 3}\n')
    yield (
        r"other\.jsonl, line 1: data\.text_field: no 'text'; it has content, id",
        Files(paths=(str(folder / "other.jsonl"),)),
        "x",
    )
    (folder / "number.jsonl").write_text('{"text": null}\n{"text": 3}\n')  # nothing is an empty text
    yield r"number\.jsonl, line 2: .* 'text' holds int, not text", Files(paths=(str(folder / "number.jsonl"),)), "x"
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 100)[:-20])
    yield r"cut\.jsonl\.gz: cannot be read", Files(paths=(str(folder / "cut.jsonl.gz"),)), "x"
    (folder / "no.parquet").write_bytes(b"no parquet at all")
    yield r"no\.parquet: no Parquet", Files(paths=(str(folder / "no.parquet"),)), "pyarrow"
    (folder / "empty.txt").touch()
    yield (
        "validation documents hold 0 tokens|train documents hold 0 tokens",
        Files(paths=(str(folder / "empty.txt"),)),
        "x",
    )
    yield (
        r"data\.files\.paths: no file in .* matches \['\*\.rst'\]",
        Files(paths=(str(folder),), include=("*.rst",)),
        "",
    )


def test_what_cannot_be_read_is_said(folder: Path, tokenizer: Path) -> None:
    bad = folder.parent / "bad"
    bad.mkdir()
    for message, files, needs in bad_documents(bad):
        if needs == "pyarrow":
            pytest.importorskip("pyarrow")
        with pytest.raises(ValueError, match=message):
            data(folder, tokenizer, files=files).open()
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        data(folder / "missing", tokenizer).open()
    with pytest.raises(ValueError, match=r"data\.tokenizer: no tokenizer"):
        data(folder, folder / "nowhere").open()
    with pytest.raises(ValueError, match=r"hold .* tokens, fewer than one sequence of 5000"):
        data(folder, tokenizer, length=5000).open()


def test_dataset_that_is_not_there_is_named(folder: Path, tokenizer: Path) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(ValueError, match=r"data\.dataset: .*nowhere"):
        data(folder, tokenizer, files=None, dataset=HubDataset(name=str(folder / "nowhere"))).open()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"files": None}, "files: wanted files or dataset, got neither"),
        ({"dataset": HubDataset(name="x")}, "files: wanted files or dataset, got both"),
        ({"length": 1}, "length"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"vocab_size": 300}, "vocab_size: wanted nothing"),
        ({"tokenizer": "bpe"}, "vocab_size: wanted the size of the BPE"),
        ({"tokenizer": "bpe", "vocab_size": 256}, "vocab_size: wanted at least 257"),
        ({"validation": Validation(split="test")}, r"validation\.split"),
        (
            {"files": None, "dataset": HubDataset(name="x"), "validation": Validation(paths=("x",))},
            r"validation\.paths",
        ),
        ({"files": None, "dataset": HubDataset(name="x"), "validation": Validation(by="folder")}, r"validation\.by"),
    ],
)
def test_settings_that_do_not_fit_are_named(
    folder: Path, tokenizer: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"^data\.{message}"):
        data(folder, tokenizer, **change)


def test_parts_of_the_settings_that_do_not_fit_are_named() -> None:
    for message, make in {
        r"data\.files\.paths": lambda: Files(paths=()),
        r"data\.files\.paths: only": lambda: Files(paths=("${home}/x",)),
        r"data\.validation\.fraction": lambda: Validation(fraction=1.0),
    }.items():
        with pytest.raises(ValueError, match=message):
            make()
