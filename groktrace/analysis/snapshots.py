"""The snapshots of a run, and results of them that are kept as they come."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor

from groktrace.analysis.evaluator import Chunk, Result
from groktrace.analysis.journal import append_lines, read_lines
from groktrace.analysis.workers import Finished
from groktrace.errors import RunError, SnapshotError
from groktrace.run.store import Run, Snapshot

Kept = TypeVar("Kept")  # of a line of a journal


class Workers(Protocol):
    """Where chunks are evaluated.

    Attributes:
        threads: of this process that it keeps busy.
    """

    threads: int

    def evaluate(self, chunks: Sequence[Chunk], snapshots: dict[int, Snapshot], deadline: float = math.inf) -> Finished:
        """Numbers of chunks and their results, as they are finished; none is begun after the deadline."""


class Snapshots:
    """The snapshots of a run that can be read, and a line for each that cannot.

    Args:
        run: opened.

    Attributes:
        prints: fingerprints by step, ascending.
        unreadable: one line for each snapshot that cannot be read.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.unreadable: list[str] = []
        self.prints: dict[int, str] = {}
        self._by_step: dict[int, Snapshot] = {}
        self.add(run.snapshots)

    def add(self, snapshots: Sequence[Snapshot]) -> list[int]:
        """Take in snapshots that are new; returns the steps of those that can be read."""
        fresh = [each for each in snapshots if each.step not in self._by_step]
        added = []
        for snapshot in fresh:
            self._by_step[snapshot.step] = snapshot
            try:
                self.prints[snapshot.step] = snapshot.fingerprint()
                added.append(snapshot.step)
            except SnapshotError as failure:
                self.unreadable.append(str(failure))
        self.prints = dict(sorted(self.prints.items()))
        return added

    def first(self) -> tuple[int, dict[str, Tensor]]:
        """Step and weights of the first snapshot that loads.

        Raises:
            RunError: none does.
        """
        for step in list(self.prints):
            if (weights := self.load(step)) is not None:
                return step, weights
        raise RunError(f"{self.run.name}: none of its snapshots can be read; the first: {self.unreadable[0]}")

    def last(self) -> tuple[int, dict[str, Tensor]] | None:
        """Step and weights of the last snapshot that loads; None if none does."""
        for step in reversed(list(self.prints)):
            if (weights := self.load(step)) is not None:
                return step, weights
        return None

    def load(self, step: int) -> dict[str, Tensor] | None:
        """A snapshot's weights; None, and a line in `unreadable`, where the file is damaged."""
        try:
            return self._by_step[step].load(with_loss=True)
        except SnapshotError as failure:
            self._drop(step, failure)
            return None

    def metrics(self, step: int) -> dict[str, float] | None:
        """What the training script logged for a snapshot; None where the file is damaged by now."""
        try:
            return self._by_step[step].metrics()
        except SnapshotError:
            return None

    def _drop(self, step: int, failure: SnapshotError) -> None:
        self.unreadable.append(str(failure))
        del self.prints[step]

    def replay(
        self,
        journal: Path,
        stack: int,
        workers: Workers,
        chunk: Callable[[tuple[int, ...]], Chunk],
        parse: Callable[[Any], Result],
        report: Callable[[int, int], None],
        among: Sequence[int] | None = None,
        deadline: float = math.inf,
    ) -> dict[int, Any]:
        """A result for each snapshot, those in the journal as they are, the others computed and added to it.

        Args:
            journal: where results are kept, keyed by the snapshots' fingerprints.
            stack: snapshots computed at once; a stack of which some are missing is computed anew as a whole, so that
                an interruption leaves no trace in the rounding.
            workers: where they are computed; only this process writes the journal.
            chunk: the work on the snapshots of some steps.
            parse: a result from its journal line.
            report: called with (snapshots done, snapshots in all).
            among: the steps wanted, of snapshots that can be read; None for all.
            deadline: until when to begin any, of `time.monotonic`.
        """
        known = read_journal(journal, parse)
        for step, fingerprint in self.prints.items():
            if fingerprint in known and known[fingerprint].step != step:
                raise RunError(f"{journal}: damaged (step {step} has another's result); remove the file to redo it.")
        ordered = list(self.prints if among is None else among)
        stacks = [tuple(ordered[start : start + stack]) for start in range(0, len(ordered), stack)]
        missing = [steps for steps in stacks if any(self.prints[step] not in known for step in steps)]
        done = len(ordered) - sum(len(steps) for steps in missing)
        report(done, len(ordered))
        chunks = [replace(chunk(steps), fingerprints=tuple(self.prints[step] for step in steps)) for steps in missing]
        for number, results in workers.evaluate(chunks, self._by_step, deadline):
            lines = []
            for step, result in zip(missing[number], results, strict=True):
                if isinstance(result, SnapshotError):
                    self._drop(step, result)
                elif self.prints[step] not in known:
                    known[self.prints[step]] = parse(result.to_dict())
                    lines.append({"snapshot": self.prints[step], **result.to_dict()})
            append_lines(journal, lines)
            self.run.publish(journal)
            done += len(missing[number])
            report(done, len(ordered))
        return {step: known[self.prints[step]] for step in ordered if self.prints.get(step) in known}


def read_journal(path: Path, parse: Callable[[Any], Kept]) -> dict[str, Kept]:
    """Results by the fingerprints of their snapshots.

    Args:
        path: of the journal.
        parse: a result from its line.

    Raises:
        RunError: a line is damaged.
    """
    known: dict[str, Kept] = {}
    for record in read_lines(path):
        try:
            fingerprint = str(record.pop("snapshot"))
            known[fingerprint] = parse(record)
        except (KeyError, TypeError, ValueError) as failure:
            raise RunError(f"{path}: damaged ({failure}); remove the file to redo it.") from failure
    return known
