"""`groktrace import`: a run of checkpoints that a training without the hook has left."""

import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from groktrace.cli.options import Command, load_task
from groktrace.cli.results import INCOMPLETE

if TYPE_CHECKING:
    from groktrace.importing.plan import ImportPlan

SHOWN = 12  # rows of the table that is shown before the import


@click.command("import", cls=Command)
@click.argument("checkpoints", nargs=-1, required=True, metavar="CHECKPOINTS...")
@click.option(
    "--task",
    required=True,
    metavar="M:F",
    help="package.module:factory that returns groktrace.Task.from_model(model, train=..., loss=...); imports "
    "your code.",
)
@click.option("--out", required=True, metavar="RUN", help="The run directory that is made, or its URL.")
@click.option(
    "--key", help="Where in a checkpoint the weights are, such as state.model; found where there is one place."
)
@click.option(
    "--step-from",
    metavar="REGEX",
    help="Finds the step in a checkpoint's path, in (...) if there is such a group. By default the step is what the "
    "checkpoints say, or else the number in their names.",
)
@click.option("--dry-run", is_flag=True, help="Only look, and print checkpoints and steps; nothing is written.")
def command(
    checkpoints: tuple[str, ...], task: str, out: str, key: str | None, step_from: str | None, dry_run: bool
) -> None:
    """Make RUN of checkpoints that were saved without the hook.

    CHECKPOINTS are files of torch.save, safetensors, folders of transformers, Lightning or
    torch.distributed.checkpoint, folders of these, and patterns. No code of theirs is run.
    """
    from groktrace.importing.plan import plan_import
    from groktrace.reporting.console import opening_line
    from groktrace.reporting.progress import Phases

    loaded = load_task(task)
    assert loaded is not None
    with Phases() as phases:
        plan = plan_import(checkpoints, loaded, key=key, step_from=step_from, progress=phases.report)
    for remark in plan.remarks:
        click.echo(remark, err=True)
    click.echo("\n".join(_table(plan, whole=dry_run)), err=not dry_run)
    lost: Sequence[str] = ()
    if not dry_run:
        with Phases() as phases:
            imported = plan.write(out, task, phases.report)
        lost, run = imported.left_out, imported.run
        if imported.linked:
            click.echo(f"{imported.linked} snapshots are links to the checkpoints' files, and take no space.", err=True)
        for reason in imported.copied:
            click.echo(f"Safetensors files were copied, not linked: {reason}.", err=True)
        click.echo(opening_line(run))
        click.echo(f"Analyse it:  groktrace analyze {shlex.quote(run.name)}")
    if problems := (*plan.left_out, *lost):
        for line in problems:
            click.echo(f"left out: {line}", err=True)
        sys.exit(INCOMPLETE)


def _table(plan: "ImportPlan", whole: bool) -> list[str]:
    """Checkpoints and steps as lines; of a long table the first and the last, unless all are wanted."""
    from groktrace.reporting.console import aligned

    lines = aligned(plan.rows())
    if whole or len(lines) <= SHOWN + 1:
        return lines
    half = SHOWN // 2
    return [*lines[: half + 1], f"... {len(lines) - 1 - 2 * half} more", *lines[-half:]]
