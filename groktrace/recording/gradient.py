"""Whether two optimizers step with the same gradient, and so in one iteration of the script's loop."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def parameters_in(optimizer: Any) -> dict[int, Tensor]:
    """The parameters that an optimizer holds, by their ids."""
    return {id(parameter): parameter for group in optimizer.param_groups for parameter in group["params"]}


def shared_parameters(one: Any, other: Any) -> list[Tensor]:
    """The parameters that two optimizers hold, the smallest first."""
    held = parameters_in(other)
    return sorted((p for key, p in parameters_in(one).items() if key in held), key=lambda p: p.numel())


class UsedGradient:
    """The gradient with which an optimizer has just stepped.

    Of one parameter, the smallest that has one, as it is kept until the next step: were it freed, that of the next
    iteration might lie in the same memory and pass for it.

    Args:
        optimizer: the one that stepped.
        shared: parameters that it and others hold, the smallest first.

    Attributes:
        optimizer: the same.
    """

    def __init__(self, optimizer: Any, shared: Sequence[Tensor]) -> None:
        self.optimizer = optimizer
        self._parameter = next((p for p in shared if p.grad is not None), None)
        self._gradient = None if self._parameter is None else self._parameter.grad
        self._version = _version(self._gradient)

    def serves(self, optimizer: Any) -> bool:
        """Whether another optimizer is about to step with it: it was neither replaced nor written to since."""
        parameter, gradient = self._parameter, self._gradient
        if optimizer is self.optimizer or parameter is None or self._version is None:
            return False
        if parameter.grad is not gradient or _version(gradient) != self._version:
            return False
        return all(id(parameter) in parameters_in(holder) for holder in (self.optimizer, optimizer))


def _version(tensor: Tensor | None) -> int | None:
    """How often a tensor was written to; None where PyTorch does not count that."""
    return None if tensor is None or tensor.is_inference() else tensor._version
