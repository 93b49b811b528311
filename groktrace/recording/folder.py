"""Where a training is recorded: in the folder that was asked for, or in a numbered one beside it."""

import contextlib
import itertools
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from groktrace.errors import GroktraceError, SettingsError
from groktrace.recording.lock import FolderLock
from groktrace.recording.warn import say
from groktrace.run import files, layout
from groktrace.run.info import WeightSpec, check_info
from groktrace.run.remote import Remote, is_url, names_beside

IfExists = Literal["error", "new", "replace"]
LAST = 8  # snapshots of a run in which the weights of a training that begins are looked for
# What a recording that was killed while it began has left, before run.json.
_BEGUN = {layout.DATA_FILE, layout.PROGRAM_FILE, layout.LOCK_FILE}


def check_out(out: Any) -> Path | str:
    """The place that `out` means: an absolute path, or a URL.

    Raises:
        SettingsError: it is neither.
    """
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


def check_if_exists(if_exists: Any) -> None:
    """Refuse what `if_exists` may not be.

    Raises:
        SettingsError: it is that.
    """
    if if_exists not in ("error", "new", "replace"):
        raise SettingsError(f"if_exists: expected 'error', 'new' or 'replace', got {if_exists!r}.")


@dataclass
class Folder:
    """A run directory that a recording may go into.

    Attributes:
        place: its path or URL.
        requested: the place that `watch` was given: this one, or that beside which it lies.
        root: where its files are written.
        remote: where they go from there, if anywhere.
        hold: of the recording on it, once there is one.
    """

    place: Path | str
    requested: Path | str
    root: Path
    remote: Remote | None = None
    hold: FolderLock | None = None

    @classmethod
    def at(cls, place: Path | str, requested: Path | str) -> "Folder":
        """The folder at a place, for the process that writes.

        Raises:
            SettingsError: it cannot be reached.
        """
        if not is_url(place):
            return cls(place, requested, Path(place))
        try:
            remote = Remote(place)
        except OSError as failure:
            raise SettingsError(f"out: cannot be reached ({failure}).") from failure
        return cls(place, requested, remote.folder, remote)

    def info(self) -> dict[str, Any] | None:
        """Its run.json, checked; None where no recording has begun.

        Raises:
            SettingsError: it holds something else than a run.
            RunError: the run is damaged.
        """
        path = self.root / layout.RUN_FILE
        if path.exists():
            info: dict[str, Any] = files.read_json(path)
            check_info(info, path)
            return info
        if self.root.exists():
            names = {entry.name for entry in self.root.iterdir() if not entry.name.startswith(files.TEMPORARY_PREFIX)}
            if names - _BEGUN:
                raise SettingsError(
                    f"out: '{self.place}' holds files, but is not a groktrace run; choose another out=."
                )
        return None

    def beside(self) -> dict[int, str]:
        """The names of the numbered folders, or of whatever has such a name, beside it."""
        name = name_of(self.place)
        found = names_beside(self.place) if is_url(self.place) else _names_in(Path(self.place).parent)
        matches = (re.fullmatch(rf"{re.escape(name)}-([1-9]\d{{0,8}})", sibling, re.ASCII) for sibling in found)
        return {number: match[0] for match in matches if match and (number := int(match[1])) > 1}

    def numbered(self, number: int) -> "Folder":
        """The folder of that number beside it.

        Raises:
            SettingsError: it cannot be reached.
        """
        place: Path | str = f"{self.place}-{number}"
        return Folder.at(place if is_url(place) else Path(place), self.place)

    def clear(self) -> None:
        """Remove what groktrace wrote; run.json last, so that what a kill leaves of it is still taken for a run.

        Raises:
            OSError: the file system refused.
        """
        for folder in (layout.WEIGHTS_FOLDER, layout.ANALYSIS_FOLDER):
            path = self.root / folder
            if path.is_symlink():
                path.unlink()
            elif path.exists():
                shutil.rmtree(path)
        for path in (self.root / layout.TENSORBOARD_FOLDER).rglob(f"*{layout.EVENTS_SUFFIX}"):
            path.unlink()
        for name in (layout.FROZEN_FILE, layout.PROGRAM_FILE, layout.DATA_FILE, layout.RUN_FILE):
            (self.root / name).unlink(missing_ok=True)
        if self.remote is not None:
            self.remote.clear()


@dataclass(frozen=True)
class FolderChoice:
    """What to do with a folder.

    Attributes:
        folder: that was asked for, or that is continued.
        kind: continue its recording, begin there, put a new one in its place, or begin beside it.
        why: what speaks against beginning there.
        steps: of the snapshots that are there.
    """

    folder: Folder
    kind: Literal["continue", "begin", "replace", "beside"]
    why: str = ""
    steps: tuple[int, ...] = ()

    def take(self, if_exists: IfExists) -> Folder:
        """Take the folder, or the next free one beside it.

        Raises:
            SettingsError: it is being recorded already.
            OSError: the file system refused.
        """
        folder, why = self.folder, self.why
        if self.kind != "beside":
            folder.root.mkdir(parents=True, exist_ok=True)
            hold = folder.hold = FolderLock(folder.root)
            begun = self.kind == "begin" and layout.snapshot_steps(folder.root) != list(self.steps)  # in the meantime
            if self.kind == "continue" or (hold.alone and not begun):
                hold.sign()
                if self.kind == "replace":
                    folder.clear()
                return folder
            hold.release()
            why = "is being recorded already"
            if if_exists != "new":
                raise SettingsError(f"out: '{folder.place}' {why}; choose another out=.")
        return _begin_beside(folder, why)


def choose(
    first: Folder,
    specs: Mapping[str, WeightSpec] | None,
    start: int,
    given: bool,
    earlier: Path | str | None,
    if_exists: IfExists,
    parameters: Mapping[str, Tensor],
) -> FolderChoice:
    """Decide where a training is recorded; nothing is written yet.

    Args:
        first: the folder that was asked for.
        specs: the tensors of the network and its loss; None where they are not known yet.
        start: updates made before.
        given: whether the user said so.
        earlier: where an open recording of the same training writes.
        if_exists: what to do with a run that this training does not continue.
        parameters: by name, to tell which run they are of; empty where that cannot be told by them.

    Raises:
        SettingsError: the folder holds something else than a run, or `if_exists` refuses.
        RunError: it holds a damaged run.
    """
    info = first.info()
    if earlier is not None:
        return FolderChoice(first if earlier == first.place else Folder.at(earlier, first.place), "continue")
    steps = layout.snapshot_steps(first.root)
    if start and specs is None:
        return FolderChoice(first, "continue")
    if start:
        found = _continued(first, info, specs, start, parameters)
        if found is not None:
            return FolderChoice(found, "continue")
    if info is None:
        return FolderChoice(first, "begin")
    fits = _fits(first, info, specs)
    if fits and (not steps or (given and start == 0 and steps == [0])):  # one killed right after its start
        return FolderChoice(first, "begin", steps=tuple(steps))
    if if_exists == "replace":
        return FolderChoice(first, "replace")
    why = f"holds a recording up to step {steps[-1]}" if fits and steps else "is the run of another network or loss"
    if if_exists == "error":
        raise _refusal(first, why, fits)
    return FolderChoice(first, "beside", why)


def held_already(
    choice: FolderChoice, specs: Mapping[str, WeightSpec], parameters: Mapping[str, Tensor]
) -> tuple[Folder, int] | None:
    """The run that holds the weights with which a new one begins beside it, and their step; None where none does.

    Args:
        choice: what to do with the folder.
        specs: the tensors of the network and its loss.
        parameters: by name.
    """
    first = choice.folder
    if choice.kind != "beside" or first.remote is not None:  # from where every file would have to be fetched
        return None
    with contextlib.suppress(GroktraceError, OSError):  # one that is damaged
        for folder in _alike(first, first.info(), specs):
            for step in reversed(layout.snapshot_steps(folder.root)[-LAST:]):
                # Weights that are those of step 0 too have not moved by then, as where the learning rate begins at 0.
                if step and _holds(folder, step, parameters) and not _holds(folder, 0, parameters):
                    return folder, step
    return None


def latest_beside(root: Path) -> Path | None:
    """The latest of the runs that were recorded beside one, as it was there already; None where there are none.

    Args:
        root: of that run.
    """
    first = Folder(root, root, root)
    for number in sorted(first.beside(), reverse=True):
        other = first.numbered(number)
        with contextlib.suppress(GroktraceError, OSError):
            if (info := other.info()) is not None and info.get("out") == root.name:
                return other.root
    return None


def with_earlier(folder: Folder, specs: dict[str, WeightSpec], start: int) -> dict[str, WeightSpec]:
    """Merge the tensors' specs with those of the recording that is continued, which knows when they train.

    Args:
        folder: of the recording; it may have none.
        specs: of this one, with the same tensors.
        start: updates made before.
    """
    path = folder.root / layout.RUN_FILE
    if not path.exists():
        return specs
    known, merged = check_info(files.read_json(path), path), {}
    for name, spec in specs.items():
        before = known[name]
        if before.trainable or not spec.trainable:
            merged[name] = replace(spec, trainable=before.trainable, trainable_from=before.trainable_from)
        else:
            merged[name] = replace(spec, trainable_from=start)
    return merged


def _continued(
    first: Folder,
    info: dict[str, Any] | None,
    specs: Mapping[str, WeightSpec] | None,
    start: int,
    parameters: Mapping[str, Tensor],
) -> Folder | None:
    """The run that a training of some updates goes on with: the one with its weights, or else the newest."""
    found = _alike(first, info, specs)
    if not found or found == [first]:
        return found[0] if found else None
    same = [folder for folder in found if _holds(folder, start, parameters)]
    return (same or found)[0]


def _alike(first: Folder, info: dict[str, Any] | None, specs: Mapping[str, WeightSpec] | None) -> list[Folder]:
    """The runs of this network and loss in a folder and beside it, the newest first."""
    found = [first] if info is not None and _fits(first, info, specs) else []
    for number in sorted(first.beside()):
        folder = first.numbered(number)
        with contextlib.suppress(GroktraceError, OSError):  # one that is damaged, or something else
            other = folder.info()
            if other is not None and other.get("out") == name_of(first.place) and _fits(folder, other, specs):
                found.insert(0, folder)
    return found


def _holds(folder: Folder, step: int, parameters: Mapping[str, Tensor]) -> bool:
    """Whether a run holds these weights as those of a step."""
    path = layout.snapshot_path(folder.root, step)
    try:
        if folder.remote is not None:
            folder.remote.fetch(path)
        digests = files.parse_json(files.read_metadata(path)["digests"].encode())
        return bool(parameters) and all(
            digests[name] == files.digest(torch.view_as_real(weight) if weight.dtype == torch.complex128 else weight)
            for name, weight in sorted(parameters.items(), key=lambda entry: entry[1].numel())  # small ones cost less
        )
    except (GroktraceError, OSError, ValueError, KeyError, TypeError):
        return False


def _begin_beside(first: Folder, why: str) -> Folder:
    """Take the next free folder beside one, and say so.

    Raises:
        SettingsError: there is no place beside it.
        OSError: the file system refused.
    """
    if is_url(first.place) and "/" not in first.place.partition("://")[2]:
        raise _refusal(first, why, True)
    for number in itertools.count(max(first.beside(), default=1) + 1):
        folder = first.numbered(number)
        try:
            if folder.remote is None:
                folder.root.mkdir(parents=True)  # of two processes, one succeeds
        except FileExistsError:
            continue
        folder.hold = FolderLock(folder.root)
        folder.hold.sign()
        say(f"'{first.place}' {why} and stays as it is; this training is recorded in '{folder.place}'.")
        return folder
    raise AssertionError


def _refusal(folder: Folder, why: str, fits: bool) -> SettingsError:
    how = "To continue it, load the optimizer's state before watch() or pass start_step=; to" if fits else "To"
    return SettingsError(
        f"out: '{folder.place}' {why}. {how} start anew, choose another out=, or if_exists='new', which takes the next "
        "free folder beside it, or if_exists='replace', which removes it."
    )


def _fits(folder: Folder, info: dict[str, Any], specs: Mapping[str, WeightSpec] | None) -> bool:
    """Whether a run is of the same network and loss."""
    return specs is None or _shapes(check_info(info, folder.root / layout.RUN_FILE)) == _shapes(specs)


def _shapes(specs: Mapping[str, WeightSpec]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (spec.shape, spec.dtype) for name, spec in specs.items()}


def name_of(place: Path | str) -> str:
    """The last part of a path or URL."""
    return str(place).rpartition("/")[2] if is_url(place) else Path(place).name


def _names_in(parent: Path) -> Iterator[str]:
    with contextlib.suppress(FileNotFoundError), os.scandir(parent) as entries:
        for entry in entries:
            yield entry.name
