"""Short runs of tools/torture/hostile_files.py and hostile_checkpoints.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from tools.torture import hostile_files


def test_damage_and_strange_files_are_refused_or_harmless(tmp_path):
    found = hostile_files.torture(count=100, seed=1, stride=1500, log=tmp_path / "log")
    bad = [
        line for line in (tmp_path / "log").read_text().splitlines() if json.loads(line)[3] in ("VIOLATION", "CRASH")
    ]
    assert not bad
    assert sum(found["changed byte"].values()) > 10
    assert all(found[kind]["refused"] > 5 for kind in hostile_files.KINDS)
    assert found["changed byte"]["accepted"] == found["cut"]["accepted"] == 0


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="looks into /proc")
def test_checkpoints_are_refused_and_nothing_is_run_or_lost():
    done = subprocess.run(
        [sys.executable, "-m", "tools.torture", "checkpoints", "--count", "100"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("checkpoints: 78 hostile checkpoints refused, ")
    assert done.stdout.endswith("; 0 failures\n")
