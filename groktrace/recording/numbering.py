"""Whether the steps of a recording are numbered as those of the training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from groktrace.recording.count import UpdateCount
from groktrace.recording.hooks import updates_made


def begins_again(step: int, earlier: Path | str, place: Path | str) -> str:
    """A warning that a training which seems to go on is numbered from 0.

    Args:
        step: whose weights it begins with.
        earlier: the run that holds them.
        place: where it is recorded.
    """
    return (
        f"watch: these are the weights of step {step} of the run in '{earlier}', but nothing tells how many updates "
        f"were made, so that this recording begins at 0, in '{place}'; pass start_step={step} to go on with that run."
    )


def report_twice(doubt: Callable[[str, str], None], first: Any, second: Any) -> None:
    """Tell that two optimizers step in one iteration of the script's loop, and that both of these steps are counted.

    Args:
        doubt: takes a kind of warning and its text.
        first: the one that has stepped.
        second: the one that is about to.
    """
    # Counting the pair once would have a snapshot hold the weights between their steps: that of the first is written
    # before it shows that the second steps too.
    doubt(
        "twice",
        f"{type(first).__name__} and {type(second).__name__} step one behind the other with the same gradient, and the "
        "steps of both are counted, so that such an iteration of the loop is two steps. For it to be one, leave "
        "optimizer out and call recorder.step() once per iteration.",
    )


class OwnCount:
    """Compares what an optimizer's own state says of its updates with the recording's count, as the first begins.

    Args:
        optimizer: the counted one.
        count: the recording's.
        doubt: takes a kind of warning and its text.
        begin: called whenever an update begins.
    """

    def __init__(
        self, optimizer: Any, count: UpdateCount, doubt: Callable[[str, str], None], begin: Callable[[], None]
    ) -> None:
        self._count, self._doubt, self._begin = count, doubt, begin
        self._made = updates_made(optimizer)
        # Where the two differ from the start, the user has said so (start_step), or is told otherwise (attach).
        self._optimizer = optimizer if self._made == count.counted else None

    def begin(self) -> None:
        """Begin an update."""
        if self._optimizer is not None:
            optimizer, self._optimizer = self._optimizer, None
            self._compare(optimizer)
        self._begin()

    def _compare(self, optimizer: Any) -> None:
        """Tell where the optimizer's own count has changed before its first step: then its state was loaded."""
        try:
            if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
                return  # reading a count on the GPU would spoil the graph
            made, counted = updates_made(optimizer), self._count.counted
        except Exception:  # a state of another kind, of which nothing is said
            return
        # One without a count of its own, such as SGD, says 0 before and after.
        if made not in (self._made, counted):
            self._doubt(
                "loaded",
                f"the optimizer has made {made} updates, and this recording counts {counted}: it was loaded after "
                f"watch(); call watch() after loading model and optimizer, or pass start_step={made}.",
            )
