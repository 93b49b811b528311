"""Follow an optimizer that was made after the recording began."""

from typing import Any

from groktrace.recording.capture import Capture
from groktrace.recording.hooks import updates_made
from groktrace.recording.prepare import describe_optimizer
from groktrace.recording.writer import Writer


def follow_optimizer(optimizer: Any, capture: Capture, writer: Writer | None, steps: int, earlier: bool) -> str | None:
    """Have snapshots and run.json follow what an optimizer trains.

    Args:
        optimizer: one that takes hooks.
        capture: copies the weights.
        writer: writes run.json; None in processes that do not write.
        steps: updates counted so far.
        earlier: whether any were, or another optimizer's would have been.

    Returns:
        A warning, or None.

    Raises:
        SettingsError: what the optimizer holds cannot be told apart from the rest.
    """
    still = capture.attach(optimizer, earlier)
    if writer is not None:
        writer.mark_optimizer(describe_optimizer(optimizer), still)
    made = updates_made(optimizer)
    if made > steps:
        return (
            f"recorder.attach(): the optimizer has made {made} updates already, and {steps} are counted; attach it "
            f"before the first, or to continue a training pass start_step={made} to watch()."
        )
    if writer is not None and not earlier and not capture.sharded and capture.moved():
        return (
            f"recorder.attach(): the weights have changed since watch(), whose snapshot of step {steps} holds the "
            "earlier ones; call watch() after they are initialised or loaded."
        )
    return None
