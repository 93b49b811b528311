"""Differences between a task that is given and the recorded one, in words."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from groktrace.analysis.results.identity import Behaviour, measure_behaviour
from groktrace.errors import GroktraceError
from groktrace.run.batch import Batch, Structure
from groktrace.run.store import RecordedData, Run
from groktrace.run.task import Task
from groktrace.sampling.weights import WeightLayout


def reminders(
    run: Run, given: Task, layout: WeightLayout, weights: Mapping[str, Tensor], other_data: bool = False
) -> list[str]:
    """A sentence for each way in which a task differs from the recording: in its data, in its loss.

    Args:
        run: opened.
        given: the task, with or without data.
        layout: the sampled weights.
        weights: tensors by name, of the run's first snapshot.
        other_data: whether other data were asked for than the task's.
    """
    try:
        data = run.data
    except GroktraceError:  # damaged; the task then stands in for it
        return []
    if data is None:
        return []
    found = []
    if given.train is not None and not other_data and (said := _different_data(given, data)) is not None:
        found.append(
            f"the task's data are others than those recorded ({said}); the task's are used. To use the recorded ones, "
            "leave train out of groktrace.Task.from_model."
        )
    if (said := _different_loss(run, given, data, layout, weights)) is not None:
        found.append(f"the task's loss is another than that recorded ({said}); the task's is used.")
    return found


def _different_data(given: Task, data: RecordedData) -> str | None:
    if given.n != data.n:
        return f"{given.n} training samples, not {data.n}"
    if len(given.train) != len(data.train):
        return f"{len(given.train)} training samples of {data.n} are kept, not {len(data.train)}"
    if not _same_samples(given.train, data.train):
        kept = f", or another choice of {len(data.train)} out of {data.n}" if len(data.train) < data.n else ""
        return f"as many training samples, but with other values{kept}"
    if given.val is not None and data.val is not None and not _same_samples(given.val, data.val):
        return f"validation samples: {len(given.val)} others than the {len(data.val)} recorded"
    return None


def _same_samples(one: Batch, other: Batch) -> bool:
    """Whether two batches hold the same samples, in whatever order."""
    leaves = [[batch.tensors[i] for i in _leaves(batch.structure)] for batch in (one, other)]
    if len(leaves[0]) != len(leaves[1]) or len(one) != len(other):
        return False
    pairs = [_alike(a, b) for a, b in zip(*leaves, strict=True)]
    if any(a.shape != b.shape for a, b in pairs):
        return False
    if all(torch.equal(a, b) for a, b in pairs):
        return True
    return _rows([a for a, _ in pairs]) == _rows([b for _, b in pairs])


def _leaves(structure: Structure) -> list[int]:
    """Numbers of the tensors, in an order that does not depend on that of a dict's keys."""
    if isinstance(structure, int):
        return [structure]
    ((kind, items),) = structure.items()
    inner = [items[key] for key in sorted(items)] if kind == "dict" else items
    return [leaf for item in inner for leaf in _leaves(item)]


def _alike(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the same dtype: the less precise of two floating ones, whose rounding makes no other samples."""
    if a.dtype == b.dtype:
        return a, b
    if a.is_floating_point() and b.is_floating_point():
        dtype = min(a.dtype, b.dtype, key=lambda dtype: (dtype.itemsize, str(dtype)))
    else:
        dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(dtype)


def _rows(tensors: list[Tensor]) -> Counter[Any]:
    """A digest of each sample, and how often it is there."""
    real = [torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor for tensor in tensors]
    columns = [tensor.flatten(1) if tensor.ndim > 1 else tensor[:, None] for tensor in real]
    columns = [column.contiguous().view(torch.uint8).numpy() for column in columns if column.shape[1]]
    found: Counter[Any] = Counter()
    for i in range(len(tensors[0])):
        state = hashlib.blake2b(digest_size=16)
        for column in columns:
            state.update(column[i])
        found[state.digest()] += 1
    return found


def _different_loss(
    run: Run, given: Task, data: RecordedData, layout: WeightLayout, weights: Mapping[str, Tensor]
) -> str | None:
    """What the task's loss gives on recorded samples, where the recorded program gives something else."""
    try:
        own = given.with_data(data.train, None, data.n)
        if given.train is not None:
            if given.train.structure != data.train.structure:
                return None
            own = replace(given, train=data.train, val=None, n=data.n)
        theirs = _without_outputs(measure_behaviour(run.task, layout, weights))
        found = measure_behaviour(own, layout, weights).difference(theirs)
    except Exception:  # no program, or the task takes no such samples; then nothing can be compared
        return None
    return None if found is None else f"{found[0]}: {found[1]:.8g}, not {found[2]:.8g}"


def _without_outputs(behaviour: Behaviour) -> Behaviour:
    """What the outputs are is a matter of how the task was written; the loss is not."""
    return replace(
        behaviour, numbers=tuple(number for number in behaviour.numbers if not number[0].startswith("outputs"))
    )
