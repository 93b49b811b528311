"""What step size, batch size and rtol do to λ̂."""

import math
import statistics
from pathlib import Path
from typing import Any

from tools.accuracy.known import estimate
from tools.accuracy.reference import REFERENCE_RUNS, record_reference
from tools.common.known_answers import (
    KnownModel,
    bowl,
    centred_half_square,
    geometric,
    teacher,
)
from tools.common.measurements import Row, Table, Verdict, number, percent, print_markdown

STEP_SCALES = (0.2, 0.5, 1.0, 1.8)
STEP_TOLERANCE = 0.02
BATCH_SIZES = (64, 256)
BATCH_TOLERANCE = 0.03
PRECISE = 0.005
# Plain SGLD takes this many draws a chain at our own step size, and proportionally more at smaller ones.
SGLD_DRAWS = 600
PROMISES = (0.05, 0.02, 0.01)
PROMISE_SEEDS = 12
# Root mean square of the relative errors over `PROMISE_SEEDS` seeds, in units of rtol: 1 plus two standard errors.
PROMISE_SLACK = 1 + 2 / (2 * PROMISE_SEEDS) ** 0.5

INSENSITIVITY_COLUMNS = ["run", "subject", "what", "value", "λ̂", "stderr", "reliable", "reasons"]


def trained(out: Path, name: str) -> KnownModel:
    """The last snapshot of a reference run; its λ is not known."""
    run = record_reference(out, name)
    model, train, _ = REFERENCE_RUNS[name].prepare()
    last = max(run.snapshots, key=lambda snapshot: snapshot.step)
    model.load_state_dict(last.load())
    return KnownModel(name, "trained", model, centred_half_square, train, math.nan, math.nan, math.nan)


def run_insensitivity(out: Path, fresh: bool) -> list[Verdict]:
    """What the step size, the batch size and rtol do to λ̂."""
    table = Table(out / "insensitivity.csv", INSENSITIVITY_COLUMNS, fresh)
    flat = bowl("D=100 half flat", geometric(50, 1e3, flat=50), math.nan, math.nan)
    small = teacher(16, 5, 4, math.nan, math.nan)
    grokked = trained(out, "grokked p=23")
    verdicts = []
    for known, chains in ((grokked, 2), (small, 8), (flat, 8)):
        common = {"chains": chains, "rtol": PRECISE}
        verdicts += vary_step(table, known, common)
        if known is not flat:
            verdicts += vary_batch(table, known, common)
    for known in (flat, small):
        verdicts += hold_to_promise(table, known)
    return verdicts


def record(table: Table, known: KnownModel, what: str, value: Any, settings: dict[str, Any]) -> str:
    """Measure one estimate into the table; its key."""
    key = f"{known.name} {what}={value}"

    def measurement() -> Row:
        found = estimate(known, **settings)
        return {
            "subject": known.name,
            "what": what,
            "value": value,
            "λ̂": found.llc,
            "stderr": found.stderr,
            "reliable": found.reliable,
            "reasons": "; ".join(found.reasons),
        }

    table.cached(key, measurement)
    return key


def vary_step(table: Table, known: KnownModel, common: dict[str, Any]) -> list[Verdict]:
    """Our step size scaled, and plain SGLD at the same step sizes and run lengths."""
    automatic = estimate(known, chains=2)
    scale = {"nbeta": automatic.nbeta, "localization": automatic.localization}
    rows, moves = [], []
    ours = {}
    for factor in STEP_SCALES:
        step = {"step_size": factor * automatic.step_size}
        ours[factor] = record(table, known, "step", factor, common | scale | step)
        lengths = {"burn_in": math.ceil(automatic.burn_in / factor), "draws": math.ceil(SGLD_DRAWS / factor)}
        record(
            table, known, "sgld step", factor, {"chains": common["chains"], "method": "sgld"} | scale | step | lengths
        )
    middle = table.number(ours[1.0], "λ̂")
    for factor in STEP_SCALES:
        plain = table.rows[f"{known.name} sgld step={factor}"]
        move = table.number(ours[factor], "λ̂") / middle - 1
        moves.append(abs(move))
        rows.append(
            {
                "subject": known.name,
                "ε / automatic ε": str(factor),
                "λ̂": table.rows[ours[factor]]["λ̂"],
                "stderr": table.rows[ours[factor]]["stderr"],
                "moved": percent(move),
                "plain SGLD": plain["λ̂"] or "diverged",
                "SGLD moved": percent(number(plain["λ̂"]) / middle - 1),
            }
        )
    print_markdown(list(rows[0]), rows)
    worst = max(math.inf if math.isnan(move) else move for move in moves)
    bar = f"insensitivity: step × {STEP_SCALES[0]} to {STEP_SCALES[-1]} moves λ̂ at most {percent(STEP_TOLERANCE)}"
    return [Verdict(f"{bar}, {known.name}", percent(worst), worst <= STEP_TOLERANCE)]


def vary_batch(table: Table, known: KnownModel, common: dict[str, Any]) -> list[Verdict]:
    """Smaller batches against all samples, with plain SGLD on the same batches beside them."""
    automatic = estimate(known, chains=2)
    scale = {"nbeta": automatic.nbeta, "localization": automatic.localization}
    full = record(table, known, "batch", "full", common | scale)
    reference = table.number(full, "λ̂")
    rows, moves = [], []
    plain = {"method": "sgld", "step_size": automatic.step_size, "burn_in": automatic.burn_in, "draws": SGLD_DRAWS}
    for size in BATCH_SIZES:
        key = record(table, known, "batch", size, common | scale | {"batch_size": size})
        beside = record(
            table, known, "sgld batch", size, {"chains": common["chains"], "batch_size": size} | scale | plain
        )
        move = table.number(key, "λ̂") / reference - 1
        moves.append(abs(move))
        rows.append(
            {
                "subject": known.name,
                "batch": f"{size} of {len(known.train[0])}",
                "λ̂": table.rows[key]["λ̂"],
                "stderr": table.rows[key]["stderr"],
                "moved": percent(move),
                "plain SGLD": table.rows[beside]["λ̂"] or "diverged",
                "SGLD moved": percent(table.number(beside, "λ̂") / reference - 1),
            }
        )
    print_markdown(list(rows[0]), rows)
    worst = max(math.inf if math.isnan(move) else move for move in moves)
    bar = f"insensitivity: batch {BATCH_SIZES[0]} to all moves λ̂ at most {percent(BATCH_TOLERANCE)}"
    return [Verdict(f"{bar}, {known.name}", percent(worst), worst <= BATCH_TOLERANCE)]


def hold_to_promise(table: Table, known: KnownModel) -> list[Verdict]:
    """Errors against a long reference where the estimate claims to have met rtol."""
    automatic = estimate(known, chains=2)
    scale = {"nbeta": automatic.nbeta, "localization": automatic.localization}
    key = record(table, known, "long reference", 32, scale | {"chains": 32, "draws": 3000, "seed": 10_000})
    reference = table.number(key, "λ̂")
    rows, verdicts = [], []
    for rtol in PROMISES:
        errors = []
        for seed in range(PROMISE_SEEDS):
            run = record(table, known, f"rtol {rtol} seed", seed, scale | {"rtol": rtol, "seed": seed})
            if table.number(run, "stderr") <= rtol * table.number(run, "λ̂"):
                errors.append(table.number(run, "λ̂") / reference - 1)
        error = math.sqrt(statistics.fmean(e * e for e in errors)) if errors else math.nan
        rows.append(
            {
                "subject": known.name,
                "rtol": str(rtol),
                "claimed": f"{len(errors)} of {PROMISE_SEEDS}",
                "rms error": percent(error),
                "within 2 rtol": percent(sum(abs(e) <= 2 * rtol for e in errors) / max(len(errors), 1)),
            }
        )
        bar = f"insensitivity: rtol {rtol} met where claimed (rms error at most {PROMISE_SLACK:.2f} rtol), {known.name}"
        found = f"{percent(error)}, claimed {len(errors)} of {PROMISE_SEEDS} times"
        verdicts.append(Verdict(bar, found, bool(errors) and error <= PROMISE_SLACK * rtol))
    print_markdown(list(rows[0]), rows)
    return verdicts
