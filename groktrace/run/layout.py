"""Names within a run directory, and the version of its format."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from groktrace.records import between

FORMAT_VERSION = 1

RUN_FILE = "run.json"
PROGRAM_FILE = "program.json"
DATA_FILE = "data.safetensors"
FROZEN_FILE = "frozen.safetensors"
LOCK_FILE = ".lock"
START_FILES = (RUN_FILE, PROGRAM_FILE, DATA_FILE, FROZEN_FILE)  # what a recording writes when it begins
WEIGHTS_FOLDER = "weights"
ANALYSIS_FOLDER = "analysis"
TENSORBOARD_FOLDER = "tensorboard"
DRAWS_FOLDER = "draws"  # in a folder of results
# The ending of the event files that are ours to replace.
EVENTS_SUFFIX = ".groktrace"

MAX_STEP = 10**12 - 1
Step = Annotated[int, between(0, MAX_STEP)]
_SNAPSHOT_NAME = re.compile(r"(\d{12})\.safetensors", re.ASCII)


def snapshot_path(root: Path, step: int) -> Path:
    """Where the snapshot of `step` lies; twelve digits, so that names sort as steps do."""
    return root / WEIGHTS_FOLDER / f"{step:012d}.safetensors"


def snapshot_step(name: str) -> int | None:
    """The step that a file name in the weights folder stands for, or None if it is no snapshot."""
    match = _SNAPSHOT_NAME.fullmatch(name)
    return int(match.group(1)) if match else None


def leads_out(root: Path, path: Path) -> bool:
    """Whether a link takes `path` out of `root`."""
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def links_out(root: Path) -> Iterator[Path]:
    """Links in `root`, at any depth but that of the snapshots, that lead out of it."""
    for folder, folders, names in os.walk(root):
        if Path(folder) == root / WEIGHTS_FOLDER:
            names = []
        yield from (
            path for name in (*folders, *names) if (path := Path(folder, name)).is_symlink() and leads_out(root, path)
        )


def snapshot_steps(root: Path) -> list[int]:
    """Steps of all finished snapshots, ascending; a snapshot exists when its final name does."""
    folder = root / WEIGHTS_FOLDER
    if not folder.is_dir():
        return []
    return sorted(step for entry in folder.iterdir() if (step := snapshot_step(entry.name)) is not None)
