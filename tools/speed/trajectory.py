"""The reference trajectory: seconds and error of each method, at one nβ and γ."""

import math
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import groktrace
from groktrace.analysis.measurement.llc import OFF_MINIMUM
from groktrace.analysis.results.trajectory import Trajectory
from groktrace.run import layout
from groktrace.sampling.settings import PAPER
from tools.common.measurements import Row, Store, Verdict, in_turn, ratios, say, spread
from tools.common.networks import EXAMPLE, ModularTraining
from tools.common.peers import Devinterp, devinterp_version, has_devinterp

# From this step on the training set is fitted for good, whatever the judgement of single snapshots.
FITTED_STEP = 200
SEARCH_SEEDS = (1, 2, 3, 4, 5)
_PUBLISHED = {
    "method": "sgld",
    "step_size": PAPER.step_size,
    "chains": PAPER.chains,
    "burn_in": PAPER.burn_in,
    "draws": PAPER.draws,
    "batch_size": PAPER.batch_size,
}


@dataclass(frozen=True)
class TrajectorySettings:
    """How the trajectory is measured.

    Attributes:
        training_steps: of the example; a snapshot every 50.
        rounds: repetitions.
        reference: chains, burn-in and draws of the equilibrium run.
        quick: (chains, burn-in, draws) tried for the quick setting, cheapest first.
        quick_error: largest rms relative error, over the search's seeds, of the quick setting; a tenth below the bar,
            as another seed may err a little more.
        lrs: step sizes tried for the peer.
        peer_run: chains, burn-in and draws of the peer.
        peer_snapshots: evenly spread snapshots that the peer is timed on; a part of them each round.
    """

    training_steps: int = 3000
    rounds: int = 3
    reference: tuple[int, int, int] = (4, 200, 1500)
    quick: tuple[tuple[int, int, int], ...] = (
        (1, 2, 8),
        (1, 2, 12),
        (1, 3, 12),
        (1, 4, 12),
        (1, 4, 16),
        (1, 6, 20),
        (1, 10, 30),
        (1, 20, 50),
        (2, 20, 60),
    )
    quick_error: float = 0.018
    lrs: tuple[float, ...] = (1.25e-5, 2.5e-5, 5e-5, 1e-4, 2e-4)
    peer_run: tuple[int, int, int] = (PAPER.chains, PAPER.burn_in, PAPER.draws)
    peer_snapshots: int = 6


@dataclass(frozen=True)
class Reference:
    """λ̂ in equilibrium.

    Attributes:
        steps: of all snapshots.
        llc: λ̂ of each.
        stderr: its standard error.
        counted: whether the snapshot is at a minimum, so that λ̂ measures a basin.
    """

    steps: list[int]
    llc: list[float]
    stderr: list[float]
    counted: list[bool]

    def errors(self, steps: Sequence[int], llc: Sequence[float]) -> tuple[float, float]:
        """Relative error (rms) of λ̂ from `FITTED_STEP` on, and over all snapshots that count."""
        at = {step: s for s, step in enumerate(self.steps)}
        rows = [
            (step, value / self.llc[at[step]] - 1, self.counted[at[step]])
            for step, value in zip(steps, llc, strict=True)
        ]
        late = [error for step, error, _ in rows if step >= FITTED_STEP]
        minima = [error for _, error, counted in rows if counted]
        return _rms(late), _rms(minima)


class TrajectoryBenchmark:
    """The measurements, kept as they come.

    Args:
        folder: of the results.
        settings: how it is measured.
    """

    def __init__(self, folder: Path, settings: TrajectorySettings) -> None:
        self.settings = settings
        self.store = Store(folder, "trajectory", {**vars(settings), "peer": devinterp_version()})
        self.root = folder / "modular_addition"
        self.run = ModularTraining(steps=settings.training_steps).record(self.root, 50)
        self.model = EXAMPLE.QuadraticNetwork(46, 128, 23)
        self.data = self.run.task.train.tensors
        self.scale, self.reference = self._reference()

    def measure(self) -> None:
        """Time all methods, print and keep their table."""
        quick = self.store.cached("quick setting", self._find_quick)
        contenders = {
            "default": lambda r: self._ours(seed=0),
            "quick": lambda r: self._ours(seed=0, **quick),
            "published": lambda r: self._ours(seed=0, **self.scale, **_PUBLISHED),
        }
        names = {
            "default": ("groktrace, default settings", "found by itself"),
            "quick": ("groktrace, quick", "{chains} × ({burn_in} + {draws})".format(**quick)),
            "published": ("groktrace, method=sgld as published", _describe(PAPER.step_size, PAPER.batch_size)),
        }
        if has_devinterp():
            lr = self.store.cached("tuned step size", self._find_lr)
            version = f"devinterp {devinterp_version()}"
            for name, label, step, batch, gathered in (
                ("peer published", f"{version}, published settings", PAPER.step_size, PAPER.batch_size, False),
                ("peer tuned", f"{version}, tuned by hand", lr, None, False),
                ("peer gathered", f"{version}, tuned by hand, batches gathered at once", lr, None, True),
            ):
                contenders[name] = lambda r, s=step, b=batch, g=gathered: self._peer(self._share(r), s, b, g)
                names[name] = (label, _describe(step, batch, self.settings.peer_run))
        # What is imported or compiled at first use is not timed.
        self._ours(seed=0, **quick)
        if has_devinterp():
            Devinterp(self.data, **self.scale, lr=PAPER.step_size, batch_size=None).llc(self.model, 1, 0, 2, seed=0)
        measured = in_turn(self.store, "timing", contenders, self.settings.rounds)
        self._report(names, measured)

    def _reference(self) -> tuple[dict[str, float], Reference]:
        """nβ and γ by the default rule, and the equilibrium run at them."""
        chains, burn_in, draws = self.settings.reference

        def compute() -> dict[str, Any]:
            trajectory = self._analyze(chains=chains, burn_in=burn_in, draws=draws, rtol=0.02, seed=17)
            counted = [
                point.llc is not None and point.llc > 0 and OFF_MINIMUM not in point.reasons
                for point in trajectory.points
            ]
            return {
                "scale": {"nbeta": trajectory.nbeta, "localization": trajectory.localization},
                "reference": {
                    "steps": [point.step for point in trajectory.points],
                    "llc": trajectory.column("llc").tolist(),
                    "stderr": trajectory.column("stderr").tolist(),
                    "counted": counted,
                },
            }

        kept = self.store.cached("equilibrium reference", compute)
        return kept["scale"], Reference(**kept["reference"])

    def _analyze(self, **settings: Any) -> Trajectory:
        """The run's analysis, nothing kept of an earlier one."""
        shutil.rmtree(self.root / layout.ANALYSIS_FOLDER, ignore_errors=True)
        return groktrace.analyze(self.root, device="cpu", **settings)

    def _ours(self, **settings: Any) -> dict[str, Any]:
        """Seconds from the run directory to the finished trajectory, and λ̂."""
        start = time.perf_counter()
        trajectory = self._analyze(**settings)
        seconds = time.perf_counter() - start
        return _measurement(seconds, [p.step for p in trajectory.points], trajectory.column("llc").tolist())

    def _find_quick(self) -> dict[str, int]:
        """The cheapest explicit setting that is precise enough at every seed of the search."""
        best, lowest = self.settings.quick[-1], math.inf
        for candidate in self.settings.quick:
            chains, burn_in, draws = candidate
            worst = 0.0
            for seed in SEARCH_SEEDS:
                found = self._ours(chains=chains, burn_in=burn_in, draws=draws, seed=seed)
                worst = max(worst, *self.reference.errors(found["steps"], _numbers(found["llc"])))
            say(f"trajectory: quick {candidate}: rms error {100 * worst:.2f} %")
            if worst < lowest:
                best, lowest = candidate, worst
            if worst <= self.settings.quick_error:
                break
        return dict(zip(("chains", "burn_in", "draws"), best, strict=True))

    def _find_lr(self) -> float:
        """The peer's step size of least rms error, over all its snapshots, with full batches."""
        errors = {}
        for lr in self.settings.lrs:
            found = self._peer(self._spread(), lr, None, True)
            errors[lr] = self.reference.errors(found["steps"], _numbers(found["llc"]))[1]
            say(f"trajectory: devinterp at lr {lr:g}: rms error {100 * errors[lr]:.1f} %")
        finite = {lr: error for lr, error in errors.items() if math.isfinite(error)}
        return min(finite or errors, key=(finite or errors).get)

    def _spread(self) -> list[int]:
        """Numbers of evenly spread snapshots among those that count."""
        counted = np.flatnonzero(self.reference.counted)
        few = np.linspace(0, len(counted) - 1, min(self.settings.peer_snapshots, len(counted)))
        return [int(counted[round(i)]) for i in few]

    def _share(self, r: int) -> list[int]:
        """A round's part of them."""
        return self._spread()[r :: self.settings.rounds]

    def _peer(self, snapshots: list[int], lr: float, batch_size: int | None, gathered: bool) -> dict[str, Any]:
        """Seconds of devinterp, scaled to all snapshots, and λ̂ of some; loading them is not timed."""
        peer = Devinterp(self.data, self.scale["nbeta"], self.scale["localization"], lr, batch_size, gathered)
        chains, burn_in, draws = self.settings.peer_run
        seconds, llc = 0.0, []
        for s in snapshots:
            self.model.load_state_dict(self.run.snapshots[s].load())
            start = time.perf_counter()
            llc.append(peer.llc(self.model, chains, burn_in, draws, seed=s))
            seconds += time.perf_counter() - start
        whole = seconds / len(snapshots) * len(self.reference.steps)
        return _measurement(whole, [self.reference.steps[s] for s in snapshots], llc)

    def _report(self, names: dict[str, tuple[str, str]], measured: dict[str, list[dict[str, Any]]]) -> None:
        count = len(self.reference.steps)
        seconds = {name: [taken["seconds"] for taken in rounds] for name, rounds in measured.items()}
        errors = {name: self._errors(rounds) for name, rounds in measured.items()}
        rows: list[Row] = []
        for name, (label, run) in names.items():
            late, minima = errors[name]
            rows.append(
                {
                    "method": label,
                    "run": run,
                    f"seconds for {count} snapshots": spread(seconds[name]),
                    f"rms error from step {FITTED_STEP} on": f"{100 * late:.2f} %",
                    "rms error at minima": f"{100 * minima:.2f} %",
                    "time / default's": spread(ratios(seconds[name], seconds["default"])),
                    "time / quick's": spread(ratios(seconds[name], seconds["quick"])),
                }
            )
        self.store.finish(
            "Reference trajectory", rows, self._bars(seconds, errors), self._notes(has_peer="peer tuned" in names)
        )

    def _errors(self, rounds: list[dict[str, Any]]) -> tuple[float, float]:
        """Errors of a method: over the snapshots of all rounds together, each counted once."""
        values = {
            step: value for taken in rounds for step, value in zip(taken["steps"], _numbers(taken["llc"]), strict=True)
        }
        return self.reference.errors(list(values), list(values.values()))

    def _bars(self, seconds: dict[str, list[float]], errors: dict[str, tuple[float, float]]) -> list[Verdict]:
        bars = [
            Verdict(f"trajectory: rms error, {name}", 100 * max(errors[name]), limit=2.0, at_least=False, unit="%")
            for name in ("default", "quick")
        ]
        for ours in ("quick", "default"):
            for peer, label, limit in (
                ("peer published", "devinterp at the published settings", 300),
                ("peer tuned", "devinterp tuned by hand", 100),
                ("peer gathered", "devinterp tuned by hand, batches gathered at once", 100),
            ):
                found = statistics.median(ratios(seconds[peer], seconds[ours])) if peer in seconds else None
                bars.append(Verdict(f"trajectory: time of {label} / ours ({ours})", found, limit=limit))
        return bars

    def _notes(self, has_peer: bool) -> list[str]:
        counted = [step for step, counts in zip(self.reference.steps, self.reference.counted, strict=True) if counts]
        noise = _rms(
            [
                error / value
                for value, error, counts in zip(
                    self.reference.llc, self.reference.stderr, self.reference.counted, strict=True
                )
                if counts
            ]
        )
        chains, burn_in, draws = self.settings.reference
        notes = [
            f"nβ = {self.scale['nbeta']:.4g} and γ = {self.scale['localization']:.4g} for all methods, by groktrace's "
            "default rule. Median (min–max) of "
            f"{self.settings.rounds} rounds, methods in turn. Ours from the run directory to the finished trajectory, "
            "curvature and loading included; imports excluded.",
            f"Reference: {chains} chains × ({burn_in} + {draws}) steps of groktrace; its own standard error is "
            f"{100 * noise:.2f} % (rms).",
            f"{len(counted)} of {len(self.reference.steps)} snapshots are at a minimum by the reference's diagnostics "
            f"(steps {counted[0]} to {counted[-1]}); before them the loss falls on moving away, and λ̂ measures a slope "
            "and not a basin.",
            f"The quick setting is the cheapest of {len(self.settings.quick)} whose error stays within "
            f"{100 * self.settings.quick_error:.2g} % at seeds {SEARCH_SEEDS}; measured at seed 0.",
        ]
        if has_peer:
            spread_steps = ", ".join(str(self.reference.steps[s]) for s in self._spread())
            notes.append(
                f"devinterp is timed on the snapshots at steps {spread_steps}, a part of them each round, and scaled "
                f"to {len(self.reference.steps)}; its step size by hand is the best of "
                f"{', '.join(f'{lr:g}' for lr in self.settings.lrs)}."
            )
        else:
            notes.append("devinterp is not installed; its rows are left out.")
        return notes


def _measurement(seconds: float, steps: list[int], llc: list[float]) -> dict[str, Any]:
    return {"seconds": seconds, "steps": steps, "llc": [value if math.isfinite(value) else None for value in llc]}


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _rms(values: Sequence[float]) -> float:
    return float(np.sqrt(np.mean(np.square(values)))) if len(values) else math.nan


def _describe(step_size: float, batch_size: int | None, run: tuple[int, int, int] | None = None) -> str:
    chains, burn_in, draws = run or (PAPER.chains, PAPER.burn_in, PAPER.draws)
    batch = "full batch" if batch_size is None else f"batch {batch_size}"
    return f"{chains} × ({burn_in} + {draws}), ε = {step_size:g}, {batch}"
