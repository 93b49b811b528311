from dataclasses import replace

import pytest

import groktrace
from groktrace.analysis.results.trajectory import Trajectory
from groktrace.errors import RunError, SettingsError
from groktrace.reporting.comparison import Comparison, compare
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
    heading, rise, fall, none, *_ = Comparison(tuple(two)).table().splitlines()
    assert heading.split()[:3] == ["run", "transition", "label"]
    assert rise.split()[:3] == ["seed0", "complexification", "memorisation"]
    assert fall.split()[:3] == ["seed0", "simplification", "generalisation"]
    assert fall.endswith("600")
    assert none.split()[:2] == ["seed1", "none"]


def test_different_scales_are_named(two):
    assert "different nβ and γ (100, -; 30800, 424): steps compare, λ does not" in Comparison(tuple(two)).table()
    assert "different nβ" not in Comparison((two[0], two[0])).table()


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_the_figure_is_drawn(two, tmp_path, suffix):
    path = tmp_path / f"figure{suffix}"
    Comparison(tuple(two)).plot(path)
    assert path.stat().st_size > 5000
    if suffix == ".svg":
        assert path.read_text().count('<g id="line2d') > 4


def test_odd_runs_are_compared(odd, two, tmp_path):
    results = [("x", *odd), two[0]]
    assert "seed0" in Comparison(tuple(results)).table()
    Comparison(tuple(results)).plot(tmp_path / "figure.png")


def test_other_files_are_refused(two, tmp_path):
    with pytest.raises(SettingsError, match=r"expected a file ending in \.png, \.pdf, \.svg"):
        Comparison(tuple(two)).plot(tmp_path / "figure.txt")


def test_runs_their_paths_and_trajectories_are_compared_alike(small_run):
    found = groktrace.analyze(small_run, draws=20, burn_in=20)
    elsewhere = Trajectory.from_arrays([0, 10], [9.0, 4.0], [0.1, 0.1])
    compared = compare(small_run, str(small_run), groktrace.open_run(small_run), found, elsewhere)
    assert [name for name, *_ in compared.results] == 4 * [str(small_run)] + ["trajectory 5"]
    assert all(series.trajectory == found for _, series, _ in compared.results[:4])
    assert compared.to_dict()["runs"].keys() == {str(small_run), "trajectory 5"}
    assert str(compared) == compared.table()
    assert len(compared.plot().axes) == 3
    dropped = compare(elsewhere, detector=groktrace.LargestDropDetector())
    (drop,) = dropped.results[0][2].transitions
    assert (drop.llc_before, drop.llc_after) == (9.0, 4.0)
    with pytest.raises(SettingsError, match="expected one at least"):
        compare()
    with pytest.raises(RunError, match="no such directory"):
        compare(small_run, small_run / "nowhere")
