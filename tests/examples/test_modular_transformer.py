import csv
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "modular_transformer.py"


def test_small_form(perform, tmp_path):
    command = [sys.executable, "-W", "error", str(EXAMPLE), "--small", "--out", str(tmp_path)]
    subprocess.run(command, check=True)
    rows = list(csv.DictReader((tmp_path / "modular_transformer.csv").read_text().splitlines()))
    assert {row["run"] for row in rows} == {"sums", "no_decay", "random_labels"}
    first, *_, last = [row for row in rows if row["run"] == "sums"]
    assert (int(first["step"]), int(last["step"])) == (0, 60)
    assert float(last["train_loss"]) < float(first["train_loss"])
    # The same weights and pairs, but for the labels or the decay that begins with the first update.
    starts = {row["run"]: row for row in rows if row["step"] == "0"}
    assert starts["sums"]["squared_norm"] == starts["no_decay"]["squared_norm"]
    assert starts["sums"]["train_loss"] != starts["random_labels"]["train_loss"]
    for row in rows:  # what is restricted to the waves has no part in what excludes them
        assert float(row["restricted_loss"]) > 0
        assert float(row["excluded_loss"]) > 0
        assert 1 <= int(row["key_frequencies"]) <= 3
    written = (tmp_path / "modular_transformer.png").stat().st_mtime_ns
    perform("modular_transformer")  # goes on from what is there
    assert rows == list(csv.DictReader((tmp_path / "modular_transformer.csv").read_text().splitlines()))
    assert (tmp_path / "modular_transformer.png").stat().st_mtime_ns > written
    assert not (tmp_path / "sums-2").exists()
