"""Loss, accuracy, size and curvature of snapshots: what can be said of them without sampling."""

import contextlib
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from groktrace.analysis.journal import check_numbers, check_step
from groktrace.analysis.predictions import evaluate
from groktrace.run.batch import Batch
from groktrace.run.task import Task, failures_in_words
from groktrace.sampling.batches import spread_ranks
from groktrace.sampling.curvature import top_eigenvalue
from groktrace.sampling.large import top_eigenvalue_large
from groktrace.sampling.network import Network, as_float, shuffled, with_micro_batch
from groktrace.sampling.noise import generator_for, normal_like
from groktrace.sampling.posterior import PART_BYTES, StackedLoss, WeightLayout

# Of large sets: what losses and accuracies are measured on at least, in so many parts or more, whose scatter gives the
# error.
EVALUATED_SAMPLES, EVALUATED_BYTES, PARTS = 256, 2**26, 8
# The curvature is measured on fewer of these, of which a quarter are those of the largest losses: of a well-fitted set
# they decide it. On six networks it then differs from that on all samples by 5 % (in the median).
CURVATURE_SAMPLES, MOST_CURVATURE_SAMPLES, CURVATURE_BYTES, HEAVY_SHARE = 128, 512, 2**25, 4
PRODUCTS, DEAR_PRODUCTS = 8, 6

# What a network loses that knows nothing is the same on so many samples, spread evenly, as on all.
CHANCE_SAMPLES = 256


@dataclass(frozen=True)
class Survey:
    """One snapshot without sampling; what is not known is None.

    Attributes:
        step: training step.
        train_loss, val_loss: mean loss over the stored samples.
        train_accuracy, val_accuracy: fraction of right predictions, for classification.
        norm_squared: ‖w*‖² over the sampled weights.
        top_curvature: h_max, the largest |eigenvalue| of the Hessian of the training loss.
        train_loss_stderr, val_loss_stderr: standard errors, where the losses are those of a random subset.
    """

    step: int
    train_loss: float
    train_accuracy: float | None
    val_loss: float | None
    val_accuracy: float | None
    norm_squared: float
    top_curvature: float
    train_loss_stderr: float | None = None
    val_loss_stderr: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; what is not finite becomes None."""
        values = asdict(self)
        return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "Survey":
        """The inverse of `to_dict`.

        Raises:
            ValueError: a value is of the wrong kind.
            TypeError: a value is missing or unknown.
        """
        check_step(value)
        check_numbers(value, value)
        if min(value.get("norm_squared") or 0, value.get("top_curvature") or 0) < 0:
            raise ValueError("norm_squared or top_curvature")
        always = {name: math.nan for name in ("train_loss", "norm_squared", "top_curvature") if value.get(name) is None}
        return cls(**{**value, **always})


def training_loss(task: Task, layout: WeightLayout, weights: dict[str, Tensor], device: torch.device) -> StackedLoss:
    """The training loss of a network as it is stacked and differentiated, tried at one snapshot.

    Args:
        task: loss and data.
        layout: the sampled weights.
        weights: tensors by name, of any snapshot.
        device: where to compute.

    Raises:
        TaskError: it cannot be evaluated or differentiated there.
    """
    some = ", ".join(layout.names[:5]) + (", ..." if len(layout.names) > 5 else "")
    advice = f"it has to be a function of the sampled weights: {some}."
    with failures_in_words("loss: cannot be differentiated on the training samples", advice):
        bare = with_micro_batch(StackedLoss(task.forward, layout, task.train.to(device).tensors, {}), weights)
        if bare.micro_batch is not None:
            return bare
        loss, anchor = stack_weights(bare, [weights])
        return loss.probe(anchor)


def stack_weights(loss: StackedLoss, weights: Sequence[dict[str, Tensor]]) -> tuple[StackedLoss, Tensor]:
    """The loss of several snapshots, and their flat weights [S, D].

    Args:
        loss: of the same network, of whatever snapshots.
        weights: tensors by name, of each snapshot.
    """
    flat = torch.stack([loss.layout.flatten(each) for each in weights]).to(loss.device)
    names = [name for name in weights[0] if name not in loss.layout.names]
    fixed = {name: torch.stack([as_float(each[name]) for each in weights]).to(loss.device) for name in names}
    return replace(loss, fixed=fixed), flat


def survey(
    task: Task,
    loss: StackedLoss,
    weights: Sequence[dict[str, Tensor]],
    steps: Sequence[int],
    seed: int,
    keys: Sequence[int] | None = None,
) -> list[Survey]:
    """Losses, accuracies and curvature of several snapshots.

    Args:
        task: loss and data.
        loss: the task's training loss.
        weights: tensors by name, of each snapshot.
        steps: the training step of each.
        seed: of the power iteration's start.
        keys: what the start of each is keyed by beside the seed; by default its step.
    """
    keys = steps if keys is None else keys
    if loss.micro_batch is not None:
        return [_survey_large(task, loss, *each, seed) for each in zip(weights, steps, keys, strict=True)]
    device = loss.device
    measured = [_measure(task, loss, each) for each in weights]
    few, index = curvature_loss(loss), None
    few, anchors = stack_weights(few, weights)
    if few.heavy:
        size = curvature_samples(loss)
        orders = few.ranks(anchors)
        index = torch.stack([spread_ranks(order, few.heavy, size) for order in orders])
    start = normal_like(anchors, [generator_for(seed, key, 0, "curvature", device) for key in keys])
    products = PRODUCTS if loss.sample_bytes is None else DEAR_PRODUCTS
    curvature = top_eigenvalue(few, anchors, start, products, index).tolist()
    norms = anchors.square().sum(1).tolist()
    return [
        replace(about, step=step, norm_squared=norm, top_curvature=top)
        for step, about, norm, top in zip(steps, measured, norms, curvature, strict=True)
    ]


def curvature_loss(loss: StackedLoss) -> StackedLoss:
    """The loss from which the curvature is taken, without the choice among its samples.

    Args:
        loss: the task's training loss.
    """
    if loss.sample_bytes is None:
        return loss
    size, available = curvature_samples(loss), evaluated_samples(loss)
    if not loss.separable or size >= available:
        return loss.subset(size)
    return loss.subset(available, size, size // HEAVY_SHARE)


def curvature_samples(loss: StackedLoss) -> int:
    """How many samples of a large set the curvature is measured on.

    Args:
        loss: the task's training loss.
    """
    return min(max(CURVATURE_SAMPLES, CURVATURE_BYTES // loss.sample_bytes), MOST_CURVATURE_SAMPLES)


def evaluated_samples(loss: StackedLoss) -> int:
    """How many samples of a large set losses and accuracies are measured on.

    Args:
        loss: the task's training loss.
    """
    return min(max(EVALUATED_SAMPLES, EVALUATED_BYTES // loss.sample_bytes), len(loss.tensors[0]))


def _measure(task: Task, loss: StackedLoss, weights: dict[str, Tensor]) -> Survey:
    """Losses and accuracies of one snapshot; of large sets on a fixed random subset, with standard errors."""
    if loss.sample_bytes is None:
        train_loss, train_accuracy, val_loss, val_accuracy = measure_point(task, weights, loss.device)
        return Survey(0, train_loss, train_accuracy, val_loss, val_accuracy, math.nan, math.nan)
    most = evaluated_samples(loss)
    train = Batch(tuple(tensor[:most] for tensor in loss.tensors), task.train.structure)
    val = None if task.val is None else task.val.take(shuffled(len(task.val))[:most])
    parts = max(PARTS, math.ceil(len(train) * loss.sample_bytes / PART_BYTES))
    few = replace(task, train=train, val=val)
    together = max(1, len(train) // parts)
    errors: dict[str, float] = {}
    measured = measure_point(few, weights, loss.device, together, errors)
    stderr = [errors.get(name) for name in ("train", "val")]
    return Survey(0, *measured, math.nan, math.nan, *stderr)


def chance_losses(
    task: Task, weights: dict[str, Tensor], device: torch.device, together: int | None = None
) -> tuple[float, ...]:
    """Training losses of networks that know nothing, the better one first; those that are not finite are left out.

    They are that of a network whose weights are all zero, so that it says the same of every sample, and that of the
    weights given.

    Args:
        task: loss and data.
        weights: tensors by name, of the first snapshot.
        device: where to compute.
        together: samples that may be evaluated at once; None for all.
    """
    count = min(CHANCE_SAMPLES, together or CHANCE_SAMPLES)
    some = task.train.take(torch.arange(0, len(task.train), math.ceil(len(task.train) / count), device="cpu"))
    own = {name: as_float(tensor).to(device) for name, tensor in weights.items()}
    # A single zero that is seen as many takes no memory.
    none = {name: t.new_zeros(()).expand(t.shape) if t.is_floating_point() else t for name, t in own.items()}
    losses = []
    for each in (none, own):
        for batch in (some, task.train) if together is None else (some,):  # some programs take one batch size only
            with contextlib.suppress(Exception), torch.no_grad():
                losses.append(float(task.forward(each, batch.to(device).tensors)[0]))
                break
    return tuple(loss for loss in losses if math.isfinite(loss))


def accuracy(outputs: Tensor, targets: Tensor, offset: Tensor | None = None) -> float | None:
    """Fraction of samples whose largest output is the target's class; None where there are no classes.

    Args:
        outputs: [n, classes], or [n, length, classes], or [n, classes, length].
        targets: class indices, or one-hot rows of the shape of `outputs`.
        offset: [classes], taken off the outputs first.
    """
    hits = _hits(outputs, targets, offset)
    return None if hits is None else _fraction(hits)


def _fraction(hits: Tensor) -> float | None:
    return float(hits.double().mean()) if len(hits) else None


def _hits(outputs: Tensor, targets: Tensor, offset: Tensor | None) -> Tensor | None:
    """Whether each prediction that counts is right, see `accuracy`."""
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
    counted = targets >= 0
    return (predictions == targets)[counted]


def _survey_large(task: Task, loss: StackedLoss, weights: dict[str, Tensor], step: int, key: int, seed: int) -> Survey:
    """The survey of one large network."""
    network = Network(loss, weights)
    if loss.sample_bytes is None:
        together = loss.micro_batch if loss.micro_batch < network.samples else None
        measured = measure_point(task, weights, loss.device, together)
        about = Survey(step, *measured, math.nan, math.nan)
    else:
        about = replace(_measure(task, loss, weights), step=step)
        network = Network(loss.subset(curvature_samples(loss)), weights)
    norm_squared = sum(float(anchor.square().sum(dtype=torch.float64)) for _, anchor in network.pieces())
    top = top_eigenvalue_large(network, generator_for(seed, key, 0, "curvature", loss.device))
    return replace(about, norm_squared=norm_squared, top_curvature=top)


def measure_point(
    task: Task,
    weights: dict[str, Tensor],
    device: torch.device,
    together: int | None = None,
    errors: dict[str, float] | None = None,
) -> tuple[float, float | None, float | None, float | None]:
    """Training loss and accuracy, validation loss and accuracy of one snapshot.

    Args:
        task: loss and data.
        weights: tensors by name.
        device: where to compute.
        together: samples evaluated at once, of a loss that is a mean over samples; None for all.
        errors: takes the standard errors of the losses, "train" and "val", from the scatter of what is evaluated at
            once.
    """
    weights = {name: as_float(tensor).to(device) for name, tensor in weights.items()}
    offset = None

    def one(batch: Batch) -> tuple[float, float | None]:
        count, total = together or len(batch), 0.0
        hits: list[Tensor | None] = []
        losses: list[float] = []
        for start in range(0, len(batch), count):
            part = (batch if count >= len(batch) else batch.take(slice(start, start + count))).to(device)
            loss, outputs, seen = evaluate(task.forward, weights, part.tensors)
            total += loss * (len(part) / len(batch))
            losses.append(loss)
            hits.append(right(part, outputs, batch is task.train) if seen is None else seen)
        if errors is not None and len(losses) > 1:
            errors["train" if batch is task.train else "val"] = statistics.stdev(losses) / math.sqrt(len(losses))
        return total, None if any(each is None for each in hits) else _fraction(torch.cat(hits))

    def right(batch: Batch, outputs: Tensor | None, training: bool) -> Tensor | None:
        nonlocal offset
        pair = batch.nested()
        if outputs is None or not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(pair[1], Tensor):
            return None
        targets = pair[1]
        if targets.dtype == torch.long and isinstance(pair[0], Tensor) and torch.equal(targets, pair[0]):
            return None  # the loss shifts its targets itself, and where each belongs is not known
        if task.shift_invariant and training:
            # The loss cannot see this mean, so neither may the predictions (Gromov 2023's network has it at 30-50 %).
            offset = (outputs - targets).mean(0) if targets.shape == outputs.shape else None
        return _hits(outputs, targets, offset)

    with torch.no_grad():
        train_loss, train_accuracy = one(task.train)
        val_loss, val_accuracy = None, None
        if task.val is not None:
            advice = "they have to be of the training samples' shape, but for their number."
            with failures_in_words("val: the loss cannot be evaluated on the recorded validation samples", advice):
                val_loss, val_accuracy = one(task.val)
    return train_loss, train_accuracy, val_loss, val_accuracy
