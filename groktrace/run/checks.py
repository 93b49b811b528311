"""Check on a few samples that a loss is a mean over them, in any order, and a function of the weights."""

import contextlib
import copy
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from groktrace.errors import TaskError
from groktrace.run.batch import Batch
from groktrace.run.isolation import seeded_rng
from groktrace.run.loss_noise import REMEDY, fix_noise, without_noise
from groktrace.run.model_with_loss import ModelWithLoss, on_device_of
from groktrace.run.program import draws_random_numbers

FEW = 2
# Networks of at most this many weights are evaluated in double precision, to tell differences from rounding.
MAX_DOUBLED = 1_000_000
# Evaluations with different random numbers: a loss that flips a coin often gives the same value twice.
DRAWS = 4


class LossProbe:
    """A loss on a few samples: without gradients, with fixed random numbers, in double precision where that works.

    Args:
        forward: model and loss as one module, in evaluation mode.
        batch: samples, of which a few are used.
    """

    def __init__(self, forward: ModelWithLoss, batch: Batch) -> None:
        self.forward = forward
        self.batch = batch
        self.few = batch.take(slice(0, FEW)).tensors
        parameters = list(forward.parameters())
        self.device = parameters[0].device if parameters else torch.device("cpu")
        epsilons = [torch.finfo(parameter.dtype).eps for parameter in parameters if parameter.is_floating_point()]
        self.tolerance, self.floor = max([1e-3, *(8 * epsilon for epsilon in epsilons)]), 1e-6
        self._doubled: dict[str, Tensor] = {}
        self._drew = False
        if sum(parameter.numel() for parameter in parameters) <= MAX_DOUBLED:
            self._doubled = {name: _double(tensor.detach()) for name, tensor in forward.named_parameters()}
            try:
                exact = self._run(self.few, 0).dtype == torch.float64
            except Exception:  # some models, losses and devices take single precision only
                exact = False
            if exact:
                self.tolerance, self.floor = 1e-5, 0.0
            else:
                self._doubled = {}

    def on(self, batch: Batch) -> "LossProbe":
        """The same on other samples."""
        other = copy.copy(self)
        other.batch, other.few = batch, batch.take(slice(0, FEW)).tensors
        return other

    def loss(self, tensors: Sequence[Tensor], seed: int = 0) -> float:
        """The loss on samples, its random numbers drawn from `seed`."""
        return float(self._run(tensors, seed))

    def same(self, *losses: float) -> bool:
        """Whether losses differ by no more than rounding; always, if one is not finite."""
        allowed = self.tolerance * max(map(abs, losses)) + self.floor
        return not all(map(math.isfinite, losses)) or max(losses) - min(losses) <= allowed

    @cached_property
    def draws(self) -> tuple[float, float] | None:
        """Two values of the loss at the same weights and samples where it draws random numbers, else None."""
        with _RandomCalls() as calls:
            first = self.loss(self.few)
        self._drew = calls.seen
        tolerance = 1e-6 if self.device.type == "cpu" else 1e-3  # elsewhere sums may run in any order
        for seed in range(1, DRAWS):
            other = self.loss(self.few, seed)
            if not (math.isclose(first, other, rel_tol=tolerance) or (math.isnan(first) and math.isnan(other))):
                return first, other
        return None

    @property
    def random(self) -> bool:
        """Whether the loss draws random numbers, even equal ones every time: permuted samples then get others."""
        return self.draws is not None or self._drew

    def _run(self, tensors: Sequence[Tensor], seed: int) -> Tensor:
        placed = [tensor.to(self.device) for tensor in tensors]
        buffers = {
            name: buffer.clone() for name, buffer in self.forward.named_buffers()
        }  # the model may modify its own
        if self._doubled:
            placed, buffers = [_double(tensor) for tensor in placed], {name: _double(b) for name, b in buffers.items()}
        with torch.no_grad(), seeded_rng(seed, self.device), torch.compiler.set_stance("force_eager"):
            return torch.func.functional_call(self.forward, self._doubled | buffers, tuple(placed))[0]


class _RandomCalls(TorchDispatchMode):
    """Detects operations that draw from a torch generator."""

    seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        passed = kwargs or {}
        schema = func._schema.arguments
        given = {argument.name: argument.default_value for argument in schema}
        given |= dict(zip((argument.name for argument in schema), args, strict=False)) | passed
        self.seen = self.seen or draws_random_numbers(func, given)
        return func(*args, **passed)


def check_forward(forward: ModelWithLoss, batch: Batch, held_out: Batch | None = None) -> LossProbe:
    """Try the loss on a few samples.

    Args:
        forward: model and loss, in evaluation mode.
        batch: training samples.
        held_out: validation samples, or None.

    Returns:
        What further checks of the loss on the training samples take.

    Raises:
        TaskError: it fails, or does not return one number, or not a mean.
    """
    for what, samples in (("training", batch), ("validation", held_out)):
        if samples is None:
            continue
        try:
            loss = first_loss(forward, samples)
        except Exception as failure:
            raise TaskError(
                f"model and loss fail on the {what} data ({type(failure).__name__}: {failure}); "
                f"{_advice(forward, samples, failure)}"
            ) from failure
        if not (isinstance(loss, Tensor) and loss.ndim == 0 and loss.is_floating_point()):
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TaskError(f"loss: expected one number, the mean over the batch, got {got}.")
    probe = LossProbe(forward, batch)
    check_mean(probe)
    return probe


def first_loss(forward: ModelWithLoss, batch: Batch, axis: int = 0) -> Any:
    """The loss of two samples along an axis.

    Args:
        forward: model and loss, in evaluation mode.
        batch: samples.
        axis: theirs.
    """
    few = Batch(tuple(tensor.narrow(axis, 0, min(2, tensor.shape[axis])) for tensor in batch.tensors), batch.structure)
    placed = on_device_of(forward, few)
    with torch.no_grad(), seeded_rng(0, placed.tensors[0].device):
        return forward(*placed.tensors)[0]


def _advice(forward: ModelWithLoss, batch: Batch, failure: Exception) -> str:
    if forward.loss is functional.cross_entropy and "target size" in str(failure):
        return (
            "cross_entropy takes classes on the second axis: for sequences with classes on the last axis give "
            "loss=lambda o, t: cross_entropy(o.flatten(0, -2), t.flatten())."
        )
    if "does not require grad" in str(failure):
        return (
            "a loss is evaluated without gradients, too: where it takes derivatives of outputs with respect to inputs, "
            "compute these under `with torch.enable_grad():` and on x.clone().requires_grad_()."
        )
    if shared_second_axis(batch.tensors) is not None:
        with contextlib.suppress(Exception):
            first_loss(forward, batch, axis=1)
            return (
                "the first axis of every tensor is that of the samples, but they take the second as such; give the "
                "data as x.transpose(0, 1), and transpose them back in batch_loss=lambda model, batch: ..."
            )
    return (
        "check that train has the form that the model and the loss take; the first axis of every tensor is that of the "
        "samples, and the entries of a list of such tensors are batches."
    )


def check_with_noise(
    forward: ModelWithLoss, batch: Batch, held_out: Batch | None, seed: int
) -> tuple[LossProbe, Batch | None]:
    """As `check_forward`, of a loss whose random numbers are fixed; also the validation samples with theirs.

    Args:
        forward: see `check_forward`.
        batch: training samples.
        held_out: validation samples, or None.
        seed: of the random numbers, where the samples hold none yet.

    Raises:
        TaskError: as `check_forward`; or what the loss draws cannot be fixed.
    """
    check_forward(forward, without_noise(batch), None if held_out is None else without_noise(held_out))
    batch, held_out = fix_noise(forward, batch, held_out, seed)
    probe = check_forward(forward, batch, held_out)
    if probe.draws:
        raise TaskError(
            f"noise: at the same weights and samples the loss is {probe.draws[0]!r}, then {probe.draws[1]!r}, though "
            "what it draws by torch.rand, torch.randn and the like is fixed; not so what NumPy, Python, multinomial, "
            f"gumbel_softmax or dropout draw. For these, {REMEDY}."
        )
    return probe, held_out


def check_mean(probe: LossProbe) -> None:
    """Refuse a loss that grows with the number of samples, which would inflate ΔF.

    Samples that come twice and three times leave a mean as it is. A sum, also with a penalty on the weights beside it,
    grows by the same amount each time, and a norm by a power; a contrastive loss does neither.

    Raises:
        TaskError: it does.
    """
    try:
        if probe.random:
            return
        once, twice, thrice = (probe.loss([torch.cat([tensor] * times) for tensor in probe.few]) for times in (1, 2, 3))
    except Exception:  # a batch size that the model does not take
        return
    if not all(map(math.isfinite, (once, twice, thrice))) or probe.same(once, twice, thrice):
        return
    rounding = max(1e-4, probe.tolerance)  # no other loss grows so evenly by chance
    summed = math.isclose(twice - once, thrice - twice, rel_tol=rounding)
    power = False
    if once * twice > 0 and once * thrice > 0:
        exponents = [math.log(twice / once) / math.log(2), math.log(thrice / once) / math.log(3)]
        power = abs(exponents[0]) > 0.1 and math.isclose(*exponents, rel_tol=rounding)
    if summed or power:
        raise TaskError(
            f"loss: expected a mean over the samples of a batch, got one that changes with their number: {once:.6g}, "
            f"and {twice:.6g} where each sample comes twice. Use reduction='mean', or divide a sum by the "
            "batch's length."
        )


def check_repeatable(probe: LossProbe) -> None:
    """Refuse a loss that varies between evaluations at the same weights and samples.

    Raises:
        TaskError: it is not.
    """
    try:
        draws = probe.draws
    except Exception:  # as above
        return
    if draws:
        raise TaskError(
            "loss: expected a function of the weights, got one that draws random numbers or keeps count: at the same "
            f'weights and samples it is {draws[0]!r}, then {draws[1]!r}. noise="fixed" keeps one draw for each sample; '
            "or give them with the data, as train=(x, y, noise) with batch_loss=; functional.dropout takes "
            "training=self.training."
        )


def spectral_norm_note(model: torch.nn.Module) -> str | None:
    """Say what λ̂ is that of where a network estimates spectral norms, by vectors that no weight tells.

    Args:
        model: the network.
    """
    for path, module in model.named_modules():
        names = dict(module.named_buffers(recurse=False))
        hooks = [type(hook).__name__ for hook in module._forward_pre_hooks.values()]
        if (type(module).__name__ == "_SpectralNorm" and "_u" in names) or "SpectralNorm" in hooks:
            where = path.partition("parametrizations")[0].rstrip(".") or type(model).__name__
            return (
                f"model: {where} has a spectral_norm, whose vectors u and v stay those of the snapshot while its "
                "weights are sampled. λ̂ is that of the network with these: up to a fifth lower than where the norm "
                "follows the weights. Compare snapshots of such networks with one another only."
            )
    return None


def sample_axis_note(probe: LossProbe, what: str) -> str | None:
    """Describe the problem where the first axis does not look like the samples, whose order must not matter.

    Args:
        probe: model, loss and data.
        what: the data's argument, for the sentence.
    """
    few = probe.batch.take(slice(0, 2 * FEW)).tensors
    if len(few[0]) < 2:
        return None
    try:
        if probe.random:
            return None
        any_order = probe.same(probe.loss(few), probe.loss([tensor.flip(0) for tensor in few]))
        number = shared_second_axis(few)
        if any_order and (number is None or _halves_agree(probe, few, 0)):
            return None
    except Exception:  # as above
        return None
    if number is not None and _second_axis_fits(probe, few):
        return (
            f"{what}: the first axis of every tensor is that of the samples, here {len(probe.batch)}, but to the loss "
            f"the second looks like it, here {number}. Are the data time-first? Then give them as x.transpose(0, 1), "
            "and transpose them back in batch_loss=lambda model, batch: ..."
        )
    if any_order:
        return None
    return (
        f"{what}: the first axis of every tensor is that of the samples, but the loss changes with their order. Where "
        "it is time, or an entry of a list is one sample, put the samples first by transpose or torch.stack."
    )


def shared_second_axis(tensors: Sequence[Tensor]) -> int | None:
    """The size of the second axis, if all tensors share it."""
    sizes = {tensor.shape[1] if tensor.ndim > 1 else 0 for tensor in tensors}
    return sizes.pop() if len(sizes) == 1 and min(sizes) > 1 else None


def _second_axis_fits(probe: LossProbe, tensors: Sequence[Tensor]) -> bool:
    try:
        return _halves_agree(probe, [tensor[:, : 2 * FEW] for tensor in tensors], 1)
    except Exception:  # an axis of features, say
        return False


def _halves_agree(probe: LossProbe, tensors: Sequence[Tensor], axis: int) -> bool:
    """Whether the loss is the mean of that of two halves along an axis, in either order."""
    half = tensors[0].shape[axis] // 2
    left, right = ([tensor.narrow(axis, start, half) for tensor in tensors] for start in (0, half))
    whole, swapped = (
        probe.loss([torch.cat(pair, axis) for pair in zip(*halves, strict=True)])
        for halves in ((left, right), (right, left))
    )
    return probe.same(whole, swapped, (probe.loss(left) + probe.loss(right)) / 2)


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
