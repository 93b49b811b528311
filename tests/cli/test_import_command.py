import json
import os
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import groktrace
from groktrace.cli import main

MODULE = """
import torch, groktrace

def task():
    x = torch.linspace(-1, 1, 24).reshape(8, 3)
    return groktrace.Task.from_model(torch.nn.Linear(3, 2), train=(x, x[:, :2]), loss="mse")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with twenty checkpoints, and a module with their task."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks_of_import.py").write_text(MODULE)
    (tmp_path / "my saved").mkdir()
    for step in range(20):
        torch.manual_seed(step)
        torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "my saved" / f"model_{step}.pt")
    yield tmp_path
    sys.modules.pop("tasks_of_import", None)


def run(*words):
    return CliRunner().invoke(main, ["import", *words, "--task", "tasks_of_import:task", "--out", "run"])


def test_a_dry_run_shows_all_and_writes_nothing(folder):
    result = run("my saved", "--dry-run")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["step", "from", "checkpoint"]
    assert lines[20].split(maxsplit=2) == ["19", "name", os.path.join("my saved", "model_19.pt")]
    assert len(lines) == 21
    assert not (folder / "run").exists()


def test_an_import_and_its_analysis(folder):
    result = run("my saved")
    assert result.exit_code == 0, result.output
    first, second = result.stdout.splitlines()
    assert first == "run: 20 snapshots of steps 0 to 19, 8 weights, 8 training samples"
    assert second == "Analyse it:  groktrace analyze run"
    shown = result.stderr.splitlines()
    table = shown.index("step  from  checkpoint")
    assert "... 8 more" in shown
    assert shown.index("... 8 more") == table + 7
    assert any(line.startswith("importing: 20 done") for line in shown[table + 13 :])
    result = CliRunner().invoke(main, ["analyze", "run", "--draws=8", "--burn-in=4", "--chains=1", "--json"])
    assert len(json.loads(result.stdout)["trajectory"]) == 20


def test_what_is_left_out_is_named(folder):
    (folder / "my saved" / "model_3.pt").write_bytes(b"")
    torch.save({"model": nn.Linear(3, 2), "weight": 1}, folder / "my saved" / "model_4.pt")
    for words in (["--dry-run"], []):
        result = run("my saved", *words)
        assert result.exit_code == 3
        lines = [line for line in result.stderr.splitlines() if line.startswith("left out: ")]
        assert len(lines) == 2
        assert "model_3.pt: not a whole file of torch.save" in lines[0]
        assert "model_4.pt: needs code to be run (torch.nn.modules.linear.Linear)" in lines[1]
    assert len(groktrace.open_run("run").snapshots) == 18


def test_refusals_are_one_line(folder):
    for words, message in (
        (["missing"], "Error: missing: no such file or folder"),
        (["my saved", "--step-from", "x"], "--step-from 'x' finds nothing"),
        (["my saved", "--key", "net"], "expected the weights of the model that the task makes under 'net'"),
    ):
        result = run(*words)
        assert result.exit_code == 1
        assert message in result.stderr.splitlines()[-1]
    assert not (folder / "run").exists()
    assert CliRunner().invoke(main, ["import", "my saved", "--out", "run"]).exit_code == 2


def test_other_commands_say_what_to_type(folder):
    more = {"temperature": ["0"], "plot": ["-o", "figure.png"]}
    for command in ("analyze", "follow", "forecast", "temperature", "show", "plot", "compare", "check"):
        result = CliRunner().invoke(main, [command, "my saved", *more.get(command, ())])
        assert result.exit_code == 1
        assert result.stderr.endswith(
            "It holds 20 checkpoints; to make a run of them: "
            "groktrace import 'my saved' --task my_module:task --out RUN\n"
        )
    name = next((folder / "my saved").iterdir()).name
    result = CliRunner().invoke(main, ["analyze", f"my saved/{name}"])
    assert result.stderr.endswith(
        f"It holds 1 checkpoint; to make a run of them: "
        f"groktrace import 'my saved/{name}' --task my_module:task --out RUN\n"
    )
    (folder / "empty").mkdir()
    result = CliRunner().invoke(main, ["analyze", "empty"])
    assert result.stderr.endswith("is not a directory that groktrace.watch() wrote.\n")


def test_a_newcomers_line(folder):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "groktrace",
            "import",
            "my saved/model_*5.pt",
            "--task",
            "tasks_of_import:task",
            "--out",
            "run",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("run: 2 snapshots of steps 5 to 15")
