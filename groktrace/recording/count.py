"""Count updates of which some turn out to have been skipped."""

from collections.abc import Callable

from torch import Tensor


class UpdateCount:
    """The number of updates, those before the recording included.

    Reading whether a gradient scaler skipped an update would wait for the GPU at every step, so every one is counted,
    and the skipped ones are taken off when a snapshot seems due, which is never too late.

    Args:
        first: updates before the recording.

    Attributes:
        first: the same.
        counted: the number, skipped ones perhaps included.
    """

    def __init__(self, first: int) -> None:
        self.first = self.counted = first
        self._skipped: Tensor | None = None

    @property
    def steps(self) -> int:
        """The number without those that were skipped."""
        if self._skipped is not None:
            self.counted -= int(self._skipped)
            self._skipped = None
        return self.counted

    def add(self, updates: int, skipped: Tensor | None) -> None:
        """Count updates.

        Args:
            updates: how many, skipped ones included.
            skipped: how many of them were skipped; None if none was.
        """
        self.counted += updates
        if skipped is not None:
            self._skipped = skipped if self._skipped is None else self._skipped + skipped

    def due(self, keep: Callable[[int], bool]) -> int | None:
        """The step counted last, if it is to be kept.

        Args:
            keep: the schedule.
        """
        counted = self.counted
        return counted if keep(counted) and self.steps == counted else None

    def restart(self) -> None:
        """Forget all updates of the recording."""
        self.counted, self._skipped = self.first, None
