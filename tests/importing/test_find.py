import os

import pytest

from groktrace.errors import SettingsError
from groktrace.importing.contents import CheckpointError
from groktrace.importing.find import find_checkpoints, open_checkpoint


def make(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def found(root, *given):
    return sorted(str(path.relative_to(root)) for path in find_checkpoints([root / each for each in given]))


def test_files_of_a_folder(tmp_path):
    make(
        tmp_path,
        "a.pt",
        "b.ckpt",
        "c.safetensors",
        "d.pth.tar",
        "notes.txt",
        "optimizer.pt",
        "rng_state_0.pth",
        ".e.pt",
        "x/f.bin",
    )
    assert found(tmp_path, "") == ["a.pt", "b.ckpt", "c.safetensors", "d.pth.tar", "x/f.bin"]
    assert found(tmp_path, "notes.txt", "a.pt") == ["a.pt", "notes.txt"]  # what is named is taken
    assert found(tmp_path, "*.p*", "a.pt") == ["a.pt", "d.pth.tar", "optimizer.pt", "rng_state_0.pth"]
    assert found(tmp_path, "**/*.bin") == ["x/f.bin"]


def test_folders_that_are_checkpoints(tmp_path):
    make(
        tmp_path,
        "out/checkpoint-2/model.safetensors",
        "out/checkpoint-2/optimizer.pt",
        "out/checkpoint-4/pytorch_model.bin.index.json",
    )
    make(
        tmp_path,
        "out/checkpoint-4/pytorch_model-00001-of-00001.bin",
        "out/model.safetensors",
        "dcp/s7/.metadata",
        "dcp/s7/__0_0.distcp",
    )
    assert found(tmp_path, "out") == ["out/checkpoint-2", "out/checkpoint-4"]  # without the final model
    assert found(tmp_path, "out/checkpoint-*", "dcp") == ["dcp/s7", "out/checkpoint-2", "out/checkpoint-4"]
    assert found(tmp_path, "dcp/s7") == ["dcp/s7"]
    assert len(found(tmp_path, "")) == 3


def test_one_file_by_two_names_counts_once(tmp_path):
    make(tmp_path, "step=3.ckpt", "deep/er/step=4.ckpt")
    os.symlink(tmp_path / "step=3.ckpt", tmp_path / "last.ckpt")
    os.symlink(tmp_path, tmp_path / "deep" / "round")
    assert len(find_checkpoints([tmp_path, tmp_path / "step=3.ckpt"])) == 2


def test_nothing_there(tmp_path):
    make(tmp_path, "notes.txt")
    for given, message in (
        ([tmp_path / "missing"], "missing: no such file or folder; expected checkpoints, or a pattern"),
        ([tmp_path / "*.pt"], r"\*.pt: no such file or folder"),
        ([tmp_path], "holds no checkpoint; expected files that end in .pt, .pth,"),
        ([], "checkpoints: expected at least one file or folder"),
    ):
        with pytest.raises(SettingsError, match=message):
            find_checkpoints(given)
    with pytest.raises(CheckpointError, match=r"expected one of model.safetensors"):
        open_checkpoint(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.pt")
        with pytest.raises(CheckpointError, match="not a plain file"):
            open_checkpoint(tmp_path / "pipe.pt")
