"""The tour of the peer's notebooks: all nine, and errors that are of exact values."""

import csv
import importlib.util
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "devinterp_tour.py"
pytest.importorskip("sklearn")


def test_the_integral_is_known_where_a_weight_is_alone():
    example = runpy.run_path(str(SCRIPT))
    # w₂ is in a bowl: λ̂ = ½h/(h + γ/nβ), and L = c·w² has h = 2c.
    exact = example["Crossing"](0, 1).exact(4.0, 145.0, 1.0)
    assert exact == pytest.approx(0.5 * 8 / (8 + 1 / 145), rel=1e-3)


def test_small_form(perform, tmp_path):
    perform("devinterp_tour")
    rows = list(csv.DictReader((tmp_path / "devinterp_tour.csv").read_text().splitlines()))
    assert len({row["notebook"] for row in rows}) == 9
    for row in rows:
        if row["limit"] and row["notebook"] == "normal_crossing":
            assert float(row["ours"]) == pytest.approx(float(row["reference"]), rel=0.3)
        assert ("theirs" in row) == (importlib.util.find_spec("devinterp") is not None)
    assert (tmp_path / "devinterp_tour.png").stat().st_size > 5_000
