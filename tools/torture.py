"""groktrace under fire: kills, full disks, broken input; each part prints what it tried and what failed.

python tools/torture.py kill signals disk analyze determinism network input scripts
"""

import click
from torture_analysis import analyze, determinism, network
from torture_durability import disk, kill, signals
from torture_input import broken_input
from torture_scripts import scripts


@click.group(chain=True)
def main() -> None:
    """Try to lose or to falsify something; ends with 1 where that succeeds."""


for part in (kill, signals, disk, analyze, determinism, network, broken_input, scripts):
    main.add_command(part)

if __name__ == "__main__":
    main()
