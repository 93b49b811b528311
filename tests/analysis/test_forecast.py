"""A forecast measures some snapshots as the analysis will, and writes nothing."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import groktrace
from groktrace.analysis import forecast as forecast_module
from groktrace.analysis.forecast import forecast
from groktrace.analysis.results import store
from groktrace.analysis.running import session
from groktrace.analysis.tuning import FORECAST
from groktrace.reporting.console import forecast_text
from groktrace.reporting.numbers import number
from groktrace.sampling import network

QUICK = {"chains": 3, "draws": 15, "burn_in": 10, "locality": 0.22}


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_forecast_rests_on_snapshots_measured_as_the_analysis_measures_them(small_run):
    before = contents(small_run)
    said = forecast(small_run, **QUICK)
    assert contents(small_run) == before
    trajectory = groktrace.analyze(small_run, **QUICK)
    assert (said.snapshots, said.finished, said.weights) == (len(trajectory.points), 0, 67)
    assert (said.chains, said.tried) == (3, 6)
    assert said.steps == pytest.approx(
        sum(point.diagnostics["steps"] + point.diagnostics["lost_steps"] for point in trajectory.points) / 6, abs=1
    )
    assert said.seconds > 0
    assert said.memory_bytes > 50 * 2**20
    again = forecast(small_run, **QUICK)
    assert (again.snapshots, again.finished, again.seconds, again.tried) == (0, 6, 0.0, 0)


def test_time_is_what_snapshots_take_times_how_many_there_are(small_run, monkeypatch):
    """With a clock that only sampling moves, by ten seconds a snapshot."""
    now = [0.0]
    monkeypatch.setattr(forecast_module.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(session, "available_threads", lambda place: 1)
    plain = session.Session.points

    def slow(self, metrics, scale, among, report):
        report(0, len(among))
        now[0] += 10.0 * len(among) / self.backend.threads
        for thread in range(self.backend.threads):
            report(thread + 1, len(among))
        return plain(self, metrics, scale, among)

    monkeypatch.setattr(session.Session, "points", slow)
    assert forecast(small_run, **QUICK).seconds == pytest.approx(60.0)
    monkeypatch.setattr(session, "available_threads", lambda place: 2)
    assert forecast(small_run, **QUICK).seconds == pytest.approx(30.0)


def test_snapshots_are_tried_from_all_parts_of_the_run_until_time_is_up(small_run, monkeypatch):
    order = forecast_module._from_all_parts(list(range(100)))
    assert sorted(order) == list(range(100))
    assert {25, 75} == set(order[:2])
    assert {12, 37, 62, 87} == set(order[2:6])
    monkeypatch.setattr("groktrace.analysis.measurement.measure.rows_per_stack", lambda loss, batch_size=None: 1)
    monkeypatch.setattr(forecast_module, "FORECAST", replace(FORECAST, seconds=0.0))
    assert forecast(small_run, **QUICK).tried == FORECAST.least_tried


def test_a_large_set_is_sampled_at_the_scale_of_the_analysis(tmp_path, monkeypatch):
    monkeypatch.setattr(network, "MEMORY", replace(network.MEMORY, whole_bytes=0))
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), torch.randn(1500, 4)
    y = x.sum(1, keepdim=True).tanh()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    with groktrace.watch(model, optimizer, train=(x, y), loss="mse", out=tmp_path / "run", every=20):
        for _ in range(400):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
    said = forecast(tmp_path / "run", chains=2)
    groktrace.analyze(tmp_path / "run", chains=2)
    (kept,) = (tmp_path / "run").glob("analysis/*/")
    scale = store.kept_scale(kept)
    assert (said.nbeta, said.localization) == (scale.nbeta, scale.localization)
    assert (said.samples, said.batch_size) == (scale.samples, scale.batch_size)
    text = forecast_text(said)
    assert f"posterior  nβ = {number(said.nbeta)}, γ = {number(said.localization)}" in text
    assert f"data       {said.samples:,} samples, " in text


def test_damaged_snapshots_are_left_out(small_run):
    (small_run / "weights" / f"{20:012d}.safetensors").write_bytes(b"no snapshot")
    assert forecast(small_run, **QUICK).snapshots == 5
