"""The tuned numbers of the default detector, each with where it comes from."""

import math
from dataclasses import dataclass, fields

from groktrace.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class DetectionSettings:
    """What counts as a change of phase, how it is dated, and when it is labelled.

    "Simulated curves" are those of `python -m tools.detection synthetic`; the networks are those of the same program,
    with the tables in groktrace/analysis/detection/README.md.

    Attributes:
        min_points: usable points below which nothing is said; two phases and a change take five.
        slope_price: price of a piece's slope in parameters of a BIC, where a level has 1: phases are flat unless they
            clearly are not.
        drift_margin: a curve that one straight line describes as well, to within so many log(T), drifts and has no
            transition; set on simulated curves that drift.
        doubt_factor: standard errors of unreliable snapshots count as this many times larger; a convention.
        min_change: a change counts from this fraction of the curve's largest level on, however small its error; below
            it a slow drift of the curvature, or of the sampler, would do.
        significance: level at which a change is told from none, corrected for the number of points (Bonferroni).
        jump_errors: standard errors by which the lines on either side of a break differ where the curve jumps.
        drift_ratio: a phase drifts at less than this fraction of the rate of the transition beside it; a convention.
        plateau_ratio: between two changes a phase is slower than this fraction of the slower one, else they are one;
            from falls that slow down, in which a few points happen to lie level.
        plateau_errors: by so many standard errors; 1.645 is one-sided 95 %.
        zero_errors: levels of curves measured elsewhere that lie within so many errors of zero may be positive.
        draws: curves drawn from the posterior for a date; its ends are then known to a tenth of its standard deviation.
        edge: a change has begun, and is done, but for this share of it.
        jump_widening, ramp_widening: intervals of midpoints are this much wider than the posterior's: the neighbours of
            a change are held where they fit best, and a ramp is an idealisation. As it takes for 90 % to cover 90 % on
            simulated curves.
        memorisation_loss: a rise is read as memorisation where the training loss falls below this fraction for the
            first time (counted from zero, or from the lowest if that is below zero); a convention.
        min_generalisation: a fall, with those before it since λ rose and the drift of the phases between, is read as
            generalisation from this fraction of the highest level on: networks that merely lose weight norm after
            memorising fall by up to an eighth. Less the fall's standard error it has to be as much: two networks that
            did not generalise fell by 15 ± 4 and 19 ± 4 % right after memorising.
        min_generalisation_following: the same where nβ follows the curvature: perceptrons with too few pairs fell by up
            to 17 %, those that grokked by 22 % or more.
        min_validation_gain: validation accuracy confirms a label where it rises by as much; a convention.
        low_loss: the training loss is low once it has fallen to this fraction of the run's range.
        max_at_minimum: where targets move, at most this share of the snapshots after the lowest loss is at a minimum.
        curvature_fall, curvature_rise: within these factors the largest curvature stays what it was. Under
            cross-entropy it collapses whether or not the network generalises, and where it grows λ counts what is
            stiff beside it.
        curvature_power: the curvature shrinks with the training loss where it falls by more than this power of it: by
            0.29 to 0.85 in perceptrons under cross-entropy, by 0.1 and less where quadratic networks have grokked.
        min_errors_following: where nβ follows the curvature, so many errors tell a fall from noise: transformers that
            memorise fell by up to 5.8.
    """

    min_points: int = 5
    slope_price: float = 2.0
    drift_margin: float = 3.0
    doubt_factor: float = 3.0
    min_change: float = 0.05
    significance: float = 0.01
    jump_errors: float = 3.0
    drift_ratio: float = 0.25
    plateau_ratio: float = 0.5
    plateau_errors: float = 1.645
    zero_errors: float = 2.0
    draws: int = 400
    edge: float = 0.05
    jump_widening: float = 1.08
    ramp_widening: float = 1.3
    memorisation_loss: float = 0.5
    min_generalisation: float = 0.15
    min_generalisation_following: float = 0.2
    min_validation_gain: float = 0.2
    low_loss: float = 0.1
    max_at_minimum: float = 0.25
    curvature_fall: float = 0.5
    curvature_rise: float = 3.0
    curvature_power: float = 0.25
    min_errors_following: float = 6.0

    def __post_init__(self) -> None:
        for field in fields(DetectionSettings):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise SettingsError(f"{field.name}: expected a number that is not negative, got {value!r}.")
        if not 1e-9 <= self.significance < 1:  # smaller ones are lost in rounding
            raise SettingsError(f"significance: expected a number from 1e-9 to below 1, got {self.significance!r}.")
        for name, least in (("min_points", 3), ("draws", 1)):
            if getattr(self, name) < least or int(getattr(self, name)) != getattr(self, name):
                raise SettingsError(f"{name}: expected an integer of {least} or more, got {getattr(self, name)!r}.")


@dataclass(frozen=True, kw_only=True)
class EarlyWarningSettings:
    """When a fall of λ that has just begun is worth a warning.

    Set on the tuning half of the networks of `python -m tools.detection warning`: of the sequential tests tried there,
    this one is within 0.02 of the best mean lead, and the simplest.

    Attributes:
        window: log steps over which the fall is measured: the last 45 % of the training.
        errors: standard errors that are taken off it.
        rate: fall of log λ for each e-fold of the training that is significant: of 21 networks that only memorise all
            but one fall by 0.040 or less, less two errors.
        rate_following: the same where nβ follows the curvature: set on the tuning half of `warning --cross-entropy`,
            where perceptrons that only memorise fall by 0.130 or less, those that grok by 0.2 or more; controls of the
            other half, which had been seen by then, fall by 0.108 or less.
        jitter: standard deviation of log λ from one snapshot to the next in those networks, beside the sampling error.
        min_points: snapshots in the window, at least.
    """

    window: float = 0.6
    errors: float = 2.0
    rate: float = 0.045
    rate_following: float = 0.14
    jitter: float = 0.005
    min_points: int = 4


DEFAULTS, WARNING = DetectionSettings(), EarlyWarningSettings()
