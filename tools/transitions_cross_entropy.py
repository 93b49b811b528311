"""Cross-entropy networks, grokking and not: which measure of curvature, from training data alone, tells them apart.

Near a minimum λ̂ is the soft rank ½Σ h/(h + τ), so measures are computed from exact spectra, without sampling error:
with J the Jacobian of the centred logits on the training set [n·p, D] and M a metric on the logits, h are the
eigenvalues of JᵀMJ/n.
"""

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from bench_common import Row, markdown, say
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn import functional

SNAPSHOTS = (0, 30, 60, 100, 150, 220, 320, 450, 650, 900, 1300, 1800, 2500)
STEPS = SNAPSHOTS[-1]
GENERALISED, CHANCE = 0.9, 0.5
KAPPAS = (10.0, 100.0, 1000.0)


@dataclass(frozen=True)
class Case:
    """A network to train.

    Attributes:
        kind: "mlp" or "transformer".
        control: "" for one that should grok, else "random labels", "no weight decay" or "few pairs".
        seed: of data and initial weights.
    """

    kind: str
    control: str
    seed: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.kind}-{self.control.replace(' ', '-') or 'groks'}-{self.seed}"


class EmbeddingMLP(nn.Module):
    """Embeddings of both numbers, one layer of ReLU, logits."""

    def __init__(self, p: int, embedding: int, hidden: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(p, embedding)
        self.hidden = nn.Linear(2 * embedding, hidden)
        self.out = nn.Linear(hidden, p, bias=False)

    def forward(self, pairs: Tensor) -> Tensor:
        """Logits [n, p] of pairs [n, 2]."""
        return self.out(functional.relu(self.hidden(self.embed(pairs).flatten(1))))


class SmallTransformer(nn.Module):
    """One block of attention and ReLU without normalisation, read at the last of the tokens a, b and =."""

    def __init__(self, p: int, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.p = heads, p
        self.embed = nn.Embedding(p + 1, width)
        self.place = nn.Parameter(torch.randn(3, width) / width**0.5)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.out = nn.Linear(width, p, bias=False)

    def forward(self, pairs: Tensor) -> Tensor:
        """Logits [n, p] of pairs [n, 2]."""
        equals = torch.full_like(pairs[:, :1], self.p)
        x = self.embed(torch.cat([pairs, equals], 1)) + self.place
        n, length, width = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        share = (q[:, :, -1:] @ k.transpose(-1, -2) / (width / self.heads) ** 0.5).softmax(-1)
        last = x[:, -1] + self.project((share @ v).permute(0, 2, 1, 3).reshape(n, width))
        return self.out(last + self.down(functional.relu(self.up(last))))


def cases() -> list[Case]:
    """Of each kind, ten that should grok and ten controls."""
    controls = ("random labels", "no weight decay", "few pairs")
    chosen = []
    for i in range(10):
        for kind in ("mlp", "transformer"):
            chosen += [Case(kind, "", i), Case(kind, controls[i % 3], 100 + i)]
    return chosen


def measure(case: Case) -> list[dict[str, float]]:
    """Train and measure: losses, accuracies and every soft rank at each snapshot."""
    torch.manual_seed(case.seed)
    p = 13 if case.kind == "mlp" else 11
    pairs = torch.cartesian_prod(torch.arange(p), torch.arange(p))
    sums = pairs.sum(1) % p
    if case.control == "random labels":
        sums = torch.randint(0, p, (p * p,))
    order = torch.randperm(p * p)
    n = int({"few pairs": 0.3, "no weight decay": 0.5}.get(case.control, 0.75) * p * p)
    train, val = order[:n], order[n:]
    model = EmbeddingMLP(p, 16, 48) if case.kind == "mlp" else SmallTransformer(p, 24, 2, 48)
    decay = 0.0 if case.control == "no weight decay" else 1.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=decay, betas=(0.9, 0.98))
    records = []
    for step in range(STEPS + 1):
        if step in SNAPSHOTS:
            with torch.no_grad():
                known, unseen = model(pairs[train]), model(pairs[val])
                record = {"step": step, "train_loss": functional.cross_entropy(known, sums[train]).item()}
                record |= {"train_accuracy": (known.argmax(1) == sums[train]).float().mean().item()}
                record |= {"val_accuracy": (unseen.argmax(1) == sums[val]).float().mean().item()}
            records.append(record | soft_ranks(model, pairs[train], sums[train]))
        loss = functional.cross_entropy(model(pairs[train]), sums[train])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # What needs one cutoff for the whole run: those of the median snapshot once the training set is fitted.
    fitted = [each for each in records if each["train_accuracy"] >= 0.99] or records[-1:]
    tau = float(np.median([each["h_max"] for each in fitted])) / 100
    for each in records:
        spectrum = np.array(each.pop("spectrum"))
        each["fixed nβ and γ"] = 0.5 * float(np.sum(spectrum / (spectrum + tau)))
        norm, first = each["norm"] ** 2, fitted[0]
        scaled = tau * each["train_loss"] / fitted[0]["train_loss"]
        each["nβ over loss"] = 0.5 * float(np.sum(spectrum / (spectrum + scaled)))
        local = tau * first["norm"] ** 2 / norm
        each["γ over norm²"] = 0.5 * float(np.sum(spectrum / (spectrum + local)))
    return records


def soft_ranks(model: nn.Module, inputs: Tensor, targets: Tensor) -> dict[str, float]:
    """Measures of one snapshot that need no other, and the spectrum of its loss."""
    weights = {name: tensor.detach().double() for name, tensor in model.named_parameters()}

    def logits(values: dict[str, Tensor], pair: Tensor) -> Tensor:
        return functional_call(model, values, (pair[None],))[0]

    with torch.no_grad():
        jacobian = vmap(jacrev(logits), (None, 0))(weights, inputs)
        J = torch.cat([each.flatten(2) for each in jacobian.values()], 2)
        J -= J.mean(1, keepdim=True)
        z = torch.func.functional_call(model, weights, (inputs,))
        z = z - z.mean(1, keepdim=True)
        n, p, size = J.shape
        norm = float(torch.cat([each.flatten() for each in weights.values()]).norm())
        found: dict[str, float] = {"norm": norm, "margin": float(z.norm() / n**0.5)}

        def spectrum(square_root: Callable[[Tensor], Tensor]) -> np.ndarray:
            rooted = torch.einsum("nab,nbd->nad", square_root(z), J).reshape(n * p, size)
            gram = rooted @ rooted.T if n * p <= size else rooted.T @ rooted
            return torch.linalg.eigvalsh(gram / n).clamp_min(0).numpy()[::-1]

        eye = torch.eye(p, dtype=z.dtype).expand(n, p, p)

        def fisher_root(scale: float) -> Callable[[Tensor], Tensor]:
            def root(z: Tensor) -> Tensor:
                q = (scale * z).softmax(1)
                return q.sqrt()[:, :, None] * (eye - q[:, None, :])

            return root

        loss = spectrum(fisher_root(1.0))
        found["h_max"], found["spectrum"] = float(loss[0]), loss.tolist()
        temper = 3.0 / found["margin"]
        kinds = {
            "κ": loss,
            "logits at fixed norm, κ": spectrum(fisher_root(temper)),
            "squared error of logits, κ": spectrum(lambda z: eye),
        }
        for name, values in kinds.items():
            for kappa in KAPPAS:
                found[f"{name} = {kappa:g}"] = 0.5 * float(np.sum(values / (values + values[0] / kappa)))
            share = values / values.sum()
            found[f"{name.split(',')[0]}: participation"] = float(1 / np.sum(share**2))
    return found


def fall(records: Sequence[dict[str, float]], name: str) -> float:
    """How far a measure falls after the training set is fitted, from its peak then, relative to that."""
    fitted = [each[name] for each in records if each["train_accuracy"] >= 0.99]
    if len(fitted) < 2:
        return 0.0
    peak = int(np.argmax(fitted))
    return 1 - min(fitted[peak:]) / fitted[peak]


def run_cross_entropy(folder: Path, limit: int) -> None:
    """Train and measure those that are not yet there, then compare the measures.

    Args:
        folder: of the results; the measures of a network are kept there.
        limit: how many to train at most now.
    """
    kept = folder / "cross_entropy"
    kept.mkdir(parents=True, exist_ok=True)
    results: list[tuple[Case, list[dict[str, float]]]] = []
    for case in cases():
        path = kept / f"{case.name}.json"
        if not path.exists():
            if limit <= 0:
                continue
            limit -= 1
            say(case.name)
            path.write_text(json.dumps(measure(case)))
        results.append((case, json.loads(path.read_text())))
    rows = [summary(case, records) for case, records in results]
    with open(folder / "cross_entropy.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"\n### Cross-entropy networks\n\n{markdown(compare(rows))}\n")


def summary(case: Case, records: Sequence[dict[str, float]]) -> Row:
    """One line about a network: its outcome, and the fall of each measure."""
    accuracy = [each["val_accuracy"] for each in records]
    outcome = "groks" if accuracy[-1] >= GENERALISED else "control" if max(accuracy) < CHANCE else "between"
    row = {name: str(value) for name, value in asdict(case).items()}
    row |= {"outcome": outcome, "val_accuracy": f"{accuracy[-1]:.2f}"}
    plain = ("step", "train_loss", "train_accuracy", "val_accuracy", "h_max", "norm", "margin")
    return row | {name: f"{fall(records, name):.4f}" for name in records[0] if name not in plain}


def compare(rows: Sequence[Row]) -> list[Row]:
    """Hits and false alarms of each measure, for the two kinds of network.

    A threshold on the fall is chosen on the networks with even seeds, as the one with the fewest errors there, and
    judged on those with odd seeds.
    """
    plain = ("kind", "control", "seed", "outcome", "val_accuracy")
    table = []
    for name in [name for name in rows[0] if name not in plain]:
        line = {"measure": name}
        for kind in ("mlp", "transformer"):
            known = [row for row in rows if row["kind"] == kind and row["outcome"] != "between"]
            groks = [(float(row[name]), row) for row in known if row["outcome"] == "groks"]
            controls = [(float(row[name]), row) for row in known if row["outcome"] == "control"]
            line[f"{kind}: fall, groks"] = spread([value for value, _ in groks])
            line[f"{kind}: controls"] = spread([value for value, _ in controls])
        even = [row for row in rows if int(row["seed"]) % 2 == 0 and row["outcome"] != "between"]
        odd = [row for row in rows if int(row["seed"]) % 2 == 1 and row["outcome"] != "between"]
        limits = sorted({float(row[name]) for row in even})
        limit = min(
            limits, default=0.0, key=lambda t: sum((float(r[name]) >= t) != (r["outcome"] == "groks") for r in even)
        )
        line["threshold"] = f"{limit:.2f}"
        for outcome, word in (("groks", "hits"), ("control", "false alarms")):
            judged = [float(row[name]) >= limit for row in odd if row["outcome"] == outcome]
            line[word] = f"{sum(judged)} of {len(judged)}"
        table.append(line)
    return table


def spread(values: Sequence[float]) -> str:
    """Median and range in percent."""
    if not values:
        return "–"
    return f"{100 * np.median(values):.0f} ({100 * min(values):.0f}–{100 * max(values):.0f})"
