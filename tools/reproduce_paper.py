"""Reproduce the experiments of arXiv 2603.01192, one command per result.

    python tools/reproduce_paper.py absolute --out runs/paper

Each command writes a CSV and a figure (PNG), and prints what came out. Rows that are in the CSV are not measured again,
and recorded runs are taken as they are, so that an interrupted command goes on; `--fresh` measures again.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import paper_figures as figures
import torch
from accuracy_table import Row, Table, number, print_markdown
from known_answers import (
    KnownModel,
    gauss_newton,
    modular,
    soft_rank,
    teacher,
)
from llc_accuracy import resolved
from paper_training import EXAMPLE, LargeTraining, Training, accuracy, record, train_large, train_network

import groktrace
from groktrace import theory
from groktrace.analysis.grokking import measure_grokking
from groktrace.sampling.settings import PAPER

# One (nβ, γ) for all trained networks: what locality 0.3 and resolution 10 give on the reference run, rounded.
SCALE = {"nbeta": 38_000.0, "localization": 440.0}
GENERALISED = 0.95

# 1 scaling: final λ̂ of networks that generalise
SCALING_SEEDS = 3
SCALING_P, SCALING_WIDTH = (13, 17, 19, 23, 29, 31), 128
SCALING_WIDTHS, SCALING_MODULUS = (32, 48, 64, 96, 128, 192, 256, 384), 23
# Lines against K are also fitted from here on.
WIDE = 64

# 2 absolute: generic teachers, exact ranks
TEACHERS = ((5, 2), (5, 4), (7, 2), (7, 4), (7, 6), (11, 4), (11, 6), (13, 4))
SATURATED = ((5, 20, None), (5, 40, None), (7, 40, 24))
RANKS = {
    5: (1, 2, 4, 8, 10, 12, 16, 20),
    7: (1, 2, 4, 8, 12, 16, 20, 28),
}
GAUSSIAN_SAMPLES = 150
PART_OF_PAIRS = (7, 24)

# 3 endpoints: trained networks at several temperatures
ENDPOINTS = {"p=13 K=64": Training(p=13, width=64), "p=17 K=64": Training(p=17, width=64), "p=23 K=128": Training()}
RESOLUTIONS = (3, 10, 30, 100, 300, 1000, 3000, 10_000)
SPECTRA = ("p=13 K=64", "p=17 K=64")
# Networks too large for their spectrum, and too slow beyond.
UNTIL = 300

# 4 trajectory
TRAJECTORY_SEEDS, TRAJECTORY_EVERY = 20, 100
# The published protocol, with weight decay in the gradient or apart from it; epochs, of 100 000 published.
LARGE = {
    **{f"Adam-{seed}": (LargeTraining(seed=seed), 6_000) for seed in range(2)},
    "AdamW-0": (LargeTraining("AdamW"), 23_000),
}

# 5 sensitivity of the endpoint of the reference network
SENSITIVE_NBETA = (PAPER.nbeta, SCALE["nbeta"])
PULLS = {PAPER.nbeta: (5.0, 20.0, 80.0, 320.0, 1280.0), SCALE["nbeta"]: (44.0, 140.0, 440.0, 1400.0, 4400.0)}
SGLD_STEPS = (1e-6, 1e-5, 1e-4, 4e-4)
OUR_STEPS = (0.2, 1.0, 1.8)

# 6 severity
RATES = (5e-4, 1e-3, 3e-3, 1e-2, 2e-2)
SEVERITY_SEEDS, SEVERITY_STEPS, SEVERITY_EVERY = 3, 6000, 50

# 7 memorisation: frozen first layer, second one by ridge regression
LAZY_P, LAZY_FRACTION, LAZY_RIDGE = 11, 0.6, 1e-9
LAZY_WIDTHS = (8, 16, 22, 32, 48, 64, 96, 128)

Result = list[str]


def fit(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Slope, intercept and R² of a straight line."""
    slope, intercept = np.polyfit(x, y, 1)
    residuals = np.asarray(y) - slope * np.asarray(x) - intercept
    return float(slope), float(intercept), float(1 - residuals.var() / np.asarray(y).var())


def values(rows: Sequence[Row], column: str) -> list[float]:
    """A column as numbers."""
    return [number(row[column]) for row in rows]


def estimates(model: torch.nn.Module, train: Any, **settings: Any) -> groktrace.LLCEstimate:
    """λ̂ of a network of the example."""
    return groktrace.estimate_llc(model, EXAMPLE.centred_loss, train, **settings)


# --- 1 ---------------------------------------------------------------------------------------------------------------

SCALING_COLUMNS = ["run", "p", "K", "seed", "val accuracy", "generic λ", "λ̂", "stderr", "reliable", "λ̂ by dials"]
SCALING_COLUMNS += ["λ̂ published sampler"]


def measure_scaling(training: Training) -> Row:
    """λ̂ of one trained network, at fixed settings, at the dials' and with the published sampler."""
    model, train, val = train_network(training)
    fixed = estimates(model, train, **SCALE)
    published = estimates(model, train, **PAPER.to_dict() | {"seed": training.seed})
    return {
        "p": training.p,
        "K": training.width,
        "seed": training.seed,
        "val accuracy": accuracy(model, train, val),
        "generic λ": theory.modular_addition_llc(training.p, training.width, len(train[0])).llc,
        "λ̂": fixed.llc,
        "stderr": fixed.stderr,
        "reliable": fixed.reliable,
        "λ̂ by dials": estimates(model, train).llc,
        "λ̂ published sampler": published.llc,
    }


def run_scaling(out: Path, fresh: bool) -> Result:
    """Final λ̂ against p and against K."""
    table = Table(out / "scaling.csv", SCALING_COLUMNS, fresh)
    sizes = [(p, SCALING_WIDTH) for p in SCALING_P] + [(SCALING_MODULUS, width) for width in SCALING_WIDTHS]
    for p, width in dict.fromkeys(sizes):
        for seed in range(SCALING_SEEDS):
            training = Training(p=p, width=width, seed=seed)
            table.measure(f"p={p} K={width} seed={seed}", lambda training=training: measure_scaling(training))
    rows = [row for row in table.rows.values() if number(row["val accuracy"]) >= GENERALISED]
    said = [f"{len(rows)} of {len(table.rows)} networks generalise"]
    series = {
        "p": [row for row in rows if row["K"] == str(SCALING_WIDTH)],
        "K": [row for row in rows if row["p"] == str(SCALING_MODULUS)],
    }
    fitted = [*series.items(), ("K", [row for row in series["K"] if int(row["K"]) >= WIDE])]
    for name, each in fitted:
        for column in ("λ̂", "λ̂ by dials", "λ̂ published sampler"):
            x, y = values(each, name), values(each, column)
            means = {at: statistics.fmean(b for a, b in zip(x, y, strict=True) if a == at) for at in sorted(set(x))}
            slope, intercept, r2 = fit(list(means), list(means.values()))
            each_r2 = fit(x, y)[2]
            said.append(
                f"{column} against {name}: {slope:.4g}·{name} + {intercept:.4g}, R² {r2:.4f} of the means over seeds, "
                f"{each_r2:.4f} of single networks; means {', '.join(f'{at:g}: {y:.4g}' for at, y in means.items())}"
            )
    figures.scaling(series, out / "scaling.png")
    return said


# --- 2 ---------------------------------------------------------------------------------------------------------------

ABSOLUTE_COLUMNS = ["run", "p", "K", "n", "nβ", "γ", "closed form", "soft rank", "λ̂", "stderr", "reliable"]
RANK_COLUMNS = ["run", "inputs", "p", "K", "n", "rank", "½K(3p − 1)", "½K(3p − 2)", "closed form", "gap"]


def measure_absolute(p: int, width: int, pairs: int | None) -> Row:
    """λ̂ of one generic teacher, where all of its directions are resolved to 1 %."""
    known: KnownModel = resolved(lambda **scale: modular(p, width, pairs=pairs, **scale))
    found = groktrace.estimate_llc(
        known.model, known.loss, known.train, nbeta=known.nbeta, localization=known.localization, rtol=0.01
    )
    spectrum = torch.linalg.eigvalsh(gauss_newton(known.model, known.train, centred=True)).clamp_min(0)
    return {
        "p": p,
        "K": width,
        "n": len(known.train[0]),
        "nβ": known.nbeta,
        "γ": known.localization,
        "closed form": known.exact,
        "soft rank": soft_rank(spectrum, known.localization / known.nbeta),
        "λ̂": found.llc,
        "stderr": found.stderr,
        "reliable": found.reliable,
    }


def measure_rank(inputs: str, p: int, width: int, pairs: int | None) -> Row:
    """The exact rank at one generic teacher."""
    if inputs == "pairs":
        known = modular(p, width, 1.0, 1.0, pairs=pairs)
        exact = theory.modular_addition_llc(p, width, len(known.train[0])).llc
    else:
        known = teacher(2 * p, p, width, 1.0, 1.0, n=GAUSSIAN_SAMPLES)
        exact = theory.quadratic_llc(2 * p, p, width).llc
    found = theory.jacobian_rank(known.model, known.train[0], centred=inputs == "pairs")
    return {
        "inputs": inputs,
        "p": p,
        "K": width,
        "n": len(known.train[0]),
        "rank": found.rank,
        "½K(3p − 1)": width * (3 * p - 1) / 2,
        "½K(3p − 2)": width * (3 * p - 2) / 2,
        "closed form": exact,
        "gap": found.gap,
    }


def run_absolute(out: Path, fresh: bool) -> Result:
    """λ̂ against the closed form at generic teachers, and exact ranks."""
    table = Table(out / "absolute.csv", ABSOLUTE_COLUMNS, fresh)
    for p, width, pairs in [*((p, width, None) for p, width in TEACHERS), *SATURATED]:
        name = f"p={p} K={width} n={pairs or p * p}"
        table.measure(name, lambda p=p, width=width, pairs=pairs: measure_absolute(p, width, pairs))
    ranks = Table(out / "ranks.csv", RANK_COLUMNS, fresh)
    cases = [
        (kind, p, width, None) for p, widths in RANKS.items() for kind in ("pairs", "Gaussian") for width in widths
    ]
    cases += [("pairs", PART_OF_PAIRS[0], width, PART_OF_PAIRS[1]) for width in RANKS[PART_OF_PAIRS[0]]]
    for kind, p, width, pairs in cases:
        name = f"{kind} p={p} K={width} n={pairs or 'all'}"
        ranks.measure(name, lambda case=(kind, p, width, pairs): measure_rank(*case))
    print_markdown(ABSOLUTE_COLUMNS[1:], table.rows.values())
    generic = [row for row in table.rows.values() if (int(row["p"]), int(row["K"])) in TEACHERS]
    x, y = np.array(values(generic, "closed form")), np.array(values(generic, "λ̂"))
    slope = float(x @ y / (x @ x))
    line = fit(x, y)
    saturated = [row for row in table.rows.values() if row not in generic]
    off = [number(row["λ̂"]) / number(row["closed form"]) - 1 for row in saturated]
    matching = [row for row in ranks.rows.values() if number(row["rank"]) == 2 * number(row["closed form"])]
    apart = [f"{row['run']}: {row['rank']}" for row in ranks.rows.values() if row not in matching]
    figures.absolute(list(table.rows.values()), list(ranks.rows.values()), out / "absolute.png")
    return [
        f"slope through the origin {slope:.4f} over {len(generic)} teachers (free line: {line[0]:.4f}, "
        f"intercept {line[1]:.3f}, R² {line[2]:.5f})",
        f"saturated: off the closed form by {', '.join(f'{100 * each:+.1f} %' for each in off)}",
        f"ranks equal twice the closed form in {len(matching)} of {len(ranks.rows)} cases; others: {apart or 'none'}",
    ]


# --- 3 ---------------------------------------------------------------------------------------------------------------

ENDPOINT_COLUMNS = ["run", "network", "val accuracy", "resolution", "nβ", "γ", "λ̂", "stderr", "λ_c", "λ_c stderr"]
ENDPOINT_COLUMNS += ["reliable", "soft rank", "rank/2", "closed form", "above cutoff", "train loss"]


def measure_endpoint(name: str, folder: Path, add: Callable[[str, Row], None]) -> None:
    """One trained network at all temperatures."""
    training = ENDPOINTS[name]
    model, train, val = train_network(training)
    generic = theory.modular_addition_llc(training.p, training.width, len(train[0])).llc
    rank = theory.jacobian_rank(model, train[0], centred=True)
    first = estimates(model, train, resolution=1.0)
    resolutions = [each for each in RESOLUTIONS if name in SPECTRA or each <= UNTIL]
    spectrum = None
    if name in SPECTRA:
        # Of the Gauss-Newton matrix, which is the Hessian at a perfect fit and, unlike it, nowhere negative.
        spectrum = torch.linalg.eigvalsh(gauss_newton(model, train, centred=True)).clamp_min(0)
        np.savetxt(folder / f"spectrum {name}.csv", spectrum.flip(0)[: rank.rank].numpy(), fmt="%.4e")
    for resolution in resolutions:
        nbeta = resolution * first.nbeta
        found = estimates(model, train, nbeta=nbeta, localization=first.localization, rtol=0.01)
        cutoff = first.localization / nbeta
        add(
            f"{name} κ={resolution}",
            {
                "network": name,
                "val accuracy": accuracy(model, train, val),
                "resolution": resolution,
                "nβ": nbeta,
                "γ": first.localization,
                "λ̂": found.llc,
                "stderr": found.stderr,
                "λ_c": found.llc_centred,
                "λ_c stderr": found.stderr_centred,
                "reliable": found.reliable,
                "soft rank": None if spectrum is None else soft_rank(spectrum, cutoff),
                "rank/2": rank.llc,
                "closed form": generic,
                "above cutoff": None if spectrum is None else int((spectrum > cutoff).sum()),
                "train loss": found.loss,
            },
        )


def run_endpoints(out: Path, fresh: bool) -> Result:
    """Trained networks: half the rank, λ̂ at several nβ, closed form, soft rank."""
    table = Table(out / "endpoints.csv", ENDPOINT_COLUMNS, fresh)
    for name in ENDPOINTS:
        if not any(row["network"] == name for row in table.rows.values()):
            found: dict[str, Row] = {}
            measure_endpoint(name, out, found.__setitem__)
            for key, row in found.items():
                table.measure(key, lambda row=row: row)
    rows = [row for name in ENDPOINTS for row in table.rows.values() if row["network"] == name]
    print_markdown(ENDPOINT_COLUMNS[1:], rows)
    spectra = {name: np.loadtxt(out / f"spectrum {name}.csv") for name in SPECTRA}
    figures.endpoints(rows, spectra, out / "endpoints.png")
    said = []
    for name in ENDPOINTS:
        own = [row for row in rows if row["network"] == name]
        share = {round(number(row["resolution"])): number(row["λ̂"]) / number(row["closed form"]) for row in own}
        text = ", ".join(f"{100 * each:.0f} % at κ = {resolution}" for resolution, each in share.items())
        said.append(f"{name}: rank/2 {own[0]['rank/2']}, closed form {own[0]['closed form']}; λ̂ is {text}")
        if name in SPECTRA:
            for column in ("λ̂", "λ_c"):
                off = [f"{100 * (number(row[column]) / number(row['soft rank']) - 1):+.1f}" for row in own]
                said.append(f"{name}: {column} is off the exact soft rank by {', '.join(off)} %")
    for name, spectrum in spectra.items():
        spread = spectrum[0] / spectrum
        said.append(
            f"{name}: h_max/h of the {len(spectrum)} directions that count: median {np.median(spread):.3g}, "
            f"90 % below {np.quantile(spread, 0.9):.3g}, largest {spread.max():.3g}"
        )
    return said


# --- 4 ---------------------------------------------------------------------------------------------------------------

TRAJECTORY_COLUMNS = ["run", "seed", "step", "λ", "λ̂", "λ_c", "reliable", "train loss", "val loss", "train accuracy"]
TRAJECTORY_COLUMNS += ["val accuracy", "trace", "trace stderr", "top eigenvalue"]


def trajectory_rows(trajectory: groktrace.Trajectory, seed: int | str) -> dict[str, Row]:
    """One trajectory, a row a snapshot."""
    shown = trajectory.curve.value
    return {
        f"seed={seed} step={point.step}": {
            "seed": seed,
            "step": point.step,
            "λ": float(value),
            "λ̂": point.llc,
            "λ_c": point.llc_centred,
            "reliable": point.reliable,
            "train loss": point.train_loss,
            "val loss": point.val_loss,
            "train accuracy": point.train_accuracy,
            "val accuracy": point.val_accuracy,
            "trace": point.hessian_trace,
            "trace stderr": point.hessian_trace_stderr,
            "top eigenvalue": point.hessian_top,
        }
        for point, value in zip(trajectory.points, shown, strict=True)
    }


def run_trajectory(out: Path, fresh: bool) -> Result:
    """λ, losses, accuracies and trace over many seeds; and the published size."""
    table = Table(out / "trajectory.csv", TRAJECTORY_COLUMNS, fresh)
    for seed in range(TRAJECTORY_SEEDS):
        last = f"seed={seed} step={Training().steps}"
        if last not in table.rows:
            run = record(Training(seed=seed), out / "seeds" / str(seed), TRAJECTORY_EVERY)
            for key, row in trajectory_rows(groktrace.analyze(run, curvature=True, **SCALE), seed).items():
                table.measure(key, lambda row=row: row)
    said = judge_trajectories(list(table.rows.values()))
    steps = LARGE["Adam-0"][0].steps_an_epoch
    figures.trajectory(list(table.rows.values()), [], steps, out / "trajectory.png")
    large = run_large(out, fresh)
    for name, (training, epochs) in LARGE.items():
        own = [row for row in large if row["seed"] == name]
        peak = max(own, key=lambda row: number(row["λ"]))
        said.append(
            f"p = {training.p}, K = {training.width}, {name}, {epochs} epochs: λ peaks at {number(peak['λ']):.0f} in "
            f"epoch {int(peak['step']) // training.steps_an_epoch} (validation accuracy "
            f"{number(peak['val accuracy']):.2f}) and ends at {number(own[-1]['λ']):.0f} (training accuracy "
            f"{number(own[-1]['train accuracy']):.2f}, validation {number(own[-1]['val accuracy']):.2f})"
        )
    figures.trajectory(list(table.rows.values()), large, steps, out / "trajectory.png")
    return said


def run_large(out: Path, fresh: bool) -> list[dict[str, str]]:
    """The published size, all of its runs at the (nβ, γ) that the dials give for the first."""
    table = Table(out / "trajectory_large.csv", TRAJECTORY_COLUMNS, fresh)
    scale: dict[str, float] = {}
    for name, (training, epochs) in LARGE.items():
        place = out / "large" / name
        train_large(training, place, epochs, math.inf)
        trajectory = groktrace.analyze(place / "run", curvature=True, **scale)
        scale = {"nbeta": trajectory.nbeta, "localization": trajectory.localization}
        for key, row in trajectory_rows(trajectory, name).items():
            table.measure(key, lambda row=row: row)
    click.echo(f"p = 53: nβ = {scale['nbeta']:.5g}, γ = {scale['localization']:.5g}")
    return list(table.rows.values())


def judge_trajectories(rows: Sequence[Row]) -> Result:
    """Peaks, falls, and how trace and λ part."""
    peaks, accuracies, falls, generalised, parted = [], [], [], [], []
    for seed in dict.fromkeys(row["seed"] for row in rows):
        own = [row for row in rows if row["seed"] == seed]
        lam, val, trace = (np.array(values(own, name)) for name in ("λ", "val accuracy", "trace"))
        top = int(lam.argmax())
        peaks.append(int(own[top]["step"]))
        accuracies.append(val[top])
        falls.append(1 - lam[-1] / lam[top])
        generalised.append(next((int(row["step"]) for row in own if number(row["val accuracy"]) >= GENERALISED), None))
        reached = int(np.argmax(val >= GENERALISED))
        parted.append((np.corrcoef(lam[1 : reached + 1], trace[1 : reached + 1])[0, 1], trace[-1] / trace[reached]))
    known = [step for step in generalised if step is not None]
    agree, after = (np.array(each) for each in zip(*parted, strict=True))
    return [
        f"{len(peaks)} seeds, {len(known)} of which generalise (median step {statistics.median(known):.0f})",
        f"peak of λ at step {min(peaks)} to {max(peaks)} (median {statistics.median(peaks):.0f}), where validation "
        f"accuracy is {min(accuracies):.2f} to {max(accuracies):.2f}",
        f"fall from the peak {100 * statistics.fmean(falls):.1f} ± {100 * statistics.stdev(falls):.1f} %",
        f"correlation of λ and trace up to generalisation: median {np.median(agree):.2f}; trace at the end over trace "
        f"at generalisation: {after.mean():.2f} ± {after.std(ddof=1):.2f}",
    ]


# --- 5 ---------------------------------------------------------------------------------------------------------------

SENSITIVITY_COLUMNS = ["run", "method", "nβ", "γ", "step", "ε", "λ̂", "stderr", "reliable", "reasons"]


def run_sensitivity(out: Path, fresh: bool) -> Result:
    """λ̂ of one network against γ, at several step sizes."""
    table = Table(out / "sensitivity.csv", SENSITIVITY_COLUMNS, fresh)
    trained: list[Any] = []

    def measure(nbeta: float, pull: float, method: str, step: float) -> Row:
        if not trained:
            trained.extend(train_network(Training()))
        model, train, _ = trained
        scale = {"nbeta": nbeta, "localization": pull}
        if method == "published":
            found = estimates(model, train, **PAPER.to_dict() | scale | {"step_size": step})
        else:
            automatic = estimates(model, train, **scale)
            found = estimates(model, train, **scale, step_size=step * automatic.step_size)
        reasons = "; ".join(found.reasons)
        known = {"λ̂": found.llc, "stderr": found.stderr, "ε": found.step_size or step}
        return {"method": method, "nβ": nbeta, "γ": pull, "step": step, **known, "reliable": found.reliable} | {
            "reasons": reasons
        }

    for nbeta in SENSITIVE_NBETA:
        for pull in PULLS[nbeta]:
            for method, steps in (("published", SGLD_STEPS), ("ours", OUR_STEPS)):
                for step in steps:
                    table.measure(
                        f"{method} nβ={nbeta:g} γ={pull:g} step={step:g}",
                        lambda case=(nbeta, pull, method, step): measure(*case),
                    )
    rows = list(table.rows.values())
    figures.sensitivity(rows, out / "sensitivity.png")
    said = []
    for nbeta in SENSITIVE_NBETA:
        for method in ("published", "ours"):
            ratios, gone, flagged, count = [], 0, 0, 0
            for pull in PULLS[nbeta]:
                own = [r for r in rows if r["method"] == method and number(r["nβ"]) == nbeta and number(r["γ"]) == pull]
                finite = [abs(value) for value in values(own, "λ̂") if math.isfinite(value)]
                gone += len(own) - len(finite)
                flagged += sum(row["reliable"] != "True" for row in own)
                count += len(own)
                ratios.append(max(finite) / min(finite))
            said.append(
                f"nβ = {nbeta:g}, {method}: at one γ, largest over smallest |λ̂| among step sizes is {min(ratios):.3g} "
                f"to {max(ratios):.3g}; {gone} of {count} diverged, {flagged} flagged"
            )
    return said


# --- 6 ---------------------------------------------------------------------------------------------------------------

SEVERITY_COLUMNS = ["run", "learning rate", "seed", "severity", "memorised at", "generalised at", "peak λ", "at step"]
SEVERITY_COLUMNS += ["final λ"]


def measure_severity(rate: float, seed: int, place: Path) -> Row:
    """One training: how severely it groks, and how high λ gets once the training set is memorised."""
    training = Training(learning_rate=rate, seed=seed, steps=SEVERITY_STEPS)
    run = record(training, place / f"rate{rate:g}-{seed}", SEVERITY_EVERY)
    trajectory = groktrace.analyze(run, **SCALE)
    grokking = measure_grokking(trajectory)
    shown = trajectory.curve.value
    at = int(np.nanargmax(shown))
    return {
        "learning rate": rate,
        "seed": seed,
        "severity": grokking.severity,
        "memorised at": grokking.memorised_at,
        "generalised at": grokking.generalised_at,
        "peak λ": float(shown[at]),
        "at step": trajectory.points[at].step,
        "final λ": float(shown[-1]),
    }


def run_severity(out: Path, fresh: bool) -> Result:
    """Grokking severity and peak λ against the learning rate."""
    table = Table(out / "severity.csv", SEVERITY_COLUMNS, fresh)
    for rate in RATES:
        for seed in range(SEVERITY_SEEDS):
            table.measure(
                f"rate={rate:g} seed={seed}",
                lambda rate=rate, seed=seed: measure_severity(rate, seed, out / "severity"),
            )
    rows = list(table.rows.values())
    figures.severity(rows, out / "severity.png")
    said = []
    for rate in RATES:
        own = [row for row in rows if number(row["learning rate"]) == rate]
        mean = {name: statistics.fmean(values(own, name)) for name in ("severity", "peak λ", "final λ")}
        late = [row["generalised at"] or "never" for row in own]
        said.append(
            f"rate {rate:g}: severity {mean['severity']:.3f}, generalised at {', '.join(late)}, peak λ "
            f"{mean['peak λ']:.0f}, final λ {mean['final λ']:.0f}"
        )
    grokked = [row for row in rows if number(row["severity"]) > 0]
    ranked = [np.argsort(np.argsort(values(grokked, name))) for name in ("severity", "peak λ")]
    said.append(
        f"rank correlation of severity and peak λ over {len(grokked)} runs that generalise: "
        f"{np.corrcoef(*ranked)[0, 1]:.2f}"
    )
    return said


# --- 7 ---------------------------------------------------------------------------------------------------------------

LAZY_COLUMNS = [
    "run",
    "K",
    "n",
    "feature rank",
    "½·p·min(l, K)",
    "rank/2",
    "nβ",
    "λ̂",
    "stderr",
    "reliable",
    "train loss",
]
LAZY_COLUMNS += ["soft rank", "bracket low", "bracket high", "train accuracy", "val accuracy"]


def measure_lazy(width: int) -> Row:
    """A random first layer, frozen, and the second layer by ridge regression."""
    training = Training(p=LAZY_P, width=width, fraction=LAZY_FRACTION)
    model, train, val = training.prepare()
    with torch.no_grad():
        features = (train[0].double() @ model.W.double()).square()
        features, targets = features - features.mean(0), train[1].double() - train[1].double().mean(0)
        gram = features.T @ features / len(features)
        ridge = LAZY_RIDGE * gram.trace() / width * torch.eye(width).double()
        model.V.copy_(torch.linalg.solve(gram + ridge, features.T @ targets / len(features)).T)
    model.W.requires_grad_(False)
    rank = theory.jacobian_rank(model, train[0], centred=True)
    feature_rank = int(torch.linalg.matrix_rank(features))
    exact = theory.lazy_feature_llc(LAZY_P, feature_rank, width).llc
    spectrum = torch.linalg.eigvalsh(gram).clamp_min(0).repeat_interleave(LAZY_P)
    localization = width * LAZY_P / (0.3**2 * float(model.V.detach().square().sum()))
    # The cutoff at which the exact spectrum counts to 1 %.
    low, high = 1e-14, 1e3
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if soft_rank(spectrum, middle) >= 0.99 * exact else (low, middle)
    nbeta = localization / low
    found = estimates(model, train, nbeta=nbeta, localization=localization)
    within = 2 * LAZY_P <= width < LAZY_P**2
    bracket = theory.memorisation_bracket(LAZY_P, width) if within else None
    return {
        "K": width,
        "n": len(features),
        "feature rank": feature_rank,
        "½·p·min(l, K)": exact,
        "rank/2": rank.llc,
        "nβ": nbeta,
        "λ̂": found.llc,
        "stderr": found.stderr,
        "reliable": found.reliable,
        "train loss": found.loss,
        "soft rank": soft_rank(spectrum, localization / nbeta),
        "bracket low": None if bracket is None else bracket.lower,
        "bracket high": None if bracket is None else bracket.upper,
        "train accuracy": accuracy(model, train, train),
        "val accuracy": accuracy(model, train, val),
    }


def run_memorisation(out: Path, fresh: bool) -> Result:
    """Frozen features: λ̂ and rank against the closed form and the bracket."""
    table = Table(out / "memorisation.csv", LAZY_COLUMNS, fresh)
    for width in LAZY_WIDTHS:
        table.measure(f"K={width}", lambda width=width: measure_lazy(width))
    rows = list(table.rows.values())
    print_markdown(LAZY_COLUMNS[1:], rows)
    figures.memorisation(rows, LAZY_P, out / "memorisation.png")
    equal = sum(number(row["rank/2"]) == number(row["½·p·min(l, K)"]) for row in rows)
    off = [number(row["λ̂"]) / number(row["½·p·min(l, K)"]) - 1 for row in rows]
    bracketed = [row for row in rows if row["bracket low"]]
    inside = sum(number(r["bracket low"]) <= number(r["λ̂"]) <= number(r["bracket high"]) for r in bracketed)
    return [
        f"rank/2 equals ½·p·min(l, K) for {equal} of {len(rows)} widths",
        f"λ̂ is off it by {100 * min(off):+.1f} to {100 * max(off):+.1f} %",
        f"λ̂ lies in the bracket for {inside} of {len(bracketed)} widths above 2p − 1",
    ]


# --- command line ----------------------------------------------------------------------------------------------------

RESULTS: dict[str, Callable[[Path, bool], Result]] = {
    "scaling": run_scaling,
    "absolute": run_absolute,
    "endpoints": run_endpoints,
    "trajectory": run_trajectory,
    "sensitivity": run_sensitivity,
    "severity": run_severity,
    "memorisation": run_memorisation,
}


@click.group(help=__doc__.splitlines()[0])
def main() -> None:
    """One command per result, and `all`."""


def _command(name: str, parts: Sequence[str], text: str) -> None:
    @main.command(name, help=text)
    @click.option("--out", type=click.Path(path_type=Path), default=Path("runs/paper"), show_default=True)
    @click.option("--fresh", is_flag=True, help="Measure everything again.")
    @click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="PyTorch's threads.")
    def command(out: Path, fresh: bool, threads: int) -> None:
        torch.set_num_threads(threads)
        out.mkdir(parents=True, exist_ok=True)
        for part in parts:
            click.echo(f"## {part}\n")
            for line in RESULTS[part](out, fresh):
                click.echo(f"- {line}")
            click.echo("")


for _name, _run in RESULTS.items():
    _command(_name, [_name], _run.__doc__)
_command("all", list(RESULTS), "All seven.")


if __name__ == "__main__":
    main()
