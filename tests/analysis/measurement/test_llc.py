"""What traces of known statistics say."""

import math

import pytest
import torch

import groktrace
from groktrace.analysis.measurement.llc import OFF_MINIMUM, PERHAPS_OFF, off_minimum, summarise
from groktrace.sampling.settings import ResolvedSettings
from groktrace.sampling.traces import Traces

DIMENSION, STIFF = 400, 100
CURVATURE = 4.0  # nβh of the stiff directions, in units of γ


def bowl_traces(chains, seed, draws=200, slope=0.0):
    """Independent draws in a bowl with its minimum at a distance of `slope` from w* along each stiff direction."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(draws, chains, STIFF, generator=generator, dtype=torch.float64) / math.sqrt(CURVATURE + 1)
    w += slope * CURVATURE / (CURVATURE + 1)
    gradient = CURVATURE * (w - slope)
    excess = 0.5 * CURVATURE * ((w - slope).square() - slope**2).sum(-1)
    pairs = {1: 0, 2: 1}.get(chains, chains)
    apart, differ = (rows[:, :pairs] - rows.roll(-1, 1)[:, :pairs] for rows in (w, gradient))
    spread = w.square().sum(-1) + DIMENSION - STIFF
    return Traces(excess, (w * gradient).sum(-1), spread, 0.25 * (apart * differ).sum(-1), step_size=0.1, burn_in=0)


def judged(traces, chains, **more):
    settings = ResolvedSettings(method="leimkuhler_matthews", chains=chains)
    scale = {"nbeta": 1.0, "localization": 1.0}
    return summarise(traces, settings, n=10, loss=0.0, norm=1e3, dimension=DIMENSION, **scale, **more)


@pytest.mark.parametrize("chains", [2, 3, 8])
def test_errors_are_the_spread_of_repetitions(chains):
    found = [judged(bowl_traces(chains, seed), chains) for seed in range(300)]
    for value, error in (("llc", "stderr"), ("llc_centred", "stderr_centred")):
        values = torch.tensor([getattr(estimate, value) for estimate in found])
        errors = torch.tensor([getattr(estimate, error) for estimate in found])
        assert float(values.mean()) == pytest.approx(40, abs=4 * float(values.std()) / math.sqrt(300))
        # The spread of 300 values is known to 1/√600 = 4 %.
        assert float(errors.mean() / values.std()) == pytest.approx(1, abs=0.15)


def test_a_slope_at_the_snapshot_is_told_from_a_bowl():
    assert judged(bowl_traces(4, 0), 4).reasons == ()
    sloped = judged(bowl_traces(4, 0, slope=0.4), 4)
    assert sloped.reasons == (OFF_MINIMUM,)
    assert sloped.llc == pytest.approx(9.28, rel=0.1)
    assert sloped.llc_centred == pytest.approx(40, rel=0.02)


@pytest.mark.parametrize("size", [0.0, 0.5, 1.0])
def test_a_slope_along_stiff_directions_is_told_though_the_mean_hardly_moves(size):
    """A bowl of 20 weights, 3 of them a thousand times as stiff as γ, with its minimum 0, 1.6 or 3.1 errors away."""
    torch.manual_seed(0)
    curvature = torch.cat([torch.full((3,), 1000.0), torch.full((7,), 10.0), torch.zeros(10)])
    centre = size * 0.1 * torch.cat([torch.ones(3), torch.zeros(17)])

    class Bowl(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(20))

        def forward(self, x):
            return 0.5 * (curvature * (self.w - centre).square()).sum() + 0 * x.sum()

    given = {"nbeta": 1.0, "localization": 1.0, "draws": 3000, "chains": 4}
    found = groktrace.estimate_llc(Bowl(), lambda out, _: out, (torch.zeros(4, 1), torch.zeros(4, 1)), **given)
    soft_rank = float(0.5 * (curvature / (curvature + 1)).sum())
    pull = curvature * centre
    lower = float((pull.square() / (curvature + 1) - 0.5 * curvature * (pull / (curvature + 1)).square()).sum())
    assert found.llc_centred == pytest.approx(soft_rank, abs=4 * found.stderr_centred)
    assert found.llc == pytest.approx(soft_rank - lower, abs=4 * found.stderr)
    assert (OFF_MINIMUM in found.reasons) is (size > 0)


@pytest.mark.parametrize(
    ("llc", "half_pull", "noise", "off"),
    [
        (85.0, 90.0, 1.0, True),
        (95.0, 90.0, 1.0, False),  # λ̂ is too near to λ_c = 100
        (85.0, 98.0, 1.0, False),  # as where the loss is of higher degree: the mean has not moved
        (85.0, 90.0, 100.0, False),  # may be chance: three standard errors are 13
        (-1.0, 98.0, 1.0, True),
    ],
)
def test_a_slope_lowers_the_estimate_and_moves_the_mean(llc, half_pull, noise, off):
    generator = torch.Generator().manual_seed(0)
    steady = torch.randn(1000, 2, generator=generator).double()
    steady = noise * (steady - steady.mean(0)) / steady.std()
    traces = Traces(llc + steady, 2 * half_pull + 0 * steady, steady, 100 + steady[:, :1], 0.1, 0)
    assert off_minimum(traces) is off


def test_a_single_chain_has_no_centred_estimate():
    found = judged(bowl_traces(1, 0), 1)
    assert (found.llc_centred, found.stderr_centred) == (None, None)
    assert found.reliable


def test_energy_that_the_step_fed_in_is_named_even_where_it_is_little_beside_all_weights():
    dimension, pull = 14_000, 300.0
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 1000, 2, generator=generator, dtype=torch.float64)
    spread = dimension - pull + math.sqrt(2 * dimension) * noise[0]

    def reasons(heat):
        pulls = pull + heat + 20 * noise[1]
        traces = Traces(pulls / 2, pulls, spread, pulls[:, :1] / 2, step_size=0.1, burn_in=0)
        scale = {"nbeta": 1.0, "localization": 1.0, "dimension": dimension}
        return summarise(traces, ResolvedSettings(method="baoab", chains=2), n=10, loss=0.0, norm=1e3, **scale).reasons

    assert reasons(0.0) == ()
    (reason,) = reasons(250.0)
    assert reason.startswith("heated by the sampler's step (virial ratio 1.018, expected 1)")


def test_draws_at_a_step_too_small_to_forget_are_too_few_whatever_their_scatter():
    def reasons(slow, draws=16):
        noise = torch.randn(2, draws, 2, generator=torch.Generator().manual_seed(0)).double()
        excess, pull = 100 + 0.1 * noise
        traces = Traces(excess, 2 * pull, 4000 - 2 * pull, pull, 1e-6, 0, means=torch.zeros(2, 2), slow=slow)
        settings = ResolvedSettings(method="baoab", chains=2, draws=draws)
        scale = {"nbeta": 100.0, "localization": 1.0, "dimension": 4000}
        return summarise(traces, settings, n=10, loss=1.0, norm=1e3, **scale).reasons

    assert reasons(1.0) == reasons(3.9) == ()
    (reason,) = reasons(40.0)
    assert reason.startswith("too few draws: at a step of 1e-06 the stiffest directions take 40 to forget one")
    assert reasons(40.0, draws=400) == ()


def climbed(excess, half_pull, seed=0, chains=2, **more):
    """What is said of chains with these means, each draw off by a tenth, at nβ = 100 and a snapshot's loss of 1."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(3, 500, chains, generator=generator, dtype=torch.float64)
    pull, spread = 2 * half_pull * (1 + 0.1 * noise[1]), 4000 - 2 * half_pull * (1 + 0.1 * noise[2])
    paired = half_pull + 0.1 * noise[0][:, : chains - 1]
    traces = Traces(excess * (1 + 0.1 * noise[0]), pull, spread, paired, step_size=0.1, burn_in=0)
    settings, scale = (
        ResolvedSettings(method="leimkuhler_matthews", chains=chains),
        {"nbeta": 100.0, "localization": 1.0, "dimension": 4000},
    )
    return summarise(traces, settings, n=10, loss=1.0, norm=1e3, **scale, **more)


@pytest.mark.parametrize(
    ("excess", "chance", "expected"),
    [
        (100.0, (4.0,), None),  # from 1 to 2, a third of the way
        (190.0, (4.0,), "63 % of the way from 1 at the snapshot to 4, that of chance"),
        (190.0, (), None),
        (190.0, (0.5, 4.0), "63 % of the way"),  # zero weights would do better, and so are not chance
        (190.0, (0.5,), None),
        (330.0, (4.0, 1.5), "110 % of the way"),
    ],
)
def test_chains_near_the_loss_of_chance_have_left_the_basin(excess, chance, expected):
    reasons = climbed(excess, excess, chance=chance).reasons
    if expected is None:
        assert reasons == ()
    else:
        (reason,) = reasons
        assert reason.startswith("left the basin: the chains' loss has climbed ")
        assert expected in reason


@pytest.mark.parametrize(("chance", "begins"), [(1.04, "no basin"), (1.06, "left the basin"), (1.0001, "no basin")])
def test_who_has_learned_nothing_has_no_basin_to_leave(chance, begins):
    (reason,) = climbed(190.0, 190.0, chance=(chance,)).reasons
    assert reason.startswith(f"{begins}: ")
    if begins == "no basin":
        assert f"the loss at the snapshot, 1, is already that of chance, {chance:.4g}" in reason


@pytest.mark.parametrize(("error", "told"), [(0.04, False), (0.06, True)])
def test_an_error_of_a_twentieth_is_small_enough_however_small_lambda_is(error, told):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4000, 4, generator=generator, dtype=torch.float64)
    noise = (noise - noise.mean()) / noise.std()
    excess = 0.5 + error * math.sqrt(noise.numel()) * noise
    traces = Traces(excess, 2 * excess, 20 - 2 * excess, excess, step_size=0.1, burn_in=0)
    settings, scale = ResolvedSettings(method="baoab", chains=4), {"nbeta": 1.0, "localization": 1.0}
    found = summarise(traces, settings, n=10, loss=0.0, norm=1e3, dimension=20, **scale)
    assert found.stderr == pytest.approx(error, rel=0.1)
    assert any(reason.startswith("too few draws") for reason in found.reasons) is told


def test_a_bowl_as_high_as_chance_is_a_bowl():
    assert judged(bowl_traces(4, 0), 4, chance=(1.0,)).reasons == ()


def test_where_the_loss_flattens_out_the_chains_are_leaving_however_near():
    (reason,) = climbed(146.0, 54.0).reasons
    assert reason.startswith("leaving the basin: the loss flattens out where the chains are, 0.0")
    assert "(anharmonicity 0.37, expected 1)" in reason
    # A singular loss, of higher degree, is what it is at any distance, and a tenth is no plateau.
    assert climbed(50.0, 100.0).reasons == ()
    assert climbed(110.0, 100.0).reasons == ()


def test_a_single_chain_cannot_tell_a_slope():
    sloped = bowl_traces(1, 0, draws=2000, slope=0.2)
    found = judged(sloped, 1)
    assert found.llc == pytest.approx(32.3, rel=0.05)  # for 40
    assert found.reasons == (PERHAPS_OFF,)
    assert judged(bowl_traces(1, 0, draws=2000), 1).reasons == ()


@pytest.mark.parametrize(("dimension", "flagged"), [(40_000, True), (400, False)])
def test_chains_that_drift_towards_equilibrium_are_told_however_widely_they_scatter(dimension, flagged):
    """The total virial rises from 0.84 to 1 of D: eight per cent are missing, of few weights no more than chance."""
    filled = torch.linspace(0.84, 1.0, 16).double()[:, None].expand(16, 2)
    bowl = bowl_traces(2, 0, draws=16)
    restraint = filled * dimension - bowl.virial
    traces = Traces(bowl.delta_loss, bowl.virial, restraint, bowl.centred_draws, step_size=0.1, burn_in=0)
    settings = ResolvedSettings(method="leimkuhler_matthews", chains=2)
    scale = {"nbeta": 1.0, "localization": 1.0}
    estimate = summarise(traces, settings, n=10, loss=0.0, norm=1e3, dimension=dimension, **scale)
    assert any("not equilibrated" in reason for reason in estimate.reasons) == flagged
