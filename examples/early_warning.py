"""One network that groks, and one that only memorises: when is the fall of λ announced, while they train.

`groktrace.follow` analyses each snapshot as it is written, from training data alone. It warns when λ has begun to fall
at a rate that networks do not show which only memorise; later it announces the fall as a transition, and labels it once
it is deep enough to be called generalisation. Validation accuracy, which nothing of this sees, passes 0.5 meanwhile.
The measurement over many networks is `python -m tools.detection warning`. About a minute on two cores.

    python examples/early_warning.py --out runs/early_warning
"""

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import torch
from modular_addition import QuadraticNetwork, centred_loss, modular_pairs

import groktrace

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def training(out: Path, options: argparse.Namespace, random_labels: bool) -> Iterator[int]:
    """A training as a generator, one snapshot further at each turn; the recording has its one line."""
    torch.manual_seed(options.seed)
    train, val = modular_pairs(options.p, options.fraction, random_labels)
    model = QuadraticNetwork(2 * options.p, options.width, options.p)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=options.decay)
    data = {"train": train, "loss": centred_loss, "val": val, "if_exists": "replace"}
    with groktrace.watch(model, optimizer, **data, out=out, every=options.every):  # the one line
        for step in range(options.steps):
            loss = centred_loss(model(train[0]), train[1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % options.every == 0:
                yield step


def follow(out: Path, options: argparse.Namespace, random_labels: bool) -> tuple[groktrace.Trajectory, dict[str, int]]:
    """Follow one training; λ at the end, and at which snapshot each kind of news first came."""
    steps = training(out, options, random_labels)
    next(steps)
    told: dict[str, int] = {}
    so_far = None
    # Another process would follow a long training (`groktrace follow RUN`). Here the training goes on by one snapshot
    # whenever all that there are have been analysed, so that λ keeps up with it on any machine.
    for event in groktrace.follow(out, idle=lambda: next(steps, None)):
        if isinstance(event, groktrace.Trajectory):
            so_far = event
        elif isinstance(event, groktrace.EarlyWarning):
            told.setdefault("warned", event.step)
            print(
                f"step {event.step}: λ falls by {event.rate:.3f} ± {event.stderr:.3f} for each e-fold of the training"
            )
        elif isinstance(event, groktrace.Announcement) and event.transition.kind == "simplification":
            now = so_far.points[-1].step + options.every  # the trajectory with this snapshot comes next
            for name in ("announced", *(["labelled"] if event.transition.label else [])):
                if name not in told:
                    told[name] = now
                    print(f"step {now}: {name} as {event.transition.name}")
        elif isinstance(event, groktrace.RecordingEnded):
            return event.trajectory, told
    raise RuntimeError("the recording has no end")


def main() -> None:
    """Follow the two trainings; a table, a figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/early_warning"), help="where the results go")
    parser.add_argument("--seed", type=int, default=2, help="of data and initial weights")
    parser.add_argument("--small", action="store_true", help="networks mod 11 and few steps, in seconds")
    options = parser.parse_args()
    small = {"p": 11, "width": 64, "fraction": 0.8, "steps": 220, "every": 20, "lr": 5e-3, "decay": 2.0}
    full = {"p": 17, "width": 96, "fraction": 0.7, "steps": 1500, "every": 20, "lr": 3e-3, "decay": 0.5}
    vars(options).update(small if options.small else full)

    rows, figure = [], plt.figure(figsize=(7, 4.4), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=[2, 1])
    for name, style, random_labels in (("groks", "-", False), ("random labels", "--", True)):
        trajectory, told = follow(options.out / name.replace(" ", "_"), options, random_labels)
        step, accuracy = trajectory.column("step"), trajectory.column("val_accuracy")
        passed = np.flatnonzero(accuracy >= 0.5)
        half = int(step[passed[0]]) if len(passed) else None
        rows.append(
            {"training": name, "half": half} | {key: told.get(key) for key in ("warned", "announced", "labelled")}
        )
        value, error = trajectory.curve.value, trajectory.curve.error
        above.plot(step, value, style, c="k", lw=1.2, label=name)
        above.fill_between(step, value - error, value + error, color="0.8")
        below.plot(step, accuracy, style, c="k", lw=1.2)
        for key, marker in (("warned", "^"), ("announced", "o"), ("labelled", "s")):
            if key in told:
                at = float(np.interp(told[key], step, value))
                above.plot(told[key], at, marker, c="k", mfc="w", ms=7, label=f"{key}, step {told[key]}")
                below.axvline(told[key], c="0.6", lw=0.8)
        if half is not None:
            below.axvline(half, c="k", ls=":", lw=1.2, label=f"accuracy 0.5, step {half}")
    above.set(ylabel="λ_c", ylim=(0, None))
    below.set(xlabel="step", ylabel="validation accuracy")
    above.legend(frameon=False, ncol=2)
    if rows[0]["half"] is not None:
        below.legend(frameon=False, loc="center right")
    figure.savefig(options.out / "early_warning.png", dpi=130)
    with open(options.out / "early_warning.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
