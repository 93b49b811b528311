"""Samples in a file of their own, in the form of a run's data.safetensors: other data to measure a run on."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from groktrace.errors import RunError, SettingsError, TaskError
from groktrace.run import layout
from groktrace.run.batch import Batch, Structure, check_lengths, unflatten
from groktrace.run.collect import collect
from groktrace.run.files import DTYPES, parse_json, read_tensors, sync_folder, write_tensors
from groktrace.run.task import MAX_SAMPLES

_PREFIX = "train."
_STRUCTURE, _SAMPLES = "structure", "samples"


def save_data(path: str | Path, data: Any, *, n: int | None = None) -> None:
    """Write samples to a file that `groktrace analyze RUN --data` takes.

    Args:
        path: of the file, which is replaced.
        data: the same kinds as `train` of `groktrace.watch`; of more than 8192 samples a random subset is kept.
        n: how many samples they stand for; by default as many as `data` has.

    Raises:
        TaskError: the data have another form, no samples, or unequal lengths.
        SettingsError: they cannot be stored, or the file cannot be written.
    """
    batch, found = collect(data, "data", MAX_SAMPLES, 0)
    try:
        write_data(Path(path), batch, check_n(n, found))
    except OSError as failure:
        raise SettingsError(f"{path}: cannot be written ({failure.strerror or failure}).") from failure


def write_data(path: Path, batch: Batch, n: int) -> None:
    """Write samples, whole or not at all.

    Args:
        path: of the file.
        batch: the samples.
        n: how many they stand for.

    Raises:
        SettingsError: they cannot be stored.
        OSError: the file system refused.
    """
    for tensor in batch.tensors:
        if tensor.dtype not in {*DTYPES.values(), torch.complex128} or tensor.layout != torch.strided:
            raise SettingsError(f"data: {tensor.dtype} ({tensor.layout}) cannot be stored; convert them.")
    tensors = {f"{_PREFIX}{i}": tensor.contiguous() for i, tensor in enumerate(batch.tensors)}
    about = {"groktrace": str(layout.FORMAT_VERSION), _STRUCTURE: json.dumps(batch.structure), _SAMPLES: str(n)}
    write_tensors(path, tensors, about)
    sync_folder(path.parent)


def read_data(path: Path) -> tuple[tuple[Tensor, ...], Structure | None, int]:
    """The tensors of a file that `save_data` wrote, how they nest, and how many samples they stand for.

    A run's own data.safetensors is one too; how its tensors nest stands elsewhere.

    Args:
        path: of the file.

    Raises:
        RunError: it cannot be read, or holds no samples.
    """
    try:
        tensors, about = read_tensors(path)
        own = {name: tensor for name, tensor in tensors.items() if name.startswith(_PREFIX)}
        leaves = tuple(own[f"{_PREFIX}{i}"] for i in range(len(own)))
        stored = check_lengths(leaves, "train")
        structure = parse_json(about[_STRUCTURE].encode()) if _STRUCTURE in about else None
        if structure is not None:
            unflatten(structure, leaves)
        return leaves, structure, check_n(int(about.get(_SAMPLES, stored)), stored)
    except (RunError, SettingsError, TaskError, KeyError, ValueError, RecursionError) as failure:
        said = str(failure).rstrip(".") if not isinstance(failure, KeyError) else f"tensor {failure} is missing"
        if str(path) not in said:
            said = f"{path}: {said}"
        raise RunError(f"{said}. Expected a file that groktrace.save_data(path, data) wrote.") from failure


def check_n(n: int | None, stored: int) -> int:
    """How many samples some stand for.

    Raises:
        SettingsError: fewer than there are.
    """
    if n is None:
        return stored
    if isinstance(n, bool) or not isinstance(n, int) or n < stored:
        raise SettingsError(f"n: expected a whole number of at least {stored}, as many as there are, got {n!r}.")
    return n


def take_data(data: Any, what: str, recorded: Batch | None, n: int | None = None) -> tuple[Batch, int]:
    """Samples like those of a run, and how many they stand for.

    Args:
        data: the same kinds as `train` of `groktrace.watch`, or the path of a file that `save_data` wrote.
        what: what to call them in messages.
        recorded: the run's; None where it has none to compare with.
        n: how many they stand for; None for as many as there are, or as the file says.

    Raises:
        TaskError: they have another form than the run's, or none.
        RunError: the file cannot be read.
        SettingsError: `n` is less than there are.
    """
    if isinstance(data, str | Path):
        tensors, structure, found = read_data(Path(data))
        if structure is None:
            if recorded is None:
                raise TaskError(
                    f"{what}: the file does not say how its tensors nest; write it with groktrace.save_data."
                )
            if len(tensors) != len(recorded.tensors):
                raise TaskError(f"{what}: expected {len(recorded.tensors)} tensors, as recorded, got {len(tensors)}.")
            structure = recorded.structure
        batch = Batch(tensors, structure)
    else:
        batch, found = collect(data, what, MAX_SAMPLES, 0, lambda some: recorded is not None and _fits(some, recorded))
    batch = batch if recorded is None else _like(batch, recorded, what)
    return batch, found if n is None else check_n(n, len(batch))


def _fits(batch: Batch, recorded: Batch) -> bool:
    try:
        _like(batch, recorded, "")
    except TaskError:
        return False
    return True


def _like(batch: Batch, recorded: Batch, what: str) -> Batch:
    """The samples with their tensors in the order of the recorded ones.

    Raises:
        TaskError: they are nested otherwise, or of another shape or dtype.
    """
    order = _order(batch.structure, recorded.structure)
    if order is None or len(order) != len(recorded.tensors):
        raise TaskError(
            f"{what}: expected samples nested like those recorded, {recorded.structure}, got {batch.structure}."
        )
    tensors = [batch.tensors[order[i]] for i in range(len(recorded.tensors))]
    for i, (tensor, other) in enumerate(zip(tensors, recorded.tensors, strict=True)):
        if tensor.dtype != other.dtype or tensor.shape[1:] != other.shape[1:]:
            raise TaskError(
                f"{what}: tensor {i} is {_sample(tensor)}, but that of the recorded training samples "
                f"is {_sample(other)}; only their number may differ."
            )
    return Batch(tuple(tensors), recorded.structure)


def _order(structure: Structure, recorded: Structure) -> dict[int, int] | None:
    """The number of a tensor for each recorded one's; None where they are nested otherwise."""
    if isinstance(structure, int) and isinstance(recorded, int):
        return {recorded: structure}
    if isinstance(structure, int) or isinstance(recorded, int):
        return None
    ((kind, items),), ((other, others),) = structure.items(), recorded.items()
    if (kind == "dict") != (other == "dict") or len(items) != len(others):
        return None
    if kind == "dict" and items.keys() != others.keys():
        return None
    pairs = [(items[key], others[key]) for key in others] if kind == "dict" else list(zip(items, others, strict=True))
    found: dict[int, int] = {}
    for pair in pairs:
        part = _order(*pair)
        if part is None:
            return None
        found |= part
    return found


def _sample(tensor: Tensor) -> str:
    shape: Sequence[Any] = ("samples", *tensor.shape[1:])
    return f"{str(tensor.dtype).removeprefix('torch.')}[{', '.join(map(str, shape))}]"
