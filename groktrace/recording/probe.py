"""Detect changes of the weights by reading a few of them, in about a microsecond."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

HOW_TO_COUNT = (
    "give watch() the optimizer that trains, or recorder.attach() one that is made later, or call recorder.step() once "
    "per update."
)
RUN = 8  # neighbouring elements of one tensor
# Distinct readings, a second apart, without a counted update, before a warning. A few may come from an average swapped
# in for validation, or from clamping; many also from a plot of the loss landscape, or an evolution strategy.
SOON, LATE = 4, 60
# Updates before which the weights are always read; and one in how many of them must differ for that to be a habit.
LOOKS, HABIT = 32, 20

Reading = list[list[float] | Tensor]


def moved_after(step: int) -> str:
    """A warning of a change of the weights after the last update."""
    return (
        f"after step {step} the weights changed without an update that was seen, as when the best or averaged ones "
        "take the place of the last: they are not kept as those of that step. Close the recorder before; or, where "
        f"these were updates, {HOW_TO_COUNT}"
    )


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
        """Read from another thread, which must not use a GPU: there version counters stand for the elements."""
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
    """Whether two readings differ; False if one is missing.

    Args:
        before: one.
        after: the other.
        rtol: tolerance, relative to the largest element of a tensor.
    """
    if before is None or after is None:
        return False
    if rtol == 0 and all(type(values) is list for values in before) and before == after:
        return False
    for one, other in zip(before, after, strict=True):
        a, b = (torch.as_tensor(values).detach().cpu() for values in (one, other))
        if a.shape != b.shape:
            return False
        if a.is_complex():
            a, b = torch.view_as_real(a), torch.view_as_real(b)
        limit = rtol * float(a.abs().nan_to_num().amax())
        if not torch.allclose(a.double(), b.double(), rtol=0, atol=limit, equal_nan=True):
            return True
    return False


class Watchdog:
    """Warns if weights keep changing while no update is counted.

    Args:
        probe: of the weights.
        moment: the number of updates so far, and whether one is in progress.
        begun: the updates counted when the recording began.
        warn: called once, with a kind of warning and its text.
        patient: whether many readings must differ even before the first update.
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
        except Exception:  # then there is no warning
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
            returned = any(not differ(earlier, reading) for earlier in self._seen)
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
    """Detects changes of the weights between one update and the next.

    Args:
        probe: of the weights; None to detect nothing.
    """

    def __init__(self, probe: WeightProbe | None) -> None:
        self._probe = probe
        self._after: Reading | None = None
        self._looks = self._moves = 0
        self._ended = 0

    def end(self) -> None:
        """Note the end of an update."""
        if self._probe is not None:
            self.end_at(self._probe.read())

    def end_at(self, reading: Reading | None) -> None:
        """Note the end of an update, with the reading of its weights."""
        self._after = reading
        self._ended += 1

    def begin(self) -> None:
        """Note the beginning of the next update."""
        # Always at first, then at powers of two, which is enough to know the script's habits.
        if self._ended <= LOOKS or not self._ended & (self._ended - 1):
            self._looks += 1
            try:
                self._moves += differ(self._after, self.read())
            except Exception:  # then nothing is detected
                self._probe = None

    @property
    def moved(self) -> bool:
        """Whether the weights have changed since the last update, in a script that does not change them regularly.

        Scripts that clamp weights do so after every update or every tenth; then the change belongs to the update.
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
