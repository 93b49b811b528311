"""Recording under Lightning: Trainer(callbacks=[GroktraceCallback(every=100)])."""

import contextlib
import inspect
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from groktrace.errors import SettingsError
from groktrace.recording.trainers import TrainerRecording, watch_trainer

try:
    import lightning.pytorch as pl
    from torchmetrics import Metric, MetricCollection
except ImportError as failure:
    raise ImportError("this needs Lightning: pip install 'groktrace[lightning]'") from failure


class GroktraceCallback(TrainerRecording, pl.Callback):
    """Snapshots of a LightningModule's training, with what it logs.

    Data and loss are the trainer's own: the DataLoader of training and, where there is one, that of validation, and
    `training_step` with its logging and metrics left out. Modules that step their optimizers by hand need `train` and
    `loss`, or the analysis needs `--task`.

    Args:
        optimizer: which of the module's optimizers counts, in the order of `configure_optimizers`.
        **watching: the arguments of `TrainerRecording`; the run directory is "snapshots" in the trainer's
            default_root_dir by default.
    """

    def __init__(self, *, optimizer: int = -1, **watching: Any) -> None:
        super().__init__(**watching)
        self._optimizer = optimizer
        self._before: dict[str, Any] = {}
        self._validated: set[str] = set()
        self._validation: tuple[int, dict[str, Any]] = -1, {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin the recording.

        Raises:
            SettingsError, TaskError, RunError: as `groktrace.watch` does.
        """
        optimizers = trainer.optimizers
        if not -len(optimizers) <= self._optimizer < len(optimizers):
            raise SettingsError(f"optimizer: the module has {len(optimizers)} of them, got {self._optimizer}.")
        given = dict(self._given)
        if given["out"] is None:
            given["out"] = os.path.join(trainer.default_root_dir, "snapshots")
        found: dict[str, Any] = {"train": trainer.train_dataloader, "val": _one_loader(trainer.val_dataloaders)}
        if pl_module.automatic_optimization:
            found["batch_loss"] = _training_step
        if pl_module.automatic_optimization or len(optimizers) == 1:
            given["start_step"] = trainer.global_step
        self.recorder = watch_trainer(pl_module, optimizers[self._optimizer], given, found)

    def on_train_batch_start(self, *_: Any) -> None:
        """Take the snapshot that is due: validation, if it followed the last batch, is over."""
        if self.recorder is not None:
            self.recorder.take_pending()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Note what was logged for the snapshot that is due."""
        if self.recorder is not None and self.recorder.has_pending:
            self._log(trainer)

    def on_validation_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Note what was logged before."""
        self._before = dict(trainer.callback_metrics)

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Tell what is logged in validation from the rest, which the trainer keeps in one place until it is renewed."""
        found = {name: value for name, value in trainer.callback_metrics.items() if self._before.get(name) is not value}
        self._validated |= found.keys()
        self._validation = trainer.global_step, found
        if self.recorder is not None and self.recorder.has_pending:
            self._log(trainer)

    def on_train_epoch_end(self, *_: Any) -> None:
        """Take the snapshot that is due before others put other weights in."""
        if self.recorder is not None:
            self.recorder.take_pending()

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Keep the last step."""
        if self.recorder is not None:
            self._log(trainer)
            self.recorder.close()

    def on_exception(self, *_: Any) -> None:
        """Keep the last step of a training that was broken off."""
        if self.recorder is not None:
            self.recorder.close_locally()

    def _log(self, trainer: pl.Trainer) -> None:
        metrics = {name: value for name, value in trainer.callback_metrics.items() if name not in self._validated}
        step, found = self._validation
        if step == trainer.global_step:
            metrics |= found
        self.recorder.log(**({"lr": trainer.optimizers[self._optimizer].param_groups[0]["lr"]} | metrics))


def _one_loader(loaders: Any) -> Any:
    """The only one, or None: several have no one loss."""
    if isinstance(loaders, list | tuple) and len(loaders) == 1:
        return loaders[0]
    return loaders if isinstance(loaders, torch.utils.data.DataLoader) else None


def _training_step(module: pl.LightningModule, batch: Any) -> Tensor:
    """The loss that the module trains on."""
    index = {"batch_idx": 0} if "batch_idx" in inspect.signature(module.training_step).parameters else {}
    with _silent(module):
        result = module.training_step(batch, **index)
    return result["loss"] if isinstance(result, Mapping) else result


@contextlib.contextmanager
def _silent(module: pl.LightningModule) -> Iterator[None]:
    """Logging does nothing and metrics stay as they are: this is not one of the trainer's batches."""

    def nothing(*_: Any, **__: Any) -> Tensor:
        return torch.zeros(())

    replaced = [(module, "log")]
    for part in module.modules():
        if isinstance(part, Metric | MetricCollection):
            replaced += [(part, name) for name in ("forward", "update", "compute")]
    before = [(thing, name, name in vars(thing), vars(thing).get(name)) for thing, name in replaced]
    try:
        for thing, name in replaced:
            vars(thing)[name] = nothing
        yield
    finally:
        for thing, name, own, value in before:
            if own:
                vars(thing)[name] = value
            else:
                del vars(thing)[name]
