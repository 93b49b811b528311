"""A function of tensors as a fixed sequence of operations on buffers that are allocated once.

Automatic differentiation and vectorisation find the same operations anew, and allocate their results anew, at every
call. A sampler calls one function thousands of times with tensors of the same shapes: here its operations are recorded
once and then replayed into buffers that are shared between values that do not live at the same time. An elementwise
operation writes over an argument that nobody needs any more. The arithmetic is the same, operation by operation, but
for products that there is a quicker way to (`products`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from groktrace.sampling.products import (
    FixedProduct,
    GatheredProduct,
    GatheredTransposedProduct,
    NarrowProduct,
    Product,
    is_narrow,
    is_sparse,
    is_sparse_gathered,
)

_aten = torch.ops.aten
_COPIES = (_aten.clone.default, _aten._to_copy.default)
# Their values depend on the shape of their argument alone.
_FILLS = (_aten.ones_like, _aten.zeros_like, _aten.full_like, _aten.new_zeros, _aten.new_ones, _aten.new_full)
_UNREPEATABLE = (torch.Tag.nondeterministic_seeded, torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class CannotPlanError(Exception):
    """The function does something that a fixed sequence of operations cannot repeat; never leaves the sampler."""


class Plan:
    """A recorded function; call it with tensors of the shapes that it was recorded with.

    Args:
        function: tensors in, a tuple of tensors out; a function of its arguments alone.
        arguments: an example of what it will be called with.

    Raises:
        CannotPlanError: it draws random numbers, writes into tensors, or has results of unknown size.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], arguments: Sequence[Tensor]) -> None:
        with torch.no_grad(), _Recorder(arguments) as recorder:
            results = function(*arguments)
        record = _Record(recorder, results)
        self._inputs = [torch.empty_like(argument) for argument in arguments]
        self._calls: list[Call] = []
        self._outputs = self._lay_out(record)

    def __call__(self, *arguments: Tensor) -> list[Tensor]:
        """The function's values; the next call overwrites them."""
        for place, argument in zip(self._inputs, arguments, strict=True):
            place.copy_(argument)
        for function, args, kwargs in self._calls:
            function(*args, **kwargs)
        return self._outputs

    def _lay_out(self, record: "_Record") -> list[Tensor]:
        """Give every value its place, every operation its arguments; return the places of the results."""
        place: dict[int, Tensor] = {number: record.values[number] for number in record.constant}
        place |= dict(enumerate(self._inputs))
        owned: dict[int, Tensor] = {}  # by recorded storage, the buffer that takes its part
        free: dict[tuple[torch.dtype, int], list[Tensor]] = {}

        def placed(ref: _Ref) -> Tensor:
            return place[ref.number]

        for operation in record.operations:
            args, kwargs = pytree.tree_map_only(_Ref, placed, (operation.args, operation.kwargs))
            dying = record.dying(operation)
            if record.is_view(operation):
                values = _tensors(operation.target(*args, **kwargs))
            else:
                reused = record.overwritable(operation, owned)
                values = []
                for tensor in (record.values[number] for number in operation.results):
                    if reused is not None:
                        buffer = owned.pop(reused)
                        dying.discard(reused)
                    else:
                        pool = free.setdefault(_kind(tensor), [])
                        buffer = pool.pop() if pool else torch.empty_like(_whole(tensor))
                    owned[_storage(tensor)] = buffer
                    values.append(buffer.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()))
                self._calls.append(_writing_call(operation.target, args, kwargs, values))
            place |= dict(zip(operation.results, values, strict=True))
            for storage in dying:
                if (buffer := owned.pop(storage, None)) is not None:
                    free.setdefault(_kind(buffer), []).append(buffer)
        return [place[number] for number in record.results]


@dataclass(frozen=True)
class _Ref:
    """An argument that is a recorded tensor."""

    number: int


@dataclass(frozen=True, eq=False)
class _Operation:
    """One call: tensors in its arguments are `_Ref`s; the numbers of the tensors it gave."""

    target: Any
    args: Any
    kwargs: Any
    uses: tuple[int, ...]
    results: tuple[int, ...]


class _Recorder(TorchDispatchMode):
    """Writes down every operation that is carried out, below differentiation and vectorisation."""

    def __init__(self, arguments: Sequence[Tensor]) -> None:
        super().__init__()
        self.values: list[Tensor] = list(arguments)
        self.inputs = len(arguments)
        self.constant: set[int] = set()
        self.operations: list[_Operation] = []
        self._numbers = {id(tensor): number for number, tensor in enumerate(arguments)}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # asked for when the class is made; yes would import all of the compiler at the first use

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable or (any(tag in func.tags for tag in _UNREPEATABLE) and not _is_gather(func, args)):
            raise CannotPlanError(str(func))
        encoded = pytree.tree_map_only(Tensor, lambda tensor: _Ref(self.number(tensor)), (args, kwargs))
        value = func(*args, **kwargs)
        uses = tuple(leaf.number for leaf in pytree.tree_leaves(encoded) if isinstance(leaf, _Ref))
        results = []
        for tensor in _tensors(value):
            # An operation that has nothing to do returns its argument.
            results.append(self._numbers.setdefault(id(tensor), len(self.values)))
            if results[-1] == len(self.values):
                self.values.append(tensor)
        if not set(results) <= set(uses):
            self.operations.append(_Operation(func, *encoded, uses, tuple(results)))
            if func.overloadpacket in _FILLS or all(number in self.constant for number in uses):
                self.constant |= set(results)
        return value

    def number(self, tensor: Tensor) -> int:
        """The number of a recorded tensor, or of a constant that is now seen for the first time."""
        if id(tensor) not in self._numbers:
            for number, other in enumerate(self.values):
                if _storage(other) == _storage(tensor) and number not in self.constant:
                    if _geometry(other) != _geometry(tensor):
                        raise CannotPlanError("a view that no operation made")
                    self._numbers[id(tensor)] = number
                    break
            else:
                self._numbers[id(tensor)] = len(self.values)
                self.constant.add(len(self.values))
            self.values.append(tensor)  # in any case, so that its identity stays its own
        return self._numbers[id(tensor)]


class _Record:
    """The operations that the results need, and how long the memory behind their values is in use."""

    def __init__(self, recorder: _Recorder, results: Sequence[Tensor]) -> None:
        self.values, self.constant = recorder.values, recorder.constant
        self.results = [recorder.number(tensor) for tensor in results]
        needed = set(self.results)
        self._gathers = {
            _storage(self.values[operation.results[0]]): operation
            for operation in recorder.operations
            if operation.target is _aten.index.Tensor
        }
        operations: list[_Operation] = []
        for operation in map(self._quicker, reversed(recorder.operations)):
            if needed.intersection(operation.results) and not self.constant.issuperset(operation.results):
                operations.append(operation)
                needed.update(operation.uses)
        self.operations = operations[::-1]
        self._last: dict[int, _Operation] = {}
        for operation in self.operations:
            for number in (*operation.uses, *operation.results):
                self._last[_storage(self.values[number])] = operation
        for number in (*range(recorder.inputs), *self.constant, *self.results):
            self._last.pop(_storage(self.values[number]), None)

    def _quicker(self, operation: _Operation) -> _Operation:
        """The operation, or one that gives the same products in less time."""
        if operation.target is not _aten.bmm.default:
            return operation
        left, right = (self.values[number] for number in operation.uses)
        found = self._without_zeros(*operation.uses)
        if found is None and is_narrow(left, right):
            found = NarrowProduct(left, right), operation.uses
        if found is None:
            return operation
        product, uses = found
        return replace(operation, target=product, args=tuple(map(_Ref, uses)), uses=uses)

    def _without_zeros(self, left: int, right: int) -> tuple[Product, tuple[int, ...]] | None:
        """Products with constant rows that are mostly zeros, or with some of such rows, and the numbers they take."""
        matrix, dense = self.values[left], self.values[right]
        if left in self.constant:
            alike = matrix.stride(0) == 0 or len(matrix) == 1
            fits = alike and right not in self.constant and is_sparse(matrix[0])
            return (FixedProduct(matrix[0], dense), (right,)) if fits else None
        gather = self._gathers.get(_storage(matrix))
        if gather is None or len(gather.uses) != 2 or gather.uses[0] not in self.constant:
            return None
        samples, index, rows = (self.values[number] for number in (*gather.uses, *gather.results))
        if (samples.dim(), index.dim()) != (2, 2) or not is_sparse_gathered(samples, index.numel(), dense.shape[2]):
            return None
        uses = gather.uses[1], right
        if _geometry(matrix) == _geometry(rows):
            return GatheredProduct(samples, index, dense), uses
        if _geometry(matrix) == _geometry(rows.transpose(1, 2)):
            return GatheredTransposedProduct(samples, index, dense), uses
        return None

    def is_view(self, operation: _Operation) -> bool:
        """Whether the results lie in memory that the arguments lie in."""
        mine = {_storage(self.values[number]) for number in operation.results}
        return mine <= {_storage(self.values[number]) for number in operation.uses}

    def dying(self, operation: _Operation) -> set[int]:
        """The storages that nothing later uses."""
        return {storage for storage, last in self._last.items() if last is operation}

    def overwritable(self, operation: _Operation, owned: dict[int, Tensor]) -> int | None:
        """The storage of an argument over which an elementwise operation may write its value."""
        if torch.Tag.pointwise not in getattr(operation.target, "tags", ()) or len(operation.results) != 1:
            return None
        wanted = _geometry(self.values[operation.results[0]])
        arguments, dying = [self.values[number] for number in operation.uses], self.dying(operation)
        for storage in map(_storage, arguments):
            same = [other for other in arguments if _storage(other) == storage]
            if storage in dying and storage in owned and all(_geometry(other) == wanted for other in same):
                return storage
        return None


def _writing_call(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outs: list[Tensor]) -> Call:
    """An operation as a call that writes into `outs`."""
    if isinstance(target, Product):
        return target, args, {"out": outs[0]}
    if target in _COPIES or (target is _aten.pow.Tensor_Scalar and args[1] == 1 and args[0].dtype == outs[0].dtype):
        return outs[0].copy_, args[:1], {}
    if target in (_aten.mul.Scalar, _aten.div.Scalar):
        # The variant with a number writes into no given tensor; the one with a tensor of no dimensions does the same.
        target = _aten.mul.Tensor if target is _aten.mul.Scalar else _aten.div.Tensor
        args = (args[0], torch.tensor(args[1], dtype=outs[0].dtype, device="cpu"))
    writing = _writing_variant(target)
    if writing is not None and len(outs) == 1:
        return writing, args, {**kwargs, "out": outs[0]}

    def write(*args: Any, **kwargs: Any) -> None:
        for out, result in zip(outs, _tensors(target(*args, **kwargs)), strict=True):
            out.copy_(result)

    return write, args, kwargs


def _writing_variant(target: Any) -> Callable[..., Any] | None:
    """The variant of an operation that writes into a given tensor; None where that is made of the ordinary one."""
    wanted = [(each.name, str(each.type)) for each in target._schema.arguments]
    for name in target.overloadpacket.overloads():
        overload = getattr(target.overloadpacket, name)
        outs = [each.name for each in overload._schema.arguments if each.is_out]
        rest = [(each.name, str(each.type)) for each in overload._schema.arguments if not each.is_out]
        if outs == ["out"] and rest == wanted and torch.Tag.generated not in overload.tags:
            return overload
    return None


def _is_gather(target: Any, args: tuple[Any, ...]) -> bool:
    """Whether an indexing operation takes elements by number, as many as there are numbers, and not by a mask."""
    return target is _aten.index.Tensor and all(
        index is None or index.dtype not in (torch.bool, torch.uint8) for index in args[1]
    )


def _tensors(value: Any) -> list[Tensor]:
    return [each for each in pytree.tree_leaves(value) if isinstance(each, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _kind(tensor: Tensor) -> tuple[torch.dtype, int]:
    return tensor.dtype, tensor.untyped_storage().nbytes()


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor's storage, as a vector."""
    return tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)


def _geometry(tensor: Tensor) -> tuple[Any, ...]:
    return _kind(tensor), tensor.shape, tensor.stride(), tensor.storage_offset()
