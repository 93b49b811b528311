"""The common part of the adapters to trainers."""

import os
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from groktrace.errors import GroktraceError, TaskError
from groktrace.recording.folder import IfExists
from groktrace.recording.on_transition import Callback
from groktrace.recording.recorder import Recorder
from groktrace.recording.warn import warn_user
from groktrace.recording.watch import watch


class TrainerRecording:
    """A callback's arguments and its recording.

    Args:
        train: see `groktrace.watch`; by default what the trainer trains on.
        val: see `groktrace.watch`; by default what the trainer validates on, where its batches are those of `train`.
        n: see `groktrace.watch`.
        noise: see `groktrace.watch`.
        loss: see `groktrace.watch`.
        batch_loss: see `groktrace.watch`; by default the loss that the trainer minimises.
        task: see `groktrace.watch`.
        out: the run directory; by default "snapshots" in the trainer's own folder.
        every: see `groktrace.watch`.
        schedule: see `groktrace.watch`.
        seed: see `groktrace.watch`.
        if_exists: see `groktrace.watch`.
        on_transition: see `groktrace.watch`.

    Attributes:
        recorder: the recording, once training has begun.
    """

    def __init__(
        self,
        *,
        train: Any = None,
        val: Any = None,
        n: int | None = None,
        noise: str | None = None,
        loss: Callable[..., Tensor] | str | None = None,
        batch_loss: Callable[..., Tensor] | None = None,
        task: str | None = None,
        out: str | os.PathLike[str] | None = None,
        every: int | None = None,
        schedule: str | Iterable[int] | Callable[[int], bool] | None = None,
        seed: int = 0,
        if_exists: IfExists = "new",
        on_transition: Callback | None = None,
    ) -> None:
        self._given = {"train": train, "val": val, "loss": loss, "batch_loss": batch_loss, "task": task, "out": out}
        self._given |= {
            "n": n,
            "noise": noise,
            "every": every,
            "schedule": schedule,
            "seed": seed,
            "if_exists": if_exists,
        }
        self._given |= {"on_transition": on_transition}
        self.recorder: Recorder | None = None


def watch_trainer(model: nn.Module, optimizer: Any, given: dict[str, Any], found: dict[str, Any]) -> Recorder:
    """Record a training whose loop belongs to a trainer; snapshots are deferred until it has finished a step.

    Args:
        model: the network.
        optimizer: the optimizer that counts.
        given: arguments of `watch` that the user gave.
        found: data and loss that the trainer has, for those that the user did not give. Where they cannot be used, that
            is told, and only weights are kept.

    Raises:
        SettingsError, TaskError, RunError: as `watch` does.
    """
    data = {name: given[name] if given[name] is not None else found.get(name) for name in ("train", "val")}
    if given["train"] is not None and given["val"] is None:
        data["val"] = None  # the trainer's may have another form
    if given["loss"] is None and given["batch_loss"] is None:
        data["batch_loss"] = found.get("batch_loss")
    try:
        recorder = _watch_with_val(model, optimizer, given, given | data)
    except TaskError as failure:
        if any(given[name] is not None for name in ("train", "val", "n", "noise", "loss", "batch_loss")):
            raise
        warn_user(
            f"the trainer's own data and loss cannot be used ({failure}); only weights are kept. Give the callback "
            "train= and loss=, or the analysis --task."
        )
        nothing = dict.fromkeys(("train", "val", "n", "noise", "loss", "batch_loss"))
        recorder = watch(model, optimizer, **(given | nothing))
    recorder.deferred = True
    return recorder


def _watch_with_val(model: nn.Module, optimizer: Any, given: dict[str, Any], chosen: dict[str, Any]) -> Recorder:
    """Watch, without the trainer's own validation set where that does not fit."""
    if given["val"] is not None or chosen["val"] is None:
        return watch(model, optimizer, **chosen)
    try:
        return watch(model, optimizer, **chosen)
    except GroktraceError as failure:
        recorder = watch(model, optimizer, **(chosen | {"val": None}))
        reason = " ".join(str(failure).split())[:200]
        warn_user(
            f"the trainer's own validation data are left out, as they cannot be used ({reason}); val= takes others."
        )
        return recorder
