"""A tenth of the snapshots gives the transitions that all of them give."""

import json
import math
import shutil
from concurrent.futures import Executor, Future
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import groktrace
from groktrace.analysis import replay
from groktrace.analysis.detection import Transition, find_transitions
from groktrace.analysis.measurement import measure
from groktrace.analysis.results.trajectory import Point, Trajectory
from groktrace.analysis.running import backends, evaluator, passes
from groktrace.analysis.running.passes import _Date, sample_adaptively
from groktrace.analysis.tuning import PASSES, Passes
from groktrace.errors import RunError
from groktrace.sampling import interruption, stack


def simulated(count, jumps, noise=0.01, seed=0):
    """A curve that goes from level to level, each step a snapshot: {step: level from there on}."""
    generator = np.random.default_rng(seed)
    curve = np.zeros(count)
    for step, level in jumps.items():
        curve[step:] = level
    error = noise * curve.max()
    values = curve + error * generator.standard_normal(count)
    return {step: Point(step, value, error, value, error) for step, value in enumerate(values.tolist())}


def replayed(points, reports=None):
    """The points that are chosen, and the sizes of the rounds."""
    rounds = []

    def measure(wanted):
        rounds.append(len(wanted))
        return {step: points[step] for step in wanted if step in points}

    chosen = sample_adaptively(
        range(max(points) + 1), measure, lambda *counts: None if reports is None else reports.append(counts)
    )
    return chosen, rounds


def dated(points):
    found = find_transitions(Trajectory(tuple(points[step] for step in sorted(points))))
    return [(transition.kind, transition.step, transition.step_low, transition.step_high) for transition in found]


@pytest.mark.parametrize("seed", range(3))
def test_jumps_are_dated_as_by_all_snapshots(seed):
    points = simulated(2000, {0: 50.0, 333: 100.0, 1217: 60.0}, seed=seed)
    full = dated(points)
    chosen, _ = replayed(points)
    some = dated(chosen)
    assert len(chosen) <= 200
    assert [date[0] for date in some] == [date[0] for date in full] == ["complexification", "simplification"]
    for ours, theirs in zip(some, full, strict=True):
        assert abs(ours[1] - theirs[1]) <= 1
        assert ours[3] - ours[2] <= 2
    # The two snapshots on either side of each jump are there.
    assert {332, 333, 1216, 1217} <= chosen.keys()


def test_a_long_noisy_fall_is_dated_as_by_all_snapshots():
    """Where one λ is off by more than the curve changes in many snapshots, a tenth of them has to be well chosen."""
    apart = []
    for seed in (2, 4):
        steps = np.arange(2000)
        curve = np.interp(steps, [0, 10], [170.0, 1190.0]) - 420 * (1 - np.exp(-np.maximum(steps - 25, 0) / 60))
        values = curve + 6.0 * np.random.default_rng(seed).standard_normal(2000)
        points = {step: Point(step, value, 6.0, value, 6.0) for step, value in enumerate(values.tolist())}
        full, some = dated(points), dated(replayed(points)[0])
        assert [date[0] for date in some] == [date[0] for date in full] == ["complexification", "simplification"]
        assert abs(some[0][1] - full[0][1]) <= 1
        apart.append(abs(some[1][1] - full[1][1]))
    assert np.mean(apart) < 1.5


def test_a_flat_curve_is_left_at_the_coarse_subset():
    chosen, rounds = replayed(simulated(2000, {0: 50.0}))
    assert rounds == [PASSES.adaptive_coarse]
    assert min(chosen) == 0
    assert max(chosen) == 1999


def test_a_change_among_few_snapshots_is_looked_into():
    """Two points at another level are no transition yet."""
    points = simulated(2000, {0: 50.0, 1000: 90.0, 1070: 50.0})
    chosen, _ = replayed(points)
    assert {999, 1000, 1069, 1070} <= chosen.keys()
    assert len(dated(chosen)) == 2


def test_short_runs_are_sampled_whole_and_damaged_snapshots_left_out():
    points = simulated(50, {0: 50.0, 20: 100.0})
    del points[30]
    chosen, rounds = replayed(points)
    assert chosen == points
    assert rounds == [50]
    points = simulated(2000, {0: 50.0, 333: 100.0})
    for step in (320, 332, 333, 334):
        del points[step]
    reports = []
    chosen, rounds = replayed(points, reports)
    assert {331, 335} <= chosen.keys()
    assert sum(rounds) <= 200
    assert reports[-1] == (sum(rounds), 200)


def test_what_is_sampled_is_what_a_full_replay_gives(small_run, tmp_path, monkeypatch):
    other = shutil.copytree(small_run, tmp_path / "other" / "run")
    full = groktrace.analyze(other, draws=20, burn_in=20)
    monkeypatch.setattr(passes, "PASSES", Passes(adaptive_coarse=3))
    some = groktrace.analyze(small_run, draws=20, burn_in=20, adaptive=True, hessian=True)
    assert [point.step for point in some.points] == [0, 10, 20, 50]
    assert (some.nbeta, some.localization) == (full.nbeta, full.localization)
    known = {point.step: json.loads(json.dumps(point.to_dict())) for point in full.points}
    for point in some.points:
        plain = point.to_dict()
        assert plain["hessian_trace"] > 0
        curved = ("hessian_trace", "hessian_trace_stderr", "hessian_top")
        assert {**plain, **dict.fromkeys(curved)} == known[point.step]
    # A full replay takes the sampled ones as they are.
    assert groktrace.analyze(small_run, draws=20, burn_in=20).points == full.points


def test_where_noise_blurs_a_date_the_levels_beside_it_are_sampled():
    """Of a slow fall, λ at the short peak before it moves the date most."""
    steps = np.arange(2000)
    curve = np.interp(steps, [0, 10], [170.0, 1190.0]) - 420 * (1 - np.exp(-np.maximum(steps - 25, 0) / 400))
    values = curve + 6.0 * np.random.default_rng(1).standard_normal(2000)
    points = {step: Point(step, value, 6.0, value, 6.0) for step, value in enumerate(values.tolist())}
    chosen, _ = replayed(points)
    # By the change of λ between neighbours alone, two of them would be.
    assert len(set(range(11, 26)) & chosen.keys()) >= 4


@pytest.mark.parametrize("part", range(3))
def test_a_gain_is_what_one_more_snapshot_takes_off_the_dates_error(part):
    shares, counts, blur = [1.0, 0.25, 0.25], [300, 200, 500], 7.0

    def error(counts):
        return blur * math.sqrt(sum(share / count for share, count in zip(shares, counts, strict=True)))

    bounds = [(100, 199), (0, 99), (200, 299)]
    date = _Date(
        tuple((*bound, count, share) for bound, count, share in zip(bounds, counts, shares, strict=True)), blur
    )
    more = [count + (i == part) for i, count in enumerate(counts)]
    assert date.gain(bounds[part][0] + 3, bounds[part][0] + 5) == pytest.approx(error(counts) - error(more), rel=0.02)
    assert date.gain(290, 310) == 0.0  # tells nothing of this one


def points_of(points):
    return lambda wanted: {step: points[step] for step in wanted if step in points}


def passes_of(points, coarse=9, together=4, detector=None):
    """What is there after each pass."""
    settings = {"coarse": coarse, "together": together, "detector": detector}
    return [dict(found) for found in passes.sample_in_passes(range(max(points) + 1), points_of(points), **settings)]


def test_passes_go_from_coarse_to_all():
    points = simulated(60, {0: 50.0, 20: 100.0})
    seen = passes_of(points)
    assert sorted(seen[0]) == [0, 7, 15, 22, 30, 37, 44, 52, 59]
    assert seen[-1] == points
    assert [len(points_so_far) for points_so_far in seen] == [*range(9, 60, 4), 60]
    # The jump is dated before anything else is filled in.
    assert {19, 20} <= seen[4].keys()


def test_each_pass_of_a_flat_curve_halves_the_largest_gaps():
    points = simulated(65, {0: 50.0})
    seen = passes_of(points, coarse=5, together=4)
    assert sorted(seen[1]) == list(range(0, 65, 8))
    assert passes_of(simulated(3, {0: 50.0}))[-1].keys() == {0, 1, 2}


class Sudden:
    """A detector that finds a change at one place, whatever the curve does there."""

    def __init__(self, step, delta=-5.0):
        self.step, self.delta = step, delta

    def detect(self, trajectory):
        index = int(np.searchsorted(trajectory.column("step"), self.step))
        if not 0 < index < len(trajectory):
            return []
        return [Transition.between(trajectory, index - 1, index, levels=(10.0, 10.0 + self.delta), stderr=0.1)]


def test_the_passes_date_what_the_detector_finds():
    points = simulated(2000, {0: 50.0})  # flat: the default detector finds nothing there
    chosen = sample_adaptively(range(2000), points_of(points), lambda done, total: None, detector=Sudden(700))
    assert {698, 699, 700, 701} <= chosen.keys()
    seen = passes_of(points, coarse=9, together=4, detector=Sudden(700))
    assert {699, 700} <= next(so_far.keys() for so_far in seen if len(so_far) > 60)
    # A change of nothing has no date.
    chosen = sample_adaptively(range(2000), points_of(points), lambda done, total: None, detector=Sudden(700, 0.0))
    assert len(chosen) == PASSES.adaptive_coarse


def test_an_analysis_samples_next_what_its_detector_dates(small_run, monkeypatch):
    monkeypatch.setattr(passes, "PASSES", Passes(adaptive_coarse=3))
    quick = {"draws": 20, "burn_in": 20, "adaptive": True}
    assert [point.step for point in groktrace.analyze(small_run, **quick)] == [0, 10, 20, 50]
    assert {30, 40} <= {point.step for point in groktrace.analyze(small_run, **quick, detector=Sudden(40))}


def test_an_analysis_that_runs_out_of_time_is_partial_and_goes_on(small_run, tmp_path):
    quick = {"draws": 20, "burn_in": 20, "locality": 0.22}
    whole = groktrace.analyze(shutil.copytree(small_run, tmp_path / "whole" / "run"), **quick)
    partial = groktrace.analyze(small_run, time_limit=1e-9, **quick)
    assert (len(partial.points), partial.unsampled) == (0, len(whole.points))
    assert groktrace.open_run(small_run).trajectory() == partial
    again = groktrace.analyze(small_run, **quick)
    assert (again.points, again.unsampled) == (whole.points, 0)
    with pytest.raises(groktrace.GroktraceError, match="time_limit: expected a positive number of seconds, got 0"):
        groktrace.analyze(small_run, time_limit=0, **quick)


@pytest.fixture
def clock(monkeypatch):
    """Snapshots one after another, and a clock that stands still until it is told how late it is."""
    monkeypatch.setattr(measure, "rows_per_stack", lambda loss, batch_size=None: 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    now = SimpleNamespace(seconds=0.0)
    for module in (backends, evaluator, interruption, passes, replay):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now.seconds, time=lambda: now.seconds))
    yield now
    torch.set_num_threads(threads)


def late_at(monkeypatch, clock, owner, name, call):
    """Let a second pass at each call of a function, and an hour at one of them."""
    plain, calls = getattr(owner, name), []

    def function(*args, **keywords):
        calls.append(name)
        clock.seconds += 3600 if len(calls) == call else 1
        return plain(*args, **keywords)

    monkeypatch.setattr(owner, name, function)


def evaluating_at_once():
    """An executor that evaluates whatever it is given before it returns."""
    executor = Executor()
    executor.submit = lambda function, *arguments: finished(function(*arguments))
    return executor


def finished(result):
    future = Future()
    future.set_result(result)
    return future


QUICK = {"draws": 20, "burn_in": 20, "locality": 0.22}


@pytest.mark.parametrize("more", [{}, {"adaptive": True}, {"jobs": 2}], ids=str)
def test_what_is_begun_when_the_time_is_up_is_given_up_and_what_is_finished_is_kept(
    small_run, tmp_path, monkeypatch, clock, more
):
    whole = groktrace.analyze(shutil.copytree(small_run, tmp_path / "whole" / "run"), **QUICK)
    late_at(monkeypatch, clock, stack.StackedChains, "advance", 3)
    if "jobs" in more:  # a worker, in this process
        more = {"executor": evaluating_at_once()}
    with pytest.warns(RuntimeWarning, match=r"while the snapshots of steps 20 were measured\. The next"):
        partial = groktrace.analyze(small_run, time_limit=60, **QUICK, **more)
    assert partial.points == whole.points[:2]
    assert partial.unsampled == 4
    monkeypatch.undo()
    assert groktrace.analyze(small_run, **QUICK).points == whole.points


def test_time_that_is_up_before_the_scale_is_known_is_an_error_that_says_what_is_kept(small_run, monkeypatch, clock):
    late_at(monkeypatch, clock, stack.StackedChains, "advance", 1)
    with pytest.raises(RunError, match=r"before any snapshot was sampled, with losses and curvature of 6 of 6"):
        groktrace.analyze(small_run, draws=20, burn_in=20, time_limit=60)
    clock.seconds = 0.0
    assert len(groktrace.analyze(small_run, draws=20, burn_in=20, time_limit=60)) == 6


def test_curvature_stops_too(small_run, monkeypatch, clock):
    late_at(monkeypatch, clock, evaluator, "measure_hessian", 3)
    with pytest.warns(RuntimeWarning, match="steps 20 were measured"):
        some = groktrace.analyze(small_run, hessian=True, time_limit=60, **QUICK)
    assert [point.hessian_trace is None for point in some] == [False, False, True, True, True, True]
    monkeypatch.undo()
    whole = groktrace.analyze(small_run, hessian=True, **QUICK).points
    assert whole[:2] == some.points[:2]
    assert [point.hessian_trace is None for point in whole] == [False] * 6
