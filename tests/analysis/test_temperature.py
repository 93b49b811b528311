import dataclasses
import json
import math

import pytest
import torch
from torch import nn

import groktrace
from groktrace.analysis.measurement import limit_by_particles as limit
from groktrace.analysis.temperature import temperature_curve_at
from groktrace.errors import SettingsError
from groktrace.run.files import read_json, write_json


def half_square(outputs, targets):
    return 0.5 * (outputs - targets).square().sum(1).mean()


@pytest.fixture
def two_scales():
    """Linear regression with ten stiff and ten all but flat directions, and its exact spectrum."""
    x = torch.randn(200, 20, generator=torch.Generator().manual_seed(0))
    x[:, 10:] *= 1e-3
    model = nn.Linear(20, 1, bias=False)
    return model, (x, model(x).detach()), torch.linalg.eigvalsh(x.double().T @ x.double() / 200)


def test_the_curve_is_the_soft_rank(two_scales):
    model, train, spectrum = two_scales
    nbetas = [1.0, 100.0, 300.0, 1000.0]
    told, settings = [], {"localization": 1.0, "chains": 4, "progress": lambda *call: told.append(call)}
    curve = groktrace.temperature_curve(model, half_square, train, nbetas, **settings)
    assert told == [("sampling at each nβ", done, 4) for done in range(5)]
    for nbeta, found in zip(nbetas, curve.estimates, strict=True):
        exact = float(0.5 * (nbeta * spectrum / (nbeta * spectrum + 1.0)).sum())
        assert found.nbeta == nbeta
        assert found.llc == pytest.approx(exact, abs=3.5 * found.stderr)
    assert curve.limit is None
    assert json.loads(json.dumps(curve.to_dict()))["limit"] is None


def test_default_temperatures_are_those_of_the_resolutions_and_a_limit_is_looked_for(two_scales, monkeypatch):
    monkeypatch.setattr(limit, "LIMIT", dataclasses.replace(limit.LIMIT, max_gradients=400))
    model, train, spectrum = two_scales
    curve = groktrace.temperature_curve(model, half_square, train, draws=4, burn_in=4)
    ratios = [found.nbeta * float(spectrum.max()) / found.localization for found in curve.estimates]
    assert ratios == pytest.approx([1, 3, 10, 30, 100, 300], rel=0.05)
    assert curve.limit.ladder[-1].nbeta > curve.estimates[0].nbeta
    assert "where the budget of 400 gradients is spent" in curve.limit.reasons[0]


QUICK = {"chains": 2, "burn_in": 5, "draws": 10}


def test_a_snapshots_curve_has_the_trajectorys_localization_and_its_own_temperatures(small_run):
    run = groktrace.open_run(small_run)
    before = temperature_curve_at(run, 0, **QUICK)
    trajectory = groktrace.analyze(run, **QUICK)
    after = temperature_curve_at(run, 0, **QUICK)
    assert {found.localization for found in after.estimates} == {trajectory.localization}
    assert before == after  # of few snapshots all are looked at
    top = trajectory.points[0].diagnostics["top_curvature"]
    ratios = [found.nbeta * top / found.localization for found in after.estimates]
    assert ratios == pytest.approx([1, 3, 10, 30, 100, 300])
    own = temperature_curve_at(run, 0, localization=7.0, **QUICK)
    assert {found.localization for found in own.estimates} == {7.0}


def test_the_localization_that_an_analysis_has_kept_is_taken(small_run):
    groktrace.analyze(small_run, **QUICK)
    (settings,) = small_run.glob("analysis/*/settings.json")
    kept = read_json(settings)
    kept["chosen"]["localization"] *= 2
    write_json(settings, kept)
    run = groktrace.open_run(small_run)
    (found,) = temperature_curve_at(run, 50, [100.0], **QUICK).estimates
    assert found.localization == kept["chosen"]["localization"]
    (other,) = temperature_curve_at(run, 50, [100.0], **QUICK | {"seed": 1}).estimates
    assert other.localization == pytest.approx(kept["chosen"]["localization"] / 2)


def test_without_an_analysis_a_few_snapshots_tell_the_localization(tmp_path, evaluated):
    model = nn.Linear(3, 2)
    x = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    with groktrace.watch(model, train=(x, x[:, :2]), loss="mse", out=tmp_path / "run", every=1) as recorder:
        for _ in range(99):
            with torch.no_grad():
                model.weight.lerp_(torch.eye(2, 3), 0.1)
            recorder.step()
    run = groktrace.open_run(tmp_path / "run")
    (found,) = temperature_curve_at(run, 3, [100.0], **QUICK).estimates
    measured = evaluated["metrics"]
    assert (measured[0], measured[1], measured[-1], len(measured)) == (3, 0, 99, 17)
    assert found.localization == pytest.approx(groktrace.analyze(run, **QUICK).localization, rel=0.1)


def test_wrong_temperatures_are_named(two_scales):
    model, train, _ = two_scales
    with pytest.raises(SettingsError, match=r"nbeta: expected a positive number or 'wbic' or 'curvature', got -1\.0"):
        groktrace.temperature_curve(model, half_square, train, [1.0, -1.0])
    with pytest.raises(SettingsError, match="nbeta: a temperature curve takes several; give them as nbetas"):
        groktrace.temperature_curve(model, half_square, train, nbeta=3.0)
    with pytest.raises(SettingsError, match="nbeta: expected a positive number or 'wbic' or 'curvature', got nan"):
        groktrace.temperature_curve(model, half_square, train, [math.nan])
