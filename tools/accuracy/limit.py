"""The learning coefficient itself beside its exact value: singular models, intervals, and internal constants."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import groktrace
from groktrace.analysis import point
from groktrace.analysis.measurement import limit_by_chains, limit_by_particles
from groktrace.sampling import annealing
from tools.common.known_answers import (
    KnownModel,
    bowl,
    deep_linear,
    geometric,
    modular,
    normal_crossing,
    reduced_rank,
    teacher,
)
from tools.common.measurements import Row, Table, Verdict, listed, number, percent, print_markdown

RIGHT_WITHIN = 0.05
RIGHT_SHARE = 0.95
MEDIAN_SECONDS = 20.0
SEEDS, CHAIN_SEEDS = 200, 25
COVERAGE = (0.90, 0.99)

COLUMNS = [
    *("model", "family", "D", "exact", "λ", "low", "high", "error", "within", "reached", "nβ from", "nβ to"),
    *("gradients", "seconds", "reasons"),
]
SHOWN = ["model", "D", "exact", "λ", "low", "high", "error", "within", "nβ from", "nβ to", "seconds"]


def limit_models() -> list[KnownModel]:
    """Models of at most 400 weights whose λ is known."""
    nothing = {"nbeta": 1.0, "localization": 1.0}  # the limit derives its own
    teachers = [(5, 3, 2), (16, 5, 4), (6, 3, 4), (4, 2, 12), (4, 3, 20), (6, 2, 24), (5, 3, 30), (4, 3, 40)]
    pairs = [(5, 2, None), (7, 4, None), (11, 4, None), (7, 12, 24), (5, 20, None), (5, 26, None), (7, 19, 24)]
    ranks = [
        *((5, 3, 5, 1), (5, 3, 5, 2), (8, 4, 6, 2), (2, 9, 3, 0), (10, 6, 10, 3), (10, 2, 3, 1), (4, 4, 4, 0)),
        *((6, 5, 4, 1), (7, 3, 3, 2), (12, 8, 12, 4)),
    ]
    deep = [
        *(((5, 5, 5, 5), 2), ((10, 4, 8, 6), 3), ((6, 6, 6, 6, 6), 2), ((8, 3, 9, 5, 7), 2), ((4, 4, 4, 4), 1)),
        *(((6, 3, 3, 6), 2), ((7, 5, 5, 3), 1)),
    ]
    crossings = [(1,), (1, 1), (1, 1, 1), (2,), (1, 2), (2, 2), (2, 1, 1), (1, 3), (3, 3), (2, 2, 2)]
    return [
        *[teacher(d, p, k, **nothing) for d, p, k in teachers],
        *[modular(p, k, pairs=n, **nothing) for p, k, n in pairs],
        *[reduced_rank(*shape, **nothing) for shape in ranks],
        *[deep_linear(widths, rank, **nothing) for widths, rank in deep],
        *[normal_crossing(exponents, **nothing) for exponents in crossings],
    ]


def find_limit(known: KnownModel, **settings: Any) -> groktrace.LearningCoefficient:
    """λ at the model's weights."""
    return groktrace.estimate_llc(known.model, known.loss, known.train, limit=True, **settings)


def measure_limit(known: KnownModel) -> Row:
    """λ of one model, with no setting but the data."""
    start = time.process_time()
    found = find_limit(known)
    seconds = time.process_time() - start
    error = None if found.llc is None else found.llc / known.exact - 1
    inside = found.low is not None and found.low <= known.exact <= found.high
    return {
        "family": known.family,
        "D": sum(weight.numel() for weight in known.model.parameters()),
        "exact": known.exact,
        "λ": found.llc,
        "low": found.low,
        "high": found.high,
        "error": error,
        "within": error is not None and (inside or abs(error) <= RIGHT_WITHIN),
        "reached": found.reached,
        "nβ from": found.plateau and found.plateau[0],
        "nβ to": found.ladder[-1].nbeta,
        "gradients": found.gradients,
        "seconds": seconds,
        "reasons": "; ".join(found.reasons),
    }


def run_limit(out: Path, fresh: bool) -> list[Verdict]:
    """λ of all models with known limits."""
    table = Table(out / "limit.csv", COLUMNS, fresh)
    models = {f"{known.family}: {known.name}": known for known in limit_models()}
    for key, known in models.items():
        table.cached(key, measure_limit, known)
    rows = [table.rows[key] for key in models]
    print_markdown(SHOWN, rows)
    wrong = [row["model"] for row in rows if row["within"] != "True"]
    silent = [row["model"] for row in rows if row["within"] != "True" and row["reached"] == "True"]
    errors = [abs(number(row["error"])) for row in rows if row["error"]]
    seconds = statistics.median(number(row["seconds"]) for row in rows)
    right = 1 - len(wrong) / len(rows)
    bar = f"limit: at least {percent(RIGHT_SHARE)} within {percent(RIGHT_WITHIN)} or their interval"
    return [
        Verdict(bar, f"{percent(right)} of {len(rows)}" + listed(wrong), right >= RIGHT_SHARE),
        Verdict("limit: no silent failure", f"{len(silent)}" + listed(silent), not silent),
        Verdict(
            "limit: median error at most 2 %", percent(statistics.median(errors)), statistics.median(errors) <= 0.02
        ),
        Verdict(f"limit: median at most {MEDIAN_SECONDS:g} s", f"{seconds:.1f} s", seconds <= MEDIAN_SECONDS),
    ]


def limit_cells() -> list[KnownModel]:
    """Four models of four families, quick ones."""
    nothing = {"nbeta": 1.0, "localization": 1.0}
    return [
        reduced_rank(5, 3, 5, 1, **nothing),
        modular(5, 4, **nothing),
        deep_linear((10, 4, 8, 6), 3, **nothing),
        normal_crossing((1, 2), **nothing),
    ]


def find_by_chains(known: KnownModel, **settings: Any) -> groktrace.LearningCoefficient:
    """λ at the model's weights, found as that of larger networks."""
    kept = point.LIMIT
    point.LIMIT = dataclasses.replace(kept, max_weights=0)
    try:
        return find_limit(known, **settings)
    finally:
        point.LIMIT = kept


def chain_cells() -> list[KnownModel]:
    """Four models of three families whose limit chains reach."""
    nothing = {"nbeta": 1.0, "localization": 1.0}
    flat = dataclasses.replace(bowl("20 directions, 10 flat", geometric(20, 1e3, flat=10), 1.0, 1.0), exact=10.0)
    return [
        reduced_rank(5, 3, 5, 1, **nothing),
        reduced_rank(12, 8, 12, 4, **nothing),
        teacher(5, 3, 2, **nothing),
        flat,
    ]


def run_limit_coverage(out: Path, fresh: bool) -> list[Verdict]:
    """How often the 95 % intervals of λ cover it."""
    return _coverage(out / "limit_coverage.csv", fresh, limit_cells(), find_limit, SEEDS, "limit")


def run_chains_coverage(out: Path, fresh: bool) -> list[Verdict]:
    """The same of intervals from chains, of small models."""
    table = out / "limit_chains_coverage.csv"
    return _coverage(table, fresh, chain_cells(), find_by_chains, CHAIN_SEEDS, "limit by chains")


def _coverage(
    path: Path, fresh: bool, models: Sequence[KnownModel], find: Callable[..., Any], seeds: int, name: str
) -> list[Verdict]:
    table = Table(path, ["run", "cell", "exact", "λ", "low", "high", "reached"], fresh)
    summary, verdicts = [], []
    for known in models:
        cell = f"{known.family}: {known.name}"
        for seed in range(seeds):
            table.cached(f"{cell} seed={seed}", _seed, known, cell, seed, find)
        rows = [row for row in table.rows.values() if row["cell"] == cell]
        reached = [row for row in rows if row["reached"] == "True"]
        inside = [number(row["low"]) <= known.exact <= number(row["high"]) for row in reached]
        share = sum(inside) / len(inside)
        found = [number(row["λ"]) for row in reached]
        half = statistics.fmean(number(row["high"]) - number(row["low"]) for row in reached) / 2
        summary.append(
            {
                "model": cell,
                "exact": f"{known.exact:g}",
                "mean λ": f"{statistics.fmean(found):.4g}",
                "scatter": f"{statistics.pstdev(found):.2g}",
                "half of an interval": f"{half:.2g}",
                "reached": f"{len(reached)} of {len(rows)}",
                "covered": percent(share),
            }
        )
        bar = f"{name}: {percent(COVERAGE[0])} to {percent(COVERAGE[1])} covered, {cell}"
        verdicts.append(Verdict(bar, percent(share), COVERAGE[0] <= share <= COVERAGE[1]))
    print_markdown(list(summary[0]), summary)
    return verdicts


def _seed(known: KnownModel, cell: str, seed: int, find: Callable[..., Any]) -> Row:
    found = find(known, seed=seed)
    row = {"cell": cell, "exact": known.exact, "λ": found.llc, "low": found.low, "high": found.high}
    return row | {"reached": found.reached}


# What chains have of the constants of a limit.
OF_CHAINS = (
    *("first_resolution", "rung_ratio", "min_rungs", "max_rungs", "shrinking", "max_chain_steps", "max_operations"),
    *("descent_share", "descended", "narrower", "narrowings", "chain_error", "max_extrapolation", "max_mode_distance"),
)
# Shares of 1: those above a half are halved and doubled by what they lack of 1.
SHARES = {"acceptance", "effective_share", "correlation", "kept", "max_residual_correlation", "longer"}


def run_limit_constants(out: Path, fresh: bool) -> list[Verdict]:
    """What halving and doubling each internal constant does to λ, in units of its own error."""
    places = ((annealing, "ANNEALING"), (limit_by_particles, "LIMIT"))
    return _constants(out / "limit_constants.csv", fresh, limit_cells(), find_limit, places, "limit")


def run_chains_constants(out: Path, fresh: bool) -> list[Verdict]:
    """The same of chains, of two small models."""
    table, places = out / "limit_chains_constants.csv", ((limit_by_chains, "LIMIT"),)
    return _constants(table, fresh, chain_cells()[1:3], find_by_chains, places, "limit by chains", OF_CHAINS)


def _constants(
    path: Path,
    fresh: bool,
    models: Sequence[KnownModel],
    find: Callable[..., Any],
    places: Sequence[tuple[Any, str]],
    title: str,
    only: Sequence[str] = (),
) -> list[Verdict]:
    table = Table(path, ["run", "constant", "times", "λ", "half", "moved"], fresh)
    moves, failed = {}, []
    for known in models:
        cell = f"{known.family}: {known.name}"
        middle = find(known)
        for module, name in places:
            settings = getattr(module, name)
            for field in dataclasses.fields(settings):
                for times in (0.5, 2.0):
                    changed = _scaled(getattr(settings, field.name), times, field.name)
                    if changed is None or (only and field.name not in only):
                        continue
                    key = f"{cell} {field.name} × {times:g}"
                    other = dataclasses.replace(settings, **{field.name: changed})
                    row = table.cached(key, _moved, known, middle, module, name, other, settings, find)
                    if row["λ"]:
                        moves[key] = number(row["moved"])
                    else:
                        failed.append(key)
    worst = sorted(moves, key=lambda key: -abs(moves[key]))[:12]
    print_markdown(["run", "λ", "half", "moved"], [table.rows[key] for key in worst])
    beyond = [key for key, move in moves.items() if abs(move) > 1]
    within = 1 - len(beyond) / len(moves)
    bar = f"{title}: halving or doubling a constant moves λ by less than its error"
    return [
        Verdict(bar, f"{percent(within)} of {len(moves)}" + listed(beyond), not beyond),
        Verdict(
            f"{title}: and leaves no answer out",
            f"{len(failed)} of {len(moves) + len(failed)}" + listed(failed),
            not failed,
        ),
    ]


def _scaled(value: Any, times: float, name: str) -> Any:
    """A constant times so much; None where it cannot be."""
    if isinstance(value, tuple):
        return None
    if name in SHARES:
        return 1 - (1 - value) * times if value > 0.5 else value * times
    scaled = value * times
    return max(1, round(scaled)) if isinstance(value, int) else scaled


def _moved(
    known: KnownModel,
    middle: groktrace.LearningCoefficient,
    module: Any,
    name: str,
    changed: Any,
    settings: Any,
    find: Callable[..., Any],
) -> Row:
    setattr(module, name, changed)
    try:
        found = find(known)
    finally:
        setattr(module, name, settings)
    if found.llc is None or middle.llc is None:
        return {"λ": None}
    half = (middle.high - middle.low + found.high - found.low) / 4
    return {"λ": found.llc, "half": half, "moved": (found.llc - middle.llc) / half}
