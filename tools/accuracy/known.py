"""λ̂ beside the exact answer where one is known, and devinterp beside it where it is installed."""

import contextlib
import importlib.util
import math
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import click
import torch
from torch.utils.data import DataLoader, TensorDataset

import groktrace
from tools.common.known_answers import (
    KnownModel,
    bowl,
    geometric,
    modular,
    reduced_rank,
    resolved,
    soft_rank,
    spectrum_at,
    teacher,
)
from tools.common.measurements import Row, Table, Verdict, listed, number, percent, print_markdown

# An estimate is right within this fraction of λ, or within this many standard errors.
RIGHT_WITHIN = 0.05
RIGHT_ERRORS = 3.0
RIGHT_SHARE = 0.95
MEDIAN_ERROR = 0.02
# Singular truths have no Hessian to go by: (nβ, γ) for all of them; their non-zero weights are of standard deviation 2,
# large beside the chains' unit spread.
SINGULAR_SCALE = (1e3, 1.0)
LEARNING_RATES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)

KNOWN_COLUMNS = [
    *("model", "family", "D", "nβ", "γ", "κ", "exact", "soft rank", "λ̂", "stderr", "error", "within"),
    *("λ_c", "λ_c stderr", "reliable", "seconds", "chain-steps", "virial", "anharmonicity", "halvings", "reasons"),
]
KNOWN_SHOWN = ["model", "nβ", "γ", "κ", "exact", "soft rank", "λ̂", "stderr", "error", "within"]
KNOWN_SHOWN += ["λ_c", "reliable", "seconds", "chain-steps"]


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
        table.cached(key, measure_known, known)
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
            table.cached(run, measure_devinterp, known, rate)
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
