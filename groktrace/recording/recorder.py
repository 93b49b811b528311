"""A recording in progress: counts updates, decides which steps to keep, and hands their weights to the writer."""

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from groktrace.recording.attach import follow_optimizer
from groktrace.recording.branch import report_another_branch
from groktrace.recording.capture import Capture
from groktrace.recording.count import UpdateCount
from groktrace.recording.data_versions import DataVersions
from groktrace.recording.folder import Folder
from groktrace.recording.guard import Guard
from groktrace.recording.hooks import Streak, UpdateHooks, counted_optimizer
from groktrace.recording.metrics import numbers_in
from groktrace.recording.numbering import OwnCount, report_twice
from groktrace.recording.on_transition import TransitionCallback
from groktrace.recording.optimizer_switch import OtherOptimizers
from groktrace.recording.probe import HOW_TO_COUNT, BetweenUpdates, Reading, Watchdog, WeightProbe, moved_after, trained
from groktrace.recording.termination import catch_termination, open_recorders, restore_termination
from groktrace.recording.warn import Doubts, WarnOnce
from groktrace.recording.writer import Writer
from groktrace.run import layout, pending


class Recorder:
    """A recording in progress; made by `watch`.

    Attributes:
        out: the run directory, or its URL; where another process writes a whole model, what `watch` was given.
        requested: what `watch` was given.
        reaction: tells `watch(on_transition=...)` what it finds; None without.
        deferred: whether to take a snapshot only when the next update begins, after the script has updated an average
            of the weights or logged metrics.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        keep: Callable[[int], bool],
        capture: Capture,
        folder: Folder,
        data: DataVersions,
        start: int,
        deferred: bool = False,
        guard: Guard | None = None,
    ) -> None:
        self.out, self.requested, self._root = folder.place, folder.requested, folder.root
        self.deferred, self._pid = deferred, os.getpid()
        self._model: nn.Module | None = model
        self._optimizer, self._keep, self._data = optimizer, keep, data
        self._capture: Capture | None = capture
        self._writer = None if folder.hold is None else Writer(self._root, folder.hold, folder.remote)
        self._guard = None if folder.hold is None else guard
        self._count, self._blocked = UpdateCount(start), 0.0
        self._copied: int | None = None
        self._pending_step: int | None = None
        self._metrics: dict[str, float] = {}
        self._closed = self._left = self._in_update = self._on_signal = False
        self._warn_once = WarnOnce()
        self._doubt = Doubts(self._warn_once, None if self._writer is None else self._writer.mark, lambda: self.steps)
        self._hooks: UpdateHooks | None = None
        self._others: OtherOptimizers | None = None
        self._streak: Streak | None = None  # of other optimizers, at the end
        self.transition_callback: TransitionCallback | None = None
        self._warn_once.on_failure(lambda: self._snapshot(start))
        self._count_by(model, optimizer)
        if self._writer is not None:
            if not capture.sharded:
                probe = WeightProbe(trained(model, optimizer))
                among = (lambda: (self._count.counted, self._in_update or self._closed or self._left), start)
                self._writer.idle = Watchdog(probe, *among, self._warn_once, optimizer is None).look
            pending.register(self.out, self.flush, self.requested)
        open_recorders.append(self)
        catch_termination()

    def _count_by(self, model: nn.Module, optimizer: Any) -> None:
        """Count the updates of an optimizer, or without one those that `step` is called for."""
        # An average follows the weights by rules of its own, and of a sharded model a process sees a part.
        probed = self._writer is not None and not self.deferred and self._capture and not self._capture.sharded
        self._between = BetweenUpdates(WeightProbe(trained(model, optimizer)) if probed else None)
        if optimizer is not None:
            self._others = OtherOptimizers(optimizer, self._between.read, self._copy_of, self._replace, self._warn_once)
            begin = OwnCount(optimizer, self._count, self._doubt, self._begin).begin
            calls = (self._update, begin, self._stepped, self._again, self._return, partial(report_twice, self._doubt))
            self._hooks = UpdateHooks(optimizer, *calls, frozenset(map(id, model.parameters())))

    @property
    def steps(self) -> int:
        """Number of updates so far, those before this recording included."""
        return self._count.steps

    @property
    def began(self) -> bool:
        """Whether an update was counted."""
        return self.steps != self._count.first

    def step(self) -> None:
        """Count one update; for loops whose optimizer was not given to `watch`, nor attached."""
        if self._hooks is not None:
            self._warn_once("step", "recorder.step() does nothing where an optimizer's updates are counted.")
        else:
            self._update(None)

    def attach(self, optimizer: Any) -> None:
        """Count the updates of an optimizer that was made after `watch`, from now on; an earlier one's no more.

        Args:
            optimizer: as for `watch`.

        Raises:
            SettingsError: its steps cannot be seen, or it holds none of the model's parameters.
        """
        if self._model is None or self._capture is None or self._inert():
            self._warn_once("attach", "recorder.attach() does nothing after the recording was closed.")
            return
        optimizer = counted_optimizer(optimizer, self._model)
        if optimizer is self._optimizer:
            return
        earlier = self.began or self._hooks is not None
        if note := follow_optimizer(optimizer, self._capture, self._writer, self.steps, earlier):
            self._warn_once("attach", note)
        if self._hooks is not None:
            self._hooks.remove()
        self._optimizer = optimizer
        self._count_by(self._model, optimizer)

    def log(self, **metrics: float) -> None:
        """Keep numbers with the next snapshot.

        Args:
            metrics: names and values; one-element tensors are fine too.
        """
        if not self._inert():
            self._metrics |= numbers_in(metrics, self._warn_once)

    @property
    def has_pending(self) -> bool:
        """Whether a deferred snapshot is still to be taken."""
        return self._pending_step is not None

    def take_pending(self) -> None:
        """Take the deferred snapshot now instead of when the next update begins."""
        if self.has_pending and not self._inert():
            self._warn_once.on_failure(self._take_pending)

    def flush(self) -> None:
        """Wait until all snapshots taken so far are written."""
        if self._writer is not None and not self._inert():
            self._warn_once.on_failure(self._writer.wait)

    def catch_up(self) -> None:
        """Wait until all snapshots so far are analysed, and call `on_transition`, if given, with what is new."""
        self.flush()
        if self.transition_callback is not None and not self._inert():
            self.transition_callback.catch_up()

    def close(self) -> None:
        """Keep the last step, wait for the writer, and release model and optimizer; further calls do nothing.

        For a sharded model, every process has to call this before the process group ends.
        """
        self._close(collective=True)

    def close_locally(self) -> None:
        """Close without the other processes of the group; the last step of a sharded model is then not kept."""
        self._close(collective=False)

    def close_quietly(self) -> None:
        """Close as another recording takes its place, before which the script may have changed weights and loss."""
        self._guard = None
        self._warn_once.silence("moved")
        self.close()

    def close_on_signal(self) -> None:
        """Close from within a signal handler, whatever it interrupted."""
        if self._closed and self._writer is not None and os.getpid() == self._pid:
            self._writer.close()  # the signal interrupted a close()
        self._guard = None  # a signal handler is no place to run a network
        self._on_signal = True
        self._in_update |= self._hooks is None  # without hooks, weights may be ahead of the count
        self.close_locally()

    def _close(self, collective: bool) -> None:
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        if self.transition_callback is not None:
            self.transition_callback.close()
        try:
            if self._hooks is not None:
                self._streak = self._hooks.streak or self._streak
                self._hooks.remove()
            self._warn_once.on_failure(self._finish if collective else self._finish_locally)
            if self._writer is not None:
                self._writer.close()
                self._report(self._writer)
        except BaseException:  # Ctrl-C while waiting; closing at exit tries again
            self._closed = False
            raise
        self._model = self._optimizer = self._capture = self._hooks = self._guard = None
        self._between, self._others = BetweenUpdates(None), None
        pending.forget(self.out, self.flush)
        if self in open_recorders:
            open_recorders.remove(self)
            restore_termination()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._in_update |= error is not None and self._hooks is None
        self._guard = self._guard if error is None else None
        self._close(collective=error is None)

    def __repr__(self) -> str:
        said = f"<groktrace.Recorder {'closed' if self._closed else 'open'}: {self.steps} steps"
        if (writer := self._writer) is None:
            return f"{said}; another process of the group writes>"
        kept = f"{writer.written} snapshots, {writer.bytes} bytes"
        return f"{said}, {kept}, training blocked {self._blocked:.3f} s, in '{self.out}'>"

    def records(self, model: nn.Module, optimizer: Any) -> bool:
        """Whether this recording is open, and of that optimizer, or of that model where there is none."""
        return not self._inert() and (self._model is model if optimizer is None else self._optimizer is optimizer)

    def _inert(self) -> bool:
        # A forked child inherits hooks and buffers, but not the writer's thread.
        return self._closed or self._left or os.getpid() != self._pid

    def _begin(self) -> None:
        """Begin an update; until it is counted, the weights belong to no step."""
        self.take_pending()
        self._in_update = True
        self._between.begin()

    def _update(self, found_inf: Tensor | None) -> None:
        if self._inert():
            return
        try:
            self._count.add(1, None if found_inf is None else (found_inf > 0).sum())
            self._in_update = False
            self._between.end()
            if self._is_due() and (not self.deferred or self._hooks is None):
                self._take_pending()
            if self.transition_callback is not None:
                self.transition_callback.deliver()
        except Exception as failure:
            self._warn_once.of_failure(failure)

    def _is_due(self) -> bool:
        """Whether the step counted last is to be kept, or an earlier one still is."""
        if (due := self._count.due(self._keep)) is not None:
            self._pending_step = due
        return self._pending_step is not None

    def _stepped(self, streak: Streak) -> None:
        """Note a step of another optimizer; whether it is an update shows when that optimizer steps again."""
        others, apart = self._others, self._capture is None or self._capture.sharded
        if others is not None and not (apart or self._writer is None or self._inert()):
            self._warn_once.on_failure(lambda: others.stepped(streak))

    def _again(self, streak: Streak) -> bool:
        """Whether other optimizers have taken the place of the watched one."""
        try:
            return self._others is not None and not self._inert() and self._others.again(streak)
        except Exception as failure:
            self._warn_once.of_failure(failure)
            return False

    def _copy_of(self, streak: Streak) -> tuple[int, dict[str, Tensor]] | None:
        """Copy the weights after another optimizer's step, if the step that this may prove to be is due."""
        step = self.steps + streak.updates - int(streak.skipped or 0)
        if self._capture is None or self._writer is None or self.deferred or step == self.steps or not self._keep(step):
            return None
        self._writer.make_room()
        self._warn_once.on_failure(partial(self._capture.look, step))
        return step, self._capture.copy()

    def _replace(self, streak: Streak, after: Reading | None, copy: tuple[int, dict[str, Tensor]] | None) -> None:
        """Count the steps that other optimizers have made in place of the watched one."""
        self._count.add(streak.updates, streak.skipped)
        self._between.end_at(after)
        if self._is_due():
            if copy is not None and copy[0] == self._pending_step:
                self._pending_step = None
                self._snapshot(*copy)
            elif self.deferred or (self._capture is not None and self._capture.sharded):
                self._take_pending()
            else:
                self._pending_step = None  # the weights of that step are lost

    def _return(self) -> bool:
        """Discard the counted steps of other optimizers, if none was kept, as the watched one steps after all."""
        if self._inert() or self._copied != self._count.first or self.has_pending:
            return False
        self._count.restart()
        self._warn_once("returned", "the watched optimizer steps after all: only its steps count, from the first on.")
        return True

    def _take_pending(self) -> None:
        """Take the pending snapshot, if there is one."""
        step, self._pending_step = self._pending_step, None
        if step is not None:
            self._snapshot(step)

    def _snapshot(self, step: int, tensors: dict[str, Tensor] | None = None) -> None:
        """Hand tensors, or a copy of the weights now, to the writer, unless the step is on disk already."""
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
            wanted = writer is not None and self._wanted(writer, step)
        except Exception:
            if capture.sharded:
                capture.take_part()
            raise
        else:
            if writer is not None and wanted:
                if current := tensors is None:
                    self._warn_once.on_failure(lambda: capture.look(step))
                    tensors = capture.copy()
                self._warn_once.on_failure(lambda: capture.report(self._warn_once, writer.mark_trainable))
                mark = partial(writer.mark, step)
                self._warn_once.on_failure(partial(self._data.report, self._warn_once.first, mark))
                metrics, self._metrics = self._metrics, {}
                writer.submit(step, tensors, metrics)
                self._copied = step
                if self._guard is not None and current and step != self._count.first and self._guard.due():
                    self._guard.report_differences(step, tensors, writer.mark)
            elif capture.sharded:
                capture.take_part()
        finally:
            self._blocked += time.perf_counter() - began

    def _wanted(self, writer: Writer, step: int) -> bool:
        """Wait for free buffers; whether the step is still to be written."""
        writer.make_room()
        self._report(writer)
        path = layout.snapshot_path(self._root, step)
        if (there := path.exists()) and step != self._copied:
            report_another_branch(path, self._capture, self._warn_once.first, partial(writer.mark, step))
        return not writer.lost and not there

    def _finish(self) -> None:
        if (capture := self._capture) is None or self._left:
            return
        writer = self._writer
        if self._streak is not None and self._others is not None and not self._in_update and not capture.sharded:
            self._others.ended(self._streak)
        self._streak = None
        if moved := self._between.moved:
            self._pending_step = None
        self._take_pending()
        steps = self.steps
        if self._in_update:
            said = f"the end came within an update, or may have: the weights after step {steps} are not kept."
            self._warn_once("within", said)
            return
        if writer is not None and not capture.sharded:
            writer.wait()  # so that the steps on disk are known
        if writer is not None and not self._on_signal:
            self._warn_once.on_failure(lambda: capture.look(steps, whole=True))
            self._warn_once.on_failure(lambda: capture.report(self._warn_once, writer.mark_trainable))
        idle = writer is not None and not capture.sharded and steps == self._count.first == self._copied
        if idle and capture.moved():
            self._warn_once("idle", f"the weights changed, but no update was seen; {HOW_TO_COUNT}")
        elif moved:
            if not layout.snapshot_path(self._root, steps).exists():
                self._warn_once("moved", moved_after(steps))
        else:
            self._snapshot(steps)  # where the last write failed, this tries once more
            if self._guard is not None and writer is not None and steps != self._count.first:
                writer.wait()
                self._guard.report_differences(steps, capture.copy(), writer.mark, gradient=True)

    def _finish_locally(self) -> None:
        """Finish without the other processes of the group, whose shards cannot be gathered."""
        if self._capture is None or not self._capture.sharded:
            self._finish()
        elif self._writer is not None and self.steps != self._copied:
            self._warn_once("last", "the last step of a sharded model is kept only where every process calls close().")

    def _report(self, writer: Writer) -> None:
        if writer.lost and self._capture is not None:
            self._left = not self._capture.sharded  # of which each process has to take part in what the others do
        for kind, message in writer.troubles(self.out):
            self._warn_once(kind, message)
