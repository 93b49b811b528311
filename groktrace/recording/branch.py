"""Whether a training that goes on with a recording is the one that was recorded."""

from collections.abc import Callable
from pathlib import Path

from groktrace.errors import GroktraceError
from groktrace.recording.capture import Capture
from groktrace.run import files, layout

# By how much the weights of another training differ, relative to their norm: steps that are done again differ by the
# rounding of sums on a GPU.
_ANOTHER = 1e-3


def report_another_branch(
    path: Path, capture: Capture | None, warn_first: Callable[[str, str], bool], mark: Callable[[str], None]
) -> None:
    """Warn of weights that are others than those recorded of the same step, and have that kept with the run.

    Args:
        path: see `another_branch`.
        capture: the same.
        warn_first: takes a kind of warning and its text; whether it is the first of its kind.
        mark: takes a text that the analysis repeats.
    """
    said = another_branch(path, capture)
    if said and warn_first("branch", f"step {layout.snapshot_step(path.name)}: {said}"):
        mark(said)


def another_branch(path: Path, capture: Capture | None) -> str:
    """What is to be said of weights that are others than those recorded of the same step; empty where they are not.

    Args:
        path: of the snapshot; of one that cannot be read nothing is said.
        capture: of the tensors as they are now; what the snapshot lacks does not count, and of sharded ones there are
            parts only, of which nothing is said.
    """
    if capture is None or capture.sharded:
        return ""
    tensors = capture.current()
    try:
        known, _ = files.read_tensors(path)
    except (GroktraceError, OSError):
        return ""
    off = whole = 0.0
    for name in known.keys() & tensors.keys():
        there, here = known[name], tensors[name].detach().cpu()
        if there.shape == here.shape and (there.is_floating_point() or there.is_complex()):
            off += float((here - there).abs().double().square().sum())
            whole += float(there.abs().double().square().sum())
    if not off > _ANOTHER**2 * whole:
        return ""
    return (
        "recorded already, with other weights: this training is another one, or has gone another way since the step "
        "from which it continues. What is there stays, so that the run holds snapshots of both. To keep them apart, "
        "begin again with another out=, or remove the later snapshots first."
    )
