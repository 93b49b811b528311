"""A few of the weights, read in about a microsecond: enough to see that training, or something else, moved them."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

HOW_TO_COUNT = "give watch() the optimizer that trains, or call recorder.step() once per update."
RUN = 8  # neighbouring elements of one tensor
# Readings, a second apart, that all differ while no update is counted. Few of them can be an average that is swapped in
# for validation, or weights that are clamped; many can be a landscape of the loss, or a strategy of many perturbations.
SOON, LATE = 4, 60
# Begins of updates that are looked at one by one, and of how many at most one has to differ for that to be a habit.
LOOKS, HABIT = 32, 20

Reading = list[list[float] | Tensor]


class WeightProbe:
    """Reads a few elements of two tensors.

    Args:
        tensors: those that train; the first and the last are read.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        able = [tensor for tensor in tensors if type(tensor) in (Tensor, nn.Parameter) and tensor.numel()]
        self._tensors = able[:1] + able[1:][-1:]
        self._pointers = [tensor.data_ptr for tensor in self._tensors]
        self._places: list[int] = []
        self._readers: list[Callable[[], Any]] = []

    def read(self) -> Reading | None:
        """The elements as they are; None where they cannot be read."""
        if [pointer() for pointer in self._pointers] != self._places and not self._look_up():
            return None  # moved elsewhere, or given other memory
        return [reader() for reader in self._readers]

    def read_here(self) -> Reading | None:
        """The same for another thread, from which a GPU must not be asked: there versions stand for the elements."""
        if all(tensor.is_cpu for tensor in self._tensors):
            return self.read()
        return [[float(tensor._version)] for tensor in self._tensors]

    def _look_up(self) -> bool:
        readers: list[Callable[[], Any]] = []
        self._places, self._readers = [], []
        with torch.inference_mode(False), torch.no_grad():
            for tensor in self._tensors:
                here = tensor.is_cpu or (tensor.is_cuda and not torch.cuda.is_current_stream_capturing())
                size = tensor.untyped_storage().nbytes() if here and tensor.layout == torch.strided else 0
                if not size or not tensor.is_contiguous() or size < tensor.nbytes:
                    return False
                start = max(0, (tensor.numel() - RUN) // 2)
                view = tensor.detach().view(-1)[start : start + RUN]
                readers.append(view.tolist if view.is_cpu else view.clone)
        self._places, self._readers = [pointer() for pointer in self._pointers], readers
        return bool(readers)


def differ(before: Reading | None, after: Reading | None, rtol: float = 0.0) -> bool:
    """Whether two readings are of other weights; not where one is missing.

    Args:
        before: one.
        after: the other.
        rtol: of the largest element of a tensor, what counts as the same.
    """
    if before is None or after is None:
        return False
    if rtol == 0 and all(type(each) is list for each in before) and before == after:
        return False
    for one, other in zip(before, after, strict=True):
        a, b = (torch.as_tensor(each).detach().cpu() for each in (one, other))
        if a.shape != b.shape:
            return False
        if a.is_complex():
            a, b = torch.view_as_real(a), torch.view_as_real(b)
        limit = rtol * float(a.abs().nan_to_num().amax())
        if not torch.allclose(a.double(), b.double(), rtol=0, atol=limit, equal_nan=True):
            return True
    return False


class Watchdog:
    """Notices that weights keep changing while no update is counted.

    Args:
        probe: of the weights.
        moment: the updates counted so far, and whether one is being made.
        begun: the updates counted when the recording began.
        warn: called once, with a word for the kind and what to tell.
        patient: whether even from the start many readings have to differ.
    """

    def __init__(
        self,
        probe: WeightProbe,
        moment: Callable[[], tuple[int, bool]],
        begun: int,
        warn: Callable[[str, str], None],
        patient: bool,
    ) -> None:
        self._probe, self._moment, self._warn = probe, moment, warn
        self._begun, self._patient = begun, patient
        self._step = -1
        self._seen: list[Reading] = []
        self._done = False

    def look(self) -> None:
        """Take one more reading; called about once a second from the thread that writes."""
        try:
            if not self._done:
                self._look()
        except Exception:  # it is not worth more than not being there
            self._done = True

    def _look(self) -> None:
        step, within = self._moment()
        reading = None if within else self._probe.read_here()
        if reading is None or self._moment() != (step, False):
            return
        if step != self._step:
            self._step, self._seen = step, [reading]
        elif differ(self._seen[-1], reading):
            # Training does not come back to where it was.
            returned = any(not differ(each, reading) for each in self._seen)
            self._seen = [reading] if returned else [*self._seen, reading]
            never = step == self._begun
            if len(self._seen) >= (SOON if never and not self._patient else LATE):
                self._done, self._seen = True, []
                if never:
                    self._warn("idle", f"the weights change, but no update is seen; {HOW_TO_COUNT}")
                else:
                    advice = f"if this is training, {HOW_TO_COUNT}"
                    self._warn(
                        "uncounted", f"the weights keep changing, but no update is seen since step {step}; {advice}"
                    )


class BetweenUpdates:
    """What becomes of the weights between one update and the next.

    Args:
        probe: of the weights; None to know nothing.
    """

    def __init__(self, probe: WeightProbe | None) -> None:
        self._probe = probe
        self._after: Reading | None = None
        self._looks = self._moves = 0
        self._ended = 0

    def end(self) -> None:
        """An update has ended."""
        if self._probe is not None:
            self.end_at(self._probe.read())

    def end_at(self, reading: Reading | None) -> None:
        """An update ended when the weights were read so."""
        self._after = reading
        self._ended += 1

    def begin(self) -> None:
        """The next one begins."""
        # At first always, then at powers of two: enough to know the script's habits.
        if self._ended <= LOOKS or not self._ended & (self._ended - 1):
            self._looks += 1
            try:
                self._moves += differ(self._after, self.read())
            except Exception:  # then nothing is known of it
                self._probe = None

    @property
    def moved(self) -> bool:
        """Whether the weights have changed since the last update, where scripts leave them alone as a rule.

        One that clamps its weights, say, does so after every update or after every tenth; then that belongs to it.
        """
        if self._probe is None or (self._moves > 1 and HABIT * self._moves >= self._looks):
            return False
        return differ(self._after, self._probe.read())

    def read(self) -> Reading | None:
        """The weights as they are."""
        return None if self._probe is None else self._probe.read()


def trained(model: nn.Module, optimizer: Any) -> list[Tensor]:
    """The weights that train.

    Args:
        model: the network.
        optimizer: only those that it holds; None for all.
    """
    held = None if optimizer is None else {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [p for p in model.parameters() if p.requires_grad and (held is None or id(p) in held)]
