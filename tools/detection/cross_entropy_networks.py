"""Cross-entropy networks on modular addition, grokking and not: which λ̂ tells them apart, from training data alone."""

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import groktrace
from groktrace.analysis.detection import find_transitions
from groktrace.analysis.results.trajectory import Point, Trajectory
from groktrace.errors import GroktraceError
from tools.common.measurements import Row, print_table, save_rows, say
from tools.common.networks import record_training
from tools.detection.quadratic_networks import CHANCE, GENERALISED, Training, crossing, without

SNAPSHOTS = 28
FIRST = 30
# What the analysis chooses for such networks by itself.
DEFAULT = "training loss, κ = 100"
# Measures that are not the training loss take more work a snapshot: every second one.
SPARSE = 2


class Mlp(nn.Module):
    """Two embedded symbols, one hidden layer.

    Args:
        p: modulus.
    """

    def __init__(self, p: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(p, 24)
        self.hidden = nn.Linear(48, 96)
        self.output = nn.Linear(96, p)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, p] of pairs [n, 2]."""
        return self.output(torch.relu(self.hidden(self.embedding(x).flatten(1))))


class Transformer(nn.Module):
    """One block that reads two symbols from a third position; four heads, no normalisation.

    Args:
        p: modulus.
    """

    def __init__(self, p: int, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.p, self.heads = p, heads
        self.embedding = nn.Embedding(p + 1, width)
        self.position = nn.Parameter(torch.randn(3, width) / math.sqrt(width))
        self.attention = nn.Linear(width, 3 * width, bias=False)
        self.mix = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.output = nn.Linear(width, p, bias=False)
        nn.init.normal_(self.embedding.weight, std=1 / math.sqrt(width))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, p] of pairs [n, 2]."""
        stream = self.embedding(torch.cat([x, torch.full_like(x[:, :1], self.p)], 1)) + self.position
        n, length, width = stream.shape
        query, key, value = (
            self.attention(stream).view(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        )
        weight = torch.softmax((query[:, :, -1:] * key).sum(-1) / math.sqrt(width // self.heads), -1)
        last = stream[:, -1] + self.mix((weight[..., None] * value).sum(2).reshape(n, width))
        return self.output(last + self.down(torch.relu(self.up(last))))


@dataclass(frozen=True)
class Network(Training):
    """A network that is trained with AdamW.

    Attributes:
        kind: "mlp" or "transformer".
    """

    kind: str


def networks(seed: int) -> list[Network]:
    """Of each kind twelve that should grok, and twelve controls: random labels, few pairs, no weight decay.

    Args:
        seed: added to those of all networks.
    """
    chosen = []
    for i in range(12):
        p, fraction = ((23, 0.75), (23, 0.8), (29, 0.7), (19, 0.8))[i % 4]
        chosen.append(Network(p, fraction, (1e-3, 2e-3)[i % 2], (2.0, 1.5, 2.0)[i % 3], False, 1000 + i, "mlp"))
        p = (23, 23, 29)[i % 3]
        chosen.append(Network(p, 0.6, (2e-3, 3e-3)[p == 29], 1.5, False, 1000 + i, "transformer"))
        p = (23, 29)[i % 2]
        fraction, decay, random = ((0.7, 2.0, True), (0.35, 2.0, False), (0.7, 0.0, False))[i % 3]
        chosen.append(Network(p, fraction, (1e-3, 2e-3)[i % 2], decay, random, 2000 + i, "mlp"))
        fraction, decay, random = ((0.6, 1.5, True), (0.3, 1.5, False), (0.3, 0.0, False))[i % 3]
        chosen.append(Network(p, fraction, 2e-3, decay, random, 2000 + i, "transformer"))
    return [replace(network, seed=network.seed + seed) for network in chosen]


def pairs(network: Network) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and validation pairs with their sums, or with random labels."""
    generator = torch.Generator().manual_seed(network.seed)
    p = network.p
    x = torch.cartesian_prod(torch.arange(p), torch.arange(p))
    y = torch.randint(p, (p * p,), generator=generator) if network.random_labels else x.sum(1) % p
    order = torch.randperm(p * p, generator=generator)
    count = int(network.fraction * p * p)
    train, val = order[:count], order[count:]
    return (x[train], y[train]), (x[val], y[val])


def build(network: Network) -> nn.Module:
    """The network before training."""
    torch.manual_seed(network.seed)
    return (Mlp if network.kind == "mlp" else Transformer)(network.p)


def record(
    network: Network, folder: Path, first: int = FIRST, snapshots: int = SNAPSHOTS
) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Train a network with the hook line; the network and its training pairs.

    Args:
        network: to train.
        folder: of the recording.
        first: step of the first snapshot after that of step 0.
        snapshots: how many to keep beside that one.
    """
    train, val = pairs(network)
    model, steps = build(network), 12_000 if network.kind == "mlp" else 5000
    # Adam's least denominator keeps the transformer's updates from blowing up where gradients are 1e-7.
    more = {"eps": 1e-6} if network.kind == "transformer" else {}
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=network.lr, weight_decay=network.weight_decay, betas=(0.9, 0.98), **more
    )
    kept = [int(step) for step in np.geomspace(first, steps, snapshots)]
    record_training(model, optimizer, train, folder, steps, "cross_entropy", val=val, schedule=kept)
    return model, train


def centred(logits: Tensor) -> Tensor:
    """Less their mean, which a softmax does not see."""
    return logits - logits.mean(-1, keepdim=True)


def outputs_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Squared distance from the snapshot's own logits."""
    return 0.5 * (centred(outputs) - targets).square().sum(-1).mean()


def direction_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """The same, of logits at norm one."""
    return 0.5 * (functional.normalize(centred(outputs), dim=-1) - targets).square().sum(-1).mean()


def tempered(logits: Tensor, targets: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Cross-entropy at the temperature at which it is half that of chance."""
    low, high = 1e-5, 1e3
    for _ in range(50):
        factor = math.sqrt(low * high)
        above = float(functional.cross_entropy(factor * logits, targets)) > 0.5 * math.log(logits.shape[-1])
        low, high = (factor, high) if above else (low, factor)
    return lambda outputs, wanted: functional.cross_entropy(factor * outputs, wanted)


def output_measures(network: Network, folder: Path, plain: Trajectory) -> dict[str, Trajectory]:
    """λ̂ of losses other than the training's, at some of the snapshots."""
    (x, y), _ = pairs(network)
    model = build(network)
    points: dict[str, list[Point]] = {}
    first_scale: dict[str, float] = {}
    for snapshot, point in list(zip(groktrace.open_run(folder).snapshots, plain.points, strict=True))[::SPARSE]:
        model.load_state_dict(snapshot.load())
        with torch.no_grad():
            logits = model(x)
        losses = {
            "outputs, κ = 100": (outputs_loss, centred(logits)),
            "outputs at norm 1, κ = 100": (direction_loss, functional.normalize(centred(logits), dim=-1)),
            "tempered logits, one nβ": (tempered(logits, y), y),
        }
        for name, (loss, targets) in losses.items():
            scale = {"resolution": 100.0} if "κ" in name else first_scale or {"resolution": 100.0}
            try:
                found = groktrace.estimate_llc(model, loss, (x, targets), seed=snapshot.step, **scale)
            except GroktraceError as failure:
                say(f"{network.name} {snapshot.step} {name}: {failure}")
                continue
            if "tempered" in name and not first_scale and point.train_accuracy >= 0.98:
                first_scale = {"nbeta": found.nbeta, "localization": found.localization}
            points.setdefault(name, []).append(
                replace(
                    point,
                    llc=found.llc,
                    stderr=found.stderr,
                    llc_centred=found.llc_centred,
                    stderr_centred=found.stderr_centred,
                    reliable=found.reliable,
                    reasons=found.reasons,
                )
            )
    return {name: replace(plain, points=tuple(point)) for name, point in points.items()}


def other_measures(network: Network, folder: Path, plain: Trajectory) -> dict[str, Trajectory]:
    """All other measures of one network, from its snapshots."""
    typical = float(np.median([point.diagnostics["nbeta"] for point in plain.points if fitted(point)] or [1.0]))
    fixed = groktrace.analyze(folder, nbeta=typical / 10, localization=plain.localization)
    found = {"training loss, one nβ": fixed}
    for resolution in (10.0, 30.0):
        found[f"training loss, κ = {resolution:g}"] = groktrace.analyze(
            folder, nbeta="curvature", resolution=resolution
        )
    return found | output_measures(network, folder, plain)


def fitted(point: Point) -> bool:
    """Whether a snapshot has fitted its training set."""
    return point.train_accuracy is not None and point.train_accuracy >= 0.98


def labelled(trajectory: Trajectory, doubts: bool) -> list[groktrace.Transition]:
    """Transitions labelled `generalisation` without a look at validation data.

    Args:
        trajectory: of one measure.
        doubts: whether curvature and weight decay may speak against the label.
    """
    unseen: dict[str, object] = {"val_loss": None, "val_accuracy": None}
    if not doubts:
        unseen["diagnostics"], trajectory = {}, replace(trajectory, weight_decay=None)
    return [
        transition
        for transition in find_transitions(without(trajectory, **unseen))
        if transition.label == "generalisation"
    ]


def outcome(trajectory: Trajectory) -> str:
    """Whether the network grokked, by its validation accuracy."""
    accuracy = trajectory.column("val_accuracy")
    memorised = np.flatnonzero(trajectory.column("train_accuracy") >= 0.98)
    if accuracy[-1] >= GENERALISED:
        return "groks" if len(memorised) and accuracy[memorised[0]] < CHANCE else "at once"
    return "control" if np.nanmax(accuracy) < CHANCE else "between"


def run_cross_entropy(folder: Path, limit: int, seed: int, all_measures: bool) -> None:
    """Train and analyse those that are not yet there, then judge them all.

    Args:
        folder: of the results; snapshots and trajectories of a network are kept there.
        limit: how many to train at most now.
        seed: added to those of all networks.
        all_measures: whether to try others than the analysis' own.
    """
    kept = folder / "cross_entropy"
    kept.mkdir(parents=True, exist_ok=True)
    judged: list[tuple[Network, dict[str, Trajectory]]] = []
    for network in networks(seed):
        place = kept / network.name
        run, done, plain = place / "run", place / "done", place / f"{DEFAULT}.json"
        if not (done if all_measures else plain).exists():
            if limit <= 0:
                continue
            limit -= 1
            say(network.name)
            if not plain.exists():
                shutil.rmtree(run, ignore_errors=True)  # of a training that was interrupted
                record(network, run)
                groktrace.analyze(run).save(plain)
            if all_measures:
                for name, trajectory in other_measures(network, run, Trajectory.load(plain)).items():
                    trajectory.save(place / f"{name}.json")
                done.touch()
        judged.append((network, {path.stem: Trajectory.load(path) for path in sorted(place.glob("*.json"))}))
    rows = [row(network, found) for network, found in judged]
    save_rows(folder / f"cross_entropy-{seed}.csv", rows)
    print_table("Cross-entropy networks", summarise(judged))


def row(network: Network, found: dict[str, Trajectory]) -> Row:
    """One line about a network."""
    plain = found[DEFAULT]
    half = crossing(plain.column("step"), plain.column("val_accuracy"), CHANCE)
    line = {name: str(value) for name, value in asdict(network).items()}
    line |= {"outcome": outcome(plain), "half_at": "" if half is None else f"{half:.0f}"}
    line |= {name: str(len(labelled(trajectory, doubts=False))) for name, trajectory in found.items()}
    shipped = labelled(plain, doubts=True)
    line["follows"] = str(plain.follows_curvature)
    line |= {"shipped": str(len(shipped)), "midpoint": str(shipped[0].step) if shipped else ""}
    return line


def summarise(judged: Sequence[tuple[Network, dict[str, Trajectory]]]) -> list[Row]:
    """Hits and false alarms of each measure."""
    groups: dict[str, list[dict[str, Trajectory]]] = {}
    for network, found in judged:
        kind = outcome(found[DEFAULT])
        if kind == "control":
            reason = "random labels" if network.random_labels else "few pairs"
            kind = "no weight decay" if network.weight_decay == 0 else reason
        groups.setdefault(f"{network.kind}: {kind}", []).append(found)
    names = list(judged[0][1])
    rows = []
    for name, doubts in [*((name, False) for name in names), (DEFAULT, True)]:
        line = {"measure": name + (", with doubts" if doubts else "")}
        for group, members in sorted(groups.items()):
            hits = sum(bool(labelled(found[name], doubts)) for found in members if name in found)
            line[group] = f"{hits} of {sum(name in found for found in members)}"
        rows.append(line)
    return rows
