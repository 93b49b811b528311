"""A finished recording as `follow` saw it while it went on, beside what a user could watch without λ."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from groktrace.analysis.detection import PiecewiseDetector
from groktrace.analysis.measurement.measure import SnapshotMetrics, stack_weights
from groktrace.analysis.results.trajectory import Point, Trajectory
from groktrace.analysis.running.live_scale import LiveScale
from groktrace.analysis.running.session import Session, open_session
from groktrace.analysis.running.setup import make_settings
from groktrace.run.store import open_run
from groktrace.sampling.calibration import Scale
from groktrace.sampling.hutchinson import hessian_trace
from groktrace.sampling.noise import generator_for

# Of the Hessian's trace; batches, and samples of each, whose gradients are compared.
VECTORS = 16
BATCHES, BATCH = 16, 32

Column = list[float | None]


def measure_live(run: Path) -> dict[str, Any]:
    """Losses, norms, Hessian traces and λ at each snapshot, λ at each scale that `follow` came to use.

    Args:
        run: a finished recording.

    Returns:
        Columns by name, one value a snapshot; and "segments": nβ, γ and λ at each scale, of the snapshots up to the
        last at which it was in use, "begun" being the first.
    """
    with open_session(run, make_settings(None, {})) as session:
        metrics = session.metrics()
        known = list(metrics.values())
        return {
            "step": list(metrics),
            "loss": [_plain(one.train_loss) for one in known],
            "accuracy": [one.train_accuracy for one in known],
            "val_accuracy": [one.val_accuracy for one in known],
            "norm": [math.sqrt(one.norm_squared) for one in known],
            "curvature": [_plain(one.top_curvature) for one in known],
            "trace": _hessian_traces(session),
            "weight_decay": session.snapshots.run.weight_decay,
            "segments": _segments(session, metrics),
        }


def measure_following(run: Path) -> list[dict[str, Any]]:
    """The segments where nβ follows the curvature from the beginning, as with `--nbeta curvature`.

    Args:
        run: a finished recording.
    """
    with open_session(run, make_settings(None, {"nbeta": "curvature"})) as session:
        return _segments(session, session.metrics())


def _segments(session: Session, metrics: dict[int, SnapshotMetrics]) -> list[dict[str, Any]]:
    steps, found = list(metrics), []
    for begun, end, scale in _scales(session, metrics):
        points = session.points(metrics, scale, steps[:end], journal=f"live-{begun}.jsonl")
        found.append({"begun": begun, **_curve(list(points.values()), scale)})
    return found


def _scales(session: Session, metrics: dict[int, SnapshotMetrics]) -> list[tuple[int, int, Scale]]:
    """Each scale, the step of the snapshot from which on it is used, and how many snapshots there are at its end."""
    found: list[tuple[int, int, Scale]] = []
    scales = LiveScale(session)
    for count, (step, known) in enumerate(metrics.items(), 1):
        scales.add({step: known})
        scale = scales.choose()
        if scale is not None and (not found or scale != found[-1][2]):
            found.append((step, count, scale))
        elif found:
            found[-1] = (found[-1][0], count, found[-1][2])
    return found


def _curve(points: Sequence[Point], scale: Scale) -> dict[str, Any]:
    follows = scale.curvature is not None
    trajectory = Trajectory(tuple(points), resolution=1.0, nbeta=None if follows else scale.nbeta)
    curve = trajectory.curve
    columns = {"llc": curve.value, "error": curve.error, "doubtful": curve.doubtful.astype(float)}
    return {
        "nbeta": scale.nbeta,
        "localization": scale.localization,
        "follows": follows,
        "curve": curve.name,
        **{name: [_plain(value) for value in column.tolist()] for name, column in columns.items()},
    }


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _hessian_traces(session: Session) -> Column:
    """The trace of ∇²L at each snapshot, by Hutchinson's estimator."""
    loss, split = session.objective.loss, session.objective.layout.split
    found: Column = []
    for step in session.steps:
        weights = session.snapshots.load(step)
        stacked, anchor = stack_weights(loss, [split(weights)])
        trace, _ = hessian_trace(stacked, anchor, [generator_for(0, step, 0, "sharpness", loss.device)], VECTORS)
        found.append(_plain(float(trace)))
    return found


def gradient_noise(
    run: Path, model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], train: tuple[Tensor, Tensor]
) -> list[float]:
    """The trace of the covariance of one sample's gradient at each snapshot, from the scatter of batches' gradients.

    Args:
        run: a recording.
        model: the network that was recorded.
        loss: of outputs and targets.
        train: inputs and targets.
    """
    found, generator = [], torch.Generator().manual_seed(0)
    parameters = list(model.parameters())
    for snapshot in open_run(run).snapshots:
        snapshot.load_into(model)
        gradients = []
        for _ in range(BATCHES):
            chosen = torch.randperm(len(train[0]), generator=generator)[:BATCH]
            gradient = torch.autograd.grad(loss(model(train[0][chosen]), train[1][chosen]), parameters)
            gradients.append(torch.cat([part.flatten() for part in gradient]))
        found.append(BATCH * float(torch.stack(gradients).var(0).sum()))
    return found


def announced(content: dict[str, Any]) -> dict[str, float | None]:
    """When the default detector, asked at each snapshot, first finds a fall, and when it first labels one.

    Args:
        content: see `measure_live`.
    """
    detector, found = PiecewiseDetector(draws=16), dict[str, float | None](fall=None, generalisation=None)
    for trajectory in seen(content):
        falls = [change for change in detector.detect(trajectory) if change.kind == "simplification"]
        if falls and found["fall"] is None:
            found["fall"] = float(trajectory.points[-1].step)
        if any(change.label == "generalisation" for change in falls):
            found["generalisation"] = float(trajectory.points[-1].step)
            break
    return found


def seen(content: dict[str, Any]) -> Iterator[Trajectory]:
    """The trajectory after each snapshot, as `follow` sees it, without validation data."""
    segments = content["segments"]
    for segment, after in zip(segments, [*segments[1:], None], strict=True):
        centred = segment["curve"] == "llc_centred"
        columns = [content["step"], *(segment[name] for name in ("llc", "error", "doubtful"))]
        columns += [content[name] for name in ("loss", "curvature")]
        points = [
            Point(
                step,
                llc=value,
                stderr=error,
                llc_centred=value if centred else None,
                stderr_centred=error if centred else None,
                reliable=not doubtful,
                reasons=("doubtful",) if doubtful else (),
                train_loss=loss,
                diagnostics={"top_curvature": curvature},
            )
            for step, value, error, doubtful, loss, curvature in zip(*columns, strict=False)  # a scale may end earlier
        ]
        for count in range(content["step"].index(segment["begun"]) + 1, len(points) + 1):
            if after is None or points[count - 1].step < after["begun"]:
                yield Trajectory(
                    tuple(points[:count]),
                    nbeta=None if segment["follows"] else segment["nbeta"],
                    localization=segment["localization"],
                    resolution=1.0,
                    weight_decay=content["weight_decay"],
                )
