"""`groktrace temperature`: λ̂ of one snapshot at several temperatures."""

import json
from pathlib import Path
from typing import Any

import click

from groktrace.cli.options import (
    COMPUTING,
    JSON,
    RUN,
    SAMPLING,
    Command,
    load_task,
    options,
    sampling_settings,
    set_threads,
)


@click.command("temperature", cls=Command)
@RUN
@click.argument("step", type=int)
@JSON
@options(*COMPUTING, *SAMPLING)
def command(
    run: Path | str, step: int, as_json: bool, device: str | None, threads: int | None, task: str | None, **given: Any
) -> None:
    """Print λ̂ of the snapshot of STEP in RUN at several nβ, and its plateau, which is an absolute value."""
    from groktrace.analysis.temperature import temperature_curve_at
    from groktrace.reporting.console import temperature_table
    from groktrace.reporting.progress import Progress
    from groktrace.run.store import open_run

    set_threads(threads)
    settings, opened = sampling_settings(given), open_run(run)
    loaded = load_task(task)
    with Progress(1, f"step {step} at several nβ") as progress:
        curve = temperature_curve_at(opened, step, task=loaded, device=device, settings=settings)
        progress.advance()
    click.echo(json.dumps(curve.to_dict(), allow_nan=False) if as_json else temperature_table(curve))
