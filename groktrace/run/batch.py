"""Batches of samples: any nesting of tuples, lists and dicts of tensors, flat and with its structure beside it."""

import contextlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
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
    """Leaves of nested tuples, lists and dicts of tensors, and the structure that `unflatten` takes.

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
        raise TaskError(f"data: expected tensors in tuples, lists or dicts, got {type(node).__name__}.")

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
    """The number of samples, checked to be the same, and not zero, in all tensors.

    Raises:
        TaskError: no tensors, no samples, a tensor without a sample axis, or unequal lengths.
    """
    if not tensors:
        raise TaskError(f"{what}: expected at least one tensor, got none.")
    if any(tensor.ndim == 0 for tensor in tensors):
        raise TaskError(f"{what}: every tensor needs the samples as its first axis, got one without axes.")
    lengths = [len(tensor) for tensor in tensors]
    if len(set(lengths)) > 1:
        raise TaskError(f"{what}: inputs and targets must have equally many samples, got {lengths}.")
    if lengths[0] == 0:
        raise TaskError(f"{what}: expected at least one sample, got an empty set.")
    return lengths[0]


def collect(data: Any, what: str, max_samples: int, seed: int) -> tuple[Batch, int]:
    """Bring training data of any common form into one batch of at most `max_samples`.

    Args:
        data: a nesting of tensors (inputs, targets) or a dict of tensors; a list of such batches; a map-style
            Dataset; or a DataLoader (its dataset is read, not its iterator).
        what: the argument's name, for messages.
        max_samples: larger sets are represented by a random subset of this size.
        seed: seed of the subset's choice.

    Returns:
        The batch, copied to the CPU, and the true number of samples.

    Raises:
        TaskError: the data have another form, no samples, or unequal lengths.
    """
    generator = torch.Generator("cpu").manual_seed(seed)

    def choose(n: int) -> Tensor | slice:
        if n <= max_samples:
            return slice(None)
        return torch.randperm(n, generator=generator, device="cpu")[:max_samples].sort().values

    if isinstance(data, list) and data and not isinstance(data[0], Tensor):
        data = _concatenate(data, what)
    if isinstance(data, tuple | list | Mapping | Tensor):
        tensors, structure = flatten(data)
        n = check_lengths(tensors, what)
        index = choose(n)
        return Batch(tuple(tensor.detach()[index].cpu().clone() for tensor in tensors), structure), n
    if isinstance(data, torch.utils.data.DataLoader):
        if data.batch_sampler is None:
            raise TaskError(
                f"{what}: a DataLoader with batch_size=None says nothing of samples; give its batches as a list, or "
                "its dataset."
            )
        dataset, merge = data.dataset, data.collate_fn
    else:
        dataset, merge = data, torch.utils.data.default_collate
    streamed = isinstance(dataset, torch.utils.data.IterableDataset)
    if streamed or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise TaskError(
            f"{what}: expected (inputs, targets) tensors, a dict of tensors, a list of batches, a Dataset with "
            f"a length, or a DataLoader over one, got {type(data).__name__}."
        )
    n = len(dataset)
    if n == 0:
        raise TaskError(f"{what}: expected at least one sample, got an empty set.")
    index = choose(n)
    wanted: Iterable[int] = range(n) if isinstance(index, slice) else index.tolist()
    with _own_randomness(seed):
        samples = [dataset[i] for i in wanted]
        try:
            items = merge(samples)
        except Exception as failure:
            raise TaskError(f"{what}: the samples cannot be put into one batch ({failure}).") from failure
    tensors, structure = flatten(tuple(items) if isinstance(items, list) else items)
    check_lengths(tensors, what)
    return Batch(tuple(tensor.detach().cpu().clone() for tensor in tensors), structure), n


@contextlib.contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """Datasets may augment at random: their draws follow `seed`, and the training's generators stay as they are."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach the GPUs' generators too
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _concatenate(batches: list[Any], what: str) -> Any:
    """One nesting of tensors out of a list of equally nested ones."""
    parts = [flatten(tuple(batch) if isinstance(batch, list) else batch) for batch in batches]
    structure = parts[0][1]
    if any(other != structure for _, other in parts):
        raise TaskError(f"{what}: the batches of the list are nested differently; give them one form.")
    for tensors, _ in parts:
        check_lengths(tensors, what)
    try:
        return unflatten(structure, [torch.cat(column) for column in zip(*(t for t, _ in parts), strict=True)])
    except RuntimeError as failure:
        raise TaskError(f"{what}: the batches of the list cannot be joined ({failure}).") from failure
