"""Measure how right groktrace's λ̂ is: known answers, error bars, settings, the reference run, planted
failures, and the learning coefficient itself.

    python -m tools.accuracy all --out runs/accuracy

Each command writes a CSV, prints it as a Markdown table and ends with the bars it is held to and a verdict on each.
Rows that are in the CSV are not measured again; `--fresh` starts over. With devinterp installed (the `bench` extra),
`known` also measures it.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import click
import torch

from tools.accuracy.coverage import run_coverage
from tools.accuracy.deep_linear import run_deep_linear
from tools.accuracy.failures import run_failures
from tools.accuracy.insensitivity import run_insensitivity
from tools.accuracy.known import run_known
from tools.accuracy.ladder import run_ladder
from tools.accuracy.limit import (
    run_chains_constants,
    run_chains_coverage,
    run_limit,
    run_limit_constants,
    run_limit_coverage,
)
from tools.accuracy.reference import run_reference
from tools.common.measurements import Verdict

PARTS: dict[str, Callable[[Path, bool], list[Verdict]]] = {
    "known": run_known,
    "coverage": run_coverage,
    "insensitivity": run_insensitivity,
    "reference": run_reference,
    "failures": run_failures,
    "limit": run_limit,
    "limit-coverage": run_limit_coverage,
    "limit-constants": run_limit_constants,
    "limit-chains-coverage": run_chains_coverage,
    "limit-chains-constants": run_chains_constants,
    "ladder": run_ladder,
    "deep-linear": run_deep_linear,
}


@click.command(help=__doc__.splitlines()[0])
@click.argument("part", type=click.Choice([*PARTS, "all"]))
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/accuracy"), show_default=True)
@click.option("--fresh", is_flag=True, help="Measure everything again.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="PyTorch's threads.")
def main(part: str, out: Path, fresh: bool, threads: int) -> None:
    """Run one part or all."""
    torch.set_num_threads(threads)
    verdicts = []
    for name in PARTS if part == "all" else [part]:
        click.echo(f"## {name}\n")
        verdicts += PARTS[name](out, fresh)
    click.echo("## Bars\n")
    for verdict in verdicts:
        click.echo(f"{'PASS' if verdict.met else 'FAIL'}  {verdict.claim}: {verdict.measured}")
    click.echo("")
    sys.exit(0 if all(verdict.met for verdict in verdicts) else 1)


if __name__ == "__main__":
    main()
