"""Decide whether other optimizers have taken the place of the watched one."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from groktrace.recording.hooks import Streak
from groktrace.recording.probe import Reading, differ

# Relative rounding error that an undone perturbation of the weights may leave.
SAME = 1e-5

Spare = tuple[int, dict[str, Tensor]]


class OtherOptimizers:
    """Decides whether steps of other optimizers are updates.

    They are if one of them steps again without a step of the watched one between, and the weights are as its last step
    left them. They are not if both make one update together, as in sharpness-aware training.

    Args:
        optimizer: the watched one.
        read: the weights as they are.
        keep: the step and the weights that are due, if the streak's last step is an update; None without.
        replace: called where they are updates, with the streak, the weights after it, and what `keep` gave.
        warn: called with a kind of warning and its text.
    """

    def __init__(
        self,
        optimizer: Any,
        read: Callable[[], Reading | None],
        keep: Callable[[Streak], Spare | None],
        replace: Callable[[Streak, Reading | None, Spare | None], None],
        warn: Callable[[str, str], None],
    ) -> None:
        self._optimizer, self._read, self._keep, self._replace, self._warn = optimizer, read, keep, replace, warn
        self._after: Reading | None = None
        self._spare: Spare | None = None

    def stepped(self, streak: Streak) -> None:
        """Note a step of one of them."""
        self._spare, self._after = None, self._read()
        if not streak.longest:
            self._spare = self._keep(streak)

    def again(self, streak: Streak) -> bool:
        """Before one of them steps again: whether they have taken the watched one's place."""
        still = self._inner(streak) or not differ(self._after, self._read(), SAME)
        if ascends(streak.last) != ascends(self._optimizer) or not (streak.is_long or (still and not streak.longest)):
            return False
        self._count(streak)
        return True

    def ended(self, streak: Streak) -> None:
        """Decide on steps of theirs at the end of the recording."""
        alike = ascends(streak.last) == ascends(self._optimizer)
        if streak.round and not streak.longest and alike and not differ(self._after, self._read()):
            self._count(streak)

    def _inner(self, streak: Streak) -> bool:
        """Whether the watched one wraps the other, as sharpness-aware ones do."""
        return any(value is streak.last for value in vars(self._optimizer).values())

    def _count(self, streak: Streak) -> None:
        spare, self._spare = self._spare, None
        self._replace(streak, self._after, spare)
        if not self._inner(streak):
            names = type(self._optimizer).__name__, type(streak.last).__name__
            self._warn(
                "replaced",
                f"{'another ' if names[0] == names[1] else ''}{names[1]} steps the weights of the {names[0]} that "
                "watch() was given, which has not stepped in between: from here on the steps of both are counted. If "
                "those of the other one are no updates, but an inner loop, leave optimizer out and call "
                "recorder.step() once per update.",
            )


def ascends(optimizer: Any) -> bool:
    """Whether it ascends the gradient, as the perturbing step of sharpness-aware training does."""
    return any(group.get("maximize") for group in optimizer.param_groups)
