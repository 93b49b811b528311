"""λ̂ along a training run."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from groktrace.analysis.measurement.llc import NOT_THE_BASIN, OFF_MINIMUM, PERHAPS_OFF
from groktrace.analysis.measurement.reference import Reference
from groktrace.errors import GroktraceError, RunError, SettingsError
from groktrace.records import Record, between, read_record
from groktrace.run.files import read_json, write_json
from groktrace.run.layout import Step

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

    from groktrace.analysis.detection import Detector

Error = Annotated[float, between(0)]  # a standard error


@dataclass(frozen=True)
class Point(Record):
    """One snapshot of a trajectory; what is not known is None.

    Attributes:
        step: optimizer updates before the snapshot.
        llc, stderr, llc_centred, stderr_centred, reliable, reasons: see `LLCEstimate`.
        train_loss, val_loss: mean loss over the stored training and validation samples.
        train_accuracy, val_accuracy: fraction of right predictions there. Where there are no validation samples, both
            are what the training script logged, if it did.
        metrics: what the training script logged.
        diagnostics: see `LLCEstimate`.
        hessian_trace, hessian_trace_stderr, hessian_top: see `HessianMetrics`; where they were asked for.
    """

    step: Step
    llc: float | None
    stderr: Error | None
    llc_centred: float | None = None
    stderr_centred: Error | None = None
    reliable: bool = True
    reasons: tuple[str, ...] = ()
    train_loss: float | None = None
    train_accuracy: float | None = None
    val_loss: float | None = None
    val_accuracy: float | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)
    diagnostics: dict[str, float | None] = field(default_factory=dict)
    hessian_trace: float | None = None
    hessian_trace_stderr: Error | None = None
    hessian_top: float | None = None

    @classmethod
    def from_dict(cls, value: Any) -> "Point":
        """The inverse of `to_dict`.

        Raises:
            ValueError: a key is missing, unknown, or of the wrong kind.
        """
        if isinstance(value, dict) and not {"reliable", "reasons"} <= value.keys():
            raise ValueError("does not say whether it is reliable")
        return read_record(cls, value)


def with_logged(point: Point, metrics: dict[str, float]) -> Point:
    """A point with what the training script logged for it; validation that was not measured is taken from there.

    Args:
        point: measured.
        metrics: logged for the same snapshot.
    """

    def logged(*names: str) -> float | None:
        for name, value in metrics.items():
            first, _, rest = name.lower().replace("/", "_").partition("_")
            if first in ("val", "valid", "validation", "eval") and rest in names and math.isfinite(value):
                return value
        return None

    loss, accuracy = point.val_loss, point.val_accuracy
    if loss is None and accuracy is None:  # of the same samples, or none
        loss, accuracy = logged("loss"), logged("accuracy", "acc")
        if accuracy is not None and not 0 <= accuracy <= 1:  # in percent, or something else
            accuracy = None
    return replace(point, metrics={**metrics}, val_loss=loss, val_accuracy=accuracy)


_ERROR_OF = {"llc": "stderr", "llc_centred": "stderr_centred"}


# What the curves are called in text.
SYMBOLS = {"llc": "λ̂", "llc_centred": "λ_c"}


@dataclass(frozen=True, eq=False)
class Curve:
    """λ against the step: what transitions are looked for on, and what is shown.

    Attributes:
        name: "llc_centred" where every point has λ_c, which holds off a minimum too; else "llc".
        value, error: λ and its standard error, [T]; NaN at points that are not used.
        doubtful: where something speaks against λ, [T]; being off a minimum does not speak against λ_c.
        sound: where λ is measured in the snapshot's own basin, [T], if not as well as was asked for.
    """

    name: str
    value: np.ndarray
    error: np.ndarray
    doubtful: np.ndarray
    sound: np.ndarray

    @property
    def symbol(self) -> str:
        """What λ is called."""
        return SYMBOLS[self.name]


@dataclass(frozen=True)
class OtherSamples(Record):
    """What a trajectory was measured on, where not on the run's own training samples.

    Attributes:
        name: of the file; None of data given in Python.
        digest: of the samples.
        own_scale: whether nβ and γ are those of the run's own analysis, with which λ then compares; None where both
            were given.
    """

    name: str | None
    digest: str
    own_scale: bool | None

    def __str__(self) -> str:
        return self.name or f"other data ({self.digest[:6]})"


@dataclass(frozen=True)
class Trajectory(Record):
    """λ̂ against the training step, all at one (nβ, γ) or at one resolution.

    Attributes:
        points: in step order.
        n: number of training samples; None if unknown.
        nbeta, localization: nβ and γ of all points; nβ is None where it follows each snapshot's curvature, and then
            stands among each point's diagnostics.
        resolution, locality: the dials they came from; None where they were given as numbers.
        method: name of the sampler; None for curves measured elsewhere.
        run: where the snapshots lie.
        unreadable: snapshots that were left out, each as one line that names the file and the reason.
        reference: a value of λ to hold the trajectory against; None where none was asked for.
        weight_decay: whether training decayed the weights; None if unknown.
        unsampled: snapshots that are still to be sampled; the trajectory is partial where there are any.
        data: what λ and the training loss are of, in place of the run's own training samples; None for these.
    """

    points: tuple[Point, ...]
    n: int | None = None
    nbeta: float | None = None
    localization: float | None = None
    resolution: float | None = None
    locality: float | None = None
    method: str | None = None
    run: str | None = None
    unreadable: tuple[str, ...] = ()
    reference: Reference | None = None
    weight_decay: bool | None = None
    unsampled: Annotated[int, between(0)] = 0
    data: OtherSamples | None = None

    @property
    def follows_curvature(self) -> bool:
        """Whether each point was measured at an nβ of its own, so that resolution is the same at all."""
        return self.nbeta is None and self.resolution is not None

    @property
    def curve(self) -> Curve:
        """The curve that says where the network changes phase."""
        own = [frozenset(point.reasons) for point in self.points]
        doubtful = np.array([bool(reasons - {OFF_MINIMUM}) for reasons in own], dtype=bool)
        elsewhere = np.array(
            [any(reason.startswith(NOT_THE_BASIN) for reason in reasons) for reasons in own], dtype=bool
        )
        reliable = self.column("reliable") > 0
        usable = np.isfinite(self.column("llc"))
        name = "llc_centred"
        if not usable.any() or not np.isfinite(self.column(name)[usable]).all():
            name = "llc"
            # λ̂ off a minimum measures the slope, not the basin, whatever else is wrong with it.
            off = np.array([bool(reasons & {OFF_MINIMUM, PERHAPS_OFF}) for reasons in own], dtype=bool)
            usable &= reliable | (doubtful & ~off)
        value, error = self.column(name), self.column(_ERROR_OF[name])
        usable &= np.isfinite(value) & np.isfinite(error)
        value, error = (np.where(usable, column, np.nan) for column in (value, error))
        return Curve(name, value, error, doubtful, usable & ~elsewhere)

    @classmethod
    def from_arrays(
        cls,
        steps: Sequence[int],
        llc: Sequence[float],
        stderr: Sequence[float],
        *,
        n: int | None = None,
        train_loss: Sequence[float] | None = None,
        train_accuracy: Sequence[float] | None = None,
        val_loss: Sequence[float] | None = None,
        val_accuracy: Sequence[float] | None = None,
        reliable: Sequence[bool] | None = None,
    ) -> "Trajectory":
        """A trajectory from curves measured elsewhere.

        Args:
            steps: training steps, ascending, [T].
            llc: λ̂ at each, [T].
            stderr: standard errors, [T].
            n: number of training samples.
            train_loss: mean loss over the training samples, [T], where known.
            train_accuracy: fraction of right predictions there, [T].
            val_loss: the same on validation samples, [T].
            val_accuracy: the same, [T].
            reliable: which of the points are to be trusted, [T]; all by default.

        Raises:
            SettingsError: lengths differ, steps do not ascend, or a standard error is negative.
        """
        columns = {
            "llc": llc,
            "stderr": stderr,
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "val_loss": val_loss,
            "val_accuracy": val_accuracy,
        }
        steps = [int(step) for step in steps]
        for name, column in [*columns.items(), ("reliable", reliable)]:
            if column is not None and len(column) != len(steps):
                raise SettingsError(f"{name}: expected {len(steps)} values, one a step, got {len(column)}.")
        if any(after <= before for before, after in itertools.pairwise(steps)):
            raise SettingsError("steps: expected them to ascend.")
        if any(value < 0 for value in stderr):
            raise SettingsError("stderr: expected no negative values.")
        known: list[dict[str, Any]] = [
            {name: None if column is None else _finite(column[i]) for name, column in columns.items()}
            for i in range(len(steps))
        ]
        points = tuple(
            Point(
                step,
                reliable=True if reliable is None else bool(reliable[i]),
                **known[i],
            )
            for i, step in enumerate(steps)
        )
        return cls(points, n=n)

    def __iter__(self) -> Iterator[Point]:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.points)

    def column(self, name: str) -> np.ndarray:
        """One attribute of all points, [T]; NaN where it is not known."""
        values = [getattr(point, name) for point in self.points]
        return np.array([math.nan if value is None else value for value in values], dtype=float)

    # What shows a trajectory is built on it, and imported when asked for.

    def plot(self, path: str | Path | None = None, detector: "Detector | None" = None) -> "Figure":
        """Draw λ with its transitions, accuracies and losses.

        Args:
            path: also save the figure there; it ends in .png, .pdf or .svg.
            detector: of the transitions; see `find_transitions`.

        Raises:
            SettingsError: another kind of file.
            GroktraceError: matplotlib is not installed.
        """
        from groktrace.reporting.figure import check_suffix, trajectory_figure
        from groktrace.reporting.series import Events, Series

        if path is not None:
            check_suffix(Path(path))
        figure = trajectory_figure(Series.of(self), Events.of(self, detector))
        if path is not None:
            figure.savefig(path)
        return figure

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row a snapshot, with the columns that `to_csv` writes.

        Raises:
            GroktraceError: pandas is not installed.
        """
        from groktrace.reporting.series import Series

        try:
            import pandas
        except ImportError as failure:
            raise GroktraceError("to_dataframe needs pandas: pip install pandas, or use to_csv") from failure
        return pandas.DataFrame(Series.of(self).columns())

    def to_csv(self, path: str | Path) -> None:
        """Write comma-separated values, one snapshot a line.

        Args:
            path: of the file.
        """
        from groktrace.reporting.csv import as_csv
        from groktrace.reporting.series import Series

        Path(path).write_text(as_csv(Series.of(self)), encoding="utf-8")

    def save(self, path: str | Path) -> None:
        """Write the trajectory as JSON, whole or not at all.

        Args:
            path: of the file.
        """
        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> "Trajectory":
        """Read what `save` wrote.

        Args:
            path: of the file.

        Raises:
            RunError: the file is missing or damaged.
        """
        path = Path(path)
        value = read_json(path)
        try:
            trajectory = read_record(cls, value)
            if any(after.step <= before.step for before, after in itertools.pairwise(trajectory.points)):
                raise ValueError("steps do not ascend")
        except ValueError as failure:
            raise RunError(f"{path}: damaged ({failure}); remove it and analyse again.") from failure
        return trajectory


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
