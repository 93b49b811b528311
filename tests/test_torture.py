"""A short run of each part of tools/torture."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills copies of its own process")
def test_nothing_is_lost():
    parts = ["kill", "--trials", "6", "signals", "--trials", "3", "disk"]
    parts += ["analyze", "--trials", "2", "determinism", "--tiny", "network"]
    done = subprocess.run(
        [sys.executable, "-m", "tools.torture", *parts], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if not line.startswith("|")]
    assert len(lines) == 6, done.stdout
    assert all(line.endswith("; 0 failures") for line in lines), done.stdout
    assert "6 runs resumed" in lines[0]
    assert "1 SIGTERM, 1 SIGINT, 1 exception" in lines[1]
    assert "25 snapshots recorded and analysed" in lines[5]
