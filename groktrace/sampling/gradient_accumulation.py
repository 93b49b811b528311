"""Gradients of weights that are added to their places as they appear, so that no second set of them ever exists.

What matters is the largest weight, in language models the embedding: its gradient would take a third of GPT-2's
weights, and twice that where it is tied. Linear layers and embeddings add theirs to its place without forming it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_LINEAR = (functional.linear, torch.ops.aten.linear.default)


def leaf(tensor: Tensor, place: Tensor) -> Tensor:
    """A tensor whose gradient is added to a place as soon as it is there.

    Args:
        tensor: of any shape.
        place: of the same shape, or, for a complex tensor, of pairs of real numbers.
    """

    def collect(used: Tensor) -> None:
        if used.grad is not None:  # as where a use has added its own
            place.add_(torch.view_as_real(used.grad.resolve_conj()) if used.is_complex() else used.grad)
            used.grad = None

    used = tensor.detach().requires_grad_()
    used.register_post_accumulate_grad_hook(collect)
    return used


class GradientAccumulation(TorchFunctionMode):
    """Makes every use of a weight a leaf of its own.

    Autograd would hold the gradients of both uses of tied embeddings, and their sum beside them.

    Args:
        places: where the gradients go, by the id of the weight.
    """

    def __init__(self, places: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.places = places

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch._C._functorch.peek_interpreter_stack() is not None:  # vmap and the like, in which nothing is a leaf
            return func(*args, **kwargs)
        if func in _LINEAR and not kwargs and self._has_place(args[1]) and _is_plain(*args):
            bias = args[2] if len(args) > 2 else None
            return _Linear.apply(args[0], args[1], self._leaf(bias), self.places[id(args[1])])
        if (found := _embedded(func, args, kwargs)) is not None:
            indices, weight, padding = found
            if self._has_place(weight) and _is_plain(weight):
                return _Embedding.apply(indices, weight, padding, self.places[id(weight)])
        return func(*map(self._leaf, args), **kwargs)

    def _has_place(self, value: Any) -> bool:
        return id(value) in self.places

    def _leaf(self, value: Any) -> Any:
        return leaf(value, self.places[id(value)]) if self._has_place(value) else value


def _is_plain(*operands: Tensor | None) -> bool:
    """Whether operands are multiplied as they are, in one real dtype."""
    present = [operand for operand in operands if operand is not None]
    alike = len({operand.dtype for operand in present}) == 1 and not present[0].is_complex()
    return alike and not torch.is_autocast_enabled(present[0].device.type)


def _embedded(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Tensor, Tensor, int | None] | None:
    """Indices, weight and the row without a gradient, of a call that looks rows up and does no more."""
    if func is functional.embedding and len(args) == 2:
        more = any(kwargs.get(name) for name in ("max_norm", "scale_grad_by_freq", "sparse"))
        return None if more else (args[0], args[1], kwargs.get("padding_idx"))
    if func is torch.ops.aten.embedding.default and len(args) <= 3 and not kwargs:
        return args[1], args[0], args[2] if len(args) == 3 and args[2] >= 0 else None
    return None


class _Linear(torch.autograd.Function):
    """x·Wᵀ + b, whose backward pass adds W's gradient to its place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, place: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.place = place
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        ctx.place.addmm_(rows.T, x.reshape(-1, x.shape[-1]))
        of_x, _, of_bias, _ = ctx.needs_input_grad
        return gradient @ weight if of_x else None, None, rows.sum(0) if of_bias else None, None


class _Embedding(torch.autograd.Function):
    """Rows of W, whose backward pass adds to those rows alone."""

    @staticmethod
    def forward(ctx: Any, indices: Tensor, weight: Tensor, padding: int | None, place: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.padding, ctx.place = padding, place
        return functional.embedding(indices, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None, None]:
        (indices,) = ctx.saved_tensors
        if ctx.padding is not None:
            gradient = gradient.masked_fill((indices == ctx.padding % len(ctx.place))[..., None], 0)
        ctx.place.index_add_(0, indices.flatten(), gradient.reshape(-1, gradient.shape[-1]))
        return None, None, None, None
