"""The nine notebooks of the devinterp library, each as a few lines of groktrace, with time and error beside theirs.

devinterp (github.com/timaeus-research/devinterp, `pip install devinterp`) is the library that introduced this field to
λ̂. Each function below asks what one of its notebooks asks; the decorator has the notebook's name and its lines of code.
Where devinterp is installed it measures the same λ̂, at the same nβ and γ, with the notebook's step size, chains and
draws. Errors are of what both estimate, λ̂ at these nβ and γ: an integral over a grid for two weights, and else chains
of a different sampler, four times as long ("reference"). Digits are scikit-learn's 1797 of 8 × 8 pixels and not
MNIST's, networks as much smaller, and trainings of seconds; nothing is downloaded.

    python examples/devinterp_tour.py --out runs/devinterp_tour
"""

import argparse
import csv
import importlib.util
import inspect
import json
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.utils.data import DataLoader, TensorDataset

import groktrace

NOTEBOOKS: dict[str, tuple[int | None, Callable[..., list[dict[str, object]]]]] = {}
SMALL, OUT = False, Path()
FEW: dict[str, Any] = {}  # settings of the small form


def notebook(name: str, lines: int | None) -> Callable[..., Callable[..., list[dict[str, object]]]]:
    """What stands for a notebook of so many lines of code, without comments and blank lines; None if not counted."""

    def mark(function: Callable[..., list[dict[str, object]]]) -> Callable[..., list[dict[str, object]]]:
        NOTEBOOKS[name] = lines, function
        return function

    return mark


class Pairs(TensorDataset):
    """Samples that a DataLoader fetches a batch at once: one by one, as TensorDataset has it, devinterp would wait."""

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        """A batch."""
        return tuple(tensor[indices] for tensor in self.tensors)


def theirs(model: nn.Module, loss: nn.Module, data: tuple[Tensor, Tensor], point: groktrace.LLCEstimate, lr: float,
           chains: int, draws: int, batch: int) -> float:  # fmt: skip
    """λ̂ by devinterp's SGLD, as its documentation calls it; NaN where a chain diverged."""
    from devinterp.optim.sgmcmc import SGMCMC
    from devinterp.slt.sampler import estimate_learning_coeff

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        first = float(loss(model(data[0]), data[1]))
        try:
            with torch.enable_grad():
                return estimate_learning_coeff(
                    model,
                    DataLoader(Pairs(*data), min(batch, len(data[0])), shuffle=True, collate_fn=lambda found: found),
                    init_loss=first,
                    evaluate=lambda model, batch: loss(model(batch[0]), batch[1]), sampling_method=SGMCMC.sgld,
                    optimizer_kwargs={"lr": lr, "nbeta": point.nbeta, "localization": point.localization},
                    num_chains=chains, num_draws=20 if SMALL else draws, seed=0, device="cpu", verbose=False,
                )  # fmt: skip
        except RuntimeError:
            return math.nan


def beside(
    label: str,
    model: nn.Module,
    loss: nn.Module,
    data: tuple[Tensor, Tensor],
    exact: float | None = None,
    *,
    lr: float,
    chains: int = 3,
    draws: int = 500,
    batch: int = 512,
    **settings: Any,
) -> dict[str, Any]:
    """λ̂ by groktrace and by devinterp at the same nβ and γ, the seconds of each, and what both should give."""
    settings |= FEW
    clock = time.process_time()
    ours = groktrace.estimate_llc(model, loss, data, **settings)
    row = {"case": label, "nbeta": ours.nbeta, "localization": ours.localization, "ours": ours.llc,
           "ours_stderr": ours.stderr, "ours_seconds": time.process_time() - clock,
           "reasons": "; ".join(ours.reasons)}  # fmt: skip
    if exact is None and not SMALL:
        other = {"method": "leimkuhler_matthews", "seed": 1, "draws": 4 * ours.draws, "burn_in": 4 * ours.burn_in}
        here = {"nbeta": ours.nbeta, "localization": ours.localization}
        exact = groktrace.estimate_llc(model, loss, data, **(settings | other | here)).llc
    if importlib.util.find_spec("devinterp"):
        clock = time.process_time()
        row |= {"theirs": theirs(model, loss, data, ours, lr, chains, draws, batch)}
        row |= {"theirs_seconds": time.process_time() - clock}
    return row | {"reference": exact}


def digits(
    layers: nn.Module, optimizer: str = "SGD", out: Path | None = None, **options: float
) -> tuple[nn.Module, tuple]:
    """A network trained on the first 1500 digits, and these; recorded if `out` is given."""
    source, count = load_digits(), 150 if SMALL else 1500
    x, y = torch.tensor(source.images, dtype=torch.float32)[:, None] / 16, torch.tensor(source.target)
    torch.manual_seed(0)
    optimizer = getattr(torch.optim, optimizer)(layers.parameters(), **options)
    recorder, data = None, {"train": (x[:count], y[:count]), "val": (x[1500:], y[1500:]), "loss": "cross_entropy"}
    if out is not None:
        recorder = groktrace.watch(layers, optimizer, **data, out=out, every=60, if_exists="replace")
    for _ in range(20 if SMALL else 600):
        batch = torch.randint(count, (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(layers(x[batch]), y[batch]).backward()
        optimizer.step()
    if recorder is not None:
        recorder.close()
    return layers, data["train"]


def convolutional() -> nn.Module:
    """Two convolutions and a linear layer, 2 034 weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1),
                         nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 10))  # fmt: skip


def perceptron() -> nn.Module:
    """64 pixels, 32 hidden units, 10 digits."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


class Crossing(nn.Module):
    """f(x) = x·w₁ᵃ·w₂ᵇ, at the origin."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.powers, self.w = (a, b), nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        """Outputs [n] for inputs [n]."""
        return x * self.w[0] ** self.powers[0] * self.w[1] ** self.powers[1]

    def exact(self, curvature: float, nbeta: float, localization: float) -> float:
        """λ̂ at the origin by an integral over a grid of weights."""
        u = (torch.arange(4000, dtype=torch.float64) + 0.5) / 500 / localization**0.5
        loss = curvature * u[:, None] ** (2 * self.powers[0]) * u ** (2 * self.powers[1])
        weight = (-nbeta * loss - localization / 2 * (u[:, None] ** 2 + u**2)).exp()
        return float(nbeta * (loss * weight).sum() / weight.sum())


def crossings(powers: list[tuple[int, int]], **settings: float) -> list[dict[str, object]]:
    """Normal crossings at the origin, at the notebooks' 1000 inputs of standard deviation 2, and no noise."""
    torch.manual_seed(0)
    x, nbeta, rows = 2 * torch.randn(1000), 1000 / math.log(1000), []
    for a, b in powers[:1] if SMALL else powers:
        model = Crossing(a, b)
        exact = model.exact(float(x.square().mean()), nbeta, 1.0)
        rows.append(beside(f"w₁^{a}·w₂^{b}", model, nn.MSELoss(), (x, torch.zeros(1000)), exact, nbeta=nbeta,
                           localization=1.0, batch=1000, **settings))  # fmt: skip
        rows[-1]["limit"] = groktrace.theory.normal_crossing_llc([k for k in (a, b) if k]).llc
    return rows


@notebook("introduction", 56)
def introduction() -> list[dict[str, object]]:
    """λ̂ of a trained convolutional classifier of digits."""
    model, data = digits(convolutional(), lr=0.1)
    return [
        beside(
            "CNN", model, nn.CrossEntropyLoss(), data, nbeta="wbic", localization=100.0, lr=4e-4, draws=100, batch=256
        )
    ]


@notebook("normal_crossing", 343)
def normal_crossing() -> list[dict[str, object]]:
    """λ̂ of w₁ᵃw₂ᵇ beside known values."""
    return crossings([(1, 1), (1, 2)], lr=1e-4, draws=5000)


@notebook("diagnostics", 227)
def diagnostics() -> list[dict[str, object]]:
    """What speaks against an estimate: `reasons` and `diagnostics` come with it."""
    data = torch.ones(100), torch.zeros(100)
    print(groktrace.estimate_llc(Crossing(1, 2), nn.MSELoss(), data, nbeta=20.0, localization=1.0, **FEW).diagnostics)
    return crossings([(1, 3)], lr=1e-4, draws=5000)


@notebook("sgld_calibration", 290)
def sgld_calibration() -> list[dict[str, object]]:
    """Which step size? The one that the curvature calls for; nothing is swept."""
    model, data = digits(perceptron(), lr=0.1)
    return [beside("perceptron", model, nn.CrossEntropyLoss(), data, nbeta="wbic", localization=100.0, lr=1e-4)]


@notebook("epsilon_beta", None)
def epsilon_beta() -> list[dict[str, object]]:
    """λ̂ over temperatures."""
    model, data = digits(perceptron(), lr=0.1)
    curve = groktrace.temperature_curve(model, "cross_entropy", data, nbetas=[10.0, 30.0, 100.0], **FEW)
    print("λ̂ at each nβ:", [(round(estimate.nbeta), round(estimate.llc)) for estimate in curve.estimates])
    return [beside(f"nβ = {nbeta}", model, nn.CrossEntropyLoss(), data, nbeta=nbeta, localization=100.0, lr=1e-4)
            for nbeta in (30.0, 1000.0)[: 1 if SMALL else 2]]  # fmt: skip


@notebook("mnist", 161)
def mnist() -> list[dict[str, object]]:
    """λ of the solutions of two optimizers."""
    found = {
        name: digits(perceptron(), name, lr=lr) for name, lr in (("SGD", 0.1), ("Adam", 1e-2))[: 1 if SMALL else 2]
    }
    return [beside(name, model, nn.CrossEntropyLoss(), data, nbeta="wbic", localization=100.0, lr=1e-5, chains=1,
                   draws=400)
            for name, (model, data) in found.items()]  # fmt: skip


@notebook("grokking", 281)
def grokking() -> list[dict[str, object]]:
    """λ along a training: one line in the loop, one for the analysis; here of the convolutional network."""
    out = OUT / "digits"
    _, data = digits(convolutional(), "Adam", out, lr=5e-3)
    clock = time.process_time()
    trajectory = groktrace.analyze(out, **FEW)
    seconds = time.process_time() - clock
    trajectory.plot(OUT / "devinterp_tour_digits.png")
    print([(transition.name, transition.step) for transition in groktrace.find_transitions(trajectory)])
    rows, model = [], convolutional()
    for i in [-1] if SMALL else [0, len(trajectory) // 2, -1]:
        groktrace.open_run(out).snapshots[i].load_into(model)
        rows.append(beside(f"step {trajectory.points[i].step}", model, nn.CrossEntropyLoss(), data, nbeta=30.0,
                           localization=1000.0, lr=1e-3, chains=1, batch=128))  # fmt: skip
    label = f"{len(trajectory)} snapshots, default"
    return [*rows, {"case": label, "ours": float(trajectory.curve.value[-1]), "ours_seconds": seconds}]


@notebook("dlns", 596)
def dlns() -> list[dict[str, object]]:
    """λ̂ of a linear network at its teacher; more in deep_linear.py."""
    torch.manual_seed(0)
    model, x = nn.Sequential(*[nn.Linear(10, 10, bias=False) for _ in range(3)]), torch.randn(1000, 10)
    row = beside(
        "10-10-10-10", model, nn.MSELoss(), (x, model(x).detach()), nbeta="wbic", localization=500.0, lr=1e-4, batch=128
    )
    return [row | {"limit": groktrace.theory.deep_linear_llc([10] * 4, 10).llc}]


@notebook("tms", 915)
def tms() -> list[dict[str, object]]:
    """λ̂ of a 6-gon; more in superposition.py."""

    class Polygon(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            angles = torch.arange(6) * math.pi / 3
            self.W = nn.Parameter(1.32053 * torch.stack([angles.cos(), angles.sin()]))
            self.b = nn.Parameter(torch.full((6,), -0.61814))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.W.T @ self.W + self.b).relu()

    x = (((torch.arange(150) + 0.5) / 150)[:, None, None] * one_hot(torch.arange(6), 6)).flatten(0, 1)
    return [beside("6-gon", Polygon(), nn.MSELoss(), (x, x), nbeta=5000.0, localization=10.0, lr=1e-3) | {"limit": 8.5}]


def draw(rows: list[dict[str, object]], path: Path) -> None:
    """Error against processor seconds, of both, where nothing but the number of draws speaks against λ̂."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, marker, colour in (("ours", "o", "C0"), ("theirs", "^", "C1")):
        some = [row for row in rows if row.get("reference") and row.get(name) is not None]
        some = [row for row in some if not row["reasons"] or row["reasons"].startswith("too few draws")]
        error = [max(abs(row[name] / row["reference"] - 1), 1e-4) for row in some]
        seconds, label = [row[f"{name}_seconds"] for row in some], {"ours": "groktrace", "theirs": "devinterp"}[name]
        axes.plot(seconds, error, marker, color=colour, ms=7, mfc="white" if name == "theirs" else colour, label=label)
    axes.axhline(0.05, color="0.5", lw=1, ls=":")
    axes.set(xscale="log", yscale="log", xlabel="processor seconds", ylabel=r"relative error of $\hat\lambda$")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def write(path: Path, rows: list[dict[str, object]]) -> None:
    """A table as comma-separated values."""
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        table.writeheader()
        table.writerows(rows)


def main() -> None:
    """Every notebook."""
    global SMALL, OUT
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/devinterp_tour", type=Path, help="where runs and results go")
    parser.add_argument("--small", action="store_true", help="a tiny form, for a try of some seconds")
    options = parser.parse_args()

    SMALL, OUT = options.small, options.out
    FEW.update({"draws": 20, "burn_in": 20} if SMALL else {})
    OUT.mkdir(parents=True, exist_ok=True)
    kept = OUT / "rows.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    for name in [name for name in NOTEBOOKS if name not in {row["notebook"] for row in rows}]:
        lines, function = NOTEBOOKS[name]
        count = len([line for line in inspect.getsource(function).splitlines()[1:] if line.strip()])
        found = [{"notebook": name, "their_lines": lines, "our_lines": count, **row} for row in function()]
        with kept.open("a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in found))
        rows += found
        for row in found:
            print({key: f"{x:.4g}" if isinstance(x, float) else x for key, x in row.items()}, flush=True)
    rows.sort(key=lambda row: list(NOTEBOOKS).index(row["notebook"]))
    write(OUT / "devinterp_tour.csv", rows)
    draw(rows, OUT / "devinterp_tour.png")


if __name__ == "__main__":
    main()
