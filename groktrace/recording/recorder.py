"""A recording in progress."""

import atexit
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from torch import Tensor, nn

from groktrace.recording.capture import Capture
from groktrace.recording.hooks import UpdateHooks
from groktrace.recording.writer import Writer
from groktrace.run import layout
from groktrace.run.remote import Remote

# Waiting for the disk is told from this many seconds on.
SILENT_WAIT = 1.0
HOW_TO_COUNT = "give watch() the optimizer that trains, or call recorder.step() once per update."
open_recorders: list["Recorder"] = []


class Recorder:
    """A recording in progress; made by `watch`.

    Attributes:
        out: the run directory, or its URL.
        deferred: whether a snapshot that is due is taken only when the next update begins, so that what belongs to
            the last one is done: an average of the weights brought up to date, metrics logged.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        keep: Callable[[int], bool],
        capture: Capture,
        out: Path | str,
        start: int,
        writes: bool,
        deferred: bool = False,
        remote: Remote | None = None,
    ) -> None:
        self.out = out
        self._root = Path(out) if remote is None else remote.folder
        self.deferred = deferred
        self._pid = os.getpid()
        self._model: nn.Module | None = model
        self._optimizer = optimizer
        self._keep = keep
        self._capture: Capture | None = capture
        self._writer = Writer(self._root, remote) if writes else None
        self._first = self._steps = start
        self._skipped: Tensor | None = None
        self._copied: int | None = None
        self._due: int | None = None
        self._metrics: dict[str, float] = {}
        self._blocked = self._waited = 0.0
        self._closed = self._within = self._hurried = False
        self._warned: set[str] = set()
        self._hooks: UpdateHooks | None = None
        self._guarded(lambda: self._snapshot(start))
        if optimizer is not None:
            self._hooks = UpdateHooks(optimizer, self._update, self._begin)
        open_recorders.append(self)
        _catch_termination()

    @property
    def steps(self) -> int:
        """Number of updates so far, those before this recording included."""
        if self._skipped is not None:
            self._steps -= int(self._skipped)
            self._skipped = None
        return self._steps

    def step(self) -> None:
        """Tell of one update; for loops whose optimizer was not given to `watch`."""
        if self._hooks is not None:
            self._warn("step", "recorder.step() does nothing where watch() was given the optimizer.")
        else:
            self._update(None)

    def log(self, **metrics: float) -> None:
        """Numbers to be kept with the next snapshot.

        Args:
            metrics: names and values; one-element tensors are fine too.
        """
        if not self._inert():
            self._guarded(lambda: self._metrics.update({name: float(value) for name, value in metrics.items()}))

    @property
    def due(self) -> bool:
        """Whether a snapshot was deferred and is still to be taken."""
        return self._due is not None

    def settle(self) -> None:
        """Take a deferred snapshot now; the next update would do so."""
        if self.due and not self._inert():
            self._guarded(self._settle)

    def flush(self) -> None:
        """Wait until the snapshots taken so far are written."""
        if self._writer is not None and not self._inert():
            self._guarded(self._writer.wait)

    def close(self) -> None:
        """Keep the last step, wait for the writer, and let go of model and optimizer; twice is once.

        Of a sharded model every process has to call it, before the process group ends.
        """
        self._close(alone=False)

    def leave(self) -> None:
        """Close where other processes may not: of a sharded model the last step is then not kept."""
        self._close(alone=True)

    def end(self) -> None:
        """Close from within a signal handler, whatever it interrupted."""
        if self._closed and self._writer is not None and os.getpid() == self._pid:
            self._writer.close()  # it was being closed
        self._hurried = True
        self._within |= self._hooks is None  # whether weights and count belong together is then not known
        self.leave()

    def _close(self, alone: bool) -> None:
        if self._inert():
            return
        self._closed = True
        try:
            if self._hooks is not None:
                self._hooks.remove()
            self._guarded(self._finish if not alone else self._finish_alone)
            if self._writer is not None:
                self._writer.close()
                self._report()
                if self._writer.unsent is not None:
                    self._warn("unsent", f"what could not be sent to '{self.out}' is in '{self._writer.unsent}'.")
        except BaseException:  # Ctrl-C while waiting; the end of the process tries again
            self._closed = False
            raise
        self._model = self._optimizer = self._capture = self._hooks = None
        if self in open_recorders:
            open_recorders.remove(self)
            _leave_termination()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._within |= error is not None and self._hooks is None
        self._close(alone=error is not None)

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        if self._writer is None:
            return f"<groktrace.Recorder {state}: {self.steps} steps; another process of the group writes>"
        return (
            f"<groktrace.Recorder {state}: {self.steps} steps, {self._writer.written} snapshots, "
            f"{self._writer.bytes} bytes, training blocked {self._blocked:.3f} s, in '{self.out}'>"
        )

    def _inert(self) -> bool:
        # A forked child inherits hooks and buffers, but not the writer's thread.
        return self._closed or os.getpid() != self._pid

    def _begin(self) -> None:
        """An update begins; until it is counted, the weights belong to no step."""
        self.settle()
        self._within = True

    def _update(self, found_inf: Tensor | None) -> None:
        if self._inert():
            return
        try:
            if found_inf is not None:
                # Reading the flag would wait for the GPU at every step, so updates are counted as if none were
                # skipped and the count is set right when it says that a snapshot is due, which is never too late.
                flag = (found_inf > 0).sum()
                self._skipped = flag if self._skipped is None else self._skipped + flag
            self._steps += 1
            self._within = False
            if self._keep(self._steps):
                counted = self._steps
                if self.steps == counted:
                    self._due = counted
                    if not self.deferred or self._hooks is None:
                        self._settle()
        except Exception as failure:
            self._warn_failure(failure)

    def _settle(self) -> None:
        """Take the snapshot that is due, if one is."""
        step, self._due = self._due, None
        if step is not None:
            self._snapshot(step)

    def _snapshot(self, step: int) -> None:
        """Copy the weights and hand them to the writer, unless the step is there already."""
        capture, writer = self._capture, self._writer
        if capture is None or step > layout.MAX_STEP or (writer is None and not capture.sharded):
            return
        if capture.sharded:
            # Every process has to come to the same decision, and to take part whatever befalls it.
            if step == self._copied:
                return
            self._copied = step
        began = time.perf_counter()
        try:
            wanted = writer is not None and self._wanted(writer, step, began)
        except Exception:
            if capture.sharded:
                capture.take_part()
            raise
        else:
            if writer is not None and wanted:
                self._guarded(lambda: capture.look(step))
                tensors = capture.copy()
                metrics, self._metrics = self._metrics, {}
                writer.submit(step, tensors, metrics)
                self._copied = step
                self._guarded(lambda: self._tell_changes(capture, writer))
            elif capture.sharded:
                capture.take_part()
        finally:
            self._blocked += time.perf_counter() - began

    def _tell_changes(self, capture: Capture, writer: Writer) -> None:
        """Write down which parameters have begun to train, and tell of changes that were seen late."""
        if capture.begun:
            writer.mark_trainable(capture.begun)
            capture.begun.clear()
        if capture.late:
            names = ", ".join(f"'{name}'" for name in list(capture.late)[:3]) + (
                ", ..." if len(capture.late) > 3 else ""
            )
            since, until = min(a for a, _ in capture.late.values()), max(b for _, b in capture.late.values())
            self._warn(
                "late",
                f"what does not train was written to, which was seen only now: {names}; snapshots after step {since}, "
                f"up to step {until}, may hold older values of it.",
            )
            capture.late.clear()

    def _wanted(self, writer: Writer, step: int, began: float) -> bool:
        """Whether the step is still to be written, once the buffers are free."""
        writer.make_room()
        self._waited += time.perf_counter() - began
        if self._waited > SILENT_WAIT:
            self._warn(
                "slow",
                f"training waits for snapshots to be written to '{self.out}', {self._waited:.1f} s so far; a larger "
                "every= or a faster disk would spare it that.",
            )
        self._report()
        return not layout.snapshot_path(self._root, step).exists()

    def _finish(self) -> None:
        self._settle()
        steps, capture = self.steps, self._capture
        if capture is None:
            return
        if self._within:
            self._warn(
                "within", f"the end came within an update, or may have: the weights after step {steps} are not kept."
            )
            return
        if self._writer is not None and not capture.sharded:
            self._writer.wait()  # so that what is there can be seen
        if self._writer is not None and not self._hurried:
            self._guarded(lambda: capture.look(steps, whole=True))
            self._guarded(lambda: self._tell_changes(capture, self._writer))
        idle = self._writer is not None and not capture.sharded and steps == self._first == self._copied
        if idle and capture.moved():
            self._warn("idle", f"the weights changed, but no update was seen; {HOW_TO_COUNT}")
        else:
            self._snapshot(steps)  # where the last write failed, this tries once more

    def _finish_alone(self) -> None:
        """The same where the other processes may be elsewhere, so that their pieces cannot be had."""
        if self._capture is None or not self._capture.sharded:
            self._finish()
        elif self._writer is not None and self.steps != self._copied:
            self._warn("last", "the last step of a sharded model is kept only where every process calls close().")

    def _guarded(self, action: Callable[[], None]) -> None:
        """Run `action`; what goes wrong in it is told, once, and never reaches the training."""
        try:
            action()
        except Exception as failure:
            self._warn_failure(failure)

    def _report(self) -> None:
        if self._writer is not None and (failure := self._writer.error) is not None:
            reason = f"{type(failure).__name__}: {failure}"
            self._warn("writer", f"a snapshot could not be written to '{self.out}' ({reason}); training goes on.")

    def _warn_failure(self, failure: Exception) -> None:
        self._warn("recording", f"recording failed ({type(failure).__name__}: {failure}); training goes on.")

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            tell(message)


def tell(message: str) -> None:
    """Warn, and never raise."""
    try:
        warnings.warn(f"groktrace: {message}", RuntimeWarning, stacklevel=2)
    except RuntimeWarning:  # warnings are errors in this process, but recording must not stop a training
        print(f"groktrace: {message}", file=sys.stderr)


def _catch_termination() -> None:
    """Have SIGTERM, with which schedulers end a job, close recordings first; a handler of the script's own stays."""
    if _is_main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)


def _leave_termination() -> None:
    """Put SIGTERM back once no recording is open."""
    if _is_main_thread() and not open_recorders and signal.getsignal(signal.SIGTERM) is _terminate:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()  # no other may set handlers


def _terminate(number: int, frame: FrameType | None) -> None:
    """Close what is open, then end the process as the signal alone would have; a second one does so at once."""
    signal.signal(number, signal.SIG_DFL)
    try:
        for recorder in list(open_recorders):
            recorder.end()
    finally:
        os.kill(os.getpid(), number)


@atexit.register
def _close_all() -> None:
    for recorder in list(open_recorders):
        recorder._close(alone=True)
