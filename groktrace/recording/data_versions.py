"""Whether the data that `watch` was given are written to later, which a recording does not follow."""

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor


class DataVersions:
    """The tensors of training and validation data, as often as they were written to when the recording began.

    Args:
        **data: what `watch` was given, by the name of its argument. Tensors are looked for in containers, and where
            datasets and loaders of PyTorch have them; what a dataset of another kind gives is not seen.
    """

    def __init__(self, **data: Any) -> None:
        self._seen = [
            (name, weakref.ref(tensor), version)
            for name, given in data.items()
            for tensor in tensors_within(given)
            if (version := _version(tensor)) is not None
        ]

    def report(self, warn_first: Callable[[str, str], bool], mark: Callable[[str], None]) -> None:
        """Say which of them were written to since.

        Args:
            warn_first: takes a kind of warning and its text; whether it is the first of its kind.
            mark: takes a text that the analysis repeats.
        """
        for name, reference, version in self._seen:
            tensor = reference()
            if tensor is None or _version(tensor) == version:
                continue
            text = (
                f"{name}: its tensors were written to after watch; the recording holds them as they were, and the "
                "analysis measures that loss. Call watch after the data are as they will be."
            )
            if warn_first(f"{name} changed", text):
                mark(text)


def tensors_within(data: Any) -> Iterator[Tensor]:
    """The tensors of which data are made.

    Args:
        data: tensors, containers of them, datasets and loaders.
    """
    if isinstance(data, Tensor):
        yield data
    elif isinstance(data, Mapping):
        for part in data.values():
            yield from tensors_within(part)
    elif isinstance(data, list | tuple):
        for part in data:
            yield from tensors_within(part)
    else:  # of a loader or a subset; of a TensorDataset; of several ones joined
        for name in ("dataset", "tensors", "datasets"):
            yield from tensors_within(vars(data).get(name, ()) if hasattr(data, "__dict__") else ())


def _version(tensor: Tensor) -> int | None:
    """How often a tensor was written to; None where PyTorch does not count that."""
    return None if tensor.is_inference() else tensor._version
