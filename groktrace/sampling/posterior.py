"""The loss of many weight vectors at once, and its gradient: the one place where networks are evaluated stacked."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from groktrace.attention import twice_differentiable
from groktrace.sampling.operations import CannotPlanError
from groktrace.sampling.plan import Plan, run
from groktrace.sampling.tuning import MEMORY
from groktrace.sampling.weights import Forward, WeightLayout

_FEW_SAMPLES = 8
# Among the tensors that are not sampled: a factor of the row's loss.
FACTOR = "factor of the loss"


@dataclass(frozen=True)
class StackedLoss:
    """L_n of R weight vectors at once.

    Attributes:
        forward: (weights, batch tensors) → (mean loss, outputs).
        layout: of the flat vectors.
        tensors: the samples, shared by all rows.
        fixed: what is not sampled (buffers, frozen weights), [R, ...] each.
        vectorised: False for networks that cannot be stacked: rows are then evaluated one by one.
        row_bytes: memory that one row's gradient takes with all samples; None where it was not measured.
        sample_bytes: what one sample's gradient keeps between forward and backward, where only some of the samples are
            used at a time; None where all are. They lie in a random order, and the first of them are a subset.
        is_sample_mean: whether it was found to be a mean over samples of losses of single samples.
        heavy: the first so many samples that an index names for a row have large losses and stand for themselves alone;
            the others are weighted to stand for all the rest.
        micro_batch: samples evaluated at once where networks are large and go alone, in place (`network`, `large`);
            None where they are stacked.
        plans: recorded gradients by samples and shapes, shared by all losses made of this one; of one thread.
    """

    forward: Forward
    layout: WeightLayout
    tensors: tuple[Tensor, ...]
    fixed: dict[str, Tensor]
    vectorised: bool = True
    row_bytes: int | None = None
    sample_bytes: int | None = None
    is_sample_mean: bool = False
    heavy: int = 0
    micro_batch: int | None = None
    plans: dict[Any, Plan | None] = field(default_factory=dict, repr=False, compare=False)

    @property
    def device(self) -> torch.device:
        """Where the samples lie and everything is computed."""
        return self.tensors[0].device

    def select(self, rows: Tensor) -> "StackedLoss":
        """The loss of some of the rows."""
        return replace(self, fixed={name: tensor[rows] for name, tensor in self.fixed.items()})

    def subset(self, count: int | None, batch_size: int | None = None, heavy: int = 0) -> "StackedLoss":
        """The loss of the first samples, as it is evaluated quickest.

        Args:
            count: how many; None for all.
            batch_size: samples a gradient; None for all of these.
            heavy: how many of a batch stand for themselves alone.
        """
        if self.sample_bytes is None:
            return self
        tensors = tuple(tensor[:count] for tensor in self.tensors)
        together = min(batch_size or len(tensors[0]), len(tensors[0]))
        stacked = self.vectorised and together * self.sample_bytes <= MEMORY.stacked_bytes
        row = len(tensors[0]) * self.sample_bytes
        return replace(self, tensors=tensors, vectorised=stacked, row_bytes=row, heavy=heavy)

    def probe(self, weights: Tensor) -> "StackedLoss":
        """This loss, with what one gradient tells of it: whether rows can be stacked, and how much memory one takes.

        Args:
            weights: of any of the rows, [1, D].
        """
        seen: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        # An operation that vmap carries out row by row, as a GRU's cell, would warn at every call.
        torch._C._functorch._set_vmap_fallback_warning_enabled(False)
        if self.sample_bytes is not None:
            return self._probe_few(weights)
        twice = torch.zeros(2, dtype=torch.long, device=weights.device)
        first = self.select(twice[:1])
        try:
            self.select(twice)._differentiate(weights[twice])
        except (RuntimeError, ValueError):
            first = replace(first, vectorised=False)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            first._differentiate(weights)
        for shared in self.tensors:
            seen.pop(shared.untyped_storage().data_ptr(), None)
        found = replace(self, vectorised=first.vectorised, row_bytes=sum(seen.values()))
        return replace(found, is_sample_mean=found.select(twice[:1])._finds_sample_mean(weights))

    def _few(self) -> "StackedLoss":
        """The loss of the first few samples."""
        return replace(self, tensors=tuple(tensor[:_FEW_SAMPLES] for tensor in self.tensors))

    def _probe_few(self, weights: Tensor) -> "StackedLoss":
        """The same from a few samples."""
        few, twice = self._few(), torch.zeros(2, dtype=torch.long, device=weights.device)
        few.select(twice[:1])._differentiate(weights)
        try:
            few.select(twice)._differentiate(weights[twice])
        except (RuntimeError, ValueError):
            few = replace(few, vectorised=False)
        found = few.select(twice[:1])._finds_sample_mean(weights)
        return replace(self, vectorised=few.vectorised, is_sample_mean=found)

    def losses(self, weights: Tensor, index: Tensor | None = None) -> Tensor:
        """L of each row.

        Args:
            weights: [R, D].
            index: [R, B] samples for each row; None for all of them.

        Returns:
            [R] mean losses.
        """
        strata = self._strata(index)

        def one(flat: Tensor, fixed: dict[str, Tensor], tensors: tuple[Tensor, ...]) -> Tensor:
            named = {**self.layout.unflatten(flat), **fixed}
            if len(strata) == 1:
                return self._forward(named, tensors)
            parts = [(share, tuple(tensor[chosen] for tensor in tensors)) for share, chosen in strata]
            return sum(share * self._forward(dict(named), part) for share, part in parts)

        if self.vectorised:
            tensors = self.tensors if index is None else tuple(tensor[index] for tensor in self.tensors)
            shared = None if index is None else 0
            return torch.func.vmap(one, in_dims=(0, 0, shared))(weights, self.fixed, tensors)
        return torch.stack([one(weights[r], *self._row(r, index)) for r in range(len(weights))])

    def _strata(self, index: Tensor | None) -> list[tuple[float, slice]]:
        """Samples of a row that are evaluated together, and what they count in its mean loss."""
        if index is None or not self.heavy:
            return [(1.0, slice(None))]
        share = self.heavy / len(self.tensors[0])
        return [(share, slice(self.heavy)), (1 - share, slice(self.heavy, None))]

    def _row(self, r: int, index: Tensor | None) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        """What one row is evaluated with besides its weights: what is not sampled, and the samples."""
        tensors = self.tensors if index is None else tuple(tensor[index[r]] for tensor in self.tensors)
        return {name: tensor[r] for name, tensor in self.fixed.items()}, tensors

    def _forward(self, weights: dict[str, Tensor], tensors: Sequence[Tensor]) -> Tensor:
        factor = weights.pop(FACTOR, None)
        loss = self.forward(weights, tensors)[0]
        return loss if factor is None else factor * loss

    def gradient_bytes(self, batch_size: int | None = None) -> int:
        """About how much memory one row's gradient takes, with so many samples; None for all."""
        share = 1.0 if batch_size is None else min(1.0, batch_size / len(self.tensors[0]))
        return int(share * (self.row_bytes or 0))

    def sample_losses(self, weights: Tensor, most: int = MEMORY.single_samples) -> Tensor:
        """The losses of single samples, evenly spread over all; for losses that are a mean over samples.

        Args:
            weights: [R, D].
            most: samples at most; never more than 1024.

        Returns:
            [R, m].
        """

        def one(flat: Tensor, fixed: dict[str, Tensor], tensors: tuple[Tensor, ...]) -> Tensor:
            alone = tuple(tensor.unsqueeze(0) for tensor in tensors)
            return self._forward({**self.layout.unflatten(flat), **fixed}, alone)

        tensors = tuple(tensor[self._spread(most)] for tensor in self.tensors)
        with torch.no_grad():
            of_samples = torch.func.vmap(one, in_dims=(None, None, 0))
            return torch.func.vmap(of_samples, in_dims=(0, 0, None))(weights, self.fixed, tensors)

    def ranks(self, weights: Tensor) -> Tensor:
        """The samples of each row by their losses, the largest first; for losses that are a mean over samples.

        Each row's are found alone, so that they do not depend on what it is stacked with.

        Args:
            weights: [R, D].

        Returns:
            [R, N].
        """
        size = min(MEMORY.single_samples, max(1, MEMORY.part_bytes // (self.sample_bytes or 1)))
        orders = []
        for r in range(len(weights)):
            alone = self.select(torch.tensor([r], device=self.device))
            parts = []
            for start in range(0, len(self.tensors[0]), size):
                part = tuple(tensor[start : start + size] for tensor in self.tensors)
                parts.append(replace(alone, tensors=part).sample_losses(weights[r : r + 1])[0])
            orders.append(torch.cat(parts).argsort(descending=True, stable=True))
        return torch.stack(orders)

    def _spread(self, most: int = MEMORY.single_samples) -> Tensor:
        count = len(self.tensors[0])
        return torch.linspace(0, count - 1, min(count, most, MEMORY.single_samples), device=self.device).long()

    def _finds_sample_mean(self, weights: Tensor) -> bool:
        if not self.vectorised:
            return False
        weights = 1.1 * weights + 0.01  # at a perfect fit every loss is zero, and so are its parts
        try:
            singles = self.sample_losses(weights).mean()
            together = self.losses(weights, self._spread()[None])[0]
        except (RuntimeError, ValueError):
            return False
        return bool((singles - together).abs() <= 1e-4 * together.abs())

    def gradients(self, weights: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """L and ∇L of each row.

        Args:
            weights: [R, D].
            index: [R, B] samples for each row; None for all of them.

        Returns:
            [R] and [R, D].
        """
        weights = weights.detach()
        plan = self._plan(weights, index)
        if plan is None:
            return self._differentiate(weights, index)
        losses, gradients = plan(*self._arguments(weights, index))
        return losses.clone(), gradients.clone()

    def bound(self, weights: Tensor, gradients: Tensor, index: Tensor | None = None) -> Callable[[], Tensor]:
        """L of each row as a function of what some tensors hold when it is called, for many calls.

        Args:
            weights: [R, D], contiguous.
            gradients: [R, D], contiguous; each call writes ∇L there.
            index: [R, B] samples for each row; None for all of them.

        Returns:
            A function that returns losses, [R], which its next call overwrites.
        """
        plan = self._plan(weights, index)
        if plan is not None:
            losses = torch.empty_like(plan.results[0])
            calls = plan.bind(self._arguments(weights, index), (losses, gradients))

            def replay() -> Tensor:
                run(calls)
                return losses

            return replay

        if not self.vectorised:
            return partial(self._differentiate_rows, weights, gradients, index)

        def differentiate() -> Tensor:
            losses, found = self._differentiate(weights, index)
            gradients.copy_(found)
            return losses

        return differentiate

    def _differentiate(self, weights: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not self.vectorised:
            gradients = torch.empty_like(weights)
            return self._differentiate_rows(weights, gradients, index), gradients
        weights = weights.detach().requires_grad_(True)
        with torch.enable_grad():
            losses = self.losses(weights, index)
            # Rows are independent, so the gradient of the sum holds each row's own.
            (gradients,) = torch.autograd.grad(losses.sum(), weights)
        return losses.detach(), gradients

    def _differentiate_rows(self, weights: Tensor, gradients: Tensor, index: Tensor | None) -> Tensor:
        """L of each row, one after the other, and ∇L into `gradients`."""
        losses = weights.new_zeros(len(weights))
        for r, (flat, out) in enumerate(zip(weights.detach(), gradients, strict=True)):
            fixed, tensors = self._row(r, index)
            # Of real numbers, as the places are: complex weights are made of these, and so their gradients land right.
            leaves = {name: part.requires_grad_() for name, part in self.layout.places(flat).items()}
            places = list(self.layout.places(out).values())
            parts = (
                (weight * share, part)
                for weight, chosen in self._strata(index)
                for share, part in self._parts([tensor[chosen] for tensor in tensors])
            )
            for number, (share, part) in enumerate(parts):
                with torch.enable_grad():
                    loss = self._forward({**self.layout.of_places(leaves), **fixed}, part)
                    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
                losses[r] += share * loss.detach()
                for place, gradient in zip(places, found, strict=True):
                    torch.mul(gradient, share, out=place) if number == 0 else place.add_(gradient, alpha=share)
        return losses

    def _parts(self, tensors: Sequence[Tensor]) -> Iterator[tuple[float, Sequence[Tensor]]]:
        """Samples that are evaluated at once, and their share of all."""
        count = len(tensors[0])
        size = max(1, MEMORY.part_bytes // self.sample_bytes) if self.is_sample_mean and self.sample_bytes else count
        if size >= count:
            yield 1.0, tensors
            return
        for start in range(0, count, size):
            part = tuple(tensor[start : start + size] for tensor in tensors)
            yield len(part[0]) / count, part

    def has_second_derivatives(self, weights: Tensor) -> bool:
        """Whether `hessian_products` can be had, tried on the first row; of large sets on a few samples.

        Args:
            weights: [R, D].
        """
        first = self if self.sample_bytes is None else self._few()
        first, weights = first.select(torch.zeros(1, dtype=torch.long, device=weights.device)), weights[:1].detach()
        generator = torch.Generator(weights.device).manual_seed(0)
        direction = torch.empty_like(weights).normal_(generator=generator)
        try:
            product = first.hessian_products(weights, direction)
        except RuntimeError:  # some fused operations have none
            return False
        if product.any():
            return True
        # Zero is right for a linear loss, and what functions of a user's own say whose backward cannot be followed.
        return torch.equal(first._differentiate(weights + direction)[1], first._differentiate(weights)[1])

    def hessian_products(self, weights: Tensor, directions: Tensor, index: Tensor | None = None) -> Tensor:
        """∇²L·v of each row, by double backward; see `has_second_derivatives`.

        Args:
            weights: [R, D].
            directions: v, [R, D].
            index: [R, B] samples for each row; None for all of them.

        Returns:
            [R, D].

        Raises:
            RuntimeError: an operation has no second derivative.
        """
        weights = weights.detach().requires_grad_(True)
        with torch.enable_grad(), twice_differentiable():
            losses = self.losses(weights, index)
            (gradients,) = torch.autograd.grad(losses.sum(), weights, create_graph=True)
            if not gradients.requires_grad:  # the loss is linear
                return torch.zeros_like(weights)
            # Of a scalar: handing over the directions would import sympy, half a second.
            along = (gradients * directions).sum()
            return torch.autograd.grad(along, weights, materialize_grads=True)[0]

    def _arguments(self, weights: Tensor, index: Tensor | None) -> list[Tensor]:
        return [weights, *self.fixed.values(), *(() if index is None else (index,))]

    def _plan(self, weights: Tensor, index: Tensor | None) -> Plan | None:
        """The recorded gradient for so many rows, recorded now if it can be; None if it cannot."""
        row = self.gradient_bytes(None if index is None else index.shape[1])
        if not self.vectorised or self.row_bytes is None or row * len(weights) > MEMORY.planned_bytes:
            return None
        key = len(self.tensors[0]), self.heavy, len(weights), weights.dtype, index is not None and index.shape
        key = (*key, FACTOR in self.fixed)
        if key not in self.plans:

            def function(flat: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
                fixed = dict(zip(self.fixed, others, strict=False))
                return replace(self, fixed=fixed)._differentiate(flat, None if index is None else others[-1])

            try:
                plan: Plan | None = Plan(function, self._arguments(weights, index))
                # At another point too: what depends on values in a way that the recording missed shows there.
                moved = weights * 1.01
                expected = torch.cat([tensor.flatten() for tensor in self._differentiate(moved, index)])
                got = torch.cat([tensor.flatten() for tensor in plan(*self._arguments(moved, index))])
                if (got - expected).nan_to_num().norm() > 1e-3 * expected.nan_to_num().norm():
                    plan = None
            except (CannotPlanError, RuntimeError):  # such as a result whose elements share memory
                plan = None
            self.plans[key] = plan
        return self.plans[key]
