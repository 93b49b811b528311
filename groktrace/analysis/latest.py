"""Which of a run's results was finished last: noted by name, as a copy of the run has other times."""

from pathlib import Path
from typing import Any

from groktrace.analysis.identity import recorded_parts
from groktrace.analysis.trajectory import Trajectory
from groktrace.errors import RunError, SnapshotError
from groktrace.run import layout
from groktrace.run.files import read_json, write_json
from groktrace.run.store import Run

TRAJECTORY_FILE = "trajectory.json"
LATEST_FILE = "latest.json"
# What results that are shown must have been measured with.
_PARTS = (layout.DATA_FILE, layout.FROZEN_FILE)


def note_latest(run: Run, folder: Path, step: int | None, fingerprint: str | None) -> None:
    """Note that the trajectory in a folder was finished last, and of which recording it is.

    Args:
        run: analysed.
        folder: of the results.
        step: of the last snapshot that it holds; None where it holds none.
        fingerprint: of that snapshot.
    """
    path = folder.parent / LATEST_FILE
    parts = {name: part for name, part in recorded_parts(run).items() if name in _PARTS}
    began = run.info.get("created")
    write_json(
        path, {"folder": folder.name, "created": began, "recorded": parts, "step": step, "snapshot": fingerprint}
    )
    run.publish(path)


def latest_trajectory(run: Run) -> Trajectory:
    """The trajectory that was finished last in a run directory, which may be partial.

    Args:
        run: opened.

    Raises:
        RunError: there is none, or it is of another recording than the one that is there now.
    """
    return Trajectory.load(latest_file(run))


def latest_file(run: Run) -> Path:
    """Where that trajectory lies; arguments and errors as those of `latest_trajectory`."""
    folder = run.root / layout.ANALYSIS_FOLDER
    found = list(folder.glob(f"*/{TRAJECTORY_FILE}"))
    if not found:
        raise RunError(f"{run.name}: not analysed yet; run 'groktrace analyze {run.name}' first.")
    noted = folder / LATEST_FILE
    if noted.exists():
        kept = read_json(noted)
        try:
            named = [path for path in found if path.parent.name == kept["folder"]]
            same = not named or _of_this_recording(run, kept)
        except (KeyError, TypeError, AttributeError) as failure:
            raise RunError(f"{noted}: damaged ({failure}); remove it, or analyse again.") from failure
        if not same:
            raise RunError(
                f"{run.name}: its results are of another recording, or of other data, than are there now; "
                f"run 'groktrace analyze {run.name}' again."
            )
        if named:
            return named[0]
    return max(found, key=lambda path: path.stat().st_mtime_ns)


def _of_this_recording(run: Run, kept: dict[str, Any]) -> bool:
    """Whether recording, data and last snapshot are still those that were analysed, as far as they are here."""
    if kept["created"] != run.info.get("created"):
        return False
    parts = recorded_parts(run)
    if any(name in parts and parts[name] != kept["recorded"].get(name, parts[name]) for name in _PARTS):
        return False
    last = next((each for each in run.snapshots if each.step == kept["step"]), None)
    if last is None or run.remote is not None:  # of a remote run, it would have to be fetched
        return True
    try:
        return last.fingerprint() == kept["snapshot"]
    except SnapshotError:
        return True
