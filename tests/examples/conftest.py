"""The small form of an example, run here, where PyTorch is loaded, and not in a process of its own."""

import os
import runpy
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

from groktrace.recording.termination import close_all

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def perform(tmp_path, monkeypatch):
    """Run an example by name as its command line does, as often as one likes, into `tmp_path`."""
    monkeypatch.syspath_prepend(EXAMPLES)  # where a script finds its neighbours

    def run(name: str) -> None:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--small", "--out", os.fspath(tmp_path)])
        with torch.random.fork_rng():
            try:
                runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
            finally:
                close_all()  # as at the end of a process
                plt.close("all")

    yield run
    sys.modules.pop("modular_addition", None)
