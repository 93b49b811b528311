"""A value of λ to hold a trajectory against: a number given, or half the rank of the Jacobian at a snapshot."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from groktrace.errors import GroktraceError, SettingsError
from groktrace.records import Record
from groktrace.run.layout import Step
from groktrace.run.task import Task
from groktrace.sampling.network import as_float
from groktrace.sampling.weights import WeightLayout
from groktrace.theory import jacobian_rank


@dataclass(frozen=True)
class Reference(Record):
    """A reference value of λ.

    Attributes:
        llc: λ.
        source: "value" where it was given, "jacobian" where it is half of a rank.
        step: the training step at which the rank was taken; this and the rest only of a rank.
        rank: of the Jacobian of all outputs on the stored training samples with respect to the sampled weights.
        tolerance: the smallest singular value that counts, relative to the largest.
        gap: smallest singular value that counts over the largest that does not; None where all do.
    """

    llc: float
    source: Literal["value", "jacobian"]
    step: Step | None = None
    rank: int | None = None
    tolerance: float | None = None
    gap: float | None = None


def check_reference(value: Any) -> None:
    """Refuse what is neither None, "jacobian" nor a positive number.

    Raises:
        SettingsError: it is something else.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    if not (number or value is None or value == "jacobian"):
        raise SettingsError(f"reference: expected a positive number or 'jacobian', got {value!r}.")


def jacobian_reference(
    task: Task, layout: WeightLayout, weights: dict[str, Tensor], step: int, device: torch.device
) -> Reference:
    """Half the rank of the Jacobian at one snapshot: λ of squared error wherever the zero set is regular.

    Where the loss ignores a constant added to all outputs, the Jacobian is centred over the samples.

    Args:
        task: model and training samples.
        layout: the sampled weights.
        weights: tensors by name.
        step: the snapshot's training step.
        device: where to compute.

    Raises:
        SettingsError: the network's outputs are no single tensor, or it is too large or too unusual for its rank.
    """
    network = _Outputs(task, layout, weights).to(device)
    try:
        found = jacobian_rank(network, task.train.to(device).tensors, centred=task.shift_invariant)
    except GroktraceError as failure:
        raise SettingsError(f"reference: no Jacobian rank of this run, give a number instead ({failure})") from failure
    gap = found.gap if math.isfinite(found.gap) else None
    return Reference(found.llc, "jacobian", step, found.rank, found.tolerance, gap)


class _Outputs(nn.Module):
    """The outputs of a task's network, with the sampled weights as its only parameters."""

    def __init__(self, task: Task, layout: WeightLayout, weights: dict[str, Tensor]) -> None:
        super().__init__()
        forward = task.forward
        # A closure is shared, not copied, when the module is copied.
        self._run = lambda named, tensors: forward(named, tensors)[1]
        self._names = layout.names
        self._fixed = [name for name in weights if name not in layout.names]
        self.sampled = nn.ParameterList(nn.Parameter(as_float(weights[name]).clone()) for name in layout.names)
        for i, name in enumerate(self._fixed):
            self.register_buffer(f"fixed{i}", as_float(weights[name]).clone())

    def forward(self, *tensors: Tensor) -> Tensor:
        """Outputs on one batch of all its leaves, targets among them."""
        named = dict(zip(self._names, self.sampled, strict=True))
        fixed: Sequence[Tensor] = [self.get_buffer(f"fixed{i}") for i in range(len(self._fixed))]
        outputs = self._run(named | dict(zip(self._fixed, fixed, strict=True)), tensors)
        if outputs is None:
            raise SettingsError("model: expected one tensor as its output; a batch_loss shows none.")
        return outputs
