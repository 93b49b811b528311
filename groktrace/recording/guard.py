"""Compare the recorded program with the live loss and gradient, from time to time."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from groktrace.recording.warn import warn_user
from groktrace.run import files
from groktrace.run.batch import Batch
from groktrace.run.gradients import distance, gradients, norm
from groktrace.run.isolation import eager_and_unfused, restored_attributes
from groktrace.run.model_with_loss import ModelWithLoss, evaluation_mode

SAMPLES = 8
SHARE = 0.005  # of the training time, for all checks but the first and the last
# Relative tolerances of loss and gradient: on a CPU, and elsewhere or in half precision.
EXACT, ROUGH = (1e-4, 1e-3), (1e-2, 1e-1)
# Absolute tolerances of a vanishing loss and gradient, relative to those at the start.
FLOOR = (1e-7, 1e-5)
LARGE = 2**26  # bytes of weights, above which a check copies, reads and differentiates none
CAUSES = (
    "Does the loss read a number that changes while training, or weights that are not the model's own? In a buffer of "
    "the model (register_buffer) each snapshot keeps them."
)


class Guard:
    """Compares the live model and loss with their program on a few samples.

    Args:
        forward: model and loss.
        program: traced from them, with their `forward` as a function of weights and samples.
        batch: training samples.
        fixed: whether the program takes batches of that size only.

    Attributes:
        frozen: the file of weights that snapshots may leave out, if there is one.
        average: whether the weights that are recorded are not the model's own, but an average of them.
        failure: why the last check could not be made, if so.
    """

    def __init__(self, forward: ModelWithLoss, program: Any, batch: Batch, fixed: bool) -> None:
        self._forward, self._program = forward, program
        self._began = time.perf_counter()
        self._spent = self._last = 0.0
        self._count, self._next = 0, 1
        self.frozen: Path | None = None
        self.average = False
        self.failure: str | None = None
        self._found: set[str] = set()
        some = [batch] if fixed else [_first(batch, SAMPLES), _first(batch, 2 * SAMPLES)]
        self._device = next(forward.model.parameters()).device
        rough = self._device.type != "cpu" or any(p.element_size() < 4 for p in forward.model.parameters())
        self._tolerances = ROUGH if rough else EXACT
        self._scale = (0.0, 0.0)
        self._samples, self._usable = batch, False
        tensors = {name: tensor.detach() for name, tensor in _state(forward).items()}
        for self._samples in some:  # the program may have been traced for sizes that a few samples do not have
            with contextlib.suppress(Exception):
                with self._unseen():
                    live, gradient = self._live(None, not self._large(tensors))
                self._scale = (abs(live), norm(gradient.values()))
                if not self._compare(tensors, gradient=False):
                    self._usable = True
                    break
        self._found.clear()
        self._spent = 0.0

    def due(self) -> bool:
        """Whether the snapshot just taken is to be checked: the first, and later ones ever more rarely."""
        self._count += 1
        cheap = self._spent + self._last <= SHARE * (time.perf_counter() - self._began)
        if not self._usable or self._count < self._next or not (self._count == 1 or cheap):
            return False
        self._next = 2 * self._count
        return True

    def report_differences(
        self, step: int, tensors: Mapping[str, Tensor], mark: Callable[[int, str], None], gradient: bool = False
    ) -> None:
        """Warn of differences at a snapshot, and have them kept with the run; of a check that fails once.

        Args:
            step: of the snapshot.
            tensors: see `check`.
            mark: called with the step and a text for each difference.
            gradient: see `check`.
        """
        for text in self.check(tensors, gradient):
            mark(step, text)
            warn_user(f"at step {step} {text}")
        if self._usable and self.failure is not None:
            self._usable = False
            warn_user(f"from step {step} on {self.failure}")

    def check(self, tensors: Mapping[str, Tensor], gradient: bool = False) -> list[str]:
        """Describe how the program differs from the live loss at a snapshot; loss and gradient once.

        Args:
            tensors: as recorded; what was frozen may be missing.
            gradient: whether to compare the gradients too.
        """
        if not self._usable:
            return []
        try:
            return self._compare(tensors, gradient)
        except Exception as failure:  # of the user's code, or for lack of memory
            reason = " ".join(f"{type(failure).__name__}: {failure}".split())[:200]
            self.failure = (
                "it cannot be checked whether the recorded program still gives the loss that trains: on samples on "
                f"which it could be evaluated at watch(), it now fails ({reason})."
            )
            return []

    def _compare(self, tensors: Mapping[str, Tensor], gradient: bool) -> list[str]:
        began = time.perf_counter()
        with self._unseen():
            # A loss that captures weights of the model can only be evaluated at the live ones.
            average = self.average and not self._forward.own.holds_weights
            weights = self._complete(tensors if average or not self.average else {})
            gradient = gradient and not self._large(weights)
            live, wanted = self._live(weights if average else None, gradient)
            recorded, got = self._recorded(weights, gradient)
        self._last = time.perf_counter() - began
        self._spent += self._last
        if not _close(live, recorded, self._tolerances[0], FLOOR[0] * self._scale[0]):
            text = (
                f"the loss on {len(self._samples)} training samples is {live:.6g}, but the recorded "
                f"program, with which the analysis measures, gives {recorded:.6g}, when first seen. {CAUSES}"
            )
            return self._once("loss", text)
        if gradient:
            error, size = distance(wanted.values(), [got[name] for name in wanted]), norm(wanted.values())
            if not error <= self._tolerances[1] * size + FLOOR[1] * self._scale[1]:
                share = f"by {error / size:.2g} of its norm" if 0 < size < math.inf and error < math.inf else "wholly"
                text = (
                    f"the loss's gradient differs {share} from that of the recorded program, with which "
                    f"the analysis measures. {CAUSES}"
                )
                return self._once("gradient", text)
        return []

    def _once(self, kind: str, text: str) -> list[str]:
        new = kind not in self._found
        self._found.add(kind)
        return [text] if new else []

    def _complete(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All tensors of a snapshot, on the device of the live ones."""
        weights = {name: tensor.detach() for name, tensor in _state(self._forward).items()}
        if not tensors or (self._device.type != "cpu" and self._large(weights)):
            return weights
        frozen = self.frozen if len(tensors) < len(weights) else None
        if frozen is not None and frozen.exists() and frozen.stat().st_size <= LARGE:
            weights |= files.read_tensors(frozen)[0]
        weights |= tensors
        return {name: tensor.to(self._device) for name, tensor in weights.items()}

    def _large(self, weights: Mapping[str, Tensor]) -> bool:
        return sum(tensor.nbytes for tensor in weights.values()) > LARGE

    def _live(self, weights: Mapping[str, Tensor] | None, gradient: bool) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradient of the live model, or of its code at other weights."""
        # The forward pass may modify buffers, so it gets copies.
        state = {name: buffer.clone() for name, buffer in self._forward.buffers_by_name().items()}
        known = self._forward.parameters_by_name()
        if weights is not None:
            known = _differentiable(weights, self._forward) | dict(self._forward.own.loose)
            state |= {**weights, **known}
        wanted = {name: tensor for name, tensor in known.items() if tensor.requires_grad} if gradient else {}
        with torch.set_grad_enabled(bool(wanted)), sdpa_kernel(SDPBackend.MATH):
            loss, _ = self._forward.evaluate(state, self._samples.to(self._device).tensors)
        return float(loss.detach()), self._forward.gather(gradients(loss, wanted))

    def _recorded(self, weights: Mapping[str, Tensor], gradient: bool) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradient of the program."""
        wanted = _differentiable(weights, self._forward) if gradient else {}
        with torch.set_grad_enabled(bool(wanted)):
            loss, _ = self._program.forward({**weights, **wanted}, self._samples.to(self._device).tensors)
        return float(loss.detach()), gradients(loss, wanted)

    @contextlib.contextmanager
    def _unseen(self) -> Iterator[None]:
        """Leave no trace in the training: generators, flags, buffers, and attributes of model and loss."""
        kinds = {"cpu", self._device.type}
        with contextlib.ExitStack() as held:
            held.enter_context(eager_and_unfused(self._device))
            held.enter_context(torch.inference_mode(False))
            for kind in kinds:
                held.enter_context(torch.autocast(kind, enabled=False))
            held.enter_context(restored_attributes(self._forward.model, self._forward.loss, self._forward.batch_loss))
            held.enter_context(evaluation_mode(self._forward))
            yield


def _first(batch: Batch, count: int) -> Batch:
    """The first samples; a single one twice, as a size of one is never free in a trace."""
    return batch.take(slice(0, count) if len(batch) > 1 else torch.tensor([0, 0], device="cpu"))


def _state(forward: ModelWithLoss) -> dict[str, Tensor]:
    return forward.parameters_by_name() | forward.buffers_by_name()


def _differentiable(weights: Mapping[str, Tensor], forward: ModelWithLoss) -> dict[str, Tensor]:
    """Detached copies of the weights that train, views replaced by their bases."""
    names = [name for name, parameter in forward.parameters_by_name().items() if parameter.requires_grad]
    names = dict.fromkeys(forward.views[name].base if name in forward.views else name for name in names)
    return {name: weights[name].detach().requires_grad_() for name in names if name in weights}


def _close(live: float, recorded: float, rtol: float, floor: float) -> bool:
    if live == recorded or (math.isnan(live) and math.isnan(recorded)):
        return True
    return abs(live - recorded) <= rtol * max(abs(live), abs(recorded)) + floor
