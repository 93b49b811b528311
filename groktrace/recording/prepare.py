"""Prepare and write what a recording holds besides weights: run.json, the data, and the loss as a program."""

import importlib.metadata
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from groktrace.errors import SettingsError
from groktrace.recording.capture import STORABLE, find_aliases
from groktrace.recording.guard import Guard
from groktrace.recording.schedule import Schedule
from groktrace.recording.writer import now
from groktrace.run import files, layout
from groktrace.run.batch import Batch
from groktrace.run.checks import check_forward, check_with_noise
from groktrace.run.collect import collect
from groktrace.run.isolation import restored_attributes, without_side_effects
from groktrace.run.loss_tensors import NO_TENSORS, LossTensors
from groktrace.run.store import WeightSpec
from groktrace.run.task import (
    MAX_SAMPLES,
    SHIFT_INVARIANT_KEY,
    ModelWithLoss,
    check_noise,
    company_notes,
    data_notes,
    evaluation_mode,
    is_shift_invariant,
    make_forward,
    takes,
)


@dataclass(frozen=True)
class RecordedTask:
    """What the analysis needs besides weights.

    Attributes:
        n: number of training samples, or None without data.
        data: the entry "data" of run.json.
        tensors: contents of data.safetensors.
        program: contents of program.json, or None where the model could not be traced.
        problem: why it could not.
        notes: warnings about the data.
        guard: checks while training that the program still gives the live loss; None without a program.
        own: the tensors of the loss.
        unreached: parameters that the loss's gradient does not reach.
        doubts: those of the notes that the analysis repeats.
    """

    n: int | None = None
    data: dict[str, Any] | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    program: dict[str, Any] | None = None
    problem: Exception | None = None
    notes: tuple[str, ...] = ()
    guard: Guard | None = None
    own: LossTensors = NO_TENSORS
    unreached: frozenset[str] = frozenset()
    doubts: tuple[str, ...] = ()


def prepare_task(
    model: nn.Module,
    train: Any,
    val: Any,
    loss: Any,
    batch_loss: Any,
    seed: int,
    idle: Iterable[str] = (),
    n: int | None = None,
    noise: str | None = None,
) -> RecordedTask:
    """Collect the data, try the loss on them, and trace model and loss.

    Args:
        model: the plain model; left as it is.
        train: training data, see `watch`.
        val: validation data, or None.
        loss: see `watch`.
        batch_loss: see `watch`.
        seed: chooses the subset of large sets.
        idle: parameters of the model that require a gradient, but that the optimizer does not hold.
        n: see `watch`.
        noise: see `watch`.

    Raises:
        TaskError: data, loss and model do not fit together.
        SettingsError: the data cannot be stored.
    """
    with without_side_effects(model), restored_attributes(model, loss, batch_loss):
        fits = takes(model, loss, batch_loss)
        batch, n = collect(train, "train", MAX_SAMPLES, seed, fits, n)
        held_out, n_val = (None, 0) if val is None else collect(val, "val", MAX_SAMPLES, seed, fits, endless=True)
        data, tensors = describe_data(batch, n, held_out, n_val)
        forward = make_forward(model, loss, batch_loss, batch, held_out)
        with evaluation_mode(forward):
            if check_noise(noise):
                probe, held_out = check_with_noise(forward, batch, held_out, seed)
                data, tensors = describe_data(probe.batch, n, held_out, n_val)
            else:
                probe = check_forward(forward, batch, held_out)
            notes = data_notes(probe, train, val, held_out)
            doubts = company_notes(probe, train)
            prepared = trace_task(forward, probe.batch, data, tensors, (*notes, *doubts), idle)
            return replace(prepared, doubts=doubts)


def describe_data(batch: Batch, n: int, held_out: Batch | None, n_val: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The entry "data" of run.json, and the samples by the names that data.safetensors has for them.

    Args:
        batch: training samples.
        n: their number in truth.
        held_out: validation samples, or None.
        n_val: their number in truth.

    Raises:
        SettingsError: they cannot be stored.
    """
    data = {"train": _describe_batch(batch, n), "val": None}
    tensors = _name_tensors("train", batch)
    if held_out is not None:
        data["val"] = _describe_batch(held_out, n_val)
        tensors |= _name_tensors("val", held_out)
    return data, tensors


def trace_task(
    forward: ModelWithLoss,
    batch: Batch,
    data: dict[str, Any],
    tensors: dict[str, Tensor],
    notes: tuple[str, ...] = (),
    idle: Iterable[str] = (),
) -> RecordedTask:
    """Trace model and loss.

    Args:
        forward: the plain model and its loss, in evaluation mode.
        batch: training samples.
        data: see `describe_data`.
        tensors: see `describe_data`.
        notes: warnings about the data.
        idle: see `prepare_task`.
    """
    n = data["train"]["samples"]
    shift_invariant = _shift_invariant(forward, batch)
    unreached: frozenset[str] = frozenset()
    try:
        forward.find_tensors(batch)
        unreached = _unreached(forward, batch, {*idle, *forward.own.parameters()})
        program, constants, guard = _trace(forward, batch)
    except Exception as failure:  # whatever tracing trips over, the weights can still be recorded
        return RecordedTask(n, data, tensors, None, failure, notes, None, forward.own, unreached)
    tensors |= {f"constant.{name}": value.detach().cpu().contiguous().clone() for name, value in constants.items()}
    program = {**program, SHIFT_INVARIANT_KEY: shift_invariant}
    return RecordedTask(n, data, tensors, program, None, notes, guard, forward.own, unreached)


def _unreached(forward: ModelWithLoss, batch: Batch, names: set[str]) -> frozenset[str]:
    """The parameters, among some, that require a gradient but get none from the loss."""
    parameters = forward.parameters_by_name()
    asked = {name: parameters[name] for name in names if name in parameters and parameters[name].requires_grad}
    if not asked:
        return frozenset()
    few = batch.take(slice(0, 2)).to(next(iter(asked.values())).device)
    try:
        with torch.enable_grad():
            loss, _ = forward(*few.tensors)
            found = torch.autograd.grad(loss, list(asked.values()), allow_unused=True)
    except Exception:  # it takes one batch size only, or has no gradient at all; then nothing is known
        return frozenset()
    return frozenset(name for name, gradient in zip(asked, found, strict=True) if gradient is None)


def _shift_invariant(forward: ModelWithLoss, batch: Batch) -> bool:
    try:
        return is_shift_invariant(forward, batch)
    except Exception:  # a loss that only takes the model's own dtype, say; then nothing is known
        return False


def _trace(forward: ModelWithLoss, batch: Batch) -> tuple[dict[str, Any], dict[str, Tensor], Guard]:
    """Trace model and loss: the program as JSON, its constants, and the guard that checks it later."""
    from groktrace.run.program import Program

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's warnings mean nothing to the user
        program = Program.trace(forward, batch)
        guard = Guard(forward, program, batch, program.static_batch is not None)
        return program.to_json(), program.constants, guard


def _describe_batch(batch: Batch, samples: int) -> dict[str, Any]:
    return {"structure": batch.structure, "samples": samples, "stored": len(batch)}


def _name_tensors(what: str, batch: Batch) -> dict[str, Tensor]:
    for tensor in batch.tensors:
        if tensor.dtype not in STORABLE or tensor.layout != torch.strided:
            raise SettingsError(f"{what}: {tensor.dtype} ({tensor.layout}) data cannot be stored; convert them.")
    return {f"{what}.{i}": tensor for i, tensor in enumerate(batch.tensors)}


def describe_run(
    model: nn.Module,
    specs: dict[str, WeightSpec],
    evaluation: RecordedTask,
    optimizer: Any,
    schedule: Schedule,
    task: str | None,
    seed: int,
) -> dict[str, Any]:
    """Contents of run.json.

    Args:
        model: the plain model.
        specs: its tensors.
        evaluation: data and loss.
        optimizer: the optimizer, or None.
        schedule: the steps that are kept.
        task: the user's "package.module:factory", or None.
        seed: as given to `watch`.
    """
    return {
        "format": layout.FORMAT_VERSION,
        "groktrace": _version(),
        "torch": torch.__version__,
        "created": now(),
        "closed": None,
        "weights": {name: _describe_weight(spec) for name, spec in specs.items()},
        "aliases": find_aliases(model),
        "n": evaluation.n,
        "seed": seed,
        "schedule": schedule.description,
        "optimizer": None if optimizer is None else describe_optimizer(optimizer),
        "data": evaluation.data,
        "task": task,
        "doubts": [],
    }


def without_program(problem: Exception, task: str | None) -> str:
    """What to say where model and loss could not be kept as a program.

    Args:
        problem: why.
        task: the user's "package.module:factory", or None.
    """
    reason = " ".join(str(problem).split())[:300].rstrip(".")
    return (
        f"model and loss cannot be kept as a program, so analysis will need `--task {task or 'package.module:factory'}`"
        f", a function that returns groktrace.Task.from_model(model, loss=...), or with batch_loss=... ({reason})."
    )


def _describe_weight(spec: WeightSpec) -> dict[str, Any]:
    dtype = str(spec.dtype).removeprefix("torch.")
    entry: dict[str, Any] = {"shape": list(spec.shape), "dtype": dtype, "trainable": spec.trainable}
    if spec.trainable_from:
        entry["trainable_from"] = spec.trainable_from
    return entry | {"loss": True} if spec.loss else entry


def _version() -> str:
    try:
        return importlib.metadata.version("groktrace")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return "unknown"


def describe_optimizer(optimizer: Any) -> dict[str, Any]:
    """The entry "optimizer" of run.json.

    Args:
        optimizer: one that takes hooks.
    """
    groups = [
        {str(key): plain for key, value in group.items() if key != "params" and (plain := _plain(value)) is not None}
        for group in optimizer.param_groups
    ]
    return {"name": type(optimizer).__name__, "groups": groups}


def _plain(value: Any) -> Any:
    """Convert a setting to JSON; None if it is no plain value."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, list | tuple) and None not in (items := [_plain(item) for item in value]):
        return items
    return None


def write_start(root: Path, info: dict[str, Any], evaluation: RecordedTask) -> bool:
    """Write data, program and, last, run.json; an existing recording is updated.

    Args:
        root: the run directory; made if missing.
        info: contents of run.json.
        evaluation: data and program; without data those that are there stay.

    Returns:
        Whether the data that were there before were others.

    Raises:
        OSError: the file system refused.
        RunError: files that are there already are damaged.
    """
    root.mkdir(parents=True, exist_ok=True)
    run_path, data_path, program_path = (
        root / name for name in (layout.RUN_FILE, layout.DATA_FILE, layout.PROGRAM_FILE)
    )
    before = files.read_json(run_path) if run_path.exists() else None
    changed = False
    if before is not None:
        info = {**info, "created": before.get("created", info["created"]), "task": info["task"] or before.get("task")}
        earlier = before.get("doubts") or []
        known = {doubt["text"] for doubt in earlier}
        info["doubts"] = [*earlier, *(doubt for doubt in info["doubts"] if doubt["text"] not in known)]
    if evaluation.data is not None:
        changed = before is not None and data_path.exists() and _samples_differ(data_path, evaluation.tensors)
        metadata = {"groktrace": str(layout.FORMAT_VERSION), "time": now()}
        files.write_tensors(data_path, evaluation.tensors, metadata)
        if evaluation.program is None:
            program_path.unlink(missing_ok=True)  # an older one would belong to other data
        else:
            files.write_json(program_path, evaluation.program)
    elif before is not None:
        info = {**info, "n": before["n"], "data": before["data"]}
    files.write_json(run_path, info)
    (root / layout.WEIGHTS_FOLDER).mkdir(exist_ok=True)
    return changed


def write_frozen(root: Path, frozen: Mapping[str, Tensor]) -> frozenset[str]:
    """Write the parameters that do not train once for all snapshots; an earlier recording's file stays.

    Args:
        root: the run directory.
        frozen: these parameters by name, not sharded.

    Returns:
        The names of tensors that are as the file has them, which snapshots may leave out.

    Raises:
        OSError: the file system refused.
        RunError: the file that is there already is damaged.
    """
    path = root / layout.FROZEN_FILE
    if frozen and not path.exists():
        copies = {name: tensor.detach().cpu().contiguous() for name, tensor in frozen.items()}
        files.write_tensors(path, copies, {"groktrace": str(layout.FORMAT_VERSION), "time": now()})
        files.sync_folder(root)
    kept = files.read_tensors(path)[0] if frozen and path.exists() else {}
    return frozenset(name for name in kept.keys() & frozen.keys() if _same(kept[name], frozen[name]))


def _samples_differ(path: Path, tensors: dict[str, Tensor]) -> bool:
    old, _ = files.read_tensors(path)
    names = {name for name in old.keys() | tensors.keys() if not name.startswith("constant.")}
    return any(name not in old or name not in tensors or not _same(old[name], tensors[name]) for name in names)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and files.digest(a) == files.digest(b)
