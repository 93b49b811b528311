"""Curves with known transitions, flat ones and drifting ones; what groktrace and ruptures find in them."""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from groktrace.analysis.detection import find_transitions
from groktrace.analysis.results.trajectory import Trajectory
from tools.common.measurements import Row, finish_table, say

SHAPES = ("steps", "ramps", "humps")
SAMPLING = ("even", "logarithmic", "gaps")
COUNTS = (30, 61, 120, 200)
NOISE = (3.0, 5.0, 10.0)
TOLERANCE = 2.0
CHANGE = 200.0


@dataclass(frozen=True)
class Series:
    """A curve with errors.

    Attributes:
        steps: of the snapshots, [T].
        value: measured, [T].
        error: standard errors as reported, [T].
        changes: true midpoints, in snapshots: 3.5 is half-way between the fourth and the fifth in training steps (or
            in their logarithm, where the snapshots are log-spaced).
        kind: what it is, in words.
    """

    steps: np.ndarray
    value: np.ndarray
    error: np.ndarray
    changes: tuple[float, ...]
    kind: str

    def trajectory(self) -> Trajectory:
        """As groktrace takes it."""
        return Trajectory.from_arrays(self.steps, self.value, self.error)

    def snapshot(self, step: float) -> float:
        """A training step as a place among the snapshots."""
        if "logarithmic" in self.kind:
            return float(np.interp(math.log1p(step), np.log1p(self.steps), np.arange(len(self.steps))))
        return float(np.interp(step, self.steps, np.arange(len(self.steps))))


def snapshot_steps(sampling: str, count: int, rng: np.random.Generator) -> np.ndarray:
    """Training steps of the snapshots, [count]."""
    if sampling == "even":
        return 50 * np.arange(count)
    if sampling == "logarithmic":
        steps = np.unique(np.round(np.geomspace(1, 200.0 * count, count)).astype(int))
        while len(steps) < count:  # rounding has merged the first ones
            steps = np.union1d(steps, [steps[-1] * 2 - steps[-2]])
        return steps
    return 50 * np.sort(rng.choice(2 * count, count, replace=False))


def changing(shape: str, ratio: float, rng: np.random.Generator) -> Series:
    """A curve with transitions, each of at least `ratio` times the typical error.

    Args:
        shape: "steps" (jumps), "ramps" (of 3 to 12 snapshots) or "humps" (a rise, then a slower fall).
        ratio: size of the least change relative to the median standard error.
        rng: of all choices.
    """
    count, sampling = int(rng.choice(COUNTS)), str(rng.choice(SAMPLING))
    steps = snapshot_steps(sampling, count, rng)
    widths: list[float]
    if shape == "steps":
        widths = [0.0] * int(rng.integers(1, 4 if count > 30 else 3))
        signs = rng.choice([-1.0, 1.0], len(widths))
    elif shape == "ramps":
        widths = [*rng.uniform(3, min(12, count / 5), int(rng.integers(1, 3)))]
        signs = rng.choice([-1.0, 1.0], len(widths))
    else:
        widths = [float(rng.uniform(3, 6)), float(rng.uniform(5, min(20, count / 4)))]
        signs = np.array([1.0, -1.0])
    # Phases of eight snapshots and more; a hump has its peak, or a short plateau.
    least = [8.0] * (len(widths) + 1)
    if shape == "humps":
        least[0], least[1] = 4.0, float(rng.choice([0.0, 4.0]))
    spare = (count - 1 - sum(widths) - sum(least)) * rng.dirichlet(np.ones(len(least)))
    if shape == "humps" and least[1] == 0.0:
        spare[[1, 2]] = 0.0, spare[1] + spare[2]
    places, levels, changes, at = [0.0], [1000.0], [], 0.0
    for width, sign, room in zip(widths, signs, np.array(least) + spare, strict=False):
        at += room
        places += [at, at + max(width, 1e-9)]
        levels += [levels[-1], levels[-1] + sign * CHANGE * float(rng.uniform(1, 2))]
        changes.append(at + width / 2)
        at += width
    # Ramps are straight in training steps, or in their logarithm where the snapshots are log-spaced; the places of
    # changes among the snapshots are turned into that first.
    axis = np.log1p(steps) if sampling == "logarithmic" else steps.astype(float)
    edges = np.interp(places, np.arange(count), axis)
    centres = (edges[1::2] + edges[2::2]) / 2
    truth = np.interp(axis, edges, levels)
    error = CHANGE / ratio * np.exp(rng.normal(0, 0.35, count))
    value = truth + error * rng.standard_normal(count)
    middles = tuple(float(np.interp(centre, axis, np.arange(count))) for centre in centres)
    return Series(steps, value, error, middles, f"{shape} {sampling}")


def unchanging(kind: str, rng: np.random.Generator) -> Series:
    """A curve without transitions.

    Args:
        kind: "flat", or "drifting": by 10 to 60 % over the run, in training steps or in their logarithm.
        rng: of all choices.
    """
    count, sampling = int(rng.choice((5, 10, *COUNTS))), str(rng.choice(SAMPLING))
    steps = snapshot_steps(sampling, count, rng)
    x = np.log1p(steps / np.diff(steps).min()) if rng.random() < 0.5 else steps / steps[-1]
    drift = float(rng.choice([-1, 1]) * rng.uniform(0.1, 0.6)) if kind == "drifting" else 0.0
    truth = 1000 * (1 + drift * (x - x[0]) / (x[-1] - x[0]))
    error = float(rng.choice([5.0, 20.0, 60.0])) * np.exp(rng.normal(0, 0.35, count))
    # Half of the curves jitter more than their standard errors say, as training does.
    excess = float(rng.choice([1.0, 2.0]))
    spread = np.hypot(error, np.median(error) * math.sqrt(excess**2 - 1))
    return Series(steps, truth + spread * rng.standard_normal(count), error, (), f"{kind} {sampling}")


def matched(found: Sequence[float], true: Sequence[float]) -> list[tuple[int, int]]:
    """Pairs of found and true places within ±2 snapshots, one to one, the nearest first."""
    pairs = sorted((abs(a - b), i, j) for i, a in enumerate(found) for j, b in enumerate(true))
    kept: list[tuple[int, int]] = []
    for distance, i, j in pairs:
        if distance <= TOLERANCE and all(i != k and j != m for k, m in kept):
            kept.append((i, j))
    return kept


def ruptures_methods() -> dict[str, Callable[[np.ndarray], list[float]]]:
    """Methods of ruptures with the penalties that its documentation recommends; each takes a curve in errors.

    Those for pieces with a slope are also read as we read ours: a piece over which the curve changes by half of the
    least change or more is a transition at its middle.
    """
    import ruptures as rpt

    def breaks(make: Callable[[], object], penalty: Callable[[int], float]) -> Callable[[np.ndarray], list[float]]:
        return lambda y: [b - 0.5 for b in make().fit(y).predict(pen=penalty(len(y)))[:-1]]

    def middles(find: Callable[[np.ndarray], list[float]]) -> Callable[[np.ndarray], list[float]]:
        def read(y: np.ndarray) -> list[float]:
            bounds = [-0.5, *find(y), len(y) - 0.5]
            found = []
            for a, b in itertools.pairwise(bounds):
                i = np.arange(math.ceil(a), math.floor(b) + 1)
                if len(i) >= 3 and abs(np.polyfit(i, y[i], 1)[0]) * (b - a) >= 0.5 * y_change(y):
                    found.append((a + b) / 2)
            return found

        return read

    def y_change(y: np.ndarray) -> float:
        return float(np.ptp(y)) / 2

    def line(y: np.ndarray) -> np.ndarray:
        i = np.arange(len(y), dtype=float)
        return np.column_stack([y, i / len(y), np.ones(len(y))])

    def linear(y: np.ndarray) -> list[float]:
        found = rpt.Pelt(model="linear", min_size=2, jump=1).fit(line(y)).predict(pen=3 * math.log(len(y)))
        return [b - 0.5 for b in found[:-1]]

    continuous = breaks(lambda: rpt.BottomUp(model="clinear", min_size=2, jump=1), lambda n: 2 * math.log(n))
    return {
        "Pelt l2, log n": breaks(lambda: rpt.Pelt(model="l2", min_size=1, jump=1), lambda n: math.log(n)),
        "Pelt l2, 2 log n": breaks(lambda: rpt.Pelt(model="l2", min_size=1, jump=1), lambda n: 2 * math.log(n)),
        "Pelt l2, 3 log n": breaks(lambda: rpt.Pelt(model="l2", min_size=1, jump=1), lambda n: 3 * math.log(n)),
        "Binseg l2, 3 log n": breaks(lambda: rpt.Binseg(model="l2", min_size=1, jump=1), lambda n: 3 * math.log(n)),
        "BottomUp l2, 3 log n": breaks(lambda: rpt.BottomUp(model="l2", min_size=1, jump=1), lambda n: 3 * math.log(n)),
        "Window l2, 3 log n": breaks(lambda: rpt.Window(width=8, model="l2", jump=1), lambda n: 3 * math.log(n)),
        "KernelCPD rbf, log n": breaks(lambda: rpt.KernelCPD(kernel="rbf", min_size=2), lambda n: math.log(n)),
        "Pelt linear, breaks": linear,
        "Pelt linear, pieces": middles(linear),
        "BottomUp clinear, breaks": continuous,
        "BottomUp clinear, pieces": middles(continuous),
    }


def run_speed(folder: Path, count: int, peers: bool) -> None:
    """Time the search in long curves, processor seconds; the table goes to `folder`.

    Args:
        folder: of the results.
        count: snapshots in each curve.
        peers: whether ruptures' exact search (KernelCPD, in C) is timed too, on the curve alone.
    """
    i, rng = np.arange(count), np.random.default_rng(0)
    rows: list[Row] = []
    places = np.array([0.0, 0.2, 0.3, 0.4, 0.8, 1.0]) * count
    shapes = {
        "flat": np.full(count, 900.0),
        "one jump": np.where(i < count / 2, 900.0, 700.0),
        "a rise and a fall": np.interp(i, places, [100.0, 100.0, 1100.0, 1100.0, 700.0, 700.0]),
        "a fall that slows down": 900 + 500 * np.exp(-np.maximum(i / count - 0.2, 0.0) / 0.15),
    }
    for name, truth in shapes.items():
        value = truth + 20.0 * rng.standard_normal(count)
        trajectory = Trajectory.from_arrays(10 * i, value, np.full(count, 20.0))
        begun = time.process_time()
        found = len(find_transitions(trajectory))
        row = {"curve": name, "snapshots": str(count), "found": str(found)}
        rows.append(row | {"groktrace": f"{time.process_time() - begun:.2f} s"})
        if peers:
            begun = time.process_time()
            ruptures_methods()["KernelCPD rbf, log n"](value / 20.0)
            rows[-1]["ruptures KernelCPD"] = f"{time.process_time() - begun:.2f} s"
        say(str(rows[-1]))
    finish_table(folder / "speed.csv", "Searching long curves, processor seconds", rows)


def run_synthetic(folder: Path, series: int, seed: int, peers: bool) -> None:
    """Measure and print; the table goes to `folder`.

    Args:
        folder: of the results.
        series: curves a shape and noise level, and of each kind without a transition a quarter of a thousand at least.
        seed: of the curves.
        peers: whether ruptures is measured too.
    """
    methods = ruptures_methods() if peers else {}
    rows: list[Row] = []
    for shape in SHAPES:
        for ratio in NOISE:
            rng = np.random.default_rng([seed, SHAPES.index(shape), int(ratio)])
            tally = {name: np.zeros(3) for name in ("groktrace", *methods)}
            covered: list[bool] = []
            for _ in range(series):
                simulated = changing(shape, ratio, rng)
                transitions = find_transitions(simulated.trajectory())
                found = {"groktrace": [simulated.snapshot(t.step) for t in transitions]}
                whitened = simulated.value / np.median(simulated.error)
                found |= {name: method(whitened) for name, method in methods.items()}
                for name, places in found.items():
                    pairs = matched(places, simulated.changes)
                    tally[name] += len(pairs), len(places), len(simulated.changes)
                for i, j in matched(found["groktrace"], simulated.changes):
                    low, high = (
                        simulated.snapshot(transitions[i].step_low),
                        simulated.snapshot(transitions[i].step_high),
                    )
                    covered.append(low <= simulated.changes[j] <= high)
            scores = {name: 2 * hits / (found + true) for name, (hits, found, true) in tally.items()}
            row = {"shape": shape, "change / error": f"{ratio:g}", "groktrace": f"{scores.pop('groktrace'):.3f}"}
            rows.append(row | {name: f"{score:.3f}" for name, score in scores.items()})
            rows[-1]["coverage"] = f"{np.mean(covered):.3f} of {len(covered)}"
            say(str(rows[-1]))
    alarms = {}
    for kind in ("flat", "drifting"):
        rng = np.random.default_rng([seed, 7, len(kind)])
        curves = [unchanging(kind, rng) for _ in range(max(series, 250))]
        alarmed = [curve for curve in curves if find_transitions(curve.trajectory())]
        alarms[kind] = f"{len(alarmed)} of {len(curves)}"
        if alarmed:
            say(f"{kind}: " + "; ".join(f"{simulated.kind} T={len(simulated.steps)}" for simulated in alarmed[:12]))
    title = f"Curves with known transitions: F1 within ±{TOLERANCE:g} snapshots"
    finish_table(folder / "synthetic.csv", title, rows)
    print(f"False alarms: {', '.join(f'{count} {kind} curves' for kind, count in alarms.items())}.")
