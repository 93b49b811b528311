"""Recording under transformers: Trainer(..., callbacks=[GroktraceCallback(every=100)])."""

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from groktrace.recording.trainers import TrainerRecording, watch_trainer
from groktrace.recording.warn import warn_user

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as failure:
    raise ImportError("this needs transformers: pip install 'groktrace[transformers]'") from failure


class GroktraceCallback(TrainerRecording, TrainerCallback):
    """Snapshots of a Trainer's training, with what it logs.

    Data and loss are the trainer's own: the DataLoaders of training and validation, and the loss that the model
    computes, or the trainer (label smoothing, compute_loss_func, a compute_loss of its own).

    Takes the arguments of `TrainerRecording`; the run directory is "snapshots" in the trainer's output_dir by default.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        train_dataloader: Any = None,
        **_: Any,
    ) -> None:
        """Begin the recording.

        Raises:
            SettingsError, TaskError, RunError: as `groktrace.watch` does.
        """
        given = self._given | {"start_step": state.global_step}
        if given["out"] is None:
            given["out"] = os.path.join(args.output_dir, "snapshots")
        trainer = _find_trainer(self)
        if given["train"] is None and isinstance(given["val"], Dataset):  # collated as the training data are
            given["val"] = _validation(trainer, given["val"]) or given["val"]
        val = None if trainer is None or given["val"] is not None else _validation(trainer, trainer.eval_dataset)
        found = {"train": train_dataloader, "val": val, "batch_loss": _own_loss}
        if trainer is None:
            if args.label_smoothing_factor:
                warn_user(
                    "the loss is recorded without label smoothing, as the Trainer was not found; give the callback "
                    "batch_loss=."
                )
        elif trainer.label_smoother or trainer.compute_loss_func or type(trainer).compute_loss != Trainer.compute_loss:
            found["batch_loss"] = _trainers_loss(trainer)
        self.recorder = watch_trainer(model, optimizer, given, found)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Keep what is logged for the next snapshot, or for the one that is due."""
        if self.recorder is not None:
            self.recorder.log(**{name: value for name, value in (logs or {}).items() if isinstance(value, int | float)})

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Keep the last step before the trainer may put its best weights in place of the last."""
        if self.recorder is not None:
            if control.should_training_stop or state.global_step >= state.max_steps:
                self.recorder.close()
            else:
                self.recorder.take_pending()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Close the recording, if the last epoch's end has not."""
        if self.recorder is not None:
            self.recorder.close()


def _own_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss that the model computes."""
    outputs = model(**batch)
    return outputs.get("loss") if isinstance(outputs, Mapping) else outputs[0]


def _trainers_loss(trainer: Trainer) -> Callable[[nn.Module, Any], Tensor]:
    """The loss that the trainer computes."""

    def batch_loss(model: nn.Module, batch: Any) -> Tensor:
        before = dict(vars(trainer))
        trainer.log = lambda *_, **__: None  # this is not one of the trainer's batches
        try:
            loss = trainer.compute_loss(model, dict(batch))
        finally:
            for name in vars(trainer).keys() - before.keys():
                del vars(trainer)[name]
            vars(trainer).update(before)
        return loss[0] if isinstance(loss, tuple) else loss

    return batch_loss


def _find_trainer(callback: TrainerCallback) -> Trainer | None:
    """Find the calling trainer on the stack; it does not pass itself to callbacks."""
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer) and callback in owner.callback_handler.callbacks:
            return owner
        frame = frame.f_back
    return None


def _validation(trainer: Trainer | None, dataset: Any) -> Any:
    """A validation set as the DataLoader by which the trainer would read it; None where it could not."""
    if trainer is None or dataset is None or isinstance(dataset, dict):
        return None
    kept = len(trainer.accelerator._dataloaders)
    try:
        return trainer.get_eval_dataloader(dataset)
    except Exception:  # then the evaluation has none either
        return None
    finally:
        del trainer.accelerator._dataloaders[kept:]  # the trainer will make its own
