import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import groktrace
from groktrace.errors import RunError, SettingsError, SnapshotError
from groktrace.run import layout
from groktrace.run.files import write_json
from groktrace.sampling import network

FAST = {"draws": 20, "burn_in": 20}


def test_points_carry_what_is_known_of_each_snapshot(small_run):
    trajectory = groktrace.analyze(small_run, **FAST)
    assert [point.step for point in trajectory.points] == [0, 10, 20, 30, 40, 50]
    assert trajectory.n == 60
    assert trajectory.resolution == 10.0
    last = trajectory.points[-1]
    assert last.metrics["lr"] == pytest.approx(4.8)  # logged before the snapshot was taken
    assert last.train_loss < trajectory.points[0].train_loss
    assert 0 <= last.val_accuracy <= 1
    assert last.diagnostics["virial"] == pytest.approx(1, abs=0.5)
    assert trajectory.unreadable == ()


def test_snapshots_that_are_not_finite_are_named_and_the_rest_is_measured(tmp_path):
    model = nn.Linear(2, 1)
    x = torch.randn(10, 2, generator=torch.Generator().manual_seed(0))
    with groktrace.watch(model, train=(x, x[:, :1]), loss="mse", out=tmp_path / "run", every=1) as recorder:
        for _ in range(2):
            recorder.step()
        with torch.no_grad():
            model.weight.fill_(float("nan"))
        recorder.step()
    trajectory = groktrace.analyze(tmp_path / "run", **FAST)
    last = trajectory.points[-1]
    assert (last.step, last.llc, last.reliable) == (3, None, False)
    assert last.reasons == ("the weights, the loss or its curvature at the snapshot are not finite",)
    assert trajectory.points[0].llc is not None
    assert json.loads(json.dumps(trajectory.to_dict(), allow_nan=False))


class Odd(nn.Module):
    """A network with an empty parameter, in some precision."""

    def __init__(self, dtype):
        super().__init__()
        self.inner = nn.Linear(2, 1, dtype=dtype)
        self.empty = nn.Parameter(torch.zeros(0, 3, dtype=dtype))

    def forward(self, x):
        return self.inner(x) + self.empty.sum()


def record_odd(root, dtype, samples, loss="mse"):
    x = torch.randn(samples, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    with groktrace.watch(Odd(dtype), train=(x, x[:, :1]), loss=loss, out=root, every=1) as recorder:
        recorder.step()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("samples", [1, 10])
def test_odd_networks_get_numbers(tmp_path, dtype, samples):
    record_odd(tmp_path / "run", dtype, samples)
    trajectory = groktrace.analyze(tmp_path / "run", hessian=True, **FAST)
    assert trajectory.n == samples
    for name in ("llc", "stderr", "train_loss", "hessian_trace"):
        assert np.isfinite(trajectory.column(name)).all(), name


class LastState(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, sequence):
        return self.head(self.cells(sequence)[0][:, -1])


def test_operations_that_cannot_be_stacked_are_no_news(tmp_path, capfd):
    torch.manual_seed(0)
    x, model = torch.randn(20, 5, 3), LastState()
    groktrace.watch(model, train=(x, x[:, -1, :1]), loss="mse", out=tmp_path / "run").close()
    (point,) = groktrace.analyze(tmp_path / "run", progress=False, **FAST).points
    assert point.llc is not None
    assert capfd.readouterr().err == ""


def test_a_constant_loss_has_no_scale_of_its_own_and_no_complexity(tmp_path):
    record_odd(tmp_path / "run", torch.float32, 10, lambda outputs, targets: (0 * outputs).sum())
    with pytest.raises(SettingsError, match=r"nbeta: cannot be derived from a curvature that is zero.* give nbeta"):
        groktrace.analyze(tmp_path / "run", **FAST)
    trajectory = groktrace.analyze(tmp_path / "run", nbeta=100.0, localization=1.0, **FAST)
    assert [point.llc for point in trajectory.points] == [0.0, 0.0]


def test_wbic_of_a_single_sample_is_refused(tmp_path):
    record_odd(tmp_path / "run", torch.float32, 1)
    with pytest.raises(SettingsError, match="'wbic' is n/log n and needs at least 2 samples, got 1"):
        groktrace.analyze(tmp_path / "run", nbeta="wbic", **FAST)


def seeds_of(monkeypatch, run, **settings):
    """The seed of every generator that an analysis makes."""
    from groktrace.sampling import noise

    seeds = []
    original = noise.generator_for

    def noting(*key):
        generator = original(*key)
        seeds.append(generator.initial_seed())
        return generator

    with monkeypatch.context() as patch:
        for module in (
            "groktrace.sampling.stack",
            "groktrace.analysis.measurement.measure",
            "groktrace.analysis.measurement.hessian",
        ):
            patch.setattr(f"{module}.generator_for", noting)
        groktrace.analyze(run, **FAST, **settings)
    return seeds


def test_runs_share_no_noise_and_copies_all_of_it(small_run, tmp_path, monkeypatch, record_like):
    copy = shutil.copytree(small_run, tmp_path / "copy" / "run")
    seeds = seeds_of(monkeypatch, small_run, hessian=True, locality=0.22)
    assert len(set(seeds)) == len(seeds) > 18
    assert seeds_of(monkeypatch, copy, hessian=True, locality=0.22) == seeds
    # From the same start, at the same rate: the same training, whatever was logged.
    (first, *_), same = groktrace.analyze(copy, **FAST).points, record_like(small_run, tmp_path / "same", 0.1, seen=3.0)
    assert groktrace.analyze(same, **FAST).points[0].llc == first.llc
    # At another rate only the start is the same, on other data nothing.
    other = seeds_of(monkeypatch, record_like(small_run, tmp_path / "faster", 0.2), hessian=True, locality=0.22)
    assert len(set(other) & set(seeds)) * 6 == len(seeds)
    assert not set(
        seeds_of(monkeypatch, record_like(small_run, tmp_path / "data", 0.1, 1.5), hessian=True, locality=0.22)
    ) & set(seeds)


def test_paper_settings_run_as_published(small_run):
    settings = {"method": "sgld", "nbeta": 30.0, "localization": 5.0, "step_size": 1e-4, "chains": 3, "batch_size": 16}
    trajectory = groktrace.analyze(small_run, **settings, burn_in=10, draws=30)
    assert (trajectory.nbeta, trajectory.localization, trajectory.method) == (30.0, 5.0, "sgld")
    assert (trajectory.resolution, trajectory.locality) == (None, None)


def test_mismatched_shapes_are_named(small_run):
    info = json.loads((small_run / layout.RUN_FILE).read_text())
    info["weights"]["0.weight"]["shape"] = [8, 5]
    write_json(small_run / layout.RUN_FILE, info)
    with pytest.raises(SnapshotError, match=r"'0.weight' should be float32\[8, 5\] as run.json says, but is"):
        groktrace.open_run(small_run).snapshots[0].load()
    with pytest.raises(RunError, match="none of its snapshots can be read"):
        groktrace.analyze(small_run, **FAST)


def test_a_reference_goes_with_the_trajectory_and_is_replaced(small_run):
    given = groktrace.analyze(small_run, **FAST, reference=3)
    assert given.reference.to_dict() | {"llc": 3.0, "source": "value"} == given.reference.to_dict()
    assert groktrace.open_run(small_run).trajectory() == given
    ranked = groktrace.analyze(small_run, **FAST, reference="jacobian").reference
    assert (ranked.source, ranked.step, 2 * ranked.llc) == ("jacobian", 50, ranked.rank)
    # Two layers of tanh have no symmetry that is continuous: all 67 weights count.
    assert ranked.rank == 67
    assert groktrace.open_run(small_run).trajectory().reference == ranked
    assert groktrace.analyze(small_run, **FAST).reference is None


def test_curvature_is_measured_where_asked_for_and_kept(small_run, evaluated):
    plain = groktrace.analyze(small_run, **FAST)
    assert plain.points[0].hessian_trace is None
    curved = groktrace.analyze(small_run, **FAST, hessian=True)
    assert len(evaluated["hessian"]) == 6
    for point in curved.points:
        assert 0 < point.hessian_top < point.hessian_trace
        assert 0 < point.hessian_trace_stderr < point.hessian_trace
        assert point.hessian_top == pytest.approx(point.diagnostics["top_curvature"], rel=0.07)
    assert groktrace.analyze(small_run, **FAST, hessian=True) == curved
    assert groktrace.open_run(small_run).trajectory() == curved
    assert len(evaluated["hessian"]) == 6


@pytest.mark.parametrize("large", [False, True])
def test_nbeta_that_follows_the_curvature_is_at_each_snapshot_the_number_given(small_run, monkeypatch, large):
    if large:
        monkeypatch.setattr(network, "MEMORY", replace(network.MEMORY, large_weights=1))
    settings = {"chains": 2, "burn_in": 20, "draws": 60, "localization": 5.0, "resolution": 30.0}
    following = groktrace.analyze(small_run, nbeta="curvature", **settings)
    assert (following.nbeta, following.resolution, following.follows_curvature) == (None, 30.0, True)
    nbetas = [point.diagnostics["nbeta"] for point in following.points]
    assert max(nbetas) > 1.1 * min(nbetas)
    for point in (following.points[0], following.points[-1]):
        top = point.diagnostics["top_curvature"]
        assert point.diagnostics["nbeta"] == pytest.approx(30.0 * 5.0 / top)
        fixed = groktrace.analyze(small_run, nbeta=point.diagnostics["nbeta"], **settings)
        (same,) = (other for other in fixed.points if other.step == point.step)
        assert point.llc == pytest.approx(same.llc, rel=1e-3)
        assert point.llc_centred == pytest.approx(same.llc_centred, rel=1e-3)
        if not large:
            seen = point.diagnostics["singular_fluctuation"]
            assert seen == pytest.approx(same.diagnostics["singular_fluctuation"], rel=1e-3)


@pytest.mark.parametrize(("loss", "follows"), [("cross_entropy", True), ("mse", False)])
def test_where_the_curvature_falls_away_nbeta_follows_it_by_default(tmp_path, loss, follows):
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0)).sign()
    classes = (x[:, 0] > 0).long()
    targets = classes if follows else nn.functional.one_hot(classes, 2).float()
    model, run = nn.Linear(2, 2, bias=False), tmp_path / "run"
    with groktrace.watch(model, train=(x, targets), loss=loss, out=run, every=1) as recorder, torch.no_grad():
        for size in np.geomspace(0.1, 8.0, 12):  # margins that grow
            model.weight.copy_(size * torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
            recorder.step()
    found = groktrace.analyze(run, chains=2, burn_in=10, draws=20)
    assert found.follows_curvature is follows
    assert found.resolution == (100.0 if follows else 10.0)
    assert found.weight_decay is None
