"""Draws that are kept: λ from them, whichever chains made them, and what becomes of them on going on."""

import importlib.util
import math
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import groktrace
from groktrace.analysis.measurement import measure
from groktrace.analysis.results import draws as module
from groktrace.analysis.results.draws import draws_path
from groktrace.analysis.results.journal import read_lines
from groktrace.analysis.results.store import POINTS_FILE
from groktrace.errors import GroktraceError, RunError, SettingsError
from groktrace.run import layout
from groktrace.run.files import write_tensors
from groktrace.sampling import network

FAST = {"draws": 20, "burn_in": 20}


def classifier():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def check(path, trajectory, count):
    """What is kept gives λ̂ and λ_c to rounding, and, if single samples' losses are of all that is used, so do they."""
    run = groktrace.open_run(path)
    assert len(trajectory) > 0
    for point in trajectory:
        found = run.draws(point.step)
        draws = int(point.diagnostics["steps"]) - found.burn_in
        assert found.llc == pytest.approx(point.llc, rel=1e-12)
        assert found.llc_centred == pytest.approx(point.llc_centred, rel=1e-12)
        chains, drawn, samples = found.sample_losses.shape
        assert found.delta_loss.shape == found.distance.shape == (chains, drawn) == (chains, draws)
        assert samples == len(found.samples) == len(found.sample_losses_at_snapshot) == count
        assert found.loss == point.train_loss
        norm = point.diagnostics["norm"]
        assert math.sqrt((found.distance**2).mean()) / norm == pytest.approx(point.diagnostics["distance"], rel=1e-5)
        losses, base = found.sample_losses.astype(float), found.sample_losses_at_snapshot.astype(float)
        # Draw by draw, as the mean would hide another order; losses of minibatches differ.
        np.testing.assert_allclose(losses.mean(2) - base.mean(), found.delta_loss, rtol=1e-4, atol=1e-6)


def contents(folder):
    """Tensors and metadata of files by name; their headers have no fixed order."""
    found = {path.name: module.read_tensors(path) for path in folder.iterdir()}
    return {name: ({key: t.tolist() for key, t in tensors.items()}, about) for name, (tensors, about) in found.items()}


def singles(run, step, samples):
    """The losses of samples at a snapshot, by the network itself."""
    model = classifier()
    run.snapshots[step // 10].load_into(model)
    x, y = run.data.train.take(torch.from_numpy(samples)).nested()
    with torch.no_grad():
        return nn.functional.cross_entropy(model(x), y, reduction="none").numpy()


@pytest.mark.parametrize(
    "settings",
    [{"nbeta": 10.0, "chains": 2, "rtol": 0.1}, {"chains": 3, **FAST}, {"nbeta": "curvature", **FAST}],
    ids=str,
)
def test_lambda_is_that_of_the_draws_that_were_kept(small_run, settings):
    plain = groktrace.analyze(shutil.copytree(small_run, small_run.parent / "copy"), **settings)
    kept = groktrace.analyze(small_run, keep="losses", **settings)
    assert kept.points == plain.points
    check(small_run, kept, 60)
    run = groktrace.open_run(small_run)
    found = run.draws(30)
    assert found.samples.tolist() == list(range(60))
    np.testing.assert_allclose(found.sample_losses_at_snapshot, singles(run, 30, found.samples), rtol=1e-5)
    if "draws" not in settings:  # some were added
        assert found.delta_loss.shape[1] > 64


def test_singular_fluctuation_is_that_of_the_samples(small_run):
    trajectory = groktrace.analyze(small_run, keep="losses", chains=4, draws=400, burn_in=50, nbeta=30.0)
    found = groktrace.open_run(small_run).draws(50)
    variance = found.sample_losses.astype(float).var(1, ddof=1).mean()
    assert 0.5 * found.nbeta * variance == pytest.approx(
        trajectory.points[-1].diagnostics["singular_fluctuation"], rel=0.3
    )


def test_influence_is_that_of_a_linear_model(tmp_path):
    """Of y = wx with no error, ℓ_i = x_i²δ², and δ is normal: all covariances are known."""
    model, x = nn.Linear(1, 1, bias=False), torch.tensor([[0.5], [1.0], [1.5], [2.0]])
    with groktrace.watch(model, train=(x, model(x).detach()), loss="mse", out=tmp_path / "run", every=1):
        pass
    nbeta, localization = 50.0, 10.0
    settings = {"nbeta": nbeta, "localization": localization, "chains": 8, "draws": 1500, "burn_in": 50}
    groktrace.analyze(tmp_path / "run", keep="losses", **settings)
    draws = groktrace.open_run(tmp_path / "run").draws(0)
    found = np.cov(draws.sample_losses.reshape(-1, 4), rowvar=False)
    variance = 1 / (nbeta * 2 * float(x.square().mean()) + localization)
    squares = x.square().flatten().numpy()
    np.testing.assert_allclose(found, 2 * variance**2 * np.outer(squares, squares), rtol=0.15)
    assert (draws.distance**2).mean() == pytest.approx(variance, rel=0.05)


def test_large_networks_keep_them_too(small_run, monkeypatch):
    memory = replace(network.MEMORY, large_weights=1, micro_batch_bytes=2000, micro_batch_share=0)
    monkeypatch.setattr(network, "MEMORY", memory)
    kept = groktrace.analyze(small_run, keep="losses", nbeta=50.0, chains=2, draws=10, burn_in=5)
    check(small_run, kept, 60)
    run = groktrace.open_run(small_run)
    np.testing.assert_allclose(run.draws(50).sample_losses_at_snapshot, singles(run, 50, np.arange(60)), rtol=1e-5)


def test_of_large_sets_the_samples_are_those_of_the_posterior(small_run, monkeypatch):
    monkeypatch.setattr(network, "MEMORY", replace(network.MEMORY, whole_bytes=1, micro_batch_bytes=1))
    settings = {"samples": 32, "batch_size": 16, "nbeta": 50.0, "chains": 2, **FAST}
    kept = groktrace.analyze(small_run, keep="losses", **settings)
    run = groktrace.open_run(small_run)
    for point in kept:
        found = run.draws(point.step)
        assert found.llc == pytest.approx(point.llc, rel=1e-12)
        assert found.sample_losses.shape == (2, 20, 32)
        assert len(set(found.samples.tolist())) == 32
        expected = singles(run, point.step, found.samples)
        np.testing.assert_allclose(found.sample_losses_at_snapshot, expected, rtol=1e-5)


def test_of_other_data_the_samples_are_those(small_run):
    x, y = torch.randn(25, 4), torch.arange(25) % 3
    groktrace.analyze(small_run, **FAST)
    refined = groktrace.analyze(small_run, train=(x, y), keep="losses", **FAST)
    check(small_run, refined, 25)


def test_what_was_kept_is_found_again_and_what_was_not_is_sampled_once_more(small_run, evaluated):
    calls = evaluated["llc"]

    def analyzed(keep):
        calls.clear()
        found = groktrace.analyze(small_run, keep=keep, **FAST)
        return found, len(calls)

    plain, _ = analyzed(None)
    assert not list(small_run.glob("analysis/*/draws"))
    kept, sampled = analyzed("draws")
    assert (kept, sampled) == (plain, 6)
    assert analyzed("draws") == (plain, 0)
    assert groktrace.open_run(small_run).draws(0).sample_losses is None
    assert analyzed("losses") == (plain, 6)
    assert analyzed("losses") == analyzed("draws") == analyzed(None) == (plain, 0)
    (folder,) = small_run.glob("analysis/*/draws")
    whole = contents(folder)
    assert sorted(whole) == [f"{step:012d}.safetensors" for step in range(0, 60, 10)]
    (folder / "000000000010.safetensors").unlink()
    (folder / "000000000030.safetensors").write_bytes(b"torn")
    (folder / ".tmp-killed").write_bytes(b"torn")
    assert analyzed("losses")[1] == 6  # one stack
    assert contents(folder) == whole
    assert len(read_lines(folder.parent / POINTS_FILE)) == 6  # as λ is the same, once each
    groktrace.analyze(small_run, keep="draws", seed=1, **FAST)
    assert len(list(small_run.glob("analysis/*/draws"))) == 2
    assert analyzed("losses")[1] == 0


def test_an_interrupted_analysis_goes_on_and_keeps_the_same(small_run, tmp_path, monkeypatch, evaluated):
    other = shutil.copytree(small_run, tmp_path / "other" / "run")
    monkeypatch.setattr(measure, "rows_per_stack", lambda loss, batch_size=None: 4)
    groktrace.analyze(small_run, keep="losses", **FAST)

    def interrupt(phase, done, total):
        if phase == "sampling" and done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        groktrace.analyze(other, keep="losses", progress=interrupt, **FAST)
    evaluated.clear()
    with ThreadPoolExecutor(1) as executor:  # and elsewhere
        groktrace.analyze(other, keep="losses", executor=executor, **FAST)
    assert len(evaluated["llc"]) == 2
    (one,), (two,) = ([*run.glob("analysis/*/draws")] for run in (small_run, other))
    assert contents(one) == contents(two)


def test_following_keeps_those_of_the_final_points(small_run):
    *_, end = groktrace.follow(small_run, keep="losses", **FAST)
    check(small_run, end.trajectory, 60)


def test_a_snapshot_without_an_estimate_has_none(tmp_path, evaluated):
    model = nn.Linear(3, 2)
    x = torch.randn(30, 3)
    with groktrace.watch(model, train=(x, x[:, :2]), loss="mse", out=tmp_path / "run", every=1) as recorder:
        recorder.step()
        with torch.no_grad():
            model.weight.fill_(math.inf)
        recorder.step()
    first = groktrace.analyze(tmp_path / "run", keep="draws", **FAST)
    assert [point.llc is None for point in first] == [False, False, True]
    evaluated.clear()
    assert groktrace.analyze(tmp_path / "run", keep="draws", **FAST) == first
    assert not evaluated["llc"]
    with pytest.raises(RunError, match=r"the draws of step 2 were not kept; those of steps 0 to 1 are"):
        groktrace.open_run(tmp_path / "run").draws(2)


def test_what_cannot_be_kept_is_said_before_the_work(small_run, tmp_path):
    with pytest.raises(SettingsError, match="keep: expected 'draws' or 'losses', got 'all'"):
        groktrace.analyze(small_run, keep="all", **FAST)
    model, x = nn.Linear(3, 2), torch.randn(30, 3)

    def spread(network, batch):
        return (network(batch[0]) - network(batch[0]).mean(0)).square().mean()

    with groktrace.watch(model, train=(x, x), batch_loss=spread, out=tmp_path / "other", every=1):
        pass
    with pytest.raises(SettingsError, match="keep: the loss is no mean over samples"):
        groktrace.analyze(tmp_path / "other", keep="losses", **FAST)
    assert groktrace.analyze(tmp_path / "other", keep="draws", nbeta=9.0, localization=1.0, **FAST)
    assert groktrace.open_run(tmp_path / "other").draws(0).llc


def test_missing_damaged_and_foreign_files_are_refused(small_run, record_like, tmp_path):
    groktrace.analyze(small_run, **FAST)
    run = groktrace.open_run(small_run)
    with pytest.raises(RunError, match=r"step 10 were not kept; none are\. To keep them: groktrace analyze .* --keep"):
        run.draws(10)
    groktrace.analyze(small_run, keep="losses", **FAST)
    (folder,) = small_run.glob("analysis/baoab-*")
    path = draws_path(folder, 10)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(RunError, match="does not match its digest"):
        run.draws(10)
    tensors, metadata = module.read_tensors(draws_path(folder, 20))
    for name, wrong in (("samples", torch.arange(3)), ("delta_loss", torch.ones(3)), ("centred", torch.ones(2))):
        write_tensors(path, tensors | {name: wrong}, {"draws": metadata["draws"].replace('"step": 20', '"step": 10')})
        with pytest.raises(RunError, match="another snapshot than is there now"):
            run.draws(10)
        write_tensors(draws_path(folder, 20), tensors | {name: wrong}, {"draws": metadata["draws"]})
        with pytest.raises(RunError, match="its tensors do not fit together"):
            run.draws(20)
    for about in ("null", "{}", "[" * 10**5, metadata["draws"].replace('"nbeta"', '"beta"')):
        write_tensors(path, tensors, {"draws": about})
        with pytest.raises(RunError, match=r"000000000010\.safetensors: damaged"):
            run.draws(10)
    other = record_like(small_run, tmp_path / "another", 0.3)
    (tmp_path / "another" / layout.ANALYSIS_FOLDER).mkdir()
    shutil.copy(layout.snapshot_path(other, 30), layout.snapshot_path(small_run, 30))
    with pytest.raises(RunError, match="another snapshot than is there now"):
        run.draws(30)


def test_arviz_says_the_same(small_run):
    point = groktrace.analyze(small_run, keep="losses", chains=4, draws=100, burn_in=30).points[-1]
    draws = groktrace.open_run(small_run).draws(point.step)
    if importlib.util.find_spec("arviz") is None:
        pytest.skip("arviz is not installed")
    data = draws.to_inference_data()
    import arviz

    assert float(data["posterior"]["llc"].mean()) == pytest.approx(point.llc)
    assert dict(data["posterior"].sizes) == {"chain": 4, "draw": 100, "obs_id": 60}
    assert data["posterior"]["obs_id"].values.tolist() == draws.samples.tolist()
    np.testing.assert_array_equal(data["constant_data"]["sample_loss_at_snapshot"], draws.sample_losses_at_snapshot)
    assert data["posterior"].attrs["nbeta"] == draws.nbeta
    rhat = float(arviz.rhat(data, var_names=["llc"], method="split")["llc"])
    assert rhat == pytest.approx(point.diagnostics["rhat"], abs=0.02)
    groktrace.analyze(small_run, keep="draws", seed=1, **FAST)
    assert set(groktrace.open_run(small_run).draws(0).to_inference_data()["posterior"]) == {"llc", "distance"}


def test_without_arviz_it_says_what_to_install(small_run, monkeypatch):
    groktrace.analyze(small_run, keep="draws", **FAST)
    monkeypatch.setitem(sys.modules, "arviz", None)
    with pytest.raises(GroktraceError, match=r"needs ArviZ: pip install 'groktrace\[arviz\]'"):
        groktrace.open_run(small_run).draws(0).to_inference_data()
