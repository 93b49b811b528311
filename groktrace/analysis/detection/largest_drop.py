"""A plain detector: the largest fall of λ, if it is significant."""

from dataclasses import dataclass

import numpy as np

from groktrace.analysis.detection.base import Transition
from groktrace.analysis.results.trajectory import Trajectory


@dataclass(frozen=True)
class LargestDropDetector:
    """Finds the largest fall of λ from any point to any later one: one transition at most, without a label.

    Attributes:
        min_change: a fall counts from this fraction of the curve's largest level on.
        min_errors: and from so many of its standard errors on; at 5, one of 2000 flat curves of 60 points has a fall,
            and ten of 2000 with 200 points.
    """

    min_change: float = 0.05
    min_errors: float = 5.0

    def detect(self, trajectory: Trajectory) -> list[Transition]:
        """The fall, dated where λ first passes half of it.

        Args:
            trajectory: λ̂ along a run.
        """
        curve = trajectory.curve
        position = np.flatnonzero(np.isfinite(curve.value))
        if len(position) < 2:
            return []
        value = curve.value[position]
        highest = np.maximum.accumulate(value)
        last = int(np.argmax(highest - value))
        first = int(np.argmax(value[: last + 1]))
        fall = float(value[first] - value[last])
        error = float(np.hypot(*curve.error[position[[first, last]]]))
        if first == last or fall < max(self.min_change * float(value.max()), self.min_errors * error):
            return []
        passed = first + int(np.argmax(value[first : last + 1] <= value[first] - fall / 2))
        low, high = (trajectory.points[i].step for i in position[[passed - 1, passed]])
        return [
            Transition.between(
                trajectory, int(position[first]), int(position[last]), dates=((low + high) // 2, low, high)
            )
        ]
