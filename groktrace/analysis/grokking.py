"""Memorisation, generalisation and the severity of grokking, from accuracies."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Grokking:
    """When a run memorised and when it generalised.

    Attributes:
        memorised_at: first step with training accuracy ≥ 0.95; None if never.
        generalised_at: first step with validation accuracy ≥ 0.95; None if never.
        severity: the grokking severity measure, 1[final validation accuracy ≥ 0.95] times the mean over training time of
            |training accuracy − validation accuracy|.
    """

    memorised_at: int | None
    generalised_at: int | None
    severity: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)
