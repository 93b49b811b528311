"""Determine which samples of its dataset a DataLoader trains on."""

import contextlib
import copy
import itertools
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from groktrace.errors import TaskError
from groktrace.run.isolation import seeded_rng

# Seeds of two passes over an unknown sampler.
_PASSES = (1, 2)


def trained_indices(loader: DataLoader, what: str) -> Sequence[Any]:
    """The indices of the samples that `loader` trains on over time; it and its generators stay as they are.

    The samplers of torch are known; any other is copied, and two passes over the copy must give the same samples.

    Args:
        loader: with a batch sampler.
        what: the argument's name, for messages.

    Raises:
        TaskError: the samples are not equally likely, or cannot be told.
    """
    batches = loader.batch_sampler
    while type(batches).__name__ == "BatchSamplerShard":  # Accelerate's share of one process; all of them train
        batches = batches.batch_sampler
    if not _is(batches, BatchSampler):
        return _found(batches, loader.dataset, what, in_batches=True)[0]
    sampler, size, drop = batches.sampler, batches.batch_size, batches.drop_last
    if _is(sampler, DistributedSampler):
        return _of_all_processes(sampler, size, drop)
    if _is(sampler, SequentialSampler):
        indices, in_order = range(len(sampler.data_source)), True
    elif _is(sampler, RandomSampler):
        indices, in_order = range(len(sampler.data_source)), False
    elif _is(sampler, SubsetRandomSampler):
        indices, in_order = list(sampler.indices), False
    elif _is(sampler, WeightedRandomSampler):
        indices, in_order = _equally_weighted(sampler, what), False
    else:
        indices, in_order = _found(sampler, loader.dataset, what, in_batches=False)
    # In another order in each epoch, the incomplete last batch holds other samples each time.
    kept = len(indices) // size * size
    return indices[:kept] if drop and (in_order or not kept) else indices


def _is(sampler: Any, kind: type) -> bool:
    """Whether it inherits that class's `__iter__`."""
    return getattr(type(sampler), "__iter__", None) is kind.__iter__


def _of_all_processes(sampler: DistributedSampler, size: int, drop: bool) -> Sequence[int]:
    """What all processes together train on."""
    n = len(sampler.dataset)
    if sampler.shuffle:
        return range(n)
    of_one = sampler.num_samples // size * size if drop else sampler.num_samples
    return range(min(n, of_one * sampler.num_replicas))


def _equally_weighted(sampler: WeightedRandomSampler, what: str) -> Sequence[int]:
    weights = torch.as_tensor(sampler.weights)
    drawn = weights.nonzero().flatten().tolist()
    all_of_them = not sampler.replacement and sampler.num_samples == len(drawn)
    if not all_of_them and len(weights[drawn].unique()) > 1:
        raise TaskError(
            f"{what}: its sampler, a WeightedRandomSampler, draws some samples more often than others, and the loss is "
            "taken as a plain mean over samples; give data that hold each sample as often as it counts, or weight the "
            f"loss of each sample by batch_loss=, and give {what}= without the sampler."
        )
    return drawn


def _found(sampler: Iterable[Any], dataset: Any, what: str, in_batches: bool) -> tuple[list[Any], bool]:
    """The indices that two passes over a copy give, and whether in the same order."""
    name = type(sampler).__name__
    remedy = (
        f"give {what}= the samples that are trained on, as torch.utils.data.Subset(dataset, indices) or as tensors."
    )
    passes = []
    try:
        # Do not copy the data sets that the sampler refers to.
        held = [dataset, *(value for value in getattr(sampler, "__dict__", {}).values() if isinstance(value, Dataset))]
        duplicate = copy.deepcopy(sampler, {id(kept): kept for kept in held})
        for seed in _PASSES:
            with seeded_rng(seed):
                passes.append(_one_pass(duplicate, len(dataset), in_batches))
    except Exception as failure:  # a sampler of the user's may fail in any way
        raise TaskError(
            f"{what}: its sampler, a {name}, does not say which samples are trained on without being used up "
            f"({type(failure).__name__}: {failure}); {remedy}"
        ) from failure
    first, second = passes
    if len(set(first)) < len(first) or set(first) != set(second) or len(first) != len(second):
        raise TaskError(
            f"{what}: its sampler, a {name}, gives other samples in each pass or some of them repeatedly, so that the "
            f"set that is trained on cannot be told; {remedy}"
        )
    if first == second:
        return first, True
    with contextlib.suppress(TypeError):  # in one order, whatever the sampler's generator has come to
        first = sorted(first)
    return first, False


def _one_pass(sampler: Iterable[Any], n: int, in_batches: bool) -> list[Hashable]:
    """The indices of one epoch; of a sampler without an end, those until all have come once."""
    stream = itertools.chain.from_iterable(sampler) if in_batches else sampler
    # Twice the dataset and one more: a sampler that goes on has no end.
    indices = [
        index.item() if isinstance(index, torch.Tensor) else index for index in itertools.islice(stream, 2 * n + 1)
    ]
    if len(indices) <= 2 * n:
        return indices
    distinct = len(set(indices[:n]))
    once, again = indices[:distinct], indices[distinct : 2 * distinct]
    return once if set(once) == set(again) else indices
