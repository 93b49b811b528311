"""What all commands share: help in sections, options by the settings' names, and a quick start."""

import inspect
import subprocess
import sys
from dataclasses import fields

import click
import pytest
from click.testing import CliRunner

from groktrace.analysis.replay import analyze
from groktrace.cli import main
from groktrace.sampling.settings import SamplingSettings

SETTINGS = {field.name for field in fields(SamplingSettings)}


def names_of(command):
    return {parameter.name for parameter in main.commands[command].params}


def test_the_commands_stand_in_the_order_of_their_use():
    listed = CliRunner().invoke(main, ["--help"]).stdout.partition("Commands:\n")[2]
    found = [line.split()[0] for line in listed.splitlines()]
    assert found == [
        *("import", "analyze", "follow", "forecast", "temperature", "show", "plot", "compare", "check", "theory")
    ]


def test_every_setting_is_an_option_of_what_samples():
    for command in ("analyze", "follow", "forecast"):
        assert names_of(command) >= SETTINGS
    assert names_of("temperature") >= SETTINGS - {"nbeta"}
    for command in ("show", "plot", "compare", "check"):
        assert not names_of(command) & SETTINGS


def test_what_belongs_to_one_command_is_refused_by_the_others(small_run):
    for command, option in (
        ("analyze", "--timeout=3"),
        ("follow", "--adaptive"),
        ("follow", "--time=3"),
        ("forecast", "--reference=3"),
        ("forecast", "--jobs=2"),
        ("show", "--draws=3"),
        ("analyze", "--follow"),
        ("analyze", "--dry-run"),
        ("analyze", "--temperature-curve=50"),
    ):
        result = CliRunner().invoke(main, [command, str(small_run), option])
        assert (result.exit_code, "No such option" in result.stderr) == (2, True), (command, option)


def test_options_of_experts_stand_below_the_others():
    text = CliRunner().invoke(main, ["analyze", "--help"], terminal_width=100).stdout
    basic, expert = text.partition("Basic options:")[2].split("Expert options:")
    for option in ("--time", "--json", "--device", "--task", "--jobs", "--rtol", "--preset", "--help"):
        assert f"{option} " in basic, option
        assert f"  {option} " not in expert, option
    for option in ("--nbeta", "--localization", "--step-size", "--method", "--adaptive", "--reference", "--dask"):
        assert f"{option} " in expert, option
    assert "Basic" not in CliRunner().invoke(main, ["show", "--help"]).stdout


@pytest.mark.parametrize("command", [*main.commands])
def test_every_option_says_what_it_does(command):
    found = main.commands[command]
    assert inspect.getdoc(found.callback)
    for parameter in found.params:
        assert isinstance(parameter, click.Argument) or parameter.help, parameter.name


def test_options_are_named_as_the_arguments_of_python():
    arguments = inspect.signature(analyze).parameters.keys() | SETTINGS
    own = {"minutes", "preset", "logdir", "wandb", "as_json", "as_csv", "threads", "dask"}
    assert names_of("analyze") - own <= arguments


@pytest.mark.parametrize("arguments", [["--help"], ["analyze", "--help"], ["theory", "--help"], ["--version"]])
def test_help_does_not_wait_for_pytorch(arguments):
    code = (
        "import sys, groktrace.cli\n"
        f"groktrace.cli.main({arguments!r}, standalone_mode=False)\n"
        "print([name for name in ('torch', 'numpy', 'tensorboard', 'matplotlib') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "[]"


def test_the_module_is_the_command():
    found = subprocess.run([sys.executable, "-m", "groktrace", "--help"], capture_output=True, text=True, check=True)
    assert found.stdout.startswith("Usage: groktrace ")


def test_threads_are_set_before_anything_is_computed(recorded, monkeypatch):
    given = []
    monkeypatch.setattr("torch.set_num_threads", given.append)
    for command, *more in (["analyze"], ["follow"], ["forecast"], ["temperature", "51"]):
        result = CliRunner().invoke(main, [command, str(recorded), *more, "--threads", "3", "--device", "tpu9"])
        assert (result.exit_code, given.pop(0)) == (1, 3), command
