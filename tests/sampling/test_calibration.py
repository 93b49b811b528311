import math

import pytest

from groktrace.errors import SettingsError
from groktrace.sampling.calibration import Scale, more_draws, posterior_scale, resolve, run_length, slowdown, step_size
from groktrace.sampling.kernels import KERNELS
from groktrace.sampling.settings import PAPER, ResolvedSettings, SamplingSettings
from groktrace.sampling.tuning import SUBSAMPLED


def test_dials_give_locality_and_resolution():
    nbeta, gamma, *_ = posterior_scale(SamplingSettings(locality=0.2, resolution=25.0), 300, 1000, 50.0, 0.1)
    # E‖w − w*‖² of flat directions is D/γ = (ρ‖w*‖)²; h_max over the cutoff γ/nβ is the resolution.
    assert 1000 / gamma == pytest.approx(0.2**2 * 50.0)
    assert 0.1 * nbeta / gamma == pytest.approx(25.0)


def test_numbers_are_taken_as_they_are_and_wbic_is_n_over_log_n():
    assert posterior_scale(SamplingSettings(nbeta=30.0, localization=5.0), 10, 10, math.nan, math.nan)[:2] == (
        30.0,
        5.0,
    )
    assert posterior_scale(SamplingSettings(nbeta="wbic", localization=5.0), 317, 10, 1.0, 1.0)[0] == pytest.approx(
        317 / math.log(317)
    )


def test_a_scale_that_follows_the_curvature_is_finer_and_keeps_where_it_belongs():
    scale = posterior_scale(SamplingSettings(localization=2.0), 10, 10, 1.0, 0.5, follow=True)
    assert scale == Scale(100 * 2.0 / 0.5, 2.0, 0.5)


@pytest.mark.parametrize(
    ("settings", "n", "norm", "curvature", "message"),
    [
        ({}, 10, 0.0, 1.0, "localization: cannot be derived where all weights are zero"),
        ({"localization": 1.0}, 10, 1.0, 0.0, "nbeta: cannot be derived from a curvature that is zero"),
        ({"nbeta": "wbic", "localization": 1.0}, 1, 1.0, 1.0, "nbeta: 'wbic' is n/log n and needs at least 2 samples"),
    ],
)
def test_undefined_dials_are_refused(settings, n, norm, curvature, message):
    with pytest.raises(SettingsError, match=message):
        posterior_scale(SamplingSettings(**settings), n, 10, norm, curvature)


def test_smaller_steps_take_longer_to_forget_and_draws_of_large_sets_are_as_many_more():
    baoab, fitting = KERNELS["baoab"], step_size(100.0, 1.0, 1.0)
    assert slowdown(baoab, fitting, fitting) == slowdown(baoab, 2 * fitting, fitting) == 1
    # Overdamped, as far below the fitting step as here: in proportion.
    far, farther = slowdown(baoab, fitting / 100, fitting), slowdown(baoab, fitting / 400, fitting)
    assert farther == pytest.approx(4 * far)
    assert far > 10
    assert slowdown(KERNELS["leimkuhler_matthews"], fitting / 8, fitting) == pytest.approx(8)
    settings = ResolvedSettings(method="baoab", chains=2)
    assert run_length(settings, 1.0, fitting, effort=SUBSAMPLED)[1] == 16
    assert run_length(settings, 1.0, fitting, effort=SUBSAMPLED, slow=2.5)[1] == 40


@pytest.mark.parametrize("method", ["baoab", "leimkuhler_matthews"])
@pytest.mark.parametrize("top", [0.03, 0.3])  # critical friction, and the least that is taken
def test_step_is_stable_and_run_length_covers_the_flat_directions(method, top):
    nbeta, gamma = 1000.0, 2.0
    epsilon = step_size(nbeta, gamma, top)
    assert epsilon * (1.5 * nbeta * top + gamma) < 4
    once = KERNELS[method].relaxation(epsilon, gamma)
    for chains, relaxations in ((1, 10), (2, 5), (16, 1)):
        burn_in, draws = run_length(ResolvedSettings(method=method, chains=chains), gamma, epsilon)
        assert burn_in == math.ceil(once)
        assert draws == max(64, math.ceil(relaxations * once))
    halved, halvings = epsilon / 8, 3
    burn_in, _ = run_length(ResolvedSettings(method=method, chains=2), gamma, halved, halvings=halvings)
    assert burn_in == math.ceil(KERNELS[method].relaxation(halved, gamma, halvings))
    assert (burn_in < KERNELS[method].relaxation(halved, gamma)) == (method == "baoab")
    assert run_length(ResolvedSettings(method=method, chains=2, burn_in=7, draws=9), gamma, epsilon) == (7, 9)


@pytest.mark.parametrize(
    ("needed", "added"), [(1.01, 25), (1.2, 25), (1.5, 50), (2.0, 100), (9.0, 100), (math.inf, 100)]
)
def test_draws_grow_by_what_is_needed_within_bounds(needed, added):
    assert more_draws(100, needed) == added


@pytest.mark.parametrize(("dimension", "chains"), [(2, 16), (3000, 5), (8832, 2), (10**9, 2)])
def test_small_networks_get_more_chains(dimension, chains):
    assert resolve(SamplingSettings(), dimension, stacked=True).chains == chains
    assert resolve(SamplingSettings(chains=3), dimension, stacked=True).chains == 3
    # One after the other, each costs as much as the first.
    assert resolve(SamplingSettings(), dimension, stacked=True, vectorised=False).chains == 2
    assert resolve(SamplingSettings(chains=3), dimension, stacked=True, vectorised=False).chains == 3


def test_large_networks_get_the_method_that_keeps_no_momenta():
    assert resolve(SamplingSettings(), 100, stacked=True).method == "baoab"
    assert resolve(SamplingSettings(), 100, stacked=False).method == "leimkuhler_matthews"
    assert resolve(SamplingSettings("baoab"), 100, stacked=False).method == "baoab"


@pytest.mark.parametrize("settings", [SamplingSettings(seed=3, parameters=("a.*",)), PAPER])
def test_resolved_settings_keep_what_was_asked_for_and_stay_as_they_are(settings):
    resolved = resolve(settings, 100, stacked=True)
    expected = {**settings.to_dict(), "method": resolved.kernel.name, "chains": resolved.chains}
    assert resolved.to_dict() == expected
    assert resolve(resolved, 10**9, stacked=False) == resolved
    with pytest.raises(TypeError, match="chains"):
        ResolvedSettings(method="baoab")
