"""Run generated training scripts, and hold what groktrace says of each against what the script knows of itself.

    python -m tools.torture scripts --trials 300
    python -m tools.torture scripts --only 137

A script is a network, a loss, data, a loop and a way to read the recording. It keeps for itself what it had after each
update: weights, losses, accuracies, how many numbers train, and λ where that is known exactly. It is run without the
hook and with it, and has to train the same.
"""

import contextlib
import itertools
import os
import re
import sys
import tempfile
import time
import traceback
import types
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch

import groktrace
from groktrace.recording.recorder import open_recorders
from tools.torture.strange_scripts.checks import differences, equal
from tools.torture.strange_scripts.generate import AXES, Script, generate
from tools.torture.strange_scripts.truth import Truth
from tools.torture.tally import Tally, seed_option, trials_option

MODULE = "strange_script"
# In this order: a number is wrong, and no word names the matter; an exception that is no GroktraceError, or a training
# that differs; a refusal of what is plainly supported, or that does not name the matter; a warning, but all is right; a
# number is left unknown; a warning or a refusal names the matter.
OUTCOMES = (
    "SILENT WRONG",
    "crashed",
    "refused needlessly",
    "warned needlessly",
    "not read",
    "warned",
    "refused",
    "right",
)
FAILURES = OUTCOMES[:3]


@dataclass
class Result:
    """What came of a script.

    Attributes:
        script: the script.
        crash: an exception that is no GroktraceError, or another training than without the hook.
        refusal: a GroktraceError.
        wrong: what differs from the truth.
        unknown: what is known in truth, and not told.
        said: groktrace's warnings.
        seconds: that it took.
    """

    script: Script
    crash: str | None = None
    refusal: str | None = None
    wrong: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def outcome(self) -> str:
        """One of OUTCOMES; what was said in words that name the matter is forgiven."""
        pattern = self.script.matters
        said = [*self.said, *([self.refusal] if self.refusal else [])]
        named = pattern is not None and any(re.search(pattern, line, re.IGNORECASE) for line in said)
        if self.crash:
            return "crashed"
        if self.wrong and not named:
            return "SILENT WRONG"
        if self.refusal:
            return "refused" if named else "refused needlessly"
        if self.said:
            return "warned" if named else "warned needlessly"
        return "not read" if self.unknown else "right"

    def __str__(self) -> str:
        script = self.script
        lines = [f"{script.number} {self.outcome}: {script.title}"]
        parts = {"crash": [self.crash], "refusal": [self.refusal], "wrong": self.wrong, "unknown": self.unknown}
        parts["said"] = self.said
        lines += [f"    {name}: {line[:300]}" for name, found in parts.items() for line in found if line]
        return "\n".join([*lines, f"    {script.command}"])


class Unwatched:
    """Stands for a recorder where nothing is recorded."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None

    def __enter__(self) -> "Unwatched":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def attempt(script: Script) -> Result:
    """Run a script in a folder of its own, and judge it."""
    result, began, before = Result(script), time.perf_counter(), os.getcwd()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        os.chdir(folder)
        try:
            _attempt(script, result)
        finally:
            os.chdir(before)
            sys.modules.pop(MODULE, None)
            if "compiled" in script.tags:
                torch._dynamo.reset()
        result.said += [str(warning.message) for warning in caught if str(warning.message).startswith("groktrace")]
    result.seconds = time.perf_counter() - began
    return result


def _attempt(script: Script, result: Result) -> None:
    with mock.patch.object(groktrace, "watch", return_value=Unwatched()):
        alone: Truth = vars(_run(script.training))["truth"]  # what fails here is the script's own fault
    module = types.ModuleType(MODULE)
    try:
        _run(script.training, module)
        _run(script.reading, module, "reading.py")
        for recorder in list(open_recorders):
            recorder.close()
    except groktrace.GroktraceError as refusal:
        result.refusal = f"{type(refusal).__name__}: {refusal}"
    except Exception as failure:
        where = traceback.extract_tb(failure.__traceback__)[-1]
        first = (str(failure).splitlines() or [""])[0]
        result.crash = f"{type(failure).__name__} at {Path(where.filename).name}:{where.lineno}: {first}"
    with contextlib.suppress(Exception):
        for recorder in list(open_recorders):
            recorder.close()
    truth: Truth | None = vars(module).get("truth")
    if truth is None:
        return
    if truth.updates < alone.updates:
        if truth.watched or result.crash:  # a refusal comes from within watch(), before the training goes on
            result.crash = f"the training was broken off: {result.refusal or result.crash}"
    elif not _same_training(alone, truth):
        result.crash = "the training differs from the one without the hook"
    if not result.crash:
        for line in differences(script, module):
            (result.unknown if line.startswith("unknown") else result.wrong).append(line)


def _run(source: str, module: types.ModuleType | None = None, name: str = "training.py") -> types.ModuleType:
    module = types.ModuleType(MODULE) if module is None else module
    sys.modules[MODULE] = module
    path = Path(name).absolute()
    path.write_text(source)  # where what traces functions looks for their source
    exec(compile(source, str(path), "exec"), vars(module))
    return module


def _same_training(one: Truth, other: Truth) -> bool:
    pairs = zip(itertools.chain(*one.states.values()), itertools.chain(*other.states.values()), strict=True)
    return all(equal(a.weights[name], b.weights[name]) for a, b in pairs for name in a.weights)


def table(results: list[Result]) -> str:
    """Outcomes by what was strange about the scripts."""
    kinds = [*(f"strange {axis}" for axis in AXES), "plain", "several strange"]
    counts = {kind: Counter[str]() for kind in kinds}
    for result in results:
        strange = result.script.strange
        kind = "several strange" if len(strange) > 1 else f"strange {strange[0]}" if strange else "plain"
        counts[kind][result.outcome] += 1
    lines = [f"| scripts | {' | '.join(OUTCOMES)} |", "|---" * (len(OUTCOMES) + 1) + "|"]
    for kind, found in counts.items():
        if found:
            lines.append(f"| {kind} | {' | '.join(str(found[outcome]) for outcome in OUTCOMES)} |")
    return "\n".join(lines)


@click.command()
@trials_option
@seed_option
@click.option("--only", type=int, multiple=True, help="The numbers of the scripts to run; they are shown whole.")
@click.option("--keep", type=click.Path(path_type=Path), help="A folder for the scripts that fail.")
def scripts(trials: int | None, seed: int, only: tuple[int, ...], keep: Path | None) -> None:
    """Generated training scripts whose every number is known: which of them come out wrong without a word."""
    torch.set_num_threads(1)
    tally, results = Tally("training scripts"), []
    for script in itertools.islice(generate(seed), max(only) + 1 if only else trials or 300):
        if only and script.number not in only:
            continue
        if only:
            click.echo(f"{script.training}\n{script.reading}")
        result = attempt(script)
        results.append(result)
        tally.counts[result.outcome] += 1
        failed = result.outcome in FAILURES
        tally.expect(not failed, str(result))
        if not failed and (only or result.outcome in ("not read", "warned needlessly")):
            click.echo(str(result), err=True)
        if failed and keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            (keep / f"{script.number}.py").write_text(f"{script.training}\n{script.reading}")
    click.echo(table(results))
    click.echo(
        f"{tally.counts['SILENT WRONG']} silent wrong, {sum(result.seconds for result in results):.0f} s", err=True
    )
    tally.finish()
