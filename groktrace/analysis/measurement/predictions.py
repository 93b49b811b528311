"""Losses and accuracies of one snapshot; predictions are read where the loss compares them with their targets."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from groktrace.run.batch import Batch
from groktrace.run.loss_noise import without_noise
from groktrace.run.task import ForwardFunction, Task, failures_in_words
from groktrace.sampling.network import as_float

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
# Samples from which predictions a sample are counted.
_TARGETS_OF = 8
# Samples of which it is found out whether the loss is a mean over them, and in how many parts.
_BATCH_EFFECT_OF = 256
_QUARTERS = 4
# Samples at which it is found out whether a loss falls or rises with the outputs of targets.
_SIGN_OF = 64


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


def loss_and_hits(
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
    shares = torch.autograd.grad(loss, [compared.result for compared in watching.found], allow_unused=True)
    used = [
        (compared, share)
        for compared, share in zip(watching.found, shares, strict=True)
        if share is not None and bool((share != 0).any())
    ]
    if not used:
        return value, outputs, None
    (first, share), *others = used
    if any(
        not torch.equal(first.logits, other.logits) or not torch.equal(first.targets, other.targets)
        for other, _ in others
    ):
        return value, outputs, None
    return value, outputs, first.hits(share)


def measure_losses(
    task: Task,
    weights: Mapping[str, Tensor],
    device: torch.device,
    together: int | None = None,
    with_errors: bool = False,
) -> dict[str, float | None]:
    """Losses, accuracies and the losses' standard errors of one snapshot, by the names of `SnapshotMetrics`.

    Args:
        task: loss and data.
        weights: tensors by name.
        device: where to compute.
        together: samples evaluated at once, of a loss that is a mean over samples; None for all.
        with_errors: whether the samples are a random subset, whose scatter gives the errors.
    """
    weights = {name: as_float(tensor).to(device) for name, tensor in weights.items()}
    offset: Tensor | None = None
    smallest: bool | None = None
    found: dict[str, float | None] = {}

    def correct(batch: Batch, outputs: Tensor | None, training: bool) -> Tensor | None:
        nonlocal offset, smallest
        pair = without_noise(batch).nested()
        if outputs is None or not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(pair[1], Tensor):
            return None
        targets = pair[1]
        if targets.dtype == torch.long and isinstance(pair[0], Tensor) and torch.equal(targets, pair[0]):
            return None  # the loss shifts its targets itself, and where each belongs is not known
        if task.shift_invariant and training:
            # The loss cannot see this mean, so neither may the predictions (Gromov 2023's network has it at 30-50 %).
            offset = (outputs - targets).mean(0) if targets.shape == outputs.shape else None
        if smallest is None:
            smallest = _takes_smallest(task, weights, device, together)
        return correct_predictions(-outputs if smallest else outputs, targets, offset)

    def measure(name: str, batch: Batch) -> None:
        count, total = together or len(batch), 0.0
        hits: list[Tensor | None] = []
        losses: list[float] = []
        for start in range(0, len(batch), count):
            part = (batch if count >= len(batch) else batch.take(slice(start, start + count))).to(device)
            loss, outputs, seen = loss_and_hits(task.forward, weights, part.tensors)
            total += loss * (len(part) / len(batch))
            losses.append(loss)
            hits.append(correct(part, outputs, batch is task.train) if seen is None else seen)
        found[f"{name}_loss"] = total
        counted = None if any(part is None for part in hits) else torch.cat(hits)
        found[f"{name}_accuracy"] = None if counted is None or not len(counted) else float(counted.double().mean())
        if with_errors and len(losses) > 1:
            found[f"{name}_loss_stderr"] = statistics.stdev(losses) / math.sqrt(len(losses))

    with torch.no_grad():
        measure("train", task.train)
        if task.val is not None:
            advice = "they have to be of the training samples' shape, but for their number."
            with failures_in_words("val: the loss cannot be evaluated on the recorded validation samples", advice):
                measure("val", task.val)
    return found


def _takes_smallest(
    task: Task, weights: Mapping[str, Tensor], device: torch.device, together: int | None = None
) -> bool:
    """Whether the loss asks for small outputs of targets, as of distances and energies: it rises with each of them."""
    part = task.train.take(slice(0, min(_SIGN_OF, together or _SIGN_OF, len(task.train)))).to(device)
    pair = without_noise(part).nested()
    targets = pair[1] if isinstance(pair, tuple | list) and len(pair) == 2 else None
    if not isinstance(targets, Tensor) or targets.dtype != torch.long or targets.ndim != 1:
        return False
    try:
        with torch.enable_grad():
            named = {
                name: tensor.detach().requires_grad_(tensor.is_floating_point()) for name, tensor in weights.items()
            }
            loss, outputs = task.forward(named, part.tensors)
            if (
                outputs is None
                or outputs.ndim != 2
                or not 0 <= int(targets.min()) <= int(targets.max()) < outputs.shape[1]
            ):
                return False
            slope = torch.autograd.grad(loss, outputs)[0]
    except Exception:  # some programs take one batch size only; some losses are not of the outputs that are returned
        return False
    own = slope.gather(1, targets[:, None])
    return bool((own >= 0).all() & (own > 0).any() & (slope.sum() <= own.sum()))


def correct_predictions(outputs: Tensor, targets: Tensor, offset: Tensor | None = None) -> Tensor | None:
    """Whether the largest output is the target's class, for each prediction that counts; None without classes.

    Args:
        outputs: [n, classes], or [n, length, classes], or [n, classes, length].
        targets: class indices, of which negative ones do not count, or one-hot rows of the shape of `outputs`.
        offset: [classes], taken off the outputs first.
    """
    if outputs.ndim < 2 or outputs.shape[-1] < 2:
        return None
    if targets.is_floating_point():
        one_hot = targets.shape == outputs.shape and bool(
            ((targets == 0) | (targets == 1)).all() & (targets.sum(-1) == 1).all()
        )
        if not one_hot:
            return None
        targets = targets.argmax(-1)
    elif targets.shape == (outputs.shape[0], *outputs.shape[2:]) and targets.shape != outputs.shape[:-1]:
        outputs = outputs.movedim(1, -1)
    if targets.shape != outputs.shape[:-1]:
        return None
    predictions = (outputs if offset is None else outputs - offset).argmax(-1)
    return (predictions == targets)[targets >= 0]


def count_targets(
    task: Task, weights: Mapping[str, Tensor], device: torch.device, together: int | None = None
) -> float:
    """Predictions that the loss compares with targets, a sample; 1 at least.

    Args:
        task: loss and data.
        weights: tensors by name, of any snapshot.
        device: where to compute.
        together: samples that may be evaluated at once; None for all.
    """
    count = min(_TARGETS_OF, together or _TARGETS_OF, len(task.train))
    named = {name: as_float(tensor).to(device) for name, tensor in weights.items()}
    try:
        _, outputs, hits = loss_and_hits(task.forward, named, task.train.take(slice(0, count)).to(device).tensors)
    except Exception:  # some programs take one batch size only
        return 1.0
    if hits is not None:
        return max(1.0, len(hits) / count)
    return 1.0 if outputs is None or outputs.ndim < 2 else max(1.0, outputs.numel() / count)


def batch_effect(task: Task, weights: Mapping[str, Tensor], device: torch.device, together: int | None = None) -> float:
    """By how much the loss of some samples is off the mean of the losses of their quarters, relative to it.

    It is 0 of a mean over samples, and where it cannot be told, as some programs take one batch size only.

    Args:
        task: loss and data.
        weights: tensors by name, of any snapshot.
        device: where to compute.
        together: samples that may be evaluated at once; None for all.
    """
    count = min(_BATCH_EFFECT_OF, together or _BATCH_EFFECT_OF, len(task.train)) // _QUARTERS
    if count < 2:
        return 0.0
    named = {name: as_float(tensor).to(device) for name, tensor in weights.items()}
    some = torch.arange(0, len(task.train), len(task.train) // (count * _QUARTERS))[: count * _QUARTERS]
    chosen = [some, *(some[first::_QUARTERS] for first in range(_QUARTERS))]
    try:
        with torch.no_grad():
            whole, *parts = (float(task.forward(named, task.train.take(at).to(device).tensors)[0]) for at in chosen)
    except Exception:
        return 0.0
    effect = abs(whole - statistics.mean(parts)) / max(abs(whole), 1e-300)
    return effect if math.isfinite(effect) else 0.0
