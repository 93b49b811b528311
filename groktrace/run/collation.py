"""What reading and collating samples does to their values: drawn at random, or changed by the samples beside them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from groktrace.run.checks import LossProbe
from groktrace.run.collect import flatten_merged, source
from groktrace.run.isolation import seeded_rng
from groktrace.run.streams import is_stream

# Samples that are collated together, and those of them that are collated alone, too.
_TOGETHER, _ALONE = 32, 8
# Of a loss that is the same: padding is summed over in another order.
_SAME = 1e-3


def random_samples_note(data: Any, what: str) -> str | None:
    """Describe the problem where two samples change every time that they are read, as by augmentation.

    Args:
        data: what `collect` has taken.
        what: the argument's name, for the sentence.
    """
    if isinstance(data, tuple | list | Mapping | Tensor) or is_stream(data):
        return None
    reads = []
    try:
        dataset, indices, merge = source(data, what)
        for seed in (1, 2):
            with seeded_rng(seed):
                reads.append(flatten_merged(merge([dataset[i] for i in indices[:2]]))[0])
        if all(a.shape == b.shape and _equal(a, b) for a, b in zip(*reads, strict=True)):
            return None
    except Exception:  # a collate_fn that cannot take two samples, say; then nothing is known
        return None
    return (
        f"{what}: the samples are drawn at random each time that they are read, as by augmentation; the loss that is "
        "analysed is that of one draw of each."
    )


def company_note(data: Any, what: str, probe: LossProbe) -> str | None:
    """Describe the problem where samples have another loss beside others than alone, as by padding.

    All samples are collated into one batch, and padded to the longest of them; in the training those of each batch are.
    A model that leaves padding out gives a sample one loss either way.

    Args:
        data: what `collect` has taken.
        what: the argument's name, for the sentence.
        probe: the loss.
    """
    if isinstance(data, tuple | list | Mapping | Tensor) or is_stream(data):
        return None
    try:
        dataset, indices, merge = source(data, what)
        if merge is default_collate:
            return None
        count = min(_TOGETHER, len(indices))
        chosen = [indices[number * len(indices) // count] for number in range(count)]
        together = _collated(dataset, chosen, merge)
        whole, apart, padded = 0.0, 0.0, ""
        for place in range(0, len(chosen), max(1, len(chosen) // _ALONE)):
            single, row = _collated(dataset, [chosen[place]], merge), [part[place : place + 1] for part in together]
            if all(a.shape == b.shape and _equal(a, b) for a, b in zip(single, row, strict=True)):
                continue
            longer = [(len(a[0]), len(b[0])) for a, b in zip(single, row, strict=True) if a.ndim > 1]
            grown = max(longer, key=lambda sizes: sizes[1] - sizes[0], default=(0, 0))
            padded = padded or (f", as one padded from {grown[0]} to {grown[1]}" if grown[1] > grown[0] else "")
            alone = probe.loss(single)
            whole, apart = whole + abs(alone), apart + abs(probe.loss(row) - alone)
        if apart <= _SAME * whole:
            return None
    except Exception:  # a model that takes no single sample, say; then nothing is known
        return None
    share = f"by {100 * apart / whole:.2g} %{padded}"
    return (
        f"{what}: collate_fn gives a sample another loss beside others than alone ({share}). All samples are analysed "
        "as one batch, so that the recorded loss is another one than that of the training's batches; pad all batches "
        "to one length, or leave padding out in model and loss."
    )


def _collated(dataset: Any, indices: list[Any], merge: Any) -> list[Tensor]:
    """The tensors that a collate function makes of some samples, read anew, as it may use them up."""
    with seeded_rng(0):
        return flatten_merged(merge([dataset[i] for i in indices]))[0]


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
