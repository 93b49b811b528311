"""One large network: w* as it was recorded, and gradients summed over micro-batches into one vector.

Beside w* itself, in its own dtype, only flat vectors that a caller makes exist: the network is evaluated on views of
one, gradients are added to another as they appear, and the rest is done in pieces that fit the processor's cache.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from groktrace.attention import twice_differentiable
from groktrace.sampling.gradient_accumulation import GradientAccumulation, leaf
from groktrace.sampling.posterior import FACTOR, StackedLoss
from groktrace.sampling.tuning import MEMORY
from groktrace.sampling.weights import as_reals

_FEW_SAMPLES = 4
# Of a loss that leaves out padding the mean over a batch is not quite that over its samples, but good enough to be that
# over batches; of one whose samples see each other it is another function.
_ROUGHLY = 0.3
# Random numbers come in blocks of so many, so that drawing them in pieces gives what drawing them at once does.
_BLOCK = 16


def as_float(tensor: Tensor) -> Tensor:
    """Half-precision weights in float32, as the sampled ones are; everything else as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


class LargeNetwork:
    """The loss of one network around w*.

    Args:
        loss: forward, layout and samples; its `fixed` is not used.
        weights: all tensors of the network by name. They are not copied where they are on the loss's device, and never
            changed.
    """

    def __init__(self, loss: StackedLoss, weights: Mapping[str, Tensor]) -> None:
        self.loss, self.layout, self.device = loss, loss.layout, loss.device
        sampled = [as_reals(weights[name].detach().to(self.device)) for name in loss.layout.names]
        self._anchor = [tensor.reshape(-1) for tensor in sampled]
        self.dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in sampled) else torch.float32
        self._factor = float(weights.get(FACTOR, 1.0))
        self._fixed = {
            name: as_float(tensor.detach().to(self.device))
            for name, tensor in weights.items()
            if name not in (*loss.layout.names, FACTOR)
        }

    @property
    def samples(self) -> int:
        """How many there are."""
        return len(self.loss.tensors[0])

    @property
    def longest_piece(self) -> int:
        """Elements of the longest of the pieces."""
        return min(self.layout.size, MEMORY.piece + _BLOCK)

    def vector(self) -> Tensor:
        """A new vector of w*, [D]."""
        out = torch.empty(self.layout.size, dtype=self.dtype, device=self.device)
        for place, anchor in self.pieces():
            out[place] = anchor
        return out

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """w* piece by piece: where each lies in a flat vector, and its values, which the next piece overwrites."""
        size = self.layout.size
        scratch = torch.empty(self.longest_piece, dtype=self.dtype, device=self.device)
        parts = iter(self._anchor)
        part, used, start = next(parts), 0, 0
        while start < size:
            stop = size if size - start < MEMORY.piece + _BLOCK else start + MEMORY.piece
            filled = 0
            while filled < stop - start:
                if used == len(part):
                    part, used = next(parts), 0
                    continue
                count = min(len(part) - used, stop - start - filled)
                scratch[filled : filled + count] = part[used : used + count]
                filled, used = filled + count, used + count
            yield slice(start, stop), scratch[:filled]
            start = stop

    def mean_loss(self, at: Tensor | None = None) -> float:
        """L at a flat vector, or at w*."""
        with torch.no_grad():
            return self._evaluate(self._named(at), None, lambda part: None)

    def norm_squared(self) -> float:
        """‖w*‖²."""
        return sum(float(anchor.square().sum(dtype=torch.float64)) for _, anchor in self.pieces())

    def add_gradient(
        self, out: Tensor, at: Tensor | None = None, index: Tensor | None = None, scale: float = 1.0
    ) -> float:
        """Add scale·∇L to a vector.

        Args:
            out: [D].
            at: where, [D]; None for w*.
            index: [B] samples; None for all of them.
            scale: a factor.

        Returns:
            L there, without the factor.
        """
        places = self.layout.places(out)
        leaves = {name: leaf(tensor, places[name]) for name, tensor in self._named(at).items()}
        with torch.enable_grad(), GradientAccumulation({id(tensor): places[name] for name, tensor in leaves.items()}):
            return self._evaluate(leaves, index, lambda part: (scale * part).backward())

    def add_hessian_product(self, out: Tensor, direction: Tensor) -> float:
        """Add ∇²L(w*)·v to a vector, by double backward.

        Args:
            out: [D].
            direction: v, [D].

        Returns:
            L there.

        Raises:
            RuntimeError: an operation has no second derivative.
        """
        weights = {name: place.requires_grad_() for name, place in self.layout.places(self.vector()).items()}
        leaves, along = list(weights.values()), list(self.layout.places(direction).values())

        def add(part: Tensor) -> None:
            gradients = torch.autograd.grad(part, leaves, create_graph=True, materialize_grads=True)
            slope = sum((gradient * v).sum() for gradient, v in zip(gradients, along, strict=True))
            if slope.requires_grad:
                # Complex weights are made of their leaves once for all parts.
                found = torch.autograd.grad(slope, leaves, retain_graph=True, materialize_grads=True)
                for place, product in zip(self.layout.places(out).values(), found, strict=True):
                    place.add_(product)

        with torch.enable_grad(), twice_differentiable():
            return self._evaluate(self.layout.of_places(weights), None, add)

    def of_one_sample(self, at: Tensor | None = None) -> Callable[..., Tensor]:
        """The loss of a single sample, without the factor, as a function of its tensors.

        Args:
            at: a flat vector, [D]; None for w*.
        """
        named = {**self._named(at), **self._fixed}
        return lambda *sample: self.loss.forward(named, [tensor.unsqueeze(0) for tensor in sample])[0]

    def _named(self, at: Tensor | None) -> dict[str, Tensor]:
        if at is not None:
            return self.layout.unflatten(at)
        named = {}
        for name, anchor, shape in zip(self.layout.names, self._anchor, self.layout.shapes, strict=True):
            if name in self.layout.complex_names:
                named[name] = torch.view_as_complex(anchor.view(*shape, 2))
            else:
                named[name] = as_float(anchor).view(shape)
        return named

    def _evaluate(self, named: dict[str, Tensor], index: Tensor | None, use: Callable[[Tensor], None]) -> float:
        """L as a sum over micro-batches, each of whose parts is given to `use`."""
        count = self.samples if index is None else len(index)
        total = 0.0
        for start in range(0, count, self.loss.micro_batch):
            chosen = slice(start, start + self.loss.micro_batch)
            tensors = [tensor[chosen] if index is None else tensor[index[chosen]] for tensor in self.loss.tensors]
            part = self.loss.forward({**named, **self._fixed}, tensors)[0] * (self._factor * len(tensors[0]) / count)
            use(part)
            total += float(part.detach())
        return total


def with_micro_batch(loss: StackedLoss, weights: Mapping[str, Tensor]) -> StackedLoss:
    """The loss as it is, or, where the network is large, with the number of samples that are evaluated at once.

    Args:
        loss: forward, layout and samples.
        weights: all tensors of one network by name.
    """
    numbers = sum(tensor.numel() for tensor in weights.values())
    samples = len(loss.tensors[0])
    alone = replace(loss, vectorised=False, micro_batch=samples)
    network = LargeNetwork(alone, weights)
    try:
        activations = _activation_bytes(network)
        if samples * activations > MEMORY.whole_bytes and _is_mean_over_samples(network, _ROUGHLY):
            order = shuffled(samples).to(loss.device)
            tensors = tuple(tensor[order] for tensor in loss.tensors)
            loss = replace(loss, sample_bytes=activations, tensors=tensors)
            alone = replace(loss, vectorised=False, micro_batch=samples)
            network = LargeNetwork(alone, weights)
        large = numbers >= MEMORY.large_weights or samples * activations >= MEMORY.large_activations
        divisible = large and _is_mean_over_samples(network)
    except Exception:  # the program takes one batch size only, or the loss fails on a single sample
        return alone if numbers >= MEMORY.large_weights else loss
    if not divisible:
        return alone if large else loss
    budget = max(MEMORY.micro_batch_share * 4 * numbers, MEMORY.micro_batch_bytes)
    together = max(1, min(samples, int(budget / max(activations, 1))))
    return replace(alone, is_sample_mean=True, micro_batch=together)


def shuffled(count: int) -> Tensor:
    """So many samples in one random order, which nothing but their number decides, [count]."""
    return torch.randperm(count, generator=torch.Generator("cpu").manual_seed(0), device="cpu")


def _activation_bytes(network: LargeNetwork) -> int:
    """What one sample's gradient keeps between forward and backward, beside weights and data."""
    known = {tensor.untyped_storage().data_ptr() for tensor in network.loss.tensors}
    named = {name: tensor.detach().requires_grad_() for name, tensor in network._named(None).items()}
    with torch.enable_grad():  # here, so that a whole with its parts counts as a weight
        weights = network.loss.layout.join({**named, **network._fixed})
    known |= {tensor.untyped_storage().data_ptr() for tensor in (*named.values(), *weights.values())}
    seen: dict[int, torch.UntypedStorage] = {}

    # The graph keeps nothing: a tensor would tie it into a ring that nothing frees. What was seen is held until it is
    # counted, so that no other takes its place in memory.
    def pack(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            seen[storage.data_ptr()] = storage

    first = [tensor[:1] for tensor in network.loss.tensors]
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        network.loss.forward(weights, first)
    return sum(storage.nbytes() for storage in seen.values())


def _is_mean_over_samples(network: LargeNetwork, tolerance: float = 1e-4) -> bool:
    """Whether a few samples' loss is the mean of their own losses, with so much of a relative difference."""
    few = tuple(tensor[:_FEW_SAMPLES] for tensor in network.loss.tensors)
    named = {**network._named(None), **network._fixed}
    with torch.no_grad():
        together = float(network.loss.forward(named, few)[0])
        singles = [
            float(network.loss.forward(named, [tensor[i : i + 1] for tensor in few])[0]) for i in range(len(few[0]))
        ]
    # At a perfect fit every loss is zero, which tells nothing.
    return together != 0 and abs(sum(singles) / len(singles) - together) <= tolerance * abs(together)
