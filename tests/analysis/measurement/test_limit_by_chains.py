"""λ of networks too large for particles: its interval covers what is known exactly, or it is said why there is none."""

import dataclasses
import json

import pytest
import torch
from torch import nn

import groktrace
from groktrace.analysis import point
from groktrace.analysis.measurement import limit_by_chains
from groktrace.analysis.measurement.limit import LadderPoint, LearningCoefficient
from groktrace.analysis.measurement.limit_by_chains import bounds
from groktrace.analysis.measurement.measure import Objective
from groktrace.errors import SettingsError
from groktrace.sampling import network
from tools.common.known_answers import bowl, geometric, reduced_rank


@pytest.fixture(autouse=True)
def no_particles(monkeypatch):
    """Small models, whose λ is known, count as too large for particles."""
    monkeypatch.setattr(point, "LIMIT", dataclasses.replace(point.LIMIT, max_weights=0))


def find(known, **settings):
    return groktrace.estimate_llc(known.model, known.loss, known.train, limit=True, **settings)


@pytest.mark.parametrize(
    "known",
    [
        bowl("wide", geometric(20, 1e3, flat=10), 1, 1),
        reduced_rank(5, 3, 5, 1, 1, 1),
        reduced_rank(12, 8, 12, 4, 1, 1),
    ],
    ids=lambda known: known.name,
)
def test_the_interval_covers_what_is_known(known):
    found = find(known)
    exact = 10 if known.name == "wide" else known.exact  # of a bowl `exact` is what one nβ counts
    assert found.reached
    assert found.reasons == ()
    assert found.low <= exact <= found.high
    assert found.llc == pytest.approx(exact, rel=0.05)
    assert 0.1 * found.llc < 1.001 * (found.high - found.low) < 0.2 * found.llc
    assert found.plateau[1] / found.plateau[0] == pytest.approx(1e3)
    assert found.gradients > 1000
    assert LearningCoefficient.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    # One nβ tells less than λ, and a higher one more.
    assert found.ladder[0].llc < 0.9 * exact
    assert found.ladder[0].llc < found.ladder[1].llc


def test_what_only_a_larger_nbeta_resolves_is_not_reached(monkeypatch):
    """Curvatures spread evenly over twelve decades: each rung shows as many more as that before."""
    monkeypatch.setattr(
        limit_by_chains, "LIMIT", dataclasses.replace(limit_by_chains.LIMIT, max_chain_steps=1_000_000, max_rungs=4)
    )
    found = find(bowl("endless", geometric(24, 1e12), 1, 1), rtol=0.05)
    assert (found.llc, found.low, found.high, found.plateau, found.reached) == (None, None, None, None, False)
    (reason,) = found.reasons
    assert reason.startswith("not reached: λ̂ still depends on nβ, and is ")
    assert reason.endswith("where the ladder ends")
    assert len(found.ladder) == 4


def test_a_budget_that_ends_is_said(monkeypatch):
    monkeypatch.setattr(limit_by_chains, "LIMIT", dataclasses.replace(limit_by_chains.LIMIT, max_chain_steps=2000))
    found = find(reduced_rank(5, 3, 5, 1, 1, 1))
    assert not found.reached
    assert f"where {found.gradients} steps of chains are spent" in found.reasons[0]
    assert 1 <= len(found.ladder) < 4


def test_a_snapshot_off_its_minimum_has_the_limit_of_the_minimum():
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = nn.Linear(6, 1, bias=False)
    right = model.weight.detach().clone()
    targets = x @ (right + 0.1).T
    with torch.no_grad():
        loss = (model(x) - targets).square().mean().item()
    found = groktrace.estimate_llc(model, "mse", (x, targets), limit=True)
    assert torch.equal(model.weight, right)
    assert found.reached
    assert found.low <= 3 <= found.high
    assert found.distance == pytest.approx(0.1 * 6**0.5 / float(right.norm()), rel=0.01)
    assert found.loss == pytest.approx(loss, rel=1e-4)
    assert found.minimum < 1e-9 * found.loss


def test_a_loss_that_falls_without_end_has_no_limit():
    x, y = torch.tensor([[1.0, 0.5], [-1.0, 0.2]]), torch.tensor([0, 1])
    torch.manual_seed(0)
    found = groktrace.estimate_llc(nn.Linear(2, 2), "cross_entropy", (x, y), limit=True)
    assert not found.reached
    assert found.llc is None
    assert found.ladder == ()
    assert found.minimum < found.loss
    assert found.distance > 0.5
    assert found.reasons[0].startswith(
        f"no minimum: the loss, {found.loss:.3g} at the snapshot, goes on falling; it is "
    )
    assert found.reasons[0].endswith(f"{found.distance:.2f}‖w*‖ away")


def test_all_samples_of_a_large_set_are_used(monkeypatch):
    monkeypatch.setattr(network, "MEMORY", dataclasses.replace(network.MEMORY, whole_bytes=0))
    sample, used = Objective.sample, set()

    def noted(own, weights, metrics, scale, *more):
        used.add(scale.samples)
        return sample(own, weights, metrics, scale, *more)

    monkeypatch.setattr(Objective, "sample", noted)
    x = torch.randn(2048, 4, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = nn.Linear(4, 1, bias=False)
    targets = x @ (model.weight.detach() + 0.01).T
    found = groktrace.estimate_llc(model, "mse", (x, targets), limit=True, rtol=0.05)
    assert used == {2048}
    assert found.low <= 2 <= found.high


def test_a_dear_gradient_is_taken_less_often(monkeypatch):
    known = reduced_rank(2, 2, 2, 1, 1, 1)
    few = len(known.train[0]) * 8 * 2000
    monkeypatch.setattr(limit_by_chains, "LIMIT", dataclasses.replace(limit_by_chains.LIMIT, max_operations=few))
    found = find(known)
    assert not found.reached
    assert len(found.ladder) == 1  # and none at all would tell nothing
    assert found.reasons[0].endswith(f"where {found.gradients} steps of chains are spent")


FLAT = "leaving the basin: the loss flattens out"


@pytest.fixture
def tried(monkeypatch):
    """Chains leave the basin at the first γ that is tried, and stay at larger ones; those tried, in order."""
    changed = dataclasses.replace(limit_by_chains.LIMIT, first_resolution=1.0)  # all curvatures are the same below
    monkeypatch.setattr(limit_by_chains, "LIMIT", changed)
    estimate, gammas = Objective.estimate, []

    def flattening(own, weights, metrics, scale, keys):
        (found,) = estimate(own, weights, metrics, scale, keys)
        if scale.localization not in gammas:
            gammas.append(scale.localization)
        return [found if len(gammas) > 1 else dataclasses.replace(found, reasons=(FLAT,))]

    monkeypatch.setattr(Objective, "estimate", flattening)
    return gammas


def test_a_limit_of_chains_that_leave_the_basin_is_none(tried):
    found = find(bowl("even", geometric(8, 1.0), 1, 1), locality=0.22)
    assert not found.reached
    assert found.llc is None
    assert found.reasons == (FLAT,)
    assert len(found.ladder) == 4  # what λ̂ comes to is shown
    assert tried == [found.localization]  # the only one, as the locality was given


def test_chains_that_leave_the_basin_are_held_closer(tried):
    known = bowl("even", geometric(8, 1.0), 1, 1)
    found = find(known, rtol=0.05)
    assert tried == pytest.approx([found.localization / 25, found.localization])
    assert found.reached
    assert found.low <= 4 <= found.high
    alone = find(known, rtol=0.05, localization=found.localization)
    assert alone.llc == found.llc
    assert found.gradients > alone.gradients + 1000  # the other ladder counts as work


@pytest.fixture
def short(monkeypatch):
    """Ladders end early."""
    changed = dataclasses.replace(limit_by_chains.LIMIT, max_chain_steps=40_000)
    monkeypatch.setattr(limit_by_chains, "LIMIT", changed)


def test_no_minimum_is_looked_for_above_that_of_the_snapshot(short):
    found = find(reduced_rank(2, 2, 2, 1, 1, 1))  # at the loss 0
    assert (found.distance, found.loss, found.minimum) == (0.0, 0.0, 0.0)


def test_rungs_are_told_as_they_are_done(short):
    told = []
    find(reduced_rank(2, 2, 2, 1, 1, 1), progress=lambda *call: told.append(call))
    rungs = [(done, total) for phase, done, total in told if phase == "sampling at each nβ"]
    assert len(rungs) >= 3
    assert rungs == sorted(rungs)
    assert rungs[-1][0] == rungs[-1][1]
    assert all(done < total for done, total in rungs[:-1])


def test_the_same_seed_gives_the_same(short):
    known = reduced_rank(2, 2, 2, 1, 1, 1)
    assert find(known) == find(known)
    assert find(known, seed=1) != find(known)


@pytest.mark.parametrize("name", ["nbeta", "resolution", "step_size"])
def test_settings_that_a_limit_does_not_have_are_refused(name):
    with pytest.raises(SettingsError, match=f"{name}: a limit has none; of the settings give localization, locality"):
        find(reduced_rank(2, 2, 2, 1, 1, 1), **{name: 3.0})


def ladder(*values, stderr=1e-6):
    return [LadderPoint(10.0**place, value, stderr) for place, value in enumerate(values)]


def test_growth_that_shrinks_by_a_factor_is_bounded_by_its_sum():
    low, high = bounds(ladder(0.0, 6.0, 8.4, 9.36))  # by 0.4: 10 in the end
    assert low == pytest.approx(9.36, rel=1e-5)
    assert high == pytest.approx(10.0, rel=1e-5)


def test_the_slower_shrinking_of_two_rungs_counts():
    # As by 0.4 once more, and then by 0.1: the last rung alone would promise 8.52.
    assert bounds(ladder(0.0, 6.0, 8.4, 8.64))[1] == pytest.approx(8.64 + 0.24 * 0.4 / 0.6)


def test_growth_that_does_not_halve_twice_has_no_bounds():
    assert bounds(ladder(1.0, 2.0, 3.0, 4.0)) is None
    assert bounds(ladder(1.0, 2.0, 3.0, 5.0)) is None
    assert bounds(ladder(0.0, 5.0, 9.0, 9.1)) is None  # but once
    assert bounds(ladder(0.0, 5.0, 7.0, 8.2)) is None  # by 0.4, and by 0.6
    # Of a trained quadratic network, whose λ is 3634.
    assert bounds(ladder(1379.0, 1567.0, 1757.0, 1990.0, 2133.0, stderr=3.0)) is None


def test_a_fall_has_no_bounds():
    assert bounds(ladder(8.0, 10.0, 10.5, 10.0, stderr=0.1)) is None
    assert bounds(ladder(0.0, 0.0, 0.0, 0.0)) is None


def test_no_growth_leaves_what_errors_hide():
    low, high = bounds(ladder(9.0, 10.0, 10.0, 10.0, stderr=0.5))
    assert low == pytest.approx(10 - 0.98)
    assert high == pytest.approx(10 + 0.98 + 0.5 * 2**0.5)


def test_fewer_than_three_decades_have_no_bounds():
    assert bounds(ladder(9.0, 10.0, 10.0)) is None
