"""Who is told how far an analysis is: a function of the user's, standard error, or nobody."""

import pytest
import torch
from torch import nn

import groktrace
from groktrace.analysis import progress as module

FAST = {"draws": 20, "burn_in": 20}


@pytest.fixture
def loud(monkeypatch):
    """Everything is shown, however short it is."""
    monkeypatch.setattr(module, "QUIET_SECONDS", 0.0)


def estimate(**more):
    torch.manual_seed(0)
    x = torch.randn(20, 3)
    return groktrace.estimate_llc(nn.Linear(3, 2), "mse", (x, x[:, :2]), **FAST, **more)


def test_an_analysis_shows_on_standard_error_how_far_it_is(small_run, loud, capsys):
    groktrace.analyze(small_run, **FAST)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" done in ")[0] for line in lines] == [
        "losses, curvature: 6",
        "locality, samples, batches: 1",
        "sampling: 6",
    ]


def test_so_does_a_single_estimate(loud, capsys):
    estimate()
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == [
        "losses, curvature",
        "locality, samples, batches",
        "sampling",
    ]


def test_short_ones_show_nothing(small_run, capsys):
    groktrace.analyze(small_run, **FAST)
    estimate()
    assert capsys.readouterr().err == ""


def test_nothing_is_shown_where_that_is_asked_for_or_a_function_is_told(small_run, loud, capsys):
    groktrace.analyze(small_run, **FAST, progress=False)
    estimate(progress=False)
    told = []
    groktrace.analyze(small_run, **FAST, seed=1, progress=lambda *how: told.append(how))
    estimate(progress=lambda *how: told.append(how))
    assert ("sampling", 6, 6) in told
    assert told[-1] == ("sampling", 1, 1)
    assert capsys.readouterr().err == ""
