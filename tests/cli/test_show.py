import csv
import io
import json
import shutil

from click.testing import CliRunner

import groktrace
from groktrace.cli import main

FAST = ["--draws", "20", "--burn-in", "20"]


def invoke(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_missing_runs_and_results_are_named(small_run, tmp_path):
    assert "no such directory" in invoke("show", tmp_path / "nowhere").stderr
    assert "not analysed yet" in invoke("show", small_run).stderr
    groktrace.analyze(small_run, draws=20, burn_in=20)
    assert invoke("plot", small_run, "-o", tmp_path / "figure.xyz").exit_code == 1


def test_what_is_concluded_is_in_the_json_too(small_run):
    found = json.loads(invoke("analyze", small_run, "--json", *FAST).stdout)
    assert found["curve"] == "llc_centred"
    assert found["transitions"] == []
    assert found["remarks"][0].startswith("No transition found in 6 snapshots: λ_c ")
    shown = invoke("show", small_run).stdout
    assert shown.startswith("λ_c against the step:\n")
    assert ", transitions on λ_c\n" in shown
    assert found["remarks"][0] in shown
    rows = list(csv.DictReader(io.StringIO(invoke("show", small_run, "--csv").stdout)))
    assert [float(row["llc"]) for row in rows] == [point["llc"] for point in found["trajectory"]]
    assert [float(row["curve"]) for row in rows] == [point["llc_centred"] for point in found["trajectory"]]
    assert "--json or --csv, not both" in invoke("show", small_run, "--csv", "--json").stderr


def test_a_later_run_of_the_same_script_is_named(small_run):
    groktrace.analyze(small_run, draws=20, burn_in=20)
    assert "later" not in invoke("show", small_run).stderr
    later = shutil.copytree(small_run, small_run.with_name("run-2"))  # whose run.json says the same out
    result = invoke("show", small_run)
    assert f"later: the same script was run again, and that run is in '{later}'" in result.stderr
    assert "later" not in invoke("show", later).stderr
