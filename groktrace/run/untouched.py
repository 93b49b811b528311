"""Calls of the user's code that leave no trace in the training: its random generators, and its buffers."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode


@contextlib.contextmanager
def own_randomness(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """What draws from the global generators follows `seed` within, and they stay as they are.

    Args:
        seed: of Python's, NumPy's and torch's generators.
        device: whose generator is meant beside the CPU's.
    """
    cuda = device is not None and device.type == "cuda"
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if cuda else []):
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach all the GPUs' generators too
            if cuda:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


class _Generators(TorchFunctionMode):
    """Keeps the state of each generator that is handed to a function of torch, as it was before."""

    def __init__(self) -> None:
        super().__init__()
        self.states: dict[int, tuple[torch.Generator, torch.Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        generator = (kwargs or {}).get("generator")
        if isinstance(generator, torch.Generator) and id(generator) not in self.states:
            self.states[id(generator)] = generator, generator.get_state()
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def left_untouched(model: nn.Module) -> Iterator[None]:
    """Put random generators and the model's buffers back as they were: datasets and models may change them."""
    gpus = {tensor.device.index for tensor in model.parameters() if tensor.is_cuda}
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.no_grad():
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    drawn = _Generators()
    try:
        with torch.random.fork_rng(devices=sorted(gpus)), drawn:
            yield
    finally:
        for generator, state in reversed(drawn.states.values()):  # tracing makes further handles of the same generators
            generator.set_state(state)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
