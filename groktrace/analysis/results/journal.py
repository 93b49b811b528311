"""Results of one analysis as they come: JSON lines, appended whole, so that an interrupted analysis goes on."""

import contextlib
import json
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from groktrace.errors import RunError
from groktrace.run.files import MAX_JSON_BYTES, TEMPORARY_PREFIX, open_plain, parse_json, sync, verified, with_digest
from groktrace.run.layout import DRAWS_FOLDER

Result = TypeVar("Result")  # of a line of a journal
_BLOCK = 2**16


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a journal; an interrupted last one is passed over.

    Raises:
        RunError: a line other than the last is damaged.
    """
    if not path.exists():
        return []
    records: list[dict[str, Any]] = []
    try:
        with open_plain(path) as file:
            while (line := file.readline(MAX_JSON_BYTES)).endswith(b"\n"):
                record = verified(parse_json(line))
                if not isinstance(record, dict):
                    raise ValueError("not an object")
                records.append(record)
            if len(line) == MAX_JSON_BYTES:
                raise ValueError("absurdly long")
    except OSError as failure:
        raise RunError(f"{path}: cannot be read ({failure.strerror or failure}).") from failure
    except (ValueError, RecursionError) as failure:
        number = len(records) + 1
        raise RunError(f"{path}: line {number} is damaged ({failure}); remove the file to redo it.") from failure
    return records


def read_journal(path: Path, parse: Callable[[Any], Result]) -> dict[str, Result]:
    """Results by the fingerprints of their snapshots.

    Args:
        path: of the journal.
        parse: a result from its line.

    Raises:
        RunError: a line is damaged.
    """
    known: dict[str, Result] = {}
    for record in read_lines(path):
        try:
            fingerprint = str(record.pop("snapshot"))
            known[fingerprint] = parse(record)
        except (KeyError, TypeError, ValueError) as failure:
            raise RunError(f"{path}: damaged ({failure}); remove the file to redo it.") from failure
    return known


def append_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Append records, each on its own line, and wait until they are on disk."""
    data = b"".join(json.dumps(with_digest(record), allow_nan=False).encode() + b"\n" for record in records)
    with open(path, "ab+") as file:
        file.truncate(_end_of_lines(file))  # what follows was cut short by an interruption
        file.write(data)
        file.flush()
        sync(file.fileno())


def _end_of_lines(file: BinaryIO) -> int:
    """Where the last whole line ends; read from the end, as journals grow long."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - _BLOCK)
        file.seek(start)
        if (found := file.read(end - start).rfind(b"\n")) >= 0:
            return start + found + 1
        end = start
    return 0


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
    with open(folder / ".lock", "a+", errors="replace") as file:
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
        for place in (folder, folder / DRAWS_FOLDER):  # of a process that was killed while it held the folder
            for leftover in place.glob(f"{TEMPORARY_PREFIX}*"):
                leftover.unlink(missing_ok=True)
        yield
