import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from groktrace.errors import SettingsError
from groktrace.recording.schedule import is_log_step, make_schedule


@given(st.integers(1, 10**6), st.integers(0, 10**9))
def test_every_keeps_multiples(every, step):
    assert make_schedule(every).keep(step) == (step % every == 0)


def test_default_is_every_hundred():
    assert make_schedule().description == {"kind": "every", "every": 100}
    assert make_schedule(np.int64(7)).description == {"kind": "every", "every": 7}


@given(st.sets(st.integers(0, 10**9), min_size=1, max_size=50), st.integers(0, 10**9))
def test_explicit_steps(steps, other):
    plan = make_schedule(schedule=iter(steps))
    assert all(plan.keep(step) for step in steps)
    assert plan.keep(other) == (other in steps)
    assert plan.description == {"kind": "steps", "steps": sorted(steps)}


def test_function():
    def odd(step):
        return step % 2

    plan = make_schedule(schedule=odd)
    assert [plan.keep(step) for step in range(3)] == [False, True, False]
    assert plan.description["name"].endswith("odd")


def test_log_keeps_all_of_the_first_few_and_every_power_of_ten():
    plan = make_schedule(schedule="log")
    assert all(plan.keep(step) for step in range(1, 12))
    assert all(plan.keep(10**k) for k in range(12))
    assert not plan.keep(0)


@pytest.mark.parametrize("decade", [10, 100, 1000, 10_000])
def test_log_keeps_twenty_a_decade(decade):
    assert sum(map(is_log_step, range(decade, 10 * decade))) == 20


@given(st.integers(30, 10**11))
def test_log_steps_lie_evenly(step):
    assert any(is_log_step(s) for s in range(step, step + 20)) or any(
        is_log_step(round(10 ** (k / 20))) and step / 1.13 <= 10 ** (k / 20) <= step * 1.13 for k in range(221)
    )


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "10", float("nan"), 10**15])
def test_refuses_wrong_intervals(every):
    with pytest.raises(SettingsError, match="every: expected a whole number"):
        make_schedule(every)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("linear", "got 'linear'"),
        (3, "expected 'log', steps, or a function"),
        ([], "got none"),
        ([1, -2], "schedule: expected a whole number"),
        ([1, 2.5], "schedule: expected a whole number"),
        (itertools.count(), "expected 1 to 1000000 steps"),
    ],
)
def test_refuses_wrong_schedules(schedule, message):
    with pytest.raises(SettingsError, match=message):
        make_schedule(schedule=schedule)


def test_refuses_both():
    with pytest.raises(SettingsError, match="give one of the two"):
        make_schedule(10, "log")
