from dataclasses import replace

import pytest

from groktrace.analysis.trajectory import Trajectory
from groktrace.errors import SettingsError
from groktrace.reporting.comparison import comparison_table, save_comparison
from groktrace.reporting.series import Events, Series


@pytest.fixture
def two(grokked):
    """A run that groks, and one whose λ is flat, measured at another nβ."""
    flat = replace(Trajectory.from_arrays(range(0, 700, 100), [900.0] * 7, [5.0] * 7), nbeta=100.0)
    return [
        ("runs/a/seed0", *grokked),
        ("runs/a/seed1", Series.of(flat), Events.of(flat)),
    ]


def test_the_table_has_a_line_a_transition_and_names_the_runs_shortly(two):
    heading, rise, fall, none, *_ = comparison_table(two).splitlines()
    assert heading.split()[:3] == ["run", "transition", "label"]
    assert rise.split()[:3] == ["seed0", "complexification", "memorisation"]
    assert fall.split()[:3] == ["seed0", "simplification", "generalisation"]
    assert fall.endswith("600")
    assert none.split()[:2] == ["seed1", "none"]


def test_different_scales_are_named(two):
    assert "different nβ and γ (100, -; 30800, 424): steps compare, λ does not" in comparison_table(two)
    assert "different nβ" not in comparison_table([two[0], two[0]])


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_the_figure_is_drawn(two, tmp_path, suffix):
    path = tmp_path / f"figure{suffix}"
    save_comparison(two, path)
    assert path.stat().st_size > 5000
    if suffix == ".svg":
        assert path.read_text().count('<g id="line2d') > 4


def test_odd_runs_are_compared(odd, two, tmp_path):
    results = [("x", *odd), two[0]]
    assert "seed0" in comparison_table(results)
    save_comparison(results, tmp_path / "figure.png")


def test_other_files_are_refused(two, tmp_path):
    with pytest.raises(SettingsError, match=r"expected a file ending in \.png, \.pdf, \.svg"):
        save_comparison(two, tmp_path / "figure.txt")
