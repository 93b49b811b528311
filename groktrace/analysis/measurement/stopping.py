"""Stopping rule: the factor by which the number of draws must grow to reach `rtol`, at most 1 where they suffice."""

import math
from collections.abc import Callable

from groktrace.analysis.measurement.llc import off_minimum
from groktrace.analysis.tuning import MEASUREMENT
from groktrace.sampling.traces import Traces
from groktrace.sampling.tuning import SUBSAMPLED, WHOLE_DATA


def needed_plain(traces: Traces, rtol: float) -> float:
    """How many times as many draws give λ̂ to `rtol`; 1 off a minimum, where it is no measure of the basin.

    Args:
        traces: the draws so far.
        rtol: standard error wanted, relative to λ̂.
    """
    if off_minimum(traces):
        return 1.0
    return _times(traces.error(traces.delta_loss), abs(float(traces.delta_loss.mean())), rtol)


def needed_centred(traces: Traces, rtol: float) -> float:
    """How many times as many draws give λ_c to `rtol`; 1 where so many would be needed that none are spent.

    Sixteen draws, the first ones of large sets, do not tell that for certain: their error scatters.

    Args:
        traces: the draws so far, of two chains or more.
        rtol: standard error wanted, relative to λ_c.
    """
    times, first = _times(traces.centred_error, traces.centred, rtol), SUBSAMPLED.draws or 0
    return times if times <= WHOLE_DATA.growth or len(traces.delta_loss) <= first * traces.slow else 1.0


def needed_of_large_sets(traces: Traces, needed: Callable[[Traces], float], relaxation: Callable[..., float]) -> float:
    """The same where draws are expensive: what is off a minimum cannot become reliable.

    Elsewhere draws of less than a relaxation time of the flat directions do not tell their own error: from 16 draws of
    a transformer at κ = 100, where that time is 31 steps, it was 0.4 times the scatter.

    Args:
        traces: the draws so far.
        needed: what draws are needed for.
        relaxation: `Kernel.relaxation` at the γ of the chains.
    """
    count = len(traces.delta_loss)
    times = max(needed(traces), relaxation(traces.step_size, halvings=traces.halvings) / count)
    if times <= 1 or not off_minimum(traces):
        return times
    return min(times, (MEASUREMENT.steps_off_minimum * traces.slow - traces.burn_in) / count)


def _times(error: float, value: float, rtol: float) -> float:
    """The factor on the number of draws that brings a standard error down to `rtol` of a value."""
    if not value > 0:
        return math.inf if error > 0 else 1.0
    return (error / (rtol * value)) ** 2
