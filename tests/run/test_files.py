import contextlib
import copy
import errno
import hashlib
import json
import os
import random
import tracemalloc

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from groktrace.errors import RunError, SnapshotError
from groktrace.run import files

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
]


def small_file(path):
    tensors = {"a": torch.tensor([1.5, -2.0]), "b.c": torch.tensor([[3], [4]], dtype=torch.int16)}
    files.write_tensors(path, tensors, {"step": "12", "metrics": '{"loss": 0.5}'})
    return tensors, path.read_bytes()


def identical(left, right):
    return left.keys() == right.keys() and all(
        left[key].dtype == right[key].dtype and torch.equal(left[key], right[key]) for key in left
    )


def packed(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "file"
    files.write_file(path, b"old")
    files.write_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("function", ["replace", "fsync"])
@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt("stopped")])
def test_a_failing_write_leaves_the_old_file_alone(tmp_path, monkeypatch, function, failure):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*arguments):
        raise failure

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(type(failure), match=str(failure)):
        files.write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_nothing_is_seen_before_the_bytes_are_on_disk(tmp_path, monkeypatch):
    path, order = tmp_path / "file", []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor):
        order.append(f"fsync {path.exists()}")
        fsync(descriptor)

    def note_replace(source, target):
        assert os.path.dirname(source) == str(tmp_path)
        assert os.path.basename(source).startswith(files.TEMPORARY_PREFIX)
        order.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    files.write_file(path, b"data")
    assert order == ["fsync False", "replace", "fsync True"]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EINVAL])
def test_a_file_system_without_fsync_is_written_to(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, "no")

    monkeypatch.setattr(os, "fsync", refuse)
    files.write_file(tmp_path / "file", b"data")
    assert (tmp_path / "file").read_bytes() == b"data"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM])
@pytest.mark.parametrize("limit", [files.SMALL_BYTES, 0])
def test_a_file_system_without_rename_is_written_to(tmp_path, monkeypatch, number, limit):
    def refuse(*_):
        raise OSError(number, "no")

    def refuse_in_rust(*_):  # it renames a file of its own
        raise SafetensorError(f"Error while serializing: I/O error: no (os error {number})")

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(files, "save_file", refuse_in_rust)
    monkeypatch.setattr(files, "SMALL_BYTES", limit)
    for value in (1.0, 2.0):
        files.write_tensors(tmp_path / "file", {"w": torch.full((3,), value)}, {})
        assert files.read_tensors(tmp_path / "file")[0]["w"].tolist() == [value] * 3
    assert os.listdir(tmp_path) == ["file"]
    monkeypatch.setattr(files.shutil, "copyfile", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        files.write_tensors(tmp_path / "other", {}, {})
    assert os.listdir(tmp_path) == ["file"]


def test_what_a_large_file_met_is_told_by_its_number(tmp_path, monkeypatch):
    def refuse(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", refuse)
    monkeypatch.setattr(files, "SMALL_BYTES", 0)
    with pytest.raises(OSError, match="No space left") as caught:
        files.write_tensors(tmp_path / "file", {"w": torch.ones(3)}, {})
    assert caught.value.errno == errno.ENOSPC


def test_a_folder_that_cannot_be_synced_does_not_undo_the_write(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "open", lambda *arguments: (_ for _ in ()).throw(PermissionError("no")))
    files.write_file(tmp_path / "file", b"data")
    assert (tmp_path / "file").read_bytes() == b"data"


def test_a_missing_folder_is_the_file_systems_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="No such file"):
        files.write_file(tmp_path / "missing" / "file", b"data")


@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_json_round_trip(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "value.json"
    files.write_json(path, value)
    assert files.read_json(path) == value


def test_json_is_plain_text_without_nan(tmp_path):
    files.write_json(tmp_path / "a.json", {"a": 1})
    digest = hashlib.sha256(b'{"a":1}').hexdigest()
    assert (tmp_path / "a.json").read_text() == f'{{\n "a": 1,\n "digest": "{digest}"\n}}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "a.json", {"a": float("nan")})
    assert files.read_json(tmp_path / "a.json") == {"a": 1}


@pytest.mark.parametrize("error", [RunError, SnapshotError])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"{'a': 1}", b"[" * 100_000, b"1" * 5000, b'{"a": 1}\x00', b"nul"]
)
def test_files_that_are_not_json_are_named(tmp_path, content, error):
    path = tmp_path / "run.json"
    path.write_bytes(content)
    with pytest.raises(error, match=r"run\.json: not valid JSON \(.*the file is damaged or not groktrace's"):
        files.read_json(path, error)


def test_json_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(RunError, match=r"run\.json: cannot be read \(No such file or directory\)"):
        files.read_json(tmp_path / "run.json")
    with pytest.raises(SnapshotError, match=r"cannot be read \(Is a directory\)"):
        files.read_json(tmp_path, SnapshotError)


def test_the_size_of_json_files_is_limited(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    with open(path, "wb") as file:
        file.truncate(files.MAX_JSON_BYTES + 1)
    with pytest.raises(RunError, match=r"run\.json: larger than 67108864 bytes; groktrace never writes such a file"):
        files.read_json(path)
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 4)
    path.write_bytes(b"1234")
    assert files.read_json(path) == 1234
    path.write_bytes(b"12345")
    with pytest.raises(RunError, match="larger than 4 bytes"):
        files.read_json(path)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_of_every_dtype_round_trip(tmp_path, dtype):
    values = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 1.0]]).to(dtype)
    tensors = {"matrix": values, "scalar": values[0, 0].clone(), "empty": values[:0].clone()}
    size = files.write_tensors(tmp_path / "t", tensors, {"step": "0"})
    assert size == (tmp_path / "t").stat().st_size
    back, metadata = files.read_tensors(tmp_path / "t")
    assert metadata["step"] == "0"
    assert files.read_metadata(tmp_path / "t") == metadata
    for name, tensor in tensors.items():
        assert (back[name].dtype, back[name].shape) == (dtype, tensor.shape)
        assert files.digest(back[name]) == files.digest(tensor)
        assert torch.equal(back[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def prefix(tensor):
    return f"{str(tensor.dtype)[6:]}{list(tensor.shape)}:".encode()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_digest_is_that_of_the_bytes_in_row_major_order(dtype):
    matrix = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 1.0]]).to(dtype)
    raw = bytes(matrix.reshape(-1).view(torch.uint8).tolist())
    assert files.digest(matrix) == hashlib.sha256(prefix(matrix) + raw).hexdigest()
    assert files.digest(matrix.T) == files.digest(matrix.T.contiguous()) != files.digest(matrix)
    assert files.digest(matrix[0, 0]) == hashlib.sha256(prefix(matrix[0, 0]) + raw[: matrix.element_size()]).hexdigest()
    assert files.digest(matrix[:0]) == hashlib.sha256(prefix(matrix[:0])).hexdigest()


def test_a_digest_takes_weights_that_need_gradients():
    weight = torch.nn.Parameter(torch.ones(2))
    assert files.digest(weight) == files.digest(torch.ones(2))


def test_one_element_of_a_larger_tensor_round_trips(tmp_path):
    one = torch.arange(6.0).view(3, 2)[1:2, 1]
    assert one.stride() == (2,)
    assert files.digest(one) == files.digest(torch.tensor([3.0]))
    files.write_tensors(tmp_path / "t", {"one": one}, {})
    assert files.read_tensors(tmp_path / "t")[0]["one"].tolist() == [3.0]


@pytest.mark.parametrize("view", [lambda z: z.conj(), lambda z: z.conj().imag, lambda z: z.conj()[:1].real])
def test_conjugated_tensors_are_written_as_they_read(tmp_path, view):
    tensor = view(torch.tensor([1 + 2j, 3 - 4j]))
    files.write_tensors(tmp_path / "t", {"z": tensor}, {})
    assert torch.equal(files.read_tensors(tmp_path / "t")[0]["z"], tensor)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    path = tmp_path / "t.safetensors"
    _, whole = small_file(path)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(
            SnapshotError, match=r"t\.safetensors: (truncated or not a|not a whole) safetensors file \("
        ):
            files.read_tensors(path, SnapshotError)


def test_a_file_with_something_after_its_end_is_refused(tmp_path):
    path = tmp_path / "t.safetensors"
    _, whole = small_file(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(RunError, match="not a whole safetensors file"):
        files.read_tensors(path)


def test_a_changed_byte_is_refused_or_harmless(tmp_path):
    path = tmp_path / "t.safetensors"
    tensors, whole = small_file(path)
    known = {name: text for name, text in files.read_metadata(path).items() if name != files.DIGEST_KEY}
    header_end = 8 + int.from_bytes(whole[:8], "little")
    harmless = set()
    for position in range(len(whole)):
        for mask in (1, 2, 4, 32, 255):
            damaged = bytearray(whole)
            damaged[position] ^= mask
            path.write_bytes(damaged)
            try:
                read, about = files.read_tensors(path, SnapshotError)
            except SnapshotError:
                continue
            assert identical(read, tensors)
            assert {name: about[name] for name in ("step", "metrics", "digests")} == known
            harmless.add(position)
    # Only the name of the metadata's own digest, without which it goes unverified, and spaces may change unseen.
    name = whole.index(b'"digest":')
    padding = {i for i in range(header_end) if whole[i:header_end].strip() == b""}
    assert harmless <= set(range(name, name + 9)) | padding


def test_a_tensor_of_the_header_cannot_be_moved_onto_another(tmp_path):
    path = tmp_path / "t"
    files.write_tensors(path, {"a": torch.tensor([1.0]), "b": torch.tensor([2.0])}, {})
    whole = path.read_bytes()
    swapped = whole.replace(b"[0,4]", b"[X]").replace(b"[4,8]", b"[0,4]").replace(b"[X]", b"[4,8]")
    assert len(swapped) == len(whole)
    path.write_bytes(swapped)
    with pytest.raises(RunError, match=r"tensor '[ab]' does not match its digest; the file is damaged"):
        files.read_tensors(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"truncated or not a safetensors file \(0 bytes\)"),
        (b"\xff" * 16, "truncated or not a safetensors file"),
        (packed(b"[]"), "its header is damaged"),
        (packed(b"\xff\xff"), "its header is damaged"),
        (packed(b"[" * 100_000), "its header is damaged"),
        (packed({"__metadata__": []}), "its header is damaged"),
        (packed({"__metadata__": {"digests": 3}}), "its header is damaged"),
        (packed({}), "holds no digests; groktrace did not write it"),
        (packed({"__metadata__": {}}), "holds no digests; groktrace did not write it"),
        (packed({"__metadata__": {"digests": "[]"}}), "holds no digests; groktrace did not write it"),
        (packed({"__metadata__": {"digests": "{"}}), "not a whole safetensors file"),
        (packed({"__metadata__": {"digests": "[" * 100_000}}), "not a whole safetensors file"),
        (packed({"__metadata__": {"digests": '{"a": ""}'}}), "its tensors and digests name different things"),
        (
            packed(
                {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "__metadata__": {"digests": "{}"}}, b"\1"
            ),
            "its tensors and digests name different things",
        ),
        (
            packed(
                {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "__metadata__": {"digests": '{"a": 1}'}},
                b"\1",
            ),
            "tensor 'a' does not match its digest",
        ),
        (packed({"a": {"dtype": "U8", "shape": [2**62], "data_offsets": [0, 2**62]}}), "not a whole safetensors file"),
        (packed({"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}, b"\1\1"), "not a whole safetensors file"),
        (packed({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 0]}}), "not a whole safetensors file"),
    ],
)
def test_crafted_files_are_refused(tmp_path, content, message):
    path = tmp_path / "t.safetensors"
    path.write_bytes(content)
    with pytest.raises(SnapshotError, match=rf"t\.safetensors: {message}"):
        files.read_tensors(path, SnapshotError)


@given(noise=st.binary(max_size=64), framed=st.booleans())
def test_random_bytes_are_refused(tmp_path_factory, noise, framed):
    path = tmp_path_factory.getbasetemp() / "noise"
    path.write_bytes(packed(noise) if framed else noise)
    with pytest.raises(RunError, match=r"safetensors file|header is damaged|holds no digests"):
        files.read_tensors(path)


@pytest.mark.parametrize("read", [files.read_metadata, files.read_tensors])
def test_tensor_files_that_cannot_be_read_are_named(tmp_path, read):
    with pytest.raises(RunError, match=r"missing: cannot be read \(No such file or directory\)"):
        read(tmp_path / "missing")
    with pytest.raises(SnapshotError, match=r"cannot be read \(Is a directory\)"):
        read(tmp_path, SnapshotError)


def test_a_header_that_calls_the_bytes_another_type_is_noticed(tmp_path):
    path = tmp_path / "t.safetensors"
    files.write_tensors(path, {"a": torch.arange(4)}, {})
    data = path.read_bytes()
    for other in (b"F64", b"U64"):
        path.write_bytes(data.replace(b"I64", other))
        with pytest.raises(RunError, match="tensor 'a' does not match its digest"):
            files.read_tensors(path)


@pytest.mark.parametrize("limit", [0, 2**18], ids=["large", "small"])
def test_large_and_small_files_are_alike(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(files, "SMALL_BYTES", limit)
    tensors, content = small_file(tmp_path / "w")
    assert identical(files.read_tensors(tmp_path / "w")[0], tensors)
    assert len(content) == (tmp_path / "w").stat().st_size
    assert os.listdir(tmp_path) == ["w"]
    with pytest.raises(OSError, match="No such file"):
        files.write_tensors(tmp_path / "missing" / "w", tensors, {})


@pytest.mark.parametrize("content", [b"[NaN]", b"[-Infinity]", b"[1e999]"])
def test_numbers_that_are_not_finite_are_refused(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(RunError, match="is no finite number"):
        files.read_json(tmp_path / "a.json")


@pytest.mark.parametrize("unit", [b"[]", b"{}", b'{"":0}', b'"ab"', b"1.5", "\N{GRINNING FACE}".join('""').encode()])
def test_parsing_takes_no_more_than_is_said(monkeypatch, unit):
    monkeypatch.setattr(files, "MAX_PARSED_BYTES", 10**6)
    count = 1
    while True:
        data = b"[" + b",".join([unit] * count) + b"]"
        tracemalloc.start()
        try:
            with contextlib.suppress(ValueError):
                files.parse_json(data)
                count *= 2
                continue
            break
        finally:
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert peak <= files.MAX_PARSED_BYTES + len(data)
    with pytest.raises(ValueError, match="would take more than 1000000 bytes"):
        files.parse_json(data)


def test_a_change_by_hand_is_noticed(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"n": 10, "more": {"x": 1.5}})
    whole = path.read_text()
    path.write_text(whole.replace("10", "11"))
    with pytest.raises(RunError, match="does not match its digest; the file is damaged or was changed by hand"):
        files.read_json(path)
    path.write_text('{"n": 11}')  # as recordings had it before there were digests
    assert files.read_json(path) == {"n": 11}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize("read", [files.read_json, files.read_metadata, files.read_tensors])
def test_pipes_and_devices_are_not_opened(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        with pytest.raises(RunError, match=rf"{name}: cannot be read \(not a plain file\)"):
            read(tmp_path / name)


def test_messages_move_no_cursor_and_end():
    message = str(RunError("\x1b[2J\ud800 λ " + "x" * 10**6))
    assert message.startswith("\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER} λ xxx")
    assert len(message) < 5000


def test_tensors_that_are_read_are_those_that_safetensors_reads(tmp_path):
    path = tmp_path / "t"
    files.write_tensors(
        path, {"a": torch.arange(3, dtype=torch.int8), "b": torch.ones(2, 2), "c": torch.ones(0, 3)}, {}
    )
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    draw, agreed = random.Random(0), 0
    for _ in range(2000):
        changed = copy.deepcopy(header)
        entry = changed[draw.choice("abc")]
        entry[draw.choice(["dtype", "shape", "data_offsets"])] = draw.choice(
            [
                *files.DTYPES,
                "F4",
                3,
                [],
                [2],
                [3],
                [4],
                [2, 2],
                [0, 3],
                [0, 0],
                [0, 16],
                [16, 19],
                [3, 19],
                [2**62, 4],
                [-1, 3],
            ]
        )
        content = packed(changed, whole[8 + length :])
        path.write_bytes(content)
        try:
            tensors = files._tensors(changed, bytearray(content[8 + int.from_bytes(content[:8], "little") :]))
        except (ValueError, TypeError, RuntimeError, AttributeError):
            continue
        theirs = safetensors.torch.load(content)
        assert tensors.keys() == theirs.keys()
        assert all(files.digest(tensors[name]) == files.digest(theirs[name]) for name in theirs)
        agreed += 1
    assert agreed > 20


def test_tensors_that_lie_at_odd_places_are_read(tmp_path):
    tensors = {"a": torch.tensor([7], dtype=torch.int8), "b": torch.tensor([1.5, 2.5])}
    digests = json.dumps({name: files.digest(tensor) for name, tensor in tensors.items()})
    header = {
        "a": {"dtype": "I8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
        "__metadata__": {"digests": digests},
    }
    (tmp_path / "t").write_bytes(packed(header, b"\7" + tensors["b"].numpy().tobytes()))
    assert identical(files.read_tensors(tmp_path / "t")[0], tensors)


def test_reading_takes_the_size_of_the_file(tmp_path):
    path = tmp_path / "t"
    files.write_tensors(path, {"a": torch.zeros(10**6), "b": torch.zeros(10**6)}, {})
    tracemalloc.start()
    files.read_tensors(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 8 * 10**6 <= peak < 8.5 * 10**6


def test_complex_numbers_of_double_precision_are_pairs_in_the_file(tmp_path):
    values = torch.randn(3, 2, dtype=torch.complex128)
    tensors = {"waves": values.conj(), "one": values[0, 0], "real": torch.ones(2, 2, dtype=torch.float64)}
    files.write_tensors(tmp_path / "t", tensors, {"step": "1"})
    found, metadata = files.read_tensors(tmp_path / "t")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert all(found[name].dtype == tensors[name].dtype for name in tensors)
    assert json.loads(metadata["pairs"]) == ["waves", "one"]
    for pairs in (["real", "none"], [3], ["step"]):
        files.write_tensors(tmp_path / "t", {"real": torch.ones(2, 3)}, {"pairs": json.dumps(pairs)})
        with pytest.raises(RunError, match="complex numbers are no pairs"):
            files.read_tensors(tmp_path / "t")
