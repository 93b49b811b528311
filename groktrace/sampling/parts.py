"""Parts of a tensor, such as `blocks.0.attn.qkv[0:64]`, that are sampled while the rest of it stays fixed.

A part is a tensor of its own beside the whole: `WeightLayout.split` cuts it out of a snapshot, and the forward function
of `WeightLayout.joined` puts it back. So nothing else, be it stacked or large, knows of parts.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from groktrace.errors import SettingsError

_TEXT = re.compile(r"(.+)\[([^\[\]]*)\]", re.DOTALL)
_AXIS = re.compile(r" *(?:(\d{0,18}) *(:) *(\d{0,18})|(\d{1,18})) *", re.ASCII)
FORM = "whole numbers and slices of them, one an axis at most, such as W[0:64], W[:, 3] or W[0:4, 8:16]"


@dataclass(frozen=True)
class Part:
    """A block of a tensor.

    Attributes:
        tensor: the name of the whole.
        ranges: begin and end on each axis, from the first; later axes are whole.
    """

    tensor: str
    ranges: tuple[tuple[int, int], ...]

    def of(self, whole: Tensor) -> Tensor:
        """The block, a view.

        Args:
            whole: the tensor.
        """
        for axis, (begin, end) in enumerate(self.ranges):
            whole = whole.narrow(axis, begin, end - begin)
        return whole

    def put(self, whole: Tensor, values: Tensor, axis: int = 0) -> Tensor:
        """The tensor with other values in the block; a copy, which is differentiated and stacked like any other.

        Args:
            whole: the tensor, of real numbers.
            values: of the block.
            axis: from which on the block is less than the whole.
        """
        if axis == len(self.ranges):
            return values
        begin, end = self.ranges[axis]
        inner = self.put(whole.narrow(axis, begin, end - begin), values, axis + 1)
        return inner if inner.shape == whole.shape else torch.slice_scatter(whole, inner, axis, begin, end)

    def overlaps(self, other: "Part") -> bool:
        """Whether two blocks of one tensor have an element in common.

        Args:
            other: of the same tensor.
        """
        # Where one says nothing of an axis it has all of it.
        return all(max(a, c) < min(b, d) for (a, b), (c, d) in zip(self.ranges, other.ranges, strict=False))


def parse_part(text: str) -> tuple[str, tuple[tuple[int | None, int | None], ...]] | None:
    """Read a part as it is written: the tensor, and begin and end on each axis; None for what is not written so.

    Args:
        text: such as "W[0:4, 3]".
    """
    found = _TEXT.fullmatch(text)
    if found is None:
        return None
    axes = [_AXIS.fullmatch(axis) for axis in found[2].split(",")]
    ranges: list[tuple[int | None, int | None]] = []
    for axis in axes:
        if axis is None:
            return None
        begin, colon, end, single = axis.groups()
        if colon:
            ranges.append((int(begin) if begin else None, int(end) if end else None))
        else:
            ranges.append((int(single), int(single) + 1))
    return found[1], tuple(ranges)


def cut(name: str, shape: Sequence[int], ranges: Sequence[tuple[int | None, int | None]]) -> Part:
    """A part of a tensor of known shape.

    Args:
        name: of the tensor.
        shape: of the tensor.
        ranges: see `parse_part`.

    Raises:
        SettingsError: the tensor has no such part.
    """
    if len(ranges) > len(shape):
        raise SettingsError(
            f"parameters: '{name}' has {len(shape)} ax{'is' if len(shape) == 1 else 'es'} (shape {list(shape)}), "
            f"but {len(ranges)} are given."
        )
    found = []
    for axis, ((begin, end), size) in enumerate(zip(ranges, shape, strict=False)):
        begin, end = begin or 0, size if end is None else end
        if not begin < end <= size:
            raise SettingsError(
                f"parameters: '{name}' has no {begin}:{end} on axis {axis}, whose length is {size}; expected "
                "0 <= begin < end <= length."
            )
        found.append((begin, end))
    while found and found[-1] == (0, shape[len(found) - 1]):
        found.pop()
    return Part(name, tuple(found))


def part_name(part: Part, shape: Sequence[int]) -> str:
    """A part as it is written, in one way only; the tensor's name for all of it.

    Args:
        part: of a tensor.
        shape: of the tensor.
    """
    texts = [
        ":" if whole == (0, size) else f"{whole[0]}:{whole[1]}" for whole, size in zip(part.ranges, shape, strict=False)
    ]
    return f"{part.tensor}[{', '.join(texts)}]" if texts else part.tensor


def part_shape(part: Part, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a part.

    Args:
        part: of a tensor.
        shape: of the tensor.
    """
    return (*(end - begin for begin, end in part.ranges), *shape[len(part.ranges) :])
