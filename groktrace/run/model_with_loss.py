"""Model and loss as one module that can be evaluated at other weights."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from groktrace.errors import TaskError
from groktrace.run.batch import Batch, Structure, unflatten
from groktrace.run.loss_noise import FixedNoise
from groktrace.run.loss_tensors import NO_TENSORS, PREFIX, LossTensors, UsedTensors, buffers_noted, find_loss_tensors
from groktrace.run.views import View, find_views

_MODEL_PREFIX = "model."


class ModelWithLoss(nn.Module):
    """Model and loss as one module: flat batch tensors in, (mean loss, outputs or None) out.

    Args:
        model: the user's network; its weights appear here as "model.<name>".
        loss: loss(outputs, targets), a mean over the batch; or None.
        batch_loss: batch_loss(model, batch), a mean over the batch; or None.
        structure: nesting of the batch, see `groktrace.run.batch`.
        noise: where each of the batch's last tensors, which stand for what the loss draws, has its samples in the
            draw; see `groktrace.run.loss_noise`.

    Attributes:
        own: the loss's own tensors, once `find_tensors` has found them.
        views: the tensors that are views of others, by name.
        pairs: whether pairs of real numbers are seen as complex ones.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Tensor] | None,
        batch_loss: Callable[..., Tensor] | None,
        structure: Structure,
        noise: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.batch_loss = batch_loss
        self.structure = structure
        self.noise = tuple(noise)
        self.own: LossTensors = NO_TENSORS
        self.views: dict[str, View] = {}
        self.pairs = False
        self.loss_modules = nn.ModuleList()
        self._places = self._find_places()

    def find_tensors(self, batch: Batch) -> None:
        """Find the tensors that belong to the loss alone, and those that are views of others.

        Args:
            batch: training samples; a few are used.

        Raises:
            TaskError: weights overlap in a way that nothing can be made of.
        """
        function = self.batch_loss if self.loss is None else self.loss
        used, few = UsedTensors(), batch.take(slice(0, 2))
        plainly = torch.compiler.set_stance("force_eager"), torch.no_grad(), torch.random.fork_rng(devices=[])
        with contextlib.ExitStack() as held:
            held.enter_context(evaluation_mode(self))
            moved = held.enter_context(buffers_noted(function))
            for context in (*plainly, used):
                held.enter_context(context)
            try:
                self(*on_device_of(self, few).tensors)
            except Exception:  # it takes one batch size only
                self(*on_device_of(self, batch).tensors)
        self.pairs = used.pairs
        self.adopt(find_loss_tensors(function, self.model, used.seen, moved))

    def adopt(self, own: LossTensors) -> None:
        """Register the tensors of the loss, and find views; errors as `find_tensors`."""
        self.own = own
        # Their modules become submodules, so that functional_call can replace their weights; only once, as the tracer
        # refuses a modified buffer that is registered twice.
        self.loss_modules = nn.ModuleList()
        parts = {*self.modules(), *(part for whole in own.modules for part in list(whole.modules())[1:])}
        self.loss_modules.extend(module for module in own.modules if module not in parts)
        self._places = self._find_places()
        parameters = self.parameters_by_name()
        self.views = find_views(parameters | self.buffers_by_name(), parameters)

    def parameters_by_name(self) -> dict[str, Tensor]:
        """Parameters of model and loss, by the names that a recording gives them."""
        return dict(self.model.named_parameters()) | self.own.parameters()

    def buffers_by_name(self) -> dict[str, Tensor]:
        """Buffers of model and loss, by the names that a recording gives them."""
        return dict(self.model.named_buffers()) | self.own.buffers()

    def evaluate(self, weights: Mapping[str, Tensor], tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Loss and outputs at other weights.

        Args:
            weights: by the names that a recording gives them; views follow from their bases.
            tensors: the batch's leaves.

        Raises:
            TaskError: the loss lacks weights that are given.
        """
        follow = {name: view.of(weights[view.base]) for name, view in self.views.items() if view.base in weights}
        named: dict[str, Tensor] = {}
        for name, tensor in {**weights, **follow}.items():
            if name in self._places:
                named |= dict.fromkeys(self._places[name], tensor)
            elif name.startswith(PREFIX) and name not in self.own.loose:
                raise TaskError(f"loss: the recorded one has weights that this one lacks, such as '{name}'.")
            elif name not in self.own.loose:
                named[_MODEL_PREFIX + name] = tensor
        with _Pairs() if self.pairs else contextlib.nullcontext():
            return torch.func.functional_call(self, named, tuple(tensors), tie_weights=False)

    def gather(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gradients by name, those of views added to their bases'."""
        found = {name: gradient for name, gradient in gradients.items() if name not in self.views}
        tensors = self.buffers_by_name() | self.parameters_by_name()
        for name in gradients.keys() & self.views.keys():
            view = self.views[name]
            base = tensors[view.base].detach().requires_grad_()
            with torch.enable_grad():
                part = view.of(base)
            (more,) = torch.autograd.grad(part, base, gradients[name])
            found[view.base] = found[view.base] + more if view.base in found else more
        return found

    def _find_places(self) -> dict[str, list[str]]:
        """The qualified names of every tensor: tied ones are in several modules.

        torch.func's own tying would restore a module that is registered twice to the replaced weights.
        """
        places: dict[int, list[str]] = {}
        for path, module in self.named_modules():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    places.setdefault(id(tensor), []).append(f"{path}.{name}")
        known = self.parameters_by_name() | self.buffers_by_name()
        return {name: places[id(tensor)] for name, tensor in known.items() if id(tensor) in places}

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor | None]:
        """Loss and outputs on one batch."""
        if not self.noise:
            return self._compute(tensors)
        with FixedNoise(tensors[-len(self.noise) :], self.noise):
            return self._compute(tensors[: -len(self.noise)])

    def _compute(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        batch = unflatten(self.structure, tensors)
        if self.batch_loss is not None:
            return self.batch_loss(self.model, batch), None
        inputs, targets = batch
        if isinstance(inputs, tuple | list):
            outputs = self.model(*inputs)
        elif isinstance(inputs, Mapping):
            outputs = self.model(**inputs)
        else:
            outputs = self.model(inputs)
        outputs = getattr(outputs, "logits", outputs)
        return self.loss(outputs, targets), outputs if isinstance(outputs, Tensor) else None


class _Pairs(TorchFunctionMode):
    """Reads pairs of numbers as complex ones at any alignment; torch.view_as_complex requires even offsets."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.view_as_complex and not kwargs and args[0].shape[-1:] == (2,):
            return torch.complex(args[0][..., 0], args[0][..., 1])
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Set evaluation mode within, and restore every training flag."""
    flags = [(child, child.training) for child in module.modules()]
    try:
        for child, _ in flags:
            child.training = False
        yield
    finally:
        for child, flag in flags:
            child.training = flag


def on_device_of(module: nn.Module, batch: Batch) -> Batch:
    """The batch on the device of the module's weights."""
    weight = next(module.parameters(), None)
    return batch if weight is None else batch.to(weight.device)
