"""A recording that another process makes, followed in this one: what `watch(on_transition=...)` starts."""

import os
import pickle
import queue
import sys
import threading
from typing import BinaryIO

import torch

from groktrace.analysis.detection import EarlyWarning
from groktrace.analysis.follow import POLL_SECONDS, Announcement, follow
from groktrace.analysis.trajectory import Trajectory


def main() -> None:
    """Follow the run that the last argument names, until standard input ends; write to standard output what is new.

    Each byte read asks to look for snapshots at once. What is written are pickled pairs: "news" with (news, trajectory)
    pairs, pickled; "answered" with the number of bytes read, once all snapshots are analysed that were
    there when the last of them came; "ended" with the reason.
    """
    torch.set_num_threads(1)
    if hasattr(os, "nice"):
        os.nice(19)  # the training goes first
    stream = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a loss may print is no message
    asked: queue.SimpleQueue[None] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(sys.stdin.buffer, asked), daemon=True).start()
    heard = answered = 0

    def send(kind: str, content: object) -> None:
        pickle.dump((kind, content), stream)
        stream.flush()

    def idle() -> None:
        nonlocal heard, answered
        if heard > answered:
            send("answered", heard)
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
                send("news", pickle.dumps([(news, event) for news in new]))
                new = []
        send("ended", "the recording is closed")
    except BrokenPipeError:
        pass
    except Exception as failure:
        send("ended", f"{type(failure).__name__}: {failure}")


def _listen(stream: BinaryIO, asked: "queue.SimpleQueue[None]") -> None:
    """Take requests; without the process that trains there is nobody to tell."""
    while stream.read(1):
        asked.put(None)
    os._exit(0)
