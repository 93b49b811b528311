"""How early a fall of λ can be announced while a network trains, and whether anything else tells as much."""

import itertools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from groktrace.analysis.detection.settings import DEFAULTS, WARNING
from groktrace.run.files import write_json
from tools.common.measurements import Row, print_table, save_rows, say
from tools.common.networks import EXAMPLE
from tools.detection import cross_entropy_networks, quadratic_networks
from tools.detection.live import announced, gradient_noise, measure_following, measure_live
from tools.detection.quadratic_networks import CHANCE, GENERALISED, Training, crossing
from tools.detection.sequential import Cusum, Signal, Slope, Test, tests

# Of quadratic networks: a snapshot every ten steps at first, then one each time the training has grown by 4 %.
STEPS, EVERY, GROWTH = 2500, 10, 1.04
# Of the cross-entropy networks, which take longer to train and to sample: the first snapshot, and how many.
SNAPSHOTS = {"mlp": (100, 32), "transformer": (150, 24)}
# False announcements, of the controls that a rule is set on.
FALSE = 0.05
WATCHED = ("llc", "loss", "norm", "trace", "noise")
NAMES = {
    "warning": "λ_c, as `follow` warns",
    "llc": "λ_c, the best test",
    "loss": "training loss",
    "norm": "weight norm",
    "trace": "Hessian trace",
    "noise": "gradient noise",
    "fall": "λ_c, as the detector finds a fall",
    "generalisation": "λ_c, as the detector labels it",
}
# How many of each kind: those that should grok and controls, of each seed. Rules are set on the networks of the first,
# and judged on those of the second.
QUADRATIC, PERCEPTRONS = (24, 21), (4, 4)
# Transformers of each seed: modulus, fraction, learning rate, weight decay, random labels, seed. Those with true labels
# and half of the pairs were found by their validation accuracy alone, as one in three generalises at such settings.
TRANSFORMERS = {
    0: (
        (23, 0.5, 2e-3, 2.5, False, 1001),
        (23, 0.6, 2e-3, 2.5, True, 2000),
        (29, 0.5, 2e-3, 1.5, False, 1003),
        (29, 0.3, 2e-3, 2.5, False, 2001),
        (29, 0.5, 3e-3, 2.5, False, 1005),
    ),
    1000: (
        (29, 0.5, 2e-3, 2.0, False, 2001),
        (23, 0.6, 2e-3, 2.5, True, 3000),
        (23, 0.55, 2e-3, 2.5, False, 2001),
        (29, 0.3, 2e-3, 2.5, False, 3001),
    ),
}


def schedule() -> list[int]:
    """Steps of the snapshots of a quadratic network."""
    steps = [0]
    while steps[-1] < STEPS:
        steps.append(min(STEPS, steps[-1] + max(EVERY, round((GROWTH - 1) * steps[-1]))))
    return steps


def networks(seed: int, cross_entropy: bool) -> list[Training]:
    """Those of `networks`, or of `cross-entropy`, fewer of each: one that should grok, then a control.

    Args:
        seed: added to those of all networks.
        cross_entropy: which of the two.
    """
    if not cross_entropy:
        chosen = quadratic_networks.networks(seed)
        return _in_turn(chosen[: QUADRATIC[0]], chosen[50 : 50 + QUADRATIC[1]])
    # Without weight decay λ keeps falling, and a perceptron takes longer than all others together: left out.
    perceptrons = [one for one in cross_entropy_networks.networks(seed) if one.kind == "mlp" and one.weight_decay]
    groks, controls = ([one for one in perceptrons if (one.seed - seed >= 2000) == kind] for kind in (False, True))
    found = _in_turn(groks[: PERCEPTRONS[0]], controls[: PERCEPTRONS[1]])
    return found + [cross_entropy_networks.Network(*one, "transformer") for one in TRANSFORMERS[seed]]


def _in_turn(one: Sequence[Training], other: Sequence[Training]) -> list[Training]:
    both = itertools.chain.from_iterable(itertools.zip_longest(one, other))
    return [network for network in both if network is not None]


def follow_training(network: Training) -> dict[str, Any]:
    """Train a network with the hook line; what was measured at its snapshots, λ as `follow` does.

    Returns:
        What `measure_live` returns, "noise" and "announced"; of perceptrons, the segments of `measure_following` and
        what is "announced" of them as "following".
    """
    folder = Path(tempfile.mkdtemp()) / "run"
    try:
        if isinstance(network, quadratic_networks.Network):
            loss = EXAMPLE.centred_loss
            model, train = quadratic_networks.record(network, folder, STEPS, schedule())
        else:
            loss = torch.nn.functional.cross_entropy
            model, train = cross_entropy_networks.record(network, folder, *SNAPSHOTS[network.kind])
        content = {**measure_live(folder), "noise": gradient_noise(folder, model, loss, train)}
        if getattr(network, "kind", "") == "mlp":  # of the transformers, nβ soon follows the curvature anyway
            segments = measure_following(folder)
            content["following"] = {"segments": segments, "announced": announced({**content, "segments": segments})}
        return {**content, "announced": announced(content)}
    finally:
        shutil.rmtree(folder.parent)


@dataclass(frozen=True, eq=False)
class Followed:
    """What was measured while a network trained.

    Attributes:
        network: that trained.
        content: see `follow_training`.
    """

    network: Training
    content: dict[str, Any]

    def column(self, name: str) -> np.ndarray:
        """Values at all snapshots, [T]; NaN where they are not known."""
        return as_array(self.content[name])

    @property
    def following(self) -> "Followed":
        """The same training, where nβ followed the curvature from the beginning."""
        return Followed(self.network, {**self.content, **self.content["following"]})

    @property
    def kind(self) -> str:
        """Of the network."""
        return getattr(self.network, "kind", "quadratic")

    @property
    def half_at(self) -> float | None:
        """The step at which validation accuracy passes 0.5."""
        return crossing(self.column("step"), self.column("val_accuracy"), CHANCE)

    @property
    def begun(self) -> int | None:
        """Index of the first snapshot at which the training loss is low; announcements are made from there on."""
        loss = self.column("loss")
        low = np.flatnonzero(loss <= DEFAULTS.low_loss * np.fmax.accumulate(loss))
        return int(low[0]) if len(low) else None

    @property
    def outcome(self) -> str:
        """Whether it grokked: of those that should, whether validation accuracy passed 0.5 after fitting the data."""
        network, accuracy = self.network, self.column("val_accuracy")
        few = 0.3 if self.kind == "transformer" else 0.35
        if network.random_labels or network.weight_decay == 0 or network.fraction <= few:
            return "control" if np.nanmax(accuracy) < CHANCE else "left out"
        fitted = np.flatnonzero(self.column("accuracy") >= 0.98)
        if accuracy[-1] < GENERALISED or not len(fitted):
            return "left out"
        return "groks" if accuracy[fitted[0]] < CHANCE else "left out"

    @property
    def late(self) -> bool:
        """Whether it generalises only once the training is twice as long as it took to fit the data."""
        return self.half_at >= 2 * self.column("step")[self.begun]


def as_array(values: Sequence[float | None]) -> np.ndarray:
    """Numbers, NaN where they are not known."""
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def signals(followed: Followed, name: str, sign: float) -> Iterator[tuple[Signal, np.ndarray]]:
    """What is tested, at each scale that λ was measured at; and at which snapshots that scale was in use.

    Args:
        followed: the training.
        name: "llc" or a column.
        sign: −1 for a rise in place of a fall.
    """
    step, begun = followed.column("step"), followed.begun
    if begun is None:
        return
    x = np.log1p(step / np.diff(step).min())
    if name != "llc":
        y = sign * np.log(np.maximum(followed.column(name), 1e-30))
        yield Signal(x, y, np.zeros(len(y)), begun), np.ones(len(y), dtype=bool)
        return
    segments = followed.content["segments"]
    ends = [segment["begun"] for segment in segments[1:]] + [np.inf]
    for segment, end in zip(segments, ends, strict=True):
        value, error = as_array(segment["llc"]), as_array(segment["error"])
        error = error * np.where(as_array(segment["doubtful"]) > 0, DEFAULTS.doubt_factor, 1.0)
        positive = np.where(value > 0, value, np.nan)
        used = (step >= segment["begun"]) & (step < end)
        if not segment["follows"]:  # as in `last_fall`
            curvature = followed.column("curvature")
            lowest = np.fmin(curvature, np.append(np.nan, curvature[:-1]))
            used &= ~(lowest < DEFAULTS.curvature_fall * np.fmax.accumulate(curvature))
        count = len(value)
        yield Signal(x[:count], sign * np.log(positive), error / positive, begun), used[:count]


@dataclass(frozen=True)
class Rule:
    """When a fall, or a rise, of something is announced.

    Attributes:
        name: of what is watched.
        sign: −1 for a rise.
        test: whose statistic is held against the threshold.
        threshold: that it has to exceed.
    """

    name: str
    sign: float
    test: Test
    threshold: float = np.inf

    def statistics(self, followed: Followed) -> np.ndarray:
        """The statistic at each snapshot as it was when that was the last one, [T]."""
        found = np.full(len(followed.content["step"]), -np.inf)
        for signal, used in signals(followed, self.name, self.sign):
            found[: len(used)][used] = self.test.statistics(signal)[used]
        return np.where(np.isfinite(found), found, -np.inf)

    def announces(self, followed: Followed) -> float | None:
        """The step at which it announces; None if it does not."""
        above = np.flatnonzero(self.statistics(followed) > self.threshold)
        return float(followed.column("step")[above[0]]) if len(above) else None


# Gives the step of an announcement in a training; None where there is none.
Announces = Callable[[Followed], float | None]


def lead(followed: Followed, step: float | None) -> float:
    """Steps from an announcement to validation accuracy 0.5, in units of those until then; −1 if late or never."""
    half = followed.half_at
    return -1.0 if step is None else max(-1.0, (half - step) / half)


def tune(runs: Sequence[Followed], name: str) -> Rule:
    """The rule of the largest mean lead with false announcements in at most 5 % of the controls.

    Args:
        runs: to tune it on.
        name: what is watched.
    """
    groks = [run for run in runs if run.outcome == "groks"]
    controls = [run for run in runs if run.outcome == "control"]
    allowed = int(FALSE * len(controls))
    best, most = Rule(name, 1.0, Cusum(0.0)), -np.inf
    for sign in (1.0, -1.0):
        for test in tests():
            rule = Rule(name, sign, test)
            highest = sorted((rule.statistics(run).max() for run in controls), reverse=True)
            rule = replace(rule, threshold=float(highest[allowed]))
            mean = float(np.mean([lead(run, rule.announces(run)) for run in groks]))
            if mean > most:
                best, most = rule, mean
    return best


def run_warning(folder: Path, limit: int, cross_entropy: bool = False) -> None:
    """Train and follow those that are not yet there, then judge them all.

    Args:
        folder: of the results; what was measured of a network is kept there.
        limit: how many to train at most now.
        cross_entropy: whether perceptrons and transformers under cross-entropy, in place of quadratic networks.
    """
    kept = folder / "warning"
    kept.mkdir(parents=True, exist_ok=True)
    halves: dict[int, list[Followed]] = {0: [], 1000: []}
    for pair in itertools.zip_longest(*(networks(seed, cross_entropy) for seed in halves)):
        for network, half in zip(pair, halves.values(), strict=True):
            if network is None:
                continue
            path = kept / f"{network.name}.json"
            if not path.exists():
                if limit <= 0:
                    continue
                limit -= 1
                say(network.name)
                write_json(path, follow_training(network))
            half.append(Followed(network, json.loads(path.read_text())))
    tuning, judged = halves.values()
    shipped = _shipped(cross_entropy)
    judges = {**shipped, **_tuned(tuning, cross_entropy)}
    suffix = "_cross_entropy" if cross_entropy else ""
    save_rows(folder / f"warning{suffix}.csv", [row(run, judges) for run in (*tuning, *judged)])
    for kind in sorted({run.kind for run in judged}):
        # There are few cross-entropy networks: what is shipped is shown of all, though its rate was set on one half.
        for title, runs, by in ((kind, judged, judges), (f"{kind}, both halves", (*tuning, *judged), shipped)):
            for late in (False, True):
                among = [run for run in runs if run.kind == kind and (not late or run.outcome != "groks" or run.late)]
                if (title == kind or cross_entropy) and any(run.outcome == "groks" for run in among):
                    some = {name: judge for name, judge in by.items() if kind == "mlp" or "following" not in name}
                    table = [summary(name, among, announces) for name, announces in some.items()]
                    more = ", where generalisation is late" if late else ""
                    print_table(f"Early warning: {title}{more}", table)


def _shipped(cross_entropy: bool) -> dict[str, Announces]:
    """What the tool announces at its settings, by name."""
    found: dict[str, Announces] = {"warning": _warns}
    for name in ("fall", "generalisation"):
        found[name] = partial(_content_at, "announced", name)
    if cross_entropy:
        for name, announces in list(found.items()):
            found[f"{name}, following"] = partial(_following, announces)
    return found


def _warns(run: Followed) -> float | None:
    statistics, step = Rule("llc", 1.0, Slope(WARNING.window, WARNING.errors)).statistics(run), run.column("step")
    beyond = np.full(len(step), WARNING.rate)
    for segment in run.content["segments"]:
        beyond[step >= segment["begun"]] = WARNING.rate_following if segment["follows"] else WARNING.rate
    above = np.flatnonzero(statistics > beyond)
    return float(step[above[0]]) if len(above) else None


def _content_at(part: str, name: str, run: Followed) -> float | None:
    return run.content[part][name]


def _following(announces: Announces, run: Followed) -> float | None:
    return announces(run.following) if run.kind == "mlp" else None


def _tuned(tuning: Sequence[Followed], cross_entropy: bool) -> dict[str, Announces]:
    """The best rule for each thing that one can watch, by name; printed."""
    rules = {name: tune(tuning, name) for name in WATCHED}
    found: dict[str, Announces] = {name: rule.announces for name, rule in rules.items()}
    if cross_entropy:
        rules["llc, following"] = tune([run.following for run in tuning if run.kind == "mlp"], "llc")
        found["llc, following"] = partial(_following, rules["llc, following"].announces)
    for name, rule in rules.items():
        print(f"- {name}: {'a fall' if rule.sign > 0 else 'a rise'}, {rule.test}, above {rule.threshold:.3g}")
    return found


def row(run: Followed, judges: Mapping[str, Announces]) -> Row:
    """One line about a training."""
    line = {field.name: str(getattr(run.network, field.name)) for field in fields(Training)}
    line |= {"kind": run.kind, "outcome": run.outcome, "late": str(run.outcome == "groks" and run.late)}
    line["low_at"] = "" if run.begun is None else f"{run.column('step')[run.begun]:.0f}"
    line["half_at"] = "" if run.half_at is None else f"{run.half_at:.0f}"
    steps = {name: announces(run) for name, announces in judges.items()}
    return line | {name: "" if step is None else f"{step:.0f}" for name, step in steps.items()}


def summary(name: str, among: Sequence[Followed], announces: Announces) -> Row:
    """Leads and false announcements of one rule.

    Args:
        name: of the rule.
        among: the runs to count.
        announces: gives the step of its announcement in a run.
    """
    groks = [(run, announces(run)) for run in among if run.outcome == "groks"]
    controls = [announces(run) for run in among if run.outcome == "control"]
    told = [(run, step) for run, step in groks if step is not None]
    before = sum(step < run.half_at for run, step in told)
    relative = np.percentile([lead(run, step) for run, step in groks], [50, 25, 75])
    ahead = np.percentile([run.half_at - step for run, step in told] or [np.nan], [50, 25, 75])
    watched, _, following = name.partition(", ")
    return {
        "announced by": NAMES[watched] + (", `--nbeta curvature`" if following else ""),
        "announced": f"{len(told)} of {len(groks)}",
        "before": f"{before}",
        "steps before": "{:.0f} ({:.0f} to {:.0f})".format(*ahead),
        "of the training so far": "{:.2f} ({:.2f} to {:.2f})".format(*relative),
        "false": f"{sum(step is not None for step in controls)} of {len(controls)}",
    }
