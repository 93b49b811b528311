"""A toy model of superposition: its k-gons, λ at each of them, and the steps from one to the next along training.

Six features that come one at a time are squeezed through two dimensions, f(x) = ReLU(WᵀWx + b). Chen et al. 2023 (arXiv
2310.06301) found that regular k-gons, k columns of W at equal angles and the others zero, are critical points of the
loss ("5+": the bias of one zero column is positive), that λ of these points is 7 (k = 5) and 8.5 (5+ and 6), and that
training steps from one to the next: from high loss and low λ to low loss and high λ.

1. λ at the critical points, exactly by the rank of the Hessian, and estimated: as the limit of large nβ, at several nβ
   on the way, and at the published temperature, nβ = n/log n for n = 5000.
2. Trainings that start near a 4-gon, at default settings, where λ counts directions stiffer than a tenth of the
   stiffest. 4-gons and 5-gons do not differ in these, so trainings that step are analysed once more at κ = 100 (with
   errors of 5 %). Dotted is that count at a 5-gon, from its Hessian. Published: batches of 20 at learning rate 0.005.
   Here batches of 80 at 0.02, of the same noise a unit of time, in a quarter of the updates.

    python examples/superposition.py --out runs/superposition
"""

import argparse
import csv
import math
import shutil
from itertools import groupby, pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

import groktrace

FEATURES = 6
# k: length of the columns, their bias (Table A.1); name: k, positive biases, published loss, λ, λ̂ ± (Table K.1).
SHAPES = {4: (1.0, 0.0), 5: (1.17046, -0.28230), 6: (1.32053, -0.61814)}
POINTS = {
    "4": (4, 0, 0.11111, None, None, None),
    "4+": (4, 1, 0.10417, None, None, None),
    "4++": (4, 2, 0.09722, None, None, None),
    "5": (5, 0, 0.06874, 7.0, 7.71, 0.85),
    "5+": (5, 1, 0.06180, 8.5, 9.91, 1.27),
    "6": (6, 0, 0.04819, 8.5, 9.03, 0.59),
}
NEAR = 0.0015  # in loss, of a critical point, is a plateau


class Superposition(nn.Module):
    """f(x) = ReLU(WᵀWx + b)."""

    def __init__(self, W: Tensor, b: Tensor) -> None:
        super().__init__()
        self.W, self.b = nn.Parameter(W), nn.Parameter(b)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstructions [n, 6] of features [n, 6]."""
        return (x @ self.W.T @ self.W + self.b).relu()


def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
    """‖x − f(x)‖², a mean over samples."""
    return (targets - outputs).square().sum(1).mean()


def population_loss(W: Tensor, b: Tensor) -> Tensor:
    """The loss over all inputs: feature i alone, of a size uniform in [0, 1]; an integral of polynomials."""
    gram, eye = W.T @ W, torch.eye(len(b), dtype=W.dtype)
    bias = b.expand_as(gram)
    crossing = (-bias / torch.where(gram == 0, 1, gram)).clamp(0, 1)  # where the output turns on, or off
    low = torch.where(gram > 0, crossing, 0)
    high = torch.where(gram < 0, crossing, torch.where((gram == 0) & (bias <= 0), 0, 1)).maximum(low)
    slope = gram - eye
    on = slope**2 * (high**3 - low**3) / 3 + slope * bias * (high**2 - low**2) + bias**2 * (high - low)
    return (on + eye * (1 - high**3 + low**3) / 3).sum() / len(b)


def critical_point(k: int, positive: int) -> tuple[Tensor, Tensor]:
    """W and b of a k-gon."""
    (length, bias), angles = SHAPES[k], 0.3 + 2 * math.pi * torch.arange(k, dtype=torch.float64) / k
    W, b = torch.zeros(2, FEATURES, dtype=torch.float64), torch.full((FEATURES,), -0.5, dtype=torch.float64)
    W[:, :k], b[:k] = length * torch.stack([angles.cos(), angles.sin()]), bias
    b[k : k + positive] = 1 / (2 * FEATURES)
    return W, b


def curvatures(W: Tensor, b: Tensor) -> Tensor:
    """Eigenvalues of the Hessian of the population loss."""
    flat = torch.cat([W.flatten(), b])
    hessian = torch.autograd.functional.hessian(
        lambda w: population_loss(w[: W.numel()].view_as(W), w[W.numel() :]), flat
    )
    return torch.linalg.eigvalsh(hessian)


def soft_count(h: Tensor, cutoff: float) -> float:
    """½Σ h/(h + γ/nβ) over the curvatures that are not zero: what λ̂ is in a quadratic bowl."""
    h = h[h.abs() > 1e-4]
    return float((h / (h + cutoff)).sum() / 2)


def measure_points(small: bool) -> list[dict[str, object]]:
    """λ at each critical point; data are all features at evenly spaced sizes, so that no sampling moves the minimum."""
    rtol, sizes = (0.2 if small else 0.02), (torch.arange(10 if small else 100) + 0.5) / (10 if small else 100)
    x = (sizes[:, None, None] * torch.eye(FEATURES)).flatten(0, 1)
    rows = []
    for name, (k, positive, loss, known, published, error) in POINTS.items():
        W, b = critical_point(k, positive)
        row = {"point": name, "loss": float(population_loss(W, b)), "published_loss": loss}
        row |= {"published_llc": known, "published_estimate": published, "published_stderr": error}
        if known:  # the 4-gons are saddles, and the loss has no second derivative there
            row["half_rank"] = int((curvatures(W, b).abs() > 1e-4).sum()) / 2
        if known and not (small and name != "5"):
            model = Superposition(W.float(), b.float())
            first = groktrace.estimate_llc(model, loss_fn, (x, x))
            nbetas = [first.nbeta * factor for factor in ((1, 10) if small else (1, 3, 10, 30, 100))]
            curve = groktrace.temperature_curve(model, loss_fn, (x, x), nbetas=nbetas).estimates
            best = curve[-1]
            paper = groktrace.estimate_llc(model, loss_fn, (x, x), nbeta=5000 / math.log(5000))
            # Nearer than the default: 5-gons with a positive bias have less loss, and are a fifth of ‖w*‖ away.
            limit = groktrace.estimate_llc(model, loss_fn, (x, x), limit=True, locality=0.1, rtol=rtol)
            row |= {"limit": limit.llc, "limit_low": limit.low, "limit_high": limit.high}
            row |= {"llc": best.llc, "stderr": best.stderr, "nbeta": best.nbeta}
            row |= {"llc_n5000": paper.llc, "stderr_n5000": paper.stderr, "reasons": "; ".join(best.reasons)}
            row["curve"] = " ".join(f"{point.nbeta:.4g}:{point.llc:.4g}±{point.stderr:.2g}" for point in curve)
        rows.append(row)
        print({key: value for key, value in row.items() if value is not None})
    return rows


def train(out: Path, seed: int, epochs: int) -> None:
    """Train from near a 4-gon; the one groktrace line is marked."""
    torch.manual_seed(seed)
    feature = torch.randint(FEATURES, (1000,))
    x = torch.rand(1000, 1) * torch.eye(FEATURES)[feature]
    W, b = critical_point(4, 0)
    model = Superposition((W + 0.01 * torch.randn(W.shape)).float(), (b.clamp(min=0) + 0.01 * torch.randn(6)).float())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    # The one line:
    groktrace.watch(
        model, optimizer, train=(x, x), loss=loss_fn, out=out, every=max(epochs * 13 // 150, 26), if_exists="replace"
    )

    for _ in range(epochs):
        for batch in x[torch.randperm(1000)].split(80):
            loss = loss_fn(model(batch), batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def plateaus(out: Path, trajectory: groktrace.Trajectory) -> tuple[list[dict[str, object]], list[float]]:
    """The stretches of three snapshots or more near one critical point's loss, and λ there; the losses."""
    levels = {name: float(population_loss(*critical_point(*point[:2]))) for name, point in POINTS.items()}
    steps, names, losses = [], [], []
    for snapshot in groktrace.open_run(out).snapshots:
        weights = snapshot.load()
        losses.append(float(population_loss(weights["W"].double(), weights["b"].double())))
        nearest = min(levels, key=lambda name: abs(levels[name] - losses[-1]))
        steps.append(snapshot.step)
        names.append(nearest if abs(levels[nearest] - losses[-1]) < NEAR else None)
    value, rows = dict(zip(trajectory.column("step"), trajectory.curve.value, strict=True)), []
    for name, run in groupby(zip(names, steps, strict=True), key=lambda pair: pair[0]):
        at = [step for _, step in run]
        if name and len(at) >= 3:
            measured = torch.tensor([value[step] for step in at if step in value], dtype=torch.float64)
            exact = None  # at a 4-gon
            if POINTS[name][0] > 4:
                h = curvatures(*critical_point(*POINTS[name][:2]))
                exact = soft_count(h, trajectory.localization / trajectory.nbeta)
            rows.append({"point": name, "first": at[0], "last": at[-1], "loss": levels[name],
                         "llc": float(measured.nanmedian()), "soft_count": exact})  # fmt: skip
    return rows, losses


def draw(found: list[groktrace.Trajectory], stages: list[dict[str, object]], losses: list[float],
         rows: list[dict[str, object]], path: Path) -> None:  # fmt: skip
    """Loss and λ of one training, between the critical points; λ̂ against nβ at three of them."""
    figure, (upper, lower, right) = plt.subplots(3, 1, figsize=(8, 8), layout="constrained")
    lower.sharex(upper)
    for trajectory, line, label in zip(found, ("C0.-", "C3--"), ("default", r"$\kappa$ = 100"), strict=False):
        steps, curve = trajectory.column("step"), trajectory.curve
        low, high = curve.value - 1.96 * curve.error, curve.value + 1.96 * curve.error
        lower.fill_between(steps, low, high, color=line[:2], alpha=0.2)
        lower.plot(steps, curve.value, line, ms=4, label=label)
    upper.plot(steps, losses, "k-", lw=1)
    for stage in stages:
        upper.hlines(stage["loss"], stage["first"], stage["last"], "C1", lw=6, alpha=0.5)
        upper.annotate(
            stage["point"], (stage["first"], stage["loss"]), (3, 6), textcoords="offset points", weight="bold"
        )
        for name in ("soft_count", "soft_count_fine"):
            if stage.get(name):
                lower.hlines(stage[name], stage["first"], stage["last"], "k", "dotted", lw=2)
    for transition in groktrace.find_transitions(trajectory):  # of the last, the finer one
        for axes in (upper, lower):
            axes.axvline(transition.step, color="0.4", lw=1, ls="--")
        lower.annotate(f"{transition.name}", (transition.step, 1), xycoords=("data", "axes fraction"), va="bottom",
                       ha="center", fontsize=8)  # fmt: skip
    upper.set(ylabel="loss over all inputs", ylim=(0.045, 0.12))
    lower.set(xlabel="training step", ylabel=r"$\lambda_c$, 95 % band; dotted: exact", ylim=(-12, 12))
    lower.legend(frameon=False, ncols=2)
    for i, row in enumerate(row for row in rows if "curve" in row):
        found = [point.replace("±", ":").split(":") for point in str(row["curve"]).split()]
        nbeta, llc, error = zip(*[[float(number) for number in point] for point in found], strict=True)
        right.errorbar(
            nbeta, llc, error, fmt=f"C{i}{'os^'[i]}{['-', '--', ':'][i]}", capsize=3, label=f"{row['point']}-gon"
        )
        right.errorbar(5000 / math.log(5000) * (1 + 0.08 * i), row["published_estimate"], row["published_stderr"],
                       fmt=f"C{i}{'os^'[i]}", mfc="white", capsize=3)  # fmt: skip
        right.axhline(row["half_rank"], color=f"C{i}", lw=0.8)
    right.set(
        xscale="log", xlabel=r"$n\beta$ (hollow: published)", ylabel=r"$\hat\lambda$; lines: half of the exact rank"
    )
    right.legend(frameon=False)
    figure.savefig(path, dpi=110)


def write(path: Path, rows: list[dict[str, object]]) -> None:
    """A table as comma-separated values."""
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        table.writeheader()
        table.writerows(rows)


def last_step(out: Path) -> int:
    """The step that a recording has come to; 0 where there is none."""
    try:
        return max((snapshot.step for snapshot in groktrace.open_run(out).snapshots), default=0)
    except groktrace.GroktraceError:
        return 0


def main() -> None:
    """Measure the critical points, then train and analyse."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/superposition", type=Path, help="where runs and results go")
    parser.add_argument("--small", action="store_true", help="a tiny form, for a try of some seconds")
    options = parser.parse_args()

    rows = measure_points(options.small)
    seeds, epochs = (1, 10) if options.small else (6, 4500)
    stages, changes, shown = [], [], None
    for seed in range(seeds):
        out = options.out / f"seed-{seed}"
        if last_step(out) < 13 * epochs:
            train(out, seed, epochs)
        trajectory = groktrace.analyze(out, rtol=0.2 if options.small else 0.02)
        found, (visited, losses) = groktrace.find_transitions(trajectory), plateaus(out, trajectory)
        fine, fine_visited = None, visited
        if len(visited) > 1:
            copy = options.out / f"seed-{seed}-fine"
            shutil.copytree(out, copy, ignore=shutil.ignore_patterns("analysis", ".lock"), dirs_exist_ok=True)
            fine = groktrace.analyze(copy, resolution=100, rtol=0.05)
            fine_visited, _ = plateaus(copy, fine)
            for stage, finer in zip(visited, fine_visited, strict=True):
                stage |= {"llc_fine": finer["llc"], "soft_count_fine": finer["soft_count"]}
        stages += [{"seed": seed, **stage} for stage in visited]
        for before, after in pairwise(visited):
            change = {"seed": seed, "change": f"{before['point']} → {after['point']}"}
            change |= {"from": before["last"], "to": after["first"], "delta_loss": after["loss"] - before["loss"]}
            for end, measured in (("", trajectory), ("_fine", fine)):
                change[f"delta_llc{end}"] = after[f"llc{end}"] - before[f"llc{end}"]
                near = [transition.step for transition in groktrace.find_transitions(measured)]
                change[f"detected{end}"] = " ".join(str(x) for x in near if before["last"] <= x <= after["first"])
            changes.append(change)
        order = " → ".join(stage["point"] for stage in visited)
        print(f"seed {seed}: {order}; λ changes at {[transition.step for transition in found]}", flush=True)
        if shown is None or len(visited) >= len(shown[1]):
            shown = [measured for measured in (trajectory, fine) if measured], visited, losses
    write(options.out / "superposition.csv", rows)
    write(options.out / "superposition_plateaus.csv", stages)
    write(options.out / "superposition_transitions.csv", changes)
    draw(*shown, rows, options.out / "superposition.png")


if __name__ == "__main__":
    main()
