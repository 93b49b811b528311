"""A recording that another process makes, followed in this one: what `watch(on_transition=...)` starts."""

import json
import os
import queue
import sys
import threading
from dataclasses import dataclass
from typing import BinaryIO

import torch

from groktrace.analysis.detection import EarlyWarning
from groktrace.analysis.follow import POLL_SECONDS, Announcement, follow
from groktrace.analysis.results.trajectory import Trajectory
from groktrace.records import Record


@dataclass(frozen=True)
class Message(Record):
    """What the process that follows tells the one that trains, a line of JSON.

    Attributes:
        announcements: what is announced.
        trajectory: in which it was found.
        answered: the bytes read by the time that all snapshots then there are analysed.
        ended: why nothing more will come.
    """

    announcements: tuple[Announcement | EarlyWarning, ...] = ()
    trajectory: Trajectory | None = None
    answered: int = 0
    ended: str | None = None


def read_message(line: bytes) -> Message:
    """The message of a line.

    Args:
        line: of JSON.

    Raises:
        ValueError: it is none.
    """
    return Message.from_dict(json.loads(line))


def main() -> None:
    """Follow the run that the last argument names, until standard input ends; write to standard output what is new.

    Each byte read asks to look for snapshots at once. What is written are messages, see `Message`.
    """
    torch.set_num_threads(1)
    if hasattr(os, "nice"):
        os.nice(19)  # the training goes first
    stream = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a loss may print is no message
    asked: queue.SimpleQueue[None] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(sys.stdin.buffer, asked), daemon=True).start()
    heard = answered = 0

    def send(message: Message) -> None:
        stream.write(json.dumps(message.to_dict(), allow_nan=False).encode() + b"\n")
        stream.flush()

    def idle() -> None:
        nonlocal heard, answered
        if heard > answered:
            send(Message(answered=heard))
            answered = heard
        try:
            asked.get(timeout=POLL_SECONDS)
            heard += 1
        except queue.Empty:
            pass

    new: list[Announcement | EarlyWarning] = []
    try:
        for event in follow(sys.argv[-1], device="cpu", idle=idle):
            if isinstance(event, Announcement | EarlyWarning):
                new.append(event)
            elif isinstance(event, Trajectory) and new:
                send(Message(tuple(new), event))
                new = []
        send(Message(ended="the recording is closed"))
    except BrokenPipeError:
        pass
    except Exception as failure:
        send(Message(ended=f"{type(failure).__name__}: {failure}"))


def _listen(stream: BinaryIO, asked: "queue.SimpleQueue[None]") -> None:
    """Take requests; without the process that trains there is nobody to tell."""
    while stream.read(1):
        asked.put(None)
    os._exit(0)
