"""Batches of samples: any nesting of tuples, lists and dicts of tensors, flat and with its structure beside it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from groktrace.errors import TaskError

# A leaf is its index among the flat tensors; the rest is JSON: {"tuple": [...]}, {"list": [...]}, {"dict": {...}}.
Structure = int | dict[str, Any]


@dataclass(frozen=True)
class Batch:
    """Samples stacked along the first axis of every tensor.

    Attributes:
        tensors: the leaves, each with the samples as its first axis, all of one length.
        structure: how the leaves nest, as JSON.
    """

    tensors: tuple[Tensor, ...]
    structure: Structure

    def __len__(self) -> int:
        return len(self.tensors[0])

    def take(self, index: Tensor | slice) -> "Batch":
        """The samples at `index`, in that order."""
        return Batch(tuple(tensor[index] for tensor in self.tensors), self.structure)

    def to(self, device: torch.device | str) -> "Batch":
        """The same samples on `device`."""
        return Batch(tuple(tensor.to(device) for tensor in self.tensors), self.structure)

    def nested(self) -> Any:
        """The samples in the nesting that the model and the loss expect."""
        return unflatten(self.structure, self.tensors)


def flatten(data: Any) -> tuple[list[Tensor], Structure]:
    """Flatten nested tuples, lists and dicts of tensors into leaves and a structure.

    Raises:
        TaskError: something in `data` is neither of these.
    """
    tensors: list[Tensor] = []

    def visit(node: Any) -> Structure:
        if isinstance(node, Tensor):
            tensors.append(node)
            return len(tensors) - 1
        if isinstance(node, tuple | list):
            return {"list" if isinstance(node, list) else "tuple": [visit(item) for item in node]}
        if isinstance(node, Mapping) and all(isinstance(key, str) for key in node):
            return {"dict": {key: visit(item) for key, item in node.items()}}
        raise TaskError(
            f"data: expected tensors in tuples, lists or dicts, got {type(node).__name__}; torch.as_tensor turns "
            "numbers and arrays into tensors."
        )

    return tensors, visit(data)


def unflatten(structure: Structure, tensors: Sequence[Tensor]) -> Any:
    """The inverse of `flatten`.

    Raises:
        TaskError: `structure` is not one that `flatten` makes.
    """
    match structure:
        case bool():
            pass
        case int() if 0 <= structure < len(tensors):
            return tensors[structure]
        case {"tuple": list(items), **rest} if not rest:
            return tuple(unflatten(item, tensors) for item in items)
        case {"list": list(items), **rest} if not rest:
            return [unflatten(item, tensors) for item in items]
        case {"dict": dict(items), **rest} if not rest:
            return {key: unflatten(item, tensors) for key, item in items.items()}
    raise TaskError("data: the recorded nesting is damaged; it does not fit the recorded tensors.")


def check_lengths(tensors: Sequence[Tensor], what: str) -> int:
    """Check that all tensors have equally many samples, and return the number.

    Raises:
        TaskError: no tensors, no samples, a tensor without a sample axis, or unequal lengths.
    """
    if not tensors:
        raise TaskError(f"{what}: expected at least one tensor, got none.")
    if any(tensor.ndim == 0 for tensor in tensors):
        raise TaskError(f"{what}: every tensor needs the samples as its first axis, got one without axes.")
    lengths = [len(tensor) for tensor in tensors]
    if len(set(lengths)) > 1:
        raise TaskError(
            f"{what}: inputs and targets must have equally many samples, got {lengths}; the first axis of every "
            "tensor is that of the samples, and movedim or transpose brings it there."
        )
    if lengths[0] == 0:
        raise TaskError(f"{what}: expected at least one sample, got an empty set.")
    return lengths[0]
