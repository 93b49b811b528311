"""nβ and γ of a recording that goes on, whenever one looks."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import groktrace
from groktrace.analysis.running.live_scale import LiveScale
from groktrace.analysis.running.session import open_session
from groktrace.analysis.running.setup import make_settings


@pytest.fixture
def shrinking(tmp_path):
    """A run of a network whose weights, and with them its loss, shrink from snapshot to snapshot."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2, bias=False)
    x = torch.randn(30, 3)
    with groktrace.watch(model, train=(x, 0 * x[:, :2]), loss="mse", out=tmp_path / "run", every=1) as recorder:
        for _ in range(9):
            with torch.no_grad():
                model.weight.mul_(0.85)
            recorder.step()
    return tmp_path / "run"


def scales_of(session, looks, metrics=None, **before):
    """The scale after each look, of which each finds so many snapshots more."""
    scales, metrics, found = LiveScale(session, **before), list((metrics or session.metrics()).items()), []
    for end in range(looks, len(metrics) + looks, looks):
        scales.add(dict(metrics[end - looks : end]))
        found.append((scales.step, scales.choose()))
    return found


def test_the_scale_depends_on_the_snapshots_alone_and_not_on_when_one_looks(shrinking):
    with open_session(shrinking, make_settings(None, {})) as session:
        one, three, ten = (scales_of(session, looks) for looks in (1, 3, 10))
        assert len({scale for _, scale in one}) > 2
        assert three[:3] == one[2:9:3]
        assert ten[-1] == three[-1] == one[-1]
        step, scale = one[-1]
        assert len({step for step, _ in one}) < 8  # the other snapshots call for none that differs by half
        assert scale == session.scale_of(dict(list(session.metrics().items())[: step + 1]))


@pytest.mark.parametrize(("nbeta", "least", "most"), [("curvature", 1, 1), (None, 3, 8)])
def test_a_falling_curvature_calls_for_another_nbeta_but_not_where_nbeta_follows_it(shrinking, nbeta, least, most):
    with open_session(shrinking, make_settings(None, {"nbeta": nbeta})) as session:
        first = session.metrics()[0]
        falling = {step: replace(first, top_curvature=first.top_curvature * 0.7**step) for step in session.steps}
        assert least <= len({scale for _, scale in scales_of(session, 1, falling)}) <= most


def test_what_another_process_chose_is_not_chosen_again(shrinking, monkeypatch):
    with open_session(shrinking, make_settings(None, {})) as session:
        step, scale = scales_of(session, 10)[-1]
        monkeypatch.setattr(session, "scale_of", None)
        assert scales_of(session, 10, step=step, scale=scale)[-1] == (step, scale)


def test_samples_of_a_large_set_are_chosen_from_the_whole_run_though_numbers_are_given(shrinking, monkeypatch):
    numbers = {"nbeta": 100.0, "localization": 1.0}
    with open_session(shrinking, make_settings(None, numbers)) as session:
        assert scales_of(session, 1)[-1][1] == session.kept_scale()
    with open_session(shrinking, make_settings(None, {**numbers, "seed": 1})) as session:
        metrics = session.metrics()
        monkeypatch.setattr(type(session.objective), "large_set", True)
        monkeypatch.setattr(session, "scale_of", lambda metrics: len(metrics))
        assert scales_of(session, 5, metrics)[-1][1] == 1
        assert session.kept_scale() is None
