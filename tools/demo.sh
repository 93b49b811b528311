#!/usr/bin/env bash
# Set up, train the reference example, analyse it, draw it. Everything lands in runs/demo, which is made anew.
source "$(dirname "$0")/setup.sh" plot

run=runs/demo
rm -rf "$run" "$run".png "$run".txt
echo
echo "1. Training a quadratic network on addition mod 23 (examples/modular_addition.py)"
.venv/bin/python examples/modular_addition.py --out "$run"
echo
echo "2. Replaying its snapshots: groktrace analyze $run"
# 3 means: done, with some snapshots named as not to be trusted.
.venv/bin/groktrace analyze "$run" > "$run.txt" || [ $? -eq 3 ]
.venv/bin/groktrace plot "$run" -o "$run.png"
echo
sed 's|tensorboard --logdir|.venv/bin/tensorboard --logdir|' "$run.txt"
