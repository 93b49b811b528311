import importlib
import json
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from groktrace.analysis.forecast import Forecast
from groktrace.cli import main


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_forecast_is_text_or_json_and_writes_nothing(small_run):
    before = contents(small_run)
    command = ["forecast", str(small_run), "--chains", "2", "--draws", "15", "--burn-in", "10"]
    said = CliRunner().invoke(main, command)
    assert said.exit_code == 0, said.output
    for expected in (
        "snapshots  6",
        "chains     2 a snapshot, 67 weights each",
        "over 6 snapshots that were tried",
        "time",
    ):
        assert expected in said.stdout
    assert "trying a few snapshots: 1 done in" in said.stderr
    found = json.loads(CliRunner().invoke(main, [*command, "--json"]).stdout)
    assert (found["snapshots"], found["chains"], found["steps"]) == (6, 2, 25)
    assert contents(small_run) == before


def test_the_time_is_of_the_command_with_its_start_and_its_results(small_run, monkeypatch):
    module = importlib.import_module("groktrace.cli.forecast")
    now = iter([100.0, 102.0])  # loading takes two seconds
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    alone = Forecast(6, 0, 67, 2, 25, 10**6, 5.0, 6)
    monkeypatch.setattr("groktrace.analysis.forecast.forecast", lambda run, **keywords: alone)
    said = json.loads(CliRunner().invoke(main, ["forecast", str(small_run), "--json"]).stdout)
    assert said["seconds"] == pytest.approx(5.0 + 2.3 * 2.0)
