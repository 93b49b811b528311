"""Trained networks at ever larger nβ: how much of the closed form λ_c has in sight, and where two networks part."""

from itertools import pairwise
from pathlib import Path

from matplotlib.figure import Figure

import groktrace
from groktrace.analysis.temperature import temperature_curve_at
from tools.accuracy.reference import REFERENCE_RUNS, record_reference
from tools.common.measurements import Row, Table, Verdict, number, print_markdown

GROKKED, CONTROL = "grokked p=23", "random labels p=23"
HALF_DECADES = range(-2, 9)
COLUMNS = ["ladder", "run", "nβ", "resolution", "λ̂", "stderr", "λ_c", "λ_c stderr", "draws", "reasons"]
CLOSED_FORM = groktrace.theory.modular_addition_llc(23, 128, 317).llc


def run_ladder(out: Path, fresh: bool) -> list[Verdict]:
    """λ̂ of the last snapshots of the reference run and its control, at one γ."""
    table = Table(out / "ladder.csv", COLUMNS, fresh)
    runs = {name: record_reference(out, name) for name in (GROKKED, CONTROL)}
    own = groktrace.analyze(runs[GROKKED], progress=False)
    assert own.nbeta is not None
    for half in HALF_DECADES:
        for name, run in runs.items():
            nbeta = own.nbeta * 10 ** (half / 2)
            key = f"{name} nβ={nbeta:.3g}"
            table.cached(key, measure_rung, name, run, nbeta, own.nbeta, own.localization)
    rows = list(table.rows.values())
    print_markdown(COLUMNS[1:], rows)
    draw_ladder(rows, own.nbeta).savefig(out / "ladder.png", dpi=100)
    found = {name: [number(row["λ_c"]) for row in rows if row["run"] == name] for name in runs}
    pairs = list(zip(found[GROKKED], found[CONTROL], strict=True))
    ratios = [high / low for low, high in pairs]
    widest = max(range(len(ratios)), key=ratios.__getitem__)
    rises = all(later > 0.98 * sooner for values in found.values() for sooner, later in pairwise(values))
    share = max(map(max, found.values())) / CLOSED_FORM
    at = number(rows[2 * widest]["resolution"])
    return [
        Verdict(
            "ladder: λ_c rises with nβ and stays below the closed form", f"to {share:.3f} of it", rises and share < 1
        ),
        Verdict(
            "ladder: the control's λ_c is above the grokked network's at every nβ",
            f"{min(ratios):.2f} to {max(ratios):.2f} times, most at resolution {at:.3g}",
            min(ratios) > 1,
        ),
    ]


def measure_rung(name: str, run: groktrace.Run, nbeta: float, middle: float, localization: float) -> Row:
    """One network at one nβ."""
    (found,) = temperature_curve_at(run, REFERENCE_RUNS[name].steps, [nbeta], localization=localization).estimates
    return {
        "run": name,
        "nβ": nbeta,
        "resolution": 10 * nbeta / middle,
        "λ̂": found.llc,
        "stderr": found.stderr,
        "λ_c": found.llc_centred,
        "λ_c stderr": found.stderr_centred,
        "draws": found.draws,
        "reasons": "; ".join(found.reasons),
    }


def draw_ladder(rows: list[dict[str, str]], middle: float) -> Figure:
    """λ̂ and λ_c against nβ, beside the closed form and the default nβ."""
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    for name, marker, color in ((GROKKED, "o", "black"), (CONTROL, "s", "0.55")):
        some = [row for row in rows if row["run"] == name]
        nbeta = [number(row["nβ"]) for row in some]
        for column, filled in (("λ̂", True), ("λ_c", False)):
            values = [number(row[column]) for row in some]
            errors = [2 * number(row["stderr" if filled else "λ_c stderr"]) for row in some]
            axes.errorbar(
                nbeta,
                values,
                errors,
                color=color,
                marker=marker,
                linestyle="-" if filled else ":",
                markerfacecolor=color if filled else "white",
                label=f"{column}, {name.split(' p=')[0]}",
            )
    axes.axhline(CLOSED_FORM, color="black", linestyle="-.", label=f"λ by closed form, {CLOSED_FORM:g}")
    axes.axvline(middle, color="grey", linewidth=0.8)
    axes.annotate(
        "default", (middle, 0.98), xycoords=("data", "axes fraction"), rotation=90, ha="right", va="top", color="grey"
    )
    axes.set(xscale="log", ylim=(0, 1.08 * CLOSED_FORM), xlabel="nβ", ylabel="λ̂ and λ_c at the last snapshot")
    axes.legend(loc="lower center", bbox_to_anchor=(0.59, 0.0), fontsize="small", framealpha=1)
    return figure
