"""Numbers as text: no rate above zero may read as zero, and zero says out of how many."""

from pathlib import Path

import pytest

from path_attention.evaluation import plots
from path_attention.evaluation.tables import percent, show
from path_attention.training.run import Run
from path_attention.training.source import Measurement


@pytest.mark.parametrize(
    "rate, text",
    [(0.0, "0 %"), (1e-6, "0.0001 %"), (0.0001, "0.01 %"), (0.069, "6.9 %"), (0.403, "40.3 %"), (1.0, "100.0 %")],
)
def test_percent(rate: float, text: str) -> None:
    assert percent(rate) == text


def test_measurements_say_what_they_rest_on() -> None:
    assert show(Measurement(0.0, "error rate", 20_046, 5_000, 0)) == "0 % (0 of 20,046)"
    assert show(Measurement(2.1044, "bits per byte", 131_072, 256)) == "2.104 (131,072 bytes)"


def test_error_rate_plot_copes_with_exact_zeros() -> None:
    """On a log axis: no bar, the count in words, and a line to the end of the rate's confidence interval."""
    zero, some = Measurement(0.0, "error rate", 3000, 10, 0), Measurement(0.25, "error rate", 3000, 10, 750)
    runs = [Run(Path("none"), "path", {"sparse": zero}, {}), Run(Path("none"), "rope", {"sparse": some}, {})]
    axis = plots.error_rates(runs, {"PaTH": [0.0], "RoPE": [0.403]}).axes[0]
    assert [t.get_text() for t in axis.texts] == ["0 of 3,000", "25.0 %", "0 %", "40.3 %"]
    assert len(axis.patches) == 2  # a bar for each rate above zero
    (line,) = axis.collections
    assert line.get_paths()[0].vertices[:, 0].max() == pytest.approx(3 / 3000)  # type: ignore[union-attr]
