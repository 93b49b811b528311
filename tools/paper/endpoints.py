"""Trained networks at several temperatures: λ̂, half the rank, closed form, soft rank."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from groktrace import theory
from tools.common.known_answers import gauss_newton, soft_rank
from tools.common.measurements import Row, Table, number, print_markdown
from tools.common.networks import ModularTraining
from tools.paper import figures
from tools.paper.networks import accuracy
from tools.paper.shared import Result, estimates

ENDPOINTS = {
    "p=13 K=64": ModularTraining(p=13, width=64),
    "p=17 K=64": ModularTraining(p=17, width=64),
    "p=23 K=128": ModularTraining(),
}
RESOLUTIONS = (3, 10, 30, 100, 300, 1000, 3000, 10_000)
SPECTRA = ("p=13 K=64", "p=17 K=64")
# Networks too large for their spectrum, and too slow beyond.
UNTIL = 300

ENDPOINT_COLUMNS = ["run", "network", "val accuracy", "resolution", "nβ", "γ", "λ̂", "stderr", "λ_c", "λ_c stderr"]
ENDPOINT_COLUMNS += ["reliable", "soft rank", "rank/2", "closed form", "above cutoff", "train loss"]


def measure_endpoint(name: str, folder: Path, add: Callable[[str, Row], None]) -> None:
    """One trained network at all temperatures."""
    training = ENDPOINTS[name]
    model, train, val = training.train()
    generic = theory.modular_addition_llc(training.p, training.width, len(train[0])).llc
    rank = theory.jacobian_rank(model, train[0], centred=True)
    first = estimates(model, train, resolution=1.0)
    resolutions = [resolution for resolution in RESOLUTIONS if name in SPECTRA or resolution <= UNTIL]
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
                table.cached(key, dict, row)
    rows = [row for name in ENDPOINTS for row in table.rows.values() if row["network"] == name]
    print_markdown(ENDPOINT_COLUMNS[1:], rows)
    spectra = {name: np.loadtxt(out / f"spectrum {name}.csv") for name in SPECTRA}
    figures.endpoints(rows, spectra, out / "endpoints.png")
    said = []
    for name in ENDPOINTS:
        own = [row for row in rows if row["network"] == name]
        share = {round(number(row["resolution"])): number(row["λ̂"]) / number(row["closed form"]) for row in own}
        text = ", ".join(f"{100 * part:.0f} % at κ = {resolution}" for resolution, part in share.items())
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
