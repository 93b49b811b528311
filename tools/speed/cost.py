"""What an analysis costs: growth with weights, data and snapshots, and large networks.

    python -m tools.speed.cost all

`growth` and `large` run one part. Each prints a table and leaves it, with every single measurement, under
runs/speed/cost; what is finished there is not measured again. Times are processor seconds of one thread, which do not
count what other programs on the machine take.
"""

import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import groktrace
from groktrace.analysis.measurement.measure import Objective, stack_weights
from groktrace.analysis.running.setup import weight_layout
from groktrace.run.task import Task
from groktrace.sampling.calibration import Scale, resolve, run_length, step_size
from groktrace.sampling.engine import Target
from groktrace.sampling.large import sample_large
from groktrace.sampling.posterior import StackedLoss
from groktrace.sampling.settings import ResolvedSettings, SamplingSettings
from groktrace.sampling.stack import StackedChains
from groktrace.sampling.traces import SampleLossRecorder
from groktrace.sampling.tuning import CALIBRATION, MINIBATCH_NOISE
from tools.common.measurements import Row, Store, Verdict, command_line, peak_bytes, run_parts, say
from tools.common.networks import Transformer, record_training, sequence_cross_entropy, size

MIB = 2**20
# The sampler's cost does not depend on these; they keep the chains where they start.
FIXED = {"nbeta": 10.0, "localization": 1e4, "step_size": 1e-6, "burn_in": 0}
CHAINS = 2
# For which the steps of a stack are timed, or so many of them.
SECONDS = 20.0
TIMED_STEPS = 80
# Of a snapshot whose curvature is typical, at the default resolution: stacked, and alone.
_EPSILON = step_size(CALIBRATION.resolution, 1.0, 1.0)
STEPS = sum(run_length(ResolvedSettings(method="baoab", chains=CHAINS), 1.0, _EPSILON))
_LARGE = ResolvedSettings(method="leimkuhler_matthews", chains=CHAINS)
STEPS_LARGE = sum(run_length(_LARGE, 1.0, _EPSILON, cold=True))


@dataclass(frozen=True)
class Settings:
    """What `all` measures.

    Attributes:
        weights: of the networks whose cost is measured, about.
        samples: of their data.
        steps: of each chain of a network that goes alone.
        data: numbers of samples, at a hundred thousand weights.
        snapshots: of a run of ten thousand weights.
        language: vocabulary, length, width, heads, blocks and sequences of the large language model.
        large_steps: of its chain, and of its training.
    """

    weights: tuple[int, ...] = (10**4, 10**5, 10**6, 10**7, 10**8)
    samples: int = 32
    steps: int = 2
    data: tuple[int, ...] = (32, 128, 512, 2048)
    snapshots: tuple[int, ...] = (4, 16, 64)
    language: tuple[int, ...] = (50257, 128, 768, 12, 12, 2)
    large_steps: int = 1


FULL = Settings()
TINY = Settings((10**4, 10**5), 16, 2, (16, 64), (2, 6), (64, 8, 32, 2, 2, 4), 1)


def perceptron(weights: int, inputs: int = 64, classes: int = 10) -> nn.Module:
    """Two square layers between a first and a last; about so many weights."""
    narrow = inputs + classes
    width = round((math.sqrt(narrow**2 + 8 * weights) - narrow) / 4)
    layers = [nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(width, classes))


def labelled(samples: int, inputs: int = 64, classes: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """Random inputs and classes."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(samples, inputs, generator=generator), torch.randint(classes, (samples,), generator=generator)


def cost_of_snapshot(weights: int, samples: int, steps: int) -> dict[str, float]:
    """Seconds of losses and curvature, and of one step of one chain, for one network."""
    torch.manual_seed(0)
    model = perceptron(weights)
    task = Task.from_model(model, loss="cross_entropy", train=labelled(samples))
    named = {name: parameter.detach() for name, parameter in model.named_parameters()}
    sampled = weight_layout({name: (tuple(w.shape), w.dtype, True) for name, w in named.items()})
    start = time.process_time()
    objective = Objective.of(task, sampled, SamplingSettings(chains=CHAINS), named, torch.device("cpu"))
    probed = time.process_time() - start
    start = time.process_time()
    metrics = objective.metrics([named], [0])
    measured = time.process_time() - start
    alone = objective.loss.micro_batch is not None
    if alone:

        def run(draws: int) -> float:
            start = time.process_time()
            short = replace(objective, settings=replace(objective.settings, **FIXED, draws=draws))
            short.estimate([named], metrics, Scale(FIXED["nbeta"], FIXED["localization"]))
            return time.process_time() - start

        few = run(2)
        step = (run(2 + steps) - few) / (steps * CHAINS)
        before = max(few - 2 * CHAINS * step, 0.0)
    else:
        stacked, anchors = stack_weights(objective.loss, [named])
        step, before = time_steps(stacked, anchors, objective.settings)
        step /= CHAINS
    total = measured + before + CHAINS * (STEPS_LARGE if alone else STEPS) * step
    return {
        "weights": sampled.size,
        "probe": probed,
        "losses, curvature": measured,
        "before": before,
        "step": step,
        "alone": alone,
        "snapshot": total,
        "flops": 6 * sampled.size * samples / step,
    }


def time_steps(loss: StackedLoss, anchors: Tensor, settings: ResolvedSettings) -> tuple[float, float]:
    """Processor time of a stack's steps.

    Args:
        loss: of S rows.
        anchors: w* of each snapshot, [S, D].
        settings: of the sampling.

    Returns:
        Seconds that one step takes, and all that comes before the first.
    """
    count = len(anchors)
    target = Target(settings, 1.0, 1e6, anchors.shape[1], loss.sample_bytes is not None)

    def begin() -> StackedChains:
        return StackedChains(loss, anchors, range(count), target, [1e-12] * count, [0] * count, [1e-12] * count)

    begin().advance([(0, 1)] * count)  # records the gradient
    start = time.process_time()
    chains = begin()
    begun = time.process_time()
    before, spent, made = begun - start, 0.0, 0
    # As many as there are from one measurement of the noise of minibatches to the next.
    every = MINIBATCH_NOISE.every
    while not made or (spent < SECONDS and made < TIMED_STEPS):
        recorder = SampleLossRecorder([(0, every)] * count) if loss.is_sample_mean else None
        chains.advance([(0, every)] * count, first=True, recorder=recorder)
        made += every
        spent = time.process_time() - begun
    return spent / made, before


def exponent(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Slope of log y against log x, and its standard error."""
    u, v = np.log(x), np.log(y)
    u = u - u.mean()
    slope = float(u @ v / (u @ u))
    rest = v - v.mean() - slope * u
    return slope, float(np.sqrt(rest @ rest / max(len(x) - 2, 1) / (u @ u)))


def bench_growth(folder: Path, settings: Settings) -> None:
    """Cost against weights, samples and snapshots."""
    store = Store(folder, "growth", asdict(settings))
    rows: list[Row] = []
    measured: dict[str, tuple[list[float], list[float]]] = {
        "weights": ([], []),
        "samples": ([], []),
        "snapshots": ([], []),
    }
    for weights in settings.weights:
        found = store.cached(f"weights {weights}", cost_of_snapshot, weights, settings.samples, settings.steps)
        measured["weights"][0].append(found["weights"])
        measured["weights"][1].append(found["snapshot"])
        rows.append(_cost_row(f"{settings.samples} samples", found))
    for samples in settings.data:
        found = store.cached(f"samples {samples}", cost_of_snapshot, 10**5, samples, settings.steps)
        measured["samples"][0].append(samples)
        measured["samples"][1].append(found["snapshot"])
        rows.append(_cost_row(f"{samples} samples", found))
    for snapshots in settings.snapshots:
        seconds = store.cached(f"snapshots {snapshots}", _cost_of_run, folder / "growth_run", snapshots)
        measured["snapshots"][0].append(snapshots)
        measured["snapshots"][1].append(seconds)
        rows.append(
            {
                "network": "10,000 weights",
                "data": f"64 samples, {snapshots} snapshots",
                "losses, curvature": "",
                "chain-step, ms": "",
                "snapshot, s": f"{seconds / snapshots:.3g}",
                "GFLOP/s": "",
            }
        )
    notes = [
        f"Full batch, {CHAINS} chains of {STEPS} steps, or {STEPS_LARGE} of networks that go alone (from 16.8 million "
        "weights on). A snapshot is losses and curvature, start and that many chain-steps, of which 80 were timed "
        f"({settings.steps} of networks that go alone). GFLOP/s takes 6 operations a weight and sample.",
    ]
    for name, (x, y) in measured.items():
        slope, error = exponent(x, y)
        notes.append(f"cost ∝ {name}^{slope:.2f}, standard error {error:.2f}")
        slope, error = exponent(x[-3:], y[-3:])
        notes.append(f"over the last three: {name}^{slope:.2f}, standard error {error:.2f}")
    notes.append(extrapolation())
    store.finish("What a snapshot costs", rows, [], notes)


def _cost_row(data: str, found: dict[str, float]) -> Row:
    return {
        "network": f"{found['weights']:,} weights" + (", alone" if found["alone"] else ""),
        "data": data,
        "losses, curvature": f"{found['losses, curvature']:.3g} s",
        "chain-step, ms": f"{1e3 * found['step']:.3g}",
        "snapshot, s": f"{found['snapshot']:.3g}",
        "GFLOP/s": f"{found['flops'] / 1e9:.3g}",
    }


def _cost_of_run(root: Path, snapshots: int) -> float:
    """Processor seconds of `analyze`, two draws growing to the default precision left out: 20 draws a chain."""
    shutil.rmtree(root, ignore_errors=True)
    torch.manual_seed(0)
    model = perceptron(10**4)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    record_training(model, optimizer, labelled(64), root, snapshots - 1, "cross_entropy", every=1)
    start = time.process_time()
    groktrace.analyze(root, device="cpu", chains=CHAINS, draws=20, burn_in=10)
    seconds = time.process_time() - start
    shutil.rmtree(root)
    return seconds


def extrapolation() -> str:
    """What 1e5 snapshots of 1e9 weights would take on 64 GPUs; not measured."""
    weights, snapshots, gpus = 1e9, 1e5, 64
    batch, stored = 8 * 1024, 64 * 1024
    peak, utilisation = 495e12, 0.4
    gradients = 16 * stored + stored + CHAINS * STEPS_LARGE * 2 * batch
    operations = 6 * weights * gradients
    seconds = operations / (peak * utilisation)
    hours = snapshots * seconds / gpus / 3600
    return (
        f"EXTRAPOLATED, not measured: {snapshots:.0e} snapshots of {weights:.0e} weights on {gpus} GPUs take "
        f"{hours:.0f} hours ({seconds:.0f} s a snapshot and GPU), if a gradient takes 6 operations a weight and token; "
        f"a snapshot takes 16 gradients on {stored} tokens for its curvature, plus one at w*, and is sampled with "
        f"{CHAINS} chains of {STEPS_LARGE} steps, without growth, each two gradients (control variate) on {batch} "
        f"tokens; each GPU holds one whole snapshot and works alone; it does {utilisation:.0%} of {peak / 1e12:.0f} "
        "TFLOP/s (TF32 of an H100 without sparsity, from its data sheet); and reading 4 GB a snapshot, noise and "
        "updates are free."
    )


def language_model_of(shape: Sequence[int]) -> tuple[nn.Module, Any]:
    """A decoder with tied embeddings, as large as GPT-2 where `shape` says so, and random tokens."""
    tokens, length, width, heads, blocks, sequences = shape
    torch.manual_seed(0)
    network = Transformer(
        tokens=tokens,
        outputs=tokens,
        length=length,
        width=width,
        heads=heads,
        hidden=4 * width,
        blocks=blocks,
        norm=True,
        last=False,
    )
    network.unembedding.weight = network.embedding.weight
    nn.init.normal_(network.embedding.weight, std=0.02)
    drawn = torch.randint(tokens, (sequences, length + 1))
    return network, (drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous())


def bench_large(folder: Path, settings: Settings) -> None:
    """Memory of a language model's estimate, and a chain-step beside a training step."""
    store = Store(folder, "large", asdict(settings))
    cases = (
        ("estimate_llc, 1 chain", {"chains": 1}),
        ("estimate_llc, 2 chains", {"chains": 2}),
        ("estimate_llc, 1 chain, minibatch", {"chains": 1, "batch_size": 1}),
        ("a recorded run, 1 chain", {"chains": 1, "run": True}),
        ("training, AdamW", {"training": True}),
    )
    rows: list[Row] = []
    bars: list[Verdict] = []
    for label, case in cases:
        found = store.cached(label, _in_child, folder, settings, case)
        ratio = (found["peak"] - found["imported"]) / (4 * found["weights"])
        step = found.get("step")
        rows.append(
            {
                "what": f"{label}, {found['weights']:,} weights",
                "memory / weights": f"{ratio:.2f}",
                "peak": f"{(found['peak'] - found['imported']) / MIB:.0f} MiB",
                "step, s": "" if step is None else f"{step:.3g}",
            }
        )
        if label in ("estimate_llc, 1 chain", "a recorded run, 1 chain"):
            bars.append(Verdict(f"memory: {label}", round(ratio, 2), limit=5.0, at_least=False))
    notes = [
        "Peak of a fresh process less what it holds after import, over the weights in float32; the model counts. "
        f"{settings.language[5]} sequences of {settings.language[1]} tokens; steps are on all of them, or one with the "
        "control variate in a minibatch.",
    ]
    store.finish("A large language model", rows, bars, notes)


def _in_child(folder: Path, settings: Settings, case: dict[str, Any]) -> dict[str, float]:
    root = folder / "large_run"
    if case.get("run"):
        shutil.rmtree(root, ignore_errors=True)
        model, data = language_model_of(settings.language)
        with groktrace.watch(model, train=data, loss=sequence_cross_entropy, out=str(root), every=1):
            pass
        if not (root / "program.json").exists():
            raise RuntimeError(f"{root}: the model was not traced.")
        del model
    work = json.dumps({**case, "language": settings.language, "steps": settings.large_steps, "root": str(root)})
    command = [sys.executable, "-m", __spec__.name, "memory-worker", "--work", work]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    shutil.rmtree(root, ignore_errors=True)
    return json.loads(done.stdout.splitlines()[-1])


def work_in_child(work: dict[str, Any]) -> None:
    """One case of `large`, in a process of its own; prints what it measured as JSON."""
    imported = peak_bytes()
    found: dict[str, float] = {"imported": imported}
    few, many = 2, 2 + work["steps"]
    settings = {**FIXED, "chains": work.get("chains"), "batch_size": work.get("batch_size")}
    if work.get("run"):
        run = groktrace.open_run(work["root"])
        groktrace.analyze(run, device="cpu", **settings, draws=2)
        found["weights"] = sum(math.prod(spec.shape) for spec in run.specs.values())
    else:
        model, data = language_model_of(work["language"])
        found["weights"] = size(model)
        if not work.get("training"):
            groktrace.estimate_llc(model, sequence_cross_entropy, data, **settings, draws=2)
            found["peak"] = peak_bytes()  # before the allocator holds what timing has left
        step = _train_steps(model, data) if work.get("training") else _chain_steps(model, data, settings)
        start = time.process_time()
        step(few)
        between = time.process_time()
        step(many)
        chains = 1 if work.get("training") else work["chains"]
        found["step"] = (time.process_time() - 2 * between + start) / (work["steps"] * chains)
    print(json.dumps({"peak": peak_bytes(), **found}))


def _chain_steps(model: nn.Module, data: Any, settings: dict[str, Any]) -> Callable[[int], None]:
    task = Task.from_model(model, loss=sequence_cross_entropy, train=data)
    named = {name: parameter.detach() for name, parameter in model.named_parameters()}
    sampled = weight_layout({name: (tuple(w.shape), w.dtype, True) for name, w in named.items()})
    loss = Objective.of(task, sampled, SamplingSettings(), named, torch.device("cpu")).loss

    def run(draws: int) -> None:
        chosen = resolve(SamplingSettings(**settings, draws=draws), sampled.size, stacked=False)
        scale = FIXED["nbeta"], FIXED["localization"], FIXED["step_size"]
        sample_large(loss, named, 0, chosen, *scale, lambda traces: 1.0)

    return run


def _train_steps(model: nn.Module, data: Any) -> Callable[[int], None]:
    """AdamW with gradients accumulated over single sequences, as a large network is trained in little memory."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def run(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            for i in range(len(data[0])):
                part = sequence_cross_entropy(model(data[0][i : i + 1]), data[1][i : i + 1])
                (part / len(data[0])).backward()
            optimizer.step()

    return run


PARTS = {"growth": bench_growth, "large": bench_large}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one part, or all."""
    parser = command_line(__doc__.splitlines()[0], PARTS, "runs/speed/cost")
    parser.add_argument("--work", type=json.loads, help="what memory-worker does")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.part == "memory-worker":
        return work_in_child(options.work)
    say("times are processor seconds of one thread")
    return run_parts(PARTS, options.part, options.out, TINY if options.tiny else FULL)


if __name__ == "__main__":
    main()
