"""A two-layer attention-only language model: its stages, the induction bump, and λ of each head.

Olsson et al. 2022 (arXiv 2209.11895) see such models suddenly get better at predicting late tokens of a context, as
*induction heads* form: a head of the second layer looks for earlier occurrences of the present token and copies what
came after them, helped by a head of the first that looks at the token before. Hoogland et al. 2024 (arXiv 2402.02364)
find stages in λ along the way. Wang et al. 2024 (arXiv 2410.02984) let only one head's weights move (the refined LLC):
heads that do something simple, as induction heads do, end with a lower λ than those that memorise phrases.

As published: no perceptrons, LayerNorm before attention. Smaller: Python's own standard library for the Pile, 1024
tokens for 5000, width 64 for 256, four heads a layer for eight, contexts of 128 tokens for 1024. So that induction
heads form within 2000 updates: of ten contexts the one in which most pairs of tokens come again is
trained on; and heads know places by a learned bias for each distance (as T5's), which soon finds the token before.

λ of heads compares only at one nβ and γ, as published: those of the whole network at its last snapshot, in place of
each head's own. And it is measured to 5 %, not 2 %, as heads differ by more, on as many samples and in such batches as
the analysis of the whole network chooses, and that of a head would.

    python examples/attention_only.py --out runs/attention_only
"""

import argparse
import collections
import csv
import re
import sysconfig
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import groktrace

VOCABULARY, HEADS = 1024, 4  # in each of two layers
BATCH, RATE, WARM_UP, AMONG = 16, 1e-2, 50, 10  # updates of warm-up; contexts of which one is taken
SAMPLING = {"samples": 512, "batch_size": 32}  # of heads, as found for the whole network
BIAS = 10.0  # what the biases are times, so that Adam moves them faster than other weights


class Size(NamedTuple):
    """Of the network and its contexts; updates, snapshots; modules of the library, all if None; contexts for λ."""

    width: int = 64
    length: int = 128
    steps: int = 2000
    snapshots: int = 12
    modules: int | None = None
    kept: int = 512


class Attention(nn.Module):
    """Causal attention with a learned bias for each distance and head."""

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.bias = nn.Parameter(torch.zeros(HEADS, length))

    def pattern(self, stream: Tensor) -> Tensor:
        """How much each head looks where, [n, heads, to, from]."""
        read, place = self.norm(stream), torch.arange(stream.shape[1])
        query, key = (layer(read).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.query, self.key))
        distance = place[:, None] - place
        score = query @ key.mT / query.shape[-1] ** 0.5 + BIAS * self.bias[:, distance.clamp(min=0)]
        return score.masked_fill(distance < 0, -torch.inf).softmax(-1)

    def forward(self, stream: Tensor) -> Tensor:
        """Stream [n, tokens, width] to the same."""
        value = self.value(self.norm(stream)).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        return stream + self.out((self.pattern(stream) @ value).transpose(1, 2).flatten(2))


class LanguageModel(nn.Module):
    """Logits of the next token."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, size.width)
        self.layers = nn.Sequential(*(Attention(size.width, size.length) for _ in range(2)))
        self.norm, self.unembed = nn.LayerNorm(size.width), nn.Linear(size.width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [n, tokens, vocabulary] for tokens [n, tokens]."""
        return self.unembed(self.norm(self.layers(self.embed(tokens))))

    def patterns(self, tokens: Tensor) -> list[Tensor]:
        """Of each layer, how much each head looks where, [n, heads, to, from]."""
        first, second = self.layers
        stream = self.embed(tokens)
        return [first.pattern(stream), second.pattern(first(stream))]


def batch_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Cross-entropy of each next token, for tokens [n, length + 1]."""
    return cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def library(modules: int | None) -> list[Tensor]:
    """Tokens of modules of the standard library: common words and signs, all else in characters."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    paths = [*sorted(folder.glob("*.py")), *sorted(folder.glob("[a-z]*/*.py"))]
    other = {"encodings", "idlelib", "lib2to3", "site-packages", "test"}  # tables, tests, and what others wrote
    paths = [path for path in paths if path.parent.name not in other][:modules]
    texts = [re.sub(r"[^\n -~]", "~", path.read_text(errors="ignore")) for path in paths]
    split = [re.findall(r"[A-Za-z]+|\n *| +|.", text) for text in texts]
    counts = collections.Counter(piece for text in split for piece in text if len(piece) > 1)
    known = ["\n", *map(chr, range(32, 127)), *(piece for piece, _ in counts.most_common())]
    number = {piece: i for i, piece in enumerate(known[:VOCABULARY])}
    tokens = ([number[t] for piece in text for t in ([piece] if piece in number else piece)] for text in split)
    return [torch.tensor(numbers, dtype=torch.long) for numbers in tokens]


class Contexts:
    """Random contexts [count, length + 1], each from one module."""

    def __init__(self, modules: list[Tensor], length: int, seed: int) -> None:
        self.tokens, self.length = torch.cat(modules), length
        module = torch.repeat_interleave(torch.tensor([len(tokens) for tokens in modules]))
        self.starts = (module[:-length] == module[length:]).nonzero()
        self.seed = torch.Generator().manual_seed(seed)

    def __call__(self, count: int, among: int = 1) -> Tensor:
        """Contexts, each that of so many in which most pairs of tokens come again."""
        starts = self.starts[torch.randint(len(self.starts), (count * among,), generator=self.seed)]
        found = self.tokens[starts + torch.arange(self.length + 1)]
        pairs = (found[:, :-1] * VOCABULARY + found[:, 1:]).sort(1).values
        again = (pairs.diff() == 0).sum(1).view(count, among).argmax(1)
        return found[again + among * torch.arange(count)]


def data(size: Size) -> tuple[Contexts, Contexts]:
    """Contexts to train on; and from each tenth module, for what is measured beside."""
    modules = library(size.modules)
    trained_on = [module for i, module in enumerate(modules) if i % 10 != 9]
    return Contexts(trained_on, size.length, 0), Contexts(modules[9::10], size.length, 1)


def train(out: Path, size: Size) -> None:
    """Train; the one groktrace line is marked."""
    torch.manual_seed(0)
    (contexts, held_back), model = data(size), LanguageModel(size)
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / WARM_UP, total_iters=WARM_UP)
    kept_at = sorted({round(size.steps ** (1 - 0.04 * i)) for i in range(size.snapshots)})
    some = {"train": contexts(size.kept, AMONG), "val": held_back(size.kept // 4), "n": BATCH * size.steps}
    # The one line; λ is that of some of the contexts:
    groktrace.watch(model, optimizer, **some, batch_loss=batch_loss, out=out, schedule=kept_at)

    for _ in range(size.steps):
        optimizer.zero_grad()
        batch_loss(model, contexts(BATCH, AMONG)).backward()
        optimizer.step()
        warm_up.step()


@torch.no_grad()
def behaviour(out: Path, size: Size) -> list[dict[str, float]]:
    """What is known of such models at each snapshot.

    In-context learning is the loss late in the context less that early in it (Olsson et al.); the scores of heads are
    how much they look at the token before, and, in random tokens that come twice, at what came after the first time.
    """
    contexts, model, length, rows = data(size)[1](size.kept), LanguageModel(size), size.length, []
    once = torch.randint(VOCABULARY, (64, length // 2), generator=torch.Generator().manual_seed(2))
    twice = torch.cat([once, once], 1)
    for snapshot in groktrace.open_run(out).snapshots:
        snapshot.load_into(model)
        loss = cross_entropy(model(contexts[:, :-1]).mT, contexts[:, 1:], reduction="none").mean(0)
        late, early = loss[3 * length // 4 :], loss[length // 16 : length // 8]
        row = {"step": snapshot.step, "loss": loss.mean().item(), "in_context": (late.mean() - early.mean()).item()}
        for layer, pattern in enumerate(model.patterns(twice)):
            before = pattern.diagonal(-1, 2, 3).mean((0, 2))
            after = pattern.diagonal(1 - length // 2, 2, 3).mean((0, 2))
            row |= {f"previous_{layer}.{head}": score for head, score in enumerate(before.tolist())}
            row |= {f"induction_{layer}.{head}": score for head, score in enumerate(after.tolist())}
        rows.append(row)
    return rows


def parts_of(head: str, width: int) -> list[str]:
    """The weights of a head, "layer.head": rows of query, key and value, columns of what brings them together."""
    layer, number = head.split(".")
    rows = f"{int(number) * width // HEADS}:{(int(number) + 1) * width // HEADS}"
    names = [f"layers.{layer}.{name}.weight[{rows}]" for name in ("query", "key", "value")]
    return [*names, f"layers.{layer}.out.weight[:, {rows}]", f"layers.{layer}.bias[{number}]"]


def draw(whole: groktrace.Trajectory, heads: dict[str, groktrace.Trajectory], rows: list[dict], path: Path) -> None:
    """λ of the whole network with its transitions, λ of each head, and what the network and its heads do."""
    figure, panels = plt.subplots(2, 2, figsize=(11, 7.5), sharex=True, layout="constrained")
    (network, refined), (loss, scores) = panels
    table = {name: [row[name] for row in rows[1:]] for name in rows[0]}  # on a log axis without step 0
    steps = table["step"]
    network.errorbar(steps, table["llc_whole"], [1.96 * error for error in table["stderr_whole"]], fmt="ko-", ms=4)
    for transition in groktrace.find_transitions(whole):
        for axes in panels.flat:
            axes.axvspan(max(transition.onset, steps[0]), transition.end, color="0.5", alpha=0.15, lw=0)
            axes.axvline(transition.step, color="0.4", lw=1)
        network.annotate(f"{transition.name}, {transition.step}", (transition.step, 1), (0, 3),
                         xycoords=("data", "axes fraction"), textcoords="offset points", fontsize=8)  # fmt: skip
    for head, mark in zip(heads, "osv^DP*X", strict=False):
        layer, number = map(int, head.split("."))
        style = {"marker": mark, "ls": "-" if layer else "--", "color": f"C{number}", "ms": 5 if layer else 3.5}
        errors = [1.96 * error for error in table[f"stderr_{head}"]]
        refined.errorbar(steps, table[f"llc_{head}"], errors, label=f"head {head}", **style)
        kind = "induction" if layer else "previous"
        scores.plot(steps, table[f"{kind}_{head}"], label=f"{head}, {kind}", **style)
    loss.plot(steps, whole.column("train_loss")[1:], "k-", label="training loss")
    loss.plot(steps, table["loss"], "k:", label="loss on other modules")
    learning = loss.twinx()
    learning.plot(steps, table["in_context"], "C3s--", ms=4, label="in-context learning (right)")
    above = {"loc": "lower center", "bbox_to_anchor": (0.5, 1), "ncols": 4, "fontsize": 8, "frameon": False}
    handles = zip(*(axes.get_legend_handles_labels() for axes in (loss, learning)), strict=True)
    loss.legend(*[one + other for one, other in handles], **above)
    refined.legend(**above)
    scores.legend(**above)
    network.set(xscale="log", ylabel=r"learning coefficient $\lambda_c$, 95 % band")
    refined.set(ylabel=r"refined $\lambda_c$ of each head, 95 % band")
    loss.set(xlabel="training step", ylabel="loss, nats a token")
    learning.set_ylabel("loss late in the context less loss early")
    scores.set(xlabel="training step", ylabel="attention to the token looked for")
    figure.savefig(path, dpi=85)


def finished(out: Path) -> bool:
    """Whether a recording is there that came to its end."""
    try:
        return groktrace.open_run(out).closed
    except groktrace.GroktraceError:
        return False


def main() -> None:
    """Train, analyse the whole network and each head, compare with what the heads do."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/attention_only", type=Path, help="where run and results go")
    parser.add_argument("--small", action="store_true", help="a tiny form, for a try of some seconds")
    options = parser.parse_args()

    size = Size(8, 16, 10, 2, 20, 16) if options.small else Size()
    settings = groktrace.SamplingSettings(**{"chains": 2, "draws": 4, "burn_in": 4} if options.small else {})
    out = options.out / "run"
    if not finished(out):
        train(out, size)
    whole, rows = groktrace.analyze(out, settings=settings), behaviour(out, size)
    last = whole.points[-1].diagnostics["nbeta"]
    heads = {}
    names = [f"{layer}.{number}" for layer in range(2) for number in range(HEADS)]
    for head in names[::3] if options.small else names:
        same = {"nbeta": last, "localization": whole.localization, "rtol": 0.05, **({} if options.small else SAMPLING)}
        heads[head] = groktrace.analyze(out, settings=settings, parameters=parts_of(head, size.width), **same)
    for name, trajectory in {"whole": whole, **heads}.items():
        curve = trajectory.curve
        for row, point, value, error in zip(rows, trajectory, curve.value, curve.error, strict=True):
            row |= {f"llc_{name}": value, f"stderr_{name}": error, f"reasons_{name}": "; ".join(point.reasons)}
    with (options.out / "attention_only.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    draw(whole, heads, rows, options.out / "attention_only.png")
    stages = [f"{transition.name} at {transition.step}" for transition in groktrace.find_transitions(whole)]
    print(f"stages: {', '.join(stages)}")


if __name__ == "__main__":
    main()
