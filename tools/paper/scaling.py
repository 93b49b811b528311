"""Final λ̂ of networks that generalise, against p and against K."""

import statistics
from pathlib import Path

from groktrace import theory
from groktrace.sampling.settings import PAPER
from tools.common.measurements import Row, Table, number
from tools.common.networks import ModularTraining
from tools.paper import figures
from tools.paper.networks import accuracy
from tools.paper.shared import GENERALISED, SCALE, Result, estimates, fit, values

SCALING_SEEDS = 3
SCALING_P, SCALING_WIDTH = (13, 17, 19, 23, 29, 31), 128
SCALING_WIDTHS, SCALING_MODULUS = (32, 48, 64, 96, 128, 192, 256, 384), 23
# Lines against K are also fitted from here on.
WIDE = 64

SCALING_COLUMNS = ["run", "p", "K", "seed", "val accuracy", "generic λ", "λ̂", "stderr", "reliable", "λ̂ by dials"]
SCALING_COLUMNS += ["λ̂ published sampler"]


def measure_scaling(training: ModularTraining) -> Row:
    """λ̂ of one trained network, at fixed settings, at the dials' and with the published sampler."""
    model, train, val = training.train()
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
            training = ModularTraining(p=p, width=width, seed=seed)
            table.cached(f"p={p} K={width} seed={seed}", measure_scaling, training)
    rows = [row for row in table.rows.values() if number(row["val accuracy"]) >= GENERALISED]
    said = [f"{len(rows)} of {len(table.rows)} networks generalise"]
    series = {
        "p": [row for row in rows if row["K"] == str(SCALING_WIDTH)],
        "K": [row for row in rows if row["p"] == str(SCALING_MODULUS)],
    }
    fitted = [*series.items(), ("K", [row for row in series["K"] if int(row["K"]) >= WIDE])]
    for name, members in fitted:
        for column in ("λ̂", "λ̂ by dials", "λ̂ published sampler"):
            x, y = values(members, name), values(members, column)
            means = {at: statistics.fmean(b for a, b in zip(x, y, strict=True) if a == at) for at in sorted(set(x))}
            slope, intercept, r2 = fit(list(means), list(means.values()))
            single_r2 = fit(x, y)[2]
            said.append(
                f"{column} against {name}: {slope:.4g}·{name} + {intercept:.4g}, R² {r2:.4f} of the means over seeds, "
                f"{single_r2:.4f} of single networks; means {', '.join(f'{at:g}: {y:.4g}' for at, y in means.items())}"
            )
    figures.scaling(series, out / "scaling.png")
    return said
