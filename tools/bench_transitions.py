"""How well transitions are found.

    python tools/bench_transitions.py synthetic
    python tools/bench_transitions.py networks --limit 20
    python tools/bench_transitions.py cross-entropy --all-measures
    python tools/bench_transitions.py networks --seed 1000        # others of the same kinds
    python tools/bench_transitions.py speed                       # 10 000 snapshots

Each part prints a table and leaves its results under runs/bench_transitions. ruptures' columns need ruptures 1.1.10.
"""

import argparse
import importlib.util
from pathlib import Path

from transitions_cross_entropy import run_cross_entropy
from transitions_networks import run_networks
from transitions_synthetic import run_speed, run_synthetic


def main() -> None:
    """Run the part that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["synthetic", "networks", "cross-entropy", "speed"])
    parser.add_argument("--out", type=Path, default=Path("runs/bench_transitions"), help="where the results go")
    parser.add_argument("--series", type=int, default=100, help="curves of each shape and noise level")
    parser.add_argument("--seed", type=int, default=0, help="of the curves; added to those of the networks")
    parser.add_argument("--limit", type=int, default=1000, help="networks to train in this call; the others are kept")
    parser.add_argument("--all-measures", action="store_true", help="cross-entropy: others than the analysis' own too")
    parser.add_argument("--no-peers", action="store_true", help="leave ruptures out")
    options = parser.parse_args()
    if options.part == "networks":
        run_networks(options.out, options.limit, options.seed)
        return
    if options.part == "cross-entropy":
        run_cross_entropy(options.out, options.limit, options.seed, options.all_measures)
        return
    peers = not options.no_peers and importlib.util.find_spec("ruptures") is not None
    if options.part == "speed":
        run_speed(options.out, 10_000, peers)
        return
    run_synthetic(options.out, options.series, options.seed, peers)


if __name__ == "__main__":
    main()
