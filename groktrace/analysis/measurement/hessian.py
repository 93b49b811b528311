"""How curved the training loss is at snapshots: trace and largest eigenvalue of its Hessian."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from groktrace.analysis.measurement.measure import Objective, stack_weights
from groktrace.records import Record, between, plain
from groktrace.run.layout import Step
from groktrace.sampling.curvature import top_eigenvalue
from groktrace.sampling.hutchinson import hessian_trace
from groktrace.sampling.large import hessian_trace_large, top_eigenvalue_large
from groktrace.sampling.network import LargeNetwork
from groktrace.sampling.noise import generator_for, normal_like

# As many as arXiv 2603.01192.
VECTORS = 100
# Products of the Lanczos iteration: within 1 % of the exact eigenvalue on networks.
ITERATIONS = 24


@dataclass(frozen=True)
class HessianMetrics(Record):
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


def measure_hessian(
    objective: Objective,
    weights: Sequence[Mapping[str, Tensor]],
    steps: Sequence[int],
    keys: Sequence[int] | None = None,
) -> list[HessianMetrics]:
    """Trace and top eigenvalue of several snapshots at once.

    Args:
        objective: whose training loss it is.
        weights: tensors by name, of each snapshot.
        steps: the training step of each.
        keys: what the random directions of each are keyed by beside the seed; by default its step.
    """
    loss, keys = objective.loss, steps if keys is None else keys
    generators = [generator_for(objective.settings.seed, key, 0, "sharpness", loss.device) for key in keys]
    found: list[tuple[float, float, float]] = []  # trace, its standard error, top eigenvalue
    if loss.micro_batch is None:
        stacked, anchors = stack_weights(loss, weights)
        tops = top_eigenvalue(stacked, anchors, normal_like(anchors, generators), ITERATIONS).tolist()
        traces, errors = hessian_trace(stacked, anchors, generators, VECTORS)
        found = list(zip(traces.tolist(), errors.tolist(), tops, strict=True))
    else:
        for tensors, generator in zip(weights, generators, strict=True):
            network = LargeNetwork(loss, tensors)
            traces = hessian_trace_large(network, generator, VECTORS)
            found.append((*traces, top_eigenvalue_large(network, generator)))
    return [HessianMetrics(step, *plain(values)) for step, values in zip(steps, found, strict=True)]
