"""watch(): the one line in a training script."""

import atexit
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from groktrace.errors import SettingsError
from groktrace.recording.capture import Capture, describe_weights, plain_model
from groktrace.recording.hooks import UpdateHooks, hookable
from groktrace.recording.prepare import Evaluation, describe_run, prepare_evaluation, write_start
from groktrace.recording.schedule import check_count, make_schedule
from groktrace.recording.writer import Writer, remove_leftovers
from groktrace.run import files, layout
from groktrace.run.store import WeightSpec, check_info

_FACTORY = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_open_recorders: list["Recorder"] = []


class Recorder:
    """A recording in progress; made by `watch`.

    Attributes:
        out: the run directory.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        keep: Callable[[int], bool],
        capture: Capture,
        out: Path,
        start: int,
        writes: bool,
    ) -> None:
        self.out = out
        self._pid = os.getpid()
        self._model: nn.Module | None = model
        self._optimizer = optimizer
        self._keep = keep
        self._capture: Capture | None = capture
        self._writer = Writer(out) if writes else None
        self._first = self._steps = start
        self._skipped: Tensor | None = None
        self._copied: int | None = None
        self._metrics: dict[str, float] = {}
        self._blocked = 0.0
        self._closed = False
        self._warned: set[str] = set()
        self._hooks: UpdateHooks | None = None
        self._guarded(lambda: self._snapshot(start))
        if optimizer is not None:
            self._hooks = UpdateHooks(optimizer, self._update)
        _open_recorders.append(self)

    @property
    def steps(self) -> int:
        """Number of updates so far, those before this recording included."""
        if self._skipped is not None:
            self._steps -= int(self._skipped)
            self._skipped = None
        return self._steps

    def step(self) -> None:
        """Tell of one update; for loops whose optimizer was not given to `watch`."""
        if self._hooks is not None:
            self._warn("step", "recorder.step() does nothing where watch() was given the optimizer.")
        else:
            self._update(None)

    def log(self, **metrics: float) -> None:
        """Numbers to be kept with the next snapshot.

        Args:
            metrics: names and values; one-element tensors are fine too.
        """
        if not self._inert():
            self._guarded(lambda: self._metrics.update({name: float(value) for name, value in metrics.items()}))

    def close(self) -> None:
        """Keep the last step, wait for the writer, and let go of model and optimizer; twice is once."""
        if self._inert():
            return
        self._closed = True
        try:
            if self._hooks is not None:
                self._hooks.remove()
            self._guarded(self._finish)
            if self._writer is not None:
                self._writer.close()
                self._report()
        except BaseException:  # Ctrl-C while waiting; the end of the process tries again
            self._closed = False
            raise
        self._model = self._optimizer = self._capture = self._hooks = None
        if self in _open_recorders:
            _open_recorders.remove(self)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        if self._writer is None:
            return f"<groktrace.Recorder {state}: {self.steps} steps; another process of the group writes>"
        return (
            f"<groktrace.Recorder {state}: {self.steps} steps, {self._writer.written} snapshots, "
            f"{self._writer.bytes} bytes, training blocked {self._blocked:.3f} s, in '{self.out}'>"
        )

    def _inert(self) -> bool:
        # A forked child inherits hooks and buffers, but not the writer's thread.
        return self._closed or os.getpid() != self._pid

    def _update(self, found_inf: Tensor | None) -> None:
        if self._inert():
            return
        try:
            self._steps += 1
            if found_inf is not None:
                # Reading the flag would wait for the GPU at every step, so updates are counted as if none were
                # skipped and the count is set right when it says that a snapshot is due, which is never too late.
                flag = (found_inf > 0).sum()
                self._skipped = flag if self._skipped is None else self._skipped + flag
            if self._keep(self._steps):
                counted = self._steps
                if self.steps == counted:
                    self._snapshot(counted)
        except Exception as failure:
            self._warn_failure(failure)

    def _snapshot(self, step: int) -> None:
        """Copy the weights and hand them to the writer, unless the step is there already."""
        if self._writer is None or step > layout.MAX_STEP:
            return
        began = time.perf_counter()
        try:
            self._writer.wait()
            self._report()
            if self._capture is not None and not layout.snapshot_path(self.out, step).exists():
                tensors = self._capture.copy()
                self._copied = step
                metrics, self._metrics = self._metrics, {}
                self._writer.submit(step, tensors, metrics)
        finally:
            self._blocked += time.perf_counter() - began

    def _finish(self) -> None:
        if self._writer is None or self._capture is None:
            return
        self._writer.wait()
        steps = self.steps
        if steps == self._first == self._copied and self._capture.moved():
            self._warn("idle", f"the weights changed, but no update was seen; {_HOW_TO_COUNT}")
        else:
            self._snapshot(steps)  # where the last write failed, this tries once more

    def _guarded(self, action: Callable[[], None]) -> None:
        """Run `action`; what goes wrong in it is told, once, and never reaches the training."""
        try:
            action()
        except Exception as failure:
            self._warn_failure(failure)

    def _report(self) -> None:
        if self._writer is not None and (failure := self._writer.error) is not None:
            reason = f"{type(failure).__name__}: {failure}"
            self._warn("writer", f"a snapshot could not be written to '{self.out}' ({reason}); training goes on.")

    def _warn_failure(self, failure: Exception) -> None:
        self._warn("recording", f"recording failed ({type(failure).__name__}: {failure}); training goes on.")

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            _warn(message)


_HOW_TO_COUNT = "give watch() the optimizer that trains, or call recorder.step() once per update."


def _warn(message: str) -> None:
    try:
        warnings.warn(f"groktrace: {message}", RuntimeWarning, stacklevel=2)
    except RuntimeWarning:  # warnings are errors in this process, but recording must not stop a training
        print(f"groktrace: {message}", file=sys.stderr)


@atexit.register
def _close_all() -> None:
    for recorder in list(_open_recorders):
        recorder.close()


def watch(
    model: nn.Module,
    optimizer: Any = None,
    *,
    train: Any = None,
    loss: Callable[..., Tensor] | str | None = None,
    batch_loss: Callable[..., Tensor] | None = None,
    val: Any = None,
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
        model: the network; torch.compile and DistributedDataParallel are seen through.
        optimizer: each of its updates counts as a step; without it, call `Recorder.step()` once per update.
        train: (inputs, targets), a dict of tensors, a list of batches, a Dataset or a DataLoader; without it only
            weights are kept, and the analysis needs `--task`.
        loss: loss(outputs, targets) as a mean over the batch, or "cross_entropy" or "mse".
        batch_loss: instead of `loss`, batch_loss(model, batch) for models that compute their own.
        val: validation data in the same form as `train`.
        task: "package.module:factory" that rebuilds the task, for models that cannot be traced.
        out: the run directory.
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
    plan = make_schedule(every, schedule)
    seed = check_count(seed, "seed", least=0)
    if start_step is not None:
        start_step = check_count(start_step, "start_step", least=0)
    if task is not None and not (isinstance(task, str) and _FACTORY.fullmatch(task)):
        raise SettingsError(f"task: expected 'package.module:factory', got {task!r}.")
    root = _check_out(out)
    if not isinstance(model, nn.Module):
        raise SettingsError(f"model: expected a torch.nn.Module, got {type(model).__name__}.")
    model = plain_model(model)
    specs = describe_weights(model)
    parameters = {id(parameter) for parameter in model.parameters()}
    if not parameters:
        raise SettingsError("model: expected a network with parameters, got one without any.")
    if optimizer is not None:
        optimizer = hookable(optimizer)
        if not any(id(parameter) in parameters for group in optimizer.param_groups for parameter in group["params"]):
            raise SettingsError("optimizer: holds none of the model's parameters; make it from model.parameters().")
    if train is None:
        for name, value in (("loss", loss), ("batch_loss", batch_loss), ("val", val)):
            if value is not None:
                raise SettingsError(f"{name}: of no use without train; give the training data too.")

    earlier = _earlier(model, optimizer, root)
    start = _first_step(start_step, optimizer, earlier)
    writes = _is_writer()
    if writes:
        # An explicit start_step may contradict the open recording; then it is refused as after a restart.
        _check_folder(root, specs, start, resuming=earlier is not None and start == earlier.steps)
    evaluation = Evaluation() if train is None else prepare_evaluation(model, train, val, loss, batch_loss, seed)
    capture = Capture(model, specs)
    for recorder in list(_open_recorders):
        if recorder.out == root:  # a folder has one recording at a time, so this one takes over
            recorder.close()
    if writes:
        info = describe_run(model, specs, evaluation, optimizer, plan, task, seed)
        try:
            if write_start(root, info, evaluation):
                _warn(f"'{root}' held other data than those given now; the analysis will use the new ones throughout.")
            remove_leftovers(root)
        except OSError as failure:
            raise SettingsError(f"out: '{root}' cannot be written ({failure.strerror or failure}).") from failure
        if evaluation.problem is not None:
            reason = " ".join(str(evaluation.problem).split())[:300]
            hint = task or "package.module:factory"
            _warn(f"model and loss cannot be kept as a program, so analysis will need `--task {hint}` ({reason}).")
    return Recorder(model, optimizer, plan.keep, capture, root, start, writes)


def _check_out(out: Any) -> Path:
    if not isinstance(out, str | os.PathLike):
        raise SettingsError(f"out: expected the path of a folder, got {out!r}.")
    if "://" in os.fspath(out):
        raise SettingsError(f"out: only local folders can be written, got '{out}'; write to one and copy it.")
    # Absolute, since scripts change their working directory.
    root = Path(out).expanduser().absolute()
    for folder in (root, *root.parents):
        if folder.exists():
            if not folder.is_dir():
                raise SettingsError(f"out: expected a folder, but '{folder}' is a file.")
            break
    return root


def _earlier(model: nn.Module, optimizer: Any, root: Path) -> Recorder | None:
    """The open recording of the same training into the same folder."""
    for recorder in _open_recorders:
        same = recorder._model is model if optimizer is None else recorder._optimizer is optimizer
        if same and recorder.out == root and not recorder._inert():
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
    """Whether this process writes: of several that train together, the first."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def _check_folder(root: Path, specs: dict[str, WeightSpec], start: int, resuming: bool) -> None:
    """Refuse to write into a folder that holds something else, or steps that this recording would make again."""
    if not root.exists():
        return
    path = root / layout.RUN_FILE
    if not path.exists():
        if any(not entry.name.startswith(files.TEMPORARY_PREFIX) for entry in root.iterdir()):
            raise SettingsError(f"out: '{root}' holds files, but is not a groktrace run; choose another out=.")
        return
    known = check_info(files.read_json(path), path)
    shapes = [{name: (spec.shape, spec.dtype) for name, spec in one.items()} for one in (known, specs)]
    if shapes[0] != shapes[1]:
        raise SettingsError(f"out: '{root}' is the run of another network; choose another out=.")
    steps = layout.snapshot_steps(root)
    if steps and start == 0 and not resuming:
        raise SettingsError(
            f"out: '{root}' holds a recording up to step {steps[-1]}. To continue it, load the optimizer's state "
            "before watch() or pass start_step=; to start anew, choose another out= or remove the folder."
        )
