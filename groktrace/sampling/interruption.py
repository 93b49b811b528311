"""What has long computations give up: Ctrl-C in another thread, or that their time is up."""

import contextlib
import math
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar

# Set to have all threads give up what they are at.
interruption = threading.Event()
_deadline = ContextVar("deadline", default=math.inf)


class TimeUpError(InterruptedError):
    """Something was given up as its time was up."""


@contextlib.contextmanager
def give_up_at(deadline: float) -> Iterator[None]:
    """Have this thread give up, with a TimeUpError, whatever it is at when the time is up; no number depends on it.

    Args:
        deadline: of `time.monotonic`.
    """
    token = _deadline.set(deadline)
    try:
        yield
    finally:
        _deadline.reset(token)


def check_interruption() -> None:
    """Called between the steps of whatever takes long.

    Raises:
        InterruptedError: it is to be given up.
    """
    if interruption.is_set():
        raise InterruptedError
    if time.monotonic() > _deadline.get():
        raise TimeUpError
