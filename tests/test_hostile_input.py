"""A short run of tools/torture/hostile_files.py."""

import json
import sys
from pathlib import Path

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
