"""Deep linear networks: λ̂ beside the λ that is known exactly, and the saddles that a training stops at.

Of y = W_N ⋯ W_1·x all is known: λ at the most singular minimum is a closed form (Aoyagi 2024), on which Lau et al. 2023
(arXiv 2308.12108, their figure of λ̂ against λ) tried the estimator. From small weights training stops at saddles, at
which the product has rank 1, 2, 3 … (Jacot et al. 2021, arXiv 2106.15933), and λ̂ climbs with the rank.

1. Random networks of 2 to 20 layers, each of which has its rank reduced with probability ½, at their true weights, as
   published. The loss depends on the inputs by their covariance alone, so as many orthogonal inputs as there are input
   features stand for the million that were drawn. nβ = n/log n of that million, as published. γ is the default:
   published chains kept γ = 1, but ended before flat directions had come as far as ours may go. For the same reason
   ours are short (200 steps, then 100 draws), and say "not equilibrated": flat directions are not filled, and count
   little. Networks of up to 10⁵ weights are measured once more in equilibrium, at chains of default length and
   resolution κ = 1000: λ is an absolute value here, and what κ = 10 counts falls far short of it. Smaller than
   published: up to 10⁶ weights, not 10⁸, where the published figure, too, leaves the line. The closed form is of the
   most singular weights that give the same product, and no λ is smaller; nor is any smaller than half of the Jacobian's
   rank where it is measured, which stands beside it.
2. One training as published: 5 → 10 → 10 → 10 → 10 → 5, teacher 10·diag(1 … 5), SGD in batches of 128, but with 1000
   samples for 10 000 and half as long again. λ_c along it is at default settings. Besides, λ̂ at each plateau as
   published: of the loss towards the network's own outputs, nβ = n/log n for n = 10 000.

    python examples/deep_linear.py --out runs/deep_linear
"""

import argparse
import csv
import itertools
import json
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn

import groktrace

# λ̂/λ of the published figure, read off its image: log10 λ, and 10 %, 50 %, 90 % of what is covered by points.
PUBLISHED = [
    (1.5, 0.57, 1.05, 1.30), (2.0, 0.50, 0.95, 1.60), (2.5, 0.35, 0.68, 1.15), (3.0, 0.30, 0.75, 1.13),
    (3.5, 0.55, 1.08, 1.45), (4.0, 0.45, 0.82, 1.30), (4.5, 0.31, 0.58, 1.03), (5.0, 0.40, 0.65, 1.10),
    (5.5, 0.35, 0.65, 1.10), (6.0, 0.50, 0.77, 0.98),
]  # fmt: skip
# λ̂ on the plateaus of rank 1, 2, 3 and at the end: medians of the output that is published with the figure's code.
PLATEAUS = {1: 8.6, 2: 11.5, 3: 13.2, 5: 14.1}
# How many, of how many weights; least and largest width, and most layers: the published ones up to this size.
FAMILIES = [
    (14, (1, 1e5), (5, 50, 5)),
    (14, (1, 1e5), (5, 100, 10)),
    (8, (1, 3e5), (50, 300, 10)),
    (6, (1, 4e5), (50, 300, 20)),
    (2, (5e5, 1e6), (50, 500, 10)),
    (4, (4e4, 1e5), (20, 100, 20)),  # and deep ones
]
WIDTHS = [5, 10, 10, 10, 10, 5]


def linear_network(widths: list[int]) -> nn.Sequential:
    """Layers without biases between these widths, inputs first."""
    return nn.Sequential(*[nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(widths)])


def product(model: nn.Module, inputs: int) -> Tensor:
    """The matrix that the network multiplies by, transposed."""
    with torch.no_grad():
        return model.double()(torch.eye(inputs, dtype=torch.float64))


def half_rank(model: nn.Module) -> float:
    """Half of the rank of the product's Jacobian; λ at these weights is no smaller.

    Moving layer s gives all matrices from the row space of the layers before it to the image of those after it. The
    images U_s grow with s, the row spaces V_s shrink, so that all these together have Σ (dim U_s − dim U_{s−1})·dim V_s
    dimensions.
    """
    layers = [layer.weight.detach().double() for layer in model]
    before, after = [torch.eye(layers[0].shape[1]).double()], [torch.eye(layers[-1].shape[0]).double()]
    for layer, last in zip(layers[:-1], layers[:0:-1], strict=True):
        before.append(layer @ before[-1])
        after.append(after[-1] @ last)
    images = [0, *(int(torch.linalg.matrix_rank(matrix, rtol=1e-5)) for matrix in reversed(after))]
    rows = [int(torch.linalg.matrix_rank(matrix, rtol=1e-5)) for matrix in before]
    return sum((b - a) * row for (a, b), row in zip(itertools.pairwise(images), rows, strict=True)) / 2


def random_network(
    seed: int, weights: tuple[float, float], family: tuple[int, int, int]
) -> tuple[nn.Sequential, list[int], int]:
    """A random network, some of whose layers have their rank reduced; its widths; the rank of the product."""
    draw, (least, widest, layers) = np.random.default_rng(seed), family
    while True:
        widths = draw.integers(least, widest, size=draw.integers(2, layers + 1) + 1).tolist()
        if weights[0] <= sum(a * b for a, b in itertools.pairwise(widths)) <= weights[1]:
            break
    torch.manual_seed(seed)
    model, rank = linear_network(widths), min(widths)
    with torch.no_grad():
        for layer in model:
            layer.weight.normal_(std=layer.in_features**-0.5)
            if draw.random() < 0.5:
                u, s, v = torch.linalg.svd(layer.weight, full_matrices=False)
                kept = len(s) - int(draw.integers(0, len(s)))
                layer.weight.copy_(u[:, :kept] * s[:kept] @ v[:kept])
                rank = min(rank, kept)
    return model, widths, rank


def measure(seed: int, weights: tuple[float, float], family: tuple[int, int, int]) -> dict[str, object]:
    """λ̂ of one random network at its true weights, and λ."""
    model, widths, rank = random_network(seed, weights, family)
    matrix = product(model, widths[0])
    x = torch.eye(widths[0]) * (100 / 3 * widths[0]) ** 0.5  # of the covariance of numbers uniform in −10 … 10
    data, size = (x, x @ matrix.float()), sum(weight.numel() for weight in model.parameters())
    row = {"seed": seed, "layers": len(widths) - 1, "weights": size, "rank": rank}
    row |= {"exact": groktrace.theory.deep_linear_llc(widths, rank).llc, "half_rank": half_rank(model)}
    settings = {"published": {"nbeta": 1e6 / np.log(1e6), "burn_in": 200, "draws": 100}}
    if size <= 1e5:
        settings["equilibrium"] = {"resolution": 1000, "rtol": 0.05}
    for name, some in settings.items():
        start = time.perf_counter()
        found = groktrace.estimate_llc(model.float(), "mse", data, chains=2, **some)
        row |= {f"llc_{name}": found.llc, f"stderr_{name}": found.stderr, f"nbeta_{name}": found.nbeta}
        row |= {f"reasons_{name}": "; ".join(found.reasons), f"seconds_{name}": time.perf_counter() - start}
    return row | {"widths": " ".join(map(str, widths))}


def scatter(out: Path, small: bool) -> list[dict[str, object]]:
    """All random networks; each is kept when it is measured."""
    kept, rows = out / "networks.jsonl", []
    if kept.exists():
        rows = [json.loads(line) for line in kept.read_text().splitlines()]
    networks = [(weights, family) for count, weights, family in FAMILIES for _ in range(count)]
    for seed, (weights, family) in list(enumerate(networks[:2] if small else networks))[len(rows) :]:
        rows.append(measure(seed, (1, 500) if small else weights, (3, 8, 3) if small else family))
        with kept.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print({key: value for key, value in rows[-1].items() if key != "widths"}, flush=True)
    return rows


def train(out: Path, steps: int) -> None:
    """One training as published; the one groktrace line is marked."""
    torch.manual_seed(1)
    x = torch.randn(1000, 5)
    y = x * 10 * torch.arange(1.0, 6)
    model = linear_network(WIDTHS)
    for weight in model.parameters():
        nn.init.normal_(weight, std=(10**-1.5) ** 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    every = max(steps // 100, 20)
    # The one line:
    groktrace.watch(model, optimizer, train=(x, y), loss="mse", out=out, every=every, if_exists="replace")

    for _ in range(steps):
        batch = torch.randint(len(x), (128,))
        loss = nn.functional.mse_loss(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def saddles(out: Path, **settings: float) -> tuple[list[dict[str, object]], list[int]]:
    """The longest stretch of each rank of the product: λ̂ in its middle, λ beside it; and the rank at each snapshot."""
    model, ranks, snapshots = linear_network(WIDTHS), [], groktrace.open_run(out).snapshots
    for snapshot in snapshots:
        snapshot.load_into(model.float())
        singular = torch.linalg.svdvals(product(model, 5))
        ranks.append(int((singular > 5).sum()))
    x, rows = torch.eye(5) * 5**0.5, []
    for rank in sorted(set(ranks)):
        at = [i for i, other in enumerate(ranks) if other == rank]
        middle = snapshots[at[2 * len(at) // 3]]
        middle.load_into(model.float())
        found = groktrace.estimate_llc(model, "mse", (x, model(x).detach()), nbeta=10_000 / np.log(10_000), **settings)
        rows.append({"rank": rank, "first": snapshots[at[0]].step, "last": snapshots[at[-1]].step, "step": middle.step,
                     "exact": groktrace.theory.deep_linear_llc(WIDTHS, rank).llc, "half_rank": rank * (10 - rank) / 2,
                     "published": PLATEAUS.get(rank), "llc": found.llc, "stderr": found.stderr,
                     "localization": found.localization, "reasons": "; ".join(found.reasons)})  # fmt: skip
    return rows, ranks


def draw(
    rows: list[dict[str, object]], trajectory: groktrace.Trajectory, stages: list[dict[str, object]], path: Path
) -> None:
    """λ̂ against λ above; one training with its plateaus below."""
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(8, 9), layout="constrained", height_ratios=[5, 4])
    place, low, middle, high = (np.array(column) for column in zip(*PUBLISHED, strict=True))
    upper.fill_between(
        10**place, 10**place * low, 10**place * high, color="0.85", label="published, 80 % of the points"
    )
    upper.plot(10**place, 10**place * middle, "0.5", ls="--", label="published, middle")
    for name, marker, label in (
        ("published", "C0o", r"here, published $n\beta$"),
        ("equilibrium", "C3+", "here, in equilibrium"),
    ):
        some = [row for row in rows if row.get(f"llc_{name}") is not None]
        upper.plot([row["exact"] for row in some], [row[f"llc_{name}"] for row in some], marker, ms=5, label=label)
    ranks = ([row["exact"] for row in rows], [row["half_rank"] for row in rows])
    upper.plot(*ranks, "kx", ms=4, mew=0.8, label="half of the rank there, λ at least")
    ends = [min(row["exact"] for row in rows), max(row["exact"] for row in rows)]
    upper.plot(ends, ends, "k", lw=1, label=r"$\hat\lambda = \lambda$")
    upper.set(xscale="log", yscale="log", xlabel=r"$\lambda$, closed form", ylabel=r"$\hat\lambda$")
    upper.legend(frameon=False)
    steps, curve, loss = trajectory.column("step"), trajectory.curve, lower.twinx()
    lower.plot(steps, curve.value, "C0.-", label=r"$\lambda_c$, 95 % band")
    lower.fill_between(
        steps, curve.value - 1.96 * curve.error, curve.value + 1.96 * curve.error, color="C0", alpha=0.25
    )
    for stage in stages:
        lower.hlines(stage["half_rank"], stage["first"], stage["last"], "k", "dotted", lw=2)
        lower.annotate(
            f"rank {stage['rank']}", (stage["first"], stage["half_rank"]), (2, 3), textcoords="offset points"
        )
        if stage["published"]:
            lower.plot(stage["step"], stage["published"], "ks", mfc="white")
        lower.errorbar(stage["step"], stage["llc"], stage["stderr"], fmt="k^", mfc="white", capsize=2)
    for i, transition in enumerate(groktrace.find_transitions(trajectory)):
        lower.axvline(transition.step, color="C0", lw=1, ls="--")
        lower.annotate(transition.name, (transition.step, 1), (0, 3 + 11 * (i % 3)), textcoords="offset points",
                       xycoords=("data", "axes fraction"), fontsize=8)  # fmt: skip
    loss.plot(steps, trajectory.column("train_loss"), "C1", ls="-.", label="training loss (right)")
    for style, label in (
        ("ks", r"published $\hat\lambda$ on the plateaus"),
        ("k^", r"$\hat\lambda$ here, the same way"),
    ):
        lower.plot([], [], style, mfc="white", label=label)
    lower.plot([], [], "k:", lw=2, label="exact: half of the rank")
    handles = [a + b for a, b in zip(lower.get_legend_handles_labels(), loss.get_legend_handles_labels(), strict=True)]
    lower.legend(*handles, frameon=False, loc="lower right", bbox_to_anchor=(1, 0.05), fontsize=8.5)
    loss.set(yscale="log", ylabel="training loss")
    lower.set(xlabel="training step", ylabel=r"$\lambda$", ylim=(-3, 16))
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
    """Measure random networks, then train one and analyse it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/deep_linear", type=Path, help="where runs and results go")
    parser.add_argument("--small", action="store_true", help="a tiny form, for a try of some seconds")
    options = parser.parse_args()

    options.out.mkdir(parents=True, exist_ok=True)
    run, steps = options.out / "training", 60 if options.small else 30_000
    if last_step(run) < steps:
        train(run, steps)
    few = {"locality": 0.1, "chains": 2, "burn_in": 20, "draws": 20} if options.small else {}
    trajectory = groktrace.analyze(run, **few)
    stages, ranks = saddles(run, **(few or {"rtol": 0.05}))
    found = groktrace.find_transitions(trajectory)
    print(f"ranks {ranks}\nλ changes at {[(change.name, change.onset, change.step, change.end) for change in found]}")
    write(options.out / "deep_linear_saddles.csv", stages)
    write(options.out / "deep_linear_transitions.csv", [change.to_dict() for change in found] or [{"step": None}])
    rows = scatter(options.out, options.small)
    write(options.out / "deep_linear.csv", rows)
    draw(rows, trajectory, stages, options.out / "deep_linear.png")


if __name__ == "__main__":
    main()
