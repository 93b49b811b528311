"""Progress of long work, in a way that suits a terminal, a notebook and a log file alike."""

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

from groktrace.reporting.numbers import duration

HEARTBEAT_SECONDS = 30.0
TICK_SECONDS = 1.0


class ProgressBar:
    """Progress of long work: a bar on a terminal, elsewhere one line every 30 seconds; both go on while work stalls.

    A notebook counts as a terminal.

    Args:
        total: how much there is to do.
        label: what is being done.
        stream: where to show it; standard error by default.
        clock: seconds, for tests.
        quiet_seconds: nothing is shown of what is done sooner; where this is given, nor is the end of what is done
            before the first line elsewhere.
    """

    def __init__(
        self,
        total: int,
        label: str,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        quiet_seconds: float = 0.0,
    ) -> None:
        self._total, self._label = total, label
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._done = 0
        self._terminal = self._stream.isatty() or type(self._stream).__module__.startswith("ipykernel.")
        # Who keeps a log of many short pieces of work wants no line of each.
        self._quiet_seconds = quiet_seconds if self._terminal or not quiet_seconds else HEARTBEAT_SECONDS
        self._began = self._shown = clock()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        # One step of the work may take minutes, and silence looks like a hang.
        self._ticker = threading.Thread(target=self._tick, name="groktrace-progress", daemon=True)

    def __enter__(self) -> "ProgressBar":
        if self._terminal and not self._quiet:
            self._draw()
        self._ticker.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._ended.set()
        self._ticker.join()
        if self._quiet:
            return
        if self._terminal:
            self._draw()
            self._write("\n")
        elif error is None:
            count = f"{self._total}" if self._done >= self._total else f"{self._done} of {self._total}"
            self._write(f"{self._label}: {count} done in {duration(self._clock() - self._began)}\n")

    def advance(self, n: int = 1) -> None:
        """Tell that `n` more are done."""
        with self._lock:
            self._done += n
            self._show(0.05, self._done >= self._total)

    @property
    def _quiet(self) -> bool:
        return self._clock() - self._began < self._quiet_seconds

    def _tick(self) -> None:
        while not self._ended.wait(TICK_SECONDS):
            with self._lock:
                self._show(TICK_SECONDS, False)

    def _show(self, pause: float, last: bool) -> None:
        now = self._clock()
        if self._quiet:
            return
        if self._terminal:
            if last or now - self._shown >= pause:
                self._shown = now
                self._draw()
        elif not last and now - self._shown >= HEARTBEAT_SECONDS:
            self._shown = now
            self._write(f"{self._label}: {self._done} of {self._total} ({self._percent()}), {self._times()}\n")

    def _percent(self) -> str:
        return f"{100 * min(self._done / self._total, 1.0):.0f} %" if self._total else "100 %"

    def _times(self) -> str:
        elapsed = self._clock() - self._began
        if not self._done or self._done >= self._total:
            return duration(elapsed)
        return f"{duration(elapsed)}, about {duration(elapsed / self._done * (self._total - self._done))} left"

    def _draw(self) -> None:
        text = f"{self._label} {self._percent()} {self._done}/{self._total} {self._times()}"
        width = _columns(self._stream) - 1
        room = min(30, width - len(text) - 3)
        share = min(self._done / self._total, 1.0) if self._total else 1.0
        bar = f"[{'#' * int(share * room):<{room}}] " if room >= 5 else ""
        self._write("\r" + (bar + text)[:width].ljust(width))

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


class Phases:
    """One progress display after another, as work goes from phase to phase.

    Args:
        opening: a line that is shown before the first, if any.
        quiet_seconds: see `ProgressBar`.
    """

    def __init__(self, opening: str | None = None, quiet_seconds: float = 0.0) -> None:
        self._opening, self._quiet_seconds = opening, quiet_seconds
        self._label: str | None = None
        self._done = 0
        self._display: ProgressBar | None = None

    def __enter__(self) -> "Phases":
        return self

    def __exit__(self, *error: object) -> None:
        if self._display is not None:
            self._display.__exit__(*error)

    def report(self, phase: str, done: int, total: int) -> None:
        """Show that `done` of `total` have passed `phase`."""
        if phase != self._label or self._display is None:
            self.__exit__(None, None, None)
            if self._label is None and self._opening is not None:
                print(self._opening, file=sys.stderr, flush=True)
            self._label, self._done = phase, 0
            self._display = ProgressBar(total, phase, quiet_seconds=self._quiet_seconds).__enter__()
        self._display.advance(done - self._done)
        self._done = done


def _columns(stream: TextIO) -> int:
    """Width of the stream's own terminal: standard output may well go to a file while this is shown."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):  # io.UnsupportedOperation is both
        return 80
