"""Recording under transformers: Trainer(..., callbacks=[GroktraceCallback(every=100)])."""

import os
from typing import Any

from torch import Tensor, nn

from groktrace.recording.trainers import TrainerRecording, watch_trainer

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as failure:
    raise ImportError("this needs transformers: pip install 'groktrace[transformers]'") from failure


class GroktraceCallback(TrainerRecording, TrainerCallback):
    """Snapshots of a Trainer's training, with what it logs.

    Data and loss are the trainer's own: the training DataLoader, and the loss that the model computes. Where the
    trainer computes another (compute_loss_func, label smoothing), give that one as `loss` or `batch_loss`.

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
        found = {"train": train_dataloader, "batch_loss": _own_loss}
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
                self.recorder.settle()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Close the recording, if the last epoch's end has not."""
        if self.recorder is not None:
            self.recorder.close()


def _own_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss that the model computes."""
    return model(**batch).loss
