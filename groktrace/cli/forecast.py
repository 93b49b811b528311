"""`groktrace forecast`: what an analysis would take."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from groktrace.cli.options import COMPUTING, DATA, JSON, NBETA, PRESET, RUN, SAMPLING, Command, as_keywords, options

# What `analyze` takes to load PyTorch and in the end to write and draw its results, over what loading takes (measured).
_START_AND_RESULTS = 2.3


@click.command("forecast", cls=Command)
@RUN
@JSON
@options(*DATA, PRESET, *COMPUTING, NBETA, *SAMPLING)
def command(run: Path | str, as_json: bool, **given: Any) -> None:
    """Say what `analyze` would take for RUN: snapshots, steps, memory, time; after a few seconds of trying."""
    started = time.perf_counter()
    from groktrace.analysis.forecast import forecast
    from groktrace.reporting.console import forecast_text
    from groktrace.reporting.progress import ProgressBar
    from groktrace.run.store import open_run

    fixed = _START_AND_RESULTS * (time.perf_counter() - started)
    with as_keywords(given) as keywords:
        opened = open_run(run)
        with ProgressBar(1, "trying a few snapshots") as progress:
            found = forecast(opened, **keywords)
            found = replace(found, seconds=found.seconds + fixed)
            progress.advance()
    click.echo(json.dumps(found.to_dict()) if as_json else forecast_text(found))
