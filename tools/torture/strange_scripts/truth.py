"""What a training script knows of itself: kept while it trains, to be held against what groktrace says of it."""

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass
class State:
    """A network after some updates.

    Attributes:
        weights: every tensor by name.
        losses, val_losses: in evaluation mode, one for each draw of what is random.
        gradients: of the training loss in evaluation mode, by name of the parameters that train; as 16 bits make it
            and of what is random they tell nothing.
        accuracy, val_accuracy: fraction of right predictions; None where there are no classes.
        size: how many real numbers train.
        norm: their Euclidean norm.
        llc: at (nβ, γ) what λ̂ and λ_c are in truth, where the loss is quadratic in the weights.
    """

    weights: dict[str, Tensor]
    losses: Tensor
    val_losses: Tensor
    gradients: dict[str, Tensor]
    accuracy: float | None
    val_accuracy: float | None
    size: int
    norm: float
    llc: Callable[[float, float], tuple[float, float]] | None


@dataclass
class Truth:
    """Kept by a script, and by nothing of groktrace's.

    Attributes:
        model: the network that trains.
        trained: the parameters that optimizers hold.
        live: (model, batch) → the loss that is trained on.
        predict: (model, batch) → predictions and targets, of which accuracy is read.
        train, val: give the samples in the form of a batch; anew at each call where they are random.
        draws: how many times to evaluate what is random.
        quadratic: whether the loss is quadratic in the trained weights.
        average: the network that is recorded instead of `model`, if another is.
        updates: how many there were.
        first: how many before watch() was called first.
        watched: whether watch() has returned.
        states: by number of updates, what the network was then; more than one where the script wrote to it between
            two updates.
        logged: by number of updates before them, the numbers that the script logged.
        ever: names of the parameters that trained at some time.
        end: the network as it is handed over last.
    """

    model: nn.Module
    trained: list[nn.Parameter]
    live: Callable[..., Tensor]
    predict: Callable[..., tuple[Tensor, Tensor]]
    train: Callable[[], Any]
    val: Callable[[], Any]
    draws: int = 1
    quadratic: bool = False
    average: nn.Module | None = None
    updates: int = 0
    first: int | None = None
    watched: bool = False
    states: dict[int, list[State]] = field(default_factory=dict)
    logged: dict[int, dict[str, Any]] = field(default_factory=dict)
    ever: set[str] = field(default_factory=set)
    end: State | None = None

    def keep(self) -> None:
        """The network as it is now is one that it was after this many updates."""
        self.states.setdefault(self.updates, []).append(self.state())

    def begin(self) -> None:
        """watch() is called."""
        self.watched = False
        self.first = self.updates if self.first is None else self.first

    def update(self) -> None:
        """One more update is done."""
        self.updates += 1
        self.keep()

    def finish(self) -> None:
        """The network as it is now is handed over."""
        self.end = self.state()

    def state(self) -> State:
        """The network as it is now."""
        model = self.model if self.average is None else self.average
        weights = {name: t.detach().clone() for name, t in (*model.named_parameters(), *model.named_buffers())}
        with _left_alone(model), torch.no_grad():
            batches = [(self.train(), self.val()) for _ in range(self.draws)]
            losses, val_losses = (
                torch.stack([self.live(model, draw[side]).detach().double() for draw in batches]) for side in (0, 1)
            )
            accuracy, val_accuracy = (self._accuracy(model, batch) for batch in batches[0])
        moving = self.moving(model)
        self.ever |= moving.keys()
        with _left_alone(model):
            loss = self.live(model, batches[0][0])
            found = torch.autograd.grad(loss, list(moving.values()), allow_unused=True, materialize_grads=True)
        directions = Directions(list(moving.values()))
        llc = None
        if self.quadratic:
            with _left_alone(model):
                llc = self._exact(model, list(moving), directions, batches[0][0])
        norm = float(directions.base.double().norm())
        gradients = dict(zip(moving, found, strict=True))
        size = len(directions.base)
        return State(weights, losses, val_losses, gradients, accuracy, val_accuracy, size, norm, llc)

    def memory(self, names: Iterable[str]) -> set[int]:
        """Where the parameters of these names lie, the same place for those that share it; others are passed over."""
        parameters = dict(self.model.named_parameters())
        return {parameters[name].untyped_storage().data_ptr() for name in names if name in parameters}

    def moving(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that train, by name; of an average those that average them."""
        held = {id(parameter) for parameter in self.trained if parameter.requires_grad}
        names = {name for name, parameter in self.model.named_parameters() if id(parameter) in held}
        return {name: parameter for name, parameter in model.named_parameters() if name in names}

    def _accuracy(self, model: nn.Module, batch: Any) -> float | None:
        predictions, targets = self.predict(model, batch)
        if targets.is_floating_point():
            return None
        counted = targets >= 0
        return float((predictions.argmax(-1) == targets)[counted].double().mean())

    def _exact(
        self, model: nn.Module, names: list[str], directions: "Directions", batch: Any
    ) -> Callable[[float, float], tuple[float, float]]:
        """λ̂ = nβ·E[L − L*] and λ_c = ½·nβ·tr(H(nβH + γ)⁻¹) of a quadratic loss under its localised posterior.

        With slope g at w*, the posterior's mean is off w* by m = −nβ(nβH + γ)⁻¹g, and λ̂ = nβ(g·m + ½mᵀHm) + λ_c.
        """

        def loss(base: Tensor) -> Tensor:
            named = dict(zip(names, directions.spread(base), strict=True))
            return self.live(lambda *batch: torch.func.functional_call(model, named, batch), batch)

        hessian = torch.func.hessian(loss)(directions.base).double()
        slope = torch.func.grad(loss)(directions.base).double()

        def llc(nbeta: float, localization: float) -> tuple[float, float]:
            precision = nbeta * hessian + localization * torch.eye(len(hessian), dtype=torch.float64)
            off = -nbeta * torch.linalg.solve(precision, slope)
            centred = 0.5 * nbeta * float(torch.linalg.solve(precision, hessian).trace())
            return nbeta * float(slope @ off + 0.5 * off @ hessian @ off) + centred, centred

        return llc


class Directions:
    """Parameters as one vector of real numbers, in which an element that several of them share stands once.

    Args:
        parameters: any, also complex ones and views of one storage.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        real = [torch.view_as_real(p.detach()) if p.is_complex() else p.detach() for p in parameters]
        self._complex = [p.is_complex() for p in parameters]
        self._shapes = [t.shape for t in real]
        addresses = [_addresses(t).flatten() for t in real]
        unique, inverse = torch.cat(addresses).unique(return_inverse=True)
        self._places = inverse.split([len(address) for address in addresses])
        values = torch.cat([t.flatten() for t in real])
        self.base = torch.empty(len(unique), dtype=values.dtype).index_copy_(0, inverse, values)

    def spread(self, base: Tensor) -> list[Tensor]:
        """The parameters that a vector stands for."""
        parts = [base[place].reshape(shape) for place, shape in zip(self._places, self._shapes, strict=True)]
        return [torch.view_as_complex(p) if pair else p for p, pair in zip(parts, self._complex, strict=True)]


def _addresses(tensor: Tensor) -> Tensor:
    """Where in memory each element lies."""
    places = torch.full(tensor.shape, tensor.data_ptr())
    for axis, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        along = torch.arange(size) * stride * tensor.element_size()
        places += along.reshape(-1, *[1] * (tensor.ndim - axis - 1))
    return places


@contextlib.contextmanager
def _left_alone(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; random generators, flags and buffers are put back."""
    flags, python, legacy = [(m, m.training) for m in model.modules()], random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model.eval()
            yield
    finally:
        for module, flag in flags:
            module.training = flag
        random.setstate(python)
        np.random.set_state(legacy)
