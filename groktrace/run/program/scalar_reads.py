"""Record and replay the Python numbers that a loss reads from tensors, as for a log: .item(), float(), if."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

READERS = ("item", "tolist", "__float__", "__int__", "__bool__", "__format__")


def variants(values: list[Any]) -> list[list[Any]]:
    """Other numbers that the loss might have read.

    Args:
        values: as `recorded` gave them.
    """
    return [[_other(value, i) for value in values] for i in range(4)]


def _other(value: Any, i: int) -> Any:
    if isinstance(value, list):
        return [_other(item, i) for item in value]
    if isinstance(value, bool):
        return value is (i == 2)
    if isinstance(value, int):
        return (3 * value + 1, value + 1, -value - 1, value + 2)[i]  # small, as the loss may loop over it
    return (3 * value + 1, value / 3 + 1e-3, -value - 1, 1e9 * (abs(value) + 1))[i]


@contextlib.contextmanager
def recorded() -> Iterator[list[Any]]:
    """Record the numbers that the user's code reads within."""
    values: list[Any] = []

    def read(tensor: Tensor, name: str, original: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        value = tensor.item() if name == "__format__" else original(tensor, *args)
        values.append(value)
        return format(value, *args) if name == "__format__" else value

    with _patched(read):
        yield values


@contextlib.contextmanager
def replayed(values: list[Any]) -> Iterator[None]:
    """Replay these numbers, cyclically, to the user's code within.

    Args:
        values: in order, as `recorded` gave them.
    """
    count = 0

    def read(tensor: Tensor, name: str, original: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        nonlocal count
        count += 1
        value = values[(count - 1) % len(values)]
        return format(value, *args) if name == "__format__" else value

    with _patched(read):
        yield


@contextlib.contextmanager
def _patched(read: Callable[[Tensor, str, Callable[..., Any], tuple[Any, ...]], Any]) -> Iterator[None]:
    own = {name: vars(Tensor).get(name) for name in READERS}

    def patch(name: str) -> None:
        original = getattr(Tensor, name)

        def reader(tensor: Tensor, *args: Any) -> Any:
            caller = str(sys._getframe(1).f_globals.get("__name__", "")).split(".")[0]
            if caller in ("torch", "groktrace"):
                return original(tensor, *args)
            return read(tensor, name, original, args)

        setattr(Tensor, name, reader)

    try:
        for name in READERS:
            patch(name)
        yield
    finally:
        for name, value in own.items():
            if value is None:
                delattr(torch.Tensor, name)
            else:
                setattr(Tensor, name, value)
