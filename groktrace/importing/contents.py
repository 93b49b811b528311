"""What a checkpoint holds, whatever its format: tensors and values by dotted path, read when they are asked for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from groktrace.errors import GroktraceError

# Bounds of nested values: a small pickle can refer to one list from many places.
MAX_DEPTH, MAX_ENTRIES = 16, 250_000


class CheckpointError(GroktraceError):
    """One checkpoint cannot be imported; the others can."""


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor of a checkpoint.

    Attributes:
        shape: its shape.
        dtype: its dtype.
        read: reads it; on the CPU, valid as long as the contents that it is of.
        container: the dotted path of the dict that holds it; "" for the whole checkpoint.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    container: str = ""


@dataclass(frozen=True, eq=False)
class Contents:
    """What a checkpoint holds.

    Attributes:
        tensors: by dotted path.
        values: numbers and texts by dotted path; some are read when they are looked up.
        metrics: numbers that the training logged at this step.
        linkable: a safetensors file that holds these tensors and nothing else, under these names; or None.
    """

    tensors: Mapping[str, StoredTensor]
    values: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    linkable: Path | None = None


def flatten(loaded: Any, path: Path) -> Contents:
    """Nested dicts and lists as tensors and values by dotted path; numbers in lists are left out.

    Args:
        loaded: what the checkpoint holds.
        path: of the checkpoint, for messages.

    Raises:
        CheckpointError: the nesting is too deep or too large.
    """
    tensors: dict[str, StoredTensor] = {}
    values: dict[str, Any] = {}
    left = MAX_ENTRIES

    def walk(node: Any, container: str, name: str, depth: int) -> None:
        nonlocal left
        left -= 1
        if left < 0 or depth > MAX_DEPTH:
            raise CheckpointError(f"{path}: nested deeper than {MAX_DEPTH}, or of more than {MAX_ENTRIES} entries.")
        if isinstance(node, Tensor):
            if node.layout == torch.strided and not node.is_meta and not node.is_quantized:
                tensors[name] = StoredTensor(tuple(node.shape), node.dtype, node.detach, container)
        elif isinstance(node, Mapping | list | tuple):
            for key, item in node.items() if isinstance(node, Mapping) else enumerate(node):
                if isinstance(node, Mapping) or isinstance(item, Tensor | Mapping | list | tuple):
                    walk(item, name, f"{name}.{key}" if name else str(key), depth + 1)
        elif isinstance(node, bool | int | float | str):
            values[name] = node

    walk(loaded, "", "", 0)
    return Contents(tensors, values)
