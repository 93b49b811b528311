"""What a detector of phase transitions is, and what it returns."""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from groktrace.analysis.results.trajectory import Trajectory
from groktrace.records import Record


@dataclass(frozen=True)
class Transition(Record):
    """A change of phase.

    Attributes:
        kind: "complexification" (λ rises) or "simplification" (λ falls).
        label: "memorisation", "generalisation", or None where the evidence allows neither.
        step: the midpoint, where half of the change is done.
        step_low, step_high: 90 % interval of the midpoint.
        onset, end: the steps between which the change happens, less a twentieth of it at either end.
        llc_before, llc_after: fitted λ of the phases that the change leads between.
        delta_llc: llc_after − llc_before.
        stderr: standard error of delta_llc.
        delta_free_energy: ΔF = n·ΔL + Δλ·log n, L the training loss at onset and end (negative favours what comes
            after); None where n or L is not known.
        evidence: one sentence on what the label rests on.
        curve: "llc_centred" where the levels are those of λ_c, "llc" where they are those of λ̂; None if unknown.
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
    delta_free_energy: float | None = None
    evidence: str = ""
    curve: str | None = None

    @property
    def name(self) -> str:
        """Its label, or else its kind."""
        return self.label or self.kind

    @classmethod
    def between(
        cls,
        trajectory: Trajectory,
        first: int,
        last: int,
        *,
        levels: tuple[float, float] | None = None,
        stderr: float | None = None,
        dates: tuple[int, int, int] | None = None,
        label: str | None = None,
        evidence: str = "",
    ) -> "Transition":
        """The change between two points of a trajectory; its kind and free energy follow.

        Args:
            trajectory: λ̂ along a run.
            first: index of the last point before the change.
            last: index of the first point after it.
            levels: λ before and after; by default that of the two points.
            stderr: standard error of their difference; by default that of the two points.
            dates: midpoint, lower and upper end of its interval, as steps; by default what lies between the points.
            label: see `Transition`.
            evidence: see `Transition`.
        """
        curve, steps = trajectory.curve, [trajectory.points[i].step for i in (first, last)]
        before, after = (float(level) for level in (curve.value[[first, last]] if levels is None else levels))
        if stderr is None:
            stderr = math.hypot(curve.error[first], curve.error[last])
        middle, low, high = (sum(steps) // 2, *steps) if dates is None else dates
        delta = after - before
        loss = trajectory.column("train_loss")[[first, last]]
        energy = None
        if trajectory.n is not None and trajectory.n > 0 and np.isfinite(loss).all():
            energy = trajectory.n * float(loss[1] - loss[0]) + delta * math.log(trajectory.n)
        return cls(
            kind="complexification" if delta > 0 else "simplification",
            label=label,
            step=middle,
            step_low=low,
            step_high=high,
            onset=steps[0],
            end=steps[1],
            llc_before=before,
            llc_after=after,
            delta_llc=delta,
            stderr=float(stderr),
            delta_free_energy=energy,
            evidence=evidence,
            curve=curve.name,
        )


class Detector(Protocol):
    """Finds the phase transitions of a trajectory."""

    def detect(self, trajectory: Trajectory) -> list[Transition]:
        """The transitions in step order; empty where there is none, or where too few points can be used.

        Args:
            trajectory: λ̂ along a run; `trajectory.curve` is the curve that says where the network changes phase.
        """
        ...
