"""watch(): record a training run with one line in its script."""

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from groktrace.errors import GroktraceError, SettingsError
from groktrace.recording.capture import Capture, describe_weights, gathered, is_sharded, parameters_of, views_of
from groktrace.recording.data_versions import DataVersions
from groktrace.recording.folder import (
    Folder,
    IfExists,
    check_if_exists,
    check_out,
    choose,
    held_already,
    name_of,
    with_earlier,
)
from groktrace.recording.hooks import counted_optimizer, updates_made
from groktrace.recording.numbering import begins_again
from groktrace.recording.on_transition import Callback, TransitionCallback, check_callback
from groktrace.recording.prepare import (
    RecordedTask,
    describe_run,
    prepare_task,
    without_program,
    write_frozen,
    write_start,
)
from groktrace.recording.recorder import Recorder
from groktrace.recording.schedule import check_count, make_schedule
from groktrace.recording.termination import open_recorders
from groktrace.recording.warn import warn_user
from groktrace.recording.writer import remove_leftovers
from groktrace.run import layout
from groktrace.run.factory import refuse_while_loading
from groktrace.run.info import MAX_DOUBT, WeightSpec
from groktrace.run.live_model import named_tensors, plain_model
from groktrace.run.loss_tensors import LossTensors

_FACTORY = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def watch(
    model: nn.Module,
    optimizer: Any = None,
    *,
    train: Any = None,
    loss: Callable[..., Tensor] | str | None = None,
    batch_loss: Callable[..., Tensor] | None = None,
    val: Any = None,
    n: int | None = None,
    noise: str | None = None,
    weights: nn.Module | None = None,
    task: str | None = None,
    out: str | os.PathLike[str] = "snapshots",
    every: int | None = None,
    schedule: str | Iterable[int] | Callable[[int], bool] | None = None,
    start_step: int | None = None,
    seed: int = 0,
    if_exists: IfExists = "new",
    on_transition: Callback | None = None,
) -> Recorder:
    """Record a training run: one line in the training script.

    The first and the last step are always kept. Whatever goes wrong after this call is a RuntimeWarning.

    Args:
        model: the network; torch.compile and DistributedDataParallel are seen through. Every process has to call
            this for one that fully_shard has sharded.
        optimizer: each of its updates counts as a step; without it, `Recorder.attach()` one that is made later, or
            call `Recorder.step()` once per update. Of several, the one that steps last. Another one that takes its
            place later is counted on, and told.
        train: (inputs, targets), a dict of tensors, a list of batches, a Dataset or a DataLoader, samples along the
            first axis of every tensor; without it only weights are kept, and the analysis needs `--task`. In a list,
            an entry is a sample where one of its tensors has no axes or their first sizes differ, and else a batch.
            Of an IterableDataset, or a DataLoader over one, the first samples are kept, read from a copy.
        loss: loss(outputs, targets) as a mean over the batch, or "cross_entropy" or "mse".
        batch_loss: instead of `loss`, batch_loss(model, batch) for models that compute their own.
        val: validation data in the same form as `train`.
        n: the number of training samples, where `train` is a stream without an end or a length, or a sample of them
            such as a list of random batches.
        noise: "fixed" draws the random numbers of a loss (a VAE's, a diffusion model's) once for each sample, and keeps
            them with the data.
        weights: record the weights of this module instead, an average such as AveragedModel; as it stands when the
            next update begins.
        task: "package.module:factory" that rebuilds the task, for models that cannot be traced.
        out: the run directory, or the URL of one, such as s3://bucket/run; whatever fsspec takes.
        every: keep each step that this many updates divide; 100 if there is no `schedule` either.
        schedule: instead of `every`, "log", the steps to keep, or a function step -> bool.
        start_step: updates made before this call; by default what the optimizer's own state says.
        seed: chooses the subset of data sets of more than 8192 samples, and what `noise` draws.
        if_exists: where `out` holds a run that this training does not continue: "new" records in the next free folder
            beside it, such as snapshots-2, and says so; "replace" removes the run; "error" refuses.
        on_transition: called between two updates with each `Announcement` or `EarlyWarning` of a process that follows
            the recording (one core, the lowest priority), and with the `Trajectory` of λ̂ so far. It may change the
            optimizer, or have the loop end; where it fails, that is one warning. `Recorder.catch_up()` waits for it.

    Returns:
        The recorder; close it, use it in a `with` statement, or leave that to the end of the script.

    Raises:
        SettingsError: an argument is not what it may be, or `out` holds something else than a run.
        TaskError: model, loss and data do not fit together.
        RunError: `out` holds a damaged run.
    """
    refuse_while_loading()
    plan = make_schedule(every, schedule)
    seed = check_count(seed, "seed", least=0)
    if start_step is not None:
        start_step = check_count(start_step, "start_step", least=0)
    if n is not None:
        n = check_count(n, "n", least=1)
    if task is not None and not (isinstance(task, str) and _FACTORY.fullmatch(task)):
        raise SettingsError(f"task: expected 'package.module:factory', got {task!r}.")
    check_if_exists(if_exists)
    place = check_out(out)
    if on_transition is not None:
        check_callback(on_transition, place)
    if not isinstance(model, nn.Module):
        raise SettingsError(f"model: expected a torch.nn.Module, got {type(model).__name__}.")
    model = plain_model(model)
    if next(model.parameters(), None) is None:
        raise SettingsError("model: expected a network with parameters, got one without any.")
    if optimizer is not None:
        optimizer = counted_optimizer(optimizer, model)
    specs = describe_weights(model, optimizer)
    if train is None:
        for name, value in (("loss", loss), ("batch_loss", batch_loss), ("val", val), ("n", n), ("noise", noise)):
            if value is not None:
                raise SettingsError(f"{name}: of no use without train; give the training data too.")

    source = model if weights is None else _check_weights(weights, specs)
    if any("train_mode" in group for group in getattr(optimizer, "param_groups", ())):
        warn_user(
            "a schedule-free optimizer trains other weights than it evaluates, and those that it trains are kept; for "
            "the others leave optimizer out, and call recorder.step() between optimizer.eval() and optimizer.train()."
        )

    for recorder in open_recorders:
        if place in (recorder.out, recorder.requested):
            recorder.flush()
    earlier = _earlier(model, optimizer, place)
    start = _first_step(start_step, optimizer, earlier)
    # An explicit start_step may contradict the open recording, which is then another one.
    going = earlier.out if earlier is not None and start == earlier.steps else None
    sharded = is_sharded(model)
    folder, chosen = Folder(place, place, Path(place)), (start, start_step is not None, going, if_exists)
    with _agreed(sharded):
        if _is_writer():
            folder = Folder.at(place, place)
            choose(folder, None, *chosen, {})  # what can be refused before the evaluation takes its time
    evaluation = RecordedTask()
    if train is not None:
        with gathered(model):
            idle = [
                name
                for name, parameter in model.named_parameters()
                if parameter.requires_grad and not specs[name].trainable
            ]
            evaluation = prepare_task(model, train, val, loss, batch_loss, seed, idle, n, noise)
    own = evaluation.own
    specs = describe_weights(model, optimizer, own)
    with _agreed(sharded) as told:
        if _is_writer():
            trained = {n: p for n, p in parameters_of(source, own).items() if specs[n].trainable and not sharded}
            where = choose(folder, specs, *chosen, trained)
            told.append(None if where.kind == "beside" else where.folder.place)
    for recorder in list(open_recorders):
        # A folder has one recording at a time; and a cell or a loop that runs again ends what it began before, but not
        # the recording of another network whose training has not begun.
        if told[-1:] == [recorder.out] or (recorder.requested == place and (recorder.began or recorder is earlier)):
            recorder.close_quietly()
    once: frozenset[str] = frozenset()
    with _agreed(sharded) as told:
        if _is_writer():
            try:
                known = held_already(where, specs, trained) if start_step is None and start == 0 else None
                folder = where.take(if_exists)
                place, root = folder.place, folder.root
                specs = with_earlier(folder, specs, start)
                info = describe_run(model, specs, evaluation, optimizer, plan, task, seed)
                said = evaluation.doubts
                if known is not None:
                    said = (*said, begins_again(known[1], known[0].place, place))
                    warn_user(said[-1])
                info["doubts"] = [{"step": start, "text": text[:MAX_DOUBT]} for text in said]
                if write_start(root, info | {"out": name_of(folder.requested)}, evaluation):
                    warn_user(f"'{place}' held other data than these; the analysis will use the new ones throughout.")
                if not sharded:
                    once = write_frozen(root, _frozen(specs, model, source, own))
                remove_leftovers(root)
                if folder.remote is not None:
                    folder.remote.send_start()
            except BaseException as failure:
                for held in (where.folder, folder):
                    if held.hold is not None:
                        held.hold.release()
                if not isinstance(failure, OSError):
                    raise
                raise SettingsError(f"out: '{place}' cannot be written ({failure.strerror or failure}).") from failure
            told.append(place)
            for note in evaluation.notes:
                warn_user(note)
            if evaluation.problem is not None:
                warn_user(without_program(evaluation.problem, task))
    unreached = evaluation.unreached
    capture = Capture(source, specs, once, trained=model, own=own, optimizer=optimizer, unreached=unreached, step=start)
    guard, data = None if sharded else evaluation.guard, DataVersions(train=train, val=val)
    if guard is not None:
        guard.frozen, guard.average = folder.root / layout.FROZEN_FILE, weights is not None
    if folder.hold is None and told:
        folder.place = told[-1]  # the writing process knows
    recorder = Recorder(model, optimizer, plan.keep, capture, folder, data, start, weights is not None, guard)
    if on_transition is not None and folder.hold is not None:
        recorder.transition_callback = TransitionCallback(on_transition, recorder.out)
    return recorder


@contextlib.contextmanager
def _agreed(sharded: bool) -> Iterator[list[Any]]:
    """Raise the first process's refusal in all; for a sharded model the others would wait for it forever.

    Yields:
        A list: for a sharded model, all find there afterwards what the first process has put into it.
    """
    told: list[Any] = []
    refusal: GroktraceError | None = None
    try:
        yield told
    except GroktraceError as failure:
        refusal = failure
    if sharded:
        shared: list[Any] = [refusal, told]
        torch.distributed.broadcast_object_list(shared, src=0)
        refusal, told[:] = shared
    if refusal is not None:
        raise refusal


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


def _earlier(model: nn.Module, optimizer: Any, place: Path | str) -> Recorder | None:
    """The open recording of the same training into the same folder."""
    for recorder in open_recorders:
        if place in (recorder.out, recorder.requested) and recorder.records(model, optimizer):
            return recorder
    return None


def _first_step(start_step: int | None, optimizer: Any, earlier: Recorder | None) -> int:
    """How many updates were made before this recording."""
    if start_step is not None:
        return start_step
    if earlier is not None:
        return earlier.steps
    return updates_made(optimizer)


def _is_writer() -> bool:
    """Whether this process writes: the first of a process group."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def _frozen(specs: dict[str, WeightSpec], model: nn.Module, source: nn.Module, own: LossTensors) -> dict[str, Tensor]:
    """The parameters that do not train, without views, whose base may train."""
    views = views_of(model, own)
    parameters = parameters_of(source, own)
    return {
        name: parameter for name, parameter in parameters.items() if not specs[name].trainable and name not in views
    }
