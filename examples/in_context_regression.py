"""In-context linear regression: the stages of a transformer's training, found in λ with no label known.

Each sequence is a regression problem of its own, x₁ y₁ … x_K y_K with y = t·x + noise, and each y is to be predicted
from what comes before it. Hoogland et al. 2024 (arXiv 2402.02364) train a transformer on endlessly many tasks t and
divide its training where λ turns: it first learns the best guess without looking at the context (LR1, λ rises), then
to regress in context (LR2, λ rises most), and after a long time simplifies (LR3, LR4, λ falls). Carroll et al. 2025
(arXiv 2501.17745) give it only M tasks: it first regresses as if there were endlessly many (ridge regression), and then
learns these M by heart (dMMSE, the best prediction where they are known), while λ rises.

As published: inputs of dimension 4, 8 examples, noise of variance 1/8, two layers of four heads, Adam without weight
decay, a new batch at each step. Smaller: width 32 for 64, batches of 64 for 1024, and 4000 updates for 500 000, so that
the late stages LR3 and LR4, which begin at 40 000, are not reached.

    python examples/in_context_regression.py --out runs/in_context_regression
"""

import argparse
import csv
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import groktrace

D, K, NOISE = 4, 8, 0.125  # dimension, examples in a sequence, variance of the noise
BATCH, RATE = 64, 3e-3
RUNS = {"endless": 0, "few": 8}  # number of tasks M; 0 for a new one in each sequence
LINES = {
    "loss": ("loss", "k-"),
    "loss_on_new_tasks": ("loss on new tasks", "k:"),
    "from_zero": ("distance from the blind guess, 0", "C7s:"),
    "from_ridge": ("distance from ridge regression", "C0^--"),
    "from_dmmse": ("distance from dMMSE", "C3v-"),
}


class Block(nn.Module):
    """Attention to what came before, then a perceptron."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, stream: Tensor) -> Tensor:
        """Stream [n, tokens, width] to the same."""
        tokens, size = stream.shape[1], stream.shape[2] // self.heads
        query, key, value = self.qkv(self.first(stream)).unflatten(-1, (3, self.heads, size)).permute(2, 0, 3, 1, 4)
        later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        weight = (query @ key.transpose(-1, -2) / size**0.5).masked_fill(later, -torch.inf).softmax(-1)
        stream = stream + self.out((weight @ value).transpose(1, 2).flatten(2))
        return stream + self.mlp(self.second(stream))


class Regressor(nn.Module):
    """Predicts each y of x₁ y₁ … x_K y_K where x is read; x and y are tokens of their own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(D + 1, width)
        self.place = nn.Parameter(torch.randn(2 * K, width) / width**0.5)
        self.layers = nn.Sequential(Block(width), Block(width), nn.LayerNorm(width), nn.Linear(width, 1))

    def forward(self, sequences: Tensor) -> Tensor:
        """Predictions [n, K] for sequences [n, K, D + 1] of (y, x)."""
        y, x = sequences.split((1, D), -1)
        tokens = torch.stack([torch.cat([0 * y, x], -1), torch.cat([y, 0 * x], -1)], 2).flatten(1, 2)
        return self.layers(self.embed(tokens) + self.place)[:, ::2, 0]


def batch_loss(model: nn.Module, sequences: Tensor) -> Tensor:
    """Mean squared error over all examples of all sequences."""
    return mse_loss(model(sequences), sequences[..., 0])


def sample(n: int, tasks: Tensor | None, seed: torch.Generator) -> Tensor:
    """Sequences [n, K, D + 1] of (y, x), each of one of the tasks [M, D], or of a new one."""
    if tasks is None:
        task = torch.randn(n, D, generator=seed)
    else:
        task = tasks[torch.randint(len(tasks), (n,), generator=seed)]
    x, noise = torch.randn(n, K, D, generator=seed), torch.randn(n, K, 1, generator=seed)
    return torch.cat([x @ task[:, :, None] + NOISE**0.5 * noise, x], -1)


def ridge(sequences: Tensor) -> Tensor:
    """The best predictions [n, K] for tasks that are standard normal."""
    y, x = sequences.split((1, D), -1)
    covariance = (x[..., :, None] * x[..., None, :]).cumsum(1) - x[..., :, None] * x[..., None, :]
    moment = (x * y).cumsum(1) - x * y  # of the examples before each
    return (torch.linalg.solve(covariance + NOISE * torch.eye(D), moment[..., None])[..., 0] * x).sum(-1)


def dmmse(sequences: Tensor, tasks: Tensor) -> Tensor:
    """The best predictions [n, K] for tasks that are one of these [M, D]."""
    y, x = sequences.split((1, D), -1)
    error = (y - x @ tasks.T).square() / (2 * NOISE)
    return ((error - error.cumsum(1)).softmax(-1) * (x @ tasks.T)).sum(-1)


def tasks_of(run: str) -> Tensor | None:
    """The M tasks of a run [M, D]; None for a new one in each sequence."""
    return torch.randn(RUNS[run], D, generator=torch.Generator().manual_seed(1)) if RUNS[run] else None


def train(run: str, out: Path, width: int, steps: int, snapshots: int, kept: int) -> None:
    """Train; the one groktrace line is marked."""
    torch.manual_seed(0)
    tasks, seed = tasks_of(run), torch.Generator().manual_seed(2)
    model = Regressor(width)
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    kept_at = sorted({round(steps ** (1 - 0.03 * i)) for i in range(snapshots)})
    some = sample(kept, tasks, seed)
    # The one line; the training data have no end, and λ is that of some of them:
    groktrace.watch(model, optimizer, train=some, n=BATCH * steps, batch_loss=batch_loss, out=out, schedule=kept_at)

    for _ in range(steps):
        loss = batch_loss(model, sample(BATCH, tasks, seed))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def distances(run: str, out: Path, width: int) -> list[dict[str, float]]:
    """Mean squared distance of the predictions from three solutions at each snapshot; and the losses on new data.

    Args:
        run: one of RUNS.
        out: its recording.
        width: of the model.
    """
    tasks, seed, model = tasks_of(run), torch.Generator().manual_seed(20), Regressor(width)
    own, new = sample(2048, tasks, seed), sample(2048, None, seed)
    solutions = {"zero": torch.zeros(own.shape[:2]), "ridge": ridge(own)}
    if tasks is not None:
        solutions["dmmse"] = dmmse(own, tasks)
    rows = []
    for snapshot in groktrace.open_run(out).snapshots:
        snapshot.load_into(model)
        found = {f"from_{name}": mse_loss(model(own), wanted).item() for name, wanted in solutions.items()}
        losses = {"loss": batch_loss(model, own).item(), "loss_on_new_tasks": batch_loss(model, new).item()}
        rows.append({"from_dmmse": None, **losses, **found})
    return rows


def draw(found: dict[str, tuple[groktrace.Trajectory, list[dict[str, float]]]], path: Path) -> None:
    """A column for each run: λ with its transitions above, distances from the three solutions below."""
    figure, panels = plt.subplots(2, len(found), figsize=(11, 7), sharex=True, sharey="row", layout="constrained")
    names = {"endless": "a new task in each sequence", "few": f"{RUNS['few']} tasks"}
    for (run, (trajectory, rows)), (upper, lower) in zip(found.items(), panels.T, strict=True):
        steps, curve = trajectory.column("step"), trajectory.curve
        upper.plot(steps, curve.value, "ko-", ms=3.5)
        low, high = curve.value - 1.96 * curve.error, curve.value + 1.96 * curve.error
        upper.fill_between(steps, low, high, color="k", alpha=0.2, lw=0)
        for transition in groktrace.find_transitions(trajectory):
            upper.axvspan(transition.onset, transition.end, color="C0" if transition.delta_llc > 0 else "C1", alpha=0.2)
            for axes in (upper, lower):
                axes.axvline(transition.step, color="0.3", lw=1)
            sign = "rise" if transition.delta_llc > 0 else "fall"
            upper.annotate(f"{sign}, {transition.step}", (transition.step, 1), xycoords=("data", "axes fraction"),
                           rotation=30, va="bottom", fontsize=8)  # fmt: skip
        for name, (label, style) in LINES.items():
            if rows[0][name] is not None:
                lower.plot(steps, [row[name] for row in rows], style, ms=3.5, label=label)
        lower.set(xscale="log", yscale="log", xlim=(0.9 * steps[1], None), xlabel=f"training step ({names[run]})")
    panels[0, 0].set_ylabel("learning coefficient, 95 % band")
    panels[1, 0].set_ylabel("mean squared error")
    figure.legend(*panels[1, -1].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=100)


def write(path: Path, rows: list[dict[str, object]]) -> None:
    """A table as comma-separated values."""
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]) if rows else ["run"])
        table.writeheader()
        table.writerows(rows)


def finished(out: Path) -> bool:
    """Whether a recording is there that came to its end."""
    try:
        return groktrace.open_run(out).closed
    except groktrace.GroktraceError:
        return False


def main() -> None:
    """Train two networks, analyse them, compare with the known solutions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/in_context_regression", type=Path, help="where runs and results go")
    parser.add_argument("--small", action="store_true", help="a tiny form, for a try of some seconds")
    options = parser.parse_args()

    size = (8, 40, 3, 32) if options.small else (32, 4000, 22, 2048)  # width, updates, snapshots, sequences for λ
    settings = groktrace.SamplingSettings(**{"chains": 2, "draws": 4, "burn_in": 4} if options.small else {})
    found, points, transitions = {}, [], []
    for run in RUNS:
        out = options.out / run
        if not finished(out):
            train(run, out, *size)
        trajectory = groktrace.analyze(out, settings=settings)
        found[run] = trajectory, distances(run, out, size[0])
        changes = groktrace.find_transitions(trajectory)
        transitions += [{"run": run, **transition.to_dict()} for transition in changes]
        for i, point in enumerate(trajectory):
            measured = {"step": point.step, "llc": trajectory.curve.value[i], "stderr": trajectory.curve.error[i]}
            points.append({"run": run, **measured, **found[run][1][i], "reasons": "; ".join(point.reasons)})
        print(f"{run}: {', '.join(f'{transition.name} at {transition.step}' for transition in changes)}")
    write(options.out / "in_context_regression.csv", points)
    write(options.out / "in_context_regression_transitions.csv", transitions)
    draw(found, options.out / "in_context_regression.png")


if __name__ == "__main__":
    main()
