"""Reproduce the experiments of arXiv 2603.01192, one command per result.

    python -m tools.paper absolute --out runs/paper

Each command writes a CSV and a figure (PNG), and prints what came out. Rows that are in the CSV are not measured again,
and recorded runs are taken as they are, so that an interrupted command goes on; `--fresh` measures again.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import click
import torch

from tools.paper.absolute import run_absolute
from tools.paper.endpoints import run_endpoints
from tools.paper.memorisation import run_memorisation
from tools.paper.scaling import run_scaling
from tools.paper.sensitivity import run_sensitivity
from tools.paper.severity import run_severity
from tools.paper.shared import Result
from tools.paper.trajectory import run_trajectory

RESULTS: dict[str, Callable[[Path, bool], Result]] = {
    "scaling": run_scaling,
    "absolute": run_absolute,
    "endpoints": run_endpoints,
    "trajectory": run_trajectory,
    "sensitivity": run_sensitivity,
    "severity": run_severity,
    "memorisation": run_memorisation,
}


@click.group(help=__doc__.splitlines()[0])
def main() -> None:
    """One command per result, and `all`."""


def _command(name: str, parts: Sequence[str], text: str) -> None:
    @main.command(name, help=text)
    @click.option("--out", type=click.Path(path_type=Path), default=Path("runs/paper"), show_default=True)
    @click.option("--fresh", is_flag=True, help="Measure everything again.")
    @click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="PyTorch's threads.")
    def command(out: Path, fresh: bool, threads: int) -> None:
        torch.set_num_threads(threads)
        out.mkdir(parents=True, exist_ok=True)
        for part in parts:
            click.echo(f"## {part}\n")
            for line in RESULTS[part](out, fresh):
                click.echo(f"- {line}")
            click.echo("")


for _name, _run in RESULTS.items():
    _command(_name, [_name], _run.__doc__)
_command("all", list(RESULTS), "All seven.")


if __name__ == "__main__":
    main()
