"""Training data of any common form as one batch.

The first axis of every tensor is that of the samples. In a Python list, each entry is

- a sample, where one of its tensors has no axes or their first sizes differ: as in a Dataset, they are stacked;
- a batch, where all its tensors are equally long and one has two axes or more: they are concatenated;
- one or the other, where all its tensors have one axis and the same length: then the model and the loss, which may
  take only one of the two, decide, and where they do not the list is refused.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from groktrace.errors import TaskError
from groktrace.run.batch import Batch, Structure, check_lengths, flatten, unflatten
from groktrace.run.isolation import seeded_rng
from groktrace.run.samplers import trained_indices
from groktrace.run.streams import first_entries, is_stream, known_length, reading

# A list of more tensors of one shape than this is no batch's list of inputs and targets.
MOST_LEAVES = 8
# Entries of a stream by which it is decided whether they are samples or batches.
HEAD = 4
# Samples on which a collate_fn is tried.
CHECKED = 3

# Whether the model and the loss accept a batch.
Fits = Callable[[Batch], bool]


def collect(
    data: Any,
    what: str,
    max_samples: int,
    seed: int,
    fits: Fits | None = None,
    n: int | None = None,
    endless: bool = False,
) -> tuple[Batch, int]:
    """Bring training data of any common form into one batch of at most `max_samples`.

    Args:
        data: a nesting of tensors (inputs, targets) or a dict of tensors; a list of such batches or of samples, see
            above; a map-style Dataset; or a DataLoader, whose dataset is read where its sampler leads, not its
            iterator. Of an IterableDataset, or a DataLoader over one, the first samples are taken.
        what: the argument's name, for messages.
        max_samples: larger sets are represented by a random subset of this size.
        seed: seed of the subset's choice, and of what a stream draws.
        fits: tells whether a list's entries can be meant as batches, or as samples.
        n: the true number of samples, where the data are a sample of them or a stream.
        endless: whether a stream may go on where `n` is not given; then the number of those taken stands for it.

    Returns:
        The batch, copied to the CPU, and the true number of samples.

    Raises:
        TaskError: the data have another form, no samples, or unequal lengths.
    """
    if is_stream(data):
        return _collect_stream(data, what, max_samples, seed, fits, n, endless)
    if isinstance(data, list) and data:
        data = _read_list(data, what, fits)
    if isinstance(data, tuple | list | Mapping | Tensor):
        tensors, structure = flatten(data)
        held = check_lengths(tensors, what)
        index = _choose(held, max_samples, seed)
        return Batch(tuple(_own(tensor.detach()[index]) for tensor in tensors), structure), _at_least(n, held)
    dataset, indices, merge = source(data, what)
    held = len(indices)
    if held == 0:
        raise TaskError(f"{what}: expected at least one sample, got an empty set.")
    index = _choose(held, max_samples, seed)
    wanted = indices if isinstance(index, slice) else [indices[i] for i in index.tolist()]

    def read(count: int) -> list[Any]:
        return [dataset[i] for i in wanted[:count]]

    return _collate(read, len(wanted), merge, what, seed), _at_least(n, held)


def _at_least(n: int | None, held: int) -> int:
    """The true number of samples, given how many the data hold.

    Raises:
        TaskError: it is smaller.
    """
    if n is not None and n < held:
        raise TaskError(
            f"n: expected the number of training samples of which train is a sample, at least the {held} that it "
            f"holds, got {n}; leave n out where train holds all."
        )
    return held if n is None else n


def _collate(
    read: Callable[[int], list[Any]], count: int, merge: Callable[[list[Any]], Any], what: str, seed: int
) -> Batch:
    """The first samples that `read` gives as one batch."""
    if merge is not default_collate:
        _check_collation(read, min(CHECKED, count), merge, what, seed)
    with seeded_rng(seed):
        items = _merge(read(count), merge, what)
    tensors, structure = flatten_merged(items)
    found = check_lengths(
        tensors, what if merge is default_collate else f"{what}, as collate_fn makes it of the samples"
    )
    if found != count:
        raise TaskError(
            f"{what}: expected collate_fn to make one entry of each of {count} samples, got {found}; give a "
            "dataset that holds what is trained on, or tensors."
        )
    return Batch(tuple(_own(tensor.detach()) for tensor in tensors), structure)


def _collect_stream(
    data: Any, what: str, max_samples: int, seed: int, fits: Fits | None, n: int | None, endless: bool
) -> tuple[Batch, int]:
    """The first samples of a stream; arguments and errors as those of `collect`."""
    batched = _gives_batches(data, what, seed, fits)
    length = n if n is not None or batched else known_length(data)
    most = max_samples if length is None else min(length, max_samples)
    beyond = length is None and not endless  # one more shows whether the stream ends
    merge = data.collate_fn if isinstance(data, DataLoader) else default_collate
    batch = None
    if batched:
        with reading(data, what, seed) as entries:
            converted = map(merge, entries) if isinstance(data, DataLoader) else entries
            batch = _first_of_batches(converted, what, most + beyond, fits)
        found = 0 if batch is None else len(batch)
    else:
        samples = first_entries(data, most + beyond, what, seed)
        found = len(samples)
        if 0 < found <= most:

            def read(count: int) -> list[Any]:
                return samples if count > CHECKED else first_entries(data, count, what, seed)

            batch = _collate(read, found, merge, what, seed)
    if found > most:
        raise TaskError(
            f"{what}: the stream does not end within {max_samples} samples and says no length; give n=, the number "
            "of samples that the training sees as its training set. The first of them are kept."
        )
    if batch is None:
        raise TaskError(f"{what}: expected at least one sample, got an empty stream.")
    if n is not None and found < most:
        raise TaskError(f"n: the stream ends after {found} samples, got n={n}; leave n out.")
    return batch, found if length is None or found < most else length


def _gives_batches(data: Any, what: str, seed: int, fits: Fits | None) -> bool:
    """Whether a stream gives batches, or what may be batches, in place of samples."""
    if isinstance(data, DataLoader):
        return data.batch_size is None
    kept, structure = _flatten_entries(first_entries(data, HEAD, what, seed), what)
    return bool(kept) and not _fit(kept, structure, what, fits, True) and _fit(kept, structure, what, fits, False)


def _first_of_batches(entries: Iterator[Any], what: str, most: int, fits: Fits | None) -> Batch | None:
    """The first samples of a stream whose entries are samples or batches, as those of a list are; None without any."""
    kept, structure = _flatten_entries(list(itertools.islice(entries, HEAD)), what)
    if not kept:
        return None
    samples = _are_samples(kept, structure, what, fits)
    held = len(kept) if samples else sum(len(tensors[0]) for tensors in kept)
    while held < most and (more := list(itertools.islice(entries, 1))):
        parts, other = _flatten_entries(more, what)
        if other != structure:
            raise _nested_differently(what)
        kept += parts
        held += 1 if samples else check_lengths(parts[0], what)
    return Batch(tuple(_own(tensor.detach()[:most]) for tensor in _join(kept, samples, what)), structure)


def _choose(n: int, max_samples: int, seed: int) -> Tensor | slice:
    if n <= max_samples:
        return slice(None)
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randperm(n, generator=generator, device="cpu")[:max_samples].sort().values


def _own(tensor: Tensor) -> Tensor:
    """Copy to the CPU in contiguous layout, so that the strides of a view do not enter the trace."""
    if tensor.layout != torch.strided:
        return tensor.cpu().clone()
    return tensor.cpu().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)


def source(data: Any, what: str) -> tuple[Any, Sequence[Any], Callable[[list[Any]], Any]]:
    """The dataset, the indices that are trained on, and the collate function.

    Args:
        data: a Dataset or a DataLoader.
        what: the argument's name, for errors.

    Raises:
        TaskError: it is neither, or its sampler says nothing of single samples.
    """
    loader = data if isinstance(data, DataLoader) else None
    if loader is not None and loader.batch_sampler is None:
        raise TaskError(
            f"{what}: a DataLoader with batch_size=None says nothing of samples; give its batches as a list, or "
            "its dataset."
        )
    dataset = data if loader is None else loader.dataset
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        iterator = ", which reading would use up; give list(itertools.islice(it, 64)), a list of its batches"
        raise TaskError(
            f"{what}: expected (inputs, targets) tensors, a dict of tensors, a list of batches, a Dataset with "
            f"a length, an IterableDataset, or a DataLoader over one, got {type(data).__name__}"
            f"{iterator if hasattr(data, '__next__') else ''}."
        )
    if loader is None:
        return dataset, range(len(dataset)), default_collate
    return dataset, trained_indices(loader, what), loader.collate_fn


def _merge(samples: list[Any], merge: Callable[[list[Any]], Any], what: str) -> Any:
    try:
        return merge(samples)
    except Exception as failure:
        raise TaskError(f"{what}: the samples cannot be put into one batch ({failure}).") from failure


def flatten_merged(items: Any) -> tuple[list[Tensor], Any]:
    """The tensors of what a collate function makes, and how they nest."""
    return flatten(tuple(items) if isinstance(items, list) else items)


def _check_collation(
    read: Callable[[int], list[Any]], most: int, merge: Callable[[list[Any]], Any], what: str, seed: int
) -> None:
    """Refuse a collate_fn whose samples are not the first axis: the axis that grows with their number.

    Raises:
        TaskError: the first axis of a tensor is another one.
    """
    shapes = []
    for count in (most - 1, most):
        if count > 0:
            with seeded_rng(seed):  # read anew: a collate_fn may use its samples up
                items = _merge(read(count), merge, what)
            shapes.append((count, [tuple(tensor.shape) for tensor in flatten_merged(items)[0]]))
    for leaf, shape in enumerate(shapes[-1][1]):
        if all(found[leaf][:1] == (count,) for count, found in shapes):
            continue
        sizes = [found[leaf] for _, found in shapes]
        axes = [axis for axis in range(len(shape)) if all(found[leaf][axis] == count for count, found in shapes)]
        place = f"axis {axes[0]} is that of the samples" if axes else "no axis is that of the samples"
        raise TaskError(
            f"{what}: in tensor {leaf} of what collate_fn makes {place}, of shape {' and '.join(map(str, sizes))} for "
            f"{' and '.join(str(count) for count, _ in shapes)} samples; the first axis has to be. Give a DataLoader "
            f"whose collate_fn puts the samples first (and transpose in batch_loss), or {what}= as tensors."
        )


def _read_list(data: list[Any], what: str, fits: Fits | None) -> Any:
    """Read a list as one nesting of tensors, by the rule in this module's docstring."""
    if isinstance(data[0], Tensor):
        alike = all(isinstance(t, Tensor) and (t.dtype, t.shape) == (data[0].dtype, data[0].shape) for t in data)
        if alike and len(data) > MOST_LEAVES:
            raise TaskError(
                f"{what}: a list of {len(data)} tensors of shape {tuple(data[0].shape)} may be one of samples or one "
                "of batches; torch.stack(list) makes one tensor of the first and torch.cat(list) of the second."
            )
        return data
    if not isinstance(data[0], tuple | list | Mapping):
        return data
    entries, structure = _flatten_entries(data, what)
    return unflatten(structure, _join(entries, _are_samples(entries, structure, what, fits), what))


def _flatten_entries(data: list[Any], what: str) -> tuple[list[list[Tensor]], Structure]:
    """The tensors of each entry of a list, and how all of them nest.

    Raises:
        TaskError: they nest differently.
    """
    parts = [flatten(_as_tensors(tuple(entry) if isinstance(entry, list) else entry)) for entry in data]
    structure: Structure = parts[0][1] if parts else 0
    if any(other != structure for _, other in parts):
        raise _nested_differently(what)
    return [tensors for tensors, _ in parts], structure


def _nested_differently(what: str) -> TaskError:
    return TaskError(f"{what}: the batches of the list are nested differently; give them one form.")


def _are_samples(entries: list[list[Tensor]], structure: Any, what: str, fits: Fits | None) -> bool:
    """Whether the entries of a list are samples; otherwise they are batches."""
    first = entries[0]
    alike = all(a.shape == b.shape for tensors in entries for a, b in zip(tensors, first, strict=True))
    if any(tensor.ndim == 0 for tensors in entries for tensor in tensors):
        return True
    uneven = next((tensors for tensors in entries if len({len(tensor) for tensor in tensors}) > 1), None)
    if uneven is not None:
        # Batches whose samples are another axis than the first are uneven too.
        hidden = any(len(a) > 1 and len(a) in b.shape[1:] for a in first for b in first)
        if not alike or hidden or (len(entries) == 1 and not _fit(entries, structure, what, fits, True)):
            check_lengths(uneven, what)
        return True
    sizes = [check_lengths(tensors, what) for tensors in entries]
    if not alike:
        flat = all(tensor.ndim == 1 for tensor in first)
        # Equal lengths and a shorter last one come of cutting a set into batches.
        if flat and not (len(set(sizes[:-1])) == 1 and sizes[-1] < sizes[0]):
            raise _ambiguous(what, f"{min(sizes)} to {max(sizes)}")
        return False
    as_samples, as_batches = (_fit(entries, structure, what, fits, samples) for samples in (True, False))
    if as_samples == as_batches and len(entries) > 1 and all(tensor.ndim == 1 for tensor in first):
        raise _ambiguous(what, str(sizes[0]))
    return as_samples and not as_batches


def _fit(entries: list[list[Tensor]], structure: Structure, what: str, fits: Fits | None, samples: bool) -> bool:
    """Whether the model and the loss take the entries, read as samples or as batches."""
    try:
        return fits is not None and fits(Batch(tuple(_join(entries, samples, what)), structure))
    except TaskError:  # they cannot be joined
        return False


def _ambiguous(what: str, sizes: str) -> TaskError:
    return TaskError(
        f"{what}: each entry of the list holds tensors of one axis and one length ({sizes}), which may be a sample or "
        "a batch. Entries are samples where one tensor has no axes or the lengths differ, and batches where one has "
        "two axes or more; make one tensor of all inputs and one of all targets, of samples by torch.stack and of "
        "batches by torch.cat."
    )


def _as_tensors(node: Any) -> Any:
    """Convert numbers and arrays in an entry of a list to tensors."""
    if isinstance(node, np.ndarray | np.number | np.bool_ | bool | int | float):
        return torch.as_tensor(node)
    if isinstance(node, Mapping):
        return {key: _as_tensors(item) for key, item in node.items()}
    if isinstance(node, tuple | list):
        items = [_as_tensors(item) for item in node]
        return items if isinstance(node, list) else tuple(items)
    return node


def _join(entries: list[list[Tensor]], samples: bool, what: str) -> list[Tensor]:
    """Stack samples, or concatenate batches, leaf by leaf."""
    join = torch.stack if samples else torch.cat
    try:
        return [join(column) for column in zip(*entries, strict=True)]
    except RuntimeError as failure:
        kind = "samples" if samples else "batches"
        raise TaskError(f"{what}: the {kind} of the list cannot be joined ({failure}).") from failure
