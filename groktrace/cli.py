"""The command line: parse, call, print."""

import contextlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from groktrace.errors import GroktraceError
from groktrace.reporting.notices import own_warnings_as_lines
from groktrace.theory_commands import theory

INCOMPLETE = 3
INTERRUPTED = 130


class _Group(click.Group):
    """Turns groktrace's own errors into one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with own_warnings_as_lines():
                return super().invoke(ctx)
        except (GroktraceError, OSError) as failure:
            if isinstance(failure, BrokenPipeError):
                raise
            raise click.ClickException(str(failure)) from failure
        except KeyboardInterrupt:
            click.echo("\nInterrupted; what is finished is kept: the same command goes on from there.", err=True)
            ctx.exit(INTERRUPTED)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="groktrace")
def main() -> None:
    """See grokking as a phase transition: local learning coefficients along a training run."""


main.add_command(theory)

# A path or a URL; a Path would take one of the two slashes of the latter.
_run = click.argument("run", callback=lambda ctx, parameter, value: value if "://" in value else Path(value))
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else on stdout.")


def _number_or(*words: str) -> Callable[[click.Context, click.Parameter, str | None], float | str | None]:
    """A callback for an option that takes a number, or one of these words."""

    def parse(ctx: click.Context, parameter: click.Parameter, value: str | None) -> float | str | None:
        if value is None or value in words:
            return value
        try:
            return float(value)
        except ValueError:
            raise click.BadParameter(f"expected a number or {' or '.join(map(repr, words))}, got '{value}'") from None

    return parse


@main.command()
@_run
@click.option(
    "--preset",
    type=click.Choice(["auto", "paper"]),
    default="auto",
    show_default=True,
    help="auto: settings found from the run; paper: the published SGLD settings.",
)
@click.option(
    "--nbeta",
    callback=_number_or("wbic", "curvature"),
    metavar="F|wbic|curvature",
    help="Inverse temperature times sample count; curvature: at each snapshot from --resolution.",
)
@click.option("--localization", type=float, help="Strength of the pull towards the snapshot.")
@click.option(
    "--locality", type=float, help="Wanted distance of the chains, relative to the weights' norm [0.22 or less]."
)
@click.option(
    "--resolution", type=float, help="Curvatures down to h_max/resolution count [10; 100 where nβ follows h_max]."
)
@click.option("--method", type=click.Choice(["baoab", "leimkuhler_matthews", "sgld"]), help="Sampler [baoab].")
@click.option("--chains", type=int, help="Independent chains a snapshot [2; up to 16 for small networks].")
@click.option("--draws", type=int, help="Draws a chain; grows until --rtol is met where not given.")
@click.option("--burn-in", type=int, help="Discarded steps a chain.")
@click.option("--step-size", type=float, help="Step size; found from the curvature where not given.")
@click.option("--samples", type=int, help="Samples the posterior is of [all; of large sets as many as needed].")
@click.option("--batch-size", type=int, help="Samples a gradient [all; of large sets as many as their noise allows].")
@click.option("--parameters", multiple=True, metavar="PATTERN", help="Let only these weights move (refined LLC).")
@click.option("--rtol", type=float, help="Wanted relative standard error [0.02].")
@click.option("--seed", type=int, help="Seed of the sampling [0].")
@click.option("--time", "minutes", type=float, default=10.0, show_default=True, help="Minutes after which it stops.")
@click.option(
    "--reference",
    callback=_number_or("jacobian"),
    metavar="F|jacobian",
    help="Draw a line at this λ, or at half the rank of the Jacobian of the outputs at the last snapshot.",
)
@click.option("--curvature", is_flag=True, help="Also measure trace and top eigenvalue of the loss's Hessian.")
@click.option("--device", help="Where to compute, such as cpu or cuda:0; a GPU where there is one.")
@click.option("--adaptive", is_flag=True, help="Sample at most a tenth of the snapshots: those that date transitions.")
@click.option("--follow", is_flag=True, help="Analyse snapshots as they appear, until the recording is closed.")
@click.option("--timeout", type=float, help="With --follow: seconds without a new snapshot until it ends [none].")
@click.option("--jobs", type=click.IntRange(1), default=1, help="Processes on this machine, which share its cores [1].")
@click.option("--dask", metavar="ADDRESS", help="Let the workers of this Dask scheduler do the work.")
@click.option("--threads", type=click.IntRange(1), help="Cores to use, all jobs together [all].")
@click.option(
    "--task",
    metavar="M:F",
    help="package.module:factory that returns groktrace.Task.from_model(...); "
    "imports your code. Only needed where the recording could not keep model and loss.",
)
@click.option("--logdir", type=click.Path(path_type=Path), help="Where TensorBoard's files go [RUN/tensorboard].")
@click.option(
    "--temperature-curve",
    "curve_step",
    type=int,
    metavar="STEP",
    help="Instead of the trajectory, print λ̂ of the snapshot of STEP at several temperatures, and its plateau.",
)
@click.option("--dry-run", is_flag=True, help="Instead, say what it would take, after a few seconds of trying.")
@_json
def analyze(
    run: Path | str,
    preset: str,
    minutes: float,
    task: str | None,
    device: str | None,
    logdir: Path | None,
    reference: float | str | None,
    curvature: bool,
    adaptive: bool,
    follow: bool,
    timeout: float | None,
    jobs: int,
    dask: str | None,
    threads: int | None,
    curve_step: int | None,
    dry_run: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Replay the snapshots of RUN into an LLC trajectory, find its phase transitions, write TensorBoard files."""
    import torch

    from groktrace.analysis import replay
    from groktrace.analysis.follow import follow as follow_run
    from groktrace.analysis.follow import wait_for_run
    from groktrace.analysis.forecast import forecast
    from groktrace.analysis.temperature import temperature_curve_at
    from groktrace.analysis.workers import dask_executor
    from groktrace.reporting import console
    from groktrace.reporting.live import show_events
    from groktrace.reporting.progress import Progress
    from groktrace.run.factory import load_factory
    from groktrace.run.store import open_run
    from groktrace.sampling.settings import PAPER, SamplingSettings

    if threads is not None:
        torch.set_num_threads(threads)
    if not minutes > 0:
        raise click.UsageError(f"--time: expected a positive number of minutes, got {minutes:g}")
    if timeout is not None and not follow:
        raise click.UsageError("--timeout goes with --follow")
    if adaptive and follow:
        raise click.UsageError("--adaptive takes a finished recording, --follow one that goes on")
    chosen = {name: value for name, value in given.items() if value not in (None, ())}
    settings = replace(PAPER if preset == "paper" else SamplingSettings(), **chosen)
    if follow and isinstance(run, Path):
        wait_for_run(run, timeout)
    opened = open_run(run)
    if task is not None:
        sys.path.insert(0, os.getcwd())
    loaded = None if task is None else load_factory(task)
    if curve_step is not None:
        if reference is not None or curvature or follow or adaptive:
            raise click.UsageError(
                "--temperature-curve takes neither --reference nor --curvature nor --follow nor --adaptive"
            )
        with Progress(1, f"step {curve_step} at several nβ") as progress:
            curve = temperature_curve_at(opened, curve_step, task=loaded, device=device, **chosen)
            progress.advance()
        _print_curve(curve, as_json)
        return
    if dry_run:
        if reference is not None or curvature or follow or adaptive or jobs > 1 or dask is not None:
            raise click.UsageError(
                "--dry-run takes neither --reference nor --curvature nor --follow nor --adaptive nor --jobs nor --dask"
            )
        with Progress(1, "trying a few snapshots") as progress:
            said = forecast(opened, task=loaded, device=device, **settings.to_dict())
            progress.advance()
        click.echo(json.dumps(said.to_dict()) if as_json else console.forecast_text(said))
        return

    def write_logs(trajectory: Any) -> tuple[Any, Any]:
        return _write_logs(trajectory, opened, logdir)

    with contextlib.ExitStack() as held:
        executor = None if dask is None else held.enter_context(dask_executor(dask))
        where = {"task": loaded, "task_name": task, "device": device, "jobs": jobs, "executor": executor}
        if follow:
            os.nice(19)  # the training goes first
            analysis = held.enter_context(replay.open_analysis(opened, settings, **where))
            events = follow_run(analysis, timeout, reference, curvature)
            trajectory = show_events(events, write_logs, as_json, sys.stdout)
        else:
            report = held.enter_context(_Phases(console.opening_line(opened))).report
            more = {"progress": report, "reference": reference, "curvature": curvature, "adaptive": adaptive}
            more |= {"time_limit": 60 * minutes, "partial": write_logs}
            trajectory = replay.analyze(opened, **where, **more, **settings.to_dict())
    series, events = write_logs(trajectory)
    if as_json:
        click.echo(json.dumps(console.as_json(series, events), allow_nan=False))
    else:
        click.echo(console.transitions_table(events))
        from groktrace.reporting.tensorboard import COLOURS

        click.echo(f"\nSee it:  tensorboard --logdir {logdir or run}\nthen:    http://localhost:6006/{COLOURS}")
    _exit_incomplete(trajectory, opened.refreshed() if follow else opened)


def _write_logs(trajectory: Any, opened: Any, logdir: Path | None) -> tuple[Any, Any]:
    """Write TensorBoard's files; returns the series and events that they show."""
    from groktrace.analysis.journal import exclusive
    from groktrace.reporting.series import Events, Series
    from groktrace.reporting.tensorboard import SUFFIX, TensorBoardReporter
    from groktrace.run import layout

    series, events = Series.of(trajectory), Events.of(trajectory)
    logs = logdir or opened.root / layout.TENSORBOARD_FOLDER
    with exclusive(opened.root / layout.ANALYSIS_FOLDER, wait=True):
        TensorBoardReporter(logs.name).report(series, events, logs.parent)
    if logdir is None:
        opened.publish_folder(logs, SUFFIX)
    return series, events


@main.command()
@_run
@_json
@click.option("--csv", "as_csv", is_flag=True, help="Print comma-separated values, one snapshot a line.")
def show(run: Path | str, as_json: bool, as_csv: bool) -> None:
    """Print the trajectory and the transitions that were last found for RUN."""
    from groktrace.analysis.replay import latest_trajectory
    from groktrace.reporting import console, csv
    from groktrace.reporting.series import Events, Series
    from groktrace.run.store import open_run

    if as_json and as_csv:
        raise click.UsageError("--json or --csv, not both")
    opened = open_run(run)
    trajectory = latest_trajectory(run)
    series = Series.of(trajectory)
    if as_csv:
        click.echo(csv.as_csv(series), nl=False)
    elif as_json:
        click.echo(json.dumps(console.as_json(series, Events.of(trajectory)), allow_nan=False))
    else:
        console.ConsoleReporter().report(series, Events.of(trajectory), opened.root)
    _exit_incomplete(trajectory, opened)


@main.command()
@_run
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="A .png, .pdf or .svg file.")
def plot(run: Path | str, output: Path) -> None:
    """Draw the trajectory that was last found for RUN."""
    from groktrace.analysis.replay import latest_trajectory

    latest_trajectory(run).plot(output)
    click.echo(f"Figure: {output}")


@main.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Draw their curves too: a .png, .pdf or .svg file."
)
@_json
def compare(runs: tuple[str, ...], output: Path | None, as_json: bool) -> None:
    """Put the results that were last found for several runs side by side: seeds, learning rates, controls."""
    from groktrace.analysis.replay import latest_trajectory
    from groktrace.reporting import comparison, console
    from groktrace.reporting.series import Events, Series

    trajectories = [latest_trajectory(run) for run in runs]
    found = [(run, Series.of(each), Events.of(each)) for run, each in zip(runs, trajectories, strict=True)]
    if output is not None:
        comparison.save_comparison(found, output)
    if as_json:
        objects = {name: console.as_json(*result) for name, *result in found}
        click.echo(json.dumps(objects, allow_nan=False))
    else:
        click.echo(comparison.comparison_table(found))
        if output is not None:
            click.echo(f"\nFigure: {output}")


@main.command()
@_run
def check(run: Path | str) -> None:
    """Read every file of RUN and verify it against its digests."""
    from groktrace.errors import SnapshotError, TaskError
    from groktrace.run.store import open_run

    opened = open_run(run)
    damaged = []
    for snapshot in opened.snapshots:
        try:
            snapshot.load()
        except SnapshotError as failure:
            damaged.append(str(failure))
    whole = len(opened.snapshots) - len(damaged)
    click.echo(f"{run}: {whole} of {len(opened.snapshots)} snapshots whole")
    try:
        task = opened.task
        click.echo(f"model, loss and data: whole ({len(task.train)} of {task.n} training samples kept)")
    except TaskError as failure:
        click.echo(f"model, loss and data: not recorded ({failure})")
    for line in damaged:
        click.echo(line, err=True)
    if damaged:
        sys.exit(INCOMPLETE)


class _Phases:
    """One progress display after another, as an analysis goes from phase to phase.

    Args:
        opening: a line that is shown before the first.
    """

    def __init__(self, opening: str) -> None:
        self._opening = opening
        self._label: str | None = None
        self._done = 0
        self._display: Any = None

    def __enter__(self) -> "_Phases":
        return self

    def __exit__(self, *error: object) -> None:
        if self._display is not None:
            self._display.__exit__(*error)

    def report(self, phase: str, done: int, total: int) -> None:
        """Show that `done` of `total` snapshots have passed `phase`."""
        from groktrace.reporting.progress import Progress

        if phase != self._label:
            self.__exit__(None, None, None)
            if self._label is None:
                click.echo(self._opening, err=True)
            self._label, self._done = phase, 0
            self._display = Progress(total, phase).__enter__()
        self._display.advance(done - self._done)
        self._done = done


def _print_curve(curve: Any, as_json: bool) -> None:
    from groktrace.reporting import console

    click.echo(json.dumps(curve.to_dict(), allow_nan=False) if as_json else console.temperature_table(curve))


def _exit_incomplete(trajectory: Any, opened: Any) -> None:
    """Name unreadable and untrustworthy snapshots on stderr, and what the recording came to doubt of its program.

    Leaves with exit code 3, if there is anything of these.
    """
    from groktrace.reporting.remarks import single_chain, untrusted

    if lost := single_chain(trajectory):
        click.echo(lost, err=True)
    for line in opened.doubts:
        click.echo(f"doubtful: {line}", err=True)
    for line in trajectory.unreadable:
        click.echo(f"unreadable: {line}", err=True)
    lines = untrusted(trajectory)
    for line in lines:
        click.echo(f"unreliable: {line}", err=True)
    if lines or opened.doubts or trajectory.unreadable:
        sys.exit(INCOMPLETE)


if __name__ == "__main__":
    main()
