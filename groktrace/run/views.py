"""Tensors that share memory: views of a base, whose numbers count once."""

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from groktrace.errors import TaskError


@dataclass(frozen=True, eq=False)
class View:
    """How a tensor is computed from the base whose memory it shares.

    Attributes:
        base: the name of that one.
        shape: of the tensor.
        dims: the permutation of the base's dimensions, if it is a transposed base or the base itself.
        start: else, the offset of its contiguous elements in the base; None if they are not contiguous.
        index: else, the indices of its elements in the flattened base.
    """

    base: str
    shape: tuple[int, ...]
    dims: tuple[int, ...] | None = None
    start: int | None = None
    index: Tensor | None = None

    def of(self, base: Tensor) -> Tensor:
        """Compute the tensor from its base."""
        if self.dims is not None:
            return base.permute(self.dims)
        flat = base.reshape(-1)
        if self.start is not None:
            return flat[self.start : self.start + math.prod(self.shape)].view(self.shape)
        return flat[self.index.to(base.device)]


class OverlapError(TaskError):
    """Weights overlap partially, so that none is a view of the other."""


def find_views(tensors: Mapping[str, Tensor], first: Iterable[str] = ()) -> dict[str, View]:
    """Find the tensors that are views of others among them.

    Args:
        tensors: by name.
        first: names to prefer as bases among tensors of equal size, such as parameters.

    Raises:
        OverlapError: tensors that train overlap, and neither covers the other.
    """
    preferred = set(first)
    views: dict[str, View] = {}
    for group in _overlapping({name: tensor for name, tensor in tensors.items() if _has_memory(tensor)}):
        if not any(tensors[name].requires_grad for name in group):
            # What does not train is taken as it is; but what begins to train later needs its base.
            found = _try_relate(group, tensors, preferred)
        else:
            found = _relate(group, tensors, preferred)
        views |= found
    return views


def find_view(tensor: Tensor, bases: Mapping[str, Tensor]) -> View | None:
    """Find the base, among several, that a tensor is a view of; None if there is none.

    Raises:
        OverlapError: it lies partly in one's memory, and partly outside.
    """
    if not _has_memory(tensor):
        return None
    start, end = _extent(tensor)
    for name, base in bases.items():
        if _has_memory(base):
            low, high = _extent(base)
            if start < high and low < end and (view := _view(name, base, "a tensor of the loss", tensor)) is not None:
                return view
    return None


def _has_memory(tensor: Tensor) -> bool:
    # Pieces of sharded tensors, and tensors of other layouts, have none that could be told.
    if hasattr(tensor, "full_tensor") or tensor.layout != torch.strided or tensor.is_meta or not tensor.numel():
        return False
    try:
        return tensor.data_ptr() != 0
    except RuntimeError:  # a subclass without memory of its own
        return False


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The first and the last address of a tensor's memory."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _overlapping(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Group names of tensors whose memory ranges overlap, and those that overlap themselves."""
    extents = {name: (tensor.device, *_extent(tensor)) for name, tensor in tensors.items()}
    groups: list[list[str]] = []
    device, end = None, 0
    for name in sorted(extents, key=lambda name: (str(extents[name][0]), extents[name][1])):
        if groups and extents[name][0] == device and extents[name][1] < end:
            groups[-1].append(name)
            end = max(end, extents[name][2])
        else:
            groups.append([name])
            device, _, end = extents[name]
    order = {name: i for i, name in enumerate(tensors)}
    return [sorted(group, key=order.__getitem__) for group in groups if len(group) > 1 or repeats(tensors[group[0]])]


def repeats(tensor: Tensor) -> bool:
    """Whether elements of a tensor share their memory with one another."""
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _try_relate(group: list[str], tensors: Mapping[str, Tensor], preferred: set[str]) -> dict[str, View]:
    try:
        return _relate(group, tensors, preferred)
    except OverlapError:
        return {}


def _relate(group: list[str], tensors: Mapping[str, Tensor], preferred: set[str]) -> dict[str, View]:
    views: dict[str, View] = {}
    bases: list[str] = []
    # The largest first, so that a base comes before what it covers.
    for name in sorted(group, key=lambda name: (-tensors[name].numel(), name not in preferred)):
        if tensors[name].requires_grad and repeats(tensors[name]):
            raise OverlapError(
                f"weights: elements of '{name}' share their memory with one another (it is expanded); make the small "
                "tensor the parameter, and expand it in forward()."
            )
        for base in bases:
            if (view := _view(base, tensors[base], f"'{name}'", tensors[name])) is not None:
                break
        else:
            bases.append(name)
            continue
        if tensors[name].requires_grad and not tensors[base].requires_grad and view.dims is None:
            raise OverlapError(
                f"weights: '{name}', which trains, is a part of '{base}', which does not; make '{base}' of two "
                "parameters."
            )
        views[name] = view
    return views


def _view(name: str, base: Tensor, what: str, part: Tensor) -> View | None:
    """How a part is a view of its base; None if they only interleave.

    Raises:
        OverlapError: some of its elements lie in the base and others do not, or are cut out of its elements.
    """
    shape = tuple(part.shape)
    # Where it can be told from the strides, without a list of all elements.
    same = part.data_ptr() == base.data_ptr() and part.dtype == base.dtype
    if same and (dims := _transposition(base, part)) is not None:
        return View(name, shape, dims=dims)
    offset = part.data_ptr() - base.data_ptr()
    size = base.element_size()
    refusal = OverlapError(
        f"weights: {what} and '{name}' share some of their memory, and neither is a part of the other; make one "
        "parameter of them, and cut it up in forward()."
    )
    if part.dtype != base.dtype or offset % size:
        raise refusal
    offset //= size
    if base.is_contiguous() and part.is_contiguous() and 0 <= offset <= base.numel() - part.numel():
        return View(name, shape, start=offset)
    wanted = _places(part).add_(offset).flatten()
    places, order = _places(base).flatten().sort()
    found = torch.searchsorted(places, wanted).clamp_max(len(places) - 1)
    inside = places[found] == wanted
    if not inside.any():
        return None
    if not inside.all():
        raise refusal
    return View(name, shape, index=order[found].view(shape))


def _transposition(base: Tensor, part: Tensor) -> tuple[int, ...] | None:
    """The permutation of the base's dimensions that gives the part; None if there is none."""
    if base.dim() != part.dim() or base.numel() != part.numel():
        return None
    left = list(range(base.dim()))
    dims = []
    for size, stride in zip(part.shape, part.stride(), strict=True):
        fitting = (d for d in left if base.shape[d] == size and (size == 1 or base.stride(d) == stride))
        dim = next(fitting, None)
        if dim is None:
            return None
        left.remove(dim)
        dims.append(dim)
    return tuple(dims)


def _places(tensor: Tensor) -> Tensor:
    """Memory offsets of all elements, relative to the first."""
    places = torch.zeros((), dtype=torch.long, device="cpu")
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        steps = torch.arange(size, device="cpu") * stride
        places = places + steps.view(-1, *itertools.repeat(1, tensor.dim() - dim - 1))
    return places.expand(tensor.shape).clone()
