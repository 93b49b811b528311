"""Many workers and adaptive replay: speed-up, overhead, and what a tenth of the sampling finds.

    python -m tools.speed.many_snapshots workers      # 2 processes against 1, thread for thread; overhead of a task
    python -m tools.speed.many_snapshots adaptive     # 2000 snapshots of the reference example: all, and a tenth
    python -m tools.speed.many_snapshots all

Each process uses one thread. Finished parts are kept in the results' folder.
"""

import contextlib
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import groktrace
from groktrace.analysis.results.trajectory import Trajectory
from groktrace.analysis.running.backends import dask_executor, process_pool
from groktrace.analysis.running.evaluator import EvaluatorSpec, WorkItem, evaluate_elsewhere
from groktrace.analysis.running.passes import sample_adaptively
from groktrace.analysis.running.session import open_session
from groktrace.run import layout
from groktrace.run.files import write_json
from groktrace.sampling.settings import SamplingSettings
from tools.common.measurements import Row, Store, Verdict, command_line, run_parts, spread

EXAMPLE = Path(__file__).parents[2] / "examples" / "modular_addition.py"


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        snapshots: analysed by one and by two processes.
        tasks: empty ones, to time what a task costs besides its work.
        rounds: repetitions of both.
        long: (snapshots, steps between them) of the runs that are replayed adaptively.
    """

    snapshots: int = 96
    tasks: int = 200
    rounds: int = 3
    long: tuple[tuple[int, int], ...] = ((2000, 10), (2000, 2))


TINY = Settings(snapshots=8, tasks=5, rounds=1, long=((60, 10),))


def record(folder: Path, snapshots: int, every: int) -> Path:
    """The reference example with so many snapshots besides the first; recorded once."""
    out = folder / f"run-{snapshots}x{every}"
    if not out.exists():
        steps = snapshots * every
        command = [sys.executable, str(EXAMPLE), "--out", str(out), "--steps", str(steps), "--every", str(every)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return out


def time_analysis(run: Path, executor: Executor | None) -> tuple[float, Trajectory]:
    """Seconds that an analysis from nothing takes, and its result."""
    shutil.rmtree(run / layout.ANALYSIS_FOLDER, ignore_errors=True)
    began = time.perf_counter()
    trajectory = groktrace.analyze(run, executor=executor)
    return time.perf_counter() - began, trajectory


def warm(executor: Executor, spec: EvaluatorSpec) -> None:
    """Let both processes read what they need."""
    for _ in range(3):
        list(executor.map(evaluate_elsewhere, [spec] * 8, [WorkItem("metrics", (), ())] * 8))


@contextlib.contextmanager
def local_cluster() -> Iterator[Executor]:
    """A Dask cluster of two processes."""
    from distributed import LocalCluster

    with (
        LocalCluster(2, threads_per_worker=1, dashboard_address=None) as cluster,
        dask_executor(cluster.scheduler_address) as executor,
    ):
        yield executor


def measure_workers(folder: Path, settings: Settings) -> None:
    """Two processes against one, and what an empty task costs."""
    torch.set_num_threads(2)  # two processes then take one each
    store = Store(folder, "workers", vars(settings))
    run = record(folder, settings.snapshots - 1, 20)
    with open_session(run, SamplingSettings(), device="cpu", persist=False) as session:
        chosen, identity = session.objective.settings, session.evaluator.identity
        spec = EvaluatorSpec(str(run.absolute()), None, chosen, "cpu", session.steps[0], identity)

    def one_round(number: int) -> dict[str, float]:
        found: dict[str, float] = {}
        results = {}
        torch.set_num_threads(1)
        found["1 process"], results["1 process"] = time_analysis(run, None)
        torch.set_num_threads(2)
        pools = {"2 processes": process_pool(2), "2 Dask workers": local_cluster()}
        for name, pool in pools.items():
            began = time.perf_counter()
            with pool as given:
                executor = given[0] if isinstance(given, tuple) else given
                warm(executor, spec)
                found[f"{name}, start"] = time.perf_counter() - began
                found[name], results[name] = time_analysis(run, executor)
                began = time.perf_counter()
                for _ in range(settings.tasks):
                    executor.submit(evaluate_elsewhere, spec, WorkItem("metrics", (), ())).result()
                found[f"{name}, task"] = (time.perf_counter() - began) / settings.tasks
            if results[name] != results["1 process"]:
                raise SystemExit(f"{name}: the result is another")
        return found

    rounds = [store.cached(f"round {r}", one_round, r) for r in range(settings.rounds)]
    column = {name: [taken[name] for taken in rounds] for name in rounds[0]}
    rows: list[Row] = []
    for name in ("2 processes", "2 Dask workers"):
        speedups = [one / two for one, two in zip(column["1 process"], column[name], strict=True)]
        rows.append(
            {
                "workers": name,
                "1 process, s": spread(column["1 process"]),
                "these, s": spread(column[name]),
                "speed-up": spread(speedups),
                "start, s": spread(column[f"{name}, start"]),
                "a task, ms": spread(column[f"{name}, task"], 1000),
            }
        )
    speedup = statistics.median(a / b for a, b in zip(column["1 process"], column["2 processes"], strict=True))
    store.finish("Many workers", rows, [Verdict("2 processes against 1", speedup, limit=1.6)])


def measure_adaptive(folder: Path, settings: Settings) -> None:
    """All snapshots of long runs, and a tenth of them."""
    torch.set_num_threads(1)
    store = Store(folder, "adaptive", vars(settings))
    rows: list[Row] = []
    bars: list[Verdict] = []
    for snapshots, every in settings.long:
        run = record(folder, snapshots - 1, every)

        def both(run: Path) -> dict[str, Any]:
            """A tenth from nothing, then all; the latter takes what is there already as it is."""
            shutil.rmtree(run / layout.ANALYSIS_FOLDER, ignore_errors=True)
            began = time.perf_counter()
            some = groktrace.analyze(run, adaptive=True)
            between = time.perf_counter()
            full = groktrace.analyze(run)
            seconds = between - began, time.perf_counter() - between
            points = {point.step: point for point in full.points}
            if any(points[point.step] != point for point in some.points):
                raise SystemExit("a sampled point is another than in the full replay")
            return {"some": some.to_dict(), "full": full.to_dict(), "seconds": seconds, "shifted": shifted(full)}

        found = store.cached(f"{snapshots} snapshots, every {every}", both, run)
        full, some = (load(found[name], folder) for name in ("full", "some"))
        share = len(some.points) / len(full.points)
        theirs, ours = groktrace.find_transitions(full), groktrace.find_transitions(some)
        same = [transition.kind for transition in ours] == [transition.kind for transition in theirs]
        apart = (
            max((abs(a.step - b.step) / every for a, b in zip(ours, theirs, strict=True)), default=0.0)
            if same
            else None
        )
        for a, b in zip(ours, theirs, strict=False):
            rows.append(
                {
                    "run": f"{snapshots} snapshots, every {every}",
                    "transition": b.name,
                    "all": f"{b.step} [{b.step_low}, {b.step_high}]",
                    "adaptive": f"{a.step} [{a.step_low}, {a.step_high}]",
                    "snapshots apart": f"{abs(a.step - b.step) / every:.1f}",
                    "sampled": f"{100 * share:.1f} %",
                    "time": f"{100 * found['seconds'][0] / found['seconds'][1]:.0f} %",
                }
            )
        bars += [
            Verdict(f"every {every}: share sampled", 100 * share, limit=10.0, at_least=False, unit="%"),
            Verdict(f"every {every}: transitions apart", apart, limit=1.0, at_least=False, unit="snapshots"),
        ]
        print(f"every {every}: adaptive on the run less its first 1, 2, ... snapshots: {found['shifted']}")
    store.finish("Adaptive replay", rows, bars)


def shifted(full: Trajectory, shifts: int = 8) -> list[list[int]]:
    """Steps of the transitions that adaptive replay finds when it begins some snapshots later: how they scatter."""
    points = {point.step: point for point in full.points}
    found = []
    for shift in range(1, shifts + 1):
        steps = sorted(points)[shift:]
        chosen = sample_adaptively(
            steps, lambda wanted: {step: points[step] for step in wanted}, lambda done, total: None, full.n
        )
        trajectory = Trajectory(tuple(chosen[step] for step in sorted(chosen)), n=full.n)
        found.append([transition.step for transition in groktrace.find_transitions(trajectory)])
    return found


def load(plain: dict[str, Any], folder: Path) -> Trajectory:
    """A trajectory from its JSON."""
    path = folder / "trajectory.json"
    write_json(path, plain)
    return Trajectory.load(path)


PARTS = {"workers": measure_workers, "adaptive": measure_adaptive}

if __name__ == "__main__":
    options = command_line(__doc__, PARTS, "runs/speed/many_snapshots").parse_args()
    run_parts(PARTS, options.part, options.out, TINY if options.tiny else Settings())
