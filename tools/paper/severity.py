"""Grokking severity and peak λ against the learning rate."""

import statistics
from pathlib import Path

import numpy as np

import groktrace
from groktrace.analysis.results.grokking import measure_grokking
from tools.common.measurements import Row, Table, number
from tools.common.networks import ModularTraining
from tools.paper import figures
from tools.paper.shared import SCALE, Result, values

RATES = (5e-4, 1e-3, 3e-3, 1e-2, 2e-2)
SEVERITY_SEEDS, SEVERITY_STEPS, SEVERITY_EVERY = 3, 6000, 50

SEVERITY_COLUMNS = ["run", "learning rate", "seed", "severity", "memorised at", "generalised at", "peak λ", "at step"]
SEVERITY_COLUMNS += ["final λ"]


def measure_severity(rate: float, seed: int, place: Path) -> Row:
    """One training: how severely it groks, and how high λ gets once the training set is memorised."""
    training = ModularTraining(learning_rate=rate, seed=seed, steps=SEVERITY_STEPS)
    run = training.record(place / f"rate{rate:g}-{seed}", SEVERITY_EVERY)
    trajectory = groktrace.analyze(run, **SCALE)
    grokking = measure_grokking(trajectory)
    shown = trajectory.curve.value
    at = int(np.nanargmax(shown))
    return {
        "learning rate": rate,
        "seed": seed,
        "severity": grokking.severity,
        "memorised at": grokking.memorised_at,
        "generalised at": grokking.generalised_at,
        "peak λ": float(shown[at]),
        "at step": trajectory.points[at].step,
        "final λ": float(shown[-1]),
    }


def run_severity(out: Path, fresh: bool) -> Result:
    """Grokking severity and peak λ against the learning rate."""
    table = Table(out / "severity.csv", SEVERITY_COLUMNS, fresh)
    for rate in RATES:
        for seed in range(SEVERITY_SEEDS):
            table.cached(f"rate={rate:g} seed={seed}", measure_severity, rate, seed, out / "severity")
    rows = list(table.rows.values())
    figures.severity(rows, out / "severity.png")
    said = []
    for rate in RATES:
        own = [row for row in rows if number(row["learning rate"]) == rate]
        mean = {name: statistics.fmean(values(own, name)) for name in ("severity", "peak λ", "final λ")}
        late = [row["generalised at"] or "never" for row in own]
        said.append(
            f"rate {rate:g}: severity {mean['severity']:.3f}, generalised at {', '.join(late)}, peak λ "
            f"{mean['peak λ']:.0f}, final λ {mean['final λ']:.0f}"
        )
    grokked = [row for row in rows if number(row["severity"]) > 0]
    ranked = [np.argsort(np.argsort(values(grokked, name))) for name in ("severity", "peak λ")]
    said.append(
        f"rank correlation of severity and peak λ over {len(grokked)} runs that generalise: "
        f"{np.corrcoef(*ranked)[0, 1]:.2f}"
    )
    return said
