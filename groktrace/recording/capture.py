"""Weights and buffers off the model, under the plain model's own names."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from groktrace.errors import SettingsError
from groktrace.run.store import WeightSpec

# What safetensors can hold, since version 0.4.
STORABLE = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2}
    | {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64}
)


def plain_model(model: nn.Module) -> nn.Module:
    """The user's own network under torch.compile and data-parallel wrappers."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of a plain model, tied ones once."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def find_aliases(model: nn.Module) -> dict[str, str]:
    """Further names of tied tensors, each with the name under which the tensor is kept."""
    names: dict[int, str] = {}
    aliases = {}
    for group in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in group:
            first = names.setdefault(id(tensor), name)
            if first != name:
                aliases[name] = first
    return aliases


def describe_weights(model: nn.Module) -> dict[str, WeightSpec]:
    """Shape, dtype and trainability of what a snapshot of `model` holds.

    Raises:
        SettingsError: a tensor cannot be kept.
    """
    trainable = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    specs = {}
    for name, tensor in named_tensors(model):
        _check_tensor(name, tensor)
        moves = name in trainable and tensor.is_floating_point()
        specs[name] = WeightSpec(tuple(tensor.shape), tensor.dtype, moves)
    return specs


def _check_tensor(name: str, tensor: Tensor) -> None:
    if nn.parameter.is_lazy(tensor):
        raise SettingsError(f"model: '{name}' has no shape yet; run the model on one batch before watch().")
    if hasattr(tensor, "full_tensor"):
        raise SettingsError(f"model: '{name}' is sharded over processes, which this version cannot keep.")
    if tensor.layout != torch.strided or tensor.is_meta:
        raise SettingsError(f"model: expected dense weights that hold values, but '{name}' is sparse or on 'meta'.")
    if tensor.dtype not in STORABLE:
        raise SettingsError(f"model: '{name}' is {tensor.dtype}, which safetensors files cannot hold.")


class Capture:
    """Copies of a model's tensors in CPU buffers that are allocated once and reused.

    Args:
        model: the plain model.
        specs: what every snapshot must hold.
    """

    def __init__(self, model: nn.Module, specs: dict[str, WeightSpec]) -> None:
        self._model = model
        self._specs = specs
        pinned = {name: tensor.is_cuda for name, tensor in named_tensors(model)}
        # Buffers made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            self.buffers = {name: _allocate(spec, pinned[name]) for name, spec in specs.items()}

    def copy(self) -> dict[str, Tensor]:
        """The model's tensors as they are now; valid until the next call.

        Raises:
            SettingsError: the model no longer has the tensors it had.
        """
        # Looked up anew each time: a script may replace parameters, or move the model to another device.
        current = self._current()
        devices = set()
        with torch.inference_mode(False), torch.no_grad():
            for name, tensor in current.items():
                self.buffers[name].copy_(tensor, non_blocking=tensor.is_cuda)
                if tensor.is_cuda:
                    devices.add(tensor.device)
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        return self.buffers

    def moved(self) -> bool:
        """Whether a trainable tensor differs from its last copy."""
        with torch.inference_mode(False), torch.no_grad():
            return any(
                spec.trainable and not torch.equal(tensor.cpu(), self.buffers[name])
                for name, tensor in self._current().items()
                if (spec := self._specs[name])
            )

    def _current(self) -> dict[str, Tensor]:
        current = {name: tensor.detach() for name, tensor in named_tensors(self._model)}
        if current.keys() != self._specs.keys():
            odd = sorted(current.keys() ^ self._specs.keys())
            raise SettingsError(f"the model's tensors are not those it had at watch(): {', '.join(odd[:5])}.")
        for name, tensor in current.items():
            spec = self._specs[name]
            if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
                raise SettingsError(
                    f"the model's '{name}' was {spec.dtype}{list(spec.shape)} at watch() and is now "
                    f"{tensor.dtype}{list(tensor.shape)}."
                )
        return current


def _allocate(spec: WeightSpec, pinned: bool) -> Tensor:
    """One CPU buffer, in memory that the GPU can write to directly where that helps."""
    if pinned:
        with contextlib.suppress(RuntimeError):  # where there is no more of it, the other kind works, only slower
            return torch.empty(spec.shape, dtype=spec.dtype, device="cpu", pin_memory=True)
    # Zeros, not empty: the pages are touched here and not during the first snapshot.
    return torch.zeros(spec.shape, dtype=spec.dtype, device="cpu")
