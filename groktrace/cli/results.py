"""What several commands do with a result: write TensorBoard's files, print, and tell by the exit code."""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from groktrace.analysis.results.trajectory import Trajectory
    from groktrace.reporting.base import Reporter
    from groktrace.reporting.series import Events, Series
    from groktrace.run.store import Run

INCOMPLETE = 3


def more_reporters(wandb: str | None) -> "list[Reporter]":
    """What else shows the result; made before the work, so that what is missing is told then.

    Args:
        wandb: a project of Weights & Biases, or None.

    Raises:
        GroktraceError: its client is not installed.
    """
    from groktrace.reporting.wandb import WandbReporter

    return [] if wandb is None else [WandbReporter(wandb)]


def write_logs(trajectory: "Trajectory", run: "Run", logdir: Path | None) -> "tuple[Series, Events]":
    """Write TensorBoard's files; returns the series and events that they show.

    Args:
        trajectory: of the run.
        run: opened.
        logdir: where to; None for the run's own folder.
    """
    from groktrace.analysis.results.journal import exclusive
    from groktrace.reporting.series import Events, Series
    from groktrace.reporting.tensorboard import SUFFIX, TensorBoardReporter
    from groktrace.run import layout

    series, events = Series.of(trajectory), Events.of(trajectory)
    logs = logdir or logs_folder(run, trajectory)
    with exclusive(run.root / layout.ANALYSIS_FOLDER, wait=True):
        TensorBoardReporter(logs.name).report(series, events, logs.parent)
    if logdir is None:
        run.publish_folder(logs, SUFFIX)
    return series, events


def logs_folder(run: "Run", trajectory: "Trajectory") -> Path:
    """Where TensorBoard's files go: on other data they lie beside the results, as those of a run of that name.

    Args:
        run: analysed.
        trajectory: that was finished last.
    """
    from groktrace.analysis.results.store import files_place
    from groktrace.run import layout

    name = (
        ""
        if trajectory.data is None
        else "-" + re.sub(r"[^\w.-]", "-", str(trajectory.data).removesuffix(".safetensors"))[:80]
    )
    return files_place(run, trajectory) / f"{layout.TENSORBOARD_FOLDER}{name}"


def finish(
    trajectory: "Trajectory",
    run: "Run",
    logdir: Path | None,
    as_json: bool,
    as_csv: bool = False,
    reporters: "Sequence[Reporter]" = (),
    kept: bool = False,
) -> None:
    """Write TensorBoard's files and print the result of an analysis; may exit with code 3, see `exit_incomplete`.

    Args:
        trajectory: of the run.
        run: opened.
        logdir: where TensorBoard's files go; None for the run's own folder.
        as_json: whether to print one JSON object.
        as_csv: whether to write a table beside the trajectory's JSON.
        reporters: what else shows the result, after it is printed.
        kept: whether draws were kept, so that it is said where.
    """
    from groktrace.analysis.results.store import files_place, latest_file
    from groktrace.reporting import console
    from groktrace.reporting.tensorboard import COLOURS
    from groktrace.run import layout

    series, events = write_logs(trajectory, run, logdir)
    if as_csv:
        path = latest_file(run).with_suffix(".csv")
        trajectory.to_csv(path)
        run.publish(path)
        click.echo(f"table: {_shown(path, run)}", err=True)
    if kept:
        click.echo(f"draws: {_shown(latest_file(run).parent / layout.DRAWS_FOLDER, run)}", err=True)
    if as_json:
        click.echo(json.dumps(console.as_json(series, events), allow_nan=False))
    else:
        click.echo(console.transitions_table(events))
        click.echo(f"\nSee it:  tensorboard --logdir {logdir or run.name}\nthen:    http://localhost:6006/{COLOURS}")
    for reporter in reporters:
        reporter.report(series, events, files_place(run, trajectory))
    exit_incomplete(trajectory, run)


def _shown(path: Path, run: "Run") -> str:
    return str(path) if run.remote is None else f"{run.name}/{path.relative_to(run.root)}"


def exit_incomplete(trajectory: "Trajectory", run: "Run") -> None:
    """Name unreadable and untrustworthy snapshots on stderr, what the recording came to doubt, and a later run.

    Leaves with exit code 3, if there is anything of these.

    Args:
        trajectory: of the run.
        run: opened.
    """
    from groktrace.recording.folder import latest_beside
    from groktrace.reporting.remarks import single_chain, untrusted

    if run.remote is None and (later := latest_beside(run.root.absolute())) is not None:
        click.echo(f"later: the same script was run again, and that run is in '{later}'", err=True)
    if lost := single_chain(trajectory):
        click.echo(lost, err=True)
    for line in run.doubts:
        click.echo(f"doubtful: {line}", err=True)
    for line in trajectory.unreadable:
        click.echo(f"unreadable: {line}", err=True)
    lines = untrusted(trajectory)
    for line in lines:
        click.echo(f"unreliable: {line}", err=True)
    if lines or run.doubts or trajectory.unreadable:
        sys.exit(INCOMPLETE)
