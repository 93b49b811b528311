import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from groktrace.reporting.tensorboard import write_events


def read(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return accumulator


def scalars(folder, tag):
    return [(event.step, event.value) for event in read(folder).Scalars(tag)]


def test_curves_hold_what_was_measured(grokked, tmp_path):
    write_events(*grokked, tmp_path)
    mean = scalars(tmp_path / "trajectory", "llc/mean")
    assert mean[0] == (0, 139)  # λ_c, where λ̂ is not reliable
    assert mean[-1] == (3000, 836)
    assert scalars(tmp_path / "trajectory", "llc/raw")[0] == (0, -3125)
    assert scalars(tmp_path / "trajectory", "llc/upper")[-1] == (3000, pytest.approx(836 + 1.96 * 6))
    assert scalars(tmp_path / "trajectory", "accuracy/val")[5] == (300, pytest.approx(0.62))
    assert scalars(tmp_path / "trajectory", "logged/lr")[0] == (0, pytest.approx(0.003))
    tags = read(tmp_path / "trajectory").Tags()
    assert "sampler/virial" in tags["scalars"]
    assert "sampler/distance" not in tags["scalars"]  # never known
    assert tags["images"] == ["trajectory"]
    assert {"transitions/text_summary", "settings/text_summary"} <= set(tags["tensors"])


def test_each_transition_is_a_line_in_the_same_chart(grokked, tmp_path):
    trajectory, transitions, grokking = grokked
    write_events(trajectory, transitions, grokking, tmp_path)
    fall = transitions[1]
    line = scalars(tmp_path / f"generalisation at {fall.step} ({fall.step_low}-{fall.step_high})", "llc/mean")
    steps, values = zip(*line, strict=True)
    assert list(steps) == list(range(fall.step, fall.step + len(line)))
    assert values[0] == 139
    assert set(values[1:]) == {1340.0} or set(values[1:]) == {1301.0}
    assert len(values) >= 8


def test_the_band_is_a_margin_chart(grokked, tmp_path):
    write_events(*grokked, tmp_path)
    (event,) = read(tmp_path / "trajectory").Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    (series,) = layout.category[0].chart[0].margin.series
    assert (series.value, series.lower, series.upper) == ("llc/mean", "llc/lower", "llc/upper")


def test_the_table_of_transitions_is_text(grokked, tmp_path):
    write_events(*grokked, tmp_path)
    (event,) = read(tmp_path / "trajectory").Tensors("transitions/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert "| simplification | generalisation |" in text


def test_writing_again_replaces_and_spares_what_others_wrote(grokked, tmp_path):
    trajectory, transitions, grokking = grokked
    other = tmp_path / "mine" / "events.out.tfevents.1"
    other.parent.mkdir()
    other.write_text("keep")
    beside = tmp_path / "trajectory" / "notes.txt"
    write_events(trajectory, transitions, grokking, tmp_path)
    beside.write_text("keep")
    write_events(trajectory, [], grokking, tmp_path)
    assert len(scalars(tmp_path / "trajectory", "llc/mean")) == 12
    assert other.read_text() == beside.read_text() == "keep"
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "trajectory", "groktrace.json"}


def test_the_list_of_own_folders_cannot_lead_elsewhere(grokked, tmp_path):
    outside = tmp_path / "outside" / "events.out.tfevents.1"
    outside.parent.mkdir()
    outside.write_text("keep")
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "link").symlink_to(outside.parent)
    (logs / "groktrace.json").write_text('["../outside", "link", 7]')
    write_events(*grokked, logs)
    assert outside.read_text() == "keep"


def test_without_matplotlib_all_but_the_figure_is_written(grokked, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write_events(*grokked, tmp_path)
    assert read(tmp_path / "trajectory").Tags()["images"] == []


def test_odd_trajectories_are_written(odd, tmp_path):
    write_events(*odd, tmp_path)
    assert (tmp_path / "trajectory").is_dir()
