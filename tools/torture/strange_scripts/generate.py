"""Training scripts put together from strange networks, losses, data, loops and readings; each is text that runs."""

import random
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from tools.torture.strange_scripts.data import DATA
from tools.torture.strange_scripts.entries import PROBLEMS, Entry
from tools.torture.strange_scripts.loops import LOOPS
from tools.torture.strange_scripts.losses import LOSSES
from tools.torture.strange_scripts.networks import NETWORKS
from tools.torture.strange_scripts.readings import READINGS
from tools.torture.strange_scripts.sequences import SEQUENCE_NETWORKS
from tools.torture.strange_scripts.updates import UPDATE_LOOPS

AXES: dict[str, tuple[Entry, ...]] = {
    "network": (*NETWORKS, *SEQUENCE_NETWORKS),
    "loss": LOSSES,
    "data": DATA,
    "loop": (*LOOPS, *UPDATE_LOOPS),
    "reading": READINGS,
}
# How many of the entries that fit, from the front, are as plain as can be.
_PLAIN = {"network": 1, "loss": 1, "data": 1, "loop": 2, "reading": 1}
_SAMPLES = {"one sample": 1, "many": 9000}
_OPTIMIZERS = ("SGD(parameters, lr=0.03)", "SGD(parameters, lr=0.01, momentum=0.9)", "AdamW(parameters, lr=0.01)")

HEAD = '''\
"""{title}

{remark}
"""

import concurrent.futures
import copy
import json
import os
import random
import shutil
import subprocess
import sys
import types
import warnings

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import data

import groktrace
from tools.torture.strange_scripts.truth import Truth

torch.manual_seed({number})
UPDATES, DRAWS = 10, 1

# What is so unless a part below says otherwise.
head = lambda outputs: outputs  # the predictions among what the network returns
pack = lambda x, y: (x, y)  # samples as a batch of the form that the data have
unpack = lambda batch: (batch[0], batch[1])
real = lambda x, y: (x, y)  # those of the samples that are trained on
scored = lambda predictions, targets: (predictions, targets)  # what counts as a prediction
after = None  # what the script does after each update


def predict(model, batch):
    inputs, targets = unpack(batch)
    return head(model(inputs)), targets


def live(model, batch):
    return objective(*predict(model, batch))
'''

MIDDLE = """
GIVEN = {given}
SETTINGS = {settings}
train, val = form(x, y), form(xv, yv)


def epoch():
    if isinstance(train, data.DataLoader):
        yield from train
    else:
        samples = real(x, y)
        for index in torch.randperm(len(samples[0])).split(12):
            yield pack(*(part[index] for part in samples))


def batches(count):
    made = 0
    while True:
        for batch in epoch():
            if made == count:
                return
            made += 1
            yield batch


def make(parameters):
    return torch.optim.{optimizer}


def backward(batch):
    for parameter in trained:
        parameter.grad = None
    loss = live(model, batch)
    loss.backward()
    return loss


truth = Truth(
    model,
    trained,
    live,
    lambda model, batch: scored(*predict(model, batch)),
    lambda: pack(*real(x, y)),
    lambda: pack(*real(xv, yv)),
    DRAWS,
    quadratic={quadratic},
)
truth.keep()


def watch(model, optimizer, **more):
    truth.begin()
    recorder = groktrace.watch(model, optimizer, train=train, val=val, **GIVEN, out="run", every=4, **more)
    truth.watched = True
    return recorder


def done(*writes):
    truth.update()
    for write in (after, *writes):
        if write is not None:
            write()
            truth.keep()


def log(**numbers):
    recorder.log(**numbers)
    truth.logged[truth.updates + 1] = numbers


model.train()
"""


@dataclass(frozen=True)
class Script:
    """One training script, and what is known of it.

    Attributes:
        number: among the scripts of its seed.
        seed: that they were drawn with.
        problem: what is learned.
        parts: an entry of each axis.
        strange: the axes whose entries are not the plainest.
    """

    number: int
    seed: int
    problem: str
    parts: dict[str, Entry]
    strange: tuple[str, ...]

    @property
    def title(self) -> str:
        """Its parts, in words."""
        return f"{self.problem}: " + " × ".join(part.name for part in self.parts.values())

    @property
    def command(self) -> str:
        """What runs this one alone."""
        seed = f" --seed {self.seed}" if self.seed else ""
        return f"python -m tools.torture scripts{seed} --only {self.number}"

    @property
    def tags(self) -> set[str]:
        """Of all parts."""
        return {tag for part in self.parts.values() for tag in part.tags}

    @property
    def matters(self) -> str | None:
        """The pattern of what may be refused or warned of; None where all is plainly supported."""
        return "|".join(part.matter for part in self.parts.values() if part.matter) or None

    @property
    def tolerance(self) -> float:
        """Relative, of a loss."""
        return max(part.tolerance for part in self.parts.values())

    @property
    def quadratic(self) -> bool:
        """Whether λ is known exactly."""
        return {"linear", "quadratic"} <= self.tags and not self.tags & {"random", "late", "many"}

    @property
    def training(self) -> str:
        """The script up to the end of its training."""
        remark = f"Run it in an empty folder, with the repository on PYTHONPATH; checked by: {self.command}"
        network, loss, form, loop, _ = self.parts.values()
        samples = next((count for tag, count in _SAMPLES.items() if tag in self.tags), 48)
        draw = _part("Problem", self.problem, PROBLEMS[self.problem])
        trained = "" if "\ntrained =" in _code(network) else "trained = list(model.parameters())\n"
        return "\n".join(
            (
                HEAD.format(title=f"Script {self.number}. {self.title}.", remark=remark, number=self.number),
                f"{draw}x, y = draw({samples})\nxv, yv = draw(20)\n",
                _part("Network", network.name, network.code) + trained,
                _part("Loss", loss.name, loss.code),
                _part("Data", form.name, form.code),
                MIDDLE.format(
                    given=f"dict({self._given()})",
                    settings=self.settings,
                    optimizer=_OPTIMIZERS[-1 if "summed" in self.tags else self.number % len(_OPTIMIZERS)],
                    quadratic=self.quadratic,
                ),
                _part("Loop", loop.name, loop.code),
            )
        )

    @property
    def reading(self) -> str:
        """The script's last lines."""
        return _part("Reading", self.parts["reading"].name, self.parts["reading"].code)

    @property
    def settings(self) -> dict[str, float]:
        """Of the sampling: where λ is known directions count by about half; else only the pull towards w* counts."""
        nbeta, localization = (100.0, 200.0) if self.quadratic else (1e-4, 1e3)
        return {"nbeta": nbeta, "localization": localization, "chains": 8, "burn_in": 40, "draws": 100}

    def _given(self) -> str:
        given = self.parts["loss"].given
        if self.parts["data"].given == "batch":
            return "batch_loss=live"
        if self.parts["network"].given == "head" and given.startswith("loss="):
            return "loss=lambda outputs, targets: objective(head(outputs), targets)"
        return given


def _code(entry: Entry) -> str:
    return "\n" + textwrap.dedent(entry.code).strip("\n")


def _part(what: str, name: str, code: str) -> str:
    return f"# {what}: {name}.\n{textwrap.dedent(code).strip()}\n"


def generate(seed: int) -> Iterator[Script]:
    """Scripts without end: first each entry among plain ones, then several strange ones at once.

    Args:
        seed: of what is drawn.
    """
    number = 0
    for axis, entries in AXES.items():
        for entry in entries:
            draw = random.Random(f"{seed} {axis} {entry.name}")
            yield _compose(number, seed, draw, {axis: entry}, plain=1.0)
            number += 1
    while True:
        yield _compose(number, seed, random.Random(f"{seed} {number}"), {}, plain=0.4)
        number += 1


def _compose(number: int, seed: int, draw: random.Random, fixed: dict[str, Entry], plain: float) -> Script:
    """A script of entries that go with each other.

    Args:
        number: of the script.
        seed: that it belongs to.
        draw: what is drawn from.
        fixed: entries that it has to have.
        plain: how probable it is that an axis has a plain entry.
    """
    for attempt in range(10000):
        if attempt == 200:
            plain = 0.5  # this entry goes with nothing plain
        problem = draw.choice([name for name in PROBLEMS if all(name in entry.problems for entry in fixed.values())])
        parts, strange = {}, []
        for axis, entries in AXES.items():
            fitting = [entry for entry in entries if problem in entry.problems]
            common = fitting[: _PLAIN[axis]]
            choice = draw.choice(common if draw.random() < plain else fitting)
            if axis == "loss" and "own loss" in parts["network"].tags:
                choice = next(entry for entry in fitting if "own" in entry.tags)
            parts[axis] = fixed.get(axis, choice)
            if parts[axis] not in common:
                strange.append(axis)
        if _agree(list(parts.values())):
            return Script(number, seed, problem, parts, tuple(strange))
    raise AssertionError(f"nothing goes with {', '.join(entry.name for entry in fixed.values())}")


def _agree(parts: list[Entry]) -> bool:
    known = [{part.name, *part.tags} for part in parts]
    if any(set(part.avoid) & names for part in parts for names in known):
        return False
    if sum(part.matter is not None for part in parts) > 1:
        return False  # words about the one would be taken for words about the other
    tags = set.union(*known)
    return ("own loss" in tags) == ("own" in tags)
