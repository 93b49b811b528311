"""watch(): record a training run with one line in its script."""

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from groktrace.errors import GroktraceError, SettingsError
from groktrace.recording.capture import Capture, describe_weights, gathered, is_sharded, parameters_of, views_of
from groktrace.recording.hooks import hookable
from groktrace.recording.prepare import Evaluation, describe_run, prepare_evaluation, write_frozen, write_start
from groktrace.recording.recorder import Recorder
from groktrace.recording.schedule import check_count, make_schedule
from groktrace.recording.termination import open_recorders
from groktrace.recording.warning import warn_user
from groktrace.recording.writer import remove_leftovers
from groktrace.run import files, layout
from groktrace.run.factory import refuse_while_loading
from groktrace.run.info import WeightSpec, check_info
from groktrace.run.live import named_tensors, plain_model
from groktrace.run.loss_tensors import LossTensors
from groktrace.run.remote import Remote, is_url

_FACTORY = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def watch(
    model: nn.Module,
    optimizer: Any = None,
    *,
    train: Any = None,
    loss: Callable[..., Tensor] | str | None = None,
    batch_loss: Callable[..., Tensor] | None = None,
    val: Any = None,
    weights: nn.Module | None = None,
    task: str | None = None,
    out: str | os.PathLike[str] = "snapshots",
    every: int | None = None,
    schedule: str | Iterable[int] | Callable[[int], bool] | None = None,
    start_step: int | None = None,
    seed: int = 0,
) -> Recorder:
    """Record a training run: one line in the training script.

    The first and the last step are always kept. Whatever goes wrong after this call is a RuntimeWarning.

    Args:
        model: the network; torch.compile and DistributedDataParallel are seen through. Every process has to call
            this for one that fully_shard has sharded.
        optimizer: each of its updates counts as a step; without it, call `Recorder.step()` once per update. Of
            several, the one that steps last. Another one that takes its place later is counted on, and told.
        train: (inputs, targets), a dict of tensors, a list of batches, a Dataset or a DataLoader, samples along the
            first axis of every tensor; without it only weights are kept, and the analysis needs `--task`. In a list,
            an entry is a sample where one of its tensors has no axes or their first sizes differ, and else a batch.
        loss: loss(outputs, targets) as a mean over the batch, or "cross_entropy" or "mse".
        batch_loss: instead of `loss`, batch_loss(model, batch) for models that compute their own.
        val: validation data in the same form as `train`.
        weights: record the weights of this module instead, an average such as AveragedModel; as it stands when the
            next update begins.
        task: "package.module:factory" that rebuilds the task, for models that cannot be traced.
        out: the run directory, or the URL of one, such as s3://bucket/run; whatever fsspec takes.
        every: keep each step that this many updates divide; 100 if there is no `schedule` either.
        schedule: instead of `every`, "log", the steps to keep, or a function step -> bool.
        start_step: updates made before this call; by default what the optimizer's own state says.
        seed: chooses the subset of data sets of more than 8192 samples.

    Returns:
        The recorder; close it, use it in a `with` statement, or leave that to the end of the script.

    Raises:
        SettingsError: an argument is not what it may be, or `out` holds something else.
        TaskError: model, loss and data do not fit together.
        RunError: `out` holds a damaged run.
    """
    refuse_while_loading()
    plan = make_schedule(every, schedule)
    seed = check_count(seed, "seed", least=0)
    if start_step is not None:
        start_step = check_count(start_step, "start_step", least=0)
    if task is not None and not (isinstance(task, str) and _FACTORY.fullmatch(task)):
        raise SettingsError(f"task: expected 'package.module:factory', got {task!r}.")
    place = _check_out(out)
    if not isinstance(model, nn.Module):
        raise SettingsError(f"model: expected a torch.nn.Module, got {type(model).__name__}.")
    model = plain_model(model)
    parameters = {id(parameter) for parameter in model.parameters()}
    if not parameters:
        raise SettingsError("model: expected a network with parameters, got one without any.")
    if optimizer is not None:
        optimizer = hookable(optimizer)
        if not any(id(parameter) in parameters for group in optimizer.param_groups for parameter in group["params"]):
            raise SettingsError("optimizer: holds none of the model's parameters; make it from model.parameters().")
    specs = describe_weights(model, optimizer)
    if train is None:
        for name, value in (("loss", loss), ("batch_loss", batch_loss), ("val", val)):
            if value is not None:
                raise SettingsError(f"{name}: of no use without train; give the training data too.")

    source = model if weights is None else _check_weights(weights, specs)
    if any("train_mode" in group for group in getattr(optimizer, "param_groups", ())):
        warn_user(
            "a schedule-free optimizer trains other weights than it evaluates, and those that it trains are kept; for "
            "the others leave optimizer out, and call recorder.step() between optimizer.eval() and optimizer.train()."
        )

    for recorder in open_recorders:
        if recorder.out == place:
            recorder.flush()
    earlier = _earlier(model, optimizer, place)
    start = _first_step(start_step, optimizer, earlier)
    writes, sharded = _is_writer(), is_sharded(model)
    remote, root = None, Path(place)
    with _agreed(sharded):
        if writes and is_url(place):
            try:
                remote = Remote(str(place))
            except OSError as failure:
                raise SettingsError(f"out: cannot be reached ({failure}).") from failure
            root = remote.folder
        if writes:
            # An explicit start_step may contradict the open recording; then it is refused as after a restart.
            resuming = earlier is not None and start == earlier.steps
            _check_folder(place, root, specs, start, resuming, start_step is not None)
    evaluation = Evaluation()
    if train is not None:
        with gathered(model):
            idle = [
                name
                for name, parameter in model.named_parameters()
                if parameter.requires_grad and not specs[name].trainable
            ]
            evaluation = prepare_evaluation(model, train, val, loss, batch_loss, seed, idle)
    own = evaluation.own
    specs = describe_weights(model, optimizer, own)
    for recorder in list(open_recorders):
        if recorder.out == place:  # a folder has one recording at a time, so this one takes over
            recorder.close()
    once: frozenset[str] = frozenset()
    with _agreed(sharded):
        if writes:
            specs = _with_earlier(place, root, specs, start)
            info = describe_run(model, specs, evaluation, optimizer, plan, task, seed)
            try:
                if write_start(root, info, evaluation):
                    warn_user(f"'{place}' held other data than these; the analysis will use the new ones throughout.")
                if not sharded:
                    once = write_frozen(root, _frozen(specs, model, source, own))
                remove_leftovers(root)
                if remote is not None:
                    remote.send_start()
            except OSError as failure:
                raise SettingsError(f"out: '{place}' cannot be written ({failure.strerror or failure}).") from failure
            for note in evaluation.notes:
                warn_user(note)
            if evaluation.problem is not None:
                reason = " ".join(str(evaluation.problem).split())[:300]
                hint = task or "package.module:factory"
                warn_user(
                    f"model and loss cannot be kept as a program, so analysis will need `--task {hint}` ({reason})."
                )
    unreached = evaluation.unreached
    capture = Capture(source, specs, once, trained=model, own=own, optimizer=optimizer, unreached=unreached, step=start)
    guard = None if sharded else evaluation.guard
    if guard is not None:
        guard.frozen, guard.average = root / layout.FROZEN_FILE, weights is not None
    return Recorder(model, optimizer, plan.keep, capture, place, start, writes, weights is not None, remote, guard)


@contextlib.contextmanager
def _agreed(sharded: bool) -> Iterator[None]:
    """Raise the first process's refusal in all; for a sharded model the others would wait for it forever."""
    refusal: list[GroktraceError | None] = [None]
    try:
        yield
    except GroktraceError as failure:
        refusal = [failure]
    if sharded:
        torch.distributed.broadcast_object_list(refusal, src=0)
    if refusal[0] is not None:
        raise refusal[0]


def _check_weights(weights: Any, specs: dict[str, WeightSpec]) -> nn.Module:
    """The module that holds an average of the model's weights under the same names."""
    if isinstance(weights, torch.optim.swa_utils.AveragedModel):
        weights = weights.module
    if not isinstance(weights, nn.Module):
        raise SettingsError(f"weights: expected a torch.nn.Module, got {type(weights).__name__}.")
    weights = plain_model(weights)
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in named_tensors(weights)}
    if found != {name: (spec.shape, spec.dtype) for name, spec in specs.items()}:
        raise SettingsError("weights: expected a module with the same tensors as the model, got one with others.")
    return weights


def _check_out(out: Any) -> Path | str:
    if not isinstance(out, str | os.PathLike):
        raise SettingsError(f"out: expected the path of a folder, got {out!r}.")
    if is_url(out):
        return out.rstrip("/")
    # Absolute, since scripts change their working directory.
    root = Path(out).expanduser().absolute()
    for folder in (root, *root.parents):
        if folder.exists():
            if not folder.is_dir():
                raise SettingsError(f"out: expected a folder, but '{folder}' is a file.")
            break
    return root


def _earlier(model: nn.Module, optimizer: Any, place: Path | str) -> Recorder | None:
    """The open recording of the same training into the same folder."""
    for recorder in open_recorders:
        if recorder.out == place and recorder.records(model, optimizer):
            return recorder
    return None


def _first_step(start_step: int | None, optimizer: Any, earlier: Recorder | None) -> int:
    """How many updates were made before this recording."""
    if start_step is not None:
        return start_step
    if earlier is not None:
        return earlier.steps
    states = getattr(optimizer, "state", {}).values()
    counts = [state["step"] for state in states if isinstance(state, dict) and "step" in state]
    return max((int(count) for count in counts), default=0)


def _is_writer() -> bool:
    """Whether this process writes: the first of a process group."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def _check_folder(
    place: Path | str, root: Path, specs: dict[str, WeightSpec], start: int, resuming: bool, given: bool
) -> None:
    """Refuse to write into a folder that holds something else, or steps that this recording would make again."""
    if not root.exists():
        return
    path = root / layout.RUN_FILE
    if not path.exists():
        # A recording that was killed while it began has left what it writes before run.json.
        begun = {layout.DATA_FILE, layout.PROGRAM_FILE}
        names = {entry.name for entry in root.iterdir() if not entry.name.startswith(files.TEMPORARY_PREFIX)}
        if names - begun:
            raise SettingsError(f"out: '{place}' holds files, but is not a groktrace run; choose another out=.")
        return
    known = {name: spec for name, spec in check_info(files.read_json(path), path).items() if not spec.loss}
    if _shapes(known) != _shapes(specs):
        raise SettingsError(f"out: '{place}' is the run of another network; choose another out=.")
    steps = layout.snapshot_steps(root)
    if steps and start == 0 and not resuming and not (given and steps == [0]):  # one killed right after its start
        raise SettingsError(
            f"out: '{place}' holds a recording up to step {steps[-1]}. To continue it, load the optimizer's state "
            "before watch() or pass start_step=; to start anew, choose another out= or remove the folder."
        )


def _shapes(specs: dict[str, WeightSpec]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (spec.shape, spec.dtype) for name, spec in specs.items()}


def _with_earlier(place: Path | str, root: Path, specs: dict[str, WeightSpec], start: int) -> dict[str, WeightSpec]:
    """Merge the tensors' specs with those of an earlier recording, which knows when they train.

    Raises:
        SettingsError: its loss had other weights.
    """
    path = root / layout.RUN_FILE
    if not path.exists():
        return specs
    known = check_info(files.read_json(path), path)
    if _shapes(known) != _shapes(specs):
        odd = sorted(name for name in known.keys() | specs.keys() if known.get(name) != specs.get(name))
        raise SettingsError(
            f"out: '{place}' is the run of a loss with other weights ({', '.join(odd[:5])}); give the train= and loss= "
            "of that run, or choose another out=."
        )
    merged = {}
    for name, spec in specs.items():
        before = known[name]
        if before.trainable or not spec.trainable:
            merged[name] = replace(spec, trainable=before.trainable, trainable_from=before.trainable_from)
        else:
            merged[name] = replace(spec, trainable_from=start)
    return merged


def _frozen(specs: dict[str, WeightSpec], model: nn.Module, source: nn.Module, own: LossTensors) -> dict[str, Tensor]:
    """The parameters that do not train, without views, whose base may train."""
    views = views_of(model, own)
    parameters = parameters_of(source, own)
    return {
        name: parameter for name, parameter in parameters.items() if not specs[name].trainable and name not in views
    }
