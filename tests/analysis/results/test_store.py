import json
import os
import shutil

import pytest

import groktrace
from groktrace.analysis.results.trajectory import Trajectory
from groktrace.errors import RunError
from groktrace.run import layout
from groktrace.run.files import read_json, read_tensors, write_json, write_tensors

FAST = {"draws": 20, "burn_in": 20}


def test_results_of_a_run_that_was_recorded_anew_are_neither_shown_nor_gone_on_from(small_run, tmp_path, record_like):
    place = record_like(small_run, tmp_path / "again", 0.1)
    groktrace.analyze(place, **FAST)
    left = shutil.copytree(place / "analysis", tmp_path / "left")
    shutil.rmtree(place)
    record_like(small_run, place, 0.3)
    info = json.loads((place / "run.json").read_text())
    write_json(place / "run.json", {**info, "created": "2001-01-01T00:00:00+00:00"})  # the clock has gone on
    fresh = groktrace.analyze(place, **FAST)
    shutil.rmtree(place / "analysis")
    shutil.copytree(left, place / "analysis")
    with pytest.raises(
        RunError, match=r"its results are of another recording, or of other data, .* 'groktrace analyze"
    ):
        groktrace.open_run(place).trajectory()
    found = groktrace.analyze(place, **FAST)
    assert found == fresh  # also nβ and γ
    assert groktrace.open_run(place).trajectory() == found


@pytest.mark.parametrize("change", ["data", "snapshot"])
def test_results_of_other_data_or_snapshots_are_not_shown(small_run, change):
    found = groktrace.analyze(small_run, **FAST)
    for name in ("program.json", "data.safetensors"):  # what is gone is no other
        (small_run / name).rename(small_run / f"{name}.away")
    assert groktrace.open_run(small_run).trajectory() == found
    for name in ("program.json", "data.safetensors"):
        (small_run / f"{name}.away").rename(small_run / name)
    if change == "data":
        tensors, _ = read_tensors(small_run / "data.safetensors")
        tensors["train.0"][0, 0] += 1
        write_tensors(small_run / "data.safetensors", tensors, {})
    else:
        weights = groktrace.open_run(small_run).snapshots[-1].load()
        weights["0.bias"][0] += 1
        write_tensors(layout.snapshot_path(small_run, 50), weights, {"step": "50"})
    with pytest.raises(RunError, match="its results are of another recording, or of other data"):
        groktrace.open_run(small_run).trajectory()


def test_a_copy_shows_what_the_run_shows(small_run, tmp_path):
    groktrace.analyze(small_run, **FAST, seed=3)
    latest = groktrace.analyze(small_run, **FAST)
    earlier = max(path for path in small_run.glob("analysis/*/trajectory.json") if not is_latest(path, latest))
    copy = shutil.copytree(small_run, tmp_path / "copy")
    for root in (small_run, copy):
        (touched,) = root.glob(f"analysis/{earlier.parent.name}/trajectory.json")
        os.utime(touched)  # as copying may do, in whatever order
        assert groktrace.open_run(root).trajectory() == latest
    # A run of before this was noted: by time.
    (copy / "analysis" / "latest.json").unlink()
    assert groktrace.open_run(copy).trajectory() != latest
    # Results that were removed.
    note = read_json(small_run / "analysis" / "latest.json")
    write_json(copy / "analysis" / "latest.json", {**note, "folder": "../run"})
    assert groktrace.open_run(copy).trajectory() != latest


def is_latest(path, latest):
    return Trajectory.load(path) == latest


@pytest.mark.parametrize("change", [[], {"folder": 3}, {"recorded": []}, {"recorded": {"a": 1}}, {"step": "3"}])
def test_a_damaged_note_of_the_last_result_is_named(small_run, change):
    groktrace.analyze(small_run, **FAST)
    path = small_run / "analysis" / "latest.json"
    write_json(path, change if isinstance(change, list) else {**read_json(path), **change})
    with pytest.raises(RunError, match=r"latest\.json: damaged"):
        groktrace.open_run(small_run).trajectory()


def test_the_last_finished_analysis_is_found(small_run):
    with pytest.raises(RunError, match="not analysed yet; run 'groktrace analyze"):
        groktrace.open_run(small_run).trajectory()
    groktrace.analyze(small_run, **FAST)
    latest = groktrace.analyze(small_run, **FAST, seed=3)
    assert groktrace.open_run(small_run).trajectory() == latest


def test_damaged_results_are_named(small_run):
    groktrace.analyze(small_run, **FAST)
    (folder,) = (small_run / layout.ANALYSIS_FOLDER).glob("*/")
    (folder / "settings.json").write_text("{}")
    with pytest.raises(RunError, match=r"settings\.json: damaged .* analyse again"):
        groktrace.analyze(small_run, **FAST)
