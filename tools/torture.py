"""groktrace under fire: kills, full disks, broken input; each part prints what it tried and what failed.

python tools/torture.py kill signals disk analyze network
"""

import click
from torture_durability import analyze, disk, kill, network, signals


@click.group(chain=True)
def main() -> None:
    """Try to lose or to falsify something; ends with 1 where that succeeds."""


for part in (kill, signals, disk, analyze, network):
    main.add_command(part)

if __name__ == "__main__":
    main()
