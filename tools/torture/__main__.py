"""groktrace under fire: kills, full disks, broken input; each part prints what it tried and what failed.

python -m tools.torture kill signals disk analyze determinism network input checkpoints scripts
"""

import click

from tools.torture.analysis import analyze, determinism, network
from tools.torture.durability import disk, kill, signals
from tools.torture.hostile_checkpoints import checkpoints
from tools.torture.hostile_files import broken_input
from tools.torture.training_scripts import scripts


@click.group(chain=True)
def main() -> None:
    """Try to lose or to falsify something; ends with 1 where that succeeds."""


for part in (kill, signals, disk, analyze, determinism, network, broken_input, checkpoints, scripts):
    main.add_command(part)

if __name__ == "__main__":
    main()
