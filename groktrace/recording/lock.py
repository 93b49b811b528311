"""The hold that a recording has on its folder."""

import contextlib
import os
import platform
import uuid
from pathlib import Path

from groktrace.run import layout


class FolderLock:
    """Tells other processes that a folder is being recorded into, and this one when it is not any more.

    The lock ends with the process, however it ends; what is signed stays.

    Args:
        root: the folder; it exists.

    Attributes:
        alone: whether no other process holds it, as far as the file system can tell.

    Raises:
        OSError: the file system refused.
    """

    def __init__(self, root: Path) -> None:
        self._run, self._path = root / layout.RUN_FILE, root / layout.LOCK_FILE
        self._signature = f"{os.getpid()} on {platform.node()}, {uuid.uuid4().hex}"
        # Not open for writing, so that the file system may become read-only; NFS locks only what is.
        self._file: int | None = os.open(self._path, os.O_RDONLY | os.O_CREAT, 0o666)
        self.alone = True
        try:
            if not _lock(self._file):
                os.close(self._file)
                self._file = os.open(self._path, os.O_RDWR)
                _lock(self._file)
        except BlockingIOError:
            self.alone = False

    def sign(self) -> None:
        """Take the folder, from whichever recording had it before.

        Raises:
            OSError: the file system refused.
        """
        self._path.write_text(self._signature, encoding="utf-8")

    def lost(self) -> bool:
        """Whether the folder was removed, or another recording has taken it."""
        try:
            return self._path.read_text(encoding="utf-8", errors="replace") != self._signature
        except FileNotFoundError:
            return not self._run.exists()
        except OSError:  # for now
            return False

    def release(self) -> None:
        """Let go of the folder; further calls do nothing."""
        if self._file is None:
            return
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(self._file, fcntl.LOCK_UN)  # copies of this process may have the file open too
        with contextlib.suppress(OSError):
            os.close(self._file)
        self._file = None


def _lock(file: int) -> bool:
    """Lock an open file; False where that cannot be done in this way.

    Raises:
        BlockingIOError: another process holds it.
    """
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except (ImportError, OSError):  # on this system, or on this file system
        return False
    return True
