"""Safetensors files."""

import math
from functools import partial
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from groktrace.importing.contents import CheckpointError, Contents, StoredTensor
from groktrace.run.files import DTYPES, open_plain

SUFFIX = ".safetensors"


def open_file(path: Path) -> Contents:
    """The tensors of a safetensors file.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        with open_plain(path), safe_open(path, framework="pt") as file:
            tensors = {}
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                part = file.get_slice(name)
                shape, dtype = tuple(part.get_shape()), DTYPES.get(part.get_dtype())
                if dtype is not None and math.prod(shape) * dtype.itemsize <= path.stat().st_size:
                    tensors[name] = StoredTensor(shape, dtype, partial(_read, path, name))
    except (OSError, SafetensorError) as failure:
        raise CheckpointError(f"{path}: not a whole safetensors file ({failure}); leave it out.") from failure
    return Contents(tensors, linkable=path)


def _read(path: Path, name: str) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)
    except (OSError, SafetensorError) as failure:
        raise CheckpointError(f"{path}: '{name}' cannot be read ({failure}).") from failure
