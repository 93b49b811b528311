"""Weights & Biases: the trajectory as a run of its own, in place of what an earlier call logged."""

import contextlib
import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from groktrace.analysis.results.trajectory import Trajectory
from groktrace.errors import GroktraceError
from groktrace.reporting.figure import pixels, trajectory_figure
from groktrace.reporting.series import CURVE, Events, Series
from groktrace.run import layout
from groktrace.run.files import read_json
from groktrace.run.remote import is_url

# Values of the curve at the dates of transitions, by label or kind.
MARK = "grokking/transition_"


@dataclass(frozen=True)
class WandbReporter:
    """Logs a run of Weights & Biases: series on their training steps, transitions as a table and as marked points.

    The run has the same id whenever the same recording is logged to the same project, so that it is overwritten. Where
    and whether it is sent say the client's own variables, such as WANDB_MODE=offline, WANDB_DIR and WANDB_ENTITY.

    Attributes:
        project: the name of the project.

    Raises:
        GroktraceError: the client is not installed.
    """

    project: str

    def __post_init__(self) -> None:
        _client()

    def report(self, series: Series, events: Events, place: Path) -> None:
        """Log the run; see `Reporter`.

        Raises:
            GroktraceError: the client refused, as without an account.
        """
        wandb, trajectory = _client(), series.trajectory
        name, identity = _identity(trajectory, place)
        plain = trajectory.to_dict()
        config = {key: value for key, value in plain.items() if key not in ("points", "unreadable", "unsampled")}
        settings = wandb.Settings(console="off", quiet=True, x_disable_stats=True, x_save_requirements=False)
        more = {"id": identity, "name": name, "job_type": "groktrace", "reinit": "create_new", "save_code": False}
        with _afresh(wandb), wandb.init(project=self.project, config=config, settings=settings, **more) as run:
            rows = _rows(series, events)
            last = max(rows, default=0)
            for step in sorted(rows):
                run.log(rows[step], step=step)
            shown: dict[str, Any] = {"transitions": _table(wandb, events)}
            with contextlib.suppress(GroktraceError):  # matplotlib is an extra
                shown["trajectory"] = wandb.Image(pixels(trajectory_figure(series, events)))
            run.log(shown, step=last)
            run.summary.update({**events.grokking.to_dict(), "remarks": " ".join(events.remarks)})
            kept = Path(run.settings.sync_dir)
        for folder in kept.parent.glob(f"offline-run-*-{identity}"):
            if folder != kept:
                shutil.rmtree(folder, ignore_errors=True)


def _client() -> Any:
    """The client's module; a folder of logs that is called the same is none."""
    try:
        import wandb

        wandb.init  # noqa: B018
    except (ImportError, AttributeError) as failure:
        raise GroktraceError("Weights & Biases: the client is missing; pip install 'groktrace[wandb]'") from failure
    return wandb


@contextlib.contextmanager
def _afresh(wandb: Any) -> Iterator[None]:
    """Have the next run take the place of an earlier one of its id, whatever WANDB_RESUME says of the script's own.

    Raises:
        GroktraceError: the client refused.
    """
    with _as_own_error(wandb):
        shared = wandb.setup().settings
        told = {name: getattr(shared, name) for name in ("resume", "resume_from", "fork_from")}
        told = {name: value for name, value in told.items() if value is not None}
        try:
            for name in told:
                setattr(shared, name, None)
            yield
        finally:
            for name, value in told.items():
                setattr(shared, name, value)


@contextlib.contextmanager
def _as_own_error(wandb: Any) -> Iterator[None]:
    try:
        yield
    except wandb.errors.Error as failure:
        said = str(failure).rstrip(".")
        raise GroktraceError(
            f"Weights & Biases: {said}. Results are kept: the same command logs them again, after `wandb login`, or "
            "with WANDB_MODE=offline."
        ) from failure


def _identity(trajectory: Trajectory, place: Path) -> tuple[str, str]:
    """The name that is shown for a recording, and an id that stays the same as long as that lies where it does."""
    run, data = trajectory.run, trajectory.data
    if data is not None:
        digest = hashlib.sha256(json.dumps([str(run), str(place.resolve()), data.digest]).encode()).hexdigest()
        return f"{Path(run or place).name} on {data}", f"groktrace-{digest[:12]}"
    where = run if run is not None and is_url(run) else str(place.resolve())
    began = None
    with contextlib.suppress(GroktraceError, AttributeError):  # of a trajectory that is of no run
        began = read_json(place / layout.RUN_FILE).get("created")
    digest = hashlib.sha256(json.dumps([where, began]).encode()).hexdigest()
    return where.rstrip("/").rpartition("/")[2] or where, f"groktrace-{digest[:12]}"


def _rows(series: Series, events: Events) -> dict[int, dict[str, float]]:
    """What is known, by step and tag, with the points that mark transitions."""
    rows: dict[int, dict[str, float]] = {}
    for tag, column in (chart for quantity in series for chart in quantity.charts().items()):
        for step, value in zip(series.steps.tolist(), column.tolist(), strict=True):
            if math.isfinite(value):
                rows.setdefault(step, {})[tag] = value
    value = series[CURVE].values
    known = np.isfinite(value)
    for transition in events.transitions:
        tag = MARK + (transition.label or transition.kind).replace(" ", "_").replace("/", "_")
        height = (
            float(np.interp(transition.step, series.steps[known], value[known]))
            if known.any()
            else transition.llc_after
        )
        rows.setdefault(transition.step, {})[tag] = height
    return rows


def _table(wandb: Any, events: Events) -> Any:
    """The transitions, one a row."""
    rows = [transition.to_dict() for transition in events.transitions]
    columns = list(rows[0]) if rows else ["kind", "label", "step"]
    return wandb.Table(columns=columns, data=[list(row.values()) for row in rows])
