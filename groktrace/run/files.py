"""Atomic writes and verified reads of single files: JSON and safetensors only."""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import save, save_file
from torch import Tensor

from groktrace.errors import GroktraceError, RunError

TEMPORARY_PREFIX = ".tmp"  # safetensors has names of its own that begin so
SMALL_BYTES = 2**18
MAX_JSON_BYTES = 64 * 2**20
# Memory that a parsed file may take.
MAX_PARSED_BYTES = 100 * 10**6
DIGEST_KEY = "digest"
DIGESTS_KEY = "digests"
# The names of tensors of complex128, for which safetensors has no name: they are written as pairs of float64.
PAIRS_KEY = "pairs"
# As safetensors calls them.
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "C64": torch.complex64},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
    **{"F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz},
}
# Errors of file systems that do not support an operation at all, such as object stores.
_UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Write a file so that readers see all of it or none.

    The body writes a temporary file in the same folder and syncs it (`sync`); then it is renamed to `path`. The caller
    syncs the folder (`sync_folder`). Without fsync, the file system decides when the bytes are on disk; without rename,
    the file is copied to its final name, and a kill during the copy leaves a file that readers refuse.

    Raises:
        OSError: the file system refused; `path` is then as it was (but for one without rename).
    """
    temporary = path.parent / f"{TEMPORARY_PREFIX}-{path.name}-{uuid.uuid4().hex[:8]}"
    try:
        yield temporary
        try:
            os.replace(temporary, path)
        except OSError as failure:
            if failure.errno not in _UNSUPPORTED | {errno.EPERM}:
                raise
            _copy(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def sync_folder(folder: Path) -> None:
    """Wait until the names of new files are on disk; not every system can open or sync folders."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync(descriptor: int) -> None:
    """Wait until an open file is on disk, where the file system can tell.

    Raises:
        OSError: it could not be written.
    """
    try:
        os.fsync(descriptor)
    except OSError as failure:
        if failure.errno not in _UNSUPPORTED:
            raise


def _copy(temporary: Path, path: Path) -> None:
    """Copy the temporary file to its final name, and remove it."""
    new = not path.exists()
    try:
        shutil.copyfile(temporary, path)
        with open(path, "rb+") as file:
            sync(file.fileno())
    except BaseException:
        if new:
            with contextlib.suppress(OSError):
                path.unlink()
        raise
    temporary.unlink()


def write_file(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all, and sync the folder.

    Raises:
        OSError: the file system refused; `path` is then as it was.
    """
    _write(path, data)
    sync_folder(path.parent)


def _write(path: Path, data: bytes) -> None:
    """`write_file` without syncing the folder; with one descriptor, as every call slows a training beside it."""
    with atomic_write(path) as temporary, open(temporary, "xb", buffering=0) as file:
        left = memoryview(data)
        while left:  # a write may be partial
            left = left[file.write(left) :]
        sync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, whole or not at all, an object with its digest; NaN and infinities are refused."""
    value = with_digest(value) if isinstance(value, dict) else value
    write_file(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def with_digest(value: dict[str, Any]) -> dict[str, Any]:
    """Add a digest of the other entries, which `verified` checks."""
    content = {name: entry for name, entry in value.items() if name != DIGEST_KEY}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return {**content, DIGEST_KEY: hashlib.sha256(text.encode()).hexdigest()}


def parse_json(data: bytes) -> Any:
    """Parse JSON as hostile input.

    Raises:
        ValueError: it is not JSON, holds a number that is not finite, or would take much more memory than its bytes.
        RecursionError: it is nested too deeply.
    """
    # An upper bound of what the Python objects take, up to thirty times their bytes in JSON.
    parsed = 240 * data.count(b"{") + 64 * data.count(b",") + 56 * data.count(b"[")
    if parsed + len(data) * (1 if data.isascii() else 4) > MAX_PARSED_BYTES:
        raise ValueError(f"it would take more than {MAX_PARSED_BYTES} bytes of memory")
    return json.loads(data.decode(), parse_constant=_refuse_number, parse_float=_finite_number)


def verified(value: Any) -> Any:
    """Check and remove the digest of `with_digest`; objects without one, of older recordings, pass.

    Raises:
        ValueError: it does not match its digest.
    """
    if not isinstance(value, dict) or DIGEST_KEY not in value:
        return value
    if value[DIGEST_KEY] != with_digest(value)[DIGEST_KEY]:
        raise ValueError("it does not match its digest")
    return {name: entry for name, entry in value.items() if name != DIGEST_KEY}


def _refuse_number(text: str) -> Any:
    raise ValueError(f"{text} is no finite number")


def _finite_number(text: str) -> float:
    return number if math.isfinite(number := float(text)) else _refuse_number(text[:20])


def open_plain(path: Path) -> BinaryIO:
    """Open a regular file for reading; pipes and devices, which may block forever, are refused.

    Raises:
        OSError: it is missing, cannot be read, or is a pipe, a device or the like.
    """
    if not stat.S_ISREG(mode := path.stat().st_mode) and not stat.S_ISDIR(mode):
        raise OSError("not a plain file")
    return open(path, "rb")


def read_json(path: Path, error: type[GroktraceError] = RunError) -> Any:
    """Parse a JSON file that `write_json` wrote, and verify its digest.

    Raises:
        error: the file is missing, too large, not JSON, or does not match its digest.
    """
    value = read_unverified(path, error)
    try:
        return verified(value)
    except ValueError as failure:
        raise error(f"{path}: {failure}; the file is damaged or was changed by hand.") from failure


def read_unverified(path: Path, error: type[GroktraceError] = RunError) -> Any:
    """Parse a JSON file without verifying its digest, which may be of another format.

    Raises:
        error: the file is missing, too large, or not JSON.
    """
    try:
        with open_plain(path) as file:
            data = file.read(MAX_JSON_BYTES + 1)
        if len(data) > MAX_JSON_BYTES:
            raise error(f"{path}: larger than {MAX_JSON_BYTES} bytes; groktrace never writes such a file.")
        return parse_json(data)
    except OSError as failure:
        raise error(f"{path}: cannot be read ({failure.strerror or failure}).") from failure
    except (ValueError, RecursionError) as failure:
        raise error(f"{path}: not valid JSON ({failure}); the file is damaged or not groktrace's.") from failure


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype and shape, such as "float32[46, 128]:", and its row-major bytes; hexadecimal."""
    whole = tensor.detach().cpu().contiguous()
    state = hashlib.sha256(f"{str(whole.dtype).removeprefix('torch.')}{list(whole.shape)}:".encode())
    flat = whole.as_strided((whole.numel(),), (1,))  # a single element is contiguous with any stride
    state.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")
    return state.hexdigest()


def digests_of(tensors: dict[str, Tensor]) -> str:
    """What metadata say of the contents of a file."""
    return json.dumps({name: digest(tensor) for name, tensor in tensors.items()})


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> int:
    """Write named tensors as safetensors with a digest of each; the caller syncs the folder.

    Returns:
        The bytes written.

    Raises:
        OSError: the file system refused; `path` is then as it was.
    """
    # Raw bytes lose the lazy conjugate and negative bits.
    tensors = {name: tensor.resolve_conj().resolve_neg() for name, tensor in tensors.items()}
    if pairs := [name for name, tensor in tensors.items() if tensor.dtype == torch.complex128]:
        tensors |= {name: torch.view_as_real(tensors[name]) for name in pairs}
        metadata = metadata | {PAIRS_KEY: json.dumps(pairs)}
    metadata = with_digest(metadata | {DIGESTS_KEY: digests_of(tensors)})
    if sum(tensor.nbytes for tensor in tensors.values()) < SMALL_BYTES:
        data = save(tensors, metadata)  # faster, at the price of a copy or two
        _write(path, data)
        return len(data)
    with atomic_write(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)  # straight from the tensors, without a copy
        except SafetensorError as failure:  # how safetensors reports file system errors
            number = re.search(r"os error (\d+)", str(failure))
            refusal = OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(failure))
            if refusal.errno not in _UNSUPPORTED | {errno.EPERM}:
                raise refusal from failure
            temporary.write_bytes(save(tensors, metadata))  # it renames files too
        with open(temporary, "rb+") as file:
            sync(file.fileno())
        return temporary.stat().st_size


def read_metadata(path: Path, error: type[GroktraceError] = RunError) -> dict[str, str]:
    """Read the metadata of a safetensors file without its tensors.

    Raises:
        error: the file is missing or its header is damaged.
    """
    with _reading(path, error), open_plain(path) as file:
        return _described(path, _metadata(_header(path, file, error)), error)


def beside(path: Path) -> Path:
    """Where the metadata of a snapshot are that is a link to another tool's file, which has none of groktrace's."""
    return path.with_suffix(".json")


def _described(path: Path, metadata: dict[str, str], error: type[GroktraceError]) -> dict[str, str]:
    """The metadata of a file, or those beside it."""
    if DIGESTS_KEY in metadata or not beside(path).exists():
        return metadata
    return _metadata({"__metadata__": read_json(beside(path), error)})


@contextlib.contextmanager
def _reading(path: Path, error: type[GroktraceError]) -> Iterator[None]:
    """Convert failures while reading a safetensors file to `error`."""
    try:
        yield
    except OSError as failure:
        raise error(f"{path}: cannot be read ({failure.strerror or failure}).") from failure
    except (ValueError, RecursionError, MemoryError) as failure:
        raise error(f"{path}: its header is damaged ({failure}).") from failure


def _header(path: Path, file: BinaryIO, error: type[GroktraceError]) -> dict[str, Any]:
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(size - 8, MAX_JSON_BYTES):
        raise error(f"{path}: truncated or not a safetensors file ({size} bytes).")
    header = parse_json(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("expected an object")
    return header


def _metadata(header: dict[str, Any]) -> dict[str, str]:
    metadata = verified(header.get("__metadata__", {}))
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("expected texts as metadata")
    return metadata


def _tensors(header: dict[str, Any], data: bytearray) -> dict[str, Tensor]:
    """Make views of the data, in which the tensors lie one after another without gaps.

    safetensors.safe_open would map the file, so that one truncated while it is read ends the process (SIGBUS), and
    safetensors.deserialize would take twice the memory.

    Raises:
        ValueError: they do not.
    """
    tensors: dict[str, Tensor] = {}
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: _offsets(item[1])):
        if name == "__metadata__":
            continue
        (start, stop), dtype, shape = _offsets(entry), DTYPES.get(entry.get("dtype")), entry.get("shape")
        if dtype is None or not (isinstance(shape, list) and all(type(n) is int and 0 <= n < 2**63 for n in shape)):
            raise ValueError(f"'{name}' has no dtype or shape")
        count = math.prod(shape)
        if start != end or stop - start != count * dtype.itemsize:
            raise ValueError(f"'{name}' does not lie where it should")
        if not count:
            flat = torch.empty(0, dtype=dtype)
        elif start % dtype.itemsize == 0:
            flat = torch.frombuffer(data, dtype=dtype, count=count, offset=start)
        else:
            flat = torch.frombuffer(data[start:stop], dtype=dtype)
        tensors[name] = flat.reshape(shape)
        end = stop
    if end != len(data):
        raise ValueError(f"it ends at {end} bytes of {len(data)}")
    return tensors


def _offsets(entry: Any) -> tuple[int, int]:
    match entry:
        case {"data_offsets": [int(start), int(stop)]} if 0 <= start <= stop:
            return start, stop
        case {"data_offsets": _}:
            raise ValueError("offsets that are none")
    return (0, 0)


def read_tensors(path: Path, error: type[GroktraceError] = RunError) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file and verify the digest of every tensor in it.

    Returns:
        The tensors by name (on the CPU) and the file's metadata.

    Raises:
        error: the file is missing, truncated, damaged, or a digest does not match.
    """
    with _reading(path, error), open_plain(path) as file:
        header = _header(path, file, error)
        metadata = _described(path, _metadata(header), error)
        data = bytearray(max(0, os.fstat(file.fileno()).st_size - file.tell()))
        read = file.readinto(data)
    try:
        if read != len(data):
            raise ValueError("it was cut while it was read")
        tensors = _tensors(header, data)
        digests = parse_json(metadata.get(DIGESTS_KEY, "null").encode())
        pairs = parse_json(metadata.get(PAIRS_KEY, "[]").encode())
    except (ValueError, TypeError, RuntimeError, AttributeError) as failure:
        raise error(f"{path}: not a whole safetensors file ({failure}).") from failure
    if not isinstance(digests, dict):
        raise error(f"{path}: holds no digests; groktrace did not write it.")
    if digests.keys() != tensors.keys():
        raise error(f"{path}: its tensors and digests name different things; the file is damaged.")
    for name, tensor in tensors.items():
        if digest(tensor) != digests[name]:
            raise error(f"{path}: tensor '{name}' does not match its digest; the file is damaged.")
    for name in pairs if isinstance(pairs, list) else ():
        found = tensors.get(name) if isinstance(name, str) else None
        if found is None or found.dtype != torch.float64 or found.shape[-1:] != (2,):
            raise error(f"{path}: its complex numbers are no pairs; the file is damaged.")
        tensors[name] = torch.view_as_complex(found)
    return tensors, metadata
