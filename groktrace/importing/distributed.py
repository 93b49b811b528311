"""Folders of torch.distributed.checkpoint (DCP): `.metadata` says which piece of each tensor lies where."""

import contextlib
import io
import math
import pickle
import pickletools
import struct
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from groktrace.importing import torch_file
from groktrace.importing.contents import CheckpointError, Contents, StoredTensor
from groktrace.importing.find import DCP_FILE
from groktrace.run.files import open_plain

MAX_METADATA_BYTES = 2**28
MAX_VALUE_BYTES = 2**16
_CLASSES = [
    *(dcp.Metadata, dcp.TensorStorageMetadata, dcp.BytesStorageMetadata, dcp.TensorProperties),
    *(dcp.ChunkStorageMetadata, dcp.MetadataIndex, dcp.StorageMeta, dcp._MEM_FORMAT_ENCODING, _StorageInfo),
]
# Where the checkpoint lay when it was saved; of no use.
_PATHS = ("pathlib.PosixPath", "pathlib.WindowsPath", "pathlib._local.PosixPath", "pathlib._local.WindowsPath")


def open_folder(folder: Path) -> Contents:
    """Tensors and values of a DCP folder, read piece by piece when they are asked for.

    Raises:
        CheckpointError: its description is damaged, or needs code to be run.
    """
    found = _read_metadata(folder / DCP_FILE)
    tensors: dict[str, StoredTensor] = {}
    values: dict[str, Any] = {}
    sizes = {entry.name: entry.stat().st_size for entry in folder.iterdir()}
    try:
        for place in found.storage_data.values():
            if min(place.offset, place.length) < 0 or place.offset + place.length > sizes.get(place.relative_path, -1):
                raise ValueError(f"{place.relative_path} has no bytes {place.offset} to {place.offset + place.length}")
        places = {(index.fqn, tuple(index.offset or ())): place for index, place in found.storage_data.items()}
        for name, entry in found.state_dict_metadata.items():
            if isinstance(entry, dcp.TensorStorageMetadata):
                shape, dtype = tuple(entry.size), entry.properties.dtype
                pieces = [
                    (tuple(chunk.offsets), tuple(chunk.sizes), places[name, tuple(chunk.offsets)])
                    for chunk in entry.chunks
                ]
                if isinstance(dtype, torch.dtype) and all(type(n) is int and n >= 0 for n in shape):
                    tensors[name] = StoredTensor(shape, dtype, partial(_join, folder, name, shape, dtype, pieces))
            elif (place := places.get((name, ()))) is not None and place.length <= MAX_VALUE_BYTES:
                values[name] = place
    except (KeyError, TypeError, AttributeError, ValueError) as failure:
        raise CheckpointError(
            f"{folder / DCP_FILE}: damaged ({type(failure).__name__}: {failure}); leave the folder out."
        ) from failure
    return Contents(tensors, _Values(folder, values))


class _Values(Mapping[str, Any]):
    """The values that are no tensors, each read when it is looked up."""

    def __init__(self, folder: Path, places: dict[str, Any]) -> None:
        self._folder, self._places = folder, places

    def __getitem__(self, name: str) -> Any:
        return _read_piece(self._folder, name, self._places[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _read_metadata(path: Path) -> Any:
    """The description, by torch.load with weights_only=True, to which its classes are named as harmless."""
    nothing = [(_nothing, name) for name in _PATHS]
    try:
        with open_plain(path) as file:
            content = file.read(MAX_METADATA_BYTES + 1)
        if len(content) > MAX_METADATA_BYTES:
            raise CheckpointError(f"{path}: larger than {MAX_METADATA_BYTES} bytes; DCP writes no such file.")
        with torch.serialization.safe_globals([*_CLASSES, *nothing]):
            found = torch.load(io.BytesIO(_as_torch_file(content)), weights_only=True)
        if not isinstance(found, dcp.Metadata):
            raise CheckpointError(f"{path}: expected the description of a checkpoint, got {type(found).__name__}.")
        return found
    except (CheckpointError, MemoryError):
        raise
    except pickle.UnpicklingError as failure:
        raise torch_file.needs_more(path, failure) from failure
    except Exception as failure:  # whatever damaged bytes make of it
        raise CheckpointError(f"{path}: damaged ({type(failure).__name__}: {failure}); leave it out.") from failure


def _nothing(*parts: str) -> None:
    """Stands for what is of no use."""


def _as_torch_file(content: bytes) -> bytes:
    """A pickle of protocol 4 as torch.load(weights_only=True) takes it: of protocol 2, in a file of torch.save.

    The same instructions; names of classes are written as such, and not taken from the stack.
    """
    head = (pickle.dumps(part, 2) for part in (torch.serialization.MAGIC_NUMBER, 1001, {"little_endian": True}))
    body = bytearray(b"\x80\x02")
    texts: dict[int, str] = {}  # which are written out wherever they are used
    held: list[str] = []  # pushed last, not yet written
    memo = 0

    def push() -> None:
        for text in held:
            encoded = text.encode("utf-8", "surrogatepass")
            body.extend(b"X" + struct.pack("<I", len(encoded)) + encoded)
        held.clear()

    operations = list(pickletools.genops(content))
    for (operation, argument, start), following in zip(operations, [*operations[1:], None], strict=True):
        name = operation.name
        if name in ("PROTO", "FRAME"):
            continue
        if name in ("SHORT_BINUNICODE", "BINUNICODE"):
            held.append(str(argument))
        elif name == "MEMOIZE":
            if held:
                texts[memo] = held[-1]
            else:
                body.extend(b"r" + struct.pack("<I", memo))
            memo += 1
        elif name in ("BINGET", "LONG_BINGET") and argument in texts:
            held.append(texts[argument])
        elif name == "STACK_GLOBAL":
            module, attribute = held[-2:]
            del held[-2:]
            push()
            body.extend(f"c{module}\n{attribute}\n".encode())
        else:
            push()
            body.extend(content[start : len(content) if following is None else following[2]])
            if name == "STOP":
                break
    return b"".join(head) + bytes(body) + pickle.dumps([], 2)


def _read_piece(folder: Path, name: str, place: Any) -> Any:
    """One piece of a file: a small file of torch.save in it.

    Raises:
        CheckpointError: it is damaged or compressed.
    """
    try:
        if place.transform_descriptors:
            raise ValueError("it is compressed")
        with open_plain(folder / place.relative_path) as file:
            file.seek(place.offset)
            return torch_file.load_piece(file.read(place.length), folder / place.relative_path)
    except (OSError, TypeError, AttributeError, ValueError) as failure:
        raise CheckpointError(f"{folder}: '{name}' cannot be read ({failure}); leave it out.") from failure


def _join(folder: Path, name: str, shape: tuple[int, ...], dtype: torch.dtype, pieces: list[Any]) -> Tensor:
    """A tensor put together from its pieces, which have to cover it."""
    whole = torch.zeros(shape, dtype=dtype)
    covered = 0
    for offsets, sizes, place in pieces:
        piece = _read_piece(folder, name, place)
        if not isinstance(piece, Tensor) or tuple(piece.shape) != sizes:
            raise CheckpointError(f"{folder}: a piece of '{name}' is not what {DCP_FILE} says; leave it out.")
        target = whole
        with contextlib.suppress(RuntimeError, IndexError):
            for axis, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
                target = target.narrow(axis, offset, size)
            target.copy_(piece)
            covered += piece.numel()
    if covered != math.prod(shape):
        raise CheckpointError(f"{folder}: the pieces of '{name}' do not cover it; leave it out.")
    return whole
