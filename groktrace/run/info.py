"""What run.json says, checked before it is used."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from groktrace.errors import RunError
from groktrace.run import layout

MAX_DOUBTS, MAX_DOUBT = 1000, 2000  # marks, and characters of one


@dataclass(frozen=True)
class WeightSpec:
    """What run.json says of one tensor of the network.

    Attributes:
        shape: its shape.
        dtype: its dtype.
        trainable: whether training moves it at some time, and so whether sampling does.
        trainable_from: the step at which that was first seen.
        of_loss: whether it belongs to the loss, and not to the model.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    trainable: bool
    trainable_from: int = 0
    of_loss: bool = False


def check_format(info: Any, path: Path) -> None:
    """Check that run.json is of the format that is read here.

    Raises:
        RunError: it is of another.
    """
    if not isinstance(info, dict) or type(info.get("format")) is not int:
        raise RunError(f"{path}: not a groktrace run file.")
    if info["format"] != layout.FORMAT_VERSION:
        raise RunError(
            f"{path}: format {info['format']}, written by groktrace {info.get('groktrace', '?')}; "
            f"this groktrace reads format {layout.FORMAT_VERSION}. Install that version or a newer one."
        )


def check_info(info: Any, path: Path) -> dict[str, WeightSpec]:
    """Check run.json and return the network's tensors.

    Raises:
        RunError: it is of another format, or something in it is missing or of the wrong kind.
    """
    check_format(info, path)
    try:
        specs = {
            str(name): WeightSpec(
                _shape(entry["shape"]),
                _dtype(entry["dtype"]),
                _flag("trainable", entry["trainable"]),
                _step(entry.get("trainable_from", 0)),
                _flag("loss", entry.get("loss", False)),
            )
            for name, entry in info["weights"].items()
        }
        n, data = info["n"], info["data"]
        if not (n is None or (type(n) is int and 0 < n < 2**63)) or (data is not None and n is None):
            raise ValueError("n")
        if data is not None and not (isinstance(data, dict) and "train" in data):
            raise ValueError("data")
        doubts = info.get("doubts") or []
        if not isinstance(doubts, list) or len(doubts) > MAX_DOUBTS:
            raise ValueError("doubts")
        for mark in doubts:
            if type(mark["step"]) is not int or not (isinstance(mark["text"], str) and len(mark["text"]) <= MAX_DOUBT):
                raise ValueError("doubts")
    except (KeyError, TypeError, ValueError, AttributeError) as failure:
        raise RunError(f"{path}: damaged: {failure} is missing or not what it should be.") from failure
    return specs


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(size) is int and 0 <= size < 2**40 for size in value):
        raise ValueError(f"shape {value!r}")
    return tuple(value)


def _dtype(value: Any) -> torch.dtype:
    dtype = vars(torch).get(value) if isinstance(value, str) else None
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype {value!r}")
    return dtype


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} {value!r}")
    return value


def _step(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= layout.MAX_STEP:
        raise ValueError(f"trainable_from {value!r}")
    return value
