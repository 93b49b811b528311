import sys

import pytest

from groktrace.errors import GroktraceError, SettingsError
from groktrace.reporting.figures import save_figure, shown_curve, trajectory_figure


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")])
def test_files_of_every_kind(grokked, tmp_path, suffix, start):
    path = tmp_path / f"figure{suffix}"
    save_figure(*grokked, path)
    assert path.read_bytes().startswith(start)


def test_other_kinds_of_file_are_refused(grokked, tmp_path):
    with pytest.raises(SettingsError, match=r"output: expected a file ending in \.png, \.pdf, \.svg, got .*\.gif"):
        save_figure(*grokked, tmp_path / "figure.gif")


def test_without_matplotlib_the_extra_is_named(grokked, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(GroktraceError, match=r"figures need matplotlib: pip install 'groktrace\[plot\]'"):
        save_figure(*grokked, tmp_path / "figure.png")


def test_odd_trajectories_can_be_drawn(odd, tmp_path):
    save_figure(*odd, tmp_path / "figure.png")


def test_unreliable_points_neither_set_the_axis_nor_look_reliable(grokked):
    value, _ = shown_curve(grokked[0])
    assert value[0] == 139  # λ_c, not λ̂ = −3125
    assert value[-1] == 836
    upper = trajectory_figure(*grokked).axes[0]
    assert upper.get_ylim()[0] > -100
    filled, hollow = (line for line in upper.lines if line.get_marker() == "o")
    assert len(hollow.get_xdata()) == 3
    assert hollow.get_markerfacecolor() == "white"
    assert len(filled.get_xdata()) == 9


def test_transitions_are_named_in_the_figure(grokked):
    trajectory, transitions, grokking = grokked
    texts = [text.get_text() for text in trajectory_figure(trajectory, transitions, grokking).axes[0].texts]
    assert texts[1] == f"generalisation: λ {transitions[1].delta_llc:+.0f} at step {transitions[1].step}"
