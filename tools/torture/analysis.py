"""Kills, rivals and other circumstances: what an analysis has to come out of with the same result."""

import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from click.testing import CliRunner
from torch import nn

import groktrace
from groktrace.cli import main as command_line
from groktrace.run import layout
from groktrace.sampling import chains
from tools.torture.tally import Tally, forked, lives, seed_option, trials_option

SETTINGS = {"chains": 2, "burn_in": 10, "draws": 20}
FEW = tuple(part for name, value in SETTINGS.items() for part in (f"--{name.replace('_', '-')}", str(value)))


def record_small_run(root: Path, steps: int = 24) -> None:
    """A classifier's training, to be analysed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(60, 4), torch.randint(0, 3, (60,))
    with groktrace.watch(model, optimizer, train=(x, y), loss="cross_entropy", out=root, every=1):
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()


def analysed(root: Path) -> dict[str, str]:
    """What an analysis leaves, by name of the file; a digest each."""
    found = {}
    for path in sorted((root / layout.ANALYSIS_FOLDER).rglob("*")):
        if path.is_file() and path.name != ".lock":
            found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def run_analysis(root: Path) -> str:
    """The command, in this process; what it prints."""
    result = CliRunner().invoke(command_line, ["analyze", str(root), "--json", *FEW])
    if result.exit_code not in (0, 3):
        raise SystemExit(f"groktrace analyze: {result.exit_code}: {result.output}")
    return result.stdout


def set_stack_bytes(count: int) -> None:
    """Let a stack of chains take so much memory, in this process."""
    chains.MEMORY = replace(chains.MEMORY, stack_bytes=count)


@click.command()
@trials_option
@seed_option
def analyze(trials: int | None, seed: int) -> None:
    """SIGKILL an analysis at random moments and start it again; two at once; one beside a recording."""
    torch.set_num_threads(1)
    set_stack_bytes(2**18)  # many stacks, so that there is something to interrupt
    trials, draw, tally = trials or 100, random.Random(seed), Tally("kill -9 of an analysis")
    with tempfile.TemporaryDirectory() as scratch:
        source, root = Path(scratch) / "source", Path(scratch) / "run"
        record_small_run(source)

        def fresh() -> None:
            shutil.rmtree(root, ignore_errors=True)
            shutil.copytree(source, root)

        fresh()
        run_analysis(root)  # what is done once in a process is done
        fresh()
        began = time.perf_counter()
        printed = run_analysis(root)
        seconds, whole = time.perf_counter() - began, analysed(root)
        fresh()
        began = time.perf_counter()
        groktrace.analyze(root, **SETTINGS)
        sampling = time.perf_counter() - began  # the rest of the command's time is TensorBoard's and transitions'
        for trial in range(3 * trials):
            if tally.counts["kills"] == trials:
                break
            fresh()
            child = forked(lambda: run_analysis(root))
            time.sleep(draw.uniform(0, seconds if trial % 5 == 0 else sampling))
            os.kill(child, signal.SIGKILL)
            ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            tally.expect(ended != 1, f"trial {trial}: the analysis failed by itself")
            tally.counts["kills"] += ended == -signal.SIGKILL
            before = analysed(root)
            tally.counts["before any result"] += not before
            tally.counts["after the last"] += before == whole
            tally.expect(run_analysis(root) == printed, f"trial {trial}: printed something else")
            tally.expect(analysed(root) == whole, f"trial {trial}: other files than without the kill")
            tally.expect(not list(root.glob("analysis/**/.tmp*")), f"trial {trial}: leftovers")

        for trial in range(max(1, trials // 10)):
            fresh()
            first = forked(lambda: run_analysis(root))
            while lives(first) and not list(root.glob("analysis/*/.lock")):
                time.sleep(0.001)
            time.sleep(draw.uniform(0, seconds))
            second = CliRunner().invoke(command_line, ["analyze", str(root), "--json", *FEW])
            held = f"another analysis (process {first} " in second.stderr
            tally.expect(held or second.stdout == printed, f"two at once, {trial}: {second.output}")
            tally.expect(
                os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]) == 0, f"two at once, {trial}: the first failed"
            )
            tally.expect(analysed(root) == whole, f"two at once, {trial}: other files")
            tally.counts["second analyses refused" if held else "second analyses after the first"] += 1

        shutil.rmtree(root)
        recording = forked(lambda: record_small_run(root, 400))
        while lives(recording) and not layout.snapshot_steps(root):
            time.sleep(0.001)
        for _ in range(min(3, trials)):
            steps = [point["step"] for point in json.loads(run_analysis(root))["trajectory"]]
            tally.expect(steps == list(range(len(steps))), f"beside a recording: {steps}")
            tally.counts["analyses beside a recording"] += 1
        os.kill(recording, signal.SIGKILL)
        os.waitpid(recording, 0)
    tally.finish()


def in_reverse(root: Path) -> None:
    """Write the snapshots anew, the last first."""
    for path in sorted((root / layout.WEIGHTS_FOLDER).iterdir(), reverse=True):
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)


@click.command()
@click.option("--tiny", is_flag=True, help="A small run instead of the reference example's.")
def determinism(tiny: bool) -> None:
    """One run and seed, other circumstances: how far the trajectory moves, in standard errors."""
    torch.set_num_threads(1)
    tally, budget = Tally("determinism"), chains.MEMORY.stack_bytes
    changes: dict[str, Callable[[Path], Any]] = {
        "as it is": lambda root: None,
        "again": lambda root: None,
        "files written in reverse order": in_reverse,
        "a quarter of the memory": lambda root: set_stack_bytes(budget // 4),
        "four times the memory": lambda root: set_stack_bytes(budget * 4),
        "two threads": lambda root: torch.set_num_threads(2),
    }
    found: dict[str, list[groktrace.analysis.results.trajectory.Point]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        source, root, result = (Path(scratch) / name for name in ("source", "run", "result.json"))
        if tiny:
            record_small_run(source)
        else:
            example = Path(__file__).parents[2] / "examples" / "modular_addition.py"
            subprocess.run([sys.executable, str(example), "--out", str(source)], check=True, stdout=subprocess.DEVNULL)

        def work(change: Callable[[Path], Any]) -> None:
            change(root)
            groktrace.analyze(root, **(SETTINGS if tiny else {})).save(result)

        for name, change in changes.items():
            shutil.rmtree(root, ignore_errors=True)
            shutil.copytree(source, root)
            code = os.waitstatus_to_exitcode(os.waitpid(forked(lambda change=change: work(change)), 0)[1])
            tally.expect(code == 0, f"{name}: ended with {code}")
            found[name] = list(groktrace.Trajectory.load(result).points)
    first = found.pop("as it is")
    tally.counts["snapshots"] = len(first)
    click.echo("| other circumstance | points not bitwise the same | λ̂ moves by, reliable points | others |")
    click.echo("|---|---|---|---|")
    for name, points in found.items():
        moves = {True: 0.0, False: 0.0}
        for a, b in zip(first, points, strict=True):
            moves[a.reliable] = max(moves[a.reliable], abs(a.llc - b.llc) / a.stderr)
        odd = sum(a != b for a, b in zip(first, points, strict=True))
        click.echo(f"| {name} | {odd} | {moves[True]:.2g} standard errors | {moves[False]:.2g} |")
        bitwise = name in ("again", "files written in reverse order")
        tally.expect(moves[True] <= 0.01 and not (bitwise and odd), f"{name}: {odd} points, {moves}")
    tally.finish()


@click.command()
def network() -> None:
    """Record and analyse where every socket is refused."""
    tally = Tally("without a network")

    class Refused(socket.socket):
        def __init__(self, *_: Any, **__: Any) -> None:
            raise AssertionError("a socket was opened")

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("an address was looked up")

    socket.socket, socket.getaddrinfo, socket.create_connection = Refused, refuse, refuse
    with tempfile.TemporaryDirectory() as scratch:
        record_small_run(Path(scratch) / "run")
        steps = json.loads(run_analysis(Path(scratch) / "run"))["trajectory"]
        tally.expect(len(steps) == 25, f"{len(steps)} snapshots analysed")
        tally.counts["snapshots recorded and analysed"] += len(steps)
    tally.finish()
