"""The example that acts on λ, in its small form."""

import csv
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_weight_decay_is_raised_where_a_network_memorises_without_a_fall(tmp_path):
    script = ROOT / "examples" / "intervention.py"
    subprocess.run([sys.executable, "-W", "error", script, "--small", "--out", tmp_path], check=True)
    with open(tmp_path / "intervention.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert 0 < 2 * int(row["memorised"]) <= int(row["raised"]) < int(row["stopped"])
    assert (tmp_path / "intervention.png").stat().st_size > 10_000
