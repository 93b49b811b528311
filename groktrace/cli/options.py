"""What several commands take: their options, each defined once, and what is made of them."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from groktrace.run.task import Task
    from groktrace.sampling.settings import SamplingSettings

Decorator = Callable[[Any], Any]


class ExpertOption(click.Option):
    """An option that most people do not need."""


class Command(click.Command):
    """A command whose help lists what experts need after the rest."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options into the help, in two sections where some are an expert's."""
        basic: list[tuple[str, str]] = []
        expert: list[tuple[str, str]] = []
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and not isinstance(parameter, click.Argument):  # which the usage line shows
                (expert if isinstance(parameter, ExpertOption) else basic).append(record)
        for title, records in (("Basic options" if expert else "Options", basic), ("Expert options", expert)):
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


def options(*decorators: Decorator) -> Decorator:
    """Several options as one decorator.

    Args:
        decorators: in the order of the help.
    """

    def decorate(function: Any) -> Any:
        for option in reversed(decorators):
            function = option(function)
        return function

    return decorate


def number_or(*words: str) -> Callable[[click.Context, click.Parameter, str | None], float | str | None]:
    """A callback for an option that takes a number, or one of these words."""

    def parse(ctx: click.Context, parameter: click.Parameter, value: str | None) -> float | str | None:
        if value is None or value in words:
            return value
        try:
            return float(value)
        except ValueError:
            raise click.BadParameter(f"expected a number or {' or '.join(map(repr, words))}, got '{value}'") from None

    return parse


def _expert(*names: str, **more: Any) -> Decorator:
    return click.option(*names, cls=ExpertOption, **more)


# A path or a URL; a Path would take one of the two slashes of the latter.
RUN = click.argument("run", callback=lambda ctx, parameter, value: value if "://" in value else Path(value))
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else on stdout.")
FIGURE_FILE = click.Path(path_type=Path)

PRESET = click.option(
    "--preset",
    type=click.Choice(["auto", "paper"]),
    default="auto",
    show_default=True,
    help="auto: settings found from the run; paper: the published SGLD settings.",
)
NBETA = _expert(
    "--nbeta",
    callback=number_or("wbic", "curvature"),
    metavar="F|wbic|curvature",
    help="Inverse temperature times sample count; curvature: at each snapshot from --resolution.",
)
# The fields of SamplingSettings, but for nβ, of which a temperature curve takes several.
SAMPLING = (
    click.option("--rtol", type=float, help="Wanted relative standard error [0.02]."),
    click.option("--seed", type=int, help="Seed of the sampling [0]."),
    _expert("--localization", type=float, help="Strength of the pull towards the snapshot."),
    _expert(
        "--locality", type=float, help="Wanted distance of the chains, relative to the weights' norm [0.22 or less]."
    ),
    _expert(
        "--resolution", type=float, help="Curvatures down to h_max/resolution count [10; 100 where nβ follows h_max]."
    ),
    _expert("--method", type=click.Choice(["baoab", "leimkuhler_matthews", "sgld"]), help="Sampler [baoab]."),
    _expert("--chains", type=int, help="Independent chains a snapshot [2; up to 16 for small networks]."),
    _expert("--draws", type=int, help="Draws a chain; grows until --rtol is met where not given."),
    _expert("--burn-in", type=int, help="Discarded steps a chain."),
    _expert("--step-size", type=float, help="Step size; found from the curvature where not given."),
    _expert("--samples", type=int, help="Samples the posterior is of [all; of large sets as many as needed]."),
    _expert("--batch-size", type=int, help="Samples a gradient [all; of large sets as many as their noise allows]."),
    _expert(
        "--parameters",
        multiple=True,
        metavar="PATTERN",
        help="Let only these weights move (refined LLC), or a part of a tensor: 'blocks.0.attn.qkv[0:64]'.",
    ),
)
# Where to compute, and with whose code.
COMPUTING = (
    click.option("--device", help="Where to compute, such as cpu or cuda:0; a GPU where there is one."),
    click.option("--threads", type=click.IntRange(1), help="Cores to use [all]."),
    click.option(
        "--task",
        metavar="M:F",
        help="package.module:factory that returns groktrace.Task.from_model(...); "
        "imports your code. Only needed where the recording could not keep model and loss.",
    ),
)
WORKERS = (
    click.option(
        "--jobs", type=click.IntRange(1), default=1, help="Processes on this machine, which share its cores [1]."
    ),
    _expert("--dask", metavar="ADDRESS", help="Let the workers of this Dask scheduler do the work."),
)
# What is shown beside λ, and where.
BESIDE = (
    click.option("--logdir", type=click.Path(path_type=Path), help="Where TensorBoard's files go [RUN/tensorboard]."),
    click.option("--wandb", metavar="PROJECT", help="Log the result to this project of Weights & Biases too."),
    click.option("--csv", "as_csv", is_flag=True, help="Write trajectory.csv beside trajectory.json too."),
    _expert(
        "--reference",
        callback=number_or("jacobian"),
        metavar="F|jacobian",
        help="Draw a line at this λ, or at half the rank of the Jacobian of the outputs at the last snapshot.",
    ),
    _expert("--hessian", is_flag=True, help="Also measure trace and top eigenvalue of the loss's Hessian."),
    _expert(
        "--keep",
        type=click.Choice(["draws", "losses"]),
        help="Keep the losses of the chains' draws in RUN; losses: also that of each sample at each draw.",
    ),
)


# What to measure on in place of the run's own samples.
DATA = (
    click.option(
        "--data",
        "train",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Measure on these samples instead, which groktrace.save_data wrote (data-refined LLC).",
    ),
    _expert("--n", type=click.IntRange(1), help="How many samples those of --data stand for [as many as it has]."),
)
# What `analyze` and `follow` have in common.
ANALYSIS = (*DATA, PRESET, *COMPUTING, *WORKERS, *BESIDE, NBETA, *SAMPLING)


# Options that are keywords as they are.
_KEYWORDS = ("device", "jobs", "reference", "hessian", "keep", "train", "n")


@contextlib.contextmanager
def as_keywords(given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The keywords of `groktrace.analyze`, or of what else takes a part of them, that options stand for.

    Args:
        given: values of `ANALYSIS`, or of some of them, by name.

    Raises:
        SettingsError: one is outside what it may be, or no Dask scheduler answers.
        TaskError: the task cannot be loaded.
    """
    if given.get("n") is not None and given["train"] is None:
        raise click.UsageError("--n: says how many samples those of --data stand for; give both")
    threads, task_name, dask = (given.pop(name, None) for name in ("threads", "task", "dask"))
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    keywords = {name: given.pop(name) for name in _KEYWORDS if name in given}
    with contextlib.ExitStack() as held:
        keywords["settings"] = _sampling_settings(given.pop("preset", "auto"), given)
        keywords["task"] = load_task(task_name)
        if "jobs" in keywords:
            from groktrace.analysis.running.backends import dask_executor

            executor = None if dask is None else held.enter_context(dask_executor(dask))
            keywords |= {"task_name": task_name, "executor": executor}
        yield keywords


def _sampling_settings(preset: str, given: dict[str, Any]) -> "SamplingSettings":
    """What the options of `SAMPLING` say, and in place of those that say nothing, the preset."""
    from dataclasses import replace

    from groktrace.sampling.settings import PAPER, SamplingSettings

    chosen = {name: value for name, value in given.items() if value not in (None, ())}
    return replace(PAPER if preset == "paper" else SamplingSettings(), **chosen)


def load_task(name: str | None) -> "Task | None":
    """The task that --task names, with the folder that the command runs in among those of modules.

    Raises:
        TaskError: it cannot be loaded.
    """
    if name is None:
        return None
    from groktrace.run.factory import load_factory

    sys.path.insert(0, os.getcwd())
    return load_factory(name)
