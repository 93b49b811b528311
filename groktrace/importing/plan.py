"""import_checkpoints(): which checkpoints make which snapshots, all known before anything is written."""

import math
import os
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from groktrace.errors import RunError, SettingsError, printable
from groktrace.importing.contents import CheckpointError, Contents
from groktrace.importing.find import find_checkpoints, open_checkpoint
from groktrace.importing.names import match_names
from groktrace.importing.network import Network, prepare_network
from groktrace.importing.steps import Recorded, Step, choose_steps, recorded_step
from groktrace.importing.write import Imported, RunWriter
from groktrace.run.store import Run
from groktrace.run.task import Task

ProgressCallback = Callable[[str, int, int], None]
_GROUP = re.compile(r"(?P<of>(?:.*\.)?param_groups)\.(?P<index>[0-9]{1,4})\.(?P<setting>\w+)")
MAX_NAMED = 5
MAX_SETTINGS = 10_000


@dataclass(frozen=True, eq=False)
class ImportPlan:
    """What an import will write.

    Attributes:
        steps: the checkpoints in the order of their steps.
        network: of the task.
        left_out: one line for each checkpoint that cannot be used.
        remarks: what else was noticed.
        key: where in a checkpoint the weights are, if that was given.
        optimizer: its settings, as the first checkpoint that was found to hold some says.
    """

    steps: tuple[Step, ...]
    network: Network
    left_out: tuple[str, ...]
    remarks: tuple[str, ...]
    key: str | None
    optimizer: dict[str, Any] | None

    def rows(self) -> list[tuple[str, ...]]:
        """A table of checkpoints and their steps, the heading first."""
        return [
            ("step", "from", "checkpoint"),
            *((str(checkpoint.step), checkpoint.source, printable(str(checkpoint.path))) for checkpoint in self.steps),
        ]

    def write(
        self, out: str | os.PathLike[str], task_name: str | None = None, progress: ProgressCallback | None = None
    ) -> Imported:
        """Write the run; snapshots that are there already are kept.

        Args:
            out: the run directory, or its URL.
            task_name: "package.module:factory" of the task.
            progress: called with (phase, checkpoints done, checkpoints in all).

        Raises:
            SettingsError: `out` holds something else, or cannot be written.
            RunError: `out` holds a damaged run, or no checkpoint could be read.
        """

        def report(done: int, total: int) -> None:
            if progress is not None:
                progress("importing", done, total)

        return RunWriter(self.network, out).write(self.steps, self.key, self.optimizer, task_name, report)


def plan_import(
    checkpoints: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    task: Task,
    *,
    key: str | None = None,
    step_from: str | None = None,
    progress: ProgressCallback | None = None,
) -> ImportPlan:
    """Look into every checkpoint, without reading its weights: see `import_checkpoints`."""
    given = [checkpoints] if isinstance(checkpoints, str | os.PathLike) else list(checkpoints)
    paths = find_checkpoints(given)
    network = prepare_network(task)
    recorded: list[Recorded] = []
    left_out: list[str] = []
    remarks: dict[str, int] = {}
    optimizer: dict[str, Any] | None = None
    for done, path in enumerate(paths):
        if progress is not None:
            progress("looking into checkpoints", done, len(paths))
        try:
            contents = open_checkpoint(path)
            match = match_names(contents, network.wanted, key, str(path))
            recorded.append(Recorded(path, None, "") if step_from is not None else recorded_step(path, contents))
        except CheckpointError as failure:
            left_out.append(str(failure))
            continue
        optimizer = optimizer or _optimizer(contents)
        if match.prefix or match.beside:
            remark = f"under '{match.prefix.rstrip('.')}'" if match.prefix else "at the top"
            remark += f", and {match.beside} other tensors beside them, which are left out" if match.beside else ""
            remarks[remark] = remarks.get(remark, 0) + 1
    if progress is not None:
        progress("looking into checkpoints", len(paths), len(paths))
    if not recorded:
        more = f" None of the {len(left_out)} checkpoints can be used." if left_out[1:] else ""
        raise RunError(left_out[0] + more)
    steps, how = choose_steps(recorded, step_from)
    texts = [f"weights: {printable(text)} ({count} of {len(recorded)} checkpoints)" for text, count in remarks.items()]
    return ImportPlan(tuple(steps), network, tuple(left_out), (*filter(None, [how]), *texts), key, optimizer)


def _optimizer(contents: Contents) -> dict[str, Any] | None:
    """The plain settings of the first optimizer that a checkpoint holds, as run.json has them."""
    groups: dict[str, dict[int, dict[str, Any]]] = {}
    for name in contents.values:
        if (found := _GROUP.fullmatch(name)) and found["setting"] != "params":
            try:
                value = contents.values[name]
            except CheckpointError:
                continue
            if isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
                groups.setdefault(found["of"], {}).setdefault(int(found["index"]), {})[found["setting"]] = value
    first = next(iter(groups.values()), {})
    if not 0 < sum(map(len, first.values())) <= MAX_SETTINGS:
        return None
    return {"name": None, "groups": [first[index] for index in sorted(first)]}


def import_checkpoints(
    checkpoints: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    task: Task,
    out: str | os.PathLike[str],
    key: str | None = None,
    step_from: str | None = None,
    task_name: str | None = None,
    progress: ProgressCallback | None = None,
) -> Run:
    """Make a run of checkpoints that a training without the hook has left.

    Files of torch.save, safetensors, folders of transformers' Trainer, Lightning's .ckpt, and folders of
    torch.distributed.checkpoint. None of their code is run. What is in `out` already is kept, so that a second call
    goes on where the first was interrupted.

    Args:
        checkpoints: files, folders that are or hold checkpoints, and patterns.
        task: model, loss and data, from `Task.from_model(model, train=..., loss=...)`.
        out: the run directory, or its URL.
        key: the dotted path in a checkpoint under which the weights are, where there are several.
        step_from: a regular expression that finds the step in a checkpoint's path; by default, it is what the
            checkpoints say, or else in their names.
        task_name: "package.module:factory" that rebuilds the task, for models that cannot be traced.
        progress: called with (phase, checkpoints done, checkpoints in all).

    Returns:
        The run, as `open_run` gives it.

    Raises:
        SettingsError: a step is missing, negative, not finite or there twice; or `out` holds something else.
        TaskError: the task has no model or no data.
        RunError: no checkpoint can be used.

    Warns:
        RuntimeWarning: some checkpoints cannot be used; they are left out.
    """
    if isinstance(out, str) and not out:
        raise SettingsError("out: expected the path of a folder, got ''.")
    plan = plan_import(checkpoints, task, key=key, step_from=step_from, progress=progress)
    imported = plan.write(out, task_name, progress)
    if problems := (*plan.left_out, *imported.left_out):
        named = " ".join(problems[:MAX_NAMED]) + (
            f" And {len(problems) - MAX_NAMED} more." if problems[MAX_NAMED:] else ""
        )
        warnings.warn(f"groktrace: {len(problems)} checkpoints were left out. {named}", RuntimeWarning, stacklevel=2)
    return imported.run
