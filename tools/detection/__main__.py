"""How well transitions are found.

    python -m tools.detection synthetic
    python -m tools.detection networks --limit 20
    python -m tools.detection cross-entropy --all-measures
    python -m tools.detection networks --seed 1000        # others of the same kinds
    python -m tools.detection warning                     # how early a fall is announced
    python -m tools.detection warning --cross-entropy     # the same, of perceptrons and transformers
    python -m tools.detection speed                       # 10 000 snapshots

Each part prints a table and leaves its results under runs/detection. ruptures' columns need ruptures 1.1.10.
"""

import argparse
import importlib.util
from pathlib import Path

from tools.detection.cross_entropy_networks import run_cross_entropy
from tools.detection.quadratic_networks import run_networks
from tools.detection.synthetic import run_speed, run_synthetic
from tools.detection.warning import run_warning


def main() -> None:
    """Run the part that is asked for."""
    parser = argparse.ArgumentParser(prog="python -m tools.detection", description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["synthetic", "networks", "cross-entropy", "warning", "speed"])
    parser.add_argument("--out", type=Path, default=Path("runs/detection"), help="where the results go")
    parser.add_argument("--series", type=int, default=100, help="curves of each shape and noise level")
    parser.add_argument("--seed", type=int, default=0, help="of the curves; added to those of the networks")
    parser.add_argument("--limit", type=int, default=1000, help="networks to train in this call; the others are kept")
    parser.add_argument("--all-measures", action="store_true", help="cross-entropy: others than the analysis' own too")
    parser.add_argument("--cross-entropy", action="store_true", help="warning: perceptrons and transformers under it")
    parser.add_argument("--no-peers", action="store_true", help="leave ruptures out")
    options = parser.parse_args()
    if options.part == "networks":
        run_networks(options.out, options.limit, options.seed)
        return
    if options.part == "cross-entropy":
        run_cross_entropy(options.out, options.limit, options.seed, options.all_measures)
        return
    if options.part == "warning":
        run_warning(options.out, options.limit, options.cross_entropy)
        return
    peers = not options.no_peers and importlib.util.find_spec("ruptures") is not None
    if options.part == "speed":
        run_speed(options.out, 10_000, peers)
        return
    run_synthetic(options.out, options.series, options.seed, peers)


if __name__ == "__main__":
    main()
