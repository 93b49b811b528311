"""Close open recordings at exit, and on SIGTERM, with which schedulers end a job."""

import atexit
import os
import signal
import threading
from types import FrameType
from typing import Any

open_recorders: list[Any] = []  # of Recorder


def catch_termination() -> None:
    """Have SIGTERM close recordings first; a handler of the script's own stays."""
    if _is_main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)


def restore_termination() -> None:
    """Restore SIGTERM once no recording is open."""
    if _is_main_thread() and not open_recorders and signal.getsignal(signal.SIGTERM) is _terminate:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()  # no other may set handlers


def _terminate(number: int, frame: FrameType | None) -> None:
    """Close open recordings, then end the process as the signal would; a second signal ends it at once."""
    signal.signal(number, signal.SIG_DFL)
    try:
        for recorder in list(open_recorders):
            recorder.close_on_signal()
    finally:
        os.kill(os.getpid(), number)


@atexit.register
def close_all() -> None:
    """Close what the script has not closed."""
    for recorder in list(open_recorders):
        recorder.close_locally()
