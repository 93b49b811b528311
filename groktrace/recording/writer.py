"""The background thread that writes snapshots."""

import contextlib
import json
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torch import Tensor

from groktrace.recording.lock import FolderLock
from groktrace.run import files, layout
from groktrace.run.info import MAX_DOUBT
from groktrace.run.remote import Remote

QUEUE_BYTES = 2**20
QUEUE_SECONDS = 1.0
SILENT_WAIT = 1.0  # seconds that training may wait for the disk without a warning
_PROCESS_START = time.time()  # that of this import, which comes soon after


def now() -> str:
    """The time, ISO 8601 in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def remove_leftovers(root: Path) -> None:
    """Remove temporary files that a killed recording left.

    Those younger than this process stay: another process may be writing them, and readers pass over them anyway.
    """
    for folder in (root, root / layout.WEIGHTS_FOLDER):
        for entry in folder.glob(f"{files.TEMPORARY_PREFIX}*"):
            with contextlib.suppress(FileNotFoundError):
                if entry.stat().st_mtime < _PROCESS_START:
                    entry.unlink()


def write_snapshot(root: Path, step: int, tensors: dict[str, Tensor], metrics: Mapping[str, float], **more: str) -> int:
    """Write one snapshot, whole or not at all; the caller syncs the folder.

    Args:
        root: the run directory; its weights folder exists.
        step: the training step.
        tensors: by name.
        metrics: what was logged.
        **more: further metadata.

    Returns:
        The bytes written.

    Raises:
        OSError: the file system refused.
    """
    return files.write_tensors(layout.snapshot_path(root, step), tensors, snapshot_metadata(step, metrics) | more)


def snapshot_metadata(step: int, metrics: Mapping[str, float]) -> dict[str, str]:
    """What the metadata of a snapshot say besides its digests.

    Args:
        step: the training step.
        metrics: what was logged.
    """
    return {
        "groktrace": str(layout.FORMAT_VERSION),
        "step": str(step),
        "time": now(),
        "metrics": json.dumps({k: v if math.isfinite(v) else None for k, v in metrics.items()}, allow_nan=False),
    }


class Writer:
    """Writes snapshots in a background thread; the training waits while a large one is in flight.

    Small ones are queued and written together once a second: waking the thread takes a core from the training, which
    costs more than the writing.

    Args:
        root: the run directory; its weights folder exists.
        hold: on it; released at the end.
        remote: where files go from there, if anywhere.

    Attributes:
        written: how many snapshots were written.
        bytes: their size.
        last_step: the newest step that lies on disk whole, or None.
        error: why the newest write that failed did, or None.
        lost: whether the run directory is no longer this recording's, into which nothing is written any more.
        unsent: after `close`, the folder with what could not be uploaded, or None.
        waited: seconds that the training has waited for room.
        idle: called about once a second while nothing is to be written; it must not raise.
    """

    def __init__(self, root: Path, hold: FolderLock, remote: Remote | None = None) -> None:
        self._hold, self._remote = hold, remote
        self.written = 0
        self.bytes = 0
        self.last_step: int | None = None
        self.error: Exception | None = None
        self.lost = False
        self.unsent: Path | None = None
        self.waited = 0.0
        self.idle: Callable[[], None] | None = None
        self._root = root
        self._marks: list[dict[str, Any]] = []  # doubts not yet written
        self._begun: dict[str, int] = {}  # the step from which parameters train, by name
        self._begins = False  # whether that is not yet written
        self._optimizer: dict[str, Any] = {}  # entries of run.json that came with one attached later
        self._still: frozenset[str] = frozenset()  # parameters that it does not hold
        self._jobs: deque[tuple[int, dict[str, Tensor], dict[str, float]]] = deque()
        self._queued = 0  # bytes of the queued jobs; at least QUEUE_BYTES if one is not small
        self._hurry = self._stopping = self._ended = False
        self._changed = threading.Condition()
        # Daemon: a writer stuck on a dead file system must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name="groktrace-writer", daemon=True)
        self._thread.start()

    def make_room(self) -> None:
        """Wait until the tensors submitted last may be overwritten.

        Raises:
            RuntimeError: the thread is gone.
        """
        began = time.perf_counter()
        with self._changed:
            if self._queued >= QUEUE_BYTES:
                self._drain()
        self.waited += time.perf_counter() - began

    def troubles(self, place: Path | str) -> Iterator[tuple[str, str]]:
        """What the user has to know, as pairs of kind and text.

        Args:
            place: the run directory or its URL.
        """
        if self.waited > SILENT_WAIT:
            yield (
                "slow",
                f"training waits for snapshots to be written to '{place}', {self.waited:.1f} s so far; a larger every= "
                "or a faster disk would spare it that.",
            )
        if self.lost:
            yield "lost", f"'{place}' was removed, or taken by another recording: this one ends."
        elif self.error is not None:
            reason = f"{type(self.error).__name__}: {self.error}"
            yield "writer", f"a snapshot could not be written to '{place}' ({reason}); training goes on."
        if self.unsent is not None:
            yield "unsent", f"what could not be sent to '{place}' is in '{self.unsent}'."

    def wait(self) -> None:
        """Wait until everything is written.

        Raises:
            RuntimeError: the thread is gone.
        """
        with self._changed:
            self._drain()

    def mark(self, step: int, text: str) -> None:
        """Write a doubt into run.json.

        Args:
            step: the training step.
            text: what speaks against the run; the analysis repeats it.
        """
        with self._changed:
            self._marks.append({"step": step, "text": text[:MAX_DOUBT]})
            self._hurry = True
            self._changed.notify_all()

    def _drain(self) -> None:
        while self._jobs or self._marks or self._begins:
            if not self._thread.is_alive():
                raise RuntimeError("the thread that writes snapshots has ended")
            self._hurry = True
            self._changed.notify_all()
            self._changed.wait(1.0)

    def submit(self, step: int, tensors: dict[str, Tensor], metrics: dict[str, float]) -> None:
        """Submit a snapshot; `tensors` must not change until `make_room` returns.

        Raises:
            RuntimeError: the thread is gone.
        """
        self.make_room()
        size = sum(tensor.nbytes for tensor in tensors.values())
        small = 4 * size < QUEUE_BYTES
        if small:
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        with self._changed:
            self._queued += (
                size if small else QUEUE_BYTES
            )  # before the append, so that an interruption leaves it too large
            self._jobs.append((step, tensors, metrics))
            if 2 * self._queued >= QUEUE_BYTES or not self.written:  # the first at once, to show that it works
                self._hurry = True
                self._changed.notify_all()

    def mark_trainable(self, begun: Mapping[str, int]) -> None:
        """Write into run.json, before the next snapshot, that parameters train.

        Args:
            begun: the step from which they do, by name.
        """
        with self._changed:
            self._begun = {**self._begun, **begun}
            self._begins = self._hurry = True
            self._changed.notify_all()

    def mark_optimizer(self, description: dict[str, Any], still: Iterable[str]) -> None:
        """Write the optimizer that was attached into run.json, before the next snapshot.

        Args:
            description: its entry.
            still: parameters that do not train, as it does not hold them.
        """
        with self._changed:
            self._optimizer, self._still = {"optimizer": description}, self._still | frozenset(still)
            self._begins = self._hurry = True
            self._changed.notify_all()

    def close(self) -> None:
        """Write what is in flight and end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
            # Not join() alone: a signal handler may come here while this thread holds the lock; only wait() lets go.
            while not self._ended and self._thread.is_alive():
                self._changed.wait(1.0)
        self._thread.join()
        self.idle = None  # it refers to the weights
        try:
            # Written last; tells followers that nothing more will come.
            self._describe(closed=now())
        except Exception as failure:
            self.error = failure
        self._hold.release()
        if self._remote is not None:
            self.unsent = self._remote.close()

    def _work(self) -> None:
        while True:
            look = False
            with self._changed:
                while not self._hurry and not self._stopping:
                    if not self._changed.wait(QUEUE_SECONDS):
                        look = not self._jobs
                        break
                marks, begins = list(self._marks), self._begins
                if not self._jobs and not marks and not begins and not look:
                    self._hurry = False
                    if self._stopping:
                        self._ended = True
                        self._changed.notify_all()
                        return
                    continue
                jobs = bool(self._jobs)
            if look and self.idle is not None:
                self.idle()
            if marks or begins:
                self._keep(marks)
            if jobs:
                self._write_first()

    def _keep(self, marks: list[dict[str, Any]]) -> None:
        """Write doubts, and which tensors have begun to train, into run.json."""
        with self._changed:
            self._begins = False  # even on failure, as every later change of run.json writes it again
        try:
            self._describe(marks)
        except Exception as failure:
            self.error = failure
        with self._changed:
            del self._marks[: len(marks)]
            self._changed.notify_all()

    def _describe(self, marks: Sequence[dict[str, Any]] = (), **entries: Any) -> None:
        """Change entries of run.json; only in the thread, or after it has ended."""
        if self._is_lost():
            return
        path = self._root / layout.RUN_FILE
        info = {**files.read_json(path), **self._optimizer, **entries}
        if marks:
            info["doubts"] = [*(info.get("doubts") or []), *marks]
        for name in self._still:
            info["weights"][name]["trainable"] = False
        for name, step in self._begun.items():
            info["weights"][name] |= {"trainable": True, "trainable_from": step}
        files.write_json(path, info)
        if self._remote is not None:
            self._remote.send(path, forget=True)

    def _write_first(self) -> None:
        """Write the oldest job."""
        with self._changed:
            step, tensors, metrics = self._jobs[0]
            last = len(self._jobs) == 1
        try:
            if not self._is_lost():
                size = self._write(step, tensors, metrics)
                self.written, self.bytes, self.last_step = self.written + 1, self.bytes + size, step
        except Exception as failure:  # the training thread reports it; later snapshots are still tried
            self.error = failure
        del tensors
        if last:  # once a batch
            files.sync_folder(self._root / layout.WEIGHTS_FOLDER)
        with self._changed:
            self._jobs.popleft()
            self._hurry = bool(self._jobs)  # jobs that came meanwhile join this batch
            if not self._jobs:
                self._queued = 0
                self._changed.notify_all()

    def _is_lost(self) -> bool:
        self.lost = self.lost or self._hold.lost()
        return self.lost

    def _write(self, step: int, tensors: dict[str, Tensor], metrics: dict[str, float]) -> int:
        size = write_snapshot(self._root, step, tensors, metrics)
        if self._remote is not None:
            self._remote.send(layout.snapshot_path(self._root, step), forget=True)
        return size
