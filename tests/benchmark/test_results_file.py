"""Files of results: what is no such file is refused by name, before anything is measured, and never overwritten."""

from pathlib import Path
from typing import Any

import pytest

from path_attention.benchmark import results_file
from path_attention.benchmark.decode import run_decode_benchmark
from path_attention.benchmark.operator import run_operator_benchmark

FRESH: dict[str, Any] = {"benchmark": "some", "commit": "abc", "options": {"repeats": 2}, "rows": []}
KEYS = ("benchmark", "commit", "options")


def test_what_is_written_is_continued(tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder" / "some.json"
    assert results_file.resume(FRESH, out, KEYS) == FRESH
    found = FRESH | {"rows": [1, 2]}
    results_file.write(found, out)
    assert results_file.resume(FRESH, out, KEYS) == found
    assert [file.name for file in out.parent.iterdir()] == ["some.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ('{"benchmark": "some", "rows": [', "is not JSON"),  # cut off
        (b"\xff\xfe\x00", "is not JSON"),
        ("[]", "has no results"),
        ('{"benchmark": "other"}', "results of benchmark other, not some"),
        ('{"benchmark": "some", "commit": "abc", "options": {"repeats": 2}}', "has no rows"),
        ('{"benchmark": "some", "commit": "abc", "options": {"repeats": 2}, "rows": null}', "has no rows"),
    ],
)
def test_a_damaged_file_is_refused_by_name_and_stays(text: str | bytes, message: str, tmp_path: Path) -> None:
    out = tmp_path / "some.json"
    out.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = out.read_bytes()
    with pytest.raises(FileExistsError, match=f"--out: .*some.json.*{message}.*name another file"):
        results_file.resume(FRESH, out, KEYS)
    assert out.read_bytes() == before


def test_a_place_for_no_file_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("path_attention.benchmark.operator.check_contenders", measured)
    monkeypatch.setattr("path_attention.benchmark.decode.check_steps", measured)
    file = tmp_path / "file"
    file.touch()
    for out, message in ((tmp_path, "got the folder"), (file / "x.json", "file is none")):
        with pytest.raises(ValueError, match=f"--out: wanted a file.*{message}"):
            run_operator_benchmark(lengths=(70,), out=out)
        with pytest.raises(ValueError, match=f"--out: wanted a file.*{message}"):
            run_decode_benchmark(shapes=["1x8x1x8"], model=None, out=out)
        with pytest.raises(ValueError, match=f"--plot: wanted a file.*{message}"):
            run_decode_benchmark(shapes=["1x8x1x8"], model=None, plot=out)
