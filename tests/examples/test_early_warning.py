"""The example that follows two trainings, in its small form."""

import csv
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_fall_is_told_of_the_network_that_groks_alone(tmp_path):
    script = ROOT / "examples" / "early_warning.py"
    subprocess.run([sys.executable, "-W", "error", script, "--small", "--out", tmp_path], check=True)
    with open(tmp_path / "early_warning.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["training"] for row in rows] == ["groks", "random labels"]
    groks, control = rows
    assert 0 < int(groks["warned"]) < 300
    assert control["half"] == control["warned"] == control["labelled"] == ""
    assert (tmp_path / "early_warning.png").stat().st_size > 10_000
