"""What run.json says, checked before it is used."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import torch

from groktrace.errors import RunError
from groktrace.records import at_most, between, read_record
from groktrace.run import layout

MAX_DOUBTS, MAX_DOUBT = 1000, 2000  # entries, and characters of one


@dataclass(frozen=True)
class WeightSpec:
    """What run.json says of one tensor of the network.

    Attributes:
        shape: its shape.
        dtype: its dtype.
        trainable: whether training moves it at some time, and so whether sampling does.
        trainable_from: the step at which that was first seen.
        loss: whether it belongs to the loss, and not to the model.
    """

    shape: tuple[Annotated[int, between(0, 2**40)], ...]
    dtype: torch.dtype
    trainable: bool
    trainable_from: layout.Step = 0
    loss: bool = False


@dataclass(frozen=True)
class _Doubt:
    step: int
    text: Annotated[str, at_most(MAX_DOUBT)]


@dataclass(frozen=True)
class _Entries:
    """The other entries of run.json that readers rely on."""

    weights: Any  # one by one, as their names stay as they are
    n: Annotated[int, between(1)] | None
    data: dict[str, Any] | None
    doubts: Annotated[tuple[_Doubt, ...], at_most(MAX_DOUBTS)] | None = None


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
        entries = _read_known(_Entries, info)
        if not isinstance(weights := entries.weights, dict):
            raise ValueError("weights: expected an object")
        specs = {name: _read_known(WeightSpec, entry) for name, entry in weights.items()}
        if entries.data is not None and (entries.n is None or "train" not in entries.data):
            raise ValueError("data: expected training samples, and their number n")
    except ValueError as failure:
        raise RunError(f"{path}: damaged ({failure}).") from failure
    return specs


def _read_known(kind: Any, value: Any) -> Any:
    """A record of the entries that it has; run.json may hold others."""
    if isinstance(value, dict):
        value = {field.name: value[field.name] for field in fields(kind) if field.name in value}
    return read_record(kind, value)
