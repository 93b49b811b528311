"""Measure how right groktrace's λ̂ is: known answers, error bars, settings, the reference run, planted failures.

    python tools/llc_accuracy.py all --out runs/accuracy

Each command writes a CSV, prints it as a Markdown table and ends with the bars it is held to and a verdict on each.
Rows that are in the CSV are not measured again; `--fresh` starts over. With devinterp installed (the `bench` extra),
`known` also measures it.
"""

import contextlib
import importlib.util
import math
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from accuracy_table import Row, Table, Verdict, note, number, percent, print_markdown, print_verdicts
from known_answers import (
    KnownModel,
    bowl,
    centred_half_square,
    exact_hessian,
    gauss_newton,
    geometric,
    modular,
    reduced_rank,
    soft_rank,
    teacher,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import groktrace
from groktrace.sampling.settings import SamplingSettings

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from modular_addition import QuadraticNetwork, centred_loss, modular_pairs

Pair = tuple[Tensor, Tensor]

# known: an estimate is right within this fraction of λ, or within this many standard errors.
RIGHT_WITHIN = 0.05
RIGHT_ERRORS = 3.0
RIGHT_SHARE = 0.95
MEDIAN_ERROR = 0.02
# Generic manifolds: nβ is such that the exact Hessian's soft rank is within this fraction of λ; γ by the locality rule.
FINITE_CORRECTION = 0.01
# Singular truths have no Hessian to go by: (nβ, γ) for all of them; their non-zero weights are of standard deviation 2,
# large beside the chains' unit spread.
SINGULAR_SCALE = (1e3, 1.0)
LEARNING_RATES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)

# coverage
SEEDS = 200
COVERAGE = (0.90, 0.99)

# insensitivity
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

# reference
TRAINING_STEPS = 3000
EVERY = 50
FRACTION = 0.6
MEMORISED = 0.99
AGREE_FROM = 200
AGREEMENT = 0.05
EXACT_MODULUS = 13
EXACT_EVERY = 300
GROKKED_FALL = 0.30
CONTROL_FALL = 0.03

KNOWN_COLUMNS = [
    *("model", "family", "D", "nβ", "γ", "κ", "exact", "soft rank", "λ̂", "stderr", "error", "within"),
    *("λ_c", "λ_c stderr", "reliable", "seconds", "chain-steps", "virial", "anharmonicity", "halvings", "reasons"),
]
KNOWN_SHOWN = ["model", "nβ", "γ", "κ", "exact", "soft rank", "λ̂", "stderr", "error", "within"]
KNOWN_SHOWN += ["λ_c", "reliable", "seconds", "chain-steps"]


# --- known answers ---------------------------------------------------------------------------------------------------


def spectrum_at(known: KnownModel) -> Tensor:
    """The exact curvatures at a true solution, where the Hessian is the Gauss-Newton matrix."""
    matrix = gauss_newton(known.model, known.train, centred=known.loss is centred_half_square)
    return torch.linalg.eigvalsh(matrix).clamp_min(0)


def resolved(make: Callable[..., KnownModel]) -> KnownModel:
    """A generic manifold at the scale the rule gives: γ = D/(ρ²‖w*‖²), nβ for a finite correction of 1 %.

    Args:
        make: makes the model, given nbeta= and localization=.
    """
    known = make(nbeta=1.0, localization=1.0)
    weights = torch.cat([weight.detach().reshape(-1) for weight in known.model.parameters()])
    localization = len(weights) / (SamplingSettings.locality**2 * float(weights.square().sum()))
    spectrum = spectrum_at(known)
    low, high = 1e-12, 1e6
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        enough = soft_rank(spectrum, middle) >= (1 - FINITE_CORRECTION) * known.exact
        low, high = (middle, high) if enough else (low, middle)
    return make(nbeta=float(f"{localization / low:.3g}"), localization=float(f"{localization:.3g}"))


def known_models() -> list[KnownModel]:
    """All models with known answers."""
    power = torch.arange(1, 301, dtype=torch.float64) ** -2
    one_stiff = torch.cat([torch.full((1,), 1e4), torch.ones(29)]).double()
    bowls = [
        bowl("D=2 cond 10", geometric(2, 10), 100, 1),
        bowl("D=10 cond 100", geometric(10, 100), 100, 1),
        bowl("D=20 cond 1e3", geometric(20, 1e3), 100, 1),
        bowl("D=50 cond 1e4", geometric(50, 1e4), 3e3, 1),
        bowl("D=100 cond 1e4, half flat", geometric(50, 1e4, flat=50), 5e3, 5),
        bowl("D=200 cond 1e4, 50 flat", geometric(150, 1e4, flat=50), 1e3, 1),
        bowl("D=300 power law", power, 1e4, 30),
        bowl("D=30 one stiff, cond 1e4", one_stiff, 1, 10),
        bowl("D=64 one scale", geometric(64, 1), 40, 10),
        bowl("D=400, 360 flat", geometric(40, 1e3, flat=360), 500, 2),
    ]
    teachers = [(5, 3, 2), (16, 5, 4), (6, 3, 4), (4, 2, 12), (4, 3, 20), (6, 2, 24), (5, 3, 30), (4, 3, 40)]
    pairs = [(5, 2, None), (7, 4, None), (11, 4, None), (7, 12, 24), (5, 20, None), (5, 40, None), (7, 40, 24)]
    ranks = [(5, 3, 5, 1), (5, 3, 5, 2), (8, 4, 6, 2), (2, 9, 3, 0)]
    return [
        *bowls,
        *[resolved(lambda d=d, p=p, k=k, **scale: teacher(d, p, k, **scale)) for d, p, k in teachers],
        *[resolved(lambda p=p, k=k, n=n, **scale: modular(p, k, pairs=n, **scale)) for p, k, n in pairs],
        *[reduced_rank(*shape, *SINGULAR_SCALE) for shape in ranks],
    ]


def estimate(model: KnownModel, **settings: Any) -> groktrace.LLCEstimate:
    """λ̂ at the model's weights."""
    return groktrace.estimate_llc(model.model, model.loss, model.train, **settings)


def measure_known(known: KnownModel) -> Row:
    """Ours on one model, everything but nβ and γ at its default."""
    spectrum = spectrum_at(known)
    start = time.perf_counter()
    found = estimate(known, nbeta=known.nbeta, localization=known.localization)
    seconds = time.perf_counter() - start
    error = None if found.llc is None else found.llc / known.exact - 1
    return {
        "family": known.family,
        "D": len(spectrum),
        "nβ": known.nbeta,
        "γ": known.localization,
        "κ": known.nbeta * float(spectrum.max()) / known.localization,
        "exact": known.exact,
        "soft rank": soft_rank(spectrum, known.localization / known.nbeta),
        "λ̂": found.llc,
        "stderr": found.stderr,
        "error": error,
        "within": error is not None and abs(error) <= max(RIGHT_WITHIN, RIGHT_ERRORS * found.stderr / known.exact),
        "λ_c": found.llc_centred,
        "λ_c stderr": found.stderr_centred,
        "reliable": found.reliable,
        "seconds": seconds,
        "chain-steps": found.chains * (found.burn_in + found.draws),
        "virial": found.diagnostics.get("virial"),
        "anharmonicity": found.diagnostics.get("anharmonicity"),
        "halvings": found.diagnostics.get("halvings"),
        "reasons": "; ".join(found.reasons),
    }


def measure_devinterp(known: KnownModel, learning_rate: float | None) -> Row:
    """λ̂ of devinterp on one model: its own defaults but nβ, γ and, where given, the learning rate; full batches."""
    from devinterp.slt.sampler import estimate_learning_coeff_with_summary

    options = {"nbeta": known.nbeta, "localization": known.localization}
    if learning_rate is not None:
        options["lr"] = learning_rate
    loader = DataLoader(TensorDataset(*known.train), batch_size=len(known.train[0]))
    llc = None
    start = time.perf_counter()
    # It raises where the loss becomes NaN.
    with warnings.catch_warnings(), contextlib.suppress(RuntimeError):
        warnings.simplefilter("ignore")
        llc = estimate_learning_coeff_with_summary(
            known.model,
            loader,
            evaluate=lambda model, batch: known.loss(model(batch[0]), batch[1]),
            optimizer_kwargs=options,
            seed=0,
            verbose=False,
        )["llc/mean"]
    error = None if llc is None or not math.isfinite(llc) else llc / known.exact - 1
    return {"λ̂": llc, "error": error, "seconds": time.perf_counter() - start}


def run_known(out: Path, fresh: bool) -> list[Verdict]:
    """All models with known answers, and devinterp beside them where it is installed."""
    table = Table(out / "known.csv", KNOWN_COLUMNS, fresh)
    models = {f"{known.family}: {known.name}": known for known in known_models()}
    for key, known in models.items():
        table.measure(key, lambda known=known: measure_known(known))
    rows = [dict(table.rows[key]) for key in models]
    shown = list(KNOWN_SHOWN)
    verdicts = judge_known(rows)
    if importlib.util.find_spec("devinterp") is None:
        print_markdown(shown, rows)
        click.echo("devinterp is not installed (the `bench` extra): its columns are left out.\n")
        return verdicts
    peer = run_peer(models, out, fresh)
    for row in rows:
        row.update(peer[row["model"]])
    print_markdown([*shown, *PEER_COLUMNS], rows)
    for name in ("default", "best"):
        right = [row for row in rows if abs(number(row[f"devinterp {name} error"])) <= RIGHT_WITHIN]
        click.echo(f"devinterp at its {name} learning rate is within {percent(RIGHT_WITHIN)} on {len(right)}.")
    click.echo("")
    return verdicts


PEER_COLUMNS = ["devinterp default", "devinterp default error", "devinterp best", "devinterp best error", "best lr"]


def run_peer(models: dict[str, KnownModel], out: Path, fresh: bool) -> dict[str, dict[str, str]]:
    """λ̂ of devinterp at its default learning rate, and at that of the grid which comes closest to the exact answer."""
    table = Table(out / "known_devinterp.csv", ["run", "λ̂", "error", "seconds"], fresh)
    found = {}
    for key, known in models.items():
        runs = {rate: f"{key} lr={rate or 'default'}" for rate in (None, *LEARNING_RATES)}
        for rate, run in runs.items():
            table.measure(run, lambda known=known, rate=rate: measure_devinterp(known, rate))
        errors = {rate: abs(table.number(runs[rate], "error")) for rate in LEARNING_RATES}
        best = min(errors, key=lambda rate: math.inf if math.isnan(errors[rate]) else errors[rate])
        default, closest = table.rows[runs[None]], table.rows[runs[best]]
        values = default["λ̂"], default["error"], closest["λ̂"], closest["error"], str(best)
        found[key] = dict(zip(PEER_COLUMNS, values, strict=True))
    return found


def judge_known(rows: list[dict[str, str]]) -> list[Verdict]:
    """Right within 5 % or three standard errors, small errors, and no flags."""
    wrong = [row["model"] for row in rows if row["within"] != "True"]
    errors = [abs(number(row["error"])) if row["error"] else math.inf for row in rows]
    flagged = [row["model"] for row in rows if row["reliable"] != "True"]
    right = 1 - len(wrong) / len(rows)
    median = statistics.median(errors)
    return [
        Verdict(
            f"known: at least {percent(RIGHT_SHARE)} within {percent(RIGHT_WITHIN)} or {RIGHT_ERRORS:g} errors",
            f"{percent(right)} of {len(rows)}" + listed(wrong),
            right >= RIGHT_SHARE,
        ),
        Verdict(f"known: median error at most {percent(MEDIAN_ERROR)}", percent(median), median <= MEDIAN_ERROR),
        Verdict("known: no flag", f"{len(flagged)} flagged" + listed(flagged), not flagged),
    ]


def listed(names: Sequence[str]) -> str:
    """Names in parentheses, if there are any."""
    return f" ({'; '.join(names)})" if names else ""


# --- coverage --------------------------------------------------------------------------------------------------------

COVERAGE_COLUMNS = ["run", "cell", "exact", "λ̂", "λ̂ stderr", "λ_c", "λ_c stderr"]


def coverage_cells() -> dict[str, tuple[KnownModel, float]]:
    """Bowls, each with the rtol asked for."""
    small = bowl("D=20 cond 100", geometric(20, 100), 20, 1)
    flat = bowl("D=100 half flat, cond 1e3", geometric(50, 1e3, flat=50), 30, 1)
    wide = bowl("D=40 cond 1e4", geometric(40, 1e4), 40, 1)
    cells = [(small, 0.05), (flat, 0.05), (wide, 0.05), (small, 0.02), (flat, 0.02)]
    return {f"{known.name} rtol={rtol}": (known, rtol) for known, rtol in cells}


def measure_seed(known: KnownModel, rtol: float, seed: int) -> Row:
    """One repetition."""
    found = estimate(known, nbeta=known.nbeta, localization=known.localization, rtol=rtol, seed=seed)
    return {
        "exact": known.exact,
        "λ̂": found.llc,
        "λ̂ stderr": found.stderr,
        "λ_c": found.llc_centred,
        "λ_c stderr": found.stderr_centred,
    }


def run_coverage(out: Path, fresh: bool) -> list[Verdict]:
    """How often the 95 % intervals of λ̂ and λ_c cover the exact value."""
    table = Table(out / "coverage.csv", COVERAGE_COLUMNS, fresh)
    summary, verdicts = [], []
    for cell, (known, rtol) in coverage_cells().items():
        for seed in range(SEEDS):
            key = f"{cell} seed={seed}"
            table.measure(
                key,
                lambda known=known, rtol=rtol, seed=seed, cell=cell: {"cell": cell} | measure_seed(known, rtol, seed),
            )
        rows = [row for row in table.rows.values() if row["cell"] == cell]
        share = {name: covered(rows, name) for name in ("λ̂", "λ_c")}
        mean = statistics.fmean(number(row["λ̂"]) for row in rows)
        summary.append(
            {
                "bowl": cell,
                "exact": rows[0]["exact"],
                "mean λ̂": f"{mean:.5g}",
                "seeds": str(len(rows)),
                "λ̂ covered": percent(share["λ̂"]),
                "λ_c covered": percent(share["λ_c"]),
            }
        )
        for name, value in share.items():
            bar = f"coverage: {name} {percent(COVERAGE[0])} to {percent(COVERAGE[1])}, {cell}"
            verdicts.append(Verdict(bar, percent(value), COVERAGE[0] <= value <= COVERAGE[1]))
    print_markdown(list(summary[0]), summary)
    return verdicts


def covered(rows: Sequence[dict[str, str]], name: str) -> float:
    """Share of rows whose 95 % interval holds the exact value."""
    inside = [abs(number(row[name]) - number(row["exact"])) <= 1.96 * number(row[f"{name} stderr"]) for row in rows]
    return sum(inside) / len(inside)


# --- insensitivity ---------------------------------------------------------------------------------------------------

INSENSITIVITY_COLUMNS = ["run", "subject", "what", "value", "λ̂", "stderr", "reliable", "reasons"]


def trained(out: Path, name: str) -> KnownModel:
    """The last snapshot of a reference run; its λ is not known."""
    options = REFERENCE_RUNS[name]
    run = record_reference(out, name)
    model, train, _ = reference_network(**options)
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

    table.measure(key, measurement)
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


# --- reference runs --------------------------------------------------------------------------------------------------

REFERENCE_RUNS: dict[str, dict[str, Any]] = {
    "grokked p=23": {"p": 23, "width": 128, "random_labels": False},
    "random labels p=23": {"p": 23, "width": 128, "random_labels": True},
    "grokked p=13": {"p": 13, "width": 64, "random_labels": False},
}
REFERENCE_COLUMNS = ["run", "name", "step", "train accuracy", "λ̂", "stderr", "λ_c", "λ_c stderr", "reliable"]
REFERENCE_COLUMNS += ["Hessian soft rank", "Gauss-Newton soft rank", "reasons"]


def reference_network(p: int, width: int, random_labels: bool) -> tuple[nn.Module, Pair, Pair]:
    """The example's network, training and validation pairs, as the example makes them with its seed 0."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        train, val = modular_pairs(p, FRACTION, random_labels)
        return QuadraticNetwork(2 * p, width, p), train, val


def record_reference(out: Path, name: str) -> groktrace.Run:
    """Train as the example does, with the hook; or take the recording that is there."""
    place = out / "reference" / name.replace(" ", "-").replace("=", "")
    if place.exists():
        run = groktrace.open_run(place)
        if max(snapshot.step for snapshot in run.snapshots) == TRAINING_STEPS:
            return run
        shutil.rmtree(place)
    note(f"training: {name}")
    model, train, val = reference_network(**REFERENCE_RUNS[name])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1.0)
    with groktrace.watch(model, optimizer, train=train, loss=centred_loss, val=val, out=place, every=EVERY):
        for _ in range(TRAINING_STEPS):
            loss = centred_loss(model(train[0]), train[1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return groktrace.open_run(place)


def run_reference(out: Path, fresh: bool) -> list[Verdict]:
    """The reference example and its controls at default settings."""
    table = Table(out / "reference.csv", REFERENCE_COLUMNS, fresh)
    if fresh:
        shutil.rmtree(out / "reference", ignore_errors=True)
    verdicts = []
    for name in REFERENCE_RUNS:
        run = record_reference(out, name)
        start = time.perf_counter()
        trajectory = groktrace.analyze(run)
        note(f"analysis: {name}: {time.perf_counter() - start:.1f} s")
        cutoff = trajectory.localization / trajectory.nbeta
        snapshots = {snapshot.step: snapshot for snapshot in run.snapshots}
        for point in trajectory.points:
            key = f"{name} step={point.step}"
            table.measure(
                key,
                lambda name=name, point=point, snapshots=snapshots, cutoff=cutoff: measure_point(
                    name, point, snapshots[point.step], cutoff
                ),
            )
        rows = [row for row in table.rows.values() if row["name"] == name]
        shown = [row for row in rows if int(row["step"]) % EXACT_EVERY == 0 or int(row["step"]) in (50, 100, 150, 200)]
        click.echo(f"{name}: nβ = {trajectory.nbeta:.4g}, γ = {trajectory.localization:.4g}\n")
        print_markdown(REFERENCE_COLUMNS[1:], shown)
        verdicts += judge_reference(name, rows)
    return verdicts


def measure_point(name: str, point: groktrace.Point, snapshot: groktrace.Snapshot, cutoff: float) -> Row:
    """One snapshot; the smaller network also with its exact spectra."""
    row = {
        "name": name,
        "step": point.step,
        "train accuracy": point.train_accuracy,
        "λ̂": point.llc,
        "stderr": point.stderr,
        "λ_c": point.llc_centred,
        "λ_c stderr": point.stderr_centred,
        "reliable": point.reliable,
        "reasons": "; ".join(point.reasons),
    }
    exactly = point.step >= AGREE_FROM and (point.step % EXACT_EVERY == 0 or point.step == AGREE_FROM)
    if REFERENCE_RUNS[name]["p"] == EXACT_MODULUS and exactly:
        model, train, _ = reference_network(**REFERENCE_RUNS[name])
        model.load_state_dict(snapshot.load())
        hessian = torch.linalg.eigvalsh(exact_hessian(model, centred_half_square, train))
        positive = torch.linalg.eigvalsh(gauss_newton(model, train, centred=True)).clamp_min(0)
        row["Hessian soft rank"] = soft_rank(hessian, cutoff)
        row["Gauss-Newton soft rank"] = soft_rank(positive, cutoff)
    return row


def judge_reference(name: str, rows: list[dict[str, str]]) -> list[Verdict]:
    """Reliable after memorisation, λ̂ and λ_c alike, near the exact soft rank, and falling as it should."""
    memorised = next(i for i, row in enumerate(rows) if number(row["train accuracy"]) >= MEMORISED)
    after = rows[memorised:]
    doubted = [row["step"] for row in after if row["reliable"] != "True"]
    late = [row for row in rows if int(row["step"]) >= AGREE_FROM]
    apart = max(abs(number(row["λ̂"]) / number(row["λ_c"]) - 1) for row in late)
    verdicts = [
        Verdict(
            f"reference: every snapshot from memorisation (step {after[0]['step']}) on reliable, {name}",
            f"{len(doubted)} of {len(after)} flagged" + listed(doubted),
            not doubted,
        ),
        Verdict(
            f"reference: λ̂ and λ_c within {percent(AGREEMENT)} from step {AGREE_FROM} on, {name}",
            f"at most {percent(apart)} apart",
            apart <= AGREEMENT,
        ),
    ]
    exact = [row for row in late if row["Hessian soft rank"]]
    for column in ("λ̂", "λ_c") if exact else ():
        errors = [number(row[column]) / number(row["Hessian soft rank"]) - 1 for row in exact]
        worst = max(errors, key=abs)
        bar = f"reference: {column} within {percent(AGREEMENT)} of the exact soft rank, {name}"
        verdicts.append(Verdict(bar, f"worst {percent(worst)} of {len(exact)}", abs(worst) <= AGREEMENT))
    if REFERENCE_RUNS[name]["p"] == EXACT_MODULUS:
        return verdicts
    control = REFERENCE_RUNS[name]["random_labels"]
    for column in ("λ_c", "λ̂"):
        values = [number(row[column]) for row in after]
        fall = 1 - values[-1] / max(values)
        bar = f"at most {percent(CONTROL_FALL)}" if control else f"at least {percent(GROKKED_FALL)}"
        passed = fall <= CONTROL_FALL if control else fall >= GROKKED_FALL
        verdicts.append(Verdict(f"reference: {column} falls {bar} from its peak, {name}", percent(fall), passed))
    return verdicts


# --- failures --------------------------------------------------------------------------------------------------------


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
            lambda: estimate(settled, nbeta=1, localization=1e-3, burn_in=2000, draws=2000).reasons,
        ),
        "NaN weights": ("not finite", lambda: reasons_of_nan(out)),
    }


def run_failures(out: Path, fresh: bool) -> list[Verdict]:
    """Six things done wrong on purpose."""
    table = Table(out / "failures.csv", ["failure", "expected", "flagged", "reasons"], fresh)
    for failure, (expected, reasons) in planted_failures(out).items():

        def measurement(expected: str = expected, reasons: Callable[[], tuple[str, ...]] = reasons) -> Row:
            found = reasons()
            return {
                "expected": expected,
                "flagged": any(expected in each for each in found),
                "reasons": "; ".join(found),
            }

        table.measure(failure, measurement)
    print_markdown(table.columns, table.rows.values())
    return [
        Verdict(f"failures: {row['failure']} flagged '{row['expected']}'", row["reasons"], row["flagged"] == "True")
        for row in table.rows.values()
    ]


# --- command line ----------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Path, bool], list[Verdict]]] = {
    "known": run_known,
    "coverage": run_coverage,
    "insensitivity": run_insensitivity,
    "reference": run_reference,
    "failures": run_failures,
}


@click.command(help=__doc__.splitlines()[0])
@click.argument("part", type=click.Choice([*PARTS, "all"]))
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/accuracy"), show_default=True)
@click.option("--fresh", is_flag=True, help="Measure everything again.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="PyTorch's threads.")
def main(part: str, out: Path, fresh: bool, threads: int) -> None:
    """Run one part or all."""
    torch.set_num_threads(threads)
    verdicts = []
    for name in PARTS if part == "all" else [part]:
        click.echo(f"## {name}\n")
        verdicts += PARTS[name](out, fresh)
    click.echo("## Bars\n")
    print_verdicts(verdicts)
    sys.exit(0 if all(verdict.passed for verdict in verdicts) else 1)


if __name__ == "__main__":
    main()
