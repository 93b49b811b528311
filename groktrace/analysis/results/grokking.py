"""Memorisation, generalisation and the severity of grokking, from accuracies."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from groktrace.analysis.results.trajectory import Trajectory
from groktrace.records import Record

THRESHOLD = 0.95


@dataclass(frozen=True)
class Grokking(Record):
    """When a run memorised and when it generalised.

    Attributes:
        memorised_at: first step with training accuracy ≥ 0.95; None if never, or not known.
        generalised_at: first step with validation accuracy ≥ 0.95; None if never, or not known.
        severity: the grokking severity measure, 1[final validation accuracy ≥ 0.95] times the mean over training time
            of |training accuracy − validation accuracy|; None where the accuracies are not known.
    """

    memorised_at: int | None
    generalised_at: int | None
    severity: float | None

    @property
    def delay(self) -> int | None:
        """Steps from memorising to generalising; None unless both happened."""
        if self.memorised_at is None or self.generalised_at is None:
            return None
        return self.generalised_at - self.memorised_at

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; what is not finite becomes None."""
        return {**super().to_dict(), "delay": self.delay}


def measure_grokking(trajectory: Trajectory) -> Grokking:
    """When the run memorised and generalised, and how far apart the two were.

    The severity is GSM = 1[acc_val(T) ≥ 0.95]/T · Σ_t |acc_train(t) − acc_val(t)| (Cullen et al. 2026,
    arXiv 2603.01192), the sum over steps by the trapezoidal rule between snapshots.
    """
    if trajectory.data is not None:  # whose accuracy is not the training's
        return Grokking(None, _first(trajectory.column("step"), trajectory.column("val_accuracy")), None)
    steps = trajectory.column("step")
    train, val = trajectory.column("train_accuracy"), trajectory.column("val_accuracy")
    severity = None
    known = np.isfinite(train) & np.isfinite(val)
    if known.sum() >= 2:
        gap = np.abs(train - val)[known]
        at = steps[known]
        mean_gap = float(np.sum((gap[1:] + gap[:-1]) / 2 * np.diff(at)) / (at[-1] - at[0]))
        severity = mean_gap if val[known][-1] >= THRESHOLD else 0.0
    return Grokking(_first(steps, train), _first(steps, val), severity)


def _first(steps: np.ndarray, accuracy: np.ndarray) -> int | None:
    reached = np.flatnonzero(accuracy >= THRESHOLD)
    return int(steps[reached[0]]) if len(reached) else None
