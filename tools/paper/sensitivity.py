"""λ̂ of one network against γ, at several step sizes."""

import math
from pathlib import Path
from typing import Any

from groktrace.sampling.settings import PAPER
from tools.common.measurements import Row, Table, number
from tools.common.networks import ModularTraining
from tools.paper import figures
from tools.paper.shared import SCALE, Result, estimates, values

# At the endpoint of the reference network.
SENSITIVE_NBETA = (PAPER.nbeta, SCALE["nbeta"])
LOCALIZATIONS = {PAPER.nbeta: (5.0, 20.0, 80.0, 320.0, 1280.0), SCALE["nbeta"]: (44.0, 140.0, 440.0, 1400.0, 4400.0)}
SGLD_STEPS = (1e-6, 1e-5, 1e-4, 4e-4)
OUR_STEPS = (0.2, 1.0, 1.8)

SENSITIVITY_COLUMNS = ["run", "method", "nβ", "γ", "step", "ε", "λ̂", "stderr", "reliable", "reasons"]


def run_sensitivity(out: Path, fresh: bool) -> Result:
    """λ̂ of one network against γ, at several step sizes."""
    table = Table(out / "sensitivity.csv", SENSITIVITY_COLUMNS, fresh)
    trained: list[Any] = []

    def measure(nbeta: float, localization: float, method: str, step: float) -> Row:
        if not trained:
            trained.extend(ModularTraining().train())
        model, train, _ = trained
        scale = {"nbeta": nbeta, "localization": localization}
        if method == "published":
            found = estimates(model, train, **PAPER.to_dict() | scale | {"step_size": step})
        else:
            automatic = estimates(model, train, **scale)
            found = estimates(model, train, **scale, step_size=step * automatic.step_size)
        reasons = "; ".join(found.reasons)
        known = {"λ̂": found.llc, "stderr": found.stderr, "ε": found.step_size or step}
        return {"method": method, "nβ": nbeta, "γ": localization, "step": step, **known, "reliable": found.reliable} | {
            "reasons": reasons
        }

    for nbeta in SENSITIVE_NBETA:
        for localization in LOCALIZATIONS[nbeta]:
            for method, steps in (("published", SGLD_STEPS), ("ours", OUR_STEPS)):
                for step in steps:
                    key = f"{method} nβ={nbeta:g} γ={localization:g} step={step:g}"
                    table.cached(key, measure, nbeta, localization, method, step)
    rows = list(table.rows.values())
    figures.sensitivity(rows, out / "sensitivity.png")
    said = []
    for nbeta in SENSITIVE_NBETA:
        for method in ("published", "ours"):
            ratios, gone, flagged, count = [], 0, 0, 0
            for localization in LOCALIZATIONS[nbeta]:
                at = [row for row in rows if (number(row["nβ"]), number(row["γ"])) == (nbeta, localization)]
                own = [row for row in at if row["method"] == method]
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
