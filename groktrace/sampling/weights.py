"""Where the sampled weights of a network lie in one flat vector."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from groktrace.sampling.parts import Part

Forward = Callable[[Mapping[str, Tensor], Sequence[Tensor]], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class WeightLayout:
    """Where each sampled tensor lies in a flat weight vector; complex numbers count as two.

    Attributes:
        names: the sampled tensors, in order.
        shapes: their shapes.
        complex_names: those that are complex.
        parts: those that are parts of a tensor, by name.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    complex_names: tuple[str, ...] = ()
    parts: tuple[tuple[str, Part], ...] = field(default=(), repr=False)  # the names tell all of it

    @property
    def sizes(self) -> list[int]:
        """Real numbers in each tensor."""
        pairs = zip(self.names, self.shapes, strict=True)
        return [math.prod(shape) * (2 if name in self.complex_names else 1) for name, shape in pairs]

    @property
    def size(self) -> int:
        """D, the number of sampled weights."""
        return sum(self.sizes)

    def split(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All tensors of a network, and beside them the sampled parts, as views."""
        return {**weights, **{name: part.of(weights[part.tensor]) for name, part in self.parts}}

    def join(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `split` gives as the network takes it: wholes that hold what their parts do, if these are there."""
        named = dict(weights)
        for name, part in self.parts:
            if (values := named.pop(name, None)) is not None:
                whole = part.put(as_reals(named[part.tensor].to(values.dtype)), as_reals(values))
                named[part.tensor] = as_complex(whole) if values.is_complex() else whole
        return named

    def joined(self, forward: Forward) -> Forward:
        """The loss as a function of what `split` gives.

        Args:
            forward: of a network's own tensors.
        """
        return (lambda weights, tensors: forward(self.join(weights), tensors)) if self.parts else forward

    def flatten(self, weights: Mapping[str, Tensor]) -> Tensor:
        """One vector [D] of all sampled tensors, in float32 unless one of them is float64."""
        parts = [as_reals(weights[name]).reshape(-1) for name in self.names]
        dtype = torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32
        return torch.cat([part.to(dtype) for part in parts])

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """The named tensors of a vector [D]; views of it, but for complex ones."""
        return self.of_places(self.places(flat))

    def places(self, flat: Tensor) -> dict[str, Tensor]:
        """Named views of a vector [D], of complex tensors as pairs of real numbers."""
        # One split, so that its backward is one concatenation instead of a full-size buffer per tensor.
        parts = zip(self.names, flat.split(self.sizes), self.shapes, strict=True)
        return {n: part.view((*shape, 2) if n in self.complex_names else shape) for n, part, shape in parts}

    def of_places(self, places: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The named tensors of what `places` returns."""
        return {n: as_complex(part) if n in self.complex_names else part for n, part in places.items()}


def as_reals(tensor: Tensor) -> Tensor:
    """A complex tensor as pairs of real numbers; a real one as it is."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def as_complex(pairs: Tensor) -> Tensor:
    """The inverse of `as_reals`, for pairs wherever they lie; a view would need even places."""
    return torch.complex(pairs[..., 0], pairs[..., 1])
