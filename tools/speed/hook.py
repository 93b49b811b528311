"""What recording costs a training: time, throughput and memory, beside other ways of keeping weights.

    python -m tools.speed.hook all
    python -m tools.speed.hook verdicts

`step`, `snapshot`, `reference`, `writes`, `large`, `lightning` and `memory` run one part. Each prints a table and
leaves it, with every single measurement, under runs/speed/hook; what is finished there is not measured again.
"""

import hashlib
import json
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

import groktrace
from groktrace.run import files
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
    spread,
)
from tools.common.networks import EXAMPLE, modular_network

MIB = 2**20


@dataclass(frozen=True)
class Settings:
    """What `all` measures.

    Attributes:
        rounds: repetitions.
        reference_rounds: of the reference example, which is short.
        bare_steps: of an optimizer with one weight.
        snapshots: copied for the blocking time.
        widths: of the square layers whose snapshots are timed.
        reference_steps: of the reference example, a snapshot every 100.
        writes_steps: of the same, each timed.
        large_steps: of the network with 10 million weights, a snapshot every 50.
        large_width: of its three square layers.
        memory_width: of the network whose memory is measured.
    """

    rounds: int = 6
    reference_rounds: int = 100
    bare_steps: int = 20_000
    snapshots: int = 12
    widths: tuple[int, ...] = (1825, 2900, 5000)
    reference_steps: int = 1000
    writes_steps: int = 20_000
    large_steps: int = 60
    large_width: int = 1825
    memory_width: int = 5000


FULL = Settings()
TINY = Settings(1, 1, 50, 2, (64,), 120, 300, 52, 64, 1500)


def bench_step(folder: Path, settings: Settings) -> None:
    """A step that keeps no snapshot: an optimizer with one weight, with the hook and without."""
    store = Store(folder, "step", asdict(settings))

    def microseconds(recorded: bool) -> float:
        weight = nn.Linear(1, 1, bias=False)
        weight.weight.grad = torch.zeros(1, 1)
        optimizer = torch.optim.SGD(weight.parameters(), lr=0.0)
        recorder = groktrace.watch(weight, optimizer, out=fresh(folder), every=10**9) if recorded else None
        for _ in range(settings.bare_steps // 10):
            optimizer.step()
        start = time.perf_counter()
        for _ in range(settings.bare_steps):
            optimizer.step()
        seconds = time.perf_counter() - start
        if recorder is not None:
            recorder.close()
        return 1e6 * seconds / settings.bare_steps

    contenders = {"without": lambda r: microseconds(False), "with": lambda r: microseconds(True)}
    times = in_turn(store, "bare optimizer", contenders, settings.rounds)
    cost = [a - b for a, b in zip(times["with"], times["without"], strict=True)]
    rows = [{"optimizer.step()": name, "µs": spread(seconds)} for name, seconds in times.items()]
    rows.append({"optimizer.step()": "difference", "µs": spread(cost)})
    bars = [Verdict("a step that keeps no snapshot", statistics.median(cost), limit=10.0, at_least=False, unit="µs")]
    store.finish("A step that keeps no snapshot", rows, bars)


def bench_snapshot(folder: Path, settings: Settings) -> None:
    """How long a snapshot blocks, beside a copy of as many bytes between buffers that are in use already."""
    store = Store(folder, "snapshot", asdict(settings))
    rows: list[Row] = []
    bars = []
    for width in settings.widths:
        model = layers(width)
        size = sum(p.numel() for p in model.parameters()) * 4
        recorder = groktrace.watch(model, out=fresh(folder), every=10**9)
        source = torch.randn(size // 4)
        target = torch.zeros_like(source)

        def measure(
            r: int, recorder: groktrace.Recorder = recorder, source: Tensor = source, target: Tensor = target
        ) -> list[float]:
            """Seconds of each, both after a file was written and in either order."""

            def snapshot() -> float:
                before = recorder._blocked
                recorder._count.add(1, None)
                recorder._snapshot(recorder.steps)
                recorder.flush()  # training goes on meanwhile
                return recorder._blocked - before

            def copy() -> float:
                start = time.perf_counter()
                target.copy_(source)
                return time.perf_counter() - start

            times: dict[Callable[[], float], list[float]] = {snapshot: [], copy: []}
            for i in range(settings.snapshots):
                for action in (snapshot, copy) if i % 2 else (copy, snapshot):
                    times[action].append(action())
            return [statistics.median(seconds) for seconds in times.values()]

        both = in_turn(store, f"{width}", {"both": measure}, settings.rounds)["both"]
        times = {"snapshot": [a for a, _ in both], "copy": [b for _, b in both]}
        recorder.close()
        ratio = ratios(times["snapshot"], times["copy"])
        name = f"{size / 1e6:.0f} MB"
        rows.append(
            {"weights": name, "snapshot, ms": spread(times["snapshot"], 1e3), "copy, ms": spread(times["copy"], 1e3)}
            | {"ratio": spread(ratio)}
        )
        claim = f"a snapshot of {name} blocks, beside a copy"
        bars.append(Verdict(claim, statistics.median(ratio), limit=1.5, at_least=False))
        shutil.rmtree(folder / "run")
    store.finish("How long a snapshot blocks training", rows, bars)


class Training:
    """A network and its loop.

    Args:
        model: the network.
        batch: inputs and targets.
        loss: of outputs and targets.
        every: steps between snapshots.
    """

    def __init__(self, model: nn.Module, batch: tuple[Tensor, Tensor], loss: Callable[..., Tensor], every: int) -> None:
        self.model, self.batch, self.loss, self.every = model, batch, loss, every
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def run(self, steps: int, keep: Callable[[int], None] | None) -> float:
        """Seconds that the steps take; `keep` is called after each one that is to be kept."""
        start = time.perf_counter()
        for step in range(1, steps + 1):
            self.optimizer.zero_grad()
            self.loss(self.model(self.batch[0]), self.batch[1]).backward()
            self.optimizer.step()
            if keep is not None and step % self.every == 0:
                keep(step)
        return time.perf_counter() - start


def reference() -> Training:
    """The reference example's."""
    model, train, _ = modular_network(23, 128)
    return Training(model, train, EXAMPLE.centred_loss, 100)


def large(width: int) -> Training:
    """Of three square layers; 10 million weights at the full width."""
    torch.manual_seed(0)
    return Training(layers(width), (torch.randn(128, width), torch.randn(128, width)), functional.mse_loss, 50)


def layers(width: int) -> nn.Sequential:
    """Three square layers."""
    parts = [nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)]
    return nn.Sequential(*parts)


def bench_throughput(
    folder: Path, settings: Settings, name: str, make: Callable[[], Training], steps: int, rounds: int
) -> None:
    """Steps a second with groktrace and with peers called in the loop, beside those of the bare loop."""
    store = Store(folder, name, asdict(settings))

    def measure(kind: str) -> list[Any]:
        training, out = make(), fresh(folder)
        training.run(5, None)
        keep, recorder = None, None
        if kind == "groktrace":
            recorder = groktrace.watch(
                *(training.model, training.optimizer),
                train=training.batch, loss=training.loss, out=out, every=training.every, start_step=0,
            )  # fmt: skip
            recorder.flush()
        elif kind != "nothing":
            out.mkdir()
            save = torch.save if kind == "torch.save" else safetensors.torch.save_file
            ending = "pt" if kind == "torch.save" else "safetensors"
            keep = lambda step: save(training.model.state_dict(), out / f"{step}.{ending}")  # noqa: E731
        seconds = training.run(steps, keep)
        if recorder is not None:
            start = time.perf_counter()
            recorder.flush()  # what is still to be written counts too
            seconds += time.perf_counter() - start
            recorder.close()
        shutil.rmtree(out, ignore_errors=True)
        state = b"".join(tensor.numpy().tobytes() for tensor in training.model.state_dict().values())
        return [seconds, hashlib.sha256(state).hexdigest()]

    kinds = ("nothing", "groktrace", "torch.save", "save_file")
    measured = in_turn(store, name, {kind: lambda r, kind=kind: measure(kind) for kind in kinds}, rounds)
    if len({digest for rounds in measured.values() for _, digest in rounds}) > 1:
        raise SystemExit("the weights differ from one way of keeping them to another")
    times = {kind: [seconds for seconds, _ in rounds] for kind, rounds in measured.items()}
    _finish_throughput(store, f"Throughput, {name}", times, steps)


def bench_writes(folder: Path, settings: Settings) -> None:
    """What a snapshot of the reference example adds to its own step and to those around its writing.

    Single steps scatter less than runs of which one follows the other, as all happens within a second.
    """
    store = Store(folder, "writes", asdict(settings))

    def measure(_: int) -> dict[str, float]:
        training, out, begun = reference(), fresh(folder), []
        write = files.write_tensors

        def timed_write(*arguments: Any) -> int:
            begun.append(time.perf_counter())
            return write(*arguments)

        files.write_tensors = timed_write
        try:
            with groktrace.watch(
                *(training.model, training.optimizer),
                train=training.batch, loss=training.loss, out=out, every=training.every, start_step=0,
            ) as recorder:  # fmt: skip
                training.run(training.every, None)
                recorder.flush()
                begun.clear()
                ends = [time.perf_counter()]
                # Writes come once a second, together; what is written when the recording closes does not count.
                while len(ends) <= settings.writes_steps or ends[-1] < ends[0] + 3:
                    training.run(1, None)
                    ends.append(time.perf_counter())
                writes = np.array(begun)
        finally:
            files.write_tensors = write
        shutil.rmtree(out, ignore_errors=True)
        times, number = np.diff(ends), np.arange(1, len(ends))
        first = writes[np.diff(writes, prepend=-1.0) > 0.2]
        since = np.array(ends[1:]) - np.array([ends[0], *first])[np.searchsorted(first, ends[1:])]
        own = number % training.every == 0
        # Also what comes after: caches, and threads that have to find their cores again.
        near, far = ~own & (since < 0.2), ~own & (since > 0.3) & (since < 0.95)
        near &= np.array(ends[1:]) > first[0]
        bare = float(times[far].mean())
        writing = float((times[near] - bare).sum()) / len(writes)
        return {"bare": bare, "own": float(times[own].mean()) - bare, "writing": writing}

    found = in_turn(store, "writes", {"snapshot": measure}, settings.rounds)["snapshot"]
    shares = [100 / (1 + (taken["own"] + taken["writing"]) / (100 * taken["bare"])) for taken in found]
    row = {"a step, ms": spread([taken["bare"] for taken in found], 1e3)}
    row |= {"a snapshot adds to its own, ms": spread([taken["own"] for taken in found], 1e3)}
    row |= {"its writing to those around, ms": spread([taken["writing"] for taken in found], 1e3)}
    row |= {"throughput, every=100": spread(shares) + " %"}
    claim = "throughput, reference, from steps around the writes"
    bar = Verdict(claim, statistics.median(shares), limit=98.0, unit="%")
    store.finish("What a snapshot adds to the steps around it", [row], [bar])


def bench_lightning(folder: Path, settings: Settings) -> None:
    """The same under Lightning: ModelCheckpoint and the callback, beside a trainer with neither."""
    try:
        import lightning.pytorch as pl

        from groktrace.recording.lightning import GroktraceCallback
    except ImportError:
        say("Lightning is not installed; its rows are left out")
        return
    store, steps = Store(folder, "lightning", asdict(settings)), settings.large_steps

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = layers(settings.large_width)

        def training_step(self, batch: Any) -> Tensor:
            return functional.mse_loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    class Clock(pl.Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 0:
                self.start = time.perf_counter()

        def on_train_batch_end(self, *_: Any) -> None:
            self.end = time.perf_counter()

    def measure(kind: str) -> float:
        out, clock = fresh(folder), Clock()
        torch.manual_seed(0)
        data = torch.utils.data.TensorDataset(*(torch.randn(128, settings.large_width) for _ in range(2)))
        checkpoint = pl.callbacks.ModelCheckpoint(out, every_n_train_steps=50, save_top_k=-1, save_weights_only=True)
        extra = {"nothing": [], "groktrace": [GroktraceCallback(out=out, every=50)], "ModelCheckpoint": [checkpoint]}
        trainer = pl.Trainer(
            max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=kind == "ModelCheckpoint", callbacks=[*extra[kind], clock],
        )  # fmt: skip
        # The clock is behind ModelCheckpoint in the list, but the trainer moves checkpoints to the end.
        trainer.fit(Module(), torch.utils.data.DataLoader(data, batch_size=128))
        shutil.rmtree(out, ignore_errors=True)
        return clock.end - clock.start

    warnings.simplefilter("ignore")
    contenders = {kind: lambda r, kind=kind: measure(kind) for kind in ("nothing", "groktrace", "ModelCheckpoint")}
    times = in_turn(store, "lightning", contenders, settings.rounds)
    _finish_throughput(store, "Throughput, large, under Lightning", times, steps)


def _finish_throughput(store: Store, title: str, times: dict[str, list[float]], steps: int) -> None:
    rows = []
    for kind, seconds in times.items():
        rows.append(
            {"kept by": kind, "ms a step": spread([t / steps for t in seconds], 1e3)}
            | {"throughput": spread(ratios(times["nothing"], seconds), 100.0) + " %"}
        )
    share = 100 * statistics.median(ratios(times["nothing"], times["groktrace"]))
    store.finish(title, rows, [Verdict(f"{title[0].lower()}{title[1:]}", share, limit=98.0, unit="%")])


def bench_memory(folder: Path, settings: Settings) -> None:
    """Peak memory of a training that keeps every step, in copies of its weights, on a quick disk and on a slow one."""
    store = Store(folder, "memory", asdict(settings))
    rows: list[Row] = []
    bars = []

    def measure(kind: str) -> dict[str, Any]:
        command = [sys.executable, "-m", __spec__.name, "memory-worker", "--kind", kind, "--out", str(folder)]
        command += ["--width", str(settings.memory_width)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    found = {kind: store.cached(kind, measure, kind) for kind in ("nothing", "quick", "slow")}
    for kind, result in found.items():
        copies = (result["peak"] - found["nothing"]["peak"]) / result["weights"]
        row = {"disk": kind, "peak": f"{result['peak'] / MIB:.0f} MiB", "copies of the weights": f"{copies:.2f}"}
        rows.append(row | {"snapshots": str(result["snapshots"]), "told": str(result["told"])})
        if kind != "nothing":
            bars.append(Verdict(f"host memory, {kind} disk", copies, limit=2.0, at_least=False, unit="copies"))
    store.finish("Host memory", rows, bars)


def measure_own_memory(folder: Path, kind: str, width: int) -> None:
    """Train in this process and print its peak memory as JSON."""
    torch.set_num_threads(1)
    model, out = nn.Linear(width, width), fresh(folder)
    size, steps = model.weight.numel() * 4, 8
    write = files.write_tensors
    if kind == "slow":
        files.write_tensors = lambda *arguments: time.sleep(0.5) or write(*arguments)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(8, width)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        recorder = None if kind == "nothing" else groktrace.watch(model, optimizer, out=out, every=1)
        for _ in range(steps):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        if recorder is not None:
            recorder.close()
    kept = 0 if recorder is None else len(groktrace.open_run(out).snapshots)
    shutil.rmtree(out, ignore_errors=True)
    peak = peak_bytes()
    told = sum("training waits" in str(warning.message) for warning in caught)
    print(json.dumps({"peak": peak, "weights": size, "snapshots": kept, "told": told}))


def fresh(folder: Path) -> Path:
    """A run directory that is not there yet."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    return folder / "run"


PARTS: dict[str, Callable[[Path, Settings], None]] = {
    "step": bench_step,
    "snapshot": bench_snapshot,
    "reference": lambda folder, s: bench_throughput(
        folder, s, "reference", reference, s.reference_steps, s.reference_rounds
    ),
    "writes": bench_writes,
    "large": lambda folder, s: bench_throughput(
        folder, s, "large", lambda: large(s.large_width), s.large_steps, s.rounds
    ),
    "lightning": bench_lightning,
    "memory": bench_memory,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one part, or all."""
    parser = command_line(__doc__.splitlines()[0], PARTS, "runs/speed/hook")
    parser.add_argument("--kind", help="of memory-worker")
    parser.add_argument("--width", type=int, help="of memory-worker")
    options = parser.parse_args(arguments)
    if options.part == "memory-worker":
        return measure_own_memory(options.out, options.kind, options.width)
    settings = TINY if options.tiny else FULL
    if options.rounds:
        settings = replace(settings, rounds=options.rounds)
    return run_parts(PARTS, options.part, options.out, settings)


if __name__ == "__main__":
    main()
