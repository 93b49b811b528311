"""Calls of the user's code without side effects on the training: on its random generators, buffers and flags."""

import contextlib
import random
import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@contextlib.contextmanager
def preserved_rng(devices: Sequence[torch.device | int] = ()) -> Iterator[None]:
    """Restore the global random generators of Python, NumPy and torch afterwards.

    Args:
        devices: the GPUs whose generators to restore beside the CPU's.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextlib.contextmanager
def seeded_rng(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed the global random generators within, and restore them afterwards.

    Args:
        seed: of Python's, NumPy's and torch's generators.
        device: whose generator to seed beside the CPU's.
    """
    cuda = device is not None and device.type == "cuda"
    with preserved_rng([device] if cuda else []):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach the generators of all GPUs too
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


@contextlib.contextmanager
def eager_and_unfused(device: torch.device) -> Iterator[None]:
    """Preserve the random generators, run compiled parts eagerly, and keep attention unfused.

    Args:
        device: whose generator to restore beside the CPU's.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    with preserved_rng([device] if device.type == "cuda" else []), torch.compiler.set_stance("force_eager"):
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)


class _UsedGenerators(TorchFunctionMode):
    """Keeps the first state of each generator that is passed to a function of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.states: dict[int, tuple[torch.Generator, torch.Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        generator = (kwargs or {}).get("generator")
        if isinstance(generator, torch.Generator) and id(generator) not in self.states:
            self.states[id(generator)] = generator, generator.get_state()
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def without_side_effects(model: nn.Module) -> Iterator[None]:
    """Restore random generators and the model's buffers afterwards: data sets and models may change them."""
    gpus = {tensor.device.index for tensor in model.parameters() if tensor.is_cuda}
    with torch.no_grad():
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    generators = _UsedGenerators()
    with preserved_rng(sorted(gpus)):
        try:
            with generators:
                yield
        finally:
            # In reverse, as tracing makes further handles of the same generators.
            for generator, state in reversed(generators.states.values()):
                generator.set_state(state)
            with torch.no_grad():
                for buffer, before in buffers:
                    if not torch.equal(buffer, before):
                        buffer.copy_(before)


@contextlib.contextmanager
def restored_attributes(model: nn.Module, *losses: Any) -> Iterator[None]:
    """Restore attributes of modules, and variables that a loss function assigns to.

    A loss may count its calls or cache what it saw; calls that are not the training's must leave no trace.

    Args:
        model: the network.
        losses: functions or modules; anything else is left alone.
    """
    modules = [module for root in (model, *losses) if isinstance(root, nn.Module) for module in root.modules()]
    places: list[tuple[dict[str, Any], Iterable[str] | None]] = [(vars(module), None) for module in modules]
    places += [(module._buffers, None) for root in losses if isinstance(root, nn.Module) for module in root.modules()]
    cells: list[tuple[types.CellType, Any]] = []
    for function in losses:
        while isinstance(function, types.MethodType):
            if hasattr(function.__self__, "__dict__") and not isinstance(function.__self__, type):
                places.append((vars(function.__self__), None))
            function = function.__func__
        if isinstance(function, types.FunctionType):
            for cell in function.__closure__ or ():
                with contextlib.suppress(ValueError):  # empty
                    cells.append((cell, cell.cell_contents))
            places.append((function.__globals__, function.__code__.co_names))
    before = [
        (place, names is None, {name: place[name] for name in (place if names is None else names) if name in place})
        for place, names in places
    ]
    values = [value for _, _, known in before for value in known.values()] + [value for _, value in cells]
    lists = [(value, len(value)) for value in values if type(value) is list]
    registered = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    tensors = [
        (value, value._version, value.detach().clone())
        for value in values
        if type(value) is Tensor and id(value) not in registered and value.nbytes <= 2**20 and not value.is_inference()
    ]
    try:
        yield
    finally:
        for place, whole, known in before:
            for name in place.keys() - known.keys() if whole else ():
                del place[name]
            for name, value in known.items():
                if place.get(name, cells) is not value:
                    place[name] = value
        for cell, value in cells:
            cell.cell_contents = value
        for value, length in lists:
            del value[length:]
        with torch.no_grad():
            for value, version, copy in tensors:
                if value._version != version:
                    value.copy_(copy)
