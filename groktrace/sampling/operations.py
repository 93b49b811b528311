"""The operations that a function of tensors carries out, written down, and how long their values are needed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from groktrace.sampling.products import FixedProduct, is_sparse

_aten = torch.ops.aten
# Their values depend on the shape of their argument alone.
_FILLS = (_aten.ones_like, _aten.zeros_like, _aten.full_like, _aten.new_zeros, _aten.new_ones, _aten.new_full)
_UNREPEATABLE = (torch.Tag.nondeterministic_seeded, torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class CannotPlanError(Exception):
    """The function does something that a fixed sequence of operations cannot repeat; never leaves the sampler."""


@dataclass(frozen=True)
class Ref:
    """An argument that is a recorded tensor."""

    number: int


@dataclass(frozen=True, eq=False)
class Operation:
    """One call: tensors in its arguments are `Ref`s; the numbers of the tensors it gave."""

    target: Any
    args: Any
    kwargs: Any
    uses: tuple[int, ...]
    results: tuple[int, ...]


class OperationTrace(TorchDispatchMode):
    """Writes down every operation that is carried out, below differentiation and vectorisation."""

    def __init__(self, arguments: Sequence[Tensor]) -> None:
        super().__init__()
        self.values: list[Tensor] = list(arguments)
        self.inputs = len(arguments)
        self.constant: set[int] = set()
        self.operations: list[Operation] = []
        self._numbers = {id(tensor): number for number, tensor in enumerate(arguments)}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # asked for when the class is made; yes would import all of the compiler at the first use

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable or (any(tag in func.tags for tag in _UNREPEATABLE) and not _is_gather(func, args)):
            raise CannotPlanError(str(func))
        encoded = pytree.tree_map_only(Tensor, lambda tensor: Ref(self.number(tensor)), (args, kwargs))
        value = func(*args, **kwargs)
        uses = tuple(leaf.number for leaf in pytree.tree_leaves(encoded) if isinstance(leaf, Ref))
        results = []
        for tensor in tensors_in(value):
            # An operation that has nothing to do returns its argument.
            results.append(self._numbers.setdefault(id(tensor), len(self.values)))
            if results[-1] == len(self.values):
                self.values.append(tensor)
        if not set(results) <= set(uses):
            self.operations.append(Operation(func, *encoded, uses, tuple(results)))
            if func.overloadpacket in _FILLS or all(number in self.constant for number in uses):
                self.constant |= set(results)
        return value

    def number(self, tensor: Tensor) -> int:
        """The number of a recorded tensor, or of a constant that is now seen for the first time."""
        if id(tensor) not in self._numbers:
            for number, other in enumerate(self.values):
                if storage_of(other) == storage_of(tensor) and number not in self.constant:
                    if _geometry(other) != _geometry(tensor):
                        raise CannotPlanError("a view that no operation made")
                    self._numbers[id(tensor)] = number
                    break
            else:
                self._numbers[id(tensor)] = len(self.values)
                self.constant.add(len(self.values))
            self.values.append(tensor)  # in any case, so that its identity stays its own
        return self._numbers[id(tensor)]


class TracedGraph:
    """The operations that the results need, and how long the memory behind their values is in use."""

    def __init__(self, recorder: OperationTrace, results: Sequence[Tensor]) -> None:
        self.values, self.constant = recorder.values, recorder.constant
        self.results = [recorder.number(tensor) for tensor in results]
        needed = set(self.results)
        operations: list[Operation] = []
        for operation in map(self._quicker, reversed(recorder.operations)):
            if needed.intersection(operation.results) and not self.constant.issuperset(operation.results):
                operations.append(operation)
                needed.update(operation.uses)
        self.operations = operations[::-1]
        self._last: dict[int, Operation] = {}
        for operation in self.operations:
            for number in (*operation.uses, *operation.results):
                self._last[storage_of(self.values[number])] = operation
        for number in (*range(recorder.inputs), *self.constant, *self.results):
            self._last.pop(storage_of(self.values[number]), None)
        self._whole = {
            storage_of(self.values[number]): which for which, number in enumerate(self.results) if self._fills(number)
        }

    def result_of(self, operation: Operation) -> int | None:
        """Which result is what an operation gives, if either is all that its memory holds; None if none is."""
        if len(operation.results) != 1 or not self._fills(operation.results[0]):
            return None
        return self._whole.get(storage_of(self.values[operation.results[0]]))

    def _fills(self, number: int) -> bool:
        value = self.values[number]
        return value.is_contiguous() and value.numel() == len(whole(value))

    def _quicker(self, operation: Operation) -> Operation:
        """The operation, or one that gives the same products of a constant matrix without its zeros."""
        if operation.target is not _aten.bmm.default:
            return operation
        left, right = operation.uses
        matrix, dense = self.values[left], self.values[right]
        alike = left in self.constant and (matrix.stride(0) == 0 or len(matrix) == 1)
        if not alike or right in self.constant or not is_sparse(matrix[0]):
            return operation
        return replace(operation, target=FixedProduct(matrix[0], dense), args=(Ref(right),), uses=(right,))

    def is_view(self, operation: Operation) -> bool:
        """Whether the results lie in memory that the arguments lie in."""
        mine = {storage_of(self.values[number]) for number in operation.results}
        return mine <= {storage_of(self.values[number]) for number in operation.uses}

    def dying(self, operation: Operation) -> set[int]:
        """The storages that nothing later uses."""
        return {storage for storage, last in self._last.items() if last is operation}

    def overwritable(self, operation: Operation, owned: dict[int, Tensor]) -> int | None:
        """The storage of an argument over which an elementwise operation may write its value."""
        if torch.Tag.pointwise not in getattr(operation.target, "tags", ()) or len(operation.results) != 1:
            return None
        wanted = _geometry(self.values[operation.results[0]])
        arguments, dying = [self.values[number] for number in operation.uses], self.dying(operation)
        for storage in map(storage_of, arguments):
            same = [other for other in arguments if storage_of(other) == storage]
            if storage in dying and storage in owned and all(_geometry(other) == wanted for other in same):
                return storage
        return None


def _is_gather(target: Any, args: tuple[Any, ...]) -> bool:
    """Whether an indexing operation takes elements by number, as many as there are numbers, and not by a mask."""
    return target is _aten.index.Tensor and all(
        index is None or index.dtype not in (torch.bool, torch.uint8) for index in args[1]
    )


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors among arguments, or what an operation returned."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def storage_of(tensor: Tensor) -> int:
    """Where the memory begins that a tensor lies in."""
    return tensor.untyped_storage().data_ptr()


def kind(tensor: Tensor) -> tuple[torch.dtype, int]:
    """What tensors have in common that may lie in one another's memory: type, and bytes in all."""
    return tensor.dtype, tensor.untyped_storage().nbytes()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor's storage, as a vector."""
    return tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)


def _geometry(tensor: Tensor) -> tuple[Any, ...]:
    return kind(tensor), tensor.shape, tensor.stride(), tensor.storage_offset()
