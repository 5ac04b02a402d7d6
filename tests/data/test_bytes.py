"""Byte corpora: windows against a plain concatenation, the split by file, the cache, and what cannot be read."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from path_attention.data import ByteCorpus, ByteData
from path_attention.data.bytes import SEPARATOR


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve files of different lengths, one empty, one in a subfolder, one of another kind."""
    text = tmp_path / "text"
    (text / "sub").mkdir(parents=True)
    for n in range(10):
        (text / f"{n}.txt").write_bytes(bytes([65 + n]) * (7 * n + 3))
    (text / "empty.txt").touch()
    (text / "sub" / "deep.txt").write_bytes(bytes(range(256)))
    (text / "other.md").write_text("not wanted")
    return text


def data(folder: Path, **changes: object) -> ByteData:
    settings = {"path": str(folder), "length": 16, "validation_fraction": 0.3, "cache": str(folder.parent / "cache")}
    return ByteData(**(settings | changes))  # type: ignore[arg-type]


def stream(corpus: ByteCorpus, folder: Path, split: str) -> list[int]:
    """A split's tokens, the plain way."""
    return [t for name in corpus.files[split] for t in (SEPARATOR, *(folder / name).read_bytes())]  # type: ignore[index]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_windows_are_stretches_of_the_files_behind_each_other(folder: Path, split: str) -> None:
    corpus = data(folder).open()
    expected = stream(corpus, folder, split)
    assert corpus.tokens(split) == len(expected)  # type: ignore[arg-type]
    for start in range(len(expected) - corpus.length + 1):
        assert corpus.read(split, start).tolist() == expected[start : start + corpus.length]  # type: ignore[arg-type]


def test_files_are_divided_and_stay_where_they_are_when_others_come(folder: Path) -> None:
    files = data(folder).open().files
    assert not set(files["train"]) & set(files["validation"])
    assert len(files["train"]) + len(files["validation"]) == 12
    assert len(files["validation"]) == 4  # round(0.3 * 12)
    assert data(folder, split_seed=1).open().files != files
    (folder / "new.txt").write_text("more")
    grown = data(folder).open().files
    # One more file moves at most one other across the border.
    assert len(set(files["validation"]) - set(grown["validation"])) <= 1


def test_patterns(folder: Path) -> None:
    names = {p.name for p in data(folder, include=("*.txt", "*.md"), exclude=("[0-4].txt",)).files()}
    assert names == {"5.txt", "6.txt", "7.txt", "8.txt", "9.txt", "empty.txt", "other.md"}


def test_training_windows_depend_on_seed_and_number_alone(folder: Path) -> None:
    first, second = data(folder).open(), data(folder).open()
    windows = [first.training_window(0, n) for n in range(30)]
    for n in reversed(range(30)):
        np.testing.assert_array_equal(second.training_window(0, n), windows[n])
    assert any((first.training_window(1, n) != windows[n]).any() for n in range(30))


def test_validation_windows_do_not_overlap_and_reach_the_end(folder: Path) -> None:
    corpus = data(folder).open()
    available = corpus.tokens("validation") // corpus.length
    for wanted in (1, 3, available, available + 100):
        starts = corpus.validation_starts(wanted)
        assert len(starts) == min(wanted, available)
        assert all(b - a >= corpus.length for a, b in itertools.pairwise(starts))
        assert starts[-1] + corpus.length <= corpus.tokens("validation")


def test_cache_is_built_once_and_follows_the_files(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    data(folder).open(lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == sum(p.stat().st_size for p in folder.glob("**/*.txt"))
    before = len(seen)
    data(folder).open(lambda done, total: seen.append((done, total)))
    assert len(seen) == before
    (folder / "3.txt").write_text("changed")
    corpus = data(folder).open(lambda done, total: seen.append((done, total)))
    assert len(seen) > before
    assert corpus.tokens("train") == len(stream(corpus, folder, "train"))


def test_interrupted_cache_leaves_nothing(folder: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data(folder).open(interrupt)
    assert list((folder.parent / "cache").iterdir()) == []
    corpus = data(folder).open()
    assert corpus.tokens("train") == len(stream(corpus, folder, "train"))


def test_what_cannot_be_read_is_said(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder"):
        data(folder / "missing").open()
    with pytest.raises(ValueError, match=r"no file in .* matches \['\*\.rst'\]"):
        data(folder, include=("*.rst",)).open()
    with pytest.raises(ValueError, match="at least 2 files"):
        data(folder, include=("3.txt",)).open()
    with pytest.raises(ValueError, match=r"hold \d+ tokens, fewer than one window of 5000"):
        data(folder, length=5000).open()
    for change in ({"length": 1}, {"validation_fraction": 1.0}, {"include": ()}, {"path": "${home}/x"}):
        with pytest.raises(ValueError, match=f"data.{next(iter(change))}"):
            data(folder, **change)


def test_standard_library_is_found() -> None:
    files = ByteData(path="${stdlib}", include=("json/*.py",)).files()
    assert "decoder.py" in {p.name for p in files}
