"""A frozen first layer and a second one by ridge regression: λ̂ and rank beside the closed form."""

import math
from pathlib import Path

import torch

from groktrace import theory
from tools.common.known_answers import soft_rank
from tools.common.measurements import Row, Table, number, print_markdown
from tools.common.networks import ModularTraining
from tools.paper import figures
from tools.paper.networks import accuracy
from tools.paper.shared import Result, estimates

# A frozen first layer, and a second one by ridge regression.
LAZY_P, LAZY_FRACTION, LAZY_RIDGE = 11, 0.6, 1e-9
LAZY_WIDTHS = (8, 16, 22, 32, 48, 64, 96, 128)

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
    training = ModularTraining(p=LAZY_P, width=width, fraction=LAZY_FRACTION)
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
        table.cached(f"K={width}", measure_lazy, width)
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
