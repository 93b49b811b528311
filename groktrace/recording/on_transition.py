"""What a script does about transitions of its own training, which another process looks for meanwhile."""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from groktrace.errors import SettingsError
from groktrace.recording.warn import WarnOnce
from groktrace.run.remote import is_url

Callback = Callable[[Any, Any], object]


def check_callback(callback: Any, run: Path | str) -> None:
    """Refuse what cannot be called, and runs that no other process of this machine can read.

    Raises:
        SettingsError: it is so.
    """
    if not callable(callback):
        raise SettingsError(f"on_transition: expected a function of two arguments, got {callback!r}.")
    if is_url(run):
        raise SettingsError(f"on_transition: '{run}' is a URL; record into a folder, or use groktrace.follow instead.")


def follower_command(run: Path) -> list[str]:
    """What starts the process that follows a recording, with the modules of this one, wherever it runs.

    Args:
        run: the run directory.
    """
    program = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from groktrace.analysis.background import main"
    return [sys.executable, "-c", f"{program}; main()", json.dumps([*map(str, sys.path)]), str(run.absolute())]


class TransitionCallback:
    """The process that follows a recording, and the callback that is told what it finds, in the thread that trains.

    Args:
        callback: called with an `Announcement` or `EarlyWarning`, and the trajectory so far.
        run: the run directory.
    """

    def __init__(self, callback: Callback, run: Path | str) -> None:
        self._callback, self._run, self._warn_once = callback, Path(run), WarnOnce()
        self._process: subprocess.Popen[bytes] | None = None
        self._news: deque[tuple[Any, Any]] = deque()  # announcement, trajectory
        self._changed = threading.Condition()
        self._asked = self._answered = 0
        self._ended: str | None = None  # why nothing more will come
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command, pipe, nowhere = follower_command(self._run), subprocess.PIPE, subprocess.DEVNULL
        try:
            self._process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=nowhere, env=environment, start_new_session=True
            )  # Ctrl-C is for the training, with which this one ends
        except OSError as failure:
            self._ended = f"{type(failure).__name__}: {failure}"
            return
        threading.Thread(target=self._listen, name="groktrace on_transition", daemon=True).start()

    def deliver(self) -> None:
        """Call back with what is new; warn once where the callback fails, or where nothing more will come."""
        while self._news:
            try:
                self._callback(*self._news.popleft())
            except Exception as failure:
                reason = f"{type(failure).__name__}: {failure}"
                self._warn_once("on_transition", f"on_transition failed ({reason}); training goes on.")
        if self._ended is not None:
            self._warn_once("follower", f"no more transitions will be told ({self._ended}); training goes on.")

    def catch_up(self) -> None:
        """Wait until all that is on disk has been analysed, then call back with what is new."""
        with self._changed:
            self._asked += 1
            self._wake()
            self._changed.wait_for(lambda: self._answered >= self._asked or self._ended is not None)
        self.deliver()

    def close(self) -> None:
        """End the other process; what it measured is kept in the run."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(OSError):
                    stream.close()  # type: ignore[union-attr]
            self._process = None

    def _wake(self) -> None:
        """Have the other process look for snapshots now; it counts how often it was asked to."""
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):  # it has ended, and the thread that listens says why
                self._process.stdin.write(b"\n")
                self._process.stdin.flush()

    def _listen(self) -> None:
        """Take what comes until the other process ends."""
        process, why = self._process, None
        if process is None or process.stdout is None:
            return
        try:
            from groktrace.analysis.background import read_message

            for line in process.stdout:
                message = read_message(line)
                with self._changed:
                    self._news.extend((announcement, message.trajectory) for announcement in message.announcements)
                    self._answered = max(self._answered, message.answered)
                    self._changed.notify_all()
                why = message.ended or why
        except Exception as failure:  # whatever it is, nobody may wait for more
            why = f"{type(failure).__name__}: {failure}"
        with self._changed:
            self._ended = why or "its process has ended"
            self._changed.notify_all()
