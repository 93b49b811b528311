"""Weights & Biases: offline runs of the real client, read back from its own files."""

import json
import math
import shutil
import struct
import sys
import time
import types
import zlib
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

import groktrace
from groktrace.analysis.results.trajectory import Trajectory
from groktrace.cli import main
from groktrace.errors import GroktraceError
from groktrace.reporting.series import Events, Series
from groktrace.reporting.wandb import MARK, WandbReporter

wandb = pytest.importorskip("wandb", reason="wandb is not installed")


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """The folder of the client, which reads its variables once."""
    folder = tmp_path_factory.mktemp("client")
    wandb.teardown()  # others may have used it
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(folder), "WANDB_SILENT": "true"}.items():
            patch.setenv(name, value)
        yield folder / "wandb"
        wandb.teardown()


@pytest.fixture(autouse=True)
def folder(client):
    """The same, with no runs."""
    for path in client.glob("offline-run-*"):
        shutil.rmtree(path)
    return client


def records_of(path):
    """The records of a .wandb file so far: LevelDB's log, of blocks of 32 KiB, after a header of seven bytes.

    What another process is still writing ends where a part's checksum fails.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, []
    while at < len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        if len(data) < at + 7:
            break
        checksum, length, kind = struct.unpack("<IHB", data[at : at + 7])
        part = data[at + 7 : at + 7 + length]
        if not kind or zlib.crc32(data[at + 6 : at + 7] + part) != checksum:
            break
        parts.append(part)
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


def finished(folder):
    """The records of each run, all there: the client returns before its other process has written the last ones."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        runs = {path: list(records_of(path)) for path in folder.glob("offline-run-*/*.wandb")}
        ended = [any(record.WhichOneof("record_type") == "exit" for record in records) for records in runs.values()]
        if ended and all(ended) and len(ended) == len(list(folder.glob("offline-run-*"))):
            return runs
        time.sleep(0.02)
    raise TimeoutError(sorted(folder.rglob("*")))


def read(folder):
    """Folder, run, history by step, and summary of the only run there."""
    ((path, records),) = finished(folder).items()
    runs, history, summary = [], {}, {}
    for record in records:
        match record.WhichOneof("record_type"):
            case "run":
                runs.append(record.run)
            case "history":
                found = {
                    "/".join(each.nested_key) or each.key: json.loads(each.value_json) for each in record.history.item
                }
                history.setdefault(found.pop("_step"), {}).update(found)
            case "summary":
                summary |= {each.key: json.loads(each.value_json) for each in record.summary.update}
    return path.parent, runs[0], history, summary


def test_what_is_logged_is_what_there_is(grokked, tmp_path, folder):
    series, events = grokked
    place = tmp_path / "run"
    place.mkdir()
    WandbReporter("grokking").report(series, events, place)
    kept, run, history, summary = read(folder)
    assert (run.project, run.display_name) == ("grokking", "run")
    seen = 0
    for quantity in series:
        for tag, column in quantity.charts().items():
            for step, value in zip(series.steps.tolist(), column.tolist(), strict=True):
                if math.isfinite(value):
                    assert history[step][tag] == value, (step, tag)
                    seen += 1
                else:
                    assert tag not in history.get(step, {})
    assert seen > 100
    assert {"grokking/llc", "llc/lower", "llc/upper", "llc/stderr", "learning/train_loss", "logged/lr"} <= history[
        150
    ].keys()

    rise, fall = events.transitions
    marks = {(step, tag): value for step, row in history.items() for tag, value in row.items() if tag.startswith(MARK)}
    curve = series["curve"].values
    assert marks == {
        (each.step, MARK + each.label): pytest.approx(np.interp(each.step, series.steps, curve))
        for each in (rise, fall)
    }
    assert history.keys() == {*series.steps.tolist(), rise.step, fall.step}

    (table,) = (kept / "files").rglob("*.table.json")
    found = json.loads(table.read_text())
    rows = [dict(zip(found["columns"], row, strict=True)) for row in found["data"]]
    assert rows == [json.loads(json.dumps(each.to_dict())) for each in events.transitions]
    (image,) = (kept / "files").rglob("trajectory*.png")
    assert image.read_bytes().startswith(b"\x89PNG")
    assert history[3000]["trajectory/path"] == image.relative_to(kept / "files").as_posix()
    config = {each.key: json.loads(each.value_json) for each in run.config.update}
    plain = series.trajectory.to_dict()
    assert {name: config[name] for name in ("nbeta", "localization", "n", "method", "run")} == {
        name: plain[name] for name in ("nbeta", "localization", "n", "method", "run")
    }
    assert "points" not in config
    assert summary["generalised_at"] == events.grokking.generalised_at


def test_logging_again_replaces(grokked, tmp_path, folder):
    series, _ = grokked
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    WandbReporter("grokking").report(*grokked, one)
    first = read(folder)[1].run_id
    fewer = replace(series.trajectory, points=series.trajectory.points[:3])
    WandbReporter("grokking").report(Series.of(fewer), Events.of(fewer), one)
    _, run, history, _ = read(folder)
    assert run.run_id == first
    assert history.keys() == {0, 50, 100}
    WandbReporter("grokking").report(*grokked, other)
    assert len(finished(folder)) == 2
    (other / "run.json").write_text('{"created": "2026-01-01"}')  # another recording in the same place
    WandbReporter("grokking").report(*grokked, other)
    assert len(finished(folder)) == 3


@pytest.mark.parametrize("resume", [None, "must"])
def test_nothing_is_resumed_whatever_the_script_does(grokked, tmp_path, folder, monkeypatch, resume):
    monkeypatch.setattr(wandb.setup().settings, "resume", resume)  # what WANDB_RESUME sets when the client starts
    plain, asked = wandb.init, []

    def noting(**given):
        asked.append(plain(**given))
        return asked[-1]

    monkeypatch.setattr(wandb, "init", noting)
    WandbReporter("grokking").report(*grokked, tmp_path)
    assert [(run.settings.resume, run.resumed) for run in asked] == [(None, False)]
    assert wandb.setup().settings.resume == resume
    _, run, history, _ = read(folder)
    assert (run.resumed, run.starting_step) == (False, 0)
    assert min(history) == 0


def test_odd_results_are_logged(odd, tmp_path, folder):
    if len(odd[0].steps) > 50:
        pytest.skip("takes longer, and is like the others")
    WandbReporter("grokking").report(*odd, tmp_path)
    _, _, history, _ = read(folder)
    known = int(np.isfinite(odd[0]["curve"].values).sum())
    assert sum("grokking/llc" in row for row in history.values()) == known


def test_a_run_of_the_script_s_own_goes_on(grokked, tmp_path, folder):
    with wandb.init(project="mine", settings=wandb.Settings(console="off")) as own:
        WandbReporter("grokking").report(*grokked, tmp_path)
        assert wandb.run is own
        own.log({"loss": 1.0})
    assert len(finished(folder)) == 2


def test_the_command_line_logs_what_analyze_finds(small_run, folder):
    fast = ["--draws", "20", "--burn-in", "20"]
    result = CliRunner().invoke(main, ["analyze", str(small_run), "--wandb", "grokking", "--csv", "--json", *fast])
    assert result.exit_code in (0, 3), result.output
    found = json.loads(result.stdout)
    _, run, history, _ = read(folder)
    assert run.display_name == small_run.name
    assert {step: row["llc/raw"] for step, row in history.items() if "llc/raw" in row} == {
        each["step"]: each["llc"] for each in found["trajectory"]
    }
    (table,) = small_run.glob("analysis/*/trajectory.csv")
    assert table.with_suffix(".json").exists()
    assert table.read_text() == CliRunner().invoke(main, ["show", str(small_run), "--csv"]).stdout
    assert f"table: {table}" in result.stderr


def test_what_the_client_refuses_is_one_line(grokked, tmp_path, monkeypatch):
    def refuse(**_):
        raise wandb.errors.UsageError("No API key configured")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(GroktraceError, match=r"Weights & Biases: No API key configured\. Results are kept"):
        WandbReporter("grokking").report(*grokked, tmp_path)


@pytest.mark.parametrize("module", [None, types.ModuleType("wandb")], ids=["missing", "a folder of that name"])
def test_a_missing_client_is_told_before_the_work(small_run, monkeypatch, module):
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(GroktraceError, match=r"the client is missing; pip install 'groktrace\[wandb\]'"):
        groktrace.WandbReporter("grokking")
    result = CliRunner().invoke(main, ["analyze", str(small_run), "--wandb", "grokking"])
    assert result.exit_code == 1
    assert "the client is missing" in result.stderr
    assert not (small_run / "analysis").exists()


def test_a_curve_of_no_run_is_logged_too(tmp_path, folder):
    trajectory = Trajectory.from_arrays([0, 10], [9.0, 4.0], [0.1, 0.1])
    WandbReporter("grokking").report(Series.of(trajectory), Events.of(trajectory), tmp_path)
    assert read(folder)[2][10]["grokking/llc"] == 4.0
