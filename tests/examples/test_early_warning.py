"""The example that follows two trainings, in its small form."""

import csv


def test_a_fall_is_told_of_the_network_that_groks_alone(perform, tmp_path):
    perform("early_warning")
    with open(tmp_path / "early_warning.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["training"] for row in rows] == ["groks", "random labels"]
    groks, control = rows
    assert 0 < int(groks["warned"]) < 300
    assert control["half"] == control["warned"] == control["labelled"] == ""
    assert (tmp_path / "early_warning.png").stat().st_size > 10_000
