"""Read the first samples of an IterableDataset, or of a DataLoader over one, from a copy: it stays where it is."""

import contextlib
import copy
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from groktrace.errors import TaskError
from groktrace.run.isolation import seeded_rng


def is_stream(data: Any) -> bool:
    """Whether data are an IterableDataset, or a DataLoader over one."""
    return isinstance(data.dataset if isinstance(data, DataLoader) else data, IterableDataset)


def known_length(data: Any) -> int | None:
    """The number of samples of a stream, where it says so itself."""
    if isinstance(data, DataLoader) and data.batch_size is None:
        return None  # its entries may be batches
    dataset: Any = data.dataset if isinstance(data, DataLoader) else data
    try:
        return len(dataset)
    except (TypeError, NotImplementedError):  # it has none
        return None


def first_entries(data: Any, count: int, what: str, seed: int) -> list[Any]:
    """The first entries of a stream, as its dataset gives them.

    Args:
        data: see `is_stream`.
        count: how many, at most.
        what: the argument's name, for messages.
        seed: of the global random generators meanwhile.

    Raises:
        TaskError: as `reading`.
    """
    with reading(data, what, seed) as entries:
        return list(itertools.islice(entries, count))


@contextlib.contextmanager
def reading(data: Any, what: str, seed: int) -> Iterator[Iterator[Any]]:
    """Begin a pass over a copy of a stream, whose own generators and counters stay as they are.

    Args:
        data: see `is_stream`.
        what: the argument's name, for messages.
        seed: of the global random generators within.

    Yields:
        The entries of its dataset.

    Raises:
        TaskError: it cannot be copied or read.
    """
    dataset = data.dataset if isinstance(data, DataLoader) else data
    remedy = f"give {what}= a list of batches drawn from it, such as list(itertools.islice(loader, 64))"
    try:
        duplicate = copy.deepcopy(dataset, {id(held): held for held in _tensors_of(dataset, set())})
    except Exception as failure:  # it holds a file or an iterator, say, which reading would move
        raise TaskError(
            f"{what}: a {type(dataset).__name__} cannot be read without being used up "
            f"({type(failure).__name__}: {failure}); {remedy}."
        ) from failure
    with seeded_rng(seed):
        entries: Any = None
        try:
            entries = iter(duplicate)
            yield entries
        except TaskError:
            raise
        except Exception as failure:
            raise TaskError(
                f"{what}: reading the {type(dataset).__name__} fails ({type(failure).__name__}: {failure}); {remedy}."
            ) from failure
        finally:
            if hasattr(entries, "close"):
                entries.close()


def _tensors_of(dataset: Dataset[Any], seen: set[int]) -> Iterator[Any]:
    """The tensors and arrays that a dataset, and those that it wraps, hold: too large to copy."""
    seen.add(id(dataset))
    for value in vars(dataset).values():
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, torch.Tensor | np.ndarray):
                yield item
            elif isinstance(item, Dataset) and id(item) not in seen:
                yield from _tensors_of(item, seen)
