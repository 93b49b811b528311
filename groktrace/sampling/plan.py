"""A function of tensors as a fixed sequence of operations on buffers that are allocated once.

Automatic differentiation and vectorisation find the same operations anew, and allocate their results anew, at every
call. A sampler calls one function thousands of times with tensors of the same shapes: here its operations are recorded
once and then replayed into buffers that are shared between values that do not live at the same time. An elementwise
operation writes over an argument that nobody needs any more. The arithmetic is the same, operation by operation, but
for products with samples that are mostly zeros (`products`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from groktrace.sampling.operations import (
    Operation,
    OperationTrace,
    Ref,
    TracedGraph,
    kind,
    storage_of,
    tensors_in,
    whole,
)
from groktrace.sampling.products import FixedProduct

_aten = torch.ops.aten
_COPIES = (_aten.clone.default, _aten._to_copy.default)

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class Plan:
    """A recorded function; call it with tensors of the shapes that it was recorded with.

    Args:
        function: tensors in, a tuple of tensors out; a function of its arguments alone.
        arguments: an example of what it will be called with.

    Attributes:
        results: its values after a call.

    Raises:
        CannotPlanError: it draws random numbers, writes into tensors, or has results of unknown size.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], arguments: Sequence[Tensor]) -> None:
        with torch.no_grad(), OperationTrace(arguments) as recorder:
            results = function(*arguments)
        record = TracedGraph(recorder, results)
        self._constants = {number: record.values[number] for number in record.constant}
        self._steps = _lay_out(record)
        self._numbers = record.results
        self._arguments = [torch.empty_like(argument) for argument in arguments]
        self.results = [torch.empty_like(result, memory_format=torch.contiguous_format) for result in results]
        self._calls = self.bind(self._arguments, self.results)

    def __call__(self, *arguments: Tensor) -> list[Tensor]:
        """The function's values; the next call overwrites them."""
        for place, argument in zip(self._arguments, arguments, strict=True):
            place.copy_(argument)
        run(self._calls)
        return self.results

    def bind(self, arguments: Sequence[Tensor], results: Sequence[Tensor]) -> list[Call]:
        """The function of whatever some tensors hold when it is `run`.

        Args:
            arguments: these tensors, which lie in memory as those that it was recorded with.
            results: where its values go, contiguous.
        """
        place = self._constants | dict(enumerate(arguments))
        calls: list[Call] = []
        for operation, into in self._steps:
            args = _filled(operation.args, place)
            kwargs = {name: _filled(value, place) for name, value in operation.kwargs.items()}
            if into is None:
                values = tensors_in(operation.target(*args, **kwargs))
            else:
                values = [results[into.number].view(into.shape)] if isinstance(into, _Result) else into
                calls.append(_writing_call(operation.target, args, kwargs, values))
            place |= dict(zip(operation.results, values, strict=True))
        for result, number in zip(results, self._numbers, strict=True):
            if place[number].data_ptr() != result.data_ptr():
                calls.append((result.copy_, (place[number],), {}))
        return calls


def run(calls: Sequence[Call]) -> None:
    """Make one call after another."""
    for function, args, kwargs in calls:
        function(*args, **kwargs)


@dataclass(frozen=True)
class _Result:
    """A value that is computed straight into a result."""

    number: int
    shape: tuple[int, ...]


def _lay_out(record: TracedGraph) -> list[tuple[Operation, list[Tensor] | _Result | None]]:
    """The operations and where each puts its values; None for views."""
    steps: list[tuple[Operation, list[Tensor] | _Result | None]] = []
    owned: dict[int, Tensor] = {}  # by recorded storage, the buffer that takes its part
    free: dict[tuple[torch.dtype, int], list[Tensor]] = {}
    for operation in record.operations:
        dying = record.dying(operation)
        tensors = [record.values[number] for number in operation.results]
        if record.is_view(operation):
            steps.append((operation, None))
        elif (result := record.result_of(operation)) is not None:
            steps.append((operation, _Result(result, tensors[0].shape)))
        else:
            reused = record.overwritable(operation, owned)
            buffers = []
            for tensor in tensors:
                if reused is not None:
                    buffer = owned.pop(reused)
                    dying.discard(reused)
                else:
                    pool = free.setdefault(kind(tensor), [])
                    buffer = pool.pop() if pool else torch.empty_like(whole(tensor))
                owned[storage_of(tensor)] = buffer
                buffers.append(buffer.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()))
            steps.append((operation, buffers))
        for storage in dying:
            if (buffer := owned.pop(storage, None)) is not None:
                free.setdefault(kind(buffer), []).append(buffer)
    return steps


def _writing_call(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outs: list[Tensor]) -> Call:
    """An operation as a call that writes into `outs`."""
    if isinstance(target, FixedProduct):
        return target, args, {"out": outs[0]}
    if target in _COPIES or (target is _aten.pow.Tensor_Scalar and args[1] == 1 and args[0].dtype == outs[0].dtype):
        return outs[0].copy_, args[:1], {}
    if target in (_aten.mul.Scalar, _aten.div.Scalar):
        # The variant with a number writes into no given tensor; the one with a tensor of no dimensions does the same.
        target = _aten.mul.Tensor if target is _aten.mul.Scalar else _aten.div.Tensor
        args = (args[0], torch.tensor(args[1], dtype=outs[0].dtype, device="cpu"))
    if target is _aten.relu.default:  # calls this, and has no variant of its own
        target, args = _aten.clamp_min.default, (args[0], 0)
    if len(outs) == 1 and (found := _writing_variant(target)) is not None:
        writing, name = found
        return writing, args, {**kwargs, name: outs[0]}

    def write(*args: Any, **kwargs: Any) -> None:
        for out, result in zip(outs, tensors_in(target(*args, **kwargs)), strict=True):
            out.copy_(result)

    return write, args, kwargs


@cache
def _writing_variant(target: Any) -> tuple[Callable[..., Any], str] | None:
    """The variant of an operation that writes into a given tensor, and what it calls that.

    None where there is none, and where it is made of the ordinary one.
    """
    wanted = [(argument.name, str(argument.type)) for argument in target._schema.arguments]
    for name in target.overloadpacket.overloads():
        overload = getattr(target.overloadpacket, name)
        outs = [argument.name for argument in overload._schema.arguments if argument.is_out]
        rest = [(argument.name, str(argument.type)) for argument in overload._schema.arguments if not argument.is_out]
        if len(outs) == 1 and rest == wanted and torch.Tag.generated not in overload.tags:
            return overload, outs[0]
    return None


def _filled(value: Any, place: Mapping[int, Tensor]) -> Any:
    """An argument with tensors where it refers to some."""
    if isinstance(value, Ref):
        return place[value.number]
    return type(value)(_filled(part, place) for part in value) if isinstance(value, (tuple, list)) else value
