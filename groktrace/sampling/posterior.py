"""The loss of many weight vectors at once, and its gradient: the one place where networks are evaluated stacked."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Forward = Callable[[Mapping[str, Tensor], Sequence[Tensor]], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class WeightLayout:
    """Where each sampled tensor lies in a flat weight vector.

    Attributes:
        names: the sampled tensors, in order.
        shapes: their shapes.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def sizes(self) -> list[int]:
        """Number of elements of each tensor."""
        return [math.prod(shape) for shape in self.shapes]

    @property
    def size(self) -> int:
        """D, the number of sampled weights."""
        return sum(self.sizes)

    def flatten(self, weights: Mapping[str, Tensor]) -> Tensor:
        """One vector [D] of all sampled tensors, in float32 unless one of them is float64."""
        parts = [weights[name].reshape(-1) for name in self.names]
        dtype = torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32
        return torch.cat([part.to(dtype) for part in parts])

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """Named views of a vector [D]."""
        # One split, so that its backward is one concatenation instead of a full-size buffer per tensor.
        parts = flat.split(self.sizes)
        return {name: part.view(shape) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)}


@dataclass(frozen=True)
class StackedLoss:
    """L_n of R weight vectors at once.

    Attributes:
        forward: (weights, batch tensors) → (mean loss, outputs).
        layout: of the flat vectors.
        tensors: the samples, shared by all rows.
        fixed: what is not sampled (buffers, frozen weights), [R, ...] each.
        vectorised: False for networks that cannot be stacked: rows are then evaluated one by one.
    """

    forward: Forward
    layout: WeightLayout
    tensors: tuple[Tensor, ...]
    fixed: dict[str, Tensor]
    vectorised: bool = True

    def select(self, rows: Tensor) -> "StackedLoss":
        """The loss of some of the rows."""
        return replace(self, fixed={name: tensor[rows] for name, tensor in self.fixed.items()})

    def probe(self, weights: Tensor) -> "StackedLoss":
        """This loss, or one that goes row by row if the network cannot be stacked; `weights` is [R, D]."""
        rows = torch.zeros(2, dtype=torch.long, device=weights.device)
        try:
            self.select(rows).gradients(weights[rows])
        except (RuntimeError, ValueError):
            return replace(self, vectorised=False)
        return self

    def losses(self, weights: Tensor, index: Tensor | None = None) -> Tensor:
        """L of each row.

        Args:
            weights: [R, D].
            index: [R, B] samples for each row; None for all of them.

        Returns:
            [R] mean losses.
        """

        def one(flat: Tensor, fixed: dict[str, Tensor], tensors: tuple[Tensor, ...]) -> Tensor:
            return self.forward({**self.layout.unflatten(flat), **fixed}, tensors)[0]

        # The fused attention kernels can be neither stacked nor differentiated twice.
        with sdpa_kernel(SDPBackend.MATH):
            if self.vectorised:
                tensors = self.tensors if index is None else tuple(tensor[index] for tensor in self.tensors)
                shared = None if index is None else 0
                return torch.func.vmap(one, in_dims=(0, 0, shared))(weights, self.fixed, tensors)
            rows = []
            for r in range(len(weights)):
                tensors = self.tensors if index is None else tuple(tensor[index[r]] for tensor in self.tensors)
                rows.append(one(weights[r], {name: tensor[r] for name, tensor in self.fixed.items()}, tensors))
            return torch.stack(rows)

    def gradients(self, weights: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """L and ∇L of each row: ([R], [R, D])."""
        weights = weights.detach().requires_grad_(True)
        with torch.enable_grad():
            losses = self.losses(weights, index)
            # Rows are independent, so the gradient of the sum holds each row's own.
            (gradients,) = torch.autograd.grad(losses.sum(), weights)
        return losses.detach(), gradients
