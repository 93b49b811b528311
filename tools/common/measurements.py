"""What the benchmarks share: results that are kept as they come, contenders in turn, tables."""

import argparse
import csv
import hashlib
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import groktrace
from groktrace.run.files import write_json

Row = dict[str, str]


@dataclass(frozen=True)
class Bar:
    """A figure and the limit that it is held to.

    Attributes:
        claim: what is measured.
        measured: the figure; None where the peer was not there.
        limit: what it must reach.
        at_least: whether more is better.
        unit: of both.
    """

    claim: str
    measured: float | None
    limit: float
    at_least: bool
    unit: str = "×"

    def row(self) -> Row:
        """One line of the table of verdicts."""
        sign = "≥" if self.at_least else "≤"
        if self.measured is None:
            measured, verdict = "–", "not measured"
        else:
            met = self.measured >= self.limit if self.at_least else self.measured <= self.limit
            measured, verdict = f"{self.measured:.4g} {self.unit}", "met" if met else "NOT MET"
        return {"bar": self.claim, "limit": f"{sign} {self.limit:g} {self.unit}", "measured": measured, "": verdict}


class Store:
    """Finished parts of one benchmark, in one JSON file; those of other code or settings are dropped.

    Args:
        folder: where the file lies.
        name: of the benchmark.
        settings: whatever the results depend on.
    """

    def __init__(self, folder: Path, name: str, settings: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{name}.json"
        self.name = name
        about = {"settings": settings, "code": _code_digest(), **environment()}
        self.content: dict[str, Any] = {"about": about}
        if self.path.exists():
            kept = json.loads(self.path.read_text())
            if kept.get("about") == json.loads(json.dumps(about)):
                self.content = kept
            else:
                say(f"{self.path}: of other code or settings; starting anew")

    def cached(self, key: str, compute: Callable[[], Any]) -> Any:
        """The value kept under `key`, or the computed one, which is then kept."""
        if key not in self.content:
            say(f"{self.name}: {key}")
            self.content[key] = compute()
            write_json(self.path, self.content)
        return self.content[key]

    def finish(self, title: str, rows: Sequence[Row], bars: Sequence[Bar], notes: Sequence[str] = ()) -> None:
        """Keep and print a finished table."""
        self.content |= {"rows": list(rows), "bars": [vars(bar) for bar in bars], "notes": list(notes)}
        write_json(self.path, self.content)
        save_rows(self.path.with_suffix(".csv"), rows)
        print(f"\n### {title}\n\n{markdown(rows)}\n")
        for note in notes:
            print(f"- {note}")


def save_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write a table as CSV, with the columns of its first row."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def environment() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "processor": _processor(),
    }


def say(line: str) -> None:
    """Progress."""
    print(f"[{time.strftime('%H:%M:%S')}] {line}", file=sys.stderr, flush=True)


def in_turn(
    store: Store, group: str, contenders: Mapping[str, Callable[[int], Any]], rounds: int
) -> dict[str, list[Any]]:
    """Measure contenders one after the other, and all of them again, from the next one on: A B C, B C A.

    Args:
        store: keeps every finished round; a round is never split between processes.
        group: the key of the rounds.
        contenders: by name, from the round's number to a measurement in JSON values.
        rounds: how often.

    Returns:
        Measurements of each contender, one a round.
    """
    order = list(contenders)

    def one_round(r: int) -> dict[str, Any]:
        first = r % len(order)
        return {name: contenders[name](r) for name in (*order[first:], *order[:first])}

    measured = [store.cached(f"{group}, round {r}", lambda r=r: one_round(r)) for r in range(rounds)]
    return {name: [taken[name] for taken in measured] for name in contenders}


def seconds_a_step(run: Callable[[int], Any], steps: int) -> float:
    """Time of one step, what comes before the first one taken off; `run` has to have run before.

    Args:
        run: makes a number of steps.
        steps: timed.
    """
    few = 2
    start = time.perf_counter()
    run(few)
    between = time.perf_counter()
    run(few + steps)
    end = time.perf_counter()
    return ((end - between) - (between - start)) / steps


def ratios(times: Sequence[float], others: Sequence[float]) -> list[float]:
    """times/others, round by round."""
    return [a / b for a, b in zip(times, others, strict=True)]


def spread(values: Sequence[float], scale: float = 1.0, digits: int = 3) -> str:
    """Median (min–max)."""
    low, middle, high = (f"{scale * f(values):.{digits}g}" for f in (min, statistics.median, max))
    return f"{middle} ({low}–{high})"


def markdown(rows: Sequence[Row]) -> str:
    """A table whose columns are the keys of the rows."""
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([row[name] for name in head] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _code_digest() -> str:
    """A digest of groktrace's own source and of the benchmarks'."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for folder in (Path(groktrace.__file__).parent, here, here.parent / "speed"):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def command_line(description: str, parts: Mapping[str, Any], folder: str) -> argparse.ArgumentParser:
    """The options that all benchmarks take.

    Args:
        description: of the benchmark.
        parts: by name.
        folder: of the results, by default.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("part", choices=[*parts, "all", "verdicts", "memory-worker"])
    parser.add_argument("--out", type=Path, default=Path(folder), help="folder of the results")
    parser.add_argument("--tiny", action="store_true", help="a few steps of everything, to try the benchmark itself")
    parser.add_argument("--rounds", type=int, help="repetitions, instead of the settings'")
    return parser


def run_parts(parts: Mapping[str, Callable[[Path, Any], None]], part: str, folder: Path, settings: Any) -> None:
    """Run one part, or all; then, or alone, tell every bar of the finished parts, and whether it is met.

    Args:
        parts: by name.
        part: a name, "all" or "verdicts".
        folder: of the results.
        settings: given to the parts.
    """
    if part != "verdicts":
        about = environment()
        print(f"{about['processor']}, {about['cores']} cores, {about['threads']} threads, PyTorch {about['torch']}")
        for name in parts if part == "all" else [part]:
            parts[name](folder, settings)
    if part not in ("all", "verdicts"):
        return
    rows: list[Row] = []
    for name in parts:
        path = folder / f"{name}.json"
        kept = json.loads(path.read_text()) if path.exists() else {}
        if "bars" in kept:
            rows += [Bar(**bar).row() for bar in kept["bars"]]
        else:
            say(f"{name}: not finished; run it first")
    if rows:
        print(f"\n### Verdicts\n\n{markdown(rows)}")


def peak_bytes() -> int:
    """Peak resident size of this process."""
    status = Path("/proc/self/status")
    if status.exists():  # elsewhere the figure may begin at the size of the process that started this one
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
