import json

from click.testing import CliRunner

from groktrace.cli import main

FAST = ["--draws", "20", "--burn-in", "20"]


def invoke(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_a_temperature_curve_of_one_snapshot(small_run):
    arguments = ["temperature", small_run, 50, *FAST]
    text = invoke(*arguments).stdout
    assert text.splitlines()[0].split() == ["nβ", "λ̂", "±", "λ_c", "±"]
    assert text.splitlines()[-1].startswith("Learning coefficient")
    found = json.loads(invoke(*arguments, "--json").stdout)
    assert len(found["estimates"]) == 6
    assert found["limit"]["ladder"][0]["nbeta"] < found["limit"]["ladder"][-1]["nbeta"]
    assert not (small_run / "analysis").exists()
    wrong = invoke("temperature", small_run, 51)
    assert (wrong.exit_code, wrong.stderr) == (
        1,
        "Error: step: there is no snapshot of step 51; the nearest is of step 50.\n",
    )
    assert "No such option '--nbeta'" in invoke(*arguments, "--nbeta", "3").stderr  # it takes several
