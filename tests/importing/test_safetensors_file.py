import json
import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import groktrace
from groktrace.importing import huggingface, plan, safetensors_file
from groktrace.importing.contents import CheckpointError
from groktrace.run import layout


@pytest.fixture
def plain(saved):
    """The same training without what is kept apart."""
    make = saved.network
    saved.network = lambda: make().requires_grad_(True)
    return saved


def test_a_file_serves_as_the_snapshot(plain, tmp_path, same_analysis):
    (tmp_path / "saved").mkdir()
    plain.train(lambda step, model, _: save_file(model.state_dict(), tmp_path / "saved" / f"{step}.safetensors"))
    torch.save({"param_groups": [{"weight_decay": 0.01}]}, tmp_path / "saved" / "optimizer.pt")
    planned = plan.plan_import(tmp_path / "saved", plain.task())
    assert planned.left_out == planned.remarks == ()
    imported = planned.write(tmp_path / "run")
    assert (imported.linked, imported.copied) == (4, ())
    for step in (0, 10, 20, 30):
        assert os.path.samefile(
            layout.snapshot_path(tmp_path / "run", step), tmp_path / "saved" / f"{step}.safetensors"
        )
    hooked = groktrace.open_run(tmp_path / "hooked")
    info = json.loads((tmp_path / "hooked" / "run.json").read_text())
    (tmp_path / "hooked" / "run.json").write_text(
        json.dumps({k: v for k, v in info.items() if k != "digest"} | {"optimizer": None})
    )
    same_analysis(hooked.root, tmp_path / "run")
    assert imported.run.snapshots[2].load().keys() == hooked.snapshots[2].load().keys()


def test_a_link_whose_file_is_written_over_is_damaged(plain, tmp_path):
    saved = tmp_path / "model_5.safetensors"
    save_file(plain.network().state_dict(), saved)
    run = groktrace.import_checkpoints(saved, task=plain.task(), out=tmp_path / "run")
    run.snapshots[0].load()
    with open(saved, "rb+") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\1\2\3\4")
    with pytest.raises(groktrace.GroktraceError, match="does not match its digest"):
        run.snapshots[0].load()
    beside = run.snapshots[0].path.with_suffix(".json")
    beside.write_text(beside.read_text().replace('"step": "5"', '"step": "6"'))
    with pytest.raises(groktrace.GroktraceError, match="does not match its digest"):
        run.snapshots[0].metrics()
    beside.write_text('{"step": 5}')
    with pytest.raises(groktrace.GroktraceError, match="expected texts as metadata"):
        run.snapshots[0].metrics()


@pytest.mark.parametrize(
    ("why", "reason"),
    [
        ("frozen", "tensors that do not train"),
        ("names", "names or dtypes"),
        ("dtype", "names or dtypes"),
        ("disk", "refuses a link"),
    ],
)
def test_a_file_that_cannot_serve_is_copied(saved, plain, tmp_path, why, reason, monkeypatch):
    model = plain.network()
    state = {("model." if why == "names" else "") + name: tensor for name, tensor in model.state_dict().items()}
    if why == "dtype":
        state = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    save_file(state, tmp_path / "1.safetensors")
    if why == "frozen":
        model[0].bias.requires_grad_(False)

    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse if why == "disk" else os.link)
    task = groktrace.Task.from_model(model, **plain.data)
    imported = plan.plan_import(tmp_path / "1.safetensors", task).write(tmp_path / "run")
    assert imported.linked == 0
    assert reason in imported.copied[0]
    assert not list((tmp_path / "run" / "weights").glob("*.json"))
    found = imported.run.snapshots[0].load()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


def sharded(folder, tensors):
    """Write each tensor to a file of its own, with the index that transformers writes."""
    places = {name: f"model-{i:05d}-of-{len(tensors):05d}.safetensors" for i, name in enumerate(tensors)}
    for name, place in places.items():
        save_file({name: tensors[name]}, folder / place)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def test_shards(tmp_path):
    model = nn.Linear(3, 2)
    (tmp_path / "checkpoint-7").mkdir()
    sharded(tmp_path / "checkpoint-7", model.state_dict())
    for path in (tmp_path / "checkpoint-7", tmp_path / "checkpoint-7" / "model.safetensors.index.json"):
        task = groktrace.Task.from_model(model, train=(torch.randn(9, 3), torch.randn(9, 2)), loss="mse")
        run = groktrace.import_checkpoints(path, task=task, out=tmp_path / path.name.partition(".")[0] / "run")
        assert [snapshot.step for snapshot in run.snapshots] == [7]
        assert torch.equal(run.snapshots[0].load()["weight"], model.weight)


def test_an_index_names_files_beside_it(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    save_file({"a": torch.ones(2)}, tmp_path / "there.safetensors")
    for document, message in (
        (
            {"weight_map": {"a": "../there.safetensors"}},
            r"names the file '\.\./there.safetensors', which is not beside it",
        ),
        ({"weight_map": {"a": "/etc/passwd"}}, "which is not beside it"),
        ({"weight_map": {"a": "missing.safetensors"}}, "missing.safetensors: not a whole safetensors file"),
        (
            {"weight_map": {"a": "there.safetensors", "b": "there.safetensors"}},
            "names tensors that its files do not hold: b",
        ),
        ({"weight_map": {"a": index.name}}, "names tensors that its files do not hold: a"),
        ({"weight_map": {"a": 3}}, "expected a 'weight_map' of names and files"),
        ([], "expected a 'weight_map' of names and files"),
    ):
        index.write_text(json.dumps(document))
        with pytest.raises(CheckpointError, match=message):
            huggingface.open_weights(index)
    index.write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        huggingface.open_weights(index)


def test_damaged_files_are_refused(tmp_path):
    save_file({"a": torch.ones(100)}, path := tmp_path / "file.safetensors")
    whole = path.read_bytes()
    huge = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    for content in (b"", whole[:20], whole[:-1], len(huge).to_bytes(8, "little") + huge, b"\xff" * 50):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"file.safetensors: not a whole safetensors file"):
            safetensors_file.open_file(path)
