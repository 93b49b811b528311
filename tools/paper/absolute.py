"""λ̂ of generic teachers beside the closed form, and exact ranks."""

from pathlib import Path

import numpy as np
import torch

import groktrace
from groktrace import theory
from tools.common.known_answers import KnownModel, gauss_newton, modular, resolved, soft_rank, teacher
from tools.common.measurements import Row, Table, number, print_markdown
from tools.paper import figures
from tools.paper.shared import Result, fit, values

TEACHERS = ((5, 2), (5, 4), (7, 2), (7, 4), (7, 6), (11, 4), (11, 6), (13, 4))
SATURATED = ((5, 20, None), (5, 40, None), (7, 40, 24))
RANKS = {
    5: (1, 2, 4, 8, 10, 12, 16, 20),
    7: (1, 2, 4, 8, 12, 16, 20, 28),
}
GAUSSIAN_SAMPLES = 150
PART_OF_PAIRS = (7, 24)

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
        table.cached(name, measure_absolute, p, width, pairs)
    ranks = Table(out / "ranks.csv", RANK_COLUMNS, fresh)
    cases = [
        (kind, p, width, None) for p, widths in RANKS.items() for kind in ("pairs", "Gaussian") for width in widths
    ]
    cases += [("pairs", PART_OF_PAIRS[0], width, PART_OF_PAIRS[1]) for width in RANKS[PART_OF_PAIRS[0]]]
    for kind, p, width, pairs in cases:
        name = f"{kind} p={p} K={width} n={pairs or 'all'}"
        ranks.cached(name, measure_rank, kind, p, width, pairs)
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
        f"saturated: off the closed form by {', '.join(f'{100 * error:+.1f} %' for error in off)}",
        f"ranks equal twice the closed form in {len(matching)} of {len(ranks.rows)} cases; others: {apart or 'none'}",
    ]
