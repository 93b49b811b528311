"""Whole chains against exact answers: harmonic bowls at every temperature, with and without a minimum at w*."""

import math
from dataclasses import replace

import pytest
import torch

from groktrace.sampling import chains, engine, posterior, stack
from groktrace.sampling.calibration import resolve, run_length, slowdown, step_size
from groktrace.sampling.chains import rows_per_stack, sample
from groktrace.sampling.diagnostics import standard_error
from groktrace.sampling.kernels import KERNELS, base
from groktrace.sampling.posterior import StackedLoss
from groktrace.sampling.settings import ResolvedSettings, SamplingSettings
from groktrace.sampling.traces import Traces
from groktrace.sampling.tuning import EQUILIBRIUM, SUBSAMPLED
from groktrace.sampling.weights import WeightLayout

SPECTRUM = torch.cat([torch.zeros(20), torch.logspace(-3, 0, 40)]).double()


def draw(loss, anchors, settings, nbeta, gamma, top=1.0, steps=None, needed=lambda traces: 1.0, epsilons=None):
    steps = list(range(len(anchors))) if steps is None else steps
    epsilons = epsilons or [step_size(nbeta, gamma, top)] * len(anchors)
    settings = resolve(settings, anchors.shape[1], stacked=True)
    return sample(loss, anchors, steps, settings, nbeta, gamma, epsilons, needed)


def soft_rank(nbeta, gamma):
    """½Σ nβh/(nβh + γ): λ̂ of a harmonic bowl, exactly."""
    return float(0.5 * (nbeta * SPECTRUM / (nbeta * SPECTRUM + gamma)).sum())


@pytest.mark.parametrize(("nbeta", "gamma"), [(10.0, 1.0), (100.0, 1.0), (30.0, 5.0)])
def test_llc_of_a_bowl_is_its_soft_rank(bowl, nbeta, gamma):
    settings = SamplingSettings(chains=16, draws=750)
    (traces,) = draw(bowl(SPECTRUM), torch.zeros(1, 60).double(), settings, nbeta, gamma)
    for estimate, series in (
        (traces.delta_loss.mean(), traces.delta_loss),
        (traces.centred_draws[100:].mean(), traces.centred_draws[100:].mean(1, keepdim=True)),
        (0.5 * traces.virial.mean(), traces.delta_loss),
    ):
        error = standard_error(series)
        assert error < 0.04 * soft_rank(nbeta, gamma)
        assert float(estimate) == pytest.approx(soft_rank(nbeta, gamma), abs=3.5 * error)


def test_off_the_minimum_the_centred_estimate_holds_and_the_plain_one_has_the_known_offset(bowl):
    nbeta, gamma = 100.0, 1.0
    minimum = torch.where(SPECTRUM > 0, 0.5, 0.0)
    settings = SamplingSettings(chains=16, draws=750)
    (traces,) = draw(bowl(SPECTRUM, minimum=minimum), torch.zeros(1, 60).double(), settings, nbeta, gamma)
    total = nbeta * SPECTRUM + gamma
    mean = nbeta * SPECTRUM * minimum / total
    offset = 0.5 * nbeta * float((SPECTRUM * ((mean - minimum).square() - minimum.square())).sum())
    assert offset < -soft_rank(nbeta, gamma)
    series = traces.centred_draws.mean(1, keepdim=True)
    assert float(series.mean()) == pytest.approx(soft_rank(nbeta, gamma), abs=3.5 * standard_error(series))
    assert traces.centred == pytest.approx(soft_rank(nbeta, gamma), abs=3.5 * traces.centred_error)
    assert float(traces.delta_loss.mean()) == pytest.approx(
        soft_rank(nbeta, gamma) + offset, abs=3.5 * standard_error(traces.delta_loss)
    )


def recorded_pairs(monkeypatch, nbeta, chains, burn_in):
    """¼nβ(w_a − w_b)·(g_a − g_b) of neighbouring chains at each draw, their mean; a list that fills."""
    steps, found, step = [], [], type(KERNELS["baoab"]).step

    def recorded(self, displacement, momentum, gradient, *rest):
        steps.append(None)
        if len(steps) > burn_in:
            w, g = (rows.unflatten(0, (-1, chains)) for rows in (displacement, gradient))
            found.append(0.25 * nbeta * ((w - w.roll(-1, 1)) * (g - g.roll(-1, 1))).sum(2).mean(1))
        step(self, displacement, momentum, gradient, *rest)

    monkeypatch.setattr(type(KERNELS["baoab"]), "step", recorded)
    return found


@pytest.mark.parametrize(("chains", "draws", "least_gain"), [(2, 400, 1.6), (2, 100, 1.2), (4, 400, 1.2)])
@pytest.mark.parametrize("off", [0.0, 0.5])
def test_means_of_chains_make_the_centred_estimate_surer_and_its_error_says_by_how_much(
    bowl, monkeypatch, chains, draws, least_gain, off
):
    count, nbeta, gamma = 200, 100.0, 1.0
    minimum = torch.where(SPECTRUM > 0, off, 0.0)
    settings = SamplingSettings(chains=chains, draws=draws)
    burn_in = run_length(resolve(settings, 60, stacked=True), gamma, step_size(nbeta, gamma, 1.0))[0]
    pairs = recorded_pairs(monkeypatch, nbeta, chains, burn_in)
    found = draw(bowl(SPECTRUM, minimum=minimum), torch.zeros(count, 60).double(), settings, nbeta, gamma)
    pairs = torch.stack(pairs).mean(0)
    values = torch.tensor([traces.centred for traces in found])
    errors = torch.tensor([traces.centred_error for traces in found])
    off_by = (values - soft_rank(nbeta, gamma)) / errors
    assert abs(float(values.mean()) - soft_rank(nbeta, gamma)) < 3.5 * float(values.std()) / count**0.5
    assert 0.87 < float((off_by.abs() < 2).double().mean()) < 0.99  # of 600: 0.92 at 100 draws, 0.95 at 400
    # And as surely: errors of pairs scattered by 0.45 of their mean at 100 draws, and by 0.25 at 400.
    assert float(errors.std() / errors.mean()) < 0.35
    assert float(pairs.var() / values.var()) > least_gain


def test_each_centred_draw_is_centred_by_the_other_chains_draws_so_far(bowl):
    """However many pieces they are made in; and their expectation is λ_c from the first one on."""
    nbeta, gamma, count = 100.0, 1.0, 400
    minimum = torch.where(SPECTRUM > 0, 0.5, 0.0)
    settings = SamplingSettings(chains=3, burn_in=60, draws=None)
    found = draw(
        bowl(SPECTRUM, minimum=minimum), torch.zeros(count, 60).double(), settings, nbeta, gamma,
        needed=lambda traces: 200 / len(traces.delta_loss),
    )  # fmt: skip
    rows = torch.stack([traces.centred_draws for traces in found])
    assert rows.shape[1] >= 200
    for piece in (rows[:, :2], rows[:, 62:66], rows[:, -2:]):
        scatter = float(piece.mean((1, 2)).std()) / count**0.5
        assert float(piece.mean()) == pytest.approx(soft_rank(nbeta, gamma), abs=3.5 * scatter)
    # At first a single draw of the others centres, in the end the mean of two hundred.
    assert float(rows[:, 0].var()) > 1.2 * float(rows[:, -1].var())


def test_without_means_the_centred_estimate_is_the_mean_of_its_draws(bowl):
    settings = SamplingSettings(chains=3, draws=100)
    (traces,) = draw(bowl(SPECTRUM), torch.zeros(1, 60).double(), settings, 100.0, 1.0)
    assert traces.means.shape == (3, 3)
    alone = replace(traces, means=None)
    assert alone.centred == pytest.approx(float(traces.centred_draws.mean()))
    assert alone.centred_error == pytest.approx(1.5**0.5 * standard_error(traces.centred_draws))


def test_means_are_of_all_draws_and_of_no_other_step(bowl, monkeypatch):
    """However many pieces the draws are made in, and beside whichever other snapshot."""
    steps = []
    step = type(KERNELS["baoab"]).step

    def recorded(self, displacement, momentum, gradient, *rest):
        steps.append((displacement.clone(), gradient.clone()))
        step(self, displacement, momentum, gradient, *rest)

    monkeypatch.setattr(type(KERNELS["baoab"]), "step", recorded)
    settings = SamplingSettings(chains=2, burn_in=7, draws=None)
    epsilons = [step_size(100.0, 1.0, 1.0)] * 2
    found = draw(
        bowl(SPECTRUM), torch.zeros(2, 60).double(), settings, 100.0, 1.0,
        needed=lambda traces: 200 / len(traces.delta_loss), epsilons=epsilons,
    )  # fmt: skip
    for s, traces in enumerate(found):
        kept = steps[7 : 7 + len(traces.delta_loss)]
        assert len(kept) >= 200
        mean_w, mean_g = (torch.stack(parts).mean(0)[2 * s : 2 * s + 2] for parts in zip(*kept, strict=True))
        torch.testing.assert_close(traces.means, 100.0 * mean_w @ mean_g.T)


def test_the_estimate_does_not_depend_on_the_step_size(bowl):
    settings = SamplingSettings(chains=16, draws=1000, burn_in=500)
    factors = (0.2, 1.0, 1.8)
    epsilons = [factor * step_size(100.0, 1.0, 1.0) for factor in factors]
    found = draw(bowl(SPECTRUM), torch.zeros(3, 60).double(), settings, 100.0, 1.0, epsilons=epsilons)
    assert [traces.step_size for traces in found] == epsilons
    for traces in found:
        error = standard_error(traces.delta_loss)
        assert error < 0.02 * soft_rank(100.0, 1.0)
        assert float(traces.delta_loss.mean()) == pytest.approx(soft_rank(100.0, 1.0), abs=3.5 * error)


def test_chains_of_large_sets_burn_in_and_draw_for_longer_at_a_small_step(bowl):
    loss, settings = replace(bowl(SPECTRUM), sample_bytes=8), resolve(SamplingSettings(chains=2), 60, stacked=True)
    fitting = step_size(100.0, 1.0, 1.0)
    anchors = torch.zeros(2, 60).double()
    steps = [fitting, fitting / 128]
    usual, slow = sample(loss, anchors, [0, 1], settings, 100.0, 1.0, steps, lambda t: 1.0, fitting=[fitting] * 2)
    assert usual.slow == 1
    assert len(usual.delta_loss) == 16
    assert slow.slow == pytest.approx(slowdown(settings.kernel, fitting / 128, fitting))
    assert slow.slow > 10
    assert len(slow.delta_loss) == math.ceil(16 * slow.slow)
    assert slow.burn_in >= math.ceil(8 * slow.slow)


def test_burn_in_of_large_sets_is_cut_short_in_equilibrium_alone(bowl, monkeypatch):
    """Also where the virial that a start is off by is little beside the dimension."""
    spectrum = torch.cat([torch.zeros(3000), torch.ones(20)]).double()
    loss, settings = replace(bowl(spectrum), sample_bytes=8), resolve(SamplingSettings(chains=2), 3020, stacked=True)
    scale, size = (100.0, 1.0), step_size(100.0, 1.0, 1.0)

    def burn_in():
        anchors = torch.zeros(1, 3020).double()
        (traces,) = sample(loss, anchors, [0], settings, *scale, [size / 16], lambda t: 1.0, fitting=[size / 16])
        return traces.burn_in

    full = run_length(settings, 1.0, size / 16, effort=SUBSAMPLED)[0]
    assert burn_in() == EQUILIBRIUM.min_burn_in < full
    start = stack.gaussian_start
    hot = torch.where(spectrum > 0, 3**0.5, 1.0)
    monkeypatch.setattr(stack, "gaussian_start", lambda *args: (start(*args)[0] * hot, start(*args)[1]))
    assert burn_in() == full


def trough(curvature, width=0.02, directions=400):
    """A loss of curvature one within a width of w*, and of another one beyond: far steeper than w* tells."""

    def forward(weights, tensors):
        w = weights["w"]
        beyond = torch.relu(w.abs() - width)
        return 0.5 * (w.square() + (curvature - 1) * beyond.square()).sum() + 0 * tensors[0].sum(), None

    layout = WeightLayout(("w",), ((directions,),))
    return StackedLoss(forward, layout, (torch.zeros(8),), {}, sample_bytes=8)


def test_a_step_too_large_for_where_chains_of_large_sets_begin_is_reduced_at_once(monkeypatch):
    anchors, nbeta, directions = torch.zeros(1, 400), 100.0, 400
    settings = resolve(SamplingSettings(chains=8, draws=500), directions, stacked=True)
    size = step_size(nbeta, 1.0, 1.0)
    (traces,) = sample(trough(12.0), anchors, [0], settings, nbeta, 1.0, [size], lambda t: 1.0)
    assert not traces.diverged(directions)
    assert traces.lost <= 2 * EQUILIBRIUM.min_burn_in
    assert traces.halvings == 0
    assert traces.step_size < 0.7 * size
    w = torch.linspace(-1, 1, 200_001).double()
    loss = 0.5 * (w.square() + 11 * torch.relu(w.abs() - 0.02).square())
    density = torch.exp(-nbeta * loss - 0.5 * w.square())
    exact = directions * nbeta * float((loss * density).sum() / density.sum())
    # Of energy that the step feeds a twentieth of the virial is tolerated.
    assert float(traces.delta_loss.mean()) == pytest.approx(exact, rel=0.05)
    # Without the look it is found by losing more.
    monkeypatch.setattr(stack, "top_eigenvalue", lambda loss, positions, *args: torch.ones(len(positions)))
    (blind,) = sample(trough(12.0), anchors, [0], settings, nbeta, 1.0, [size], lambda t: 1.0)
    assert blind.lost > traces.lost


@pytest.mark.parametrize("near", [False, True])
def test_chains_that_began_nearer_than_in_equilibrium_burn_in_for_longer(bowl, monkeypatch, near):
    settings = resolve(SamplingSettings(chains=2, draws=50), 60, stacked=True)
    begin, size = stack.gaussian_start, step_size(10.0, 1.0, float(max(SPECTRUM)))
    rows = torch.tensor([False, near, False, False])  # of two snapshots
    monkeypatch.setattr(stack, "gaussian_start", lambda *args: (begin(*args)[0], rows))
    found = sample(bowl(SPECTRUM), torch.zeros(2, 60).double(), [0, 1], settings, 10.0, 1.0, [size] * 2, lambda t: 1.0)
    assert found[0].burn_in == run_length(settings, 1.0, size, cold=near)[0]
    assert found[1].burn_in == run_length(settings, 1.0, size)[0]
    assert run_length(settings, 1.0, size, cold=True)[0] > 2 * found[1].burn_in


def test_chains_of_large_sets_have_left_where_they_have_more_energy_than_in_equilibrium(bowl):
    few = Traces(*(torch.ones(4, 2) for _ in range(4)), 0.1, 0, 0)
    hot = replace(few, virial=torch.full((4, 2), 700.0), restraint=torch.full((4, 2), 1000.0))
    for subsampled in (True, False):
        target = engine.Target(resolve(SamplingSettings(chains=2), 1000, stacked=True), 1.0, 1.0, 1000, subsampled)
        loss = replace(bowl([1.0]), sample_bytes=8 if subsampled else None)
        chains_of = stack.StackedChains(loss, torch.zeros(1, 1).double(), [0], target, [0.1], [0], [0.1])
        assert chains_of.has_left(hot) == subsampled
        assert not chains_of.has_left(replace(hot, restraint=torch.full((4, 2), 700.0)))


def test_virial_identity_holds_for_a_quartic_loss():
    layout = WeightLayout(("w",), ((50,),))
    loss = StackedLoss(lambda weights, t: (weights["w"].pow(4).sum(), None), layout, (torch.ones(4),), {})
    (traces,) = draw(loss, torch.zeros(1, 50), SamplingSettings(chains=16, draws=750), 100.0, 1.0, top=3.0)
    virial = traces.virial + traces.restraint
    assert float(virial.mean()) == pytest.approx(50, abs=3.5 * standard_error(virial))
    assert float(traces.virial.mean() / traces.delta_loss.mean()) == pytest.approx(4, rel=1e-4)


def test_results_do_not_depend_on_what_is_stacked_with_them(bowl):
    settings = SamplingSettings(chains=2, draws=50)
    anchors = torch.stack([torch.full((60,), 0.1 * s) for s in range(4)]).double()
    together = draw(bowl(SPECTRUM), anchors, settings, 10.0, 1.0, steps=[0, 50, 100, 150])
    for s in (1, 3):
        (alone,) = draw(bowl(SPECTRUM), anchors[s : s + 1], settings, 10.0, 1.0, steps=[50 * s])
        torch.testing.assert_close(alone.delta_loss, together[s].delta_loss, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(alone.centred_draws, together[s].centred_draws, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("batch_size", "lengths"), [(None, [140, 610, 122]), (50, [220, 610, 238])])
def test_nor_do_they_where_run_lengths_differ_and_grow(batch_size, lengths):
    loss, best, _ = regression()
    loss = replace(loss, is_sample_mean=True)
    anchors = torch.stack([best, best + 0.01, best - 0.01])
    epsilons = [f * step_size(10.0, 1.0, 4.0) for f in (1.0, 0.1, 0.5)]
    settings = SamplingSettings(chains=2, batch_size=batch_size)

    def needed(traces):
        return 2.0 if len(traces.delta_loss) < 100 else 1.0

    together = draw(loss, anchors, settings, 10.0, 1.0, needed=needed, epsilons=epsilons)
    # The first is done before the second, and grows.
    assert [len(traces.delta_loss) for traces in together] == lengths
    for s, traces in enumerate(together):
        (alone,) = draw(loss, anchors[s : s + 1], settings, 10.0, 1.0, 1.0, [s], needed, epsilons[s : s + 1])
        torch.testing.assert_close(alone.delta_loss, traces.delta_loss, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(alone.fluctuation, traces.fluctuation, rtol=1e-9, atol=1e-9)
        assert alone.heating == pytest.approx(traces.heating, rel=1e-9)
        assert (traces.heating > 0) == (batch_size is not None)


@pytest.mark.parametrize(("chains_each", "batch_size"), [(1, None), (2, 50), (3, None)])
def test_columns_in_blocks_give_what_all_at_once_give(chains_each, batch_size, monkeypatch):
    loss, best, _ = regression(d=37)
    loss, best = replace(loss, tensors=tuple(each.float() for each in loss.tensors)), best.float()
    settings = SamplingSettings(chains=chains_each, batch_size=batch_size, draws=30)

    def drawn(width):
        monkeypatch.setattr(base, "BLOCK", width)
        return draw(loss, torch.stack([best, best + 0.01]), settings, 10.0, 1.0, top=4.0)

    for whole, blocked in zip(drawn(2**17), drawn(8), strict=True):
        for name in ("delta_loss", "virial", "restraint", "centred_draws"):
            torch.testing.assert_close(getattr(blocked, name), getattr(whole, name), rtol=1e-3, atol=1e-3)


def test_diverging_chains_are_halved_until_they_hold_and_counted(bowl):
    stable = step_size(10.0, 1.0, 1.0)
    anchors = torch.zeros(2, 60).double()
    settings = SamplingSettings(chains=2, burn_in=200, draws=2000)
    good, bad = draw(bowl(SPECTRUM), anchors, settings, 10.0, 1.0, epsilons=[stable, 16 * stable])
    assert good.halvings == good.lost == 0
    assert not bad.diverged(60)
    assert bad.halvings in (3, 4)
    # Those that left are given up at the next look at them, but for the first, which goes on with its neighbour.
    assert 2200 <= bad.lost <= 2200 + 64 * (bad.halvings - 1) + 2200
    # Nor do steps count that only the other one makes, as its draws grow.
    growing, asked = SamplingSettings(chains=2), []

    def needed(traces):
        asked.append(traces.halvings)
        return 901 / len(traces.delta_loss)

    good, bad = draw(
        bowl(SPECTRUM),
        anchors,
        growing,
        10.0,
        1.0,
        epsilons=[stable, 16 * stable],
        needed=needed,
    )
    assert set(asked) == {0, bad.halvings}  # while it is drawn, too
    assert len(good.delta_loss) > 900
    assert bad.lost <= (bad.halvings + 1) * 80
    assert bad.step_size <= stable * 1.5  # the chains met the curvature that the first step was too large for


def test_a_stack_whose_snapshots_have_all_lost_a_chain_goes_no_further(bowl, monkeypatch):
    made = []
    step = base.Dynamics.step
    monkeypatch.setattr(base.Dynamics, "step", lambda *arguments: made.append(1) or step(*arguments))
    settings = SamplingSettings(chains=2, burn_in=200, draws=2000)
    # The first does not explode at once: it is still finite when it is given up.
    slow, fast = 3.0 * step_size(10.0, 1.0, 1.0), 50.0
    counted = {}
    for name, epsilons in (("one", [slow]), ("both", [slow, fast])):
        explicit = replace(settings, step_size=slow)  # is not halved
        traces = draw(bowl(SPECTRUM), torch.zeros(len(epsilons), 60).double(), explicit, 10.0, 1.0, epsilons=epsilons)
        counted[name], made[:] = len(made), []
        assert all(each.diverged(60) for each in traces)
    assert counted["one"] == counted["both"] < 500
    # One that holds takes the others along; they are given up all the same.
    hold = step_size(10.0, 1.0, 1.0)
    good, bad = draw(bowl(SPECTRUM), torch.zeros(2, 60).double(), explicit, 10.0, 1.0, epsilons=[hold, slow])
    assert len(made) == 2200
    assert not good.diverged(60)
    assert bad.diverged(60)
    assert torch.isfinite(good.delta_loss).all()


def test_chains_that_fall_far_at_once_get_few_attempts(bowl, monkeypatch):
    # From w* the loss falls by ½·Σ h·off²; the second snapshot lies at the minimum.
    off = 3.0
    loss = bowl(SPECTRUM, minimum=torch.full((60,), off))
    anchors = torch.stack([torch.zeros(60), torch.full((60,), off)]).double()
    epsilons = [3 * 2**5 * step_size(10.0, 1.0, 1.0)] * 2
    falling, settled = draw(loss, anchors, SamplingSettings(chains=2, draws=300), 10.0, 1.0, epsilons=epsilons)
    assert not settled.diverged(60)
    assert settled.fall == 0
    assert settled.halvings > EQUILIBRIUM.tolerated_restarts
    assert not falling.diverged(60)  # too large a step falls nowhere before it explodes
    assert falling.halvings > EQUILIBRIUM.tolerated_restarts
    assert settled.halvings == falling.halvings == 6
    # Only the last of the attempts that diverged had first fallen.
    monkeypatch.setattr(engine, "EQUILIBRIUM", replace(EQUILIBRIUM, tolerated_restarts=0))
    falling, settled = draw(loss, anchors, SamplingSettings(chains=2, draws=300), 10.0, 1.0, epsilons=epsilons)
    assert falling.fall > 0.1 * 60 + 100
    assert falling.diverged(60)
    assert falling.halvings == 5
    assert not settled.diverged(60)
    assert settled.halvings == 6


@pytest.mark.parametrize("sign", ["has_energy_spike", "has_discretization_bias"])
@pytest.mark.parametrize(("quiet_below", "halvings"), [(0.3, 2), (0.0, EQUILIBRIUM.tolerated_restarts)])
def test_chains_that_the_step_heats_are_tried_again_at_half_of_it_a_few_times(
    bowl, monkeypatch, sign, quiet_below, halvings
):
    stable = step_size(1000.0, 1.0, 1.0)

    def heated(traces, *scale):
        return traces.step_size > quiet_below * stable

    monkeypatch.setattr(chains.Traces, sign, property(heated) if sign == "has_energy_spike" else heated)
    settings = ResolvedSettings(method="baoab", chains=2)
    asked = []
    arguments = bowl(SPECTRUM), torch.zeros(1, 60).double(), settings, 1000.0, 1.0
    (traces,) = draw(*arguments, needed=lambda each: asked.append(each) or 3.0 - len(asked), epsilons=[stable])
    assert traces.halvings == halvings
    assert traces.step_size == pytest.approx(stable / 2**halvings)
    assert not traces.diverged(60)
    # Friction was halved with the step: at that of a smaller step flat directions would need more steps.
    whole = run_length(settings, 1.0, stable)[0]
    assert traces.burn_in == pytest.approx(whole, rel=0.05)
    assert run_length(settings, 1.0, traces.step_size)[0] > 1.5 * whole
    # More draws of hot chains are of no use.
    assert len(asked) == (2 if quiet_below else 0)


def test_an_explicit_step_size_is_left_alone(bowl):
    settings = SamplingSettings(chains=2, burn_in=10, draws=2000, step_size=50.0)
    (traces,) = draw(bowl(SPECTRUM), torch.zeros(1, 60).double(), settings, 10.0, 1.0, epsilons=[50.0])
    assert traces.diverged(60)
    assert traces.halvings == 0


def test_draws_grow_until_they_are_enough_and_only_where_they_are_not(bowl):
    asked = []

    def needed(traces):
        asked.append(len(traces.delta_loss))
        return 300 / len(traces.delta_loss)

    anchors = torch.zeros(2, 60).double()
    epsilons = [step_size(10.0, 1.0, 1.0), 0.2 * step_size(10.0, 1.0, 1.0)]
    short, long = draw(bowl(SPECTRUM), anchors, SamplingSettings(chains=2), 10.0, 1.0, needed=needed, epsilons=epsilons)
    assert 300 <= len(short.delta_loss) < 375
    assert len(long.delta_loss) == 300
    assert min(asked) < 300
    # What came first is what a run without growth gives.
    first, _ = draw(bowl(SPECTRUM), anchors, SamplingSettings(chains=2), 10.0, 1.0, epsilons=epsilons)
    torch.testing.assert_close(short.delta_loss[: len(first.delta_loss)], first.delta_loss, rtol=1e-12, atol=1e-12)


def regression(n=200, d=8):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, d, generator=generator).double()
    truth = torch.randn(d, generator=generator).double()
    y = x @ truth + 0.5 * torch.randn(n, generator=generator).double()
    best = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    layout = WeightLayout(("w",), ((d,),))
    loss = StackedLoss(lambda w, t: (0.5 * (t[0] @ w["w"] - t[1]).square().mean(), None), layout, (x, y), {})
    return loss, best, torch.linalg.eigvalsh(x.T @ x / n)


@pytest.mark.parametrize("off", [0.0, 0.1])
def test_minibatches_with_control_variate_agree_with_the_full_batch(off):
    loss, best, eigenvalues = regression()
    nbeta, gamma = 200.0, 1.0
    soft_rank = float(0.5 * (nbeta * eigenvalues / (nbeta * eigenvalues + gamma)).sum())
    # Off the minimum, m away in the eigenbasis, λ̂ has the offset ½nβΣh((w̄ − m)² − m²).
    x = loss.tensors[0]
    vectors = torch.linalg.eigh(x.T @ x / len(x)).eigenvectors
    m = vectors.T @ torch.full_like(best, -off)
    mean = nbeta * eigenvalues * m / (nbeta * eigenvalues + gamma)
    exact = soft_rank + 0.5 * nbeta * float((eigenvalues * ((mean - m).square() - m.square())).sum())
    settings = SamplingSettings(chains=16, draws=1000, batch_size=40)
    (traces,) = draw(loss, (best + off)[None], settings, nbeta, gamma, top=4 * float(eigenvalues.max()))
    # The gradient's remaining noise widens the posterior a little: 3 % beside the statistical error.
    error = 3 * standard_error(traces.delta_loss)
    assert float(traces.delta_loss.mean()) == pytest.approx(exact, abs=0.03 * soft_rank + error)
    assert error < 0.1 * soft_rank


def test_published_sgld_scores_minibatch_losses_against_the_full_loss():
    loss, best, _ = regression()
    settings = SamplingSettings(method="sgld", chains=2, draws=5, burn_in=0, step_size=1e-12, batch_size=10)
    (traces,) = draw(loss, best[None], settings, 30.0, 5.0, epsilons=[1e-12])
    full = loss.losses(best[None])[0]
    assert traces.delta_loss.shape == (5, 2)
    # Hardly moved: what differs from zero is the minibatch's own loss, times nβ.
    x, y = loss.tensors
    one = 30.0 * (0.5 * (x @ best - y).square() - full)
    assert float(traces.delta_loss.abs().max()) <= float(one.abs().max())
    assert float(traces.delta_loss.std()) == pytest.approx(float(one.std()) / math.sqrt(10), rel=0.8)


def test_minibatches_are_recorded_with_samples_that_exist():
    loss, best, _ = regression()
    loss = loss.probe(best[None])
    settings = SamplingSettings(method="sgld", chains=2, draws=5, burn_in=0, step_size=1e-12, batch_size=10)
    torch.use_deterministic_algorithms(True)  # fills memory that nobody has written with what is no index
    try:
        (traces,) = draw(loss, best[None], settings, 30.0, 5.0, epsilons=[1e-12])
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.isfinite(traces.delta_loss).all()
    assert any(plan is not None and batch for (*_, batch, _), plan in loss.plans.items())


@pytest.mark.parametrize(("batch_size", "seen"), [(None, 190), (10, 20), (150, 190)])
def test_single_losses_are_seen_of_two_minibatches_at_most(monkeypatch, batch_size, seen):
    loss, best, _ = regression()
    shapes = set()
    monkeypatch.setattr(posterior, "MEMORY", replace(posterior.MEMORY, single_samples=190))  # of 200
    monkeypatch.setattr(stack.SampleLossRecorder, "keep", lambda self, s, losses: shapes.add(tuple(losses.shape)))
    settings = SamplingSettings(chains=2, draws=20, burn_in=0, batch_size=batch_size)
    draw(loss.probe(best[None]), best[None], settings, 30.0, 5.0)
    assert shapes == {(2, seen)}


@pytest.mark.parametrize("batch_size", [None, 7])
def test_the_first_draw_is_where_the_chains_start(bowl, batch_size):
    settings = SamplingSettings(chains=2, draws=5, burn_in=0, step_size=1e-12, batch_size=batch_size)
    (traces,) = draw(bowl(SPECTRUM), torch.zeros(1, 60).double(), settings, 10.0, 1.0, epsilons=[1e-12])
    assert (traces.delta_loss > 0.1).all()
    torch.testing.assert_close(traces.delta_loss, traces.delta_loss[-1:].expand(5, -1), rtol=1e-3, atol=0)
    torch.testing.assert_close(traces.virial, 2 * traces.delta_loss, rtol=1e-3, atol=0)


def test_single_chains_have_no_centred_estimate(bowl):
    (traces,) = draw(bowl(SPECTRUM), torch.zeros(1, 60).double(), SamplingSettings(chains=1, draws=5), 10.0, 1.0)
    assert traces.centred_draws.shape == (5, 0)


def test_stack_size_counts_what_a_chain_keeps():
    layout = WeightLayout(("w",), ((100,),))
    x = torch.ones(1000, 100)
    loss = StackedLoss(lambda w, t: (torch.tanh(t[0] * w["w"]).square().mean(), None), layout, (x,), {})
    rows = rows_per_stack(loss.probe(torch.zeros(1, 100)))
    # The backward pass needs one activation of 400 kB; the shared samples, as large, do not count.
    assert 12 * 2**20 // 800_000 < rows <= 12 * 2**20 // 400_000
