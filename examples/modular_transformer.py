"""Modular addition by a one-layer transformer under cross-entropy: it groks, and two controls do not.

Power et al. 2022 (arXiv 2201.02177) found that small transformers fit the sums a + b mod p that they are shown, and get
the others right only long after. Nanda et al. 2023 (arXiv 2301.05217) took such a network apart: it adds by rotating,
its logits being cos and sin of 2πk(a + b)/p at a few key frequencies k. Two measures follow that from the inside:

- excluded loss: the training loss without those waves; it rises as the network comes to depend on them;
- restricted loss: the loss on all pairs with nothing but those waves; it falls as they come to be enough.

Beside them stands λ, which is told neither of the waves nor of the pairs that were held back. The controls have random
labels, or no weight decay. As published: no LayerNorm, full batches, AdamW, losses in double precision. Smaller: p = 29
for 113, width 32 for 128, half of the pairs for 30 %, and more learning rate and weight decay, so that it groks within
1500 updates, not 10 000.

    python examples/modular_transformer.py --out runs/modular_transformer
"""

import argparse
import csv
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import groktrace

FRACTION, RATE, DECAY = 0.5, 4e-3, 2.5  # of the pairs that is trained on; AdamW's learning rate and weight decay
RUNS = {"sums": "addition", "no_decay": "no weight decay", "random_labels": "random labels"}


class Transformer(nn.Module):
    """One block of attention and perceptron, read at the last of three tokens "a b ="; no normalisation."""

    def __init__(self, p: int, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Parameter(torch.randn(p + 1, width) / width**0.5)
        self.place = nn.Parameter(torch.randn(3, width) / width**0.5)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.unembed = nn.Linear(width, p, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the sum [n, p] for tokens [n, 3]."""
        stream = self.embed[tokens] + self.place
        last, size = stream[:, -1:], stream.shape[-1] // self.heads
        query, key, value = (
            layer(part).unflatten(-1, (self.heads, size)).transpose(1, 2)
            for layer, part in ((self.query, last), (self.key, stream), (self.value, stream))
        )
        mixed = (query @ key.transpose(-1, -2) / size**0.5).softmax(-1) @ value
        last = last + self.out(mixed.transpose(1, 2).flatten(2))
        return self.unembed(last + self.down(self.up(last).relu()))[:, 0]


def loss_fn(logits: Tensor, sums: Tensor) -> Tensor:
    """Cross-entropy in double precision: margins grow until float32 rounds the loss to nothing."""
    return cross_entropy(logits.double(), sums)


def pairs(p: int, random_labels: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """All pairs as tokens [p², 3], their sums [p²], and the indices of those that are trained on."""
    torch.manual_seed(0)
    both = torch.cartesian_prod(torch.arange(p), torch.arange(p))
    tokens, order = torch.cat([both, torch.full((p * p, 1), p)], 1), torch.randperm(p * p)
    sums = torch.randint(p, (p * p,)) if random_labels else both.sum(1) % p
    return tokens, sums, order[: int(FRACTION * p * p)]


def train(run: str, out: Path, p: int, width: int, steps: int, snapshots: int) -> None:
    """Train; the one groktrace line is marked."""
    tokens, sums, kept = pairs(p, run == "random_labels")
    rest = torch.ones(p * p, dtype=torch.bool).index_fill(0, kept, False)
    data, held_back = (tokens[kept], sums[kept]), (tokens[rest], sums[rest])
    model = Transformer(p, width)
    decay = 0.0 if run == "no_decay" else DECAY
    # Adam's least denominator keeps its updates from blowing up where gradients are 1e-7.
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.98), eps=1e-6, weight_decay=decay)
    kept_at = sorted({round(steps ** (1 - 0.03 * i)) for i in range(snapshots)})
    # The one line:
    groktrace.watch(model, optimizer, train=data, loss=loss_fn, val=held_back, out=out, schedule=kept_at)

    for _ in range(steps):
        loss = loss_fn(model(data[0]), data[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def waves(p: int) -> Tensor:
    """Cos and sin of 2πk(a + b)/p over all pairs, of norm one, [(p − 1)/2, 2, p²]."""
    sums = torch.cartesian_prod(torch.arange(p), torch.arange(p)).sum(1)
    angles = 2 * torch.pi * torch.arange(1, (p + 1) // 2)[:, None] * sums / p
    return torch.stack([angles.cos(), angles.sin()], 1) * 2**0.5 / p


@torch.no_grad()
def progress(run: str, out: Path, p: int, width: int) -> dict[int, dict[str, float]]:
    """Nanda et al.'s measures at each snapshot; the key frequencies are those of the last one's logits."""
    tokens, sums, kept = pairs(p, run == "random_labels")
    model, basis = Transformer(p, width), waves(p)
    snapshots = groktrace.open_run(out).snapshots
    snapshots[-1].load_into(model)
    power = (basis @ model(tokens)).square().sum((1, 2))
    key = basis[power > 1e-3 * power.sum()].flatten(0, 1)
    rows = {}
    for snapshot in snapshots:
        snapshot.load_into(model)
        logits = model(tokens)
        part = key.T @ (key @ logits)
        rows[snapshot.step] = {
            "restricted_loss": loss_fn(part + logits.mean(0), sums).item(),
            "excluded_loss": loss_fn((logits - part)[kept], sums[kept]).item(),
            "squared_norm": sum(weight.square().sum().item() for weight in model.parameters()),
            "key_frequencies": len(key) // 2,
        }
    return rows


def draw(found: dict[str, tuple[groktrace.Trajectory, dict[int, dict[str, float]]]], path: Path) -> None:
    """λ of the three runs above; losses, progress measures and accuracy of the one that groks below."""
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, layout="constrained", height_ratios=[3, 2])
    tops = []
    for run, style, colour in zip(RUNS, ("o-", "s--", "^:"), ("C0", "C1", "0.4"), strict=True):
        trajectory, _ = found[run]
        steps, curve = trajectory.column("step"), trajectory.curve
        upper.plot(steps, curve.value, style, color=colour, ms=3.5, label=RUNS[run])
        low, high = curve.value - 1.96 * curve.error, curve.value + 1.96 * curve.error
        upper.fill_between(steps, low, high, color=colour, alpha=0.2, lw=0)
        tops.append(max(curve.value[curve.error < 0.1 * curve.value], default=1.0))
    upper.set_ylim(0, 1.1 * max(tops))  # what is not known to a tenth does not set the axis
    trajectory, rows = found["sums"]
    for transition in groktrace.find_transitions(trajectory):
        for axes in (upper, lower):
            axes.axvline(transition.step, color="0.3", lw=1)
        upper.annotate(transition.name, (transition.step, 1), xycoords=("data", "axes fraction"), va="bottom")
    steps = trajectory.column("step")
    for name, style in (("train_loss", "k-"), ("val_loss", "k:")):
        lower.plot(steps, trajectory.column(name), style, label=name.replace("_", " "))
    for name, style in (("excluded_loss", "C3^-"), ("restricted_loss", "C2v-")):
        lower.plot(steps, [rows[int(step)][name] for step in steps], style, ms=3.5, label=name.replace("_", " "))
    accuracy = lower.twinx()
    accuracy.plot(steps, trajectory.column("val_accuracy"), "C4--", lw=2, label="validation accuracy (right)")
    accuracy.set(ylabel="validation accuracy", ylim=(-0.02, 1.05))
    upper.set(ylabel=r"learning coefficient $\lambda_c$, 95 % band")
    lower.set(yscale="log", xscale="log", xlabel="training step", ylabel="loss, nats")
    upper.legend(frameon=False)
    figure.legend(*[a + b for a, b in zip(*(x.get_legend_handles_labels() for x in (lower, accuracy)), strict=True)],
                  loc="outside lower center", ncols=3, frameon=False)  # fmt: skip
    figure.savefig(path, dpi=110)


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
    """Train three networks, analyse them, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/modular_transformer", type=Path, help="where runs and results go")
    parser.add_argument("--small", action="store_true", help="a tiny form, for a try of some seconds")
    options = parser.parse_args()

    size = (7, 8, 60, 3) if options.small else (29, 32, 2600, 14)  # p, width, updates, snapshots
    settings = groktrace.SamplingSettings(**{"chains": 2, "draws": 4, "burn_in": 4} if options.small else {})
    found, points, transitions = {}, [], []
    for run in RUNS:
        out = options.out / run
        if not finished(out):
            train(run, out, *size)
        trajectory = groktrace.analyze(out, settings=settings, time_limit=600)  # as on the command line
        found[run] = trajectory, progress(run, out, *size[:2])
        changes = groktrace.find_transitions(trajectory)
        transitions += [{"run": run, **transition.to_dict()} for transition in changes]
        for i, point in enumerate(trajectory):
            measured = {"step": point.step, "llc": trajectory.curve.value[i], "stderr": trajectory.curve.error[i]}
            losses = {name: getattr(point, name) for name in ("train_loss", "val_loss", "val_accuracy")}
            points.append(
                {"run": run, **measured, **losses, **found[run][1][point.step], "reasons": "; ".join(point.reasons)}
            )
        named = [f"{transition.name} at {transition.step}" for transition in changes]
        print(f"{RUNS[run]}: {', '.join(named) or 'no transition'}")
    write(options.out / "modular_transformer.csv", points)
    write(options.out / "modular_transformer_transitions.csv", transitions)
    draw(found, options.out / "modular_transformer.png")


if __name__ == "__main__":
    main()
