"""Random numbers that a loss draws, kept with each sample, so that the loss is one function of the weights.

What a loss draws is recorded once, on all samples, as further tensors of each sample. Wherever the loss is evaluated
later, at whatever weights and in whatever batches, its draws are replaced by these.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from groktrace.errors import TaskError
from groktrace.run.batch import Batch, Structure
from groktrace.run.isolation import seeded_rng

if TYPE_CHECKING:
    from groktrace.run.model_with_loss import ModelWithLoss

# Samples that draw together, and those on which it is tried whether the draws depend on the weights.
CHUNK, TRIED = 64, 32
_SEEDS_APART = 2**20
_SAMPLES, _NOISE = "samples", "drawn by the loss"
REMEDY = "draw the numbers once and give them with the data, as train=(x, y, noise) with batch_loss="

_FUNCTIONS = frozenset(
    getattr(torch, name)
    for name in ("rand", "randn", "randint", "rand_like", "randn_like", "randint_like", "normal", "bernoulli")
)
_METHODS = frozenset(
    getattr(Tensor, name)
    for name in ("bernoulli", "bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "normal_")
) | {Tensor.random_, Tensor.uniform_}
DRAWING = _FUNCTIONS | _METHODS


class _Drawn(TorchFunctionMode):
    """Keeps what is drawn, from the global generators alone."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        passed = dict(kwargs or {})
        if func not in DRAWING:
            return func(*args, **passed)
        passed.pop("generator", None)
        result = func(*args, **passed)
        self.tensors.append(result.detach().clone())
        return result


class FixedNoise(TorchFunctionMode):
    """Replaces what is drawn.

    Args:
        tensors: the draws in their order, samples first.
        axes: where each draw has its samples.
    """

    def __init__(self, tensors: Sequence[Tensor], axes: Sequence[int]) -> None:
        super().__init__()
        self._left: Iterator[Tensor] = (tensor.movedim(0, axis) for tensor, axis in zip(tensors, axes, strict=True))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in DRAWING:
            return func(*args, **(kwargs or {}))
        noise = next(self._left, None)
        if noise is None:
            raise TaskError(f"noise: the loss draws more random numbers than it did at first; {REMEDY}.")
        return args[0].copy_(noise) if func.__name__.endswith("_") else noise


def with_noise(batch: Batch, noise: Sequence[Tensor]) -> Batch:
    """Samples, each with what the loss draws for it.

    Args:
        batch: the samples alone.
        noise: one tensor a draw, samples first.
    """
    numbers = list(range(len(batch.tensors), len(batch.tensors) + len(noise)))
    structure: Structure = {"dict": {_SAMPLES: batch.structure, _NOISE: {"list": numbers}}}
    return Batch((*batch.tensors, *noise), structure)


def without_noise(batch: Batch) -> Batch:
    """The samples alone, where `with_noise` has made the batch; others as they are."""
    match batch.structure:
        case {"dict": {"samples": structure, "drawn by the loss": {"list": [int(first), *_]}}}:
            return Batch(batch.tensors[:first], structure)
    return batch


def noise_axes(forward: "ModelWithLoss", batch: Batch) -> tuple[int, ...]:
    """Where each draw of a loss has its samples; empty if it draws nothing.

    Args:
        forward: model and loss, in evaluation mode.
        batch: samples; a few are used.

    Raises:
        TaskError: a draw is not one for each sample, or depends on the weights.
    """
    few, more = (batch.take(torch.arange(size, device="cpu") % len(batch)) for size in (2, 3))
    first, other = _draw(forward, few, 0), _draw(forward, more, 0)
    axes = []
    if len(first) != len(other):
        raise TaskError(f"noise: the loss draws {len(first)} times for 2 samples, {len(other)} times for 3; {REMEDY}.")
    for a, b in zip(first, other, strict=True):
        found = [axis for axis, sizes in enumerate(zip(a.shape, b.shape, strict=False)) if sizes[0] != sizes[1]]
        if a.ndim != b.ndim or len(found) != 1 or (a.shape[found[0]], b.shape[found[0]]) != (2, 3):
            raise TaskError(
                f"noise: expected random numbers of each sample's own, got a draw of shape {tuple(a.shape)} for 2 "
                f"samples and {tuple(b.shape)} for 3; draw them for each, as torch.randn(len(x), ...)."
            )
        axes.append(found[0])
    some = batch.take(slice(0, TRIED))
    here, there = _draw(forward, some, 0), _draw(forward, some, 0, scale=-0.5)
    if len(here) != len(there) or not all(map(torch.equal, here, there)):
        raise TaskError(
            "noise: the loss draws from a distribution that depends on the weights; draw standard numbers and scale "
            "them, as mean + std * torch.randn_like(std)."
        )
    return tuple(axes)


def draw_noise(forward: "ModelWithLoss", batch: Batch, axes: Sequence[int], seed: int) -> Batch:
    """Samples, each with what the loss draws for it.

    Args:
        forward: model and loss, in evaluation mode.
        batch: the samples alone.
        axes: see `noise_axes`.
        seed: of the draws.

    Raises:
        TaskError: the loss draws otherwise for other samples.
    """
    chunks = []
    for start in range(0, len(batch), CHUNK):
        part = batch.take(slice(start, start + CHUNK))
        drawn = _draw(forward, part, seed + _SEEDS_APART * (1 + start // CHUNK))
        shapes = [tensor.shape[axis] if tensor.ndim > axis else 0 for tensor, axis in zip(drawn, axes, strict=False)]
        if len(drawn) != len(axes) or any(size != len(part) for size in shapes):
            raise TaskError(f"noise: the loss draws otherwise for other samples; {REMEDY}.")
        chunks.append([tensor.movedim(axis, 0).cpu() for tensor, axis in zip(drawn, axes, strict=True)])
    try:
        noise = [torch.cat(column).contiguous() for column in zip(*chunks, strict=True)]
    except RuntimeError as failure:
        raise TaskError(f"noise: the loss draws otherwise for other samples ({failure}); {REMEDY}.") from failure
    return with_noise(batch, noise)


def fix_noise(forward: "ModelWithLoss", batch: Batch, held_out: Batch | None, seed: int) -> tuple[Batch, Batch | None]:
    """Have a loss take its random numbers from the samples, and draw them if these have none yet.

    Args:
        forward: model and loss, in evaluation mode.
        batch: training samples.
        held_out: validation samples, or None.
        seed: of the draws.

    Returns:
        The samples with what the loss draws for them; as they are where it draws nothing.

    Raises:
        TaskError: what it draws cannot be fixed, or is not what the samples hold.
    """
    own = without_noise(batch)
    axes = noise_axes(forward, own)
    if own is not batch and len(axes) != len(batch.tensors) - len(own.tensors):
        raise TaskError(
            f"noise: the samples hold what another loss drew, {len(batch.tensors) - len(own.tensors)} times for each; "
            f"this one draws {len(axes)} times."
        )
    if axes and own is batch:
        batch = draw_noise(forward, batch, axes, seed)
        held_out = None if held_out is None else draw_noise(forward, held_out, axes, seed + 1)
    forward.noise = axes
    return batch, held_out


def _draw(forward: "ModelWithLoss", batch: Batch, seed: int, scale: float = 1.0) -> list[Tensor]:
    """What the loss draws on a batch, at its weights times a number."""
    device = next(forward.parameters()).device
    with torch.no_grad(), seeded_rng(seed, device), torch.compiler.set_stance("force_eager"), _Drawn() as drawn:
        weights = {} if scale == 1 else {name: scale * tensor for name, tensor in forward.parameters_by_name().items()}
        try:
            forward.evaluate(weights, batch.to(device).tensors)
        except Exception as failure:
            raise TaskError(
                f"noise: the loss fails on {len(batch)} samples ({type(failure).__name__}: {failure}); {REMEDY}."
            ) from failure
    return drawn.tensors
