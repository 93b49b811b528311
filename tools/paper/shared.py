"""What the results share: one (nβ, γ), estimates, fits."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import groktrace
from tools.common.measurements import Row, number
from tools.common.networks import EXAMPLE

# One (nβ, γ) for all trained networks: what locality 0.3 and resolution 10 give on the reference run, rounded.
SCALE = {"nbeta": 38_000.0, "localization": 440.0}
GENERALISED = 0.95

Result = list[str]


def fit(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Slope, intercept and R² of a straight line."""
    slope, intercept = np.polyfit(x, y, 1)
    residuals = np.asarray(y) - slope * np.asarray(x) - intercept
    return float(slope), float(intercept), float(1 - residuals.var() / np.asarray(y).var())


def values(rows: Sequence[Row], column: str) -> list[float]:
    """A column as numbers."""
    return [number(row[column]) for row in rows]


def estimates(model: torch.nn.Module, train: Any, **settings: Any) -> groktrace.LLCEstimate:
    """λ̂ of a network of the example."""
    return groktrace.estimate_llc(model, EXAMPLE.centred_loss, train, **settings)
