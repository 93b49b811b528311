import io
import os
import threading

import pytest

from groktrace.reporting import progress as module
from groktrace.reporting.progress import ProgressBar


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def fileno(self):
        return 7


@pytest.fixture
def columns(monkeypatch):
    """Sets the width of terminals."""

    def put(width):
        monkeypatch.setattr(os, "get_terminal_size", lambda fd: os.terminal_size((width, 24)))

    return put


def test_a_bar_on_a_terminal(columns):
    columns(60)
    now = [0.0]
    stream = Terminal()
    with ProgressBar(4, "sampling", stream, lambda: now[0]) as progress:
        for _ in range(4):
            now[0] += 10
            progress.advance()
    frames = stream.getvalue().split("\r")
    assert all(len(frame.rstrip("\n")) == 59 for frame in frames[1:])
    assert frames[2].startswith("[###")
    assert "sampling 25 % 1/4 10 s, about 30 s left" in frames[2]
    assert "sampling 100 % 4/4 40 s" in frames[-1]
    assert stream.getvalue().endswith("\n")


def test_narrow_terminals_get_no_wrapped_lines(columns):
    columns(20)
    stream = Terminal()
    with ProgressBar(4, "sampling", stream) as progress:
        progress.advance(4)
    assert all(len(frame.rstrip("\n")) <= 19 for frame in stream.getvalue().split("\r"))


def test_terminals_of_unknown_width_are_taken_for_80_columns(monkeypatch):
    def fail(fd):
        raise OSError

    monkeypatch.setattr(os, "get_terminal_size", fail)
    stream = Terminal()
    with ProgressBar(0, "sampling", stream):
        pass
    assert {len(frame.rstrip("\n")) for frame in stream.getvalue().split("\r")[1:]} == {79}


def test_elsewhere_one_line_in_thirty_seconds():
    now = [0.0]
    stream = io.StringIO()
    with ProgressBar(100, "sampling", stream, lambda: now[0]) as progress:
        for _ in range(100):
            now[0] += 1
            progress.advance()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "sampling: 30 of 100 (30 %), 30 s, about 1 min 10 s left"
    assert len(lines) == 4
    assert lines[-1] == "sampling: 100 done in 1 min 40 s"


def test_work_that_stalls_still_gives_signs_of_life(monkeypatch):
    monkeypatch.setattr(module, "TICK_SECONDS", 0.001)
    now = [0.0]
    written = threading.Event()

    class Stream(io.StringIO):
        def flush(self):
            written.set()

    stream = Stream()
    with ProgressBar(2, "sampling", stream, lambda: now[0]):
        now[0] = 31.0
        assert written.wait(10)
    assert stream.getvalue().splitlines() == ["sampling: 0 of 2 (0 %), 31 s", "sampling: 0 of 2 done in 31 s"]
    assert not any(thread.name == "groktrace-progress" for thread in threading.enumerate())


@pytest.mark.parametrize(("seconds", "frames", "lines"), [(1.9, 0, 0), (2.1, 2, 0), (31.0, 2, 2)])
def test_of_short_work_nothing_is_shown_where_that_is_asked_for(columns, seconds, frames, lines):
    columns(60)
    for stream, expected in ((Terminal(), frames), (io.StringIO(), lines)):
        now = [0.0]
        with ProgressBar(2, "sampling", stream, lambda now=now: now[0], quiet_seconds=2.0) as progress:
            now[0] = seconds
            progress.advance()
        assert stream.getvalue().count("sampling") == expected


def test_a_notebook_has_a_bar(columns):
    columns(60)
    kernel = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream", "fileno": lambda self: 7})
    stream = kernel()
    with ProgressBar(2, "sampling", stream):
        pass
    assert stream.getvalue().startswith("\r[")


def test_interrupted_work_is_not_called_done():
    stream = io.StringIO()
    try:
        with ProgressBar(3, "sampling", stream) as progress:
            progress.advance()
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert stream.getvalue() == ""
