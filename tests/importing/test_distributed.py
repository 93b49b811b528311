import os
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import get_state_dict

import groktrace
from groktrace.importing import distributed
from groktrace.importing.contents import CheckpointError

# DCP's own, of a process that is alone.
pytestmark = pytest.mark.filterwarnings("ignore:(?!groktrace)")


def states(model, optimizer):
    weights, state = get_state_dict(model, optimizer)
    return {"model": weights, "optim": state}


def test_folders_of_dcp(saved, tmp_path, same_analysis):
    def save(step, model, optimizer):
        dcp.save(
            {"app": {"model": model.state_dict(), "optim": optimizer.state_dict()}, "step": step},
            checkpoint_id=tmp_path / "saved" / f"{step}-of-30",
        )

    saved.train(save)
    run = groktrace.import_checkpoints(tmp_path / "saved", task=saved.task(), out=tmp_path / "run")
    same_analysis(tmp_path / "hooked", run.root)


def test_states_by_name(saved, tmp_path):
    def save(step, model, optimizer):
        if step:
            dcp.save(states(model, optimizer), checkpoint_id=tmp_path / "saved" / "abcd"[step // 10])

    model = saved.train(save)
    run = groktrace.import_checkpoints(tmp_path / "saved", task=saved.task(), out=tmp_path / "run")
    assert [snapshot.step for snapshot in run.snapshots] == [10, 20, 30]
    assert run.weight_decay
    assert torch.equal(run.snapshots[-1].load()["3.weight"], model[3].weight)


def test_a_tensor_in_pieces(tmp_path, monkeypatch):
    """Two processes' halves, as their files lie side by side."""
    whole = torch.randn(6, 3)
    dcp.save({"w": whole}, checkpoint_id=tmp_path)
    found = pickle.loads((tmp_path / ".metadata").read_bytes())
    place = next(iter(found.storage_data.values()))
    content = b""
    found.storage_data, chunks = {}, []
    for start, stop in ((0, 4), (4, 6)):
        torch.save(whole[start:stop].clone(), tmp_path / "piece")
        piece = (tmp_path / "piece").read_bytes()
        offset = torch.Size([start, 0])
        found.storage_data[dcp.metadata.MetadataIndex("w", offset)] = type(place)(
            place.relative_path, len(content), len(piece)
        )
        chunks.append(dcp.metadata.ChunkStorageMetadata(offset, torch.Size([stop - start, 3])))
        content += piece
    found.state_dict_metadata["w"].chunks = chunks
    (tmp_path / place.relative_path).write_bytes(content)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(found))
    assert torch.equal(distributed.open_folder(tmp_path).tensors["w"].read(), whole)
    found.state_dict_metadata["w"].chunks = chunks[:1]
    (tmp_path / ".metadata").write_bytes(pickle.dumps(found))
    with pytest.raises(CheckpointError, match="the pieces of 'w' do not cover it"):
        distributed.open_folder(tmp_path).tensors["w"].read()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_that_a_description_may_have(tmp_path, protocol):
    tensors = {f"a.{i}": torch.full((i % 3 + 1,), float(i)) for i in range(300)}  # more than one byte of references
    dcp.save({**tensors, "é" * 300: torch.ones(1)}, checkpoint_id=tmp_path)
    found = pickle.loads((tmp_path / ".metadata").read_bytes())
    (tmp_path / ".metadata").write_bytes(pickle.dumps(found, protocol))
    opened = distributed.open_folder(tmp_path)
    assert len(opened.tensors) == 301
    assert all(torch.equal(opened.tensors[name].read(), tensor) for name, tensor in tensors.items())


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [2, 4])
def test_code_is_refused_and_not_run(tmp_path, protocol):
    dcp.save({"a": torch.ones(2), "n": 3}, checkpoint_id=tmp_path)
    for content in (
        Metadata({}, Payload(tmp_path / "made")),
        Payload(tmp_path / "made"),
        Metadata({"a": Payload(tmp_path / "made")}),
    ):
        (tmp_path / ".metadata").write_bytes(pickle.dumps(content, protocol))
        with pytest.raises(
            CheckpointError,
            match=r"\.metadata: needs code to be run .(posix|nt).mkdir.; .* in a process of your own",
        ):
            distributed.open_folder(tmp_path)
    assert not (tmp_path / "made").exists()


def test_code_in_a_piece_is_refused_and_not_run(tmp_path):
    dcp.save({"n": Payload(tmp_path / "made"), "a": torch.ones(2)}, checkpoint_id=tmp_path)
    opened = distributed.open_folder(tmp_path)
    with pytest.raises(CheckpointError, match=r"needs code to be run \((posix|nt).mkdir\)"):
        opened.values["n"]
    assert torch.equal(opened.tensors["a"].read(), torch.ones(2))
    assert not (tmp_path / "made").exists()


def changed(folder, change):
    found = pickle.loads((folder / ".metadata").read_bytes())
    change(found)
    (folder / ".metadata").write_bytes(pickle.dumps(found))


def set_places(**entries):
    def change(found):
        for place in found.storage_data.values():
            vars(place).update(entries)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_places(relative_path="../file"), r"\.metadata: damaged .ValueError: \.\./file has no bytes"),
        (set_places(transform_descriptors=["zstd"]), "'a' cannot be read .it is compressed"),
        (set_places(offset=10**15), r"\.metadata: damaged .ValueError: __0_0.distcp has no bytes 10000000"),
        (set_places(offset=-5), "has no bytes -5"),
        (set_places(relative_path="missing"), "missing has no bytes 0 to"),
        (set_places(length=3), "not whole, or not of tensors"),
        (set_places(length="3"), "damaged .TypeError"),
        (lambda found: found.storage_data.clear(), r"\.metadata: damaged .KeyError"),
        (lambda found: vars(found).update(storage_data=None), r"\.metadata: damaged .AttributeError"),
        (
            lambda found: vars(found.state_dict_metadata["a"]).update(size=[3, 2]),
            "the pieces of 'a' do not cover it|is not what",
        ),
        (lambda found: vars(found.state_dict_metadata["a"].chunks[0]).update(sizes=[3]), "a piece of 'a' is not what"),
    ],
)
def test_damaged_descriptions_are_refused(tmp_path, change, message):
    dcp.save({"a": torch.ones(2)}, checkpoint_id=tmp_path)
    changed(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        distributed.open_folder(tmp_path).tensors["a"].read()


def test_bytes_that_are_no_description(tmp_path):
    dcp.save({"a": torch.ones(2)}, checkpoint_id=tmp_path)
    whole = (tmp_path / ".metadata").read_bytes()
    for content in (
        b"",
        b"\x80\x04",
        whole[:-40],
        whole[3:],
        pickle.dumps([1]),
        os.urandom(200),
        pickle.dumps({"a": b"\x00"}, 4),
    ):
        (tmp_path / ".metadata").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"\.metadata: (damaged|not whole|expected the description)"):
            distributed.open_folder(tmp_path)
