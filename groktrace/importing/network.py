"""The network of a task, traced once, and what of it a snapshot has to hold."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from groktrace.errors import TaskError
from groktrace.importing.contents import CheckpointError
from groktrace.importing.names import Match, Wanted
from groktrace.recording.capture import describe_weights, find_aliases, parameters_of, views_of
from groktrace.recording.prepare import RecordedTask, describe_data, trace_task
from groktrace.run.info import WeightSpec
from groktrace.run.isolation import restored_attributes, without_side_effects
from groktrace.run.live_model import named_tensors, plain_model
from groktrace.run.model_with_loss import evaluation_mode
from groktrace.run.task import Task, make_forward


@dataclass(frozen=True, eq=False)
class Network:
    """A network and its loss, as a recording describes them.

    Attributes:
        model: the plain model.
        evaluation: data and loss.
        specs: the tensors of a snapshot.
        wanted: what of them a checkpoint has to hold.
        frozen: names of parameters that do not train, which are kept once.
    """

    model: nn.Module
    evaluation: RecordedTask
    specs: Mapping[str, WeightSpec]
    wanted: Wanted
    frozen: frozenset[str]

    def read(self, match: Match, where: str) -> dict[str, Tensor]:
        """The tensors of a snapshot, copied from a checkpoint; what it need not hold is as the task has it.

        Args:
            match: where in the checkpoint they are.
            where: the checkpoint, for messages.

        Raises:
            CheckpointError: one cannot be read, or tied ones differ.
        """
        own = self.evaluation.own
        live = dict(named_tensors(self.model)) | own.parameters() | own.buffers()
        tensors: dict[str, Tensor] = {}
        for name, spec in self.specs.items():
            found = [stored.read() for stored in match.tensors.get(name, ())]
            if any(not torch.equal(found[0], other) for other in found[1:]):
                raise CheckpointError(
                    f"{where}: holds two values of '{name}', which is one tensor under two names in the model that the "
                    "task makes; have it make the network that was trained."
                )
            source = found[0] if found else live[name].detach()
            if tuple(source.shape) != spec.shape:
                raise CheckpointError(f"{where}: '{name}' changed while it was read; import again.")
            tensors[name] = torch.zeros(spec.shape, dtype=spec.dtype, device="cpu").copy_(source)
        return tensors


def prepare_network(task: Task) -> Network:
    """Trace the model and loss of a task, and describe their tensors and data.

    Raises:
        TaskError: it has no model or no data of its own.
        SettingsError: a tensor cannot be kept.
    """
    module = task.module
    if module is None or task.train is None:
        raise TaskError(
            "task: expected groktrace.Task.from_model(model, train=..., loss=...), with the training data, which no "
            f"checkpoint holds; got one without {'a model' if task.train is not None else 'data'}."
        )
    model = plain_model(module.model)
    describe_weights(model)  # refused before anything is evaluated
    with without_side_effects(model), restored_attributes(model, module.loss, module.batch_loss):
        forward = make_forward(model, module.loss, module.batch_loss, task.train, task.val, module.noise)
        with evaluation_mode(forward):
            evaluation = trace_task(forward, task.train, *describe_data(task.train, task.n, task.val, task.n_val))
    own = evaluation.own
    specs = describe_weights(model, None, own)
    optional = {
        f"{path}.{name}" if path else name
        for path, part in model.named_modules()
        for name in part._non_persistent_buffers_set
    }
    optional |= {name for name, spec in specs.items() if spec.loss and not spec.trainable}
    views = views_of(model, own)
    frozen = {name for name in parameters_of(model, own) if not specs[name].trainable and name not in views}
    ignored = tuple(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    wanted = Wanted(
        specs, find_aliases(model), frozenset(optional & specs.keys()), frozenset(model.state_dict()), ignored
    )
    return Network(model, evaluation, specs, wanted, frozenset(frozen))
