"""What a chain's traces say about its own trustworthiness; pure functions of arrays [draws, chains]."""

import numpy as np
import torch
from torch import Tensor


@np.errstate(over="ignore", invalid="ignore")
def effective_sample_size(trace: Tensor, slow: float = 1.0) -> float:
    """Number of independent draws that the trace is worth (Vehtari et al. 2021, arXiv 1903.08008; Geyer 1992).

    Args:
        trace: [draws, chains].
        slow: draws to an independent one, at least.

    Returns:
        At least 1, at most draws × chains over `slow`; that maximum for a constant trace.
    """
    draws, chains = trace.shape
    values = trace.double().cpu().numpy()  # for arrays this small numpy's calls cost a fraction of torch's
    centred = values - values.mean(0)
    length = 1 << (2 * draws - 1).bit_length()
    spectrum = np.abs(np.fft.rfft(centred, n=length, axis=0)) ** 2
    covariance = np.fft.irfft(spectrum, n=length, axis=0)[:draws] / draws
    within = covariance[0].mean() * draws / (draws - 1) if draws > 1 else 0.0
    total = within * (draws - 1) / draws
    if chains > 1:
        total = total + values.mean(0).var(ddof=1)
    if not total > 0:
        return max(1.0, draws * chains / slow)
    correlation = 1 - (within - covariance.mean(1)) / total
    correlation[0] = 1.0
    # Sums of neighbouring correlations are positive and decreasing for a reversible chain; cut where they are not.
    pairs = correlation[: draws // 2 * 2].reshape(-1, 2).sum(1)
    negative = np.flatnonzero(pairs <= 0)
    pairs = pairs[: negative[0]] if len(negative) else pairs
    time = -1 + 2 * np.minimum.accumulate(pairs).sum() if len(pairs) else 1.0
    # Taking the traces' own mean off lowers every correlation a little (Wolff 2004, hep-lat/0306017, eq. 49).
    time = time * (1 + (4 * len(pairs) + 1) / draws)
    return max(1.0, float(draws * chains / max(time, slow)))


def standard_error(trace: Tensor, slow: float = 1.0) -> float:
    """Standard error of the trace's mean, [draws, chains], from its effective sample size m.

    Twice as much on either side covers 95 %, also where a few draws are all that tells how much they scatter: their
    mean squared distance from their own mean is 1 − 1/m of the variance.

    Args:
        trace: [draws, chains].
        slow: draws to an independent one, at least.
    """
    size = effective_sample_size(trace, slow)
    return student(size - 1) * float(trace.double().var(correction=0) / max(size - 1, 0.5)) ** 0.5


def student(freedom: float) -> float:
    """Student's 97.5 % quantile over the normal distribution's (Abramowitz & Stegun 1964, eq. 26.7.5)."""
    inverse = 1 / max(freedom, 1.5)
    return 1 + inverse * (1.2104 + inverse * (1.4401 + inverse * 1.3040))


def split_rhat(trace: Tensor) -> float:
    """Split R-hat of a trace [draws, chains]: 1 where all half-chains agree (Vehtari et al. 2021)."""
    half = len(trace) // 2
    if half < 2:
        return 1.0
    halves = torch.cat([trace[:half], trace[-half:]], dim=1).double()
    within = halves.var(0).mean()
    if not within > 0:
        return 1.0
    between = half * halves.mean(0).var()
    return float((((half - 1) / half * within + between / half) / within).sqrt())


def drift(trace: Tensor) -> float:
    """Change of the mean between the halves of a trace [draws, chains], relative to the mean."""
    half = len(trace) // 2
    mean = trace.double().mean()
    return float((trace[-half:].double().mean() - trace[:half].double().mean()) / mean.abs().clamp_min(1e-300))


def virial_ratio(virial: Tensor, restraint: Tensor, dimension: int) -> float:
    """(E[(w−w*)·nβ∇L] + γE‖w−w*‖²)/D: 1 in equilibrium whatever the loss (integration by parts).

    Args:
        virial: (w−w*)·nβ∇L, [draws, chains].
        restraint: γ‖w−w*‖², [draws, chains].
        dimension: D.
    """
    return float(virial.double().mean() + restraint.double().mean()) / dimension


def anharmonicity(virial: Tensor, delta_loss: Tensor) -> float:
    """½E[(w−w*)·nβ∇L]/λ̂: 1 for a quadratic bowl, k for a loss of degree 2k; arguments [draws, chains]."""
    mean = float(delta_loss.double().mean())
    return 0.5 * float(virial.double().mean()) / mean if mean else float("inf")
