"""Quadratic networks on modular addition, grokking and not: what is found in their λ̂, from training data alone."""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import groktrace
from groktrace.analysis.detection import find_transitions
from groktrace.analysis.results.trajectory import Trajectory
from tools.common.measurements import Row, print_table, save_rows, say
from tools.common.networks import EXAMPLE, modular_network, record_training

STEPS = 3000
EVERY = 75
GENERALISED = 0.9
CHANCE = 0.5


@dataclass(frozen=True)
class Training:
    """A training on modular addition.

    Attributes:
        p: modulus.
        fraction: of all pairs that is trained on.
        lr: learning rate.
        weight_decay: of the optimizer.
        random_labels: labels that can only be memorised.
        seed: of data and initial weights.
    """

    p: int
    fraction: float
    lr: float
    weight_decay: float
    random_labels: bool
    seed: int

    @property
    def name(self) -> str:
        """Of its files."""
        return "-".join(str(value) for value in asdict(self).values())


@dataclass(frozen=True)
class Network(Training):
    """A quadratic network; further options of the example.

    Attributes:
        width: hidden neurons.
        optimizer: "adamw" or "adam" (weight decay in the gradient).
    """

    width: int
    optimizer: str


def networks(seed: int) -> list[Network]:
    """Eighty networks: about fifty that should grok, and controls of three kinds.

    Args:
        seed: added to those of all networks.
    """
    chosen = []
    for i in range(50):
        p = (11, 13, 17, 19, 23)[i % 5]
        width = (64, 96, 128)[i % 3]
        fraction = (0.6, 0.7, 0.8)[(i // 2) % 3] if p > 13 else (0.7, 0.8)[(i // 5) % 2]
        optimizer = ("adamw", "adamw", "adamw", "adam")[(i // 3) % 4]
        lr = (3e-3, 5e-3)[(i // 4) % 2]
        weight_decay = (0.5, 1.0, 2.0)[(i // 5) % 3] if optimizer == "adamw" else 3e-4
        chosen.append(Network(p, fraction, lr, weight_decay, False, i, width, optimizer))
    for i in range(30):
        p, width = (13, 17, 19, 23)[i % 4], (64, 96, 128)[i % 3]
        fraction, weight_decay, random_labels = ((0.6, 1.0, True), (0.25, 1.0, False), (0.35, 0.0, False))[i % 3]
        lr = (3e-3, 5e-3)[(i // 2) % 2]
        chosen.append(Network(p, fraction, lr, weight_decay, random_labels, 100 + i, width, "adamw"))
    return [replace(network, seed=network.seed + seed) for network in chosen]


def record(
    network: Network, folder: Path, steps: int, kept: Sequence[int] | None = None
) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Train a network with the hook line; the network and its training pairs.

    Args:
        network: to train.
        folder: of the recording.
        steps: of the training.
        kept: steps of the snapshots; by default one every 75.
    """
    model, train, val = modular_network(network.p, network.width, network.fraction, network.random_labels, network.seed)
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[network.optimizer]
    optimizer = kind(model.parameters(), lr=network.lr, weight_decay=network.weight_decay)
    when = {"every": EVERY} if kept is None else {"schedule": list(kept)}
    record_training(model, optimizer, train, folder, steps, EXAMPLE.centred_loss, val=val, **when)
    return model, train


def measure(network: Network) -> Trajectory:
    """Train a network with the hook line, and analyse it."""
    folder = Path(tempfile.mkdtemp())
    try:
        record(network, folder / "run", STEPS)
        return groktrace.analyze(folder / "run")
    finally:
        shutil.rmtree(folder)


def judge(network: Network, trajectory: Trajectory) -> Row:
    """One line about a network: whether it grokked, and what was found without looking at validation data."""
    transitions = find_transitions(without(trajectory, val_loss=None, val_accuracy=None))
    labelled = [transition for transition in transitions if transition.label == "generalisation"]
    steps, accuracy = trajectory.column("step"), trajectory.column("val_accuracy")
    curve = trajectory.column("llc_centred")
    half = crossing(steps, accuracy, CHANCE)
    if accuracy[-1] >= GENERALISED:
        # Who generalises within the first two snapshots has no phase of memorising that they could show.
        outcome = "groks" if half is not None and half > 2 * EVERY else "at once"
    elif np.nanmax(accuracy) < CHANCE:
        outcome = "control"
    else:
        outcome = "between"
    row = {name: str(value) for name, value in asdict(network).items()}
    row |= {"outcome": outcome, "val_accuracy": f"{accuracy[-1]:.2f}", "found": str(len(labelled))}
    row |= {"half_at": "" if half is None else f"{half:.0f}", "peak_at": f"{steps[np.nanargmax(curve)]:.0f}"}
    first = max(labelled, key=lambda transition: -transition.delta_llc, default=None)
    row["midpoint"] = "" if first is None else str(first.step)
    row["interval"] = "" if first is None else f"{first.step_low}-{first.step_high}"
    row["all"] = "; ".join(
        f"{transition.name} @ {transition.step} {transition.llc_before:.0f}->{transition.llc_after:.0f}"
        for transition in transitions
    )
    return row


def without(trajectory: Trajectory, **values: object) -> Trajectory:
    """A trajectory whose points have these values instead: labels may not depend on what they cannot see."""
    return replace(trajectory, points=tuple(replace(point, **values) for point in trajectory.points))


def crossing(steps: np.ndarray, accuracy: np.ndarray, level: float) -> float | None:
    """The step at which an accuracy first passes a level, interpolated; None if it never does."""
    reached = np.flatnonzero(accuracy >= level)
    if not len(reached):
        return None
    i = int(reached[0])
    if i == 0:
        return float(steps[0])
    return float(np.interp(level, accuracy[i - 1 : i + 1], steps[i - 1 : i + 1]))


def run_networks(folder: Path, limit: int, seed: int) -> None:
    """Train and analyse those that are not yet there, then judge them all.

    Args:
        folder: of the results; a trajectory a network is kept there.
        limit: how many to train at most now.
        seed: added to those of all networks.
    """
    kept = folder / "networks"
    kept.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for network in networks(seed):
        path = kept / f"{network.name}.json"
        if not path.exists():
            if limit <= 0:
                continue
            limit -= 1
            say(network.name)
            measure(network).save(path)
        rows.append(judge(network, Trajectory.load(path)))
    save_rows(folder / f"networks-{seed}.csv", rows)
    print_table("Quadratic networks", summarise(rows))
    for row in rows:
        if row["outcome"] in ("groks", "control") and (row["outcome"] == "groks") != (row["found"] != "0"):
            print(f"- missed or false: {row}")


def summarise(rows: Sequence[Row]) -> list[Row]:
    """Hits, false alarms, distances and leads."""
    groks = [row for row in rows if row["outcome"] == "groks"]
    controls = [row for row in rows if row["outcome"] == "control"]
    hits = [row for row in groks if row["found"] != "0"]
    distance = [abs(float(row["midpoint"]) - float(row["half_at"])) / float(row["half_at"]) for row in hits]
    lead = [float(row["half_at"]) - float(row["peak_at"]) for row in groks]
    table = [
        ("networks that grok", f"{len(groks)}"),
        ("generalisation found in", f"{len(hits)}"),
        ("networks that never generalise", f"{len(controls)}"),
        ("generalisation found in (false)", f"{sum(row['found'] != '0' for row in controls)}"),
        ("generalise within two snapshots, left out", f"{sum(row['outcome'] == 'at once' for row in rows)}"),
        ("validation accuracy ends between, left out", f"{sum(row['outcome'] == 'between' for row in rows)}"),
    ]
    if hits:
        table.append(("midpoint from val acc 0.5, relative, median", f"{np.median(distance):.2f}"))
        table.append(
            (
                "λ_c peaks before val acc 0.5 by, steps, median (range)",
                f"{np.median(lead):.0f} ({min(lead):.0f} to {max(lead):.0f})",
            )
        )
    return [{"what": what, "": value} for what, value in table]
