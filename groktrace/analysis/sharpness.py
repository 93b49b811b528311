"""How curved the training loss is at snapshots: trace and largest eigenvalue of its Hessian."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from groktrace.analysis.evaluation import stack_weights
from groktrace.records import between, read_record
from groktrace.run.layout import Step
from groktrace.sampling.curvature import top_eigenvalue
from groktrace.sampling.hutchinson import hessian_trace
from groktrace.sampling.large import hessian_trace_large, top_eigenvalue_large
from groktrace.sampling.network import Network
from groktrace.sampling.noise import generator_for, normal_like
from groktrace.sampling.posterior import StackedLoss

# As many as arXiv 2603.01192.
VECTORS = 100
# Products of the Lanczos iteration: within 1 % of the exact eigenvalue on networks.
ITERATIONS = 24


@dataclass(frozen=True)
class Sharpness:
    """Curvature at one snapshot, over the sampled weights; None where it is not finite.

    Attributes:
        step: training step.
        hessian_trace: tr ∇²L_n, by Hutchinson's estimator with 100 vectors.
        hessian_trace_stderr: its standard error.
        hessian_top: the largest |eigenvalue| of ∇²L_n, by 24 Lanczos iterations.
    """

    step: Step
    hessian_trace: float | None
    hessian_trace_stderr: Annotated[float, between(0)] | None
    hessian_top: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "Sharpness":
        """The inverse of `to_dict`.

        Raises:
            ValueError: a key is missing, unknown, or of the wrong kind.
        """
        return read_record(cls, value)


def measure_sharpness(
    loss: StackedLoss,
    weights: Sequence[dict[str, Tensor]],
    steps: Sequence[int],
    seed: int,
    keys: Sequence[int] | None = None,
) -> list[Sharpness]:
    """Trace and top eigenvalue of several snapshots at once.

    Args:
        loss: the task's training loss.
        weights: tensors by name, of each snapshot.
        steps: the training step of each.
        seed: of the random directions.
        keys: what those of each are keyed by beside the seed; by default its step.
    """
    keys = steps if keys is None else keys
    if loss.micro_batch is not None:
        return [
            _measure_large(Network(loss, each), step, generator_for(seed, key, 0, "sharpness", loss.device))
            for each, step, key in zip(weights, steps, keys, strict=True)
        ]
    stacked, anchors = stack_weights(loss, weights)
    generators = [generator_for(seed, key, 0, "sharpness", anchors.device) for key in keys]
    tops = top_eigenvalue(stacked, anchors, normal_like(anchors, generators), ITERATIONS).tolist()
    traces, errors = hessian_trace(stacked, anchors, generators, VECTORS)
    return [
        Sharpness(step, *(value if math.isfinite(value) else None for value in values))
        for step, *values in zip(steps, traces.tolist(), errors.tolist(), tops, strict=True)
    ]


def _measure_large(network: Network, step: int, generator: torch.Generator) -> Sharpness:
    values = (*hessian_trace_large(network, generator, VECTORS), top_eigenvalue_large(network, generator))
    return Sharpness(step, *(value if math.isfinite(value) else None for value in values))
