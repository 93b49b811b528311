import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

import groktrace
from groktrace.cli import main
from groktrace.run import layout
from groktrace.run.files import write_json

FAST = ["--draws", "20", "--burn-in", "20"]
POINT_KEYS = {
    "step", "llc", "stderr", "llc_centred", "reliable", "reasons",
    "train_loss", "train_accuracy", "val_loss", "val_accuracy",
}  # fmt: skip
TRANSITION_KEYS = {
    "kind", "label", "step", "step_low", "step_high", "onset", "end", "llc_before", "llc_after", "delta_llc", "stderr",
}  # fmt: skip


def invoke(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def files_of(folder):
    return {path: path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def test_json_is_one_object_as_promised(small_run):
    result = invoke("analyze", small_run, "--json", *FAST)
    assert result.exit_code in (0, 3)
    found = json.loads(result.stdout)
    assert found.keys() >= {
        "run", "n", "nbeta", "localization", "resolution", "locality", "method",
        "trajectory", "transitions", "grokking",
    }  # fmt: skip
    assert found["n"] == 60
    assert all(point.keys() >= POINT_KEYS for point in found["trajectory"])
    assert found["grokking"].keys() >= {"memorised_at", "generalised_at", "severity"}
    shown = invoke("show", small_run, "--json")
    assert json.loads(shown.stdout) == found


def test_transitions_in_json(reference_run):
    _, found = reference_run
    assert all(transition.keys() >= TRANSITION_KEYS for transition in found["transitions"])
    assert len(found["transitions"]) == 2


def test_the_reference_run_reads_well(reference_run, tmp_path):
    out, _ = reference_run
    analysed = invoke("analyze", out)
    assert analysed.exit_code == 3
    (line,) = [line for line in analysed.stderr.splitlines() if line.startswith("unreliable")]
    assert re.fullmatch(
        r"unreliable: [23] of 61 snapshots, steps 0-(50|100): not at a minimum: the loss falls on .*", line
    )
    assert "generalisation" in analysed.stdout
    assert f"tensorboard --logdir {out}" in analysed.stdout
    shown = invoke("show", out)
    assert "baoab" in shown.stdout
    assert "simplification" in shown.stdout
    figure = tmp_path / "figure.png"
    assert invoke("plot", out, "-o", figure).exit_code == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert (out / "tensorboard").is_dir()


def test_doubts_of_the_recording_are_repeated(small_run):
    assert invoke("analyze", small_run, *FAST).exit_code in (0, 3)
    path = small_run / layout.RUN_FILE
    write_json(path, {**json.loads(path.read_text()), "doubts": [{"step": 20, "text": "the loss is another one"}]})
    for arguments in (["analyze", small_run, *FAST], ["show", small_run], ["show", small_run, "--json"]):
        result = invoke(*arguments)
        assert result.exit_code == 3
        assert "doubtful: step 20: the loss is another one" in result.stderr
        assert "doubtful" not in result.stdout


def test_unreadable_snapshots_are_named_and_the_exit_code_tells(small_run):
    layout.snapshot_path(small_run, 30).write_bytes(b"")
    result = invoke("analyze", small_run, *FAST)
    assert result.exit_code == 3
    assert "unreadable: " in result.stderr
    assert "000000000030.safetensors" in result.stderr


def no_snapshots(run):
    for step in layout.snapshot_steps(run):
        layout.snapshot_path(run, step).unlink()


def foreign(run):
    (run / "run.json").unlink()


def other_data(run):
    (run / "run.json").write_text('{"hello": 1}')


def newer(run):
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**info, "format": 99, "groktrace": "7.0", "digest": "of another kind"}))


def truncated(run):
    for step in layout.snapshot_steps(run):
        path = layout.snapshot_path(run, step)
        path.write_bytes(path.read_bytes()[:200])


def mismatched(run):
    info = json.loads((run / "run.json").read_text())
    info["weights"]["0.weight"]["shape"] = [8, 5]
    write_json(run / "run.json", info)


def no_program(run):
    (run / "program.json").unlink()


def bad_program(run):
    (run / "program.json").write_text('{"offset_free": false}')


def bad_data(run):
    (run / "data.safetensors").write_bytes((run / "data.safetensors").read_bytes()[:-5])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_snapshots, "holds no snapshots"),
        (foreign, "is not a directory that groktrace.watch"),
        (other_data, "not a groktrace run file"),
        (newer, r"format 99, written by groktrace 7\.0; this groktrace reads format 1"),
        (truncated, "none of its snapshots can be read"),
        (mismatched, r"'0\.weight' should be float32\[8, 5\]"),
        (no_program, "holds no model and loss to evaluate; pass --task"),
        (bad_program, r"program\.json"),
        (bad_data, r"data\.safetensors: not a whole safetensors file"),
    ],
)
def test_bad_runs_get_one_line_and_stay_as_they_are(small_run, spoil, message):
    spoil(small_run)
    before = files_of(small_run)
    result = invoke("analyze", small_run)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stderr.startswith("Error: ")
    assert re.search(message, result.stderr), result.stderr
    assert files_of(small_run) == before


def write_task(folder, body):
    (folder / "mytask.py").write_text(
        "import torch\nfrom torch import nn\nimport groktrace\nx, y = torch.zeros(4, 4), torch.zeros(4).long()\n"
        "model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))\n"
        f"def make():\n    return {body}\n"
    )


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("groktrace.Task.from_model(model, train=(x, y), loss='hinge')", "cross_entropy, mse, got 'hinge'"),
        ("groktrace.Task.from_model(model, train=(x, y[:2]), loss='mse')", "equally many samples, got [4, 2]"),
        ("model", "expected it to return groktrace.Task.from_model(...), got Sequential"),
        ("1 / 0", "failed (ZeroDivisionError: division by zero)"),
        ("groktrace.Task.from_model(nn.Linear(4, 3), train=(x, y), loss='cross_entropy')", "that was recorded"),
    ],
)
def test_bad_tasks_get_one_line_and_change_nothing(small_run, tmp_path, monkeypatch, body, message):
    write_task(tmp_path, body)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mytask", raising=False)
    before = files_of(small_run)
    result = invoke("analyze", small_run, "--task", "mytask:make")
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert files_of(small_run) == before


@pytest.mark.parametrize("command", [["analyze"], ["follow"], ["forecast"], ["temperature", "50"]])
def test_other_data_are_one_line_on_stderr_and_json_stays_one_object(small_run, tmp_path, monkeypatch, command):
    write_task(tmp_path, "groktrace.Task.from_model(model, train=(x, y), loss='cross_entropy')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(os, "nice", lambda by: None)
    monkeypatch.delitem(sys.modules, "mytask", raising=False)
    name, *step = command
    result = invoke(name, small_run, *step, "--task", "mytask:make", "--json", *FAST)
    assert result.exit_code in (0, 3), result.output
    (line,) = [line for line in result.stderr.splitlines() if "Warning" in line]
    assert line.startswith("Warning: the task's data are others than those recorded (4 training samples, not 60)")
    *events, found = result.stdout.splitlines()
    assert json.loads(found)
    assert not events or name == "follow"


def test_a_task_without_data_has_those_of_the_run(small_run, tmp_path, monkeypatch):
    write_task(tmp_path, "groktrace.Task.from_model(model, loss='cross_entropy')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mytask", raising=False)
    result = invoke("analyze", small_run, "--task", "mytask:make", "--json", *FAST)
    found = json.loads(result.stdout)
    assert found["n"] == 60
    assert found["trajectory"][-1]["val_loss"] is not None
    assert "Warning" not in result.stderr


def test_a_training_script_as_task_does_not_train(small_run, tmp_path, monkeypatch):
    (tmp_path / "mytask.py").write_text(
        "import groktrace, torch\nmodel = torch.nn.Linear(2, 1)\n"
        "recorder = groktrace.watch(model)\nraise SystemExit('trained')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mytask", raising=False)
    result = invoke("analyze", small_run, "--task", "mytask:make")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: --task mytask:make: loading it calls groktrace.watch()")
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "snapshots").exists()


def test_a_task_of_ones_own(small_run, tmp_path, monkeypatch):
    write_task(tmp_path, "groktrace.Task.from_model(model, train=(x, y), loss='cross_entropy')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mytask", raising=False)
    no_program(small_run)
    result = invoke("analyze", small_run, "--task", "mytask:make", "--json", *FAST)
    assert json.loads(result.stdout)["n"] == 4


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--nbeta", "-3"], 1, "nbeta: expected a positive number or 'wbic' or 'curvature', got -3.0"),
        (["--nbeta", "warm"], 2, "expected a number or 'wbic' or 'curvature', got 'warm'"),
        (["--rtol", "0"], 1, "rtol: expected a positive number, got 0.0"),
        (["--method", "sgld"], 1, "'sgld' takes its settings as given"),
        (["--device", "tpu9"], 1, "device: 'tpu9' cannot be used here"),
        (["--frobnicate"], 2, "No such option"),
    ],
)
def test_bad_options_are_named(small_run, arguments, code, message):
    before = files_of(small_run)
    result = invoke("analyze", small_run, *arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert files_of(small_run) == before


def test_the_paper_preset_and_overrides(small_run):
    result = invoke("analyze", small_run, "--preset", "paper", "--draws", "5", "--burn-in", "5", "--json")
    # Far too short for its step size: all six are called out.
    assert result.exit_code == 3
    assert re.search(r"unreliable: 6 of 6 snapshots, steps 0-50: not equilibrated .* \(at step 0\)", result.stderr)
    found = json.loads(result.stdout)
    assert (found["method"], found["nbeta"], found["localization"]) == ("sgld", 30.0, 5.0)


def test_logdir_takes_the_event_files_elsewhere(small_run, tmp_path):
    invoke("analyze", small_run, "--logdir", tmp_path / "logs", *FAST)
    assert list((tmp_path / "logs").rglob("events.out.tfevents.*"))
    assert not (small_run / "tensorboard").exists()


def test_interrupting_keeps_what_is_finished(small_run):
    command = [sys.executable, "-m", "groktrace", "analyze", str(small_run), "--draws", "50000"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests themselves run in the background, a shell has made them, and so their children, ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list((small_run / "analysis").glob("*/settings.json")):
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert output == ""
    assert "Interrupted; what is finished is kept" in errors
    assert "Traceback" not in errors


def test_reference_and_curvature_are_found_again_by_show_and_plot(small_run, tmp_path):
    result = invoke("analyze", small_run, "--reference", "30", "--hessian", "--json", *FAST)
    found = json.loads(result.stdout)
    assert found["reference"]["llc"] == 30
    assert all(point["hessian_trace"] > 0 for point in found["trajectory"])
    shown = invoke("show", small_run).stdout
    assert "reference λ = 30\n" in shown
    assert "tr H" in shown
    assert invoke("plot", small_run, "-o", tmp_path / "figure.svg").exit_code == 0
    assert (small_run / "tensorboard" / "reference λ 30").is_dir()
    invoke("analyze", small_run, "--reference", "jacobian", *FAST)
    assert "half the Jacobian's rank of 67 at step 50" in invoke("show", small_run).stdout
    assert not (small_run / "tensorboard" / "reference λ 30").exists()
    assert (small_run / "tensorboard" / "reference λ 33.5").is_dir()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--reference", "ntk"], 2, "expected a number or 'jacobian', got 'ntk'"),
        (["--reference", "-2"], 1, "reference: expected a positive number or 'jacobian', got -2.0"),
    ],
)
def test_bad_references_are_named(small_run, arguments, code, message):
    before = files_of(small_run)
    result = invoke("analyze", small_run, *arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert files_of(small_run) == before


def test_a_single_chain_says_what_is_lost_and_nothing_is_found_on_a_slope(small_run):
    result = invoke("analyze", small_run, "--chains", "1", "--json", *FAST)
    assert result.exit_code == 3
    assert re.search("^A single chain gives no λ_c: .* Analyse with 2 chains or more.$", result.stderr, re.MULTILINE)
    found = json.loads(result.stdout)
    assert (found["curve"], found["transitions"]) == ("llc", [])
    assert result.stderr.strip().splitlines()[-2].split(":")[0] == "A single chain gives no λ_c"
    assert re.match(r"unreliable: \d of 6 snapshots, steps 0-\d+: not at a min", result.stderr.strip().splitlines()[-1])
    assert "A single chain gives no λ_c" not in invoke("analyze", small_run, "--json", *FAST).stderr


def test_draws_that_are_kept_are_said_where(small_run):
    result = invoke("analyze", small_run, "--keep", "losses", "--json", *FAST)
    assert result.exit_code in (0, 3)
    (folder,) = small_run.glob("analysis/*/draws")
    assert f"draws: {folder}\n" in result.stderr
    found = groktrace.open_run(small_run).draws(50)
    assert found.llc == pytest.approx(json.loads(result.stdout)["trajectory"][-1]["llc"])
    assert found.sample_losses.shape[2] == 60
    assert "draws:" not in invoke("analyze", small_run, *FAST).stderr
    assert invoke("analyze", small_run, "--keep", "all", *FAST).exit_code == 2
