"""Tables of measurements that are kept as they come, and the bars they are held to."""

import csv
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

Row = dict[str, Any]


def note(text: str) -> None:
    """Progress, on stderr."""
    click.echo(text, err=True)


class Table:
    """Rows in a CSV, each with a key; written as they come.

    Args:
        path: the CSV.
        columns: its columns, the first of which is the key.
        fresh: whether to start over.
    """

    def __init__(self, path: Path, columns: Sequence[str], fresh: bool) -> None:
        self.path, self.columns = path, list(columns)
        self.rows: dict[str, dict[str, str]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not fresh:
            with path.open(newline="") as file:
                self.rows = {row[self.columns[0]]: row for row in csv.DictReader(file)}
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(self.rows.values())

    def measure(self, key: str, measurement: Callable[[], Row]) -> None:
        """Add the row that `measurement` returns, unless it is there."""
        if key in self.rows:
            return
        note(f"{self.path.stem}: {key}")
        row = {self.columns[0]: key} | measurement()
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


def _short(text: str) -> str:
    """A cell of a Markdown table: four figures of any number."""
    value = number(text)
    return text if math.isnan(value) or text.lstrip("-").isdigit() else f"{value:.4g}"


def print_markdown(columns: Sequence[str], rows: Iterable[dict[str, str]]) -> None:
    """Print a Markdown table."""
    click.echo("| " + " | ".join(columns) + " |")
    click.echo("|" + "---|" * len(columns))
    for row in rows:
        click.echo("| " + " | ".join(_short(row.get(name, "")) for name in columns) + " |")
    click.echo("")


@dataclass(frozen=True)
class Verdict:
    """One bar: what is asked, what was found, and whether that is enough."""

    bar: str
    found: str
    passed: bool


def print_verdicts(verdicts: Sequence[Verdict]) -> None:
    """Print each bar with its verdict."""
    for verdict in verdicts:
        click.echo(f"{'PASS' if verdict.passed else 'FAIL'}  {verdict.bar}: {verdict.found}")
    click.echo("")


def percent(value: float) -> str:
    """A fraction as text."""
    return f"{100 * value:.1f} %"


def listed(names: Sequence[str]) -> str:
    """Names in parentheses, if there are any."""
    return f" ({'; '.join(names)})" if names else ""
