"""Copy weights and buffers from a model, under the plain model's own names."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from groktrace.errors import SettingsError, TaskError
from groktrace.recording.frozen import FrozenTensors
from groktrace.run.live_model import named_tensors
from groktrace.run.loss_tensors import NO_TENSORS, PREFIX, LossTensors
from groktrace.run.store import WeightSpec
from groktrace.run.views import View, find_views

# What safetensors can hold, since version 0.4, and complex128, as pairs.
STORABLE = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2}
    | {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128}
)


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


def parameters_of(model: nn.Module, own: LossTensors = NO_TENSORS) -> dict[str, Tensor]:
    """Parameters of a plain model and its loss, tied ones once."""
    return dict(model.named_parameters()) | own.parameters()


def views_of(model: nn.Module, own: LossTensors = NO_TENSORS) -> dict[str, View]:
    """The views among the tensors of a plain model and its loss; none where that is not clear."""
    parameters = parameters_of(model, own)
    try:
        return find_views(parameters | dict(model.named_buffers()) | own.buffers(), parameters)
    except TaskError:  # told where model and loss are traced
        return {}


def held_parameters(optimizer: Any) -> frozenset[int] | None:
    """The ids of what an optimizer, and those that it wraps, update; None without an optimizer."""
    if optimizer is None:
        return None
    held: set[int] = set()
    for _ in range(8):
        groups = getattr(optimizer, "param_groups", None)
        held.update(id(parameter) for group in groups or () for parameter in group["params"])
        optimizer = getattr(optimizer, "optimizer", None)
        if optimizer is None:
            break
    return frozenset(held)


def training_names(parameters: Mapping[str, Tensor], views: Mapping[str, View], optimizer: Any) -> set[str]:
    """The names of parameters that train: that require a gradient, and that the optimizer, if any, holds.

    A view trains as its base, so that shared numbers count once.
    """
    held = held_parameters(optimizer)
    names = (
        name
        for name, tensor in parameters.items()
        if tensor.requires_grad
        and (held is None or id(tensor) in held)
        and (tensor.is_floating_point() or tensor.is_complex())
    )
    return {views[name].base if name in views else name for name in names}


def describe_weights(model: nn.Module, optimizer: Any = None, own: LossTensors = NO_TENSORS) -> dict[str, WeightSpec]:
    """Describe the tensors that a snapshot of `model` and its loss holds.

    Args:
        model: the plain model.
        optimizer: what it holds trains; None where all trains that requires a gradient.
        own: the tensors of the loss.

    Raises:
        SettingsError: a tensor cannot be kept.
    """
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise SettingsError(
            "model: FullyShardedDataParallel keeps weights in flat pieces without their names; shard the model with "
            "torch.distributed.fsdp.fully_shard instead."
        )
    tensors = dict(named_tensors(model))
    of_loss = own.parameters() | own.buffers()
    for name, tensor in (tensors | of_loss).items():
        _check_tensor(name, tensor)
    parameters, views = parameters_of(model, own), views_of(model, own)
    alone = training_names(parameters, {}, optimizer)
    for name in alone & views.keys():
        if views[name].base not in alone and views[name].dims is None:
            raise SettingsError(
                f"model: '{name}', which the optimizer holds, is a part of '{views[name].base}', which it does not "
                "hold; make two parameters of that one."
            )
    training = training_names(parameters, views, optimizer)
    return {
        name: WeightSpec(tuple(tensor.shape), tensor.dtype, name in training, loss=name in of_loss)
        for name, tensor in (tensors | of_loss).items()
    }


def _check_tensor(name: str, tensor: Tensor) -> None:
    if nn.parameter.is_lazy(tensor):
        raise SettingsError(f"model: '{name}' has no shape yet; run the model on one batch before watch().")
    if tensor.layout != torch.strided or tensor.is_meta:
        raise SettingsError(f"model: expected dense weights that hold values, but '{name}' is sparse or on 'meta'.")
    if tensor.dtype not in STORABLE:
        raise SettingsError(f"model: '{name}' is {tensor.dtype}, which safetensors files cannot hold.")


def is_sharded(model: nn.Module) -> bool:
    """Whether weights are sharded over processes, all of which must take part in reading them."""
    return any(_in_pieces(tensor) for _, tensor in named_tensors(model))


def _in_pieces(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Unshard a model within; every process has to take part."""
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
    """Copies of a network's tensors in CPU buffers that are allocated once and reused.

    Args:
        model: whose weights are copied: the plain model, or another one with the same tensors.
        specs: what every snapshot must hold.
        once: tensors that are kept elsewhere, and copied only from when they change.
        trained: the plain model, which says what trains; None for `model`.
        own: the tensors of the loss.
        optimizer: what it holds trains.
        unreached: parameters that the loss's gradient does not reach, so that only the script's own hand moves them.
        step: the training step.

    Attributes:
        begun: parameters that were seen to begin to train since the last report, with the step.
        late: parameters whose change was seen late since then, with the step after which snapshots may hold older
            values, and the last that may.
        sharded: whether weights lie in shards on several processes.
        buffers: the copies, by name.
    """

    def __init__(
        self,
        model: nn.Module,
        specs: dict[str, WeightSpec],
        once: Iterable[str] = (),
        *,
        trained: nn.Module | None = None,
        own: LossTensors = NO_TENSORS,
        optimizer: Any = None,
        unreached: Iterable[str] = (),
        step: int = 0,
    ) -> None:
        self._model, self._own = model, own
        self._trained, self._optimizer = model if trained is None else trained, optimizer
        self._specs = dict(specs)
        self._unreached = frozenset(unreached)
        self._views = views_of(self._trained, own)
        # Parameters that have not been seen to train.
        names = parameters_of(self._trained, own).keys() - self._views.keys()
        self._still = {name for name in names if not specs[name].trainable}
        current, once = self._all(), frozenset(once)
        self._once = FrozenTensors({name: current[name] for name in current if name in once}, step)
        self._pinned = {name: tensor.is_cuda for name, tensor in current.items()}
        self._step, self._copied = step, step
        self._filled: set[str] = set()
        self.begun: dict[str, int] = {}
        self.late: dict[str, tuple[int, int]] = {}
        self.sharded = is_sharded(model)
        self.buffers: dict[str, Tensor] = {}
        for name in specs.keys() - self._once.names:
            self._allocate(name)

    def attach(self, optimizer: Any, began: bool) -> set[str]:
        """Follow what another optimizer trains.

        Args:
            optimizer: what it holds trains.
            began: whether updates were counted before; what has trained then goes on counting as trained.

        Returns:
            The parameters that counted as trained before, but that it does not hold.

        Raises:
            SettingsError: what it holds cannot be told apart from the rest.
        """
        specs = describe_weights(self._trained, optimizer, self._own)
        self._optimizer = optimizer
        still = {name for name, spec in self._specs.items() if spec.trainable and not specs[name].trainable}
        if began or optimizer is None:
            return set()
        self._still |= still
        self._specs |= {name: specs[name] for name in still}
        return still

    def look(self, step: int, whole: bool = False) -> None:
        """Find out what trains now, and which of the tensors kept elsewhere were modified.

        Args:
            step: the training step, which the next copy is of.
            whole: whether to compare all of every tensor.
        """
        self._step = step
        if not self._still:
            return
        for name in training_names(parameters_of(self._trained, self._own), self._views, self._optimizer):
            self._begin(name)
        if not self._once.names:
            return
        candidates = self._candidates()
        for name, known in self._once.compare(self._all(), step, whole).items():
            if known < self._copied:
                self.late[name] = known, self._copied
            if name in candidates:
                self._begin(name)

    def report(
        self, warn_once: Callable[[str, str], None], mark_trainable: Callable[[Mapping[str, int]], None]
    ) -> None:
        """Report the changes that `look` and `copy` have found since the last report.

        Args:
            warn_once: takes a kind of warning and its text.
            mark_trainable: takes the parameters that have begun to train, with the step from which they do.
        """
        if names := [f"'{name}'" for name in self.begun if name.startswith(PREFIX)]:
            warn_once(
                "adversary",
                f"another optimizer trains {', '.join(names[:3])}{', ...' if names[3:] else ''} of the loss, "
                "which now counts as trained for it too; if it is an adversary's, analyse the model's own "
                "weights alone (--parameters).",
            )
        if self.late:
            names = [f"'{name}'" for name in self.late]
            since, until = min(a for a, _ in self.late.values()), max(b for _, b in self.late.values())
            warn_once(
                "late",
                f"what does not train was written to, which was seen only now: {', '.join(names[:3])}"
                f"{', ...' if names[3:] else ''}; snapshots after step {since}, up to step {until}, may hold older "
                "values of it.",
            )
        if self.begun:
            mark_trainable(self.begun)
        self.begun, self.late = {}, {}

    def copy(self) -> dict[str, Tensor]:
        """Copy the network's tensors; the copies are valid until the next call.

        Raises:
            SettingsError: the model no longer has the tensors it had.
        """
        # Looked up anew, as a script may replace parameters or move the model to another device.
        kept = self._once.names
        current = {name: tensor for name, tensor in self.current().items() if name not in kept}
        for name in current.keys() - self.buffers.keys():
            self._allocate(name)
        buffers = {name: self.buffers[name] for name in current}
        candidates = self._candidates() & self._filled if self._still else set()
        devices = set()
        with torch.inference_mode(False), torch.no_grad():
            if self.sharded:
                for name, tensor in current.items():
                    whole = _whole(tensor)  # one by one, as together they may not fit the device
                    if name in candidates:
                        self._compare(name, whole)
                    buffers[name].copy_(whole)
            else:
                for name in candidates:
                    self._compare(name, current[name])
                devices = {tensor.device for tensor in current.values() if tensor.is_cuda}
                sources = [tensor.detach() for tensor in current.values()]
                if sources:
                    torch._foreach_copy_(list(buffers.values()), sources, non_blocking=bool(devices))
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        self._filled.update(current)
        self._copied = self._step
        return buffers

    def _begin(self, name: str) -> None:
        """Mark a parameter as training from now on."""
        if name in self._still:
            self._still.discard(name)
            self._once.forget(name)
            self._specs[name] = replace(self._specs[name], trainable=True, trainable_from=self._step)
            self.begun[name] = self._step

    def _candidates(self) -> set[str]:
        """Parameters with a gradient that are not known to train; another optimizer may hold them."""
        parameters = parameters_of(self._trained, self._own)
        return (training_names(parameters, self._views, None) & self._still) - self._unreached

    def _compare(self, name: str, tensor: Tensor) -> None:
        if not torch.equal(tensor.cpu(), self.buffers[name]):
            self._begin(name)

    def take_part(self) -> None:
        """Take part in the collectives of the process that copies a sharded model."""
        with torch.inference_mode(False), torch.no_grad():
            for tensor in self.current().values():
                _whole(tensor)

    def moved(self) -> bool:
        """Whether a trainable tensor has changed since its last copy."""
        with torch.inference_mode(False), torch.no_grad():
            return any(
                spec.trainable and not torch.equal(tensor.cpu(), self.buffers[name])
                for name, tensor in self.current().items()
                if (spec := self._specs[name])
            )

    def _allocate(self, name: str) -> None:
        # Buffers made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            self.buffers[name] = _allocate(self._specs[name], self._pinned[name])

    def _all(self) -> dict[str, Tensor]:
        return dict(named_tensors(self._model)) | self._own.parameters() | self._own.buffers()

    def current(self) -> dict[str, Tensor]:
        """The tensors as they are now, by name."""
        current = self._all()
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


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if _in_pieces(tensor) else tensor


def _allocate(spec: WeightSpec, pinned: bool) -> Tensor:
    """Allocate one CPU buffer, pinned where a GPU copies into it."""
    if pinned:
        with contextlib.suppress(RuntimeError):  # out of pinned memory: pageable memory is only slower
            return torch.empty(spec.shape, dtype=spec.dtype, device="cpu", pin_memory=True)
    # Zeros instead of empty: touch the pages here and not during the first snapshot.
    return torch.zeros(spec.shape, dtype=spec.dtype, device="cpu")
