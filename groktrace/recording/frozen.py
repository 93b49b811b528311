"""Detect changes of tensors that do not train and are kept once for all snapshots."""

from collections.abc import Mapping, Sequence, Set

import torch
from torch import Tensor

from groktrace.run import files

# Larger tensors are compared by a sample of elements at every snapshot, and wholly from time to time.
WHOLE_BYTES = 2**16
SAMPLE = 512


class FrozenTensors:
    """Samples and digests of tensors, to detect later changes.

    A tensor's version counter misses writes through `.data` and by custom kernels.

    Args:
        tensors: by name, as they were kept.
        step: the training step.
    """

    def __init__(self, tensors: Mapping[str, Tensor], step: int) -> None:
        self._probes = {name: _probe(tensor) for name, tensor in tensors.items()}
        large = {name: tensor for name, tensor in tensors.items() if tensor.nbytes > WHOLE_BYTES}
        self._digests = {name: files.digest(tensor) for name, tensor in large.items()}
        self._marks = {name: _mark(tensor) for name, tensor in large.items()}
        # The last step at which a tensor was known to be unchanged, in the order of whole comparisons.
        self._known = dict.fromkeys(large, step)

    @property
    def names(self) -> Set[str]:
        """Names of the unchanged ones."""
        return self._probes.keys()

    def compare(self, tensors: Mapping[str, Tensor], step: int, whole: bool = False) -> dict[str, int]:
        """Find changed tensors, and forget them.

        Args:
            tensors: the current ones, by name.
            step: the training step.
            whole: whether to compare all elements.

        Returns:
            The names of changed tensors, with the last step at which they are known to have been unchanged; the
            present one if the change was detected at once.
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
        """Stop comparing a tensor."""
        for kept in (self._probes, self._digests, self._marks, self._known):
            kept.pop(name, None)

    def _differing(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Names of tensors whose probes differ; one comparison a device."""
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
    """The bytes of a small tensor, or of elements spread over a large one."""
    with torch.inference_mode(False), torch.no_grad():
        part = tensor.detach()
        if part.nbytes > WHOLE_BYTES:
            part = _spread(part)
        # Copy also what is contiguous, as the tensor may change.
        return part.reshape(-1).clone().view(torch.uint8)


def _spread(tensor: Tensor) -> Tensor:
    if tensor.is_contiguous():
        # An odd stride, so that it meets all columns where their number is a power of two.
        return tensor.view(-1)[:: (tensor.numel() // SAMPLE) | 1]
    left = SAMPLE
    for dim, size in sorted(enumerate(tensor.shape), key=lambda item: item[1]):
        step = -(-size // max(left, 1))
        tensor = tensor[(slice(None),) * dim + (slice(None, None, step),)]
        left //= max(tensor.shape[dim], 1)
    return tensor


def _mark(tensor: Tensor) -> tuple[int, int, int | None]:
    """A mark that changes when a tensor is replaced, or modified in most ways."""
    return id(tensor), tensor.data_ptr(), None if tensor.is_inference() else tensor._version
