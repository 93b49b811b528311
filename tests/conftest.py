"""Recorded runs that several tests read."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import groktrace
from groktrace.cli import main

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def unchanged_priority(monkeypatch):
    """Let `follow`, called here, not put all later tests of this process behind everything else."""
    monkeypatch.setattr(os, "nice", lambda increment: 0, raising=False)


@pytest.fixture(scope="session")
def reference_run(tmp_path_factory):
    """The reference example, recorded by its own script and analysed by the command line, once."""
    out = tmp_path_factory.mktemp("reference") / "run"
    subprocess.run([sys.executable, str(EXAMPLES / "modular_addition.py"), "--out", str(out)], check=True)
    result = CliRunner().invoke(main, ["analyze", str(out), "--json"])
    assert result.exit_code == 3, result.output  # its first snapshots are not at a minimum
    return out, json.loads(result.stdout)


@pytest.fixture(scope="session")
def recorded(tmp_path_factory):
    """A small classifier's training, six snapshots; do not write into it, take `small_run`."""
    out = tmp_path_factory.mktemp("small") / "run"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(60, 4), torch.randint(0, 3, (60,))
    with groktrace.watch(
        model, optimizer, train=(x, y), loss="cross_entropy", val=(x[:9], y[:9]), out=out, every=10
    ) as r:
        for step in range(50):
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            r.log(train_loss=loss.item(), lr=0.1 * step)
    return out


@pytest.fixture
def small_run(recorded, tmp_path):
    """A copy of `recorded` to do with as one likes."""
    return Path(shutil.copytree(recorded, tmp_path / "run"))
