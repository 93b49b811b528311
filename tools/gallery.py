"""The gallery in full: each example trains, is analysed at default settings, and leaves its figure and tables.

    python -m tools.gallery            # every example; minutes to tens of minutes each
    python -m tools.gallery NAME...    # some of them

An example `examples/NAME.py` keeps its runs under `--out` and goes on there where it stopped; when done it leaves
NAME.png and its CSV files there, which are copied beside the script. Seconds, by the clock and of the processor, are
added up over interruptions in `runs/gallery/NAME/seconds.json`.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from groktrace.run.files import write_json

EXAMPLES = Path("examples")
OUT = Path("runs/gallery")


def gallery() -> list[str]:
    """Names of the examples that leave a figure: those whose script takes `--small`."""
    return [path.stem for path in sorted(EXAMPLES.glob("*.py")) if '"--small"' in path.read_text()]


def perform(name: str) -> dict[str, float]:
    """Run one example in full, or on from where it stopped; seconds so far."""
    out = OUT / name
    out.mkdir(parents=True, exist_ok=True)
    record = out / "seconds.json"
    before = json.loads(record.read_text()) if record.exists() else {"clock": 0.0, "processor": 0.0}
    clock, used = time.monotonic(), _children_seconds()
    try:
        subprocess.run([sys.executable, str(EXAMPLES / f"{name}.py"), "--out", str(out)], check=True)
    finally:
        spent = {"clock": time.monotonic() - clock, "processor": _children_seconds() - used}
        total = {key: before[key] + seconds for key, seconds in spent.items()}
        write_json(record, total)
    for made in [*out.glob(f"{name}*.png"), *out.glob(f"{name}*.csv")]:
        shutil.copyfile(made, EXAMPLES / made.name)
    return total


def _children_seconds() -> float:
    times = os.times()
    return times.children_user + times.children_system


def main() -> None:
    """Perform those named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="examples; default: every one with a figure")
    names = parser.parse_args().names or gallery()
    for name in names:
        total = perform(name)
        print(f"{name}: {total['clock']:.0f} s by the clock, {total['processor']:.0f} of the processor", flush=True)


if __name__ == "__main__":
    main()
