"""Where the results of analyses lie in a run directory, and which of them was finished last."""

import contextlib
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from groktrace.analysis.results.identity import Identity, recorded_parts
from groktrace.analysis.results.journal import read_lines
from groktrace.analysis.results.trajectory import Trajectory
from groktrace.errors import RunError, SnapshotError
from groktrace.records import read_record
from groktrace.run import layout
from groktrace.run.files import read_json, write_file, write_json
from groktrace.run.store import Run
from groktrace.sampling.calibration import Scale
from groktrace.sampling.settings import ResolvedSettings

SETTINGS_FILE = "settings.json"
POINTS_FILE = "points.jsonl"
HESSIAN_FILE = "hessian.jsonl"
REFERENCE_FILE = "reference.jsonl"
TRAJECTORY_FILE = "trajectory.json"
LATEST_FILE = "latest.json"
# Goes up when the same settings come to give other numbers, which must not end up beside the older ones.
_ESTIMATOR = 23
# What results that are shown must have been measured with.
_PARTS = (layout.DATA_FILE, layout.FROZEN_FILE)


def results_folder(run: Run, settings: ResolvedSettings, identity: Identity) -> Path:
    """Where results lie: the method, and a digest of everything that they depend on but the snapshots.

    Args:
        run: analysed.
        settings: of the sampling.
        identity: of what is analysed.
    """
    digest = _digest([layout.FORMAT_VERSION, _ESTIMATOR, settings.to_dict(), identity.key])
    return run.root / layout.ANALYSIS_FOLDER / f"{settings.kernel.name}-{digest}"


def metrics_file(seed: int, identity: Identity) -> str:
    """Where losses and curvatures lie: they depend on few of the settings.

    Args:
        seed: of the sampling.
        identity: of what is analysed.
    """
    return f"metrics-{_digest([layout.FORMAT_VERSION, _ESTIMATOR, seed, identity.key])}.jsonl"


def take_metrics(path: Path) -> None:
    """Begin with the losses and curvatures that analyses at other settings measured, where nothing is there yet.

    Args:
        path: of the journal.
    """
    found = sorted(path.parent.parent.glob(f"*/{path.name}"), key=lambda path: (path.stat().st_size, path))
    if found and not path.exists():
        write_file(path, found[-1].read_bytes())


def check_positive(scale: Scale | None) -> Scale | None:
    """Refuse a scale with numbers that are not positive.

    Raises:
        ValueError: it has one.
    """
    if scale is not None and any(number is not None and number <= 0 for number in scale):
        raise ValueError(f"expected positive numbers, got {scale}")
    return scale


@dataclass(frozen=True)
class KeptSettings:
    """What settings.json keeps.

    Attributes:
        requested: the settings, but for a method and a number of chains that were chosen already.
        chosen: nβ, γ, samples and batches of all snapshots.
    """

    requested: dict[str, Any]
    chosen: Annotated[Scale, check_positive]

    def save(self, folder: Path) -> Path:
        """Write the file; returns its path.

        Args:
            folder: of the results.
        """
        write_json(folder / SETTINGS_FILE, {"requested": self.requested, "chosen": self.chosen._asdict()})
        return folder / SETTINGS_FILE


def kept_scale(folder: Path) -> Scale | None:
    """nβ and γ that an analysis chose before; None where none were.

    Args:
        folder: of its results.

    Raises:
        RunError: the file that keeps them is damaged.
    """
    path = folder / SETTINGS_FILE
    if not path.exists():
        return None
    value = read_json(path)
    try:
        return read_record(KeptSettings, value).chosen
    except ValueError as failure:
        raise RunError(f"{path}: damaged ({failure}); remove the folder {folder} and analyse again.") from failure


@dataclass(frozen=True)
class _Latest:
    """What was finished last.

    Attributes:
        folder: of its results.
        created: when the recording began.
        recorded: digests of the files that the results were measured with.
        step, snapshot: training step and fingerprint of the last snapshot; None where there is none.
    """

    folder: str
    created: Any
    recorded: dict[str, str]
    step: int | None
    snapshot: str | None

    def is_of(self, run: Run) -> bool:
        """Whether recording, data and last snapshot are still those that were analysed, as far as they are here."""
        if self.created != run.info.get("created"):
            return False
        parts = recorded_parts(run)
        if any(name in parts and parts[name] != self.recorded.get(name, parts[name]) for name in _PARTS):
            return False
        last = next((snapshot for snapshot in run.snapshots if snapshot.step == self.step), None)
        if last is None or run.remote is not None:  # of a remote run, it would have to be fetched
            return True
        try:
            return last.fingerprint() == self.snapshot
        except SnapshotError:
            return True


def note_latest(run: Run, folder: Path, step: int | None, fingerprint: str | None) -> None:
    """Note that the trajectory in a folder was finished last, by name, as a copy of the run has other times.

    Args:
        run: analysed.
        folder: of the results.
        step: of the last snapshot that it holds; None where it holds none.
        fingerprint: of that snapshot.
    """
    path = folder.parent / LATEST_FILE
    parts = {name: part for name, part in recorded_parts(run).items() if name in _PARTS}
    write_json(path, asdict(_Latest(folder.name, run.info.get("created"), parts, step, fingerprint)))
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
        value = read_json(noted)
        try:
            latest = read_record(_Latest, value)
        except ValueError as failure:
            raise RunError(f"{noted}: damaged ({failure}); remove it, or analyse again.") from failure
        named = [path for path in found if path.parent.name == latest.folder]
        if named and not latest.is_of(run):
            raise RunError(
                f"{run.name}: its results are of another recording, or of other data, than are there now; "
                f"run 'groktrace analyze {run.name}' again."
            )
        if named:
            return named[0]
    return max(found, key=lambda path: path.stat().st_mtime_ns)


def files_place(run: Run, trajectory: Trajectory) -> Path:
    """The folder for files that show a trajectory: the run's, or that of its results where it is on other data.

    Args:
        run: analysed.
        trajectory: that was finished last.
    """
    return run.root if trajectory.data is None else latest_file(run).parent


def all_results(run: Run) -> list[tuple[Path, Trajectory, dict[str, Any]]]:
    """All results of a run whose snapshots are still there: folder, trajectory, and the settings that were requested.

    Args:
        run: opened.

    Raises:
        RunError: there are none, or a file is damaged.
    """
    found = []
    for path in sorted((run.root / layout.ANALYSIS_FOLDER).glob(f"*/{TRAJECTORY_FILE}")):
        trajectory = Trajectory.load(path)
        steps = {point.step for point in trajectory.points}
        known = {record.get("snapshot") for record in read_lines(path.parent / POINTS_FILE)}
        shown = [snapshot for snapshot in run.snapshots if snapshot.step in steps][-1:]
        with contextlib.suppress(SnapshotError):
            if all(run.remote is not None or snapshot.fingerprint() in known for snapshot in shown):
                settings = read_json(path.parent / SETTINGS_FILE)
                requested = settings.get("requested") if isinstance(settings, dict) else None
                found.append((path.parent, trajectory, requested if isinstance(requested, dict) else {}))
    if not found:
        raise RunError(f"{run.name}: not analysed yet; run 'groktrace analyze {run.name}' first.")
    return found


def _digest(content: list[Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
