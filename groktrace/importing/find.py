"""Which files and folders are checkpoints."""

import glob
import os
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path

from groktrace.errors import SettingsError
from groktrace.importing import huggingface, safetensors_file, torch_file
from groktrace.importing.contents import CheckpointError, Contents

MAX_FOLDERS = 4  # one in another
SUFFIXES = (*torch_file.SUFFIXES, safetensors_file.SUFFIX, huggingface.INDEX_SUFFIX)
# What trainers write beside the weights.
_OTHERS = ("optimizer", "scheduler", "scaler", "rng_state", "random_states", "training_args")
DCP_FILE = ".metadata"


def find_checkpoints(given: Iterable[str | os.PathLike[str]], depth: int = MAX_FOLDERS) -> list[Path]:
    """The checkpoints among files, folders and patterns; each once.

    Of a folder, these are the checkpoint folders in it, or else its files with the suffix of one, and those of folders
    in it.

    Args:
        given: paths and patterns.
        depth: how many folders to look into, one in another.

    Raises:
        SettingsError: one of them is missing, or holds no checkpoint.
    """
    found: dict[str, Path] = {}
    for pattern in [os.fspath(path) for path in given]:
        paths = [Path(pattern)] if os.path.exists(pattern) else [*map(Path, sorted(glob.glob(pattern, recursive=True)))]
        if not paths:
            raise SettingsError(
                f"{pattern}: no such file or folder; expected checkpoints, or a pattern that fits some."
            )
        for path in paths:
            inside = list(_within(path, depth)) if path.is_dir() else [path]
            if not inside and len(paths) == 1:
                raise SettingsError(
                    f"{path}: holds no checkpoint; expected files that end in {', '.join(SUFFIXES)}, or folders of "
                    "transformers or torch.distributed.checkpoint."
                )
            for checkpoint in inside:
                found.setdefault(os.path.realpath(checkpoint), checkpoint)
    if not found:
        raise SettingsError("checkpoints: expected at least one file or folder.")
    return list(found.values())


def import_command(path: Path, name: str) -> str | None:
    """A line that says how many checkpoints a file or folder holds, with the command that makes a run of them.

    Args:
        path: of the file or folder.
        name: what it is called.

    Returns:
        None where there are none.
    """
    try:
        if not path.is_dir() and not (path.is_file() and _is_checkpoint_file(path.name)):
            return None
        count = len(find_checkpoints([path], depth=1))
    except (SettingsError, OSError):
        return None
    return (
        f"It holds {count} checkpoint{'s' if count > 1 else ''}; to make a run of them: "
        f"groktrace import {shlex.quote(name)} --task my_module:task --out RUN"
    )


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder as a whole is one checkpoint; one of a trainer that holds others is not."""
    if (folder / DCP_FILE).is_file():
        return True
    inside = (entry for entry in folder.iterdir() if entry.is_dir())
    return huggingface.weights_file(folder) is not None and not any(map(huggingface.weights_file, inside))


def _within(folder: Path, depth: int) -> Iterator[Path]:
    """The checkpoints that a folder holds, or is."""
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    folders = [entry for entry in entries if entry.is_dir()]
    whole = [entry for entry in folders if is_checkpoint(entry)]
    if is_checkpoint(folder):
        yield folder
        return
    yield from whole
    if not whole:  # else the folder's own weights are a trainer's last, or best
        yield from (entry for entry in entries if entry.is_file() and _is_checkpoint_file(entry.name))
    if depth:
        for entry in folders:
            if entry not in whole and not entry.is_symlink():
                yield from _within(entry, depth - 1)


def _is_checkpoint_file(name: str) -> bool:
    return name.endswith(SUFFIXES) and not name.startswith(_OTHERS)


def open_checkpoint(path: Path) -> Contents:
    """What a checkpoint holds, by its format.

    Raises:
        CheckpointError: it is none, damaged, or needs code to be run.
    """
    try:
        if not path.is_dir():
            return huggingface.open_weights(path)
        if (path / DCP_FILE).is_file():
            from groktrace.importing import distributed  # which takes a second to import

            return distributed.open_folder(path)
        return huggingface.open_folder(path)
    except OSError as failure:
        raise CheckpointError(f"{path}: cannot be read ({failure.strerror or failure}).") from failure
