"""`groktrace analyze`: from snapshots to a trajectory and its transitions."""

from pathlib import Path
from typing import Any

import click

from groktrace.cli.options import ANALYSIS, JSON, RUN, Command, ExpertOption, as_keywords, options
from groktrace.cli.results import finish, more_reporters, write_logs


@click.command("analyze", cls=Command)
@RUN
@JSON
@click.option("--time", "minutes", type=float, default=10.0, show_default=True, help="Minutes after which it stops.")
@click.option(
    "--adaptive",
    cls=ExpertOption,
    is_flag=True,
    help="Sample at most a tenth of the snapshots: those that date transitions.",
)
@options(*ANALYSIS)
def command(
    run: Path | str,
    as_json: bool,
    minutes: float,
    adaptive: bool,
    logdir: Path | None,
    wandb: str | None,
    as_csv: bool,
    **given: Any,
) -> None:
    """Replay the snapshots of RUN into an LLC trajectory, find its phase transitions, write TensorBoard files."""
    from groktrace.analysis.replay import analyze
    from groktrace.reporting.console import opening_line
    from groktrace.reporting.progress import Phases
    from groktrace.run.store import open_run

    if not minutes > 0:
        raise click.UsageError(f"--time: expected a positive number of minutes, got {minutes:g}")
    with as_keywords(given) as keywords:
        reporters = more_reporters(wandb)
        opened = open_run(run)
        with Phases(opening_line(opened)) as phases:
            trajectory = analyze(
                opened,
                progress=phases.report,
                adaptive=adaptive,
                time_limit=60 * minutes,
                partial=lambda trajectory: write_logs(trajectory, opened, logdir),
                **keywords,
            )
    finish(trajectory, opened, logdir, as_json, as_csv, reporters, keywords["keep"] is not None)
