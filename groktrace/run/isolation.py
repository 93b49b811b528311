"""Calls of the user's code without side effects on the training: on its random generators, buffers and flags."""

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
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
