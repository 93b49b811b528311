"""The background thread that writes snapshots."""

import contextlib
import json
import math
import threading
import time
from datetime import datetime, timezone
from pathlib import Path

from torch import Tensor

from groktrace.run import files, layout

_PROCESS_START = time.time()  # that of this import, which comes soon after


def now() -> str:
    """The time, ISO 8601 in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def remove_leftovers(root: Path) -> None:
    """Remove temporary files that a killed recording left among the snapshots.

    Those younger than this process stay: another process may be writing them, and readers pass over them anyway.
    """
    for entry in (root / layout.WEIGHTS_FOLDER).glob(f"{files.TEMPORARY_PREFIX}*"):
        with contextlib.suppress(FileNotFoundError):
            if entry.stat().st_mtime < _PROCESS_START:
                entry.unlink()


class Writer:
    """Writes one snapshot at a time; whoever has the next one waits.

    Args:
        root: the run directory; its weights folder exists.

    Attributes:
        written: how many snapshots were written.
        bytes: their size.
        last_step: the newest step that lies on disk whole, or None.
        error: why the newest write that failed did, or None.
    """

    def __init__(self, root: Path) -> None:
        self.written = 0
        self.bytes = 0
        self.last_step: int | None = None
        self.error: Exception | None = None
        self._root = root
        self._job: tuple[int, dict[str, Tensor], dict[str, float]] | None = None
        self._stopping = False
        self._changed = threading.Condition()
        # Daemon: a writer stuck on a dead file system must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name="groktrace-writer", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return once no snapshot is in flight, so that its tensors may be overwritten.

        Raises:
            RuntimeError: the thread is gone.
        """
        with self._changed:
            while self._job is not None:
                if not self._thread.is_alive():
                    raise RuntimeError("the thread that writes snapshots has ended")
                self._changed.wait(1.0)

    def submit(self, step: int, tensors: dict[str, Tensor], metrics: dict[str, float]) -> None:
        """Hand over a snapshot; `tensors` must stay as they are until `wait` returns.

        Raises:
            RuntimeError: the thread is gone.
        """
        self.wait()
        with self._changed:
            self._job = (step, tensors, metrics)
            self._changed.notify_all()

    def close(self) -> None:
        """Write what is in flight and end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                while self._job is None and not self._stopping:
                    self._changed.wait()
                if self._job is None:
                    return
                step, tensors, metrics = self._job
            try:
                size = self._write(step, tensors, metrics)
                self.written, self.bytes, self.last_step = self.written + 1, self.bytes + size, step
            except Exception as failure:  # the training thread reports it; later snapshots are still tried
                self.error = failure
            finally:
                with self._changed:
                    self._job = None
                    self._changed.notify_all()
                del tensors

    def _write(self, step: int, tensors: dict[str, Tensor], metrics: dict[str, float]) -> int:
        metadata = {
            "groktrace": str(layout.FORMAT_VERSION),
            "step": str(step),
            "time": now(),
            "metrics": json.dumps({k: v if math.isfinite(v) else None for k, v in metrics.items()}, allow_nan=False),
        }
        return files.write_tensors(layout.snapshot_path(self._root, step), tensors, metadata)
