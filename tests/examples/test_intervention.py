"""The example that acts on λ, in its small form."""

import csv


def test_the_weight_decay_is_raised_where_a_network_memorises_without_a_fall(perform, tmp_path):
    perform("intervention")
    with open(tmp_path / "intervention.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert 0 < 2 * int(row["memorised"]) <= int(row["raised"]) < int(row["stopped"])
    assert (tmp_path / "intervention.png").stat().st_size > 10_000
