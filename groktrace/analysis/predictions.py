"""Predictions read where the loss compares them with their targets, whatever the outputs look like."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from groktrace.run.task import ForwardFunction

_aten = torch.ops.aten
# As live models call them and as recorded programs do; of the latter reductions and the like have places of their own.
_LOSSES = {
    functional.cross_entropy: ("input", "target", "weight", "size_average", "ignore_index"),
    functional.nll_loss: ("input", "target", "weight", "size_average", "ignore_index"),
    _aten.cross_entropy_loss.default: ("self", "target", "weight", "reduction", "ignore_index"),
    _aten.nll_loss_nd.default: ("self", "target", "weight", "reduction", "ignore_index"),
    _aten.nll_loss.default: ("self", "target", "weight", "reduction", "ignore_index"),
    _aten.nll_loss2d.default: ("self", "target", "weight", "reduction", "ignore_index"),
}
_IGNORED = -100


@dataclass(frozen=True)
class _Compared:
    """One cross-entropy.

    Attributes:
        logits: [classes], [n, classes] or [n, classes, ...].
        targets: class indices, or probabilities of the shape of `logits`.
        ignored: the class index that does not count.
        result: one number, or one a prediction.
    """

    logits: Tensor
    targets: Tensor
    ignored: int
    result: Tensor

    def hits(self, share: Tensor) -> Tensor:
        """Whether each prediction that counts is right.

        Args:
            share: derivative of the loss with respect to `result`; what it does not depend on does not count.
        """
        axis = 0 if self.logits.ndim == 1 else 1
        targets, counted = self.targets, torch.ones_like(self.targets, dtype=torch.bool)
        if targets.is_floating_point():
            targets = targets.argmax(axis)
            counted = torch.ones_like(targets, dtype=torch.bool)
        else:
            counted = targets != self.ignored
        if share.shape == targets.shape:
            counted = counted & (share != 0)
        return (self.logits.argmax(axis) == targets)[counted]


class _Watching(TorchFunctionMode):
    """Writes down the cross-entropies that are computed, each of which becomes a number to differentiate by."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[_Compared] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        names = _LOSSES.get(function)
        # Sizes are tried without data, and what a transform has stacked is more than one prediction.
        if names is None or result.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(result):
            return result
        given = dict(zip(names, args, strict=False)) | (kwargs or {})
        result = result.detach().requires_grad_()
        ignored = given.get("ignore_index", _IGNORED)
        self.found.append(_Compared(given[names[0]].detach(), given["target"], ignored, result))
        return result


def evaluate(
    forward: ForwardFunction, weights: Mapping[str, Tensor], tensors: Sequence[Tensor]
) -> tuple[float, Tensor | None, Tensor | None]:
    """Loss and outputs on one batch, and whether each prediction that the loss's cross-entropy counts is right.

    Predictions that the loss leaves out, by a mask or a slice, do not count.

    Args:
        forward: of a task.
        weights: tensors by name, none of which requires a gradient.
        tensors: the batch's leaves.

    Returns:
        The mean loss; the model's outputs, if they are one tensor; and hits, one each prediction, where the loss holds
        one cross-entropy: of several that differ it is not known which one is meant.
    """
    watching = _Watching()
    with torch.enable_grad(), watching:  # a gradient of what follows the cross-entropies alone
        loss, outputs = forward(weights, tensors)
    value, outputs = float(loss.detach()), None if outputs is None else outputs.detach()
    if not watching.found or not loss.requires_grad:
        return value, outputs, None
    shares = torch.autograd.grad(loss, [each.result for each in watching.found], allow_unused=True)
    used = [
        (each, share)
        for each, share in zip(watching.found, shares, strict=True)
        if share is not None and bool((share != 0).any())
    ]
    if not used:
        return value, outputs, None
    (first, share), *others = used
    if any(
        not torch.equal(first.logits, each.logits) or not torch.equal(first.targets, each.targets) for each, _ in others
    ):
        return value, outputs, None
    return value, outputs, first.hits(share)
