"""Run directories at fsspec URLs, cached file by file in a local folder."""

import contextlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeGuard

from groktrace.run import layout

# Small files that are needed at once; weights are fetched one by one.
_SMALL = layout.START_FILES


def names_beside(url: str) -> list[str]:
    """The names of files and folders beside that at a URL.

    Raises:
        OSError: it cannot be reached.
    """
    with _reaching(url):
        import fsspec

        files, root = fsspec.core.url_to_fs(url.rstrip("/"))
        files.invalidate_cache()
        try:
            return [str(path).rstrip("/").rpartition("/")[2] for path in files.ls(files._parent(root), detail=False)]
        except FileNotFoundError:
            return []


def is_url(place: Any) -> TypeGuard[str]:
    """Whether `place` is a URL and not a path."""
    return isinstance(place, str) and "://" in place


class Remote:
    """A run directory at a URL; in the local folder its files are empty until they are fetched.

    Args:
        url: such as s3://bucket/run; what fsspec takes.

    Attributes:
        url: without a slash at its end.
        folder: the local folder; it goes with this object, unless something in it could not be sent.

    Raises:
        OSError: it cannot be reached.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._unsent: list[Path] = []
        with _reaching(self.url):
            import fsspec

            self._files, self._root = fsspec.core.url_to_fs(self.url)
            self._files.invalidate_cache()
        self.folder = Path(tempfile.mkdtemp(prefix="groktrace-"))
        self._removal = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self._list("")
        self._list(layout.WEIGHTS_FOLDER)
        for name in _SMALL:
            self.fetch(self.folder / name)

    def refresh(self) -> None:
        """Fetch run.json and the list of snapshots anew; other files do not change."""
        self._files.invalidate_cache()
        path = self.folder / layout.RUN_FILE
        with _reaching(self.url):
            self._files.get_file(self._place(path), str(path))
        self._list(layout.WEIGHTS_FOLDER)

    def _list(self, folder: str) -> None:
        for name in self._names(folder):
            path = self.folder / folder / name
            path.parent.mkdir(exist_ok=True)
            path.touch()

    def fetch(self, path: Path) -> None:
        """Download a listed file, unless it is here already."""
        if path.exists() and not path.stat().st_size:
            with _reaching(self.url):
                self._files.get_file(self._place(path), str(path))

    def fetch_results(self) -> None:
        """Download the results of earlier analyses, with their modification times."""
        with _reaching(self.url):
            found = self._files.find(f"{self._root}/{layout.ANALYSIS_FOLDER}")
            for place in found:
                path = self.folder / str(place)[len(self._root.rstrip("/")) :].lstrip("/")
                if not path.resolve().is_relative_to(self.folder.resolve()):
                    continue  # a name that leads out of the folder
                path.parent.mkdir(parents=True, exist_ok=True)
                if path.parent.name == layout.DRAWS_FOLDER:  # large, and fetched when they are asked for
                    path.touch()
                    continue
                self._files.get_file(place, str(path))
                time = self._files.modified(place).timestamp()
                os.utime(path, (time, time))

    def send(self, path: Path, forget: bool = False) -> None:
        """Upload a file, and those that could not be uploaded before; what fails is tried again with the next one.

        Args:
            path: in the local folder.
            forget: empty the local file afterwards.
        """
        self._unsent.append(path)
        self.retry(forget)

    def retry(self, forget: bool = False) -> None:
        """Upload what could not be uploaded before."""
        while self._unsent:
            path = self._unsent[0]
            with _reaching(self.url):
                self._files.makedirs(self._place(path).rpartition("/")[0], exist_ok=True)
                self._files.put_file(str(path), self._place(path))
            if forget:
                os.truncate(path, 0)
            del self._unsent[0]

    def send_start(self) -> None:
        """Upload what a recording writes at its start, run.json last, and remove what it has removed."""
        for name in (*_SMALL[1:], _SMALL[0]):
            path = self.folder / name
            if path.exists():
                self.send(path)
            else:
                self.remove(path)

    def send_folder(self, folder: Path, ending: str) -> None:
        """Upload the files of a folder in place of all with that ending that lie there."""
        with _reaching(self.url):
            wanted = {self._place(path) for path in folder.rglob("*")}
            for place in self._files.find(self._place(folder)):
                if str(place).endswith(ending) and place not in wanted:
                    self._files.rm_file(place)
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.send(path)

    def remove(self, path: Path) -> None:
        """Remove the remote file, if it is there."""
        with _reaching(self.url):
            if self._files.exists(self._place(path)):
                self._files.rm_file(self._place(path))

    def clear(self) -> None:
        """Remove what groktrace wrote there, run.json last."""
        with _reaching(self.url):
            for folder in (layout.WEIGHTS_FOLDER, layout.ANALYSIS_FOLDER, layout.TENSORBOARD_FOLDER):
                for place in self._files.find(f"{self._root.rstrip('/')}/{folder}"):
                    if folder != layout.TENSORBOARD_FOLDER or str(place).endswith(layout.EVENTS_SUFFIX):
                        self._files.rm_file(place)
        for name in (*_SMALL[1:], _SMALL[0]):
            self.remove(self.folder / name)

    def close(self) -> Path | None:
        """Remove the local folder; where something in it could not be sent, it stays, and is returned."""
        if not self._unsent:
            self._removal()
            return None
        self._removal.detach()
        return self.folder

    def _place(self, path: Path) -> str:
        return f"{self._root.rstrip('/')}/{path.relative_to(self.folder).as_posix()}"

    def _names(self, folder: str) -> Iterable[str]:
        with _reaching(self.url):
            try:
                entries = self._files.ls(f"{self._root.rstrip('/')}/{folder}".rstrip("/"), detail=True)
            except FileNotFoundError:
                return []
        files = [entry["name"].rstrip("/") for entry in entries if entry["type"] == "file"]
        return [last for name in files if (last := name.rpartition("/")[2]) not in ("", ".", "..")]


@contextlib.contextmanager
def _reaching(url: str) -> Iterator[None]:
    """Convert failures of any file system to OSErrors that name the URL."""
    try:
        yield
    except ImportError as failure:
        raise OSError(f"{url}: {failure}; pip install 'groktrace[remote]' brings s3fs") from failure
    except FileNotFoundError:
        raise
    except Exception as failure:
        raise OSError(f"{url}: {type(failure).__name__}: {failure}") from failure
