"""Weights and buffers off the model, under the plain model's own names."""

import contextlib
from collections.abc import Iterable, Iterator

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
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise SettingsError(
            "model: FullyShardedDataParallel keeps weights in flat pieces without their names; shard the model with "
            "torch.distributed.fsdp.fully_shard instead."
        )
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
    if tensor.layout != torch.strided or tensor.is_meta:
        raise SettingsError(f"model: expected dense weights that hold values, but '{name}' is sparse or on 'meta'.")
    if tensor.dtype not in STORABLE:
        raise SettingsError(f"model: '{name}' is {tensor.dtype}, which safetensors files cannot hold.")


def is_sharded(model: nn.Module) -> bool:
    """Whether weights lie in pieces on several processes, so that all have to take part in reading them."""
    return any(_in_pieces(tensor) for _, tensor in named_tensors(model))


def _in_pieces(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """A sharded model as the plain one that it was, while the body runs; every process has to take part."""
    if not is_sharded(model):
        yield
        return
    whole: dict[int, nn.Parameter] = {}
    parameters, hooks = [], []
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and _in_pieces(parameter):
                if id(parameter) not in whole:
                    whole[id(parameter)] = nn.Parameter(parameter.detach().full_tensor(), parameter.requires_grad)
                parameters.append((module._parameters, name, parameter))
        # Those of fully_shard would gather and scatter around each call.
        for table in (module._forward_pre_hooks, module._forward_hooks):
            hooks.append((table, dict(table)))
    try:
        for place, name, parameter in parameters:
            place[name] = whole[id(parameter)]
        for table, before in hooks:
            for key, hook in before.items():
                if "FSDP" in repr(hook):
                    del table[key]
        yield
    finally:
        for table, before in hooks:
            table.clear()
            table.update(before)
        for place, name, parameter in parameters:
            place[name] = parameter


class Capture:
    """Copies of a model's tensors in CPU buffers that are allocated once and reused.

    Args:
        model: the plain model, or another one with the same tensors.
        specs: what every snapshot must hold.
        once: tensors that are kept elsewhere, and copied only from when they change.
    """

    def __init__(self, model: nn.Module, specs: dict[str, WeightSpec], once: Iterable[str] = ()) -> None:
        self._model = model
        self._specs = specs
        current = dict(named_tensors(model))
        self._unchanged = {name: mark for name in once if (mark := _mark(current[name])) is not None}
        self._pinned = {name: tensor.is_cuda for name, tensor in current.items()}
        self.sharded = is_sharded(model)
        self.buffers: dict[str, Tensor] = {}
        for name in specs.keys() - self._unchanged.keys():
            self._allocate(name)

    def copy(self) -> dict[str, Tensor]:
        """The model's tensors as they are now; valid until the next call.

        Raises:
            SettingsError: the model no longer has the tensors it had.
        """
        # Looked up anew each time: a script may replace parameters, or move the model to another device.
        current = {
            name: tensor
            for name, tensor in self._current().items()
            if name not in self._unchanged or _mark(tensor) != self._unchanged[name]
        }
        for name in current.keys() - self.buffers.keys():
            self._allocate(name)
        buffers = {name: self.buffers[name] for name in current}
        devices = set()
        with torch.inference_mode(False), torch.no_grad():
            if self.sharded:
                for name, tensor in current.items():
                    buffers[name].copy_(_whole(tensor))  # one after the other: whole, they may not fit the device
            else:
                devices = {tensor.device for tensor in current.values() if tensor.is_cuda}
                sources = [tensor.detach() for tensor in current.values()]
                if sources:
                    torch._foreach_copy_(list(buffers.values()), sources, non_blocking=bool(devices))
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        return buffers

    def take_part(self) -> None:
        """Give the process that copies a sharded model this one's pieces."""
        with torch.inference_mode(False), torch.no_grad():
            for tensor in self._current().values():
                _whole(tensor)

    def moved(self) -> bool:
        """Whether a trainable tensor differs from its last copy."""
        with torch.inference_mode(False), torch.no_grad():
            return any(
                spec.trainable and not torch.equal(tensor.cpu(), self.buffers[name])
                for name, tensor in self._current().items()
                if (spec := self._specs[name])
            )

    def _allocate(self, name: str) -> None:
        # Buffers made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            self.buffers[name] = _allocate(self._specs[name], self._pinned[name])

    def _current(self) -> dict[str, Tensor]:
        current = dict(named_tensors(self._model))
        if current.keys() != self._specs.keys():
            odd = sorted(current.keys() ^ self._specs.keys())
            raise SettingsError(f"the model's tensors are not those it had at watch(): {', '.join(odd[:5])}.")
        for name, tensor in current.items():
            spec = self._specs[name]
            if tensor.shape != spec.shape or tensor.dtype != spec.dtype:
                raise SettingsError(
                    f"the model's '{name}' was {spec.dtype}{list(spec.shape)} at watch() and is now "
                    f"{tensor.dtype}{list(tensor.shape)}."
                )
        return current


def _mark(tensor: Tensor) -> tuple[int, int, int] | None:
    """What changes when a tensor is replaced or written to; None where that cannot be told."""
    if _in_pieces(tensor) or tensor.is_inference():
        return None
    return id(tensor), tensor.data_ptr(), tensor._version


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if _in_pieces(tensor) else tensor


def _allocate(spec: WeightSpec, pinned: bool) -> Tensor:
    """One CPU buffer, in memory that the GPU can write to directly where that helps."""
    if pinned:
        with contextlib.suppress(RuntimeError):  # where there is no more of it, the other kind works, only slower
            return torch.empty(spec.shape, dtype=spec.dtype, device="cpu", pin_memory=True)
    # Zeros, not empty: the pages are touched here and not during the first snapshot.
    return torch.zeros(spec.shape, dtype=spec.dtype, device="cpu")
