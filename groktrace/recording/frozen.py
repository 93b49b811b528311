"""Tensors that do not train, kept once, and whether they still are as they were kept."""

from collections.abc import Mapping, Sequence, Set

import torch
from torch import Tensor

from groktrace.run import files

# Larger tensors are compared by a sample at each snapshot, and wholly from time to time.
WHOLE_BYTES = 2**16
SAMPLE = 512


class FrozenTensors:
    """What is kept of tensors, to tell whether they were written to since.

    A tensor's version counter says nothing of what `.data` or a kernel of somebody's own wrote.

    Args:
        tensors: by name, as they were kept.
        step: the training step.
    """

    def __init__(self, tensors: Mapping[str, Tensor], step: int) -> None:
        self._probes = {name: _probe(tensor) for name, tensor in tensors.items()}
        large = {name: tensor for name, tensor in tensors.items() if tensor.nbytes > WHOLE_BYTES}
        self._digests = {name: files.digest(tensor) for name, tensor in large.items()}
        self._marks = {name: _mark(tensor) for name, tensor in large.items()}
        # Until when each is known to have been as it was kept; in the order in which they are compared wholly.
        self._known = dict.fromkeys(large, step)

    @property
    def names(self) -> Set[str]:
        """Those that are as they were kept."""
        return self._probes.keys()

    def compare(self, tensors: Mapping[str, Tensor], step: int, whole: bool = False) -> dict[str, int]:
        """Find tensors that were written to, which count no longer.

        Args:
            tensors: all that are left, by name, as they are now.
            step: the training step.
            whole: whether to look at all of every tensor.

        Returns:
            Their names, with the step until which each is known to have been as it was kept; the present one where
            the change was seen at once.
        """
        tensors = {name: tensors[name] for name in self._probes}
        found = dict.fromkeys(self._differing(tensors), step)
        moved = [name for name, mark in self._marks.items() if name not in found and _mark(tensors[name]) != mark]
        turns = [name for name in self._known if name not in found and name not in moved]
        for name in (*moved, *(turns if whole else turns[:1])):
            if files.digest(tensors[name]) == self._digests[name]:
                self._marks[name] = _mark(tensors[name])
                del self._known[name]
                self._known[name] = step
            else:
                found[name] = self._known[name] if name in turns else step
        for name in found:
            self.forget(name)
        return found

    def forget(self, name: str) -> None:
        """Compare a tensor no longer."""
        for kept in (self._probes, self._digests, self._marks, self._known):
            kept.pop(name, None)

    def _differing(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Those whose probes are others; one look for all that lie on one device."""
        groups: dict[torch.device, list[str]] = {}
        for name, tensor in tensors.items():
            groups.setdefault(tensor.device, []).append(name)
        found: list[str] = []
        for device, names in groups.items():
            for name in names:
                self._probes[name] = self._probes[name].to(device)
            now = [_probe(tensors[name]) for name in names]
            kept = [self._probes[name] for name in names]
            if not _equal(now, kept):
                found += [name for name, a, b in zip(names, now, kept, strict=True) if not torch.equal(a, b)]
        return found


def _equal(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    return [a.shape for a in left] == [b.shape for b in right] and torch.equal(torch.cat(left), torch.cat(right))


def _probe(tensor: Tensor) -> Tensor:
    """The bytes of a small tensor, and of elements spread over a large one."""
    with torch.inference_mode(False), torch.no_grad():
        part = tensor.detach()
        if part.nbytes > WHOLE_BYTES:
            part = _spread(part)
        # A copy, also of what is contiguous: it is to stay as it is.
        return part.reshape(-1).clone().view(torch.uint8)


def _spread(tensor: Tensor) -> Tensor:
    if tensor.is_contiguous():
        # Odd, so that columns of which there are a power of two are all met with.
        return tensor.view(-1)[:: (tensor.numel() // SAMPLE) | 1]
    left = SAMPLE
    for dim, size in sorted(enumerate(tensor.shape), key=lambda each: each[1]):
        step = -(-size // max(left, 1))
        tensor = tensor[(slice(None),) * dim + (slice(None, None, step),)]
        left //= max(tensor.shape[dim], 1)
    return tensor


def _mark(tensor: Tensor) -> tuple[int, int, int | None]:
    """What changes when a tensor is replaced, or written to in most ways."""
    return id(tensor), tensor.data_ptr(), None if tensor.is_inference() else tensor._version
