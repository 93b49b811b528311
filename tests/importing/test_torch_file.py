import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch

import groktrace
from groktrace.importing import contents, torch_file
from groktrace.importing.contents import CheckpointError


def test_state_dicts_with_their_optimizer(saved, tmp_path, same_analysis):
    def save(step, model, optimizer):
        torch.save(
            {"net": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": step // 3},
            tmp_path / "saved" / f"epoch{step // 3}.pt",
        )

    (tmp_path / "saved").mkdir()
    saved.train(save)
    groktrace.import_checkpoints(tmp_path / "saved", task=saved.task(), out=tmp_path / "run")
    same_analysis(tmp_path / "hooked", tmp_path / "run")


@pytest.mark.parametrize("zipped", [True, False])
def test_what_a_file_holds(tmp_path, zipped):
    path = tmp_path / "file.pt"
    shared = torch.arange(6.0)
    content = {
        "a": {"b": [shared, shared[2:5]]},
        "losses": [0.1] * 10**6,
        "betas": (1, 2),
        "step": 3,
        "name": "run",
        "flag": True,
        "none": None,
    }
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    opened = torch_file.open_file(path)
    assert opened.values == {"step": 3, "name": "run", "flag": True}
    assert {name: stored.read().tolist() for name, stored in opened.tensors.items()} == {
        "a.b.0": [0, 1, 2, 3, 4, 5],
        "a.b.1": [2, 3, 4],
    }
    assert {stored.container for stored in opened.tensors.values()} == {"a.b"}


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_refused_and_not_run(tmp_path, zipped):
    torch.save(
        {"a": torch.ones(2), "b": Payload(tmp_path / "made")},
        path := tmp_path / "file.pt",
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(
        CheckpointError, match=r"file.pt: needs code to be run \((posix|nt).mkdir\); nothing else is ever opened"
    ):
        torch_file.open_file(path)
    path.write_bytes(pickle.dumps(Payload(tmp_path / "made")))
    with pytest.raises(CheckpointError, match=r"nothing else is ever opened"):
        torch_file.open_file(path)
    assert not (tmp_path / "made").exists()


def test_a_whole_module_is_refused_with_the_remedy(tmp_path):
    torch.save(torch.nn.Linear(2, 2), path := tmp_path / "file.pt")
    with pytest.raises(
        CheckpointError, match=r"\(torch.nn.modules.linear.Linear\).*save the weights alone: torch.save\("
    ):
        torch_file.open_file(path)


def test_archives_that_unpack_to_more_than_they_are(tmp_path):
    with zipfile.ZipFile(path := tmp_path / "file.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("file/data.pkl", b"\0" * 10**7)
    with pytest.raises(CheckpointError, match="would unpack to 10000000 bytes, and has"):
        torch_file.open_file(path)
    torch.save({"a": torch.ones(100)}, path)
    content = bytearray(path.read_bytes())
    place = content.rfind(b"PK\x01\x02")  # the last entry of the directory: its two sizes say 3 GiB
    content[place + 20 : place + 28] = struct.pack("<II", 3 * 2**30, 3 * 2**30)
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"would unpack to 322\d+ bytes"):
        torch_file.open_file(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_memory_that_no_byte_stands_for(tmp_path, zipped, monkeypatch):
    monkeypatch.setattr(contents, "MAX_ENTRIES", 10**4)
    path = tmp_path / "file.pt"
    torch.save({"a": bytearray(3)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="holds a bytearray, whose size its file does not bound"):
        torch_file.open_file(path)
    nested = [torch.ones(1)]
    for _ in range(14):
        nested = [nested] * 10
    torch.save(nested, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="or of more than 10000 entries"):
        torch_file.open_file(path)
    for _ in range(5):
        nested = [nested]
    torch.save(nested, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="nested deeper than 16"):
        torch_file.open_file(path)


def test_damaged_files_are_refused(tmp_path):
    torch.save({"a": torch.ones(100), "step": 1}, path := tmp_path / "file.pt")
    whole = path.read_bytes()
    for length in (0, 3, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(
            CheckpointError, match=r"file.pt: not (a whole file of torch.save|whole, or not of tensors)"
        ):
            torch_file.open_file(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        torch_file.open_file(tmp_path / "missing.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        torch_file.open_file(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_numpy_numbers_are_plain_ones(tmp_path, zipped):
    numbers = {"loss": np.float64(0.1), "lr": np.float32(0.5), "step": np.int64(7), "best": np.bool_(True)}
    numbers |= {"half": np.float16(1.5), "small": np.uint8(200), "big-endian": np.array(3.5, ">f8")[()]}
    torch.save({"a": torch.ones(2), **numbers}, path := tmp_path / "file.pt", _use_new_zipfile_serialization=zipped)
    opened = torch_file.open_file(path)
    assert opened.values == numbers
    assert {type(value) for value in opened.values.values()} == {bool, int, float}
    assert list(opened.tensors) == ["a"]
    assert torch_file.numpy_numbers.NAMES[0] not in torch.serialization.get_safe_globals()


scalar = np.float64(0).__reduce__()[0]  # in whatever module it lies


class Called:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "hostile",
    [
        Called(scalar, np.dtype("f8"), b"123"),
        Called(scalar, np.dtype("f8")),
        Called(scalar, Called(np.dtype, "V1000000000000"), b""),
        Called(scalar, Called(np.dtype, "O"), b"12345678"),
        Called(scalar, Called(np.dtype, ("f8", 10**9)), b"12345678"),
        Called(scalar, "f8", b"12345678"),
        Called(np.dtype, Payload("made")),
        np.datetime64("2026-01-01"),
        np.str_("text"),
        np.ones(3),
    ],
    ids=range(10),
)
def test_what_numpy_would_make_of_a_pickle_is_refused(tmp_path, hostile, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(2), "b": hostile}, path := tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match=r"file.pt: (needs code to be run|not a whole file|not whole)"):
        torch_file.open_file(path)
    assert not (tmp_path / "made").exists()


def test_numpy_numbers_import(saved, tmp_path, same_analysis):
    def save(step, model, optimizer):
        torch.save(
            {
                "net": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "loss": np.float64(1 / (1 + step)),
                "step": np.int64(step),
            },
            tmp_path / "saved" / f"{step}.pt",
        )

    (tmp_path / "saved").mkdir()
    saved.train(save)
    groktrace.import_checkpoints(tmp_path / "saved", task=saved.task(), out=tmp_path / "run")
    same_analysis(tmp_path / "hooked", tmp_path / "run")
