"""A trajectory as one table of named series, and the events along it: made here once, shown by every reporter."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from groktrace.analysis.detection import Detector, Transition, find_transitions
from groktrace.analysis.results.grokking import Grokking, measure_grokking
from groktrace.analysis.results.trajectory import Trajectory
from groktrace.reporting.remarks import none_found, remarks

CURVE, CURVE_TAG = "curve", "grokking/llc"
BAND = ("llc/lower", "llc/upper")  # the tags of its 95 % band


# What is averaged over runs.
QUANTITIES = (CURVE, "train_loss", "val_loss", "train_accuracy", "val_accuracy")


@dataclass(frozen=True, eq=False)
class Quantity:
    """One number at each snapshot.

    Attributes:
        name: of its column in tables.
        tag: "group/name", by which dashboards show it. They sort by tag: "grokking" comes first, "learning" second, and
            all other groups, of details, are folded below.
        values: [T]; NaN where it is not known.
        errors: standard errors, [T]; None where it has none.
        error_name: of their column.
        heading: in the table on the terminal; empty to leave it out there.
        label: in the legend of figures.
        axis: of the figure along which it is drawn; empty to leave it out there.
    """

    name: str
    tag: str
    values: np.ndarray
    errors: np.ndarray | None = None
    error_name: str = ""
    heading: str = ""
    label: str = ""
    axis: str = ""

    @property
    def known(self) -> bool:
        """Whether it is known at any snapshot."""
        return bool(np.isfinite(self.values).any())

    def charts(self) -> dict[str, np.ndarray]:
        """The charts of a dashboard by tag, each [T]: its values, and its errors, those of the curve as a band."""
        values, errors = self.values, self.errors
        if errors is None:
            return {self.tag: values}
        if self.name == CURVE:
            return {self.tag: values, BAND[0]: values - 1.96 * errors, BAND[1]: values + 1.96 * errors}
        return {self.tag: values, f"{self.tag.partition('/')[0]}/{self.error_name}": errors}


@dataclass(frozen=True, eq=False)
class Series:
    """All that is known of each snapshot, as named series over the training step.

    Attributes:
        trajectory: that they were made from, with its settings.
        steps: training steps of the snapshots, [T].
        quantities: "curve" is the curve on which transitions are found, see `Trajectory.curve`; the others follow in
            the order of columns.
    """

    trajectory: Trajectory
    steps: np.ndarray
    quantities: tuple[Quantity, ...]

    @classmethod
    def of(cls, trajectory: Trajectory) -> "Series":
        """The series of a trajectory; the one place that lists what there is to show.

        Args:
            trajectory: λ̂ along a run.
        """

        def read(name: str, tag: str, error_name: str = "", **shown: str) -> Quantity:
            errors = trajectory.column(error_name) if error_name else None
            return Quantity(name, tag, trajectory.column(name), errors, error_name, **shown)

        curve = trajectory.curve
        quantities = [
            Quantity(CURVE, CURVE_TAG, curve.value, curve.error, f"{CURVE}_stderr"),
            read("llc", "llc/raw", "stderr", heading="λ̂"),
            read("llc_centred", "llc/centred", "stderr_centred", heading="λ_c"),
            read("train_loss", "learning/train_loss", heading="train loss", label="training loss", axis="loss"),
            read(
                "train_accuracy",
                "learning/train_accuracy",
                heading="train acc",
                label="training accuracy",
                axis="accuracy",
            ),
            read("val_loss", "learning/val_loss", heading="val loss", label="validation loss", axis="loss"),
            read(
                "val_accuracy",
                "grokking/val_accuracy",
                heading="val acc",
                label="validation accuracy",
                axis="accuracy",
            ),
            read(
                "hessian_trace",
                "loss_hessian/hessian_trace",
                "hessian_trace_stderr",
                heading="tr H",
                label="Hessian's trace",
                axis="Hessian's trace",
            ),
            read(
                "hessian_top",
                "loss_hessian/hessian_top",
                heading="h_max",
                label="its largest eigenvalue",
                axis="largest eigenvalue",
            ),
        ]
        for group, attribute in (("logged", "metrics"), ("sampler", "diagnostics")):
            records = [getattr(point, attribute) for point in trajectory.points]
            for name in sorted({name for record in records for name in record}):
                found = [record.get(name) for record in records]
                values = np.array([np.nan if value is None else value for value in found], dtype=float)
                quantities.append(Quantity(f"{group}/{name}", f"{group}/{name}", values))
        steps = np.array([point.step for point in trajectory.points], dtype=np.int64)
        return cls(trajectory, steps, tuple(quantities))

    def __iter__(self) -> Iterator[Quantity]:
        return iter(self.quantities)

    def __len__(self) -> int:
        return len(self.quantities)

    def __getitem__(self, name: str) -> Quantity:
        for quantity in self.quantities:
            if quantity.name == name:
                return quantity
        raise KeyError(name)

    def columns(self) -> dict[str, Any]:
        """The table for files and data frames, by column: each of length T, what is not known NaN."""
        points = self.trajectory.points
        columns: dict[str, Any] = {"step": self.steps}
        for quantity in self:
            columns[quantity.name] = quantity.values
            if quantity.errors is not None:
                columns[quantity.error_name] = quantity.errors
        columns["reliable"] = np.array([point.reliable for point in points], dtype=bool)
        columns["reasons"] = ["; ".join(point.reasons) for point in points]
        return columns


@dataclass(frozen=True)
class Events:
    """What happens along a trajectory.

    Attributes:
        transitions: in step order.
        grokking: when the run memorised and generalised, by its accuracies.
        remarks: what has to be said beside the transitions, or in their place; one sentence each.
    """

    transitions: tuple[Transition, ...]
    grokking: Grokking
    remarks: tuple[str, ...] = ()

    @classmethod
    def of(cls, trajectory: Trajectory, detector: Detector | None = None) -> "Events":
        """The events of a trajectory.

        Args:
            trajectory: λ̂ along a run.
            detector: of its transitions; see `find_transitions`.
        """
        transitions = tuple(find_transitions(trajectory, detector))
        none = () if transitions else (none_found(trajectory, detector),)
        return cls(transitions, measure_grokking(trajectory), (*none, *remarks(trajectory)))
