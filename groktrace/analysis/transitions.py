"""Phase transitions of a trajectory."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Transition:
    """A change of phase.

    Attributes:
        kind: "complexification" (λ rises) or "simplification" (λ falls).
        label: "memorisation", "generalisation", or None where the evidence allows neither.
        step: the midpoint, where half of the change is done.
        step_low, step_high: 90 % interval of the midpoint.
        onset, end: the steps between which the change happens.
        llc_before, llc_after: λ at onset and end.
        delta_llc: llc_after − llc_before.
        stderr: standard error of delta_llc.
        evidence: one sentence on what the label rests on.
    """

    kind: str
    label: str | None
    step: int
    step_low: int
    step_high: int
    onset: int
    end: int
    llc_before: float
    llc_after: float
    delta_llc: float
    stderr: float
    evidence: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)
