"""How early a fall of λ can be announced while a network trains, and whether anything else tells as much."""

import itertools
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from groktrace.analysis.detection import PiecewiseDetector
from groktrace.analysis.detection.settings import DEFAULTS
from groktrace.analysis.detection.warning import ERRORS, RATE, WINDOW
from groktrace.analysis.trajectory import Point, Trajectory
from groktrace.run.files import write_json
from tools.common.measurements import Row, markdown, save_rows, say
from tools.common.networks import load_example
from tools.detection import cross_entropy_networks, quadratic_networks
from tools.detection.live import gradient_noise, measure_live
from tools.detection.quadratic_networks import CHANCE, GENERALISED, Training, crossing
from tools.detection.sequential import Cusum, Signal, Slope, Test, tests

# Of quadratic networks: a snapshot every ten steps at first, then one each time the training has grown by 4 %.
STEPS, EVERY, GROWTH = 2500, 10, 1.04
# Of the cross-entropy networks, which take longer to train and to sample.
FIRST, SNAPSHOTS = 100, 32
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
# How many of each kind: those that should grok and controls, of each seed. Rules are set on the quadratic networks of
# the first, and judged on all others.
QUADRATIC, PERCEPTRONS, TRANSFORMERS = (24, 21), (3, 3), (1, 1)


def schedule() -> list[int]:
    """Steps of the snapshots of a quadratic network."""
    steps = [0]
    while steps[-1] < STEPS:
        steps.append(min(STEPS, steps[-1] + max(EVERY, round((GROWTH - 1) * steps[-1]))))
    return steps


def networks(seed: int) -> list[Training]:
    """Those of `networks` and `cross-entropy`, fewer of each.

    Args:
        seed: added to those of all networks.
    """
    quadratic = quadratic_networks.networks(seed)
    groks, controls = quadratic[: QUADRATIC[0]], quadratic[50 : 50 + QUADRATIC[1]]
    both = itertools.chain.from_iterable(itertools.zip_longest(groks, controls))
    chosen: list[Training] = [network for network in both if network is not None]
    others = cross_entropy_networks.networks(seed)
    for kind, counts in (("mlp", PERCEPTRONS), ("transformer", TRANSFORMERS)):
        for control, count in zip((False, True), counts, strict=True):
            same = [one for one in others if one.kind == kind and (one.seed - seed >= 2000) == control]
            chosen += same[:count]
    return chosen


def follow_training(network: Training) -> dict[str, Any]:
    """Train a network with the hook line; what was measured at its snapshots, λ as `follow` does."""
    folder = Path(tempfile.mkdtemp()) / "run"
    try:
        if isinstance(network, quadratic_networks.Network):
            loss = load_example().centred_loss
            model, train = quadratic_networks.record(network, folder, STEPS, schedule())
        else:
            loss = torch.nn.functional.cross_entropy
            model, train = cross_entropy_networks.record(network, folder, FIRST, SNAPSHOTS)
        return {**measure_live(folder), "noise": gradient_noise(folder, model, loss, train)}
    finally:
        shutil.rmtree(folder.parent)


@dataclass(frozen=True, eq=False)
class Followed:
    """What was measured while a network trained.

    Attributes:
        network: that trained.
        content: see `measure_live`; with "announced", see `announced`.
    """

    network: Training
    content: dict[str, Any]

    def column(self, name: str) -> np.ndarray:
        """Values at all snapshots, [T]; NaN where they are not known."""
        return as_array(self.content[name])

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
            used &= ~(curvature < DEFAULTS.curvature_fall * np.fmax.accumulate(curvature))
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


def announced(content: dict[str, Any]) -> dict[str, float | None]:
    """When the default detector, asked at each snapshot, first finds a fall, and when it first labels one.

    Args:
        content: see `measure_live`.
    """
    detector, found = PiecewiseDetector(draws=16), dict[str, float | None](fall=None, generalisation=None)
    for trajectory in seen(content):
        falls = [change for change in detector.detect(trajectory) if change.kind == "simplification"]
        if falls and found["fall"] is None:
            found["fall"] = float(trajectory.points[-1].step)
        if any(change.label == "generalisation" for change in falls):
            found["generalisation"] = float(trajectory.points[-1].step)
            break
    return found


def seen(content: dict[str, Any]) -> Iterator[Trajectory]:
    """The trajectory after each snapshot, as `follow` sees it, without validation data."""
    segments = content["segments"]
    for segment, after in zip(segments, [*segments[1:], None], strict=True):
        centred = segment["curve"] == "llc_centred"
        columns = [content["step"], *(segment[name] for name in ("llc", "error", "doubtful"))]
        columns += [content[name] for name in ("loss", "curvature")]
        points = [
            Point(
                step,
                llc=value,
                stderr=error,
                llc_centred=value if centred else None,
                stderr_centred=error if centred else None,
                reliable=not doubtful,
                reasons=("doubtful",) if doubtful else (),
                train_loss=loss,
                diagnostics={"top_curvature": curvature},
            )
            for step, value, error, doubtful, loss, curvature in zip(*columns, strict=False)  # a scale may end earlier
        ]
        for count in range(content["step"].index(segment["begun"]) + 1, len(points) + 1):
            if after is None or points[count - 1].step < after["begun"]:
                yield Trajectory(
                    tuple(points[:count]),
                    nbeta=None if segment["follows"] else segment["nbeta"],
                    localization=segment["localization"],
                    resolution=1.0,
                    weight_decay=content["weight_decay"],
                )


def run_warning(folder: Path, limit: int) -> None:
    """Train and follow those that are not yet there, then judge them all.

    Args:
        folder: of the results; what was measured of a network is kept there.
        limit: how many to train at most now.
    """
    kept = folder / "warning"
    kept.mkdir(parents=True, exist_ok=True)
    halves: dict[int, list[Followed]] = {0: [], 1000: []}
    for pair in zip(*(networks(seed) for seed in halves), strict=True):
        for network, half in zip(pair, halves.values(), strict=True):
            path = kept / f"{network.name}.json"
            if not path.exists():
                if limit <= 0:
                    continue
                limit -= 1
                say(network.name)
                write_json(path, follow_training(network))
            content = json.loads(path.read_text())
            if "announced" not in content:
                content["announced"] = announced(content)
                write_json(path, content)
            half.append(Followed(network, content))
    followed = [run for half in halves.values() for run in half]
    tuning = [run for run in halves[0] if run.kind == "quadratic"]
    judged = [run for run in followed if run not in tuning]
    rules = [tune(tuning, name) for name in WATCHED]
    steps = {"warning": [Rule("llc", 1.0, Slope(WINDOW, ERRORS), RATE).announces(run) for run in judged]}
    steps |= {rule.name: [rule.announces(run) for run in judged] for rule in rules}
    for name in ("fall", "generalisation"):
        steps[name] = [run.content["announced"][name] for run in judged]
    rows = [row(run, {name: found[i] for name, found in steps.items()}) for i, run in enumerate(judged)]
    save_rows(folder / "warning.csv", rows)
    for rule in rules:
        print(f"- {rule.name}: {'a fall' if rule.sign > 0 else 'a rise'}, {rule.test}, above {rule.threshold:.3g}")
    for kind in ("quadratic", "mlp", "transformer"):
        for late in (False, True):
            among = [run for run in judged if run.kind == kind and (not late or run.outcome != "groks" or run.late)]
            if any(run.outcome == "groks" for run in among):
                title = f"{kind}, where generalisation is late" if late else kind
                table = [summary(name, among, judged, found) for name, found in steps.items()]
                print(f"\n### Early warning: {title}\n\n{markdown(table)}\n")


def row(run: Followed, steps: dict[str, float | None]) -> Row:
    """One line about a training."""
    line = {field.name: str(getattr(run.network, field.name)) for field in fields(Training)}
    line |= {"kind": run.kind, "outcome": run.outcome, "late": str(run.outcome == "groks" and run.late)}
    line["low_at"] = "" if run.begun is None else f"{run.column('step')[run.begun]:.0f}"
    line["half_at"] = "" if run.half_at is None else f"{run.half_at:.0f}"
    return line | {name: "" if step is None else f"{step:.0f}" for name, step in steps.items()}


def summary(name: str, among: Sequence[Followed], judged: Sequence[Followed], steps: Sequence[float | None]) -> Row:
    """Leads and false announcements of one rule.

    Args:
        name: of the rule.
        among: the runs to count.
        judged: all runs.
        steps: at which it announces in these.
    """
    pairs = [(run, step) for run, step in zip(judged, steps, strict=True) if run in among]
    groks = [(run, step) for run, step in pairs if run.outcome == "groks"]
    controls = [(run, step) for run, step in pairs if run.outcome == "control"]
    told = [(run, step) for run, step in groks if step is not None]
    before = sum(step < run.half_at for run, step in told)
    relative = np.percentile([lead(run, step) for run, step in groks], [50, 25, 75])
    ahead = np.percentile([run.half_at - step for run, step in told] or [np.nan], [50, 25, 75])
    return {
        "announced by": NAMES[name],
        "announced": f"{len(told)} of {len(groks)}",
        "before": f"{before}",
        "steps before": "{:.0f} ({:.0f} to {:.0f})".format(*ahead),
        "of the training so far": "{:.2f} ({:.2f} to {:.2f})".format(*relative),
        "false": f"{sum(step is not None for _, step in controls)} of {len(controls)}",
    }
