"""Several processes train the model that one trains."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from path_attention.training.run import train
from path_attention.training.trainer import METRICS, read_metrics
from tests.training.tiny import TINY, tiny


@pytest.mark.slow
def test_two_processes_share_the_batch_of_one(tmp_path: Path) -> None:
    """batch_size counts the sequences of all processes; sums in another order differ by rounding.

    Five steps only: training multiplies rounding errors.
    """
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY))
    changes = ["training.steps=5", "training.log_every=1", "training.eval_every=5"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, "-m", "path_attention.cli", "train", str(file), *changes, "--runs", str(tmp_path / "two")]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("report: ") == 1  # one process speaks
    alone = train(tiny(*changes), tmp_path / "one")[0]
    shared = read_metrics(tmp_path / "two" / "tiny" / "path" / METRICS)
    expected = read_metrics(alone.folder / METRICS)
    assert [e.keys() for e in shared] == [e.keys() for e in expected]
    for a, b in zip(shared, expected, strict=True):
        assert a["step"] == b["step"]
        if "loss" in b:
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    assert json.loads((tmp_path / "two/tiny/path/evaluation.json").read_text())["facts"]["steps"] == 5
