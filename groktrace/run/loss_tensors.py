"""Find the tensors of a loss: parameters of a module, or tensors that a function captures."""

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

PREFIX = "loss."
MAX_DEPTH = 4
MAX_ITEMS = 1000
MAX_VALUES = 100_000


@dataclass(frozen=True, eq=False)
class LossTensors:
    """The tensors of a loss that are not the model's.

    Attributes:
        modules: whose parameters and buffers they are.
        places: the index of a tensor's module and its name there, by its name among the network's tensors.
        loose: captured tensors that require a gradient, by such names.
        holds_weights: whether the loss captures tensors of the model itself, which cannot be replaced.
    """

    modules: tuple[nn.Module, ...] = ()
    places: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    loose: Mapping[str, Tensor] = field(default_factory=dict)
    holds_weights: bool = False

    def parameters(self) -> dict[str, Tensor]:
        """Parameters as they are now, by name."""
        return self._find([dict(module.named_parameters()) for module in self.modules]) | dict(self.loose)

    def buffers(self) -> dict[str, Tensor]:
        """Buffers as they are now, by name."""
        return self._find([dict(module.named_buffers()) for module in self.modules])

    def _find(self, tensors: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {name: tensors[i][inner] for name, (i, inner) in self.places.items() if inner in tensors[i]}


NO_TENSORS = LossTensors()


@contextlib.contextmanager
def buffers_noted(function: Any) -> Iterator[set[int]]:
    """Collect the ids of a loss's buffers that the body modifies in training mode; their values are restored."""
    modules = [value for _, value in reachable_tensors(function) if isinstance(value, nn.Module)]
    parts = [(part, part.training) for module in modules for part in module.modules()]
    buffers = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]
    moved: set[int] = set()
    try:
        for module in modules:
            if not any(True for _ in module.parameters()):
                for part in module.modules():
                    part.training = True
        yield moved
    finally:
        for part, training in parts:
            part.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    moved.add(id(buffer))
                    buffer.copy_(before)


def find_loss_tensors(function: Any, model: nn.Module, seen: set[int], moved: set[int]) -> LossTensors:
    """Find the tensors of a loss beside the model's.

    Buffers of a module without parameters, such as class weights, are constants unless the loss modifies them.

    Args:
        function: the loss.
        model: the network, whose tensors keep their own names.
        seen: ids of the tensors that the loss uses, see `UsedTensors`.
        moved: ids of the buffers that it moves, see `buffers_noted`.
    """
    mine = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    memory = {where for tensor in model.parameters() if (where := _memory(tensor)) is not None}
    # Attributes have names, so that with two dots none of the model's can be meant.
    names = (name for name, _ in (*model.named_parameters(), *model.named_buffers()))
    prefix = f"{PREFIX}." if any(name.startswith(PREFIX) for name in names) else PREFIX
    modules: list[nn.Module] = []
    places: dict[str, tuple[int, str]] = {}
    loose: dict[str, Tensor] = {}
    holds_weights = False

    def free(name: str) -> str:
        while name in places or name in loose:
            name += "_"
        return name

    for path, value in reachable_tensors(function):
        if isinstance(value, nn.Module):
            start = f"{prefix}{path}." if path else prefix
            wanted = seen if any(True for _ in value.parameters()) else moved
            found = {
                free(start + name): (len(modules), name)
                for name, tensor in (*value.named_parameters(), *value.named_buffers())
                if id(tensor) in wanted and id(tensor) not in mine
            }
            if found:
                modules.append(value)
                places |= found
                mine |= {id(tensor) for tensor in (*value.parameters(), *value.buffers())}
        elif id(value) in seen:
            holds_weights |= _memory(value) in memory
            if id(value) not in mine and value.requires_grad and value.is_leaf:
                loose[free(prefix + path)] = value
                mine.add(id(value))
    return LossTensors(tuple(modules), places, loose, holds_weights)


def _memory(tensor: Tensor) -> int | None:
    """The address of a tensor's storage; None where it has none."""
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (RuntimeError, ValueError, NotImplementedError):  # sharded, sparse, lazy, or a subclass without memory
        return None


class UsedTensors(TorchFunctionMode):
    """Records which tensors are used while it is active, and whether pairs are viewed as complex numbers.

    Attributes:
        seen: the ids of the tensors.
        pairs: whether torch.view_as_complex was called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()
        self.pairs = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.seen.update(id(leaf) for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        self.pairs |= func is torch.view_as_complex
        return func(*args, **kwargs)


def reachable_tensors(function: Any) -> Iterator[tuple[str, nn.Module | Tensor]]:
    """Yield the modules and tensors that a function can reach by name, with their paths."""
    yield from _walk(function, "", MAX_DEPTH, set(), iter(range(MAX_VALUES)), whole=True)


def _walk(
    value: Any, path: str, depth: int, visited: set[int], left: Iterator[int], whole: bool = False
) -> Iterator[tuple[str, Any]]:
    """Yield modules and tensors in a value; with `whole`, also in the attributes of a plain object."""
    if id(value) in visited or depth < 0 or next(left, None) is None:
        return
    visited.add(id(value))

    def walk(other: Any, name: str, whole: bool = False) -> Iterator[tuple[str, Any]]:
        return _walk(other, f"{path}.{name}" if path and name else path or name, depth - 1, visited, left, whole)

    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, nn.Module):
        while isinstance(inner := getattr(value, "_orig_mod", None), nn.Module):  # compiled
            value = inner
        yield path, value
        own = {"_parameters", "_buffers", "_modules"}
        for name, other in vars(value).items():
            if name not in own and isinstance(other, Tensor | nn.Module | list | tuple | dict):
                yield from walk(other, name)
    elif isinstance(value, list | tuple):
        for i, other in enumerate(value[:MAX_ITEMS]):
            yield from walk(other, str(i))
    elif isinstance(value, Mapping):
        for name, other in list(value.items())[:MAX_ITEMS]:
            yield from walk(other, str(name))
    elif isinstance(value, functools.partial):
        yield from walk(value.func, "", whole)
        for i, other in enumerate(value.args):
            yield from walk(other, str(i), True)
        for name, other in value.keywords.items():
            yield from walk(other, name, True)
    elif isinstance(value, types.MethodType):
        yield from walk(value.__self__, "", True)
        yield from walk(value.__func__, "")
    elif isinstance(value, types.FunctionType):
        for name, other in _variables(value):
            yield from walk(other, name, True)
    elif whole and not isinstance(value, type | types.ModuleType | types.BuiltinFunctionType):
        call = inspect.getattr_static(type(value), "__call__", None)
        if isinstance(call, types.FunctionType):
            yield from walk(call, "")
        for name, other in getattr(value, "__dict__", {}).items():
            if isinstance(other, Tensor | nn.Module | list | tuple | dict):
                yield from walk(other, name)


def _variables(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield the free and global variables that a function reads, with their values."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not filled yet
            continue
    count, defaults = function.__code__.co_argcount, function.__defaults__ or ()
    yield from zip(function.__code__.co_varnames[count - len(defaults) : count], defaults, strict=True)
    yield from (function.__kwdefaults__ or {}).items()
    if str(function.__globals__.get("__name__", "")).partition(".")[0] == "torch":
        return
    for name in dict.fromkeys(_global_names(function.__code__)):
        if name in function.__globals__:
            yield name, function.__globals__[name]


def _global_names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _global_names(constant)
