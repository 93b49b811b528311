"""Results of one analysis as they come: JSON lines, appended whole, so that an interrupted analysis goes on."""

import contextlib
import json
import os
import platform
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from groktrace.errors import RunError
from groktrace.run.files import TEMPORARY_PREFIX, sync


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a journal; an interrupted last one is passed over.

    Raises:
        RunError: a line other than the last is damaged.
    """
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("not an object")
        except (ValueError, RecursionError) as failure:
            raise RunError(f"{path}: line {number} is damaged ({failure}); remove the file to redo it.") from failure
        records.append(record)
    return records


def check_numbers(record: dict[str, Any], names: Iterable[str]) -> None:
    """Refuse a record in which one of these values is neither a number nor None; what is missing counts as None.

    Raises:
        ValueError: one is; the message is its name.
    """
    for name in names:
        number = record.get(name)
        if number is not None and (isinstance(number, bool) or not isinstance(number, int | float)):
            raise ValueError(name)


def append_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Append records, each on its own line, and wait until they are on disk."""
    data = b"".join(json.dumps(record, allow_nan=False).encode() + b"\n" for record in records)
    with open(path, "ab+") as file:
        # What follows the last line end was cut short by an interruption.
        end = file.seek(0, os.SEEK_END)
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1 if end else 0
        file.truncate(whole)
        file.write(data)
        file.flush()
        sync(file.fileno())


@contextlib.contextmanager
def exclusive(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold a folder for one process; the hold ends with the process, however it ends.

    Args:
        folder: to be held; it exists.
        wait: whether to wait for another process that holds it.

    Raises:
        RunError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # no such locks on this system: two analyses at once are then the user's to avoid
        yield
        return
    with open(folder / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as failure:
            file.seek(0)
            holder = file.read(200).strip() or "unknown"
            raise RunError(f"{folder}: another analysis (process {holder}) is writing here; wait for it.") from failure
        except OSError:  # nor on this file system
            pass
        file.truncate(0)
        file.write(f"{os.getpid()} on {platform.node()}")
        file.flush()
        for leftover in folder.glob(f"{TEMPORARY_PREFIX}*"):  # of a process that was killed while it held the folder
            leftover.unlink(missing_ok=True)
        yield
