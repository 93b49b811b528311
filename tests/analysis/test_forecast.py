import dataclasses
import json

import pytest
from click.testing import CliRunner

import groktrace
from groktrace.analysis import evaluator, llc
from groktrace.analysis import forecast as forecast_module
from groktrace.analysis.forecast import forecast
from groktrace.cli import main
from groktrace.sampling import chains, network
from groktrace.sampling.calibration import Scale
from groktrace.sampling.settings import SamplingSettings


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def counted(monkeypatch):
    """Chain-steps of the estimates that an analysis makes, as they come."""
    steps = []
    plain = evaluator.estimate_stack

    def count(*arguments):
        estimates = plain(*arguments)
        steps.extend(each.chains * (each.burn_in + each.draws) for each in estimates)
        return estimates

    monkeypatch.setattr(evaluator, "estimate_stack", count)
    return steps


@pytest.mark.parametrize("settings", [{}, {"chains": 3, "draws": 20, "burn_in": 5}])
def test_a_forecast_counts_what_the_analysis_then_does(small_run, monkeypatch, settings):
    monkeypatch.setattr(forecast_module, "_SECONDS", 60.0)  # however busy the machine is
    before = contents(small_run)
    said = forecast(small_run, **settings)
    assert contents(small_run) == before
    steps = counted(monkeypatch)
    trajectory = groktrace.analyze(small_run, **settings)
    assert (said.snapshots, said.finished, said.weights) == (len(trajectory.points), 0, 67)
    assert said.chains == settings.get("chains", 16)
    if settings:
        assert said.chain_steps == sum(steps) == 6 * 3 * 25
    else:  # all six were tried, and the scale was chosen from the same six
        assert said.tried == 6
        assert said.chain_steps == pytest.approx(sum(steps), rel=0.3)
    assert said.seconds > 0
    assert said.memory_bytes > 50 * 2**20
    again = forecast(small_run, **settings)
    assert (again.snapshots, again.finished, again.chain_steps, again.seconds) == (0, 6, 0, 0.0)


def test_where_whole_estimates_take_too_long_first_draws_tell_how_many_more_are_needed(small_run, monkeypatch):
    steps = counted(monkeypatch)
    monkeypatch.setattr(forecast_module, "time_steps", lambda *arguments: (1.0, 0.0))
    assert forecast(small_run, chains=2).tried == 0  # a tenth of six snapshots is none
    monkeypatch.setattr(forecast_module, "_SHARE", 1.0)
    said = forecast(small_run, chains=2)
    assert said.tried == 1
    monkeypatch.setattr(forecast_module, "_growth", lambda found, rtol, scale: 4)
    grown = forecast(small_run, chains=2)
    groktrace.analyze(small_run, chains=2)  # whose snapshots are off any minimum, so that their draws do not grow
    assert said.chain_steps == pytest.approx(sum(steps), rel=0.3)
    # Of 72 steps 8 are burn-in, or of a few more where steps are smaller.
    assert grown.chain_steps == pytest.approx(said.chain_steps * (8 + 4 * 64) / 72, rel=0.05)


def test_attempts_at_steps_that_are_given_up_count(small_run, monkeypatch):
    plain = forecast_module.estimate_stack

    def several(*arguments):
        more = {"lost_steps": 100, "halvings": 2}
        return [dataclasses.replace(each, diagnostics=each.diagnostics | more) for each in plain(*arguments)]

    monkeypatch.setattr(forecast_module, "time_steps", lambda *arguments: (0.0, 10.0))
    once = forecast(small_run, chains=2)
    monkeypatch.setattr(forecast_module, "estimate_stack", several)
    thrice = forecast(small_run, chains=2)
    assert thrice.tried == once.tried == 6
    assert thrice.chain_steps == pytest.approx(once.chain_steps + 6 * 2 * 100, rel=0.05)
    assert thrice.seconds == pytest.approx(once.seconds + 2 * 10.0, abs=2.0)  # all six are one stack


def test_no_more_snapshots_are_tried_at_once_than_the_analysis_stacks(small_run, monkeypatch):
    sizes, plain = [], forecast_module.estimate_stack

    def seen(loss, weights, *others):
        sizes.append(len(weights))
        return plain(loss, weights, *others)

    monkeypatch.setattr(forecast_module, "estimate_stack", seen)
    assert forecast(small_run, chains=2).tried == sum(sizes) == 6
    assert len(sizes) == 1
    sizes.clear()
    monkeypatch.setitem(chains.WORKING_SET_BYTES, "cpu", 1)
    assert forecast(small_run, chains=2).tried == 6
    assert sizes == 6 * [1]


@pytest.mark.parametrize(
    ("error", "times"), [(0.5, 1), (1.0, 1), (1.1, 2), (1.41, 2), (1.42, 4), (3.0, 16), (9.0, 16), (900.0, 16)]
)
def test_draws_grow_with_the_square_of_the_error_in_doublings(error, times):
    scale, following = Scale(1.0, 1.0), Scale(1.0, 1.0, 1.0)
    estimate = llc.unusable("", SamplingSettings(chains=2), 1.0, 1.0)
    estimate = dataclasses.replace(estimate, llc=-50.0, stderr=50.0 * 0.02 * error)
    assert forecast_module._growth(estimate, 0.02, scale) == times
    assert forecast_module._growth(estimate, 0.02, following) == times  # of a single chain
    off = dataclasses.replace(estimate, reasons=(llc.OFF_MINIMUM,))
    assert forecast_module._growth(off, 0.02, scale) == 1
    # Where nβ follows the curvature, λ_c is what has to be known, or is given up.
    centred = dataclasses.replace(off, llc_centred=80.0, stderr_centred=80.0 * 0.02 * error, stderr=1e9)
    assert forecast_module._growth(centred, 0.02, following) == (times if error <= 4 else 1)


def test_only_stacks_of_which_some_are_missing_are_counted(small_run, monkeypatch):
    settings = {"chains": 2, "draws": 10, "burn_in": 5}
    trajectory = groktrace.analyze(small_run, **settings)
    (points,) = small_run.glob("analysis/*/points.jsonl")
    lines = points.read_text().splitlines(keepends=True)
    points.write_text("".join(lines[:2]))
    said = forecast(small_run, **settings)
    steps = counted(monkeypatch)
    assert groktrace.analyze(small_run, **settings) == trajectory
    assert (said.snapshots, said.finished) == (6, 0)
    assert said.chain_steps == sum(steps) == 6 * 2 * 15


def test_damaged_snapshots_cost_a_forecast_no_more_than_themselves(small_run):
    *_, last = sorted((small_run / "weights").iterdir())
    last.write_bytes(last.read_bytes()[:-1])
    settings = {"chains": 2, "draws": 10, "burn_in": 5}
    assert forecast(small_run, **settings).chain_steps == pytest.approx(6 * 2 * 15, abs=30)


def test_a_large_network_is_forecast_from_one_micro_batch(small_run, monkeypatch):
    monkeypatch.setattr(network, "LARGE_WEIGHTS", 1)
    steps = counted(monkeypatch)
    settings = {"chains": 2, "rtol": 10.0, "parameters": "2.*"}
    said = forecast(small_run, **settings)
    assert said.tried == 0
    groktrace.analyze(small_run, **settings)
    # It takes every snapshot to be as curved as the typical one.
    assert said.chain_steps == pytest.approx(sum(steps), rel=0.3)
    explicit = {"chains": 2, "draws": 7, "burn_in": 3, "nbeta": 10.0, "batch_size": 20}
    assert forecast(small_run, **explicit).chain_steps == 6 * 2 * 10
    with pytest.raises(groktrace.errors.SettingsError, match="give step_size, or draws and burn_in"):
        forecast(small_run, nbeta=10.0)


@pytest.mark.parametrize(
    ("more", "vectors"),  # beside one that the forecast itself holds: each chain's position, its momentum, the control
    [({}, 1), ({"method": "kinetic"}, 3), ({"batch_size": 20}, 2), ({"method": "kinetic", "batch_size": 20}, 4)],
)
def test_the_memory_of_a_large_network_is_that_of_its_vectors(small_run, monkeypatch, more, vectors):
    monkeypatch.setattr(network, "LARGE_WEIGHTS", 1)
    monkeypatch.setattr(forecast_module, "_peak_bytes", lambda device: 0)
    said = forecast(small_run, chains=2, draws=7, burn_in=3, **more)
    assert said.memory_bytes == vectors * 4 * said.weights


def test_the_command_line_forecasts_and_writes_nothing(small_run):
    before = contents(small_run)
    arguments = ["analyze", str(small_run), "--dry-run", "--chains", "2", "--draws", "20", "--burn-in", "5"]
    said = CliRunner().invoke(main, arguments)
    assert said.exit_code == 0, said.output
    for expected in ("snapshots  6", "chains     2 a snapshot, 67 weights each", "25 a chain", "300 in all", "time  "):
        assert expected in said.stdout
    assert "trying a few snapshots: 1 done in" in said.stderr
    found = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).stdout)
    assert (found["snapshots"], found["chains"], found["steps"], found["chain_steps"]) == (6, 2, 25, 300)
    refused = CliRunner().invoke(main, [*arguments, "--curvature"])
    assert refused.exit_code == 2
    assert "--dry-run takes neither" in refused.output
    assert contents(small_run) == before
