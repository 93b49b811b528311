"""The reference example and its controls at default settings, beside exact spectra where the network is small."""

import shutil
import time
from pathlib import Path

import click
import torch

import groktrace
from tools.common.known_answers import (
    centred_half_square,
    exact_hessian,
    gauss_newton,
    soft_rank,
)
from tools.common.measurements import Row, Table, Verdict, listed, number, percent, print_markdown, say
from tools.common.networks import ModularTraining

EVERY = 50
MEMORISED = 0.99
AGREE_FROM = 200
AGREEMENT = 0.05
EXACT_MODULUS = 13
EXACT_EVERY = 300
GROKKED_FALL = 0.30
CONTROL_FALL = 0.03

REFERENCE_RUNS = {
    "grokked p=23": ModularTraining(),
    "random labels p=23": ModularTraining(random_labels=True),
    "grokked p=13": ModularTraining(p=13, width=64),
}
REFERENCE_COLUMNS = ["run", "name", "step", "train accuracy", "λ̂", "stderr", "λ_c", "λ_c stderr", "reliable"]
REFERENCE_COLUMNS += ["Hessian soft rank", "Gauss-Newton soft rank", "reasons"]


def record_reference(out: Path, name: str) -> groktrace.Run:
    """Train as the example does, with the hook; or take the recording that is there."""
    return REFERENCE_RUNS[name].record(out / "reference" / name.replace(" ", "-").replace("=", ""), EVERY)


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
        say(f"analysis: {name}: {time.perf_counter() - start:.1f} s")
        cutoff = trajectory.localization / trajectory.nbeta
        snapshots = {snapshot.step: snapshot for snapshot in run.snapshots}
        for point in trajectory.points:
            key = f"{name} step={point.step}"
            table.cached(key, measure_point, name, point, snapshots[point.step], cutoff)
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
    if REFERENCE_RUNS[name].p == EXACT_MODULUS and exactly:
        model, train, _ = REFERENCE_RUNS[name].prepare()
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
    if REFERENCE_RUNS[name].p == EXACT_MODULUS:
        return verdicts
    control = REFERENCE_RUNS[name].random_labels
    for column in ("λ_c", "λ̂"):
        values = [number(row[column]) for row in after]
        fall = 1 - values[-1] / max(values)
        bar = f"at most {percent(CONTROL_FALL)}" if control else f"at least {percent(GROKKED_FALL)}"
        passed = fall <= CONTROL_FALL if control else fall >= GROKKED_FALL
        verdicts.append(Verdict(f"reference: {column} falls {bar} from its peak, {name}", percent(fall), passed))
    return verdicts
