"""λ of deep linear networks as published, beside devinterp at the published settings, and what is known of it."""

import math
import runpy
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import groktrace
from tools.common.measurements import Row, Table, Verdict, number, percent, print_markdown
from tools.common.peers import devinterp_llc, has_devinterp

EXAMPLE = Path(__file__).parents[2] / "examples" / "deep_linear.py"
# Of the published table: samples, batch, steps and step size of SGLD for networks of up to 10⁴ weights or so.
SAMPLES, BATCH, BURN_IN, DRAWS, STEP_SIZE, LOCALIZATION = 100_000, 500, 9_000, 1_000, 5e-7, 1.0
NETWORKS = 28
WITHIN, SHARE = 0.1, 0.9
COLUMNS = [
    *("network", "layers", "weights", "closed form", "half rank", "λ", "low", "high", "reached", "seconds"),
    *("devinterp", "its seconds", "reasons"),
]
SHOWN = COLUMNS[:-1]


def by_devinterp(model: nn.Module, data: tuple[Tensor, Tensor], nbeta: float) -> float:
    """λ̂ by one chain of SGLD; NaN where it diverges."""

    def evaluate(network: nn.Module, batch: list[Tensor]) -> Tensor:
        return nn.functional.mse_loss(network(batch[0]), batch[1])

    loader = DataLoader(TensorDataset(*data), BATCH, shuffle=True, generator=torch.Generator().manual_seed(0))
    scale = {"lr": STEP_SIZE, "nbeta": nbeta, "localization": LOCALIZATION}
    return devinterp_llc(model, loader, evaluate, scale, 0.0, (1, BURN_IN, DRAWS), 0)


def measure(example: dict[str, Any], seed: int) -> Row:
    """One network at its true weights; the last λ̂ where no limit is reached."""
    networks = [(weights, family) for count, weights, family in example["FAMILIES"] for _ in range(count)]
    model, widths, rank = example["random_network"](seed, *networks[seed])
    model = model.float()
    x = 20 * torch.rand(SAMPLES, widths[0], generator=torch.Generator().manual_seed(seed)) - 10
    with torch.no_grad():
        data = x, model(x)
    nbeta = SAMPLES / math.log(SAMPLES)
    start = time.process_time()
    # Without noise the loss depends on the inputs by their covariance alone: as many orthogonal ones do as well.
    few = torch.eye(widths[0]) * (100 / 3 * widths[0]) ** 0.5
    with torch.no_grad():
        of_few = few, model(few)
    found = groktrace.estimate_llc(model, "mse", of_few, n=SAMPLES, limit=True, progress=False)
    ours, start = time.process_time() - start, time.process_time()
    theirs = by_devinterp(model, data, nbeta) if has_devinterp() else math.nan
    return {
        "layers": len(widths) - 1,
        "weights": sum(weight.numel() for weight in model.parameters()),
        "closed form": groktrace.theory.deep_linear_llc(widths, rank).llc,
        "half rank": example["half_rank"](model),
        "λ": found.ladder[-1].llc if found.llc is None else found.llc,
        "low": found.low,
        "high": found.high,
        "reached": found.reached,
        "seconds": ours,
        "devinterp": theirs,
        "its seconds": time.process_time() - start,
        "reasons": "; ".join(found.reasons),
    }


def run_deep_linear(out: Path, fresh: bool) -> list[Verdict]:
    """All networks of the two smallest published families."""
    table, example = Table(out / "deep_linear.csv", COLUMNS, fresh), runpy.run_path(str(EXAMPLE))
    for seed in range(NETWORKS):
        table.cached(str(seed), partial(measure, example), seed)
    rows = [table.rows[str(seed)] for seed in range(NETWORKS)]
    print_markdown(SHOWN, rows)
    verdicts = []
    for name, column in (("groktrace", "λ"), ("devinterp", "devinterp")):
        for what, exact in (("the closed form", _closed), ("it or half of the rank, the larger", _at_least)):
            right = [abs(number(row[column]) / exact(row) - 1) <= WITHIN for row in rows]
            share = statistics.mean(right)
            bar = f"deep linear: {name} within {percent(WITHIN)} of {what} in {percent(SHARE)}"
            verdicts.append(Verdict(bar, f"{percent(share)} of {len(rows)}", share >= SHARE))
    far = [row["network"] for row in rows if _is_far(row)]
    silent = [row["network"] for row in rows if _is_far(row) and row["reached"] == "True"]
    verdicts.append(Verdict("deep linear: none farther off is silent", f"{len(silent)} of {len(far)}", not silent))
    taken = [statistics.median(number(row[name]) for row in rows) for name in ("seconds", "its seconds")]
    measured = f"{taken[0]:.1f} s, {taken[1]:.1f} s"
    return [*verdicts, Verdict("deep linear: median time, devinterp's", measured, taken[0] <= taken[1])]


def _is_far(row: Row) -> bool:
    return abs(number(row["λ"]) / _at_least(row) - 1) > WITHIN


def _closed(row: Row) -> float:
    return number(row["closed form"])


def _at_least(row: Row) -> float:
    return max(number(row["closed form"]), number(row["half rank"]))
