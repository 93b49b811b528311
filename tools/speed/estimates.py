"""Time and memory of LLC estimates: every figure beside a peer timed in the same process.

    python -m tools.speed.estimates all
    python -m tools.speed.estimates verdicts

`trajectory`, `step`, `training` and `memory` run one part. Each prints a table and leaves it, with every single
measurement, under runs/speed/estimates; what is finished there is not measured again. devinterp's rows need devinterp
1.3.2.
"""

import copy
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import groktrace
from groktrace.run import layout
from groktrace.sampling import stack as stack_module
from groktrace.sampling.calibration import resolve
from groktrace.sampling.chains import rows_per_stack, sample
from groktrace.sampling.posterior import StackedLoss
from groktrace.sampling.settings import SamplingSettings
from groktrace.sampling.tuning import MEMORY
from tools.common.measurements import (
    Row,
    Store,
    Verdict,
    command_line,
    in_turn,
    peak_bytes,
    ratios,
    run_parts,
    say,
    seconds_a_step,
    spread,
)
from tools.common.networks import (
    EXAMPLE,
    Pairs,
    language_model,
    modular_network,
    modular_transformer,
    sequence_cross_entropy,
    size,
    stack,
    stacked_loss,
)
from tools.common.peers import Devinterp, FusedKernel, devinterp_version, has_devinterp, training_steps
from tools.speed.trajectory import TrajectoryBenchmark, TrajectorySettings

# The sampler's cost does not depend on these; they keep the chains where they start.
SCALE = {"nbeta": 10.0, "localization": 100.0}
STEP_SIZE = 1e-6
CHAINS = 2
MIB = 2**20


@dataclass(frozen=True)
class Settings:
    """What `all` measures.

    Attributes:
        trajectory: of the reference trajectory.
        rounds: repetitions of the other parts.
        small_steps, large_steps: steps timed at p = 23, K = 128 and at p = 53, K = 1024.
        transformer_batch, transformer_samples, transformer_steps: of the small transformer.
        language_batch, language_samples, language_steps, language_rounds: of the large one.
        memory_snapshots: recorded and analysed.
    """

    trajectory: TrajectorySettings = field(default_factory=TrajectorySettings)
    rounds: int = 5
    small_steps: int = 400
    large_steps: int = 60
    transformer_batch: int = 512
    transformer_samples: int = 2048
    transformer_steps: int = 20
    language_batch: int = 8
    language_samples: int = 32
    language_steps: int = 10
    language_rounds: int = 3
    memory_snapshots: int = 1000


FULL = Settings()
TINY = Settings(
    TrajectorySettings(
        training_steps=600,
        rounds=2,
        reference=(2, 40, 80),
        quick=((1, 6, 6), (1, 20, 30)),
        lrs=(1e-4, 4e-4),
        peer_run=(2, 5, 10),
        peer_snapshots=2,
    ),
    rounds=2,
    small_steps=20,
    large_steps=3,
    transformer_batch=64,
    transformer_samples=128,
    transformer_steps=3,
    language_batch=2,
    language_samples=4,
    language_steps=1,
    language_rounds=1,
    memory_snapshots=6,
)


def sampler(loss: StackedLoss, anchors: Tensor, chains: int, **settings: Any) -> Callable[[int], Any]:
    """A function that makes a number of groktrace's steps with all chains of some snapshots.

    Without the Hessian's products that chains start from, and those that chains out of equilibrium call for afterwards:
    of a large network they take as long as dozens of steps.
    """

    def anywhere(loss: Any, anchors: Any, at_anchors: Any, start: Tensor, *scale: Any) -> tuple[Tensor, Tensor]:
        return start.mul_(0.1 * SCALE["localization"] ** -0.5), torch.zeros(len(start), dtype=torch.bool)

    def run(steps: int) -> None:
        given = {**SCALE, "step_size": STEP_SIZE, "chains": chains, "burn_in": 0, "draws": steps, **settings}
        chosen = resolve(SamplingSettings(**given), loss.layout.size, stacked=True)
        keys, sizes = range(len(anchors)), [STEP_SIZE] * len(anchors)
        with (
            mock.patch.object(stack_module, "gaussian_start", anywhere),
            mock.patch.object(stack_module, "top_eigenvalue", lambda loss, anchors, *_: torch.zeros(len(anchors))),
        ):
            traces = sample(loss, anchors, keys, chosen, SCALE["nbeta"], SCALE["localization"], sizes, lambda _: 1.0)
        if any(trace.diverged(loss.layout.size) for trace in traces):
            raise SystemExit("the chains left, and made fewer steps than were asked for")

    return run


def fused(anchors: Tensor, data: Pairs, width: int, chains: int, **settings: Any) -> FusedKernel:
    """The same by hand, with as many rows."""
    rows = anchors.repeat_interleave(chains, 0)
    return FusedKernel(rows, data, width, step_size=STEP_SIZE, **SCALE, **settings)


def bench_step(folder: Path, settings: Settings) -> None:
    """Time of one step of one chain: ours, by hand, and devinterp's."""
    store = Store(folder, "step", {**_plain(settings), "peer": devinterp_version()})
    rows, bars = [], []
    cases = (
        ("full batch", 23, 128, None, "baoab", settings.small_steps),
        ("batch 128", 53, 1024, 128, "sgld", settings.large_steps),
        ("batch 128, control variate", 53, 1024, 128, "baoab", settings.large_steps),
    )
    for label, p, width, batch_size, method, steps in cases:
        name = f"p = {p}, K = {width}, {label}"
        times = _step_case(store, name, settings.rounds, p, width, batch_size, method, steps)
        stacked = store.content[f"{name}, rows"]
        for contender, values in times.items():
            rows.append(
                {
                    "network": name,
                    "method": contender,
                    "rows stacked": str(stacked if contender in ("groktrace", "fused by hand") else 1),
                    "ms a chain-step": spread(values, 1e3),
                    "time / groktrace's": spread(ratios(values, times["groktrace"])),
                }
            )
        bars += _step_bars(name, times, {23: 8.0, 53: 2.0}[p])
    notes = [
        f"Median (min–max) of {settings.rounds} rounds, contenders in turn; what comes before the steps taken off."
    ]
    if not has_devinterp():
        notes.append("devinterp is not installed; its rows are left out.")
    store.finish("One step of one chain", rows, bars, notes)


def _step_case(
    store: Store, name: str, rounds: int, p: int, width: int, batch_size: int | None, method: str, steps: int
) -> dict[str, list[float]]:
    model, data, _ = modular_network(p, width)
    loss, weights = stacked_loss(model, EXAMPLE.centred_loss, data)
    snapshots = max(1, rows_per_stack(loss, batch_size) // CHAINS)
    rows = store.cached(f"{name}, rows", lambda: snapshots * CHAINS)
    loss, anchors = stack(loss, weights, snapshots)
    ours = sampler(loss, anchors, CHAINS, method=method, batch_size=batch_size)
    by_hand = fused(anchors, data, width, CHAINS, method=method, batch_size=batch_size)
    by_hand.check(loss.gradients(anchors)[1].repeat_interleave(CHAINS, 0))
    contenders = {
        "groktrace": lambda r: seconds_a_step(ours, steps) / rows,
        "fused by hand": lambda r: seconds_a_step(by_hand.run, steps) / rows,
    }
    if has_devinterp():
        for gathered in (False, True):
            peer = Devinterp(data, SCALE["nbeta"], SCALE["localization"], STEP_SIZE, batch_size, gathered)
            peer.llc(model, 1, 0, 2, seed=0)
            contender = "devinterp, batches gathered at once" if gathered else "devinterp"
            contenders[contender] = lambda r, peer=peer: seconds_a_step(
                lambda draws: peer.llc(model, 1, 0, draws, seed=r), steps
            )
    # What is imported or compiled at first use is not timed.
    ours(2)
    by_hand.run(2)
    return in_turn(store, name, contenders, rounds)


def _step_bars(name: str, times: dict[str, list[float]], limit: float) -> list[Verdict]:
    found = _median(times, "groktrace", "fused by hand")
    bars = [Verdict(f"step, {name}: ours / fused by hand", found, limit=1.4, at_least=False)]
    for peer in ("devinterp", "devinterp, batches gathered at once"):
        found = _median(times, peer, "groktrace") if peer in times else None
        bars.append(Verdict(f"step, {name}: {peer} / ours", found, limit=limit))
    return bars


def _median(times: dict[str, list[float]], name: str, other: str) -> float:
    return statistics.median(ratios(times[name], times[other]))


def bench_training(folder: Path, settings: Settings) -> None:
    """One step of one chain beside one training step on a batch of the same size."""
    store = Store(folder, "training", _plain(settings))
    transformer = (settings.transformer_batch, settings.transformer_steps, settings.rounds)
    language = (settings.language_batch, settings.language_steps, settings.language_rounds)
    cases = (
        ("transformer, p = 113", *modular_transformer(settings.transformer_samples), "cross_entropy", transformer),
        ("GPT-like, 4 blocks", *language_model(settings.language_samples), sequence_cross_entropy, language),
    )
    rows: list[Row] = []
    bars: list[Verdict] = []
    for label, model, data, loss, (batch_size, steps, rounds) in cases:
        name = f"{label}, {size(model):,} weights, batch {batch_size}"
        times = _training_case(store, name, rounds, model, data, loss, batch_size, steps)
        for contender, values in times.items():
            rows.append(
                {
                    "network": name,
                    "step": contender,
                    "ms": spread(values, 1e3),
                    "time / training's": spread(ratios(values, times["AdamW"])),
                }
            )
            if contender != "AdamW":
                limit = 2.2 if "control" in contender else 1.3
                found = _median(times, contender, "AdamW")
                claim = f"training, {name}: {contender} / AdamW"
                bars.append(Verdict(claim, found, limit=limit, at_least=False))
    notes = [
        f"Median (min–max) of {settings.rounds} and {settings.language_rounds} rounds, contenders in turn.",
        f"Training is forward, backward and AdamW over all tensors at once; ours is one chain of {CHAINS} that are "
        "stacked.",
    ]
    store.finish("A step of a chain beside a training step", rows, bars, notes)


def _training_case(
    store: Store,
    name: str,
    rounds: int,
    model: nn.Module,
    data: Pairs,
    loss: Callable[[Tensor, Tensor], Tensor] | str,
    batch_size: int,
    steps: int,
) -> dict[str, list[float]]:
    batch = (data[0][:batch_size], data[1][:batch_size])
    criterion = nn.functional.cross_entropy if isinstance(loss, str) else loss
    train = training_steps(copy.deepcopy(model), criterion, batch)
    whole, weights = stacked_loss(model, loss, data)
    alone, _ = stacked_loss(model, loss, batch)
    runs = {
        "ours, all samples": sampler(*stack(alone, weights, 1), CHAINS),
        "ours, minibatch (sgld)": sampler(*stack(whole, weights, 1), CHAINS, method="sgld", batch_size=batch_size),
        "ours, minibatch and control variate": sampler(*stack(whole, weights, 1), CHAINS, batch_size=batch_size),
    }
    contenders: dict[str, Callable[[int], float]] = {"AdamW": lambda r: seconds_a_step(train, CHAINS * steps)}
    for contender, run in runs.items():
        contenders[contender] = lambda r, run=run: seconds_a_step(run, steps) / CHAINS
        run(2)
    train(2)
    return in_turn(store, name, contenders, rounds)


def bench_memory(folder: Path, settings: Settings) -> None:
    """Peak memory of an analysis of many snapshots of the network at p = 53, K = 1024."""
    store = Store(folder, "memory", _plain(settings))
    found = store.cached("peak", _measure_memory, folder / "memory_run", settings.memory_snapshots)
    budget = MEMORY.stack_bytes
    row = {
        "snapshots": str(settings.memory_snapshots),
        "memory after import": f"{found['imported'] / MIB:.0f} MiB",
        "peak": f"{found['peak'] / MIB:.0f} MiB",
        "working-set budget": f"{budget / MIB:.0f} MiB",
        "seconds": f"{found['seconds']:.0f}",
    }
    limit = budget / MIB + 1024
    claim = "memory: peak resident size (budget + 1 GiB)"
    bar = Verdict(claim, round(found["peak"] / MIB), limit=limit, at_least=False, unit="MiB")
    notes = ["Resident memory of a fresh process; one chain and four draws a snapshot, curvature included."]
    store.finish("Memory, p = 53, K = 1024", [row], [bar], notes)


def _measure_memory(root: Path, snapshots: int) -> dict[str, float]:
    shutil.rmtree(root, ignore_errors=True)
    _record_many(root, snapshots)
    try:
        command = [sys.executable, "-m", __spec__.name, "memory-worker", "--run", str(root)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    return json.loads(done.stdout.splitlines()[-1])


def _record_many(root: Path, snapshots: int) -> None:
    """Snapshots of one network, each a little off the last."""
    say(f"memory: recording {snapshots} snapshots")
    model, data, _ = modular_network(53, 1024)
    generator = torch.Generator().manual_seed(0)
    with groktrace.watch(model, train=data, loss=EXAMPLE.centred_loss, out=root, every=1) as recorder, torch.no_grad():
        for _ in range(snapshots - 1):
            for parameter in model.parameters():
                parameter.mul_(1 + 1e-3 * torch.randn(parameter.shape, generator=generator))
            recorder.step()


def measure_own_memory(root: Path) -> None:
    """Analyse a run with few draws; print this process's memory before and at its peak as JSON."""
    imported = peak_bytes()
    start = time.perf_counter()
    found = groktrace.analyze(root, device="cpu", chains=1, burn_in=0, draws=4)
    seconds = time.perf_counter() - start
    expected = len(list((root / layout.WEIGHTS_FOLDER).glob("*.safetensors")))
    if len(found.points) != expected:
        raise RuntimeError(f"{root}: expected {expected} points, got {len(found.points)}.")
    print(json.dumps({"imported": imported, "peak": peak_bytes(), "seconds": seconds}))


def bench_trajectory(folder: Path, settings: Settings) -> None:
    """The reference trajectory."""
    TrajectoryBenchmark(folder, settings.trajectory).measure()


PARTS = {"trajectory": bench_trajectory, "step": bench_step, "training": bench_training, "memory": bench_memory}


def _plain(settings: Settings) -> dict[str, Any]:
    """All settings but the trajectory's."""
    return {name: value for name, value in asdict(settings).items() if name != "trajectory"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one part, or all."""
    parser = command_line(__doc__.splitlines()[0], PARTS, "runs/speed/estimates")
    parser.add_argument("--run", type=Path, help="run directory that memory-worker analyses")
    options = parser.parse_args(arguments)
    if options.part == "memory-worker":
        return measure_own_memory(options.run)
    settings = TINY if options.tiny else FULL
    if options.rounds:
        trajectory = replace(settings.trajectory, rounds=options.rounds)
        settings = replace(settings, rounds=options.rounds, language_rounds=options.rounds, trajectory=trajectory)
    if options.part != "verdicts" and not has_devinterp():
        say("devinterp is not installed (pip install devinterp==1.3.2); its rows are left out")
    return run_parts(PARTS, options.part, options.out, settings)


if __name__ == "__main__":
    main()
