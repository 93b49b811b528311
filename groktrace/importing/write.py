"""Write a run of checkpoints: what the hook would have written."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from groktrace.errors import RunError, SettingsError, SnapshotError
from groktrace.importing.contents import CheckpointError, Contents
from groktrace.importing.find import open_checkpoint
from groktrace.importing.names import Match, match_names
from groktrace.importing.network import Network
from groktrace.importing.steps import Step
from groktrace.recording.prepare import describe_run, without_program, write_frozen, write_start
from groktrace.recording.schedule import Schedule
from groktrace.recording.warn import warn_user
from groktrace.recording.writer import now, remove_leftovers, snapshot_metadata, write_snapshot
from groktrace.run import files, layout
from groktrace.run.info import WeightSpec, check_info
from groktrace.run.live_model import listed
from groktrace.run.remote import Remote, is_url
from groktrace.run.store import Run, open_run

SCHEDULE = {"kind": "imported"}
SOURCE_KEY = "source"


@dataclass(frozen=True)
class Imported:
    """What an import has written.

    Attributes:
        run: opened.
        left_out: a line for each checkpoint that could not be read after all.
        linked: how many snapshots are links to the checkpoints' own files.
        copied: why others of such files are copies.
    """

    run: Run
    left_out: tuple[str, ...]
    linked: int
    copied: tuple[str, ...]


class RunWriter:
    """Writes snapshots into a run directory, which it begins or goes on with.

    Args:
        network: of the task.
        out: the run directory, or its URL.

    Raises:
        SettingsError: `out` holds something else, or cannot be reached.
        RunError: `out` holds a damaged run.
    """

    def __init__(self, network: Network, out: str | os.PathLike[str]) -> None:
        self._network, self._out = network, str(out)
        self._remote = _reach(out)
        self._root = Path(out).expanduser().absolute() if self._remote is None else self._remote.folder
        self._there = _check_out(self._out, self._root, network.specs)
        self._frozen: dict[str, str] | None = None
        self._linked, self._copied = 0, dict[str, None]()

    def write(
        self,
        steps: Sequence[Step],
        key: str | None,
        optimizer: dict[str, Any] | None,
        task_name: str | None,
        report: Callable[[int, int], None],
    ) -> Imported:
        """Write the run; see `ImportPlan.write`."""
        left = [checkpoint for checkpoint in steps if checkpoint.step not in self._there]
        for checkpoint in steps if self._remote is None else ():
            if checkpoint.step in self._there:
                _check_source(self._root, checkpoint)
        lost: list[str] = []
        try:
            begun = not left
            if begun:
                self._start(optimizer, task_name)
            report(len(steps) - len(left), len(steps))
            for done, checkpoint in enumerate(left, len(steps) - len(left) + 1):
                try:
                    contents = open_checkpoint(checkpoint.path)
                    match = match_names(contents, self._network.wanted, key, str(checkpoint.path))
                    tensors = self._network.read(match, str(checkpoint.path))
                except CheckpointError as failure:
                    lost.append(str(failure))
                    continue
                if not begun:  # nothing is written where nothing can be read
                    self._start(optimizer, task_name)
                    begun = True
                self._write_snapshot(checkpoint, contents, match, tensors)
                report(done, len(steps))
            if len(lost) == len(steps):
                raise RunError(lost[0])
            self._end()
        except OSError as failure:
            raise SettingsError(
                f"out: '{self._out}' cannot be written ({failure.strerror or failure}); what is there is kept, and the "
                "same import goes on from there."
            ) from failure
        place = Path(self._out).expanduser() if self._remote is None else self._remote.url
        run = open_run(place)
        if self._remote is None:
            _warn_of_frozen(run)
        return Imported(run, tuple(lost), self._linked, tuple(self._copied))

    def _start(self, optimizer: dict[str, Any] | None, task_name: str | None) -> None:
        """Write all but the snapshots."""
        evaluation, plan = self._network.evaluation, Schedule(lambda checkpoint: True, SCHEDULE)
        info = describe_run(self._network.model, dict(self._network.specs), evaluation, None, plan, task_name, 0)
        if write_start(self._root, info | {"optimizer": optimizer, "seed": None}, evaluation):
            warn_user(f"'{self._out}' held other data than these; the analysis will use the new ones throughout.")
        remove_leftovers(self._root)
        if self._remote is not None:
            self._remote.send_start()
        if evaluation.problem is not None:
            warn_user(without_program(evaluation.problem, task_name))

    def _write_snapshot(self, checkpoint: Step, contents: Contents, match: Match, tensors: dict[str, Tensor]) -> None:
        if self._frozen is None:
            self._frozen = self._keep_frozen({name: tensors[name] for name in tensors if name in self._network.frozen})
        same = {name for name, digest in self._frozen.items() if files.digest(tensors[name]) == digest}
        kept = {name: tensor for name, tensor in tensors.items() if name not in same}
        path, source = layout.snapshot_path(self._root, checkpoint.step), {SOURCE_KEY: _source(checkpoint.path)}
        why = None if contents.linkable is None else _why_copied(match, kept, self._remote)
        if contents.linkable is not None and why is None:
            metadata = snapshot_metadata(checkpoint.step, contents.metrics) | {
                files.DIGESTS_KEY: files.digests_of(kept)
            }
            files.write_json(files.beside(path), metadata | source)
            try:
                os.link(os.path.realpath(contents.linkable), path)
            except OSError as failure:
                files.beside(path).unlink()
                why = f"the file system refuses a link ({failure.strerror})"
        if contents.linkable is None or why is not None:
            write_snapshot(self._root, checkpoint.step, kept, contents.metrics, **source)
        self._linked += contents.linkable is not None and why is None
        self._copied |= {why: None} if why is not None else {}
        files.sync_folder(path.parent)
        if self._remote is not None:
            self._remote.send(path, forget=True)

    def _keep_frozen(self, tensors: dict[str, Tensor]) -> dict[str, str]:
        """Write what does not train, unless it is there; the digests of what is there, by name."""
        path = self._root / layout.FROZEN_FILE
        write_frozen(self._root, tensors)
        if not tensors:
            return {}
        if self._remote is not None:
            self._remote.send(path)
        return {name: files.digest(tensor) for name, tensor in files.read_tensors(path)[0].items()}

    def _end(self) -> None:
        path = self._root / layout.RUN_FILE
        files.write_json(path, {**files.read_json(path), "closed": now()})
        if self._remote is not None:
            self._remote.send(path)


def _warn_of_frozen(run: Run) -> None:
    """Warn of parameters that count as trained but did not move: sampling them would make λ too large."""
    first, last = (_digests(run.snapshots[i].path) for i in (0, -1))
    trainable = [name for name, spec in run.specs.items() if spec.trainable]
    still = [f"'{name}'" for name in trainable if first.get(name) == last.get(name)]
    for names in listed("", still) if len(still) < len(trainable) else ():
        warn_user(
            f"the first and the last checkpoint have the same {names}, which counts as trained. What was frozen has to "
            "be so in the model of the task too (requires_grad_(False)); then import into another folder."
        )


def _digests(path: Path) -> dict[str, Any]:
    """The digests of a snapshot; of a damaged one none, as whoever reads it names it."""
    try:
        return files.parse_json(files.read_metadata(path, SnapshotError)[files.DIGESTS_KEY].encode())
    except (SnapshotError, KeyError, ValueError):
        return {}


def _why_copied(match: Match, kept: Mapping[str, Tensor], remote: Remote | None) -> str | None:
    """Why the file of a checkpoint cannot serve as the snapshot itself; None where it can."""
    if remote is not None:
        return "the run is not on this machine"
    if not match.exact:
        return "names or dtypes are not the model's own"
    if match.tensors.keys() != kept.keys():
        return "the model has tensors that do not train and are kept apart, or that no checkpoint holds"
    return None


def _reach(out: str | os.PathLike[str]) -> Remote | None:
    if not is_url(out):
        return None
    try:
        return Remote(out)
    except OSError as failure:
        raise SettingsError(f"out: cannot be reached ({failure}).") from failure


def _check_out(out: str, root: Path, specs: Mapping[str, WeightSpec]) -> set[int]:
    """The steps that are in a folder already, which is empty or was imported from the same network."""
    if root.exists() and not root.is_dir():
        raise SettingsError(f"out: expected a folder, but '{out}' is a file.")
    path = root / layout.RUN_FILE
    if not path.exists():
        begun = {layout.DATA_FILE, layout.PROGRAM_FILE}  # an import that was ended then
        names = {entry.name for entry in root.iterdir()} if root.exists() else set()
        if {name for name in names if not name.startswith(files.TEMPORARY_PREFIX)} - begun:
            raise SettingsError(f"out: '{out}' holds files, but is not a groktrace run; choose another one.")
        return set()
    info = files.read_json(path)
    known = check_info(info, path)
    if info.get("schedule") != SCHEDULE:
        raise SettingsError(f"out: '{out}' is a run that was recorded, not imported; choose another one.")
    if {name: replace(spec, trainable_from=0) for name, spec in known.items()} != dict(specs):
        raise SettingsError(f"out: '{out}' was imported with another network; choose another one, or remove it.")
    return set(layout.snapshot_steps(root))


def _check_source(root: Path, wanted: Step) -> None:
    """Refuse to go on where the snapshot of a step is of another checkpoint."""
    path = layout.snapshot_path(root, wanted.step)
    try:
        source = files.read_metadata(path, SnapshotError).get(SOURCE_KEY)
    except SnapshotError:
        return  # named as unreadable by whoever reads it
    if source != _source(wanted.path):
        raise SettingsError(
            f"{wanted.path}: is of step {wanted.step}, which is there already, of {source}; choose another out, or "
            f"remove {path}."
        )


def _source(path: Path) -> str:
    """What a snapshot says of the checkpoint that it is of: a name that moving the checkpoints does not change."""
    return "/".join(path.absolute().parts[-2:])
