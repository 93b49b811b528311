import json

from click.testing import CliRunner

import groktrace
from groktrace.cli import main


def invoke(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_runs_are_compared_in_a_table_a_figure_and_json(reference_run, small_run, tmp_path):
    out, _ = reference_run
    assert "not analysed yet" in invoke("compare", out, small_run).stderr
    groktrace.analyze(small_run, draws=20, burn_in=20)
    figure = tmp_path / "both.png"
    result = invoke("compare", out, small_run, "-o", figure)
    assert result.exit_code == 0
    assert "generalisation" in result.stdout
    assert str(figure) in result.stdout
    assert figure.read_bytes().startswith(b"\x89PNG")
    found = json.loads(invoke("compare", out, small_run, "--json").stdout)
    assert found["groups"] == []
    found = found["runs"]
    assert found.keys() == {str(out), str(small_run)}
    assert found[str(out)] == json.loads(invoke("show", out, "--json").stdout)
