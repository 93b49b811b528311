"""The snapshots of a run that can be read."""

from collections.abc import Sequence

from torch import Tensor

from groktrace.errors import RunError, SnapshotError
from groktrace.run.store import Run, Snapshot


class Snapshots:
    """The snapshots of a run that can be read, and a line for each that cannot.

    Args:
        run: opened.

    Attributes:
        fingerprints: by step, ascending.
        by_step: all of them.
        unreadable: one line for each snapshot that cannot be read.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.unreadable: list[str] = []
        self.fingerprints: dict[int, str] = {}
        self.by_step: dict[int, Snapshot] = {}
        self.add(run.snapshots)

    def add(self, snapshots: Sequence[Snapshot]) -> list[int]:
        """Take in snapshots that are new; returns the steps of those that can be read."""
        added = []
        for snapshot in snapshots:
            if snapshot.step in self.by_step:
                continue
            self.by_step[snapshot.step] = snapshot
            try:
                self.fingerprints[snapshot.step] = snapshot.fingerprint()
                added.append(snapshot.step)
            except SnapshotError as failure:
                self.unreadable.append(str(failure))
        self.fingerprints = dict(sorted(self.fingerprints.items()))
        return added

    def first(self) -> tuple[int, dict[str, Tensor]]:
        """Step and weights of the first snapshot that loads.

        Raises:
            RunError: none does.
        """
        if (found := self._load_any(list(self.fingerprints))) is not None:
            return found
        raise RunError(f"{self.run.name}: none of its snapshots can be read; the first: {self.unreadable[0]}")

    def last(self) -> tuple[int, dict[str, Tensor]] | None:
        """Step and weights of the last snapshot that loads; None if none does."""
        return self._load_any(list(reversed(self.fingerprints)))

    def _load_any(self, steps: Sequence[int]) -> tuple[int, dict[str, Tensor]] | None:
        for step in steps:
            if (weights := self.load(step)) is not None:
                return step, weights
        return None

    def load(self, step: int) -> dict[str, Tensor] | None:
        """A snapshot's weights; None, and a line in `unreadable`, where the file is damaged."""
        try:
            return self.by_step[step].load(with_loss=True)
        except SnapshotError as failure:
            self.drop(step, failure)
            return None

    def metrics(self, step: int) -> dict[str, float] | None:
        """What the training script logged for a snapshot; None where the file is damaged by now."""
        try:
            return self.by_step[step].metrics()
        except SnapshotError:
            return None

    def drop(self, step: int, failure: SnapshotError) -> None:
        """Leave out a snapshot that turned out to be damaged.

        Args:
            step: of the snapshot.
            failure: what is wrong with it.
        """
        self.unreadable.append(str(failure))
        del self.fingerprints[step]
