"""Six things done wrong on purpose: which of them the reasons name."""

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

import groktrace
from tools.accuracy.known import estimate
from tools.common.known_answers import (
    bowl,
    geometric,
    teacher,
)
from tools.common.measurements import Row, Table, Verdict, print_markdown


def reasons_of_nan(out: Path) -> tuple[str, ...]:
    """A recorded run whose second snapshot holds NaN."""
    place = out / "failures" / "nan"
    shutil.rmtree(place, ignore_errors=True)
    known = teacher(6, 3, 4, math.nan, math.nan)
    with groktrace.watch(known.model, train=known.train, loss=known.loss, out=place, every=1) as recorder:
        recorder.step()
        with torch.no_grad():
            known.model.W[0, 0] = math.nan
        recorder.step()
    return groktrace.analyze(place).points[-1].reasons


def planted_failures(out: Path) -> dict[str, tuple[str, Callable[[], tuple[str, ...]]]]:
    """What is wrong: the word that the reasons must hold, and the reasons given."""
    flat = bowl("half flat", geometric(50, 1e3, flat=50), 1e3, 1)
    settled = teacher(6, 3, 4, math.nan, math.nan)
    astray = replace(teacher(6, 3, 4, math.nan, math.nan, seed=1), train=settled.train)
    automatic = estimate(settled, burn_in=10, draws=10).step_size
    return {
        "flat directions not equilibrated": (
            "not equilibrated",
            lambda: (
                estimate(flat, method="sgld", nbeta=1e3, localization=1, burn_in=0, draws=200, step_size=5e-4).reasons
            ),
        ),
        "step size 100 times too large": (
            "diverging",
            lambda: estimate(settled, step_size=100 * automatic).reasons,
        ),
        "weights of another network": ("not at a minimum", lambda: estimate(astray).reasons),
        "ten draws": ("too few draws", lambda: estimate(settled, draws=10).reasons),
        "hardly any localisation": (
            "not local",
            lambda: estimate(settled, nbeta=1, localization=1e-3, burn_in=2000, draws=8000).reasons,
        ),
        "NaN weights": ("not finite", lambda: reasons_of_nan(out)),
    }


def measure_failure(expected: str, reasons: Callable[[], tuple[str, ...]]) -> Row:
    """Whether the reasons name one failure."""
    found = reasons()
    flagged = any(expected in reason for reason in found)
    return {"expected": expected, "flagged": flagged, "reasons": "; ".join(found)}


def run_failures(out: Path, fresh: bool) -> list[Verdict]:
    """Six things done wrong on purpose."""
    table = Table(out / "failures.csv", ["failure", "expected", "flagged", "reasons"], fresh)
    for failure, (expected, reasons) in planted_failures(out).items():
        table.cached(failure, measure_failure, expected, reasons)
    print_markdown(table.columns, table.rows.values())
    return [
        Verdict(f"failures: {row['failure']} flagged '{row['expected']}'", row["reasons"], row["flagged"] == "True")
        for row in table.rows.values()
    ]
