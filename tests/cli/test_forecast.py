import json

from click.testing import CliRunner

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
