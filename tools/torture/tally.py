"""Count what was tried and what failed, and watch processes."""

import os
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import click

trials_option = click.option("--trials", type=int, help="How many times, instead of what tools/README.md has.")
seed_option = click.option("--seed", default=0, show_default=True, help="Of the random moments.")


class Tally:
    """Counts what was tried, and what failed."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []

    def expect(self, true: bool, what: str) -> None:
        """Note a failure, unless it is true."""
        if not true:
            self.failures.append(what)
            click.echo(f"FAILED: {what}", err=True)

    def finish(self) -> None:
        """Print the counts; exit code 1 where something failed."""
        counts = ", ".join(f"{count} {name}" for name, count in self.counts.items())
        click.echo(f"{self.what}: {counts}; {len(self.failures)} failures")
        if self.failures:
            sys.exit(1)


def forked(action: Callable[[], Any]) -> int:
    """The process that runs the action in a copy of this one, and ends with 0 unless it raises."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return child


def lives(child: int) -> bool:
    """Whether a forked process has not ended by itself; it can still be waited for."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
