"""Damage a small run directory in every way, and hold groktrace to refusing it, or to giving the same answer.

    python -m tools.torture input --count 100000

Every byte of every file is changed, every file is cut at every length, and run.json, program.json, the analysis's files
and safetensors headers are replaced by what a stranger might write, with digests that fit. Each case runs in a process
that watches what it opens, imports and runs, how much memory it takes, and for how long.
"""

import contextlib
import faulthandler
import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from click.testing import CliRunner
from torch import nn

import groktrace
from groktrace.analysis.replay import analyze
from groktrace.errors import GroktraceError
from groktrace.reporting import console, csv
from groktrace.reporting.series import Events, Series
from groktrace.run.program import bounds
from groktrace.run.store import open_run
from tools.torture.strange_files import KINDS, Case, damages, strange

SETTINGS = {"chains": 2, "draws": 8, "burn_in": 4}
MEMORY = 100 * 10**6
SECONDS = 60
STARTUP_SECONDS = 120
# What a recorded program may ask for here, where a small machine's worth would hide what is not counted.
PROGRAM_MEMORY, PROGRAM_WORK = MEMORY // 2, 10**10
# A process that asks for more than this fails in that request, and not the machine.
ADDRESS_SPACE = 12 * 2**30
OUTCOMES = ("refused", "unnamed", "same", "snapshot lost", "accepted", "VIOLATION", "CRASH")
GROUPS = ("changed byte", "cut", *KINDS, "command line")


def small_run(root: Path) -> None:
    """Record and analyse three snapshots of a network of 17 weights."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 2, generator=generator), torch.randint(0, 2, (8,), generator=generator)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    model[0].bias.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = {"train": (x, y), "val": (x[:4], y[:4]), "loss": "cross_entropy"}
    with groktrace.watch(model, optimizer, **data, out=root, every=10) as recorder:
        for _ in range(20):
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            recorder.log(loss=loss.item())
    use(root)


def use(root: Path) -> dict[str, Any]:
    """Analyse a run as the command line does, and read the result again; what is finished is not computed anew."""
    trajectory = analyze(root, reference="jacobian", hessian=True, **SETTINGS)
    shown = show(root)
    assert shown["trajectory"] == trajectory.to_dict()["points"], "what was written is not what is read"
    return shown


def show(root: Path) -> dict[str, Any]:
    """The last result as `show` and `plot` read it."""
    trajectory = open_run(root).trajectory()
    series, events = Series.of(trajectory), Events.of(trajectory)
    shown = console.as_json(series, events)
    json.dumps(shown, allow_nan=False)
    console.summary(series, events).encode()
    csv.as_csv(series).encode()
    return {name: value for name, value in shown.items() if name != "run"}


def read(root: Path) -> None:
    """Open a run, read and verify everything, and evaluate the loss and its gradient once."""
    run = open_run(root)
    weights = [snapshot.load() for snapshot in run.snapshots][-1]
    for snapshot in run.snapshots:
        snapshot.fingerprint(), snapshot.metrics()
    weights = {
        name: t.requires_grad_(t.is_floating_point() and run.specs[name].trainable) for name, t in weights.items()
    }
    for batch in (run.task.train, run.task.val):
        if batch is not None:
            with contextlib.suppress(*FAILURES_OF_A_LOSS):
                loss, _ = run.task.forward(weights, batch.tensors)
                torch.autograd.grad(loss, [t for t in weights.values() if t.requires_grad], allow_unused=True)


# A program that only computes may still fail to: `analyze` says so in its own words.
FAILURES_OF_A_LOSS = (RuntimeError, ValueError, IndexError, NotImplementedError, TypeError, AttributeError)


def same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Whether a result is the one before, up to snapshots that were lost and named."""
    lost = len(after["unreadable"])
    if lost > 1:
        return False
    kept = [point for point in before["trajectory"] if not lost or point in after["trajectory"]]
    if not lost:
        return before == after
    return len(kept) == len(before["trajectory"]) - lost and kept == after["trajectory"]


class Watch:
    """Notes what a case does that reading a run has no business doing; made once in a process."""

    def __init__(self, root: Path) -> None:
        self.root = os.path.realpath(root)
        self.noted: list[str] = []
        self.active = False
        self._code = tuple(
            {
                os.path.realpath(path)
                for path in (sys.prefix, sys.base_prefix, Path(groktrace.__file__).parents[1], *sys.path)
                if path
            }
        )
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.active and (wrong := self._wrong(event, args)):
            self.noted.append(f"{event}: {wrong}")

    def _wrong(self, event: str, args: tuple[Any, ...]) -> str | None:
        if event == "open" and isinstance(args[0], str | bytes):
            path = os.path.realpath(os.fsdecode(args[0]))
            writes = args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            ours = self._inside(path) or (not writes and path.startswith((*self._code, "/proc/", "/sys/")))
            return None if ours else f"{path} {'written' if writes else 'read'}"
        if event in (
            "os.remove",
            "os.rename",
            "os.mkdir",
            "os.rmdir",
            "os.link",
            "os.symlink",
            "os.truncate",
            "os.chmod",
        ):
            path = os.path.realpath(os.fsdecode(args[0])) if isinstance(args[0], str | bytes) else self.root
            own = "torchinductor" in path  # where PyTorch's compiler keeps what it makes, once it is loaded
            return None if own or self._inside(path) else path
        if event.startswith(
            ("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "socket.connect")
        ):
            return str(args)[:200]
        if event in ("pickle.find_class", "ctypes.dlopen"):
            # PyTorch built for GPUs asks NVIDIA's library whether there are any.
            return None if "nvidia-ml" in str(args) else str(args)[:200]
        if event == "exec":  # of a module too, when it is imported
            name = args[0].co_filename
            # The last is a file that torch.distributed makes when it is imported.
            return None if name.startswith((*self._code, "<", "_remote_module_non_scriptable")) else name
        return None

    def _inside(self, path: str) -> bool:
        return path == self.root or path.startswith(self.root + os.sep)


class Bench:
    """A run directory in which one file at a time is replaced."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.before = use(root)
        self.whole = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
        self._commands()  # loads what is only loaded where it is needed
        self._restore(root, dict.fromkeys(self.whole, -1))
        self.watch = Watch(root)

    def attempt(self, case: Case, commands: bool) -> tuple[str, str, int]:
        """The outcome of a case, a remark, and the bytes of memory that it took."""
        what, path, content = case
        path.write_bytes(content)
        stamps = {path: path.stat().st_mtime_ns for path in self.whole}
        self.watch.noted = []
        resident = memory(reset=True)
        self.watch.active = True
        try:
            outcome, remark = self._commands() if commands else self._judge(what, path)
        except GroktraceError as refusal:
            outcome, remark = "refused" if path.name in str(refusal) else "unnamed", str(refusal)
        except Exception as failure:
            outcome, remark = "VIOLATION", f"{type(failure).__name__}: {failure}"
        self.watch.active = False
        took = memory() - resident
        if self.watch.noted:
            outcome, remark = "VIOLATION", self.watch.noted[0]
        elif took > len(content) + MEMORY:
            outcome, remark = "VIOLATION", f"took {took / 1e6:.0f} MB; {outcome}: {remark}"
        self._restore(path, stamps)
        return outcome, remark, took

    def _judge(self, what: str, path: Path) -> tuple[str, str]:
        if what in KINDS and what != "analysis":
            read(self.root)
            return "accepted", ""
        after = show(self.root) if path.name == "trajectory.json" else use(self.root)
        if what == "analysis":
            return "accepted", ""
        if not same(self.before, after):
            return "VIOLATION", "another result"
        return ("snapshot lost" if after["unreadable"] else "same"), ""

    def _commands(self) -> tuple[str, str]:
        """What the command line makes of it: one line of error at most, and no traceback."""
        from groktrace.cli import main

        options = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
        codes = []
        for command in (
            ["analyze", *options, "--json"],
            ["show"],
            ["compare"],
            ["check"],
            ["plot", "-o", self.root / "f.svg"],
        ):
            result = CliRunner().invoke(main, [str(part) for part in (command[0], self.root, *command[1:])])
            if not isinstance(result.exception, SystemExit | None) or result.exit_code not in (0, 1, 3):
                return "VIOLATION", f"{command[0]}: {result.exception!r}"
            if result.exit_code == 1 and len(result.stderr.strip().splitlines()) > 2:
                return "VIOLATION", f"{command[0]}: {result.stderr}"
            if any(not letter.isprintable() and letter != "\n" for letter in result.output):
                return "VIOLATION", f"{command[0]} prints control characters"
            codes.append(result.exit_code)
        return ("refused" if any(codes) else "accepted"), str(codes)

    def _restore(self, path: Path, stamps: dict[Path, int]) -> None:
        for entry in sorted(self.root.rglob("*"), reverse=True):
            if entry.is_dir() and not any(known.is_relative_to(entry) for known in self.whole):
                shutil.rmtree(entry)
            elif not entry.is_dir() and entry not in self.whole:
                entry.unlink()
        for kept, content in self.whole.items():
            if kept == path or not kept.exists() or kept.stat().st_mtime_ns != stamps[kept]:
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_bytes(content)


def memory(reset: bool = False) -> int:
    """Peak resident bytes since the last reset; right after it, those resident now."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def every_case(root: Path, count: int, seed: int, stride: int) -> Iterator[tuple[str, Case]]:
    """All cases in their order; of the damage each `stride`-th, of what strangers write some by the commands too."""
    for i, case in enumerate(damages(root)):
        if i % stride == 0:
            yield case[0], case
    for i, case in enumerate(strange(root, count, seed)):
        yield case[0], case
        if i % 257 == 0:
            yield "command line", case


def work(root: Path, start: int, count: int, seed: int, stride: int, progress: Any, counts: Any, log: Path) -> None:
    """Try all cases from the `start`-th on."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    faulthandler.enable()
    bounds.memory_limit = lambda device: PROGRAM_MEMORY
    bounds.MAX_WORK["cpu"] = PROGRAM_WORK
    bench = Bench(root)
    with open(log, "a") as lines:
        for i, (group, case) in enumerate(every_case(root, count, seed, stride)):
            if i < start:
                continue
            root.with_suffix(".case").write_text(json.dumps([group, case[1].name, case[2].decode(errors="replace")]))
            progress.value = i
            outcome, remark, took = bench.attempt(case, group == "command line")
            counts[GROUPS.index(group) * len(OUTCOMES) + OUTCOMES.index(outcome)] += 1
            if outcome in ("VIOLATION", "unnamed") or (outcome == "refused" and i % 100 == 0):
                content = case[2].decode(errors="replace") if outcome == "VIOLATION" else ""
                print(
                    json.dumps([i, group, case[1].name, outcome, remark[:500], took, content]), file=lines, flush=True
                )
        progress.value = -1


def _wait(process: Any, progress: Any) -> None:
    """Wait until all cases were tried, and end the process if one of them takes too long."""
    last, since = progress.value, time.monotonic() + STARTUP_SECONDS  # a start takes longer than a case
    while process.is_alive():
        process.join(1)
        if progress.value != last:
            last, since = progress.value, time.monotonic()
        elif time.monotonic() - since > SECONDS:
            process.kill()


def torture(count: int, seed: int, stride: int, log: Path) -> dict[str, dict[str, int]]:
    """Try all cases; how many of each group had which outcome."""
    context = multiprocessing.get_context("spawn")
    progress, counts = context.Value("q", 0), context.Array("q", len(GROUPS) * len(OUTCOMES))
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        whole = Path(folder) / "whole"
        small_run(whole)
        start = 0
        while progress.value >= 0:
            root = Path(shutil.copytree(whole, Path(folder) / f"run{start}"))
            process = context.Process(target=work, args=(root, start, count, seed, stride, progress, counts, log))
            process.start()
            _wait(process, progress)
            if process.exitcode == 1 and progress.value == max(start - 1, 0):
                raise click.ClickException("the cases cannot be made")
            if progress.value >= 0:
                group, name, content = json.loads(root.with_suffix(".case").read_text())
                counts[GROUPS.index(group) * len(OUTCOMES) + OUTCOMES.index("CRASH")] += 1
                with open(log, "a") as lines:
                    print(json.dumps([progress.value, group, name, "CRASH", process.exitcode, 0, content]), file=lines)
                start = progress.value + 1
            shutil.rmtree(root)
    width = len(OUTCOMES)
    return {g: dict(zip(OUTCOMES, counts[i * width : (i + 1) * width], strict=True)) for i, g in enumerate(GROUPS)}


@click.command("input")
@click.option("--count", default=100_000, show_default=True, help="Files as a stranger might write them.")
@click.option("--seed", default=0, show_default=True, help="Of what strangers write.")
@click.option("--stride", default=1, show_default=True, help="Of the bytes and lengths, try each so-manieth.")
@click.option("--log", type=click.Path(path_type=Path), default="runs/torture/hostile_files.jsonl", show_default=True)
def broken_input(count: int, seed: int, stride: int, log: Path) -> None:
    """Damage a small run directory in every way; groktrace refuses it, or gives the same answer."""
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    started = time.monotonic()
    found = torture(count, seed, stride, log)
    click.echo("| input | " + " | ".join(("cases", *OUTCOMES)) + " |")
    click.echo("|---" * (2 + len(OUTCOMES)) + "|")
    for group, outcomes in found.items():
        click.echo(f"| {group} | " + " | ".join(str(n) for n in (sum(outcomes.values()), *outcomes.values())) + " |")
    click.echo(f"{time.monotonic() - started:.0f} s; violations and crashes are in {log}")
    if any(outcomes[bad] for outcomes in found.values() for bad in ("VIOLATION", "CRASH")):
        sys.exit(1)
