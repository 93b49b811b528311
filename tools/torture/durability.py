"""Kills and failing disks: what a recording and an analysis have to outlive."""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

import groktrace
from groktrace.recording import prepare, writer
from groktrace.run import files, layout
from tools.torture.tally import Tally, forked, lives, seed_option, trials_option

SIZES = {"small": 40, "large": 400}  # 6 kB and 640 kB a snapshot: queued, and written at once
CALLS = ("write", "fsync", "rename")
TMPFS_BYTES = 16 * 2**20


class Training:
    """A loop whose weights tell their step, so that each snapshot shows whether it is the right one."""

    def __init__(self, width: int) -> None:
        self.model = nn.Linear(width, width, bias=False)
        with torch.no_grad():
            self.model.weight.zero_()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        self.model.weight.grad = torch.full_like(self.model.weight, -1.0)

    def watch(self, out: Path, start: int = 0) -> groktrace.Recorder:
        """Record every step, from this one on."""
        with torch.no_grad():
            self.model.weight.fill_(float(start))
        x = torch.zeros(4, len(self.model.weight))
        return groktrace.watch(self.model, self.optimizer, train=(x, x), loss="mse", out=out, every=1, start_step=start)


def verify(tally: Tally, root: Path, name: str) -> int | None:
    """Every snapshot with its final name loads, verifies and is of its step; returns the last step."""
    steps = layout.snapshot_steps(root)
    if not (root / layout.RUN_FILE).exists():
        tally.expect(not steps, f"{name}: snapshots without run.json")
        return None
    if not steps:
        return None
    tally.expect(steps == list(range(steps[0], steps[-1] + 1)), f"{name}: steps {steps}")
    for snapshot in groktrace.open_run(root).snapshots:
        try:
            weight = snapshot.load()["weight"]
            tally.expect(bool((weight == snapshot.step).all()), f"{name}: other weights at step {snapshot.step}")
            tally.counts["snapshots verified"] += 1
        except groktrace.GroktraceError as failure:
            tally.expect(False, f"{name}: {failure}")
    return steps[-1]


def resume(tally: Tally, root: Path, width: int, last: int | None, name: str) -> None:
    """The next run, as of a process that starts now: it goes on, overwrites nothing, and cleans up."""
    writer._PROCESS_START = time.time() + 1  # file systems count in coarser steps than this clock
    before = {path.name: path.read_bytes() for path in root.glob("weights/0*")}
    tally.counts["leftovers cleaned"] += len(list(root.glob(".tmp*")) + list(root.glob("weights/.tmp*")))
    training, start = Training(width), 0 if last is None else last
    with training.watch(root, start) as recorder:
        for _ in range(3):
            training.optimizer.step()
    tally.expect(recorder.steps == start + 3, f"{name}: resumed to {recorder.steps}")
    tally.expect(verify(tally, root, f"{name}, resumed") == start + 3, f"{name}: the next run did not go on")
    after = {path.name: path.read_bytes() for path in root.glob("weights/0*")}
    tally.expect(before.items() <= after.items(), f"{name}: an earlier snapshot was changed")
    tally.expect(not list(root.rglob(".tmp*")), f"{name}: leftovers")
    tally.counts["runs resumed"] += 1


@cache
def warm_up() -> None:
    """Do once what takes seconds in each new process, the tracing above all, so that copies of this one need not."""
    torch.set_num_threads(1)
    trace, traced = prepare._trace, {}

    def trace_once(forward: Any, batch: Any) -> Any:
        shape = batch.tensors[0].shape
        if shape not in traced:
            traced[shape] = trace(forward, batch)
        return traced[shape]

    prepare._trace = trace_once
    with tempfile.TemporaryDirectory() as scratch:
        for size, width in SIZES.items():
            Training(width).watch(Path(scratch) / size).close()


def record_forever(root: Path, width: int) -> None:
    """A training that begins when it is told to, and ends only with the process that started it."""
    parent = os.getppid()
    os.kill(os.getpid(), signal.SIGSTOP)
    training = Training(width)
    training.watch(root)
    while os.getppid() == parent:
        training.optimizer.step()
        time.sleep(0.002)


def kill_at_call(strace: str, child: int, call: str, number: int) -> bool:
    """Have strace kill a stopped child as one of its threads makes its n-th call; whether it came to that."""
    os.waitpid(child, os.WUNTRACED)
    calls = "rename,renameat,renameat2" if call == "rename" else call
    rule = f"inject={calls}:signal=KILL:when={number}"
    command = [strace, "-f", "-qq", "-o", "/dev/null", "-e", f"trace={calls}", "-e", rule, "-p", str(child)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as tracer:
        status = Path(f"/proc/{child}/status")
        while "TracerPid:\t0" in status.read_text() and tracer.poll() is None:
            time.sleep(0.001)
        os.kill(child, signal.SIGCONT)
        deadline = time.monotonic() + 120
        while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < deadline:
            time.sleep(0.005)
        if not ended[0]:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return bool(ended[0]) and os.waitstatus_to_exitcode(ended[1]) == -signal.SIGKILL


@click.command()
@trials_option
@seed_option
def kill(trials: int | None, seed: int) -> None:
    """SIGKILL a recording: at random moments, and, with strace, at random calls of write, fsync and rename."""
    warm_up()
    trials, draw, tally = trials or 200, random.Random(seed), Tally("kill -9 of a recording")
    strace = shutil.which("strace")
    if strace is None:
        click.echo("strace is not here: all kills are by the clock", err=True)
    with tempfile.TemporaryDirectory() as scratch:
        for trial in range(trials):
            size = draw.choice(list(SIZES))
            root, width = Path(scratch) / str(trial), SIZES[size]
            child = forked(lambda root=root, width=width: record_forever(root, width))
            if strace is not None and trial % 2:
                call = draw.choice(CALLS)
                number = draw.randint(1, 30 if call == "rename" else 60)
                name = f"trial {trial}, {size}, {call} number {number}"
                tally.expect(kill_at_call(strace, child, call, number), f"{name}: was not reached")
                tally.counts[f"kills at {call}"] += 1
            else:
                name = f"trial {trial}, {size}, by the clock"
                os.kill(child, signal.SIGCONT)
                time.sleep(draw.uniform(0, 1.5))
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                tally.counts["kills by the clock"] += 1
            tally.counts["kills before the first snapshot"] += not layout.snapshot_steps(root)
            last = verify(tally, root, name)
            resume(tally, root, width, last, name)
            shutil.rmtree(root)
    tally.finish()


@click.command()
@trials_option
@seed_option
def signals(trials: int | None, seed: int) -> None:
    """SIGTERM, Ctrl-C and an exception in the loop at random moments: all that was taken is written, nothing else."""
    warm_up()
    trials, draw, tally = trials or 60, random.Random(seed), Tally("SIGTERM, SIGINT and exceptions")

    def train(root: Path, width: int, steps: int | None, counts: Path) -> None:
        training, parent = Training(width), os.getppid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with open(counts, "wb", buffering=0) as told, training.watch(root):
            done = 0
            while done != steps and os.getppid() == parent:
                training.optimizer.step()
                done += 1
                told.write(b".")
            raise ValueError("the loop's own")

    with tempfile.TemporaryDirectory() as scratch:
        for trial in range(trials):
            kind, size = ("SIGTERM", "SIGINT", "exception")[trial % 3], draw.choice(list(SIZES))
            name, root, counts = f"trial {trial}, {size}, {kind}", Path(scratch) / str(trial), Path(scratch) / "counts"
            counts.unlink(missing_ok=True)
            steps = draw.randint(1, 200) if kind == "exception" else None
            sys.stderr.flush()
            child = forked(lambda a=(root, SIZES[size], steps, counts): train(*a))
            if steps is None:
                while lives(child) and not layout.snapshot_steps(root):
                    time.sleep(0.001)
                time.sleep(draw.uniform(0.01, 0.5))
                os.kill(child, getattr(signal, kind))
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            tally.expect(code == (-signal.SIGTERM if kind == "SIGTERM" else 1), f"{name}: exit code {code}")
            done, last = counts.stat().st_size, verify(tally, root, name)
            # The signal may come between a step's end and its being told.
            tally.expect(last in (done, done + 1), f"{name}: {done} steps, kept up to {last}")
            tally.counts[kind] += 1
            shutil.rmtree(root)
    tally.finish()


@contextmanager
def small_disk(scratch: Path) -> Iterator[tuple[Path, Callable[[], None], Callable[[], None]]]:
    """A folder, what fills its disk, what frees it: a tmpfs where one may be mounted, else a limit on files."""
    place = scratch / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={TMPFS_BYTES}", "tmpfs", str(place)]
    if shutil.which("mount") and subprocess.run(mount, capture_output=True).returncode == 0:
        filler = place / "filler"

        def fill() -> None:
            try:
                with open(filler, "wb", buffering=0) as file:
                    while True:
                        file.write(bytes(4096))
            except OSError:
                pass

        try:
            yield place, fill, filler.unlink
        finally:
            subprocess.run(["umount", "-l", str(place)], check=True)
    else:
        import resource

        click.echo("no tmpfs can be mounted here: a limit on the size of files stands for a full disk", err=True)
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        yield (
            place,
            lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1024, unlimited[1])),
            lambda: resource.setrlimit(resource.RLIMIT_FSIZE, unlimited),
        )


def outlive(
    tally: Tally, name: str, root: Path, width: int, breaks: Callable[[], None], mends: Callable[[], None]
) -> None:
    """Six steps, six while nothing can be written, six more: the first and the last are kept, with one warning."""
    training = Training(width)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        recorder = training.watch(root)

        def train(steps: int) -> None:
            for _ in range(steps):
                training.optimizer.step()
                if width == SIZES["large"]:
                    recorder.flush()
            recorder.flush()

        train(6)
        breaks()
        train(6)
        broken = layout.snapshot_steps(root)
        mends()
        train(6)
        recorder.close()
    steps = layout.snapshot_steps(root)
    tally.expect(broken[:7] == list(range(7)), f"{name}: {broken} were kept while it was broken")
    tally.expect(len(broken) < 13, f"{name}: nothing was lost, so nothing was broken")
    tally.expect(steps[-6:] == list(range(13, 19)), f"{name}: {steps} were kept in the end")
    tally.expect(bool((training.model.weight == 18).all()), f"{name}: the training was not the same")
    tally.expect(len(told) == 1, f"{name}: warned {len(told)} times: {[str(warning.message) for warning in told]}")
    for snapshot in groktrace.open_run(root).snapshots:
        tally.expect(bool((snapshot.load()["weight"] == snapshot.step).all()), f"{name}: step {snapshot.step}")
        tally.counts["snapshots verified"] += 1
    tally.expect(not list(root.rglob(".tmp*")), f"{name}: leftovers")


@contextmanager
def refused(name: str, number: int) -> Iterator[None]:
    """A function of `os` that the file system does not have."""
    original, save = getattr(os, name), files.save_file

    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    def refuse_in_rust(*_: Any) -> None:  # which renames a file of its own
        raise files.SafetensorError(f"{os.strerror(number)} (os error {number})")

    setattr(os, name, refuse)
    if name == "replace":
        files.save_file = refuse_in_rust
    try:
        yield
    finally:
        setattr(os, name, original)
        files.save_file = save


@click.command()
def disk() -> None:
    """A full disk, a read-only one, permission lost half way, a slow one, one without fsync or rename."""
    warm_up()
    tally = Tally("failing disks")
    for size, width in SIZES.items():
        with tempfile.TemporaryDirectory() as scratch, small_disk(Path(scratch)) as (place, fill, free):
            outlive(tally, f"full disk, {size}", place / "run", width, fill, free)
            tally.counts["full disks"] += 1
        with tempfile.TemporaryDirectory() as scratch, small_disk(Path(scratch)) as (place, _, _):
            remount = ["mount", "-o", f"remount,size={TMPFS_BYTES},"]
            if os.path.ismount(place):
                ways = [[*remount[:2], remount[2] + way, str(place)] for way in ("ro", "rw")]
                turns = [lambda way=way: subprocess.run(way, check=True) for way in ways]
                outlive(tally, f"read-only, {size}", place / "run", width, *turns)
                tally.counts["read-only disks"] += 1
        with tempfile.TemporaryDirectory() as scratch:
            os.chmod(scratch, 0o777)

            def as_nobody(size: str = size, width: int = width, scratch: str = scratch) -> None:
                if os.getuid() == 0:
                    os.setuid(65534)  # whom permissions bind
                root, own = Path(scratch) / "run", Tally("")
                weights = root / layout.WEIGHTS_FOLDER
                turns = [lambda mode=mode: weights.chmod(mode) for mode in (0o500, 0o700)]
                outlive(own, f"permission lost, {size}", root, width, *turns)
                root.chmod(0o500)
                try:
                    Training(width).watch(root, 18)
                    own.expect(False, "a folder that is read-only from the start was not refused")
                except groktrace.GroktraceError as failure:
                    own.expect("cannot be written" in str(failure), f"read-only from the start: {failure}")
                root.chmod(0o700)
                os._exit(len(own.failures))

            tally.expect(os.waitstatus_to_exitcode(os.waitpid(forked(as_nobody), 0)[1]) == 0, f"permission, {size}")
            tally.counts["permissions lost"] += 1
        for name in ("fsync", "replace"):
            with tempfile.TemporaryDirectory() as scratch, refused(name, 38):
                training = Training(width)
                with training.watch(Path(scratch) / "run"):
                    for _ in range(5):
                        training.optimizer.step()
                tally.expect(verify(tally, Path(scratch) / "run", f"no {name}, {size}") == 5, f"no {name}, {size}")
                tally.expect(not list(Path(scratch).rglob(".tmp*")), f"no {name}, {size}: leftovers")
                tally.counts["disks without fsync or rename"] += 1
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fsync = os.fsync
        os.fsync = lambda descriptor: (time.sleep(0.2), fsync(descriptor))[1]
        try:
            training = Training(SIZES["large"])
            with training.watch(Path(scratch) / "run"):
                for _ in range(8):
                    training.optimizer.step()
        finally:
            os.fsync = fsync
        tally.expect(verify(tally, Path(scratch) / "run", "slow disk") == 8, "slow disk: snapshots were dropped")
        tally.expect(
            [("training waits" in str(warning.message)) for warning in told] == [True], "slow disk: not told once"
        )
        tally.counts["slow disks"] += 1
    tally.finish()
