"""λ, losses, accuracies and trace over many seeds, and at the published size."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np

import groktrace
from tools.common.measurements import Row, Table, number
from tools.common.networks import ModularTraining
from tools.paper import figures
from tools.paper.networks import LargeTraining, train_large
from tools.paper.shared import GENERALISED, SCALE, Result, values

TRAJECTORY_SEEDS, TRAJECTORY_EVERY = 20, 100
# The published protocol, with weight decay in the gradient or apart from it; epochs, of 100 000 published.
LARGE = {
    **{f"Adam-{seed}": (LargeTraining(seed=seed), 6_000) for seed in range(2)},
    "AdamW-0": (LargeTraining("AdamW"), 23_000),
}

TRAJECTORY_COLUMNS = ["run", "seed", "step", "λ", "λ̂", "λ_c", "reliable", "train loss", "val loss", "train accuracy"]
TRAJECTORY_COLUMNS += ["val accuracy", "trace", "trace stderr", "top eigenvalue"]


def trajectory_rows(trajectory: groktrace.Trajectory, seed: int | str) -> dict[str, Row]:
    """One trajectory, a row a snapshot."""
    shown = trajectory.curve.value
    return {
        f"seed={seed} step={point.step}": {
            "seed": seed,
            "step": point.step,
            "λ": float(value),
            "λ̂": point.llc,
            "λ_c": point.llc_centred,
            "reliable": point.reliable,
            "train loss": point.train_loss,
            "val loss": point.val_loss,
            "train accuracy": point.train_accuracy,
            "val accuracy": point.val_accuracy,
            "trace": point.hessian_trace,
            "trace stderr": point.hessian_trace_stderr,
            "top eigenvalue": point.hessian_top,
        }
        for point, value in zip(trajectory.points, shown, strict=True)
    }


def run_trajectory(out: Path, fresh: bool) -> Result:
    """λ, losses, accuracies and trace over many seeds; and the published size."""
    table = Table(out / "trajectory.csv", TRAJECTORY_COLUMNS, fresh)
    for seed in range(TRAJECTORY_SEEDS):
        last = f"seed={seed} step={ModularTraining().steps}"
        if last not in table.rows:
            run = ModularTraining(seed=seed).record(out / "seeds" / str(seed), TRAJECTORY_EVERY)
            for key, row in trajectory_rows(groktrace.analyze(run, hessian=True, **SCALE), seed).items():
                table.cached(key, dict, row)
    said = judge_trajectories(list(table.rows.values()))
    steps = LARGE["Adam-0"][0].steps_an_epoch
    figures.trajectory(list(table.rows.values()), [], steps, out / "trajectory.png")
    large = run_large(out, fresh)
    for name, (training, epochs) in LARGE.items():
        own = [row for row in large if row["seed"] == name]
        peak = max(own, key=lambda row: number(row["λ"]))
        said.append(
            f"p = {training.p}, K = {training.width}, {name}, {epochs} epochs: λ peaks at {number(peak['λ']):.0f} in "
            f"epoch {int(peak['step']) // training.steps_an_epoch} (validation accuracy "
            f"{number(peak['val accuracy']):.2f}) and ends at {number(own[-1]['λ']):.0f} (training accuracy "
            f"{number(own[-1]['train accuracy']):.2f}, validation {number(own[-1]['val accuracy']):.2f})"
        )
    figures.trajectory(list(table.rows.values()), large, steps, out / "trajectory.png")
    return said


def run_large(out: Path, fresh: bool) -> list[dict[str, str]]:
    """The published size, all of its runs at the (nβ, γ) that the dials give for the first."""
    table = Table(out / "trajectory_large.csv", TRAJECTORY_COLUMNS, fresh)
    scale: dict[str, float] = {}
    for name, (training, epochs) in LARGE.items():
        place = out / "large" / name
        train_large(training, place, epochs, math.inf)
        trajectory = groktrace.analyze(place / "run", hessian=True, **scale)
        scale = {"nbeta": trajectory.nbeta, "localization": trajectory.localization}
        for key, row in trajectory_rows(trajectory, name).items():
            table.cached(key, dict, row)
    click.echo(f"p = 53: nβ = {scale['nbeta']:.5g}, γ = {scale['localization']:.5g}")
    return list(table.rows.values())


def judge_trajectories(rows: Sequence[Row]) -> Result:
    """Peaks, falls, and how trace and λ part."""
    peaks, accuracies, falls, generalised, parted = [], [], [], [], []
    for seed in dict.fromkeys(row["seed"] for row in rows):
        own = [row for row in rows if row["seed"] == seed]
        lam, val, trace = (np.array(values(own, name)) for name in ("λ", "val accuracy", "trace"))
        top = int(lam.argmax())
        peaks.append(int(own[top]["step"]))
        accuracies.append(val[top])
        falls.append(1 - lam[-1] / lam[top])
        generalised.append(next((int(row["step"]) for row in own if number(row["val accuracy"]) >= GENERALISED), None))
        reached = int(np.argmax(val >= GENERALISED))
        parted.append((np.corrcoef(lam[1 : reached + 1], trace[1 : reached + 1])[0, 1], trace[-1] / trace[reached]))
    known = [step for step in generalised if step is not None]
    agree, after = (np.array(column) for column in zip(*parted, strict=True))
    return [
        f"{len(peaks)} seeds, {len(known)} of which generalise (median step {statistics.median(known):.0f})",
        f"peak of λ at step {min(peaks)} to {max(peaks)} (median {statistics.median(peaks):.0f}), where validation "
        f"accuracy is {min(accuracies):.2f} to {max(accuracies):.2f}",
        f"fall from the peak {100 * statistics.fmean(falls):.1f} ± {100 * statistics.stdev(falls):.1f} %",
        f"correlation of λ and trace up to generalisation: median {np.median(agree):.2f}; trace at the end over trace "
        f"at generalisation: {after.mean():.2f} ± {after.std(ddof=1):.2f}",
    ]
