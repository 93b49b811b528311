"""Act on what is measured: a training that raises its weight decay when λ says so, and stops when λ says so.

Networks memorise addition mod 17 under a weight decay so weak that they do not generalise in 3000 steps. Their training
loss is low all the while and says nothing of it. A callback hears what λ does as it is measured, from training data
alone. Where λ has risen (memorised) and does not fall, the weight decay is raised tenfold; once λ has fallen far enough
to be called generalisation, the training goes on for as long again, and ends. Beside it, the same networks under the
weak decay throughout, and under the strong one from the start. About three minutes on two cores.

    python examples/intervention.py --out runs/intervention
"""

import argparse
import csv
from pathlib import Path

import matplotlib
import torch
from modular_addition import QuadraticNetwork, centred_loss, modular_pairs

import groktrace

matplotlib.use("Agg")
from matplotlib import pyplot as plt

WEAK, STRONG = 0.1, 1.0
PATIENCE = 2  # how many times longer than when it was told the training has to be until something is done about it


class Judgement:
    """What to do, by what is told of λ: `watch(on_transition=...)` calls it in the training loop."""

    def __init__(self) -> None:
        self.memorised: int | None = None
        self.generalised: int | None = None
        self.falls = False

    def __call__(self, news: groktrace.Announcement | groktrace.EarlyWarning, so_far: groktrace.Trajectory) -> None:
        """Note what is new; λ so far is at hand too, where one wants more than that."""
        now = so_far.points[-1].step
        if isinstance(news, groktrace.EarlyWarning):
            self.falls = True
        elif news.kind != "withdrawn" and news.transition.label == "memorisation":
            self.memorised = self.memorised or now
        elif news.kind != "withdrawn" and news.transition.label == "generalisation":
            self.generalised = self.generalised or now


def train(seed: int, decay: float, options: argparse.Namespace, act: bool, out: Path) -> dict[str, object]:
    """Train one network; what was done, and its validation accuracy at each snapshot."""
    torch.manual_seed(seed)
    data, val = modular_pairs(options.p, options.fraction, random_labels=False)
    model = QuadraticNetwork(2 * options.p, options.width, options.p)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=decay)
    judgement, raised, steps, accuracy = Judgement(), None, [], []
    if act:  # the one line
        recorder = groktrace.watch(
            *(model, optimizer),
            **{"train": data, "loss": centred_loss, "out": out, "every": options.every, "if_exists": "replace"},
            on_transition=judgement,
        )
    for step in range(1, options.steps + 1):
        loss = centred_loss(model(data[0]), data[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % options.every:
            continue
        steps.append(step)
        accuracy.append(validation(model, data, val))
        if act:
            # These networks train faster than λ is measured: wait, so that the result is the same on any machine. A
            # training whose snapshots lie minutes apart leaves this out, and hears what is new at the next update.
            recorder.catch_up()
            memorised = judgement.memorised
            if memorised and not judgement.falls and raised is None and step >= PATIENCE * memorised:
                raised, optimizer.param_groups[0]["weight_decay"] = step, STRONG
            if judgement.generalised and step >= PATIENCE * judgement.generalised:
                break
    if act:
        recorder.close()
    told = {"memorised": judgement.memorised, "raised": raised, "generalised": judgement.generalised}
    return {"seed": seed, **told, "steps": steps, "accuracy": accuracy}


@torch.no_grad()
def validation(model: torch.nn.Module, data: tuple[torch.Tensor, ...], val: tuple[torch.Tensor, ...]) -> float:
    """Accuracy on unseen pairs, for the figure alone."""
    outputs = model(val[0]) - (model(data[0]) - data[1]).mean(0)  # the loss leaves a constant per class open
    return float((outputs.argmax(1) == val[1].argmax(1)).float().mean())


def reached(found: dict[str, object], level: float = 0.95) -> int | None:
    """The step at which validation accuracy first reaches a level."""
    return next((s for s, a in zip(found["steps"], found["accuracy"], strict=True) if a >= level), None)


def main() -> None:
    """Train the networks in three ways; a table, a figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/intervention"), help="where the results go")
    parser.add_argument("--small", action="store_true", help="one network mod 11, 255 steps, in seconds")
    options = parser.parse_args()
    sizes = {"p": 11, "width": 64, "fraction": 0.8, "steps": 255, "every": 15, "seeds": 1}
    full = {"p": 17, "width": 96, "fraction": 0.7, "steps": 3000, "every": 50, "seeds": 10}
    vars(options).update(sizes if options.small else full)
    options.out.mkdir(parents=True, exist_ok=True)

    rows, kept = [], []
    for seed in range(options.seeds):
        path = options.out / f"seed-{seed}.pt"
        if not path.exists():
            ways = (("weak", WEAK, False), ("strong", STRONG, False), ("acted", WEAK, True))
            found = {name: train(seed, decay, options, act, options.out / f"run-{seed}") for name, decay, act in ways}
            torch.save(found, path)
        found = torch.load(path)
        kept.append(found)
        acted = found["acted"]
        rows.append(
            {
                **{key: acted[key] for key in ("seed", "memorised", "raised", "generalised")},
                "stopped": acted["steps"][-1],
                "accuracy": round(acted["accuracy"][-1], 3),
                "weak accuracy": round(found["weak"]["accuracy"][-1], 3),
                **{f"{name} reaches 0.95": reached(found[name]) for name in ("acted", "weak", "strong")},
                "saved": options.steps - acted["steps"][-1],
            }
        )
        print(rows[-1])
    with open(options.out / "intervention.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)

    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for found in kept:
        first = found is kept[0]
        weak, acted = found["weak"], found["acted"]
        axes.plot(weak["steps"], weak["accuracy"], "--", c="0.6", lw=1, label="weak decay" if first else None)
        axes.plot(acted["steps"], acted["accuracy"], c="k", lw=1, label="acted on λ" if first else None)
        ends = {acted["steps"][-1]: ("s", "stopped")} | ({acted["raised"]: ("^", "raised")} if acted["raised"] else {})
        for step, (marker, name) in ends.items():
            at = acted["accuracy"][acted["steps"].index(step)]
            axes.plot(step, at, marker, c="k", mfc="w", label=name if first else None)
    axes.set(xlabel="step", ylabel="validation accuracy", ylim=(0, 1.03))
    axes.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 0.93))
    figure.savefig(options.out / "intervention.png", dpi=130)


if __name__ == "__main__":
    main()
