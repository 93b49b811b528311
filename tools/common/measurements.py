"""What is measured, kept as it comes: rows, tables, the bars they are held to, and contenders in turn."""

import argparse
import contextlib
import csv
import hashlib
import json
import math
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import groktrace
from groktrace.run.files import write_json

Row = dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """A bar, what came out, and whether that is enough.

    Attributes:
        claim: what is asked, or measured.
        measured: what came out: in words, or a figure; None where the peer was not there.
        passed: whether the words are enough.
        limit: that the figure must reach.
        at_least: whether more is better.
        unit: of both.
    """

    claim: str
    measured: float | str | None
    passed: bool | None = None
    limit: float = 0.0
    at_least: bool = True
    unit: str = "×"

    @property
    def met(self) -> bool | None:
        """Whether it is enough; None where nothing was measured."""
        if self.measured is None or isinstance(self.measured, str):
            return self.passed
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    def row(self) -> Row:
        """One line of the table of verdicts, of a figure."""
        measured = "–" if self.measured is None else f"{self.measured:.4g} {self.unit}"
        verdict = "not measured" if self.met is None else "met" if self.met else "NOT MET"
        limit = f"{'≥' if self.at_least else '≤'} {self.limit:g} {self.unit}"
        return {"bar": self.claim, "limit": limit, "measured": measured, "": verdict}


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
        about = {"settings": settings, "code": _code_digest(), **environment()}
        self.content: dict[str, Any] = {"about": about}
        if self.path.exists():
            kept = json.loads(self.path.read_text())
            if kept.get("about") == json.loads(json.dumps(about)):
                self.content = kept
            else:
                say(f"{self.path}: of other code or settings; starting anew")

    def cached(self, key: str, compute: Callable[..., Any], *arguments: Any) -> Any:
        """The value kept under `key`, or that of `compute` with these arguments, which is then kept."""
        if key not in self.content:
            say(f"{self.path.stem}: {key}")
            self._keep(key, compute(*arguments))
        return self.content[key]

    def _keep(self, key: str, value: Any) -> None:
        self.content[key] = value
        write_json(self.path, self.content)

    def finish(self, title: str, rows: Sequence[Row], bars: Sequence[Verdict], notes: Sequence[str] = ()) -> None:
        """Keep and print a finished table."""
        self.content |= {"rows": list(rows), "bars": [vars(bar) for bar in bars], "notes": list(notes)}
        write_json(self.path, self.content)
        finish_table(self.path.with_suffix(".csv"), title, rows)
        for note in notes:
            print(f"- {note}")


class Table(Store):
    """Rows of one CSV, each with a key, whatever code they are of.

    Args:
        path: the CSV.
        columns: its columns, the first of which is the key.
        fresh: whether to start over.
    """

    def __init__(self, path: Path, columns: Sequence[str], fresh: bool) -> None:
        self.path, self.columns = path, list(columns)
        kept = []
        if path.exists() and not fresh:
            with path.open(newline="") as file:
                kept = [{name: row.get(name, "") for name in columns} for row in csv.DictReader(file)]
        self.rows = self.content = {row[self.columns[0]]: row for row in kept}
        save_rows(path, kept, columns)

    def _keep(self, key: str, value: Row) -> None:
        row = {self.columns[0]: key} | value
        self.rows[key] = {name: _text(row.get(name)) for name in self.columns}
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(self.rows[key])

    def number(self, key: str, column: str) -> float:
        """One value; NaN where there is none."""
        return number(self.rows.get(key, {}).get(column, ""))


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def number(text: str) -> float:
    """The number that a cell holds; NaN where it holds none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def save_rows(path: Path, rows: Sequence[Row], columns: Sequence[str] = ()) -> None:
    """Write a table as CSV, with these columns or those of its first row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns or list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def markdown(rows: Sequence[Row], columns: Sequence[str] = ()) -> str:
    """A table with these columns, or those of its first row."""
    head = list(columns or rows[0])
    lines = [head, ["---"] * len(head), *([row[name] for name in head] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def print_markdown(columns: Sequence[str], rows: Iterable[Row]) -> None:
    """Print some columns of stored rows, with four figures of any number."""
    print(markdown([{name: _short(row.get(name, "")) for name in columns} for row in rows], columns) + "\n")


def _short(text: str) -> str:
    value = number(text)
    return text if math.isnan(value) or text.lstrip("-").isdigit() else f"{value:.4g}"


def print_table(title: str, rows: Sequence[Row]) -> None:
    """Print a table below its title."""
    print(f"\n### {title}\n\n{markdown(rows)}\n")


def finish_table(path: Path, title: str, rows: Sequence[Row]) -> None:
    """Write a table as CSV, and print it."""
    save_rows(path, rows)
    print_table(title, rows)


def percent(value: float) -> str:
    """A fraction as text."""
    return f"{100 * value:.1f} %"


def listed(names: Sequence[str]) -> str:
    """Names in parentheses, if there are any."""
    return f" ({'; '.join(names)})" if names else ""


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

    measured = [store.cached(f"{group}, round {r}", one_round, r) for r in range(rounds)]
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


def spread(values: Sequence[float], scale: float = 1.0) -> str:
    """Median (min–max)."""
    low, middle, high = (f"{scale * f(values):.3g}" for f in (min, statistics.median, max))
    return f"{middle} ({low}–{high})"


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
            rows += [Verdict(**bar).row() for bar in kept["bars"]]
        else:
            say(f"{name}: not finished; run it first")
    if rows:
        print(f"\n### Verdicts\n\n{markdown(rows)}")


def peak_bytes(process: int | str = "self") -> int:
    """Peak resident size of a process; 0 where the system does not tell that of another."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if process != "self":
        return 0
    # This figure may begin at the size of the process that started this one.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
