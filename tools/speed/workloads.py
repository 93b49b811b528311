"""Networks that people bring, as they were recorded: time a snapshot, and error, beside devinterp.

    python -m tools.speed.workloads RUN...            # three snapshots of each run; about ten minutes a run
    python -m tools.speed.workloads --growth RUN...   # the time with the data 1, 4, 16, 64 times as many
    python -m tools.speed.workloads --whole RUN...    # the whole analysis with no option, beside what `forecast` says
    python -m tools.speed.workloads --busy RUN...     # its time idle, and beside a busy process on each core

Each RUN is a run directory. Snapshots are measured at the settings that the analysis finds, on one thread; the error is
that of λ_c beside a chain of many more draws at half the step, on all stored samples, in batches twice as large (of few
samples, all at once), at the same nβ and γ, in the root mean square over six seeds. devinterp is called as its
documentation says, at four chains of 100 + 200 steps on batches of 32, at the same nβ and γ; its error is that of λ̂
beside the same long chain's, over three seeds. Times are of the processor, in the mean over these seeds. A run's last
row has the snapshots' seconds in all, and the root mean square of their errors.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from groktrace.analysis.measurement.llc import LLCEstimate
from groktrace.analysis.measurement.measure import Objective, SnapshotMetrics
from groktrace.analysis.measurement.pilot import choose_sampling
from groktrace.analysis.running.passes import spread
from groktrace.analysis.running.setup import run_layout
from groktrace.analysis.tuning import PASSES
from groktrace.run.store import Run, open_run
from groktrace.sampling.calibration import Scale, step_size
from groktrace.sampling.network import as_float
from groktrace.sampling.settings import SamplingSettings
from tools.common.measurements import Row, markdown, peak_bytes
from tools.common.peers import devinterp_llc, has_devinterp

CHAINS, BURN_IN, DRAWS, BATCH = 4, 100, 200, 32
LR = 1e-4
MEASURED = (1.0, 0.75, 0.5)  # which snapshots, as shares of the run
LONG_DRAWS = 600
LONG_WHOLE = 1024  # up to so many stored samples the long chain takes all at once
SEEDS, PEER_SEEDS = 6, 3


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """A result, and the processor seconds that it took."""
    start = time.process_time()
    return function(), time.process_time() - start


def show(row: Row) -> Row:
    """Print a row when it is measured; the row."""
    print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return row


class Recorded(nn.Module):
    """A recorded network with the weights of one snapshot, as a module whose output is its loss."""

    def __init__(self, objective: Objective, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self._task, self._names = objective.task, objective.layout.names
        self._fixed = {name: as_float(tensor) for name, tensor in weights.items() if name not in self._names}
        self.weights = nn.ParameterList(nn.Parameter(as_float(weights[name]).clone()) for name in self._names)

    def forward(self, *tensors: Tensor) -> Tensor:
        """The mean loss of a batch."""
        named = dict(zip(self._names, self.weights, strict=True))
        return self._task.forward(named | self._fixed, tensors)[0]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Recorded":
        twin = object.__new__(Recorded)
        nn.Module.__init__(twin)
        twin._task, twin._names, twin._fixed = self._task, self._names, self._fixed
        twin.weights = nn.ParameterList(nn.Parameter(weight.detach().clone()) for weight in self.weights)
        return twin


def by_devinterp(
    objective: Objective, weights: dict[str, Tensor], estimate: LLCEstimate, loss: float, seed: int
) -> float:
    """λ̂ by devinterp's SGLD; NaN where a chain diverged."""
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(TensorDataset(*objective.task.train.tensors), BATCH, shuffle=True, generator=generator)
    scale = {"lr": LR, "nbeta": estimate.nbeta, "localization": estimate.localization}
    model, lengths = Recorded(objective, weights), (CHAINS, BURN_IN, DRAWS)
    return devinterp_llc(model, loader, lambda network, batch: network(*batch), scale, loss, lengths, seed)


class Bench:
    """One recorded run at the settings that its analysis finds.

    Args:
        run: opened.
    """

    def __init__(self, run: Run) -> None:
        self.snapshots = {snapshot.step: snapshot for snapshot in run.snapshots}
        self.steps = list(self.snapshots)
        first = self.snapshots[self.steps[0]].load()
        self.objective = Objective.of(run.task, run_layout(run, None), SamplingSettings(), first, torch.device("cpu"))
        coarse = [self.metrics(self.steps[i]) for i in spread(self.steps, PASSES.coarse)]
        self.scale, self.pilot = timed(lambda: choose_sampling(self.objective, self.load, coarse))

    def load(self, step: int) -> dict[str, Tensor]:
        """A snapshot's tensors."""
        return self.snapshots[step].load()

    def metrics(self, step: int) -> SnapshotMetrics:
        """Losses and curvature of a snapshot."""
        return self.objective.metrics([self.load(step)], [step])[0]

    def estimate(self, metrics: SnapshotMetrics, scale: Scale | None = None, **settings: Any) -> LLCEstimate:
        """λ̂ of a snapshot; by default as the analysis estimates it."""
        objective = replace(self.objective, settings=replace(self.objective.settings, **settings))
        return objective.estimate([self.load(metrics.step)], [metrics], scale or self.scale)[0]

    def snapshot(self, step: int) -> tuple[SnapshotMetrics, list[LLCEstimate], float]:
        """All that the analysis measures of a snapshot, by some seeds, and the seconds that it takes in the mean.

        Gradients are recorded already, as they are after the first snapshot of an analysis.
        """

        def whole(seed: int) -> tuple[SnapshotMetrics, LLCEstimate]:
            metrics = self.metrics(step)
            return metrics, self.estimate(metrics, seed=seed)

        metrics, _ = whole(0)
        found = [timed(partial(whole, seed)) for seed in range(SEEDS)]
        return metrics, [estimate for (_, estimate), _ in found], statistics.mean(seconds for _, seconds in found)

    def long(self, metrics: SnapshotMetrics) -> LLCEstimate:
        """The same from many more draws, at half the step, on all stored samples and with larger batches."""
        scale, top = self.scale, self.scale.curvature or metrics.top_curvature
        size = 0.5 * step_size(scale.nbeta, scale.localization, top)
        if scale.samples is not None:
            stored = len(self.objective.loss.tensors[0])
            batch = None if scale.batch_size is None or stored <= LONG_WHOLE else min(2 * scale.batch_size, stored)
            samples = stored if batch is None else stored - stored % batch
            scale = scale._replace(samples=samples, batch_size=batch)
        return self.estimate(metrics, scale, step_size=size, draws=LONG_DRAWS, seed=1)


def measure(path: Path) -> list[Row]:
    """Rows of one run: time and error of some snapshots, and of all of these."""
    bench = Bench(open_run(path))
    rows, times, errors = [], [], []
    for share in MEASURED:
        step = bench.steps[round(share * (len(bench.steps) - 1))]
        metrics, (ours, *others), seconds = bench.snapshot(step)
        exact = bench.long(metrics)
        error = _error([found.llc_centred for found in (ours, *others)], exact.llc_centred)
        row = {
            "run": path.name,
            "step": str(step),
            "seconds": f"{seconds:.2f}",
            "λ_c": _number(ours.llc_centred),
            "long λ_c": _number(exact.llc_centred),
            "error": _percent(error),
            "λ̂": _number(ours.llc),
            "long λ̂": _number(exact.llc),
            "samples, batch": f"{bench.scale.samples or 'all'}, {bench.scale.batch_size or 'all'}",
            "locality": f"{bench.scale.locality:g}",
        }
        taken, their_error = math.nan, math.nan
        if has_devinterp():
            weights = bench.load(step)
            run = partial(by_devinterp, bench.objective, weights, ours, metrics.train_loss)
            theirs = [timed(partial(run, 0))]
            theirs += [timed(partial(run, seed)) for seed in range(1, PEER_SEEDS) if math.isfinite(theirs[0][0])]
            taken = statistics.mean(seconds for _, seconds in theirs)
            their_error = _error([value for value, _ in theirs], exact.llc)
            row |= {"devinterp": f"{taken:.1f}", "its λ̂": _number(theirs[0][0]), "its error": _percent(their_error)}
            row["times"] = f"{taken / seconds:.1f}"
        times.append((seconds, taken))
        errors.append((error, their_error))
        rows.append(show(row))
    (seconds, taken), (error, their_error) = map(sum, zip(*times, strict=True)), map(_rms, zip(*errors, strict=True))
    row = dict.fromkeys(rows[0], "") | {"run": path.name, "step": "all", "seconds": f"{seconds:.2f}"}
    row["error"] = _percent(error)
    if has_devinterp():
        row |= {"devinterp": f"{taken:.1f}", "its error": _percent(their_error), "times": f"{taken / seconds:.1f}"}
    return [*rows, show(row)]


def grow(path: Path) -> list[Row]:
    """Rows of one run: time of its last snapshot with the data so many times as many."""
    run = open_run(path)
    rows = []
    for times in (1, 4, 16, 64):
        bench = Bench(run) if times == 1 else Bench(_grown(run, times))
        step = bench.steps[-1]
        *_, seconds = bench.snapshot(step)
        rows.append(show({"run": path.name, "times": str(times), "seconds": f"{seconds:.2f}"}))
    return rows


def analyse(path: Path) -> list[Row]:
    """One row: seconds by the clock until the first curve stands and until all is done, beside what was forecast."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(shutil.copytree(path, Path(folder) / path.name, ignore=shutil.ignore_patterns("analysis")))
        command = [sys.executable, "-m", "groktrace"]
        start = time.monotonic()
        forecast = subprocess.run([*command, "forecast", str(run), "--json"], capture_output=True, check=True)
        said = json.loads(forecast.stdout)
        forecasting, start, first, memory = time.monotonic() - start, time.monotonic(), math.nan, 0
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with subprocess.Popen([*command, "analyze", str(run)], **silent) as process:
            while process.poll() is None:
                time.sleep(0.1)
                memory = max(memory, peak_bytes(process.pid))
                if math.isnan(first) and any(run.glob("analysis/*/trajectory.json")):
                    first = time.monotonic() - start
        taken = time.monotonic() - start
        sampled = len(next(run.glob("analysis/*/points.jsonl")).read_text().splitlines())
    row = {"run": path.name, "snapshots": f"{sampled} of {said['snapshots']}", "first curve": f"{first:.0f} s"}
    row |= {"all": f"{taken:.0f} s", "forecast": f"{said['seconds']:.0f} s", "forecasting": f"{forecasting:.0f} s"}
    row["memory"] = f"{memory / 2**20:.0f} MiB"
    return [show(row)]


def crowd(path: Path) -> list[Row]:
    """One row: seconds of the whole analysis on an idle machine, and beside a busy process on each core."""
    seconds = []
    for count in (0, os.cpu_count() or 1):
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
        try:
            with tempfile.TemporaryDirectory() as folder:
                run = shutil.copytree(path, Path(folder) / path.name, ignore=shutil.ignore_patterns("analysis"))
                start = time.monotonic()
                command = [sys.executable, "-m", "groktrace", "analyze", str(run)]
                subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
                seconds.append(time.monotonic() - start)
        finally:
            for process in busy:
                process.kill()
                process.wait()
    idle, crowded = seconds
    row = {"run": path.name, "idle": f"{idle:.1f} s", "busy": f"{crowded:.1f} s", "times": f"{crowded / idle:.2f}"}
    return [show(row)]


def _grown(run: Run, times: int) -> Run:
    """The run with each sample so many times; what is stored of a large set is 8192 at most."""
    task = run.task
    tensors = tuple(tensor.repeat(times, *[1] * (tensor.ndim - 1))[:8192] for tensor in task.train.tensors)
    twin = replace(run)
    vars(twin)["task"] = replace(task, train=replace(task.train, tensors=tensors), n=times * task.n)
    return twin


def _number(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.4g}"


def _error(values: Sequence[float | None], exact: float | None) -> float:
    """The root mean square of relative errors; values of chains that diverged have none. NaN where nothing is known."""
    found = [value for value in values if value is not None and math.isfinite(value)]
    if not found or exact is None or not math.isfinite(exact) or not exact:
        return math.nan
    return _rms([value / exact - 1 for value in found])


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(statistics.mean(value**2 for value in values))


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.1f} %"


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--growth", dest="part", action="store_const", const=grow, default=measure)
    kind.add_argument("--whole", dest="part", action="store_const", const=analyse)
    kind.add_argument("--busy", dest="part", action="store_const", const=crowd)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for path in options.runs for row in options.part(path)]
    print(markdown(rows))


if __name__ == "__main__":
    main()
