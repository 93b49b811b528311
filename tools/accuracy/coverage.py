"""How often the 95 % intervals of λ̂ and λ_c cover the exact value."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from tools.accuracy.known import estimate
from tools.common.known_answers import (
    KnownModel,
    bowl,
    geometric,
)
from tools.common.measurements import Row, Table, Verdict, number, percent, print_markdown

SEEDS = 200
COVERAGE = (0.90, 0.99)

COVERAGE_COLUMNS = ["run", "cell", "exact", "λ̂", "λ̂ stderr", "λ_c", "λ_c stderr"]


def coverage_cells() -> dict[str, tuple[KnownModel, float]]:
    """Bowls, each with the rtol asked for."""
    small = bowl("D=20 cond 100", geometric(20, 100), 20, 1)
    flat = bowl("D=100 half flat, cond 1e3", geometric(50, 1e3, flat=50), 30, 1)
    wide = bowl("D=40 cond 1e4", geometric(40, 1e4), 40, 1)
    cells = [(small, 0.05), (flat, 0.05), (wide, 0.05), (small, 0.02), (flat, 0.02)]
    return {f"{known.name} rtol={rtol}": (known, rtol) for known, rtol in cells}


def measure_seed(cell: str, known: KnownModel, rtol: float, seed: int) -> Row:
    """One repetition."""
    found = estimate(known, nbeta=known.nbeta, localization=known.localization, rtol=rtol, seed=seed)
    return {
        "cell": cell,
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
            table.cached(key, measure_seed, cell, known, rtol, seed)
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
