"""λ̂ along a training run."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Point:
    """One snapshot of a trajectory; what is not known is None.

    Attributes:
        step: optimizer updates before the snapshot.
        llc, stderr, llc_centred, stderr_centred, reliable, reasons: see `LLCEstimate`.
        train_loss, val_loss: mean loss over the stored training and validation samples.
        train_accuracy, val_accuracy: fraction of right predictions there.
        metrics: what the training script logged.
        diagnostics: see `LLCEstimate`.
    """

    step: int
    llc: float | None
    stderr: float | None
    llc_centred: float | None = None
    stderr_centred: float | None = None
    reliable: bool = True
    reasons: tuple[str, ...] = ()
    train_loss: float | None = None
    train_accuracy: float | None = None
    val_loss: float | None = None
    val_accuracy: float | None = None
    metrics: dict[str, float] | None = None
    diagnostics: dict[str, float | None] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "reasons": list(self.reasons)}


@dataclass(frozen=True)
class Trajectory:
    """λ̂ against the training step, all at one (nβ, γ).

    Attributes:
        points: in step order.
        n: number of training samples; None if unknown.
        nbeta, localization: nβ and γ of all points.
        resolution, locality: the dials they came from; None where they were given as numbers.
        method: "averaged" or "sgld"; None for curves measured elsewhere.
        run: where the snapshots lie.
    """

    points: tuple[Point, ...]
    n: int | None = None
    nbeta: float | None = None
    localization: float | None = None
    resolution: float | None = None
    locality: float | None = None
    method: str | None = None
    run: str | None = None
