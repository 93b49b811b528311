"""A task: the loss of a network as a function of its weights, with the data it is measured on."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from groktrace.attention import for_live_models
from groktrace.errors import TaskError
from groktrace.run.batch import Batch, unflatten
from groktrace.run.checks import (
    LossProbe,
    check_forward,
    check_repeatable,
    check_with_noise,
    first_loss,
    sample_axis_note,
    spectral_norm_note,
)
from groktrace.run.collation import company_note, random_samples_note
from groktrace.run.collect import Fits, collect
from groktrace.run.isolation import without_side_effects
from groktrace.run.loss_noise import without_noise
from groktrace.run.model_with_loss import ModelWithLoss, evaluation_mode, on_device_of

MAX_SAMPLES = 8192
# What program.json calls `Task.shift_invariant`; another name would change its digest, and so the random draws.
SHIFT_INVARIANT_KEY = "offset_free"
NAMED_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": functional.cross_entropy,
    "mse": functional.mse_loss,
}


ForwardFunction = Callable[[Mapping[str, Tensor], Sequence[Tensor]], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Task:
    """The loss as a function of the weights, and the data it is measured on.

    Attributes:
        forward: (weights by the model's own names, flat batch tensors) → (mean loss, outputs or None); a function of
            these alone: dropout off, normalisation by the given buffers.
        train: the training samples that the analysis uses; None for those that a run holds.
        val: validation samples, or None.
        n: number of training samples in truth; `train` may hold a random subset. 0 without `train`.
        shift_invariant: whether the loss ignores a constant added to every sample's outputs, so that predictions are
            read after removing their mean offset over the training set.
        bind: makes the task on data, where it has none of its own; see `with_data`.
        parameters: those of the live model and loss by the names that `forward` takes, and so the buffers.
        buffers: see `parameters`.
        follow: the names of those that lie in the memory of others, with the others' names; `forward` computes them.
        module: the live model and loss.
        n_val: number of validation samples in truth.
    """

    forward: ForwardFunction
    train: Batch | None
    val: Batch | None
    n: int
    shift_invariant: bool
    bind: Callable[[Batch, Batch | None, int], "Task"] | None = field(default=None, repr=False, compare=False)
    parameters: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    buffers: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    follow: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    module: ModelWithLoss | None = field(default=None, repr=False, compare=False)
    n_val: int = field(default=0, repr=False, compare=False)

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        *,
        train: Any = None,
        loss: Callable[..., Tensor] | str | None = None,
        batch_loss: Callable[..., Tensor] | None = None,
        val: Any = None,
        n: int | None = None,
        noise: str | None = None,
        seed: int = 0,
    ) -> "Task":
        """A task from live objects: what a `--task package.module:factory` returns.

        Args:
            model: the network; it is neither copied nor changed.
            train: (inputs, targets), a dict of tensors, a list of batches, a Dataset or a DataLoader. Leave it out to
                have the run analysed on the samples that it holds, training and validation; data given here are
                taken in their place, and where they are others, a RuntimeWarning says so.
            loss: loss(outputs, targets) as a mean over the batch, or "cross_entropy" or "mse".
            batch_loss: instead of `loss`, batch_loss(model, batch) for models that compute their own.
            val: validation data in the same form as `train`.
            n: the number of training samples, where `train` is a stream without an end or a length, or a sample of
                them such as a list of random batches.
            noise: "fixed" draws the random numbers of the loss once for each sample, and keeps them. Those that a run
                holds are taken from there.
            seed: chooses the subset where there are more than 8192 samples.

        Raises:
            TaskError: data and loss do not fit together, or the loss is no mean or no function of the weights.
        """
        if train is None:
            for name, value in (("val", val), ("n", n)):
                if value is not None:
                    raise TaskError(f"{name}: of no use without train; give the training data too, or neither.")
            find_loss(loss, batch_loss)
            check_noise(noise)
            return cls(_without_data, None, None, 0, False, partial(cls._from_batches, model, loss, batch_loss))
        with without_side_effects(model):
            fits = takes(model, loss, batch_loss)
            batch, n = collect(train, "train", MAX_SAMPLES, seed, fits, n)
            held_out, n_val = (None, 0) if val is None else collect(val, "val", MAX_SAMPLES, seed, fits, endless=True)
            forward = make_forward(model, loss, batch_loss, batch, held_out)
            probe, held_out = _probe(forward, batch, held_out, check_noise(noise), seed)
            with evaluation_mode(probe.forward):
                notes = *data_notes(probe, train, val, held_out), *company_notes(probe, train)
        for note in notes:
            warnings.warn(f"groktrace: {note}", RuntimeWarning, stacklevel=2)
        return cls._of(probe, held_out, n, n_val)

    def with_data(self, train: Batch, val: Batch | None, n: int) -> "Task":
        """This task, on these data if it has none of its own.

        Args:
            train: training samples.
            val: validation samples, or None.
            n: number of training samples in truth.

        Raises:
            TaskError: data and loss do not fit together.
        """
        return self if self.bind is None else self.bind(train, val, n)

    @classmethod
    def _from_batches(
        cls,
        model: nn.Module,
        loss: Callable[..., Tensor] | str | None,
        batch_loss: Callable[..., Tensor] | None,
        batch: Batch,
        held_out: Batch | None,
        n: int,
    ) -> "Task":
        with without_side_effects(model):
            own = without_noise(batch)
            forward = make_forward(model, loss, batch_loss, own, None if held_out is None else without_noise(held_out))
            probe, held_out = _probe(forward, batch, held_out, own is not batch)
        return cls._of(probe, held_out, n, 0 if held_out is None else len(held_out))

    @classmethod
    def _of(cls, probe: LossProbe, held_out: Batch | None, n: int, n_val: int) -> "Task":
        module, batch = probe.forward, probe.batch
        with without_side_effects(module), evaluation_mode(module):
            shift_invariant = is_shift_invariant(module, batch)
            module.find_tensors(batch)

        def forward(weights: Mapping[str, Tensor], tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
            with evaluation_mode(module), for_live_models():
                return module.evaluate(weights, tensors)

        parameters, buffers = module.parameters_by_name(), module.buffers_by_name()
        if module.own.loose or module.own.holds_weights:
            traced = _traced_forward(module, batch)
            if traced is not None:
                forward = traced
            else:
                parameters = {name: tensor for name, tensor in parameters.items() if name not in module.own.loose}
        follow = {name: view.base for name, view in module.views.items()}
        return cls(
            forward,
            batch,
            held_out,
            n,
            shift_invariant,
            parameters=parameters,
            buffers=buffers,
            follow=follow,
            module=module,
            n_val=n_val,
        )


def _traced_forward(forward: ModelWithLoss, batch: Batch) -> Callable[..., tuple[Tensor, Tensor | None]] | None:
    """Trace a loss that holds tensors itself, so that others can take their place; None, and a warning, on failure."""
    from groktrace.run.program import Program

    try:
        program = Program.trace(forward, batch)
    except TaskError as failure:
        warnings.warn(
            f"groktrace: the loss holds tensors that train, or the model's own, and stays as it is when these move "
            f"({failure}); make it a torch.nn.Module with parameters, or a function of outputs and targets.",
            RuntimeWarning,
            stacklevel=3,
        )
        return None
    if forward.model is getattr(forward.model, "_orig_mod", forward.model):
        return program.forward
    return lambda weights, tensors: program.forward(
        {name.removeprefix("_orig_mod."): tensor for name, tensor in weights.items()}, tensors
    )


def _without_data(weights: Mapping[str, Tensor], tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """The loss of a task without data, whose nesting is not known yet."""
    raise TaskError("train: the task has no data of its own; analyse a run with it, or give it some.")


def make_forward(
    model: nn.Module,
    loss: Callable[..., Tensor] | str | None,
    batch_loss: Callable[..., Tensor] | None,
    train: Batch,
    val: Batch | None = None,
    noise: Sequence[int] = (),
) -> ModelWithLoss:
    """Combine model and loss into one module, after all checks that need no evaluation.

    Args:
        model: the network.
        loss: see `Task.from_model`.
        batch_loss: see `Task.from_model`.
        train: training samples.
        val: validation samples, or None.
        noise: see `ModelWithLoss`; then the samples hold what the loss draws.

    Raises:
        TaskError: no loss, two losses, an unknown name, or data that the loss cannot take.
    """
    loss = find_loss(loss, batch_loss)
    if val is not None and val.structure != train.structure:
        raise TaskError("val: expected the same nesting of tensors as train.")
    structure = without_noise(train).structure if noise else train.structure
    if loss is not None:
        match structure:
            case {"tuple": [_, _]} | {"list": [_, _]}:
                pass
            case _:
                raise TaskError(
                    "train: with loss=f(outputs, targets) expected a pair (inputs, targets); for batches of another "
                    "form give batch_loss=f(model, batch)."
                )
    return ModelWithLoss(model, loss, batch_loss, structure, noise)


def check_noise(noise: str | None) -> bool:
    """Whether the random numbers of the loss are to be fixed.

    Raises:
        TaskError: `noise` is neither None nor "fixed".
    """
    if noise not in (None, "fixed"):
        raise TaskError(f"noise: expected None or 'fixed', got {noise!r}.")
    return noise is not None


def _probe(
    module: ModelWithLoss, batch: Batch, held_out: Batch | None, fixed: bool, seed: int = 0
) -> tuple[LossProbe, Batch | None]:
    """Evaluate the loss on a few samples, and check that it is a function of the weights; also the validation samples.

    Args:
        module: model and loss.
        batch: training samples.
        held_out: validation samples, or None.
        fixed: whether the samples hold the random numbers of the loss, or are to hold them.
        seed: of these.
    """
    with evaluation_mode(module):
        if fixed:
            probe, held_out = check_with_noise(module, batch, held_out, seed)
        else:
            probe = check_forward(module, batch, held_out)
            check_repeatable(probe)
    return probe, held_out


def find_loss(
    loss: Callable[..., Tensor] | str | None, batch_loss: Callable[..., Tensor] | None
) -> Callable[..., Tensor] | None:
    """Resolve a loss given by name or as a function.

    Raises:
        TaskError: no loss, two losses, an unknown name, or no function.
    """
    if (loss is None) == (batch_loss is None):
        raise TaskError("loss: give exactly one of loss=f(outputs, targets) and batch_loss=f(model, batch).")
    if isinstance(loss, str):
        if loss not in NAMED_LOSSES:
            raise TaskError(f"loss: expected a function or one of {', '.join(NAMED_LOSSES)}, got '{loss}'.")
        loss = NAMED_LOSSES[loss]
    for function in (loss, batch_loss):
        if function is not None and not callable(function):
            raise TaskError(f"loss: expected a function, got {type(function).__name__}.")
    return loss


def takes(model: nn.Module, loss: Callable[..., Tensor] | str | None, batch_loss: Callable[..., Tensor] | None) -> Fits:
    """A function that tells whether the model and the loss accept a batch, see `collect`."""

    def fits(batch: Batch) -> bool:
        try:
            forward = make_forward(model, loss, batch_loss, batch)
            with evaluation_mode(forward):
                float(first_loss(forward, batch))
        except Exception:
            return False
        return True

    return fits


def data_notes(probe: LossProbe, train: Any, val: Any, held_out: Batch | None) -> tuple[str, ...]:
    """Warnings about the network, and the data that were collected.

    Args:
        probe: the loss on the training samples.
        train: the training data as given.
        val: the validation data as given.
        held_out: the same as collected, or None.
    """
    notes = [spectral_norm_note(probe.forward.model)]
    notes += [random_samples_note(train, "train"), sample_axis_note(probe, "train")]
    if held_out is not None:
        notes += [random_samples_note(val, "val"), sample_axis_note(probe.on(held_out), "val")]
    return tuple(note for note in notes if note is not None)


def company_notes(probe: LossProbe, train: Any) -> tuple[str, ...]:
    """A warning, if any, that the loss of all samples together is another one than that of the training's batches.

    Args:
        probe: the loss on the training samples.
        train: the training data as given.
    """
    if random_samples_note(train, "train") is not None:  # then samples differ from one reading to the next anyway
        return ()
    note = company_note(train, "train", probe)
    return () if note is None else (note,)


def is_shift_invariant(forward: ModelWithLoss, batch: Batch) -> bool:
    """Whether the loss stays as it is when one constant per output is added to every sample's outputs."""
    if forward.loss is None or len(batch) < 2:
        return False
    few = batch.take(slice(0, 64))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        _, outputs = forward(*on_device_of(forward, few).tensors)
        if outputs is None or outputs.ndim != 2 or not outputs.is_floating_point():
            return False
        # In double precision, where a change stands clear of rounding, and on the CPU, where outputs that the loss
        # does not take are an exception; on a GPU they may end the process.
        outputs = outputs.cpu().double()
        tensors = [tensor.double() if tensor.is_floating_point() else tensor for tensor in few.tensors]
        targets = unflatten(forward.structure, tensors)[1]
        try:
            plain = forward.loss(outputs, targets)
            scale = torch.stack((outputs.std(), plain.abs())).max().clamp_min(1.0)
            offset = scale * (1 + torch.arange(outputs.shape[1], device="cpu", dtype=outputs.dtype).cos())
            shifted = forward.loss(outputs + offset, targets)
        except Exception:
            return False
        # A loss that sees the offset changes at least by the order of itself or of scale.
        return bool((shifted - plain).abs() <= 1e-6 * plain.abs() + 1e-12 * scale.square())


@contextlib.contextmanager
def failures_in_words(what: str, advice: str) -> Iterator[None]:
    """Convert whatever a loss raises to one TaskError.

    Args:
        what: that it cannot do.
        advice: what it has to be.

    Raises:
        TaskError: the body failed.
    """
    try:
        yield
    except TaskError:
        raise
    except Exception as failure:
        line = str(failure).splitlines()[0] if str(failure) else ""
        raise TaskError(f"{what} ({type(failure).__name__}: {line}); {advice}") from failure
