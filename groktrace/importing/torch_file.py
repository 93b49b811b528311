"""Files of torch.save, opened with weights_only=True and in no other way, ever: nothing in them is run."""

import contextlib
import io
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from groktrace.importing import lightning, numpy_numbers
from groktrace.importing.contents import CheckpointError, Contents, flatten
from groktrace.run.files import open_plain

SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".pt.tar", ".pth.tar")
MAX_PICKLE_BYTES = 2**28  # of the nesting around the tensors, which itself takes much more memory
_ZIP = b"PK\x03\x04"
_BYTEARRAY = b"\nbytearray\n"
REMEDY = (
    "If you trust the file, load it in a process of your own and save the weights alone: "
    "torch.save({'model': model.state_dict(), 'step': step}, 'new.pt')."
)


def open_file(path: Path) -> Contents:
    """Tensors and values of a file of torch.save.

    Raises:
        CheckpointError: it is damaged, asks for more memory than it is large, or holds more than tensors and values.
    """
    return flatten(lightning.weights_and_steps(load(path)), path)


def load(path: Path) -> Any:
    """What a file of torch.save holds; its tensors are read when they are used, where the format allows that.

    Raises:
        CheckpointError: as `open_file`.
    """
    try:
        with open_plain(path) as file:
            zipped = _check(file, path)
    except OSError as failure:
        raise CheckpointError(f"{path}: cannot be read ({failure.strerror or failure}).") from failure
    return _load(path, path, mmap=zipped)


def load_piece(content: bytes, path: Path) -> Any:
    """The same of a piece of a file.

    Args:
        content: the piece.
        path: of the file, for messages.

    Raises:
        CheckpointError: as `open_file`.
    """
    _check(io.BytesIO(content), path)
    return _load(io.BytesIO(content), path)


def _load(source: Any, path: Path, **how: bool) -> Any:
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(numpy_numbers.NAMES):
            warnings.simplefilter("ignore")  # torch's, of pickles by other protocols
            return torch.load(source, map_location="cpu", weights_only=True, **how)
    except pickle.UnpicklingError as failure:
        raise needs_more(path, failure) from failure
    except Exception as failure:  # torch.load has no one error for damaged files
        reason = " ".join(str(failure).split())[:200]
        raise CheckpointError(
            f"{path}: not a whole file of torch.save ({type(failure).__name__}: {reason}); leave it out."
        ) from failure


def _check(file: BinaryIO, path: Path) -> bool:
    """Refuse what would fill memory, before anything is unpacked; whether the file is a zip archive, as since 1.6."""
    zipped = file.read(len(_ZIP)) == _ZIP
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    if not zipped:
        _check_pickle(file, path)
        return False
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            declared = sum(entry.file_size for entry in entries)
            if declared > size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise CheckpointError(
                    f"{path}: would unpack to {declared} bytes, and has {size}; torch.save compresses nothing, so it "
                    "did not write this file, which was not unpacked. Leave it out."
                )
            for entry in entries:
                if entry.filename.endswith("/data.pkl"):
                    if entry.file_size > MAX_PICKLE_BYTES:
                        raise CheckpointError(
                            f"{path}: its pickle has {entry.file_size} bytes; a checkpoint's has few."
                        )
                    _check_pickle(io.BytesIO(archive.read(entry)), path)
    except CheckpointError:
        raise
    except Exception as failure:  # zipfile has no one error for damaged files
        raise CheckpointError(f"{path}: not a whole file of torch.save ({failure}); leave it out.") from failure
    return True


def _check_pickle(file: BinaryIO, path: Path) -> None:
    """Refuse the one call by which weights_only=True lets a pickle fill memory at will: bytearray(n)."""
    before = b""
    while block := file.read(2**24):
        if _BYTEARRAY in before + block:
            raise CheckpointError(f"{path}: holds a bytearray, whose size its file does not bound. {REMEDY}")
        before = block[-len(_BYTEARRAY) :]


def needs_more(path: Path, failure: Exception) -> CheckpointError:
    """The refusal of a pickle that needs code to be run."""
    names = re.findall(r"GLOBAL (\S+)", str(failure))[:1]
    # Only of newer files, and whole ones.
    with contextlib.suppress(Exception), torch.serialization.safe_globals(numpy_numbers.NAMES):
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    if names:
        needs = f"needs code to be run ({', '.join(names[:5])}{', ...' if names[5:] else ''})"
    else:
        reason = " ".join(str(failure).partition("Check the documentation")[0].split("error:")[-1].split())[-200:]
        needs = f"not whole, or not of tensors and plain values alone ({reason})"
    return CheckpointError(f"{path}: {needs}; nothing else is ever opened. {REMEDY}")
