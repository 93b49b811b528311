import contextlib
import json
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import groktrace
from groktrace.errors import RunError, SnapshotError, TaskError
from groktrace.run import files, layout
from groktrace.run.collect import collect
from groktrace.run.program import Program
from groktrace.run.store import Snapshot, WeightSpec, open_run
from groktrace.run.task import make_forward

WEIGHTS = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.zeros(2), "count": torch.tensor(4)}
INFO = {
    "format": 1,
    "groktrace": "0.1.0",
    "weights": {
        "weight": {"shape": [2, 3], "dtype": "float32", "trainable": True},
        "bias": {"shape": [2], "dtype": "float32", "trainable": False},
        "count": {"shape": [], "dtype": "int64", "trainable": False},
    },
    "n": 9,
    "seed": 0,
    "data": {"train": {"structure": {"tuple": [0, 1]}}, "val": {"structure": {"tuple": [0, 1]}}},
    "task": None,
}
DATA = {
    "train.0": torch.arange(12.0).view(4, 3),
    "train.1": torch.ones(4, 2),
    "val.0": torch.zeros(1, 3),
    "val.1": torch.zeros(1, 2),
}


@pytest.fixture(scope="module")
def program():
    train, _ = collect((DATA["train.0"], DATA["train.1"]), "train", 100, 0)
    traced = Program.trace(make_forward(nn.Linear(3, 2), "mse", None, train), train)
    return traced.to_json() | {"offset_free": False}


def write_snapshot(root, step, tensors=WEIGHTS, **metadata):
    metadata = {"step": str(step), "metrics": '{"loss": 0.5}'} | metadata
    files.write_tensors(layout.snapshot_path(root, step), tensors, metadata)
    return root


@pytest.fixture
def root(tmp_path):
    """A run without data or program."""
    root = tmp_path / "run"
    (root / "weights").mkdir(parents=True)
    files.write_json(root / "run.json", INFO)
    for step in (100, 0, 20):
        write_snapshot(root, step)
    return root


@pytest.fixture
def whole(root, program):
    """A run with everything."""
    files.write_tensors(root / "data.safetensors", DATA, {})
    files.write_json(root / "program.json", program)
    return root


def change(root, **entries):
    files.write_json(root / "run.json", INFO | entries)
    return root


def test_a_run_opens_with_its_snapshots_in_step_order(root):
    run = open_run(root)
    assert [snapshot.step for snapshot in run.snapshots] == [0, 20, 100]
    assert run.root == root
    assert run.info == INFO
    assert run.specs["weight"] == WeightSpec((2, 3), torch.float32, trainable=True)
    assert run.specs["count"] == WeightSpec((), torch.int64, trainable=False)
    loaded = run.snapshots[1].load()
    assert loaded.keys() == WEIGHTS.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in WEIGHTS.items())
    assert run.snapshots[1].metrics() == {"loss": 0.5}
    assert groktrace.open_run(str(root)).specs == run.specs


def test_strange_names_among_the_snapshots_are_passed_over(root):
    for name in (".tmp-000000000300.safetensors-1a2b3c4d", "300.safetensors", "000000000300.pt", "best.safetensors"):
        (root / "weights" / name).write_bytes(b"half")
    (root / "weights" / "old").mkdir()
    assert [snapshot.step for snapshot in open_run(root).snapshots] == [0, 20, 100]


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(RunError, match=r"missing: no such directory; expected one that groktrace\.watch"):
        open_run(tmp_path / "missing")
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="file: no such directory"):
        open_run(tmp_path / "file")
    with pytest.raises(RunError, match=r"holds no run\.json, so it is not a directory that groktrace\.watch\(\) wrote"):
        open_run(tmp_path)
    with pytest.raises(RunError, match=r"cannot be read \(File name too long\)"):
        open_run(tmp_path / ("x" * 300))
    (tmp_path / "run.json").mkdir()
    with pytest.raises(RunError, match=r"run\.json: cannot be read \(Is a directory\)"):
        open_run(tmp_path)


def test_a_weights_folder_that_cannot_be_listed_is_named(root, monkeypatch):
    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(layout, "snapshot_steps", refuse)
    with pytest.raises(RunError, match=r"run: cannot be read \(Permission denied\)"):
        open_run(root)


@pytest.mark.parametrize("keep_folder", [True, False])
def test_a_run_without_snapshots_is_named(root, keep_folder):
    for file in (root / "weights").iterdir():
        file.unlink()
    if keep_folder:
        (root / "weights" / ".tmp-000000000000.safetensors-1a2b3c4d").touch()
    else:
        (root / "weights").rmdir()
    with pytest.raises(RunError, match="run: holds no snapshots; the training has not kept one yet, or they were"):
        open_run(root)


def test_another_format_names_who_wrote_it(root):
    change(root, format=2, groktrace="0.9")
    with pytest.raises(
        RunError, match=r"run\.json: format 2, written by groktrace 0\.9; this groktrace reads format 1"
    ):
        open_run(root)
    files.write_json(root / "run.json", {"format": 7})
    with pytest.raises(RunError, match=r"format 7, written by groktrace \?; .* Install that version or a newer one"):
        open_run(root)


@pytest.mark.parametrize("info", [None, [], "run", {}, {"format": "1"}, {"format": True}, {"format": 1.0}])
def test_json_of_something_else_is_named(root, info):
    files.write_json(root / "run.json", info)
    with pytest.raises(RunError, match=r"run\.json: not a groktrace run file"):
        open_run(root)


def spec(**entries):
    return {"weights": {"weight": {"shape": [2, 3], "dtype": "float32", "trainable": True} | entries}}


@pytest.mark.parametrize(
    ("entries", "named"),
    [
        ({"weights": None}, "weights: expected an object"),
        ({"weights": []}, "weights: expected an object"),
        ({"weights": {"weight": None}}, "expected an object with shape, .* got NoneType"),
        ({"weights": {"weight": {}}}, "'dtype' is missing among shape, dtype"),
        (spec(shape=3), r"shape: expected .* got 3"),
        (spec(shape=[2, -1]), "shape: expected a number from 0 .* got -1"),
        (spec(shape=[2.0, 3]), r"shape: expected int, got 2\.0"),
        (spec(shape=[True]), "shape: expected int, got True"),
        (spec(shape=[2**40 + 1]), "shape: expected a number from 0 "),
        (spec(dtype=None), "dtype: expected dtype, got None"),
        (spec(dtype="float33"), "dtype: expected dtype, got 'float33'"),
        (spec(dtype="Tensor"), "dtype: .* got 'Tensor'"),
        (spec(dtype="has_mps"), "dtype: .* got 'has_mps'"),
        (spec(dtype="onnx"), "dtype: .* got 'onnx'"),
        (spec(trainable="false"), "trainable: expected bool, got 'false'"),
        (spec(trainable=0), "trainable: expected bool, got 0"),
        (spec(trainable_from=-1), "trainable_from: expected a number from 0 .* got -1"),
        (spec(trainable_from=1.0), r"trainable_from: expected int, got 1\.0"),
        (spec(trainable_from=10**12), "trainable_from: .* got 1000000000000"),
        (spec(loss=1), "loss: expected bool, got 1"),
        ({"n": 0}, "n: expected a number from 1 .* got 0"),
        ({"n": -3}, "n: expected a number from 1 .* got -3"),
        ({"n": 9.5}, r"n: expected int, got 9\.5"),
        ({"n": True}, "n: expected int, got True"),
        ({"n": None}, "data: expected training samples, and their number n"),
        ({"data": []}, r"data: expected dict.* got \[\]"),
        ({"doubts": 3}, "doubts: .* got 3"),
        ({"doubts": {"step": 1, "text": "a"}}, "doubts: .* got "),
        ({"doubts": [3]}, "expected an object with step, text, got int"),
        ({"doubts": [{"step": 1}]}, "'text' is missing among step, text"),
        ({"doubts": [{"step": 1.0, "text": "a"}]}, r"step: expected int, got 1\.0"),
        ({"doubts": [{"step": 1, "text": "a" * 2001}]}, "text: expected at most 2000 letters .* got 2001"),
        ({"doubts": [{"step": 1, "text": "a"}] * 1001}, "doubts: expected at most 1000 letters or entries, got 1001"),
        ({"data": {}}, "data: expected training samples"),
    ],
)
def test_what_is_damaged_in_run_json_is_named(root, entries, named):
    change(root, **entries)
    with pytest.raises(RunError, match=rf"run\.json: damaged \(.*{named}.*\)\."):
        open_run(root)


@pytest.mark.parametrize("key", ["weights", "n", "data"])
def test_missing_entries_are_named(root, key):
    files.write_json(root / "run.json", {name: value for name, value in INFO.items() if name != key})
    with pytest.raises(RunError, match=rf"run\.json: damaged \('{key}' is missing"):
        open_run(root)


def test_doubts_are_read_and_printable(root):
    assert open_run(change(root, doubts=None)).doubts == ()
    doubts = [{"step": 7, "text": "the loss is another\x1b[2J"}, {"step": 9, "text": "so is its gradient"}]
    first, second = open_run(change(root, doubts=doubts)).doubts
    assert first.startswith("step 7: the loss is another")
    assert "\x1b" not in first
    assert second == "step 9: so is its gradient"


def test_a_recording_without_data_opens(root):
    assert open_run(change(root, n=None, data=None)).info["n"] is None


def paths(node, prefix=()):
    if isinstance(node, dict):
        for key, value in node.items():
            yield (*prefix, key)
            yield from paths(value, (*prefix, key))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield (*prefix, i)
            yield from paths(value, (*prefix, i))


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["float16", "has_mps"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["shape", "dtype", "train", "structure", "tuple", "a"]), inner, max_size=3)
    ),
    max_leaves=5,
)


def read_with(root, path, value):
    """Read everything of a run whose run.json has `value` at `path`."""
    info = json.loads(json.dumps(INFO))
    node = info
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    (root / "run.json").write_text(json.dumps(info))
    with contextlib.suppress(RunError, SnapshotError):
        run = open_run(root)
        assert run.task.n == info["n"] > 0
        run.task.train.nested()
        for snapshot in run.snapshots:
            snapshot.load()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(path=st.sampled_from(list(paths(INFO))), value=json_values)
def test_any_value_in_run_json_works_or_is_damage(whole, path, value):
    read_with(whole, path, value)


@pytest.mark.parametrize("value", [None, True, 0, -1, 1e300, "", "x", [], [0], {}, {"train": {}}, {"structure": 0}])
def test_one_value_anywhere_in_run_json_works_or_is_damage(whole, value):
    for path in paths(INFO):
        read_with(whole, path, value)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (WEIGHTS | {"bias": torch.zeros(3)}, r"'bias' should be float32\[2\] as run.json says, but is float32\[3\]"),
        (WEIGHTS | {"bias": torch.zeros(2).double()}, r"'bias' should be float32\[2\] .* but is float64\[2\]"),
        (WEIGHTS | {"count": torch.tensor([4])}, r"'count' should be int64\[\] .* but is int64\[1\]"),
        (WEIGHTS | {"weight": torch.zeros(3, 2)}, r"'weight' should be float32\[2, 3\] .* but is float32\[3, 2\]"),
        (WEIGHTS | {"extra": torch.zeros(1)}, "holds other tensors than run.json names: extra"),
        ({"weight": WEIGHTS["weight"]}, "holds other tensors than run.json names: bias, count"),
        (
            {f"w{i}": torch.zeros(1) for i in range(9)},
            r"holds other tensors than run.json names: bias, count, w0, w1, w2\.",
        ),
    ],
)
def test_snapshots_of_another_network_are_named(root, tensors, message):
    write_snapshot(root, 20, tensors)
    with pytest.raises(SnapshotError, match=rf"000000000020\.safetensors: {message}"):
        open_run(root).snapshots[1].load()


def test_tensors_come_in_the_order_of_the_network(root):
    for _ in range(10):  # a file's own order is another at every reading
        assert list(open_run(root).snapshots[0].load()) == list(INFO["weights"])


def test_what_a_snapshot_leaves_out_is_in_the_file_of_frozen_tensors(root):
    files.write_tensors(root / layout.FROZEN_FILE, {"bias": torch.ones(2), "weight": torch.ones(2, 3)}, {})
    write_snapshot(root, 20, {name: WEIGHTS[name] for name in ("count", "weight")})
    first, second = (open_run(root).snapshots[i].load() for i in (0, 1))
    assert torch.equal(first["bias"], WEIGHTS["bias"])
    assert torch.equal(second["bias"], torch.ones(2))
    assert torch.equal(second["weight"], WEIGHTS["weight"])
    (root / layout.FROZEN_FILE).write_bytes(b"")
    with pytest.raises(RunError, match=r"frozen\.safetensors: truncated"):
        open_run(root).snapshots[1].load()


def test_a_snapshot_under_another_steps_name_is_named(root):
    os.replace(layout.snapshot_path(root, 100), layout.snapshot_path(root, 20))
    for read in (Snapshot.load, Snapshot.metrics, Snapshot.fingerprint):
        with pytest.raises(SnapshotError, match="says it is of step 100, its name says 20"):
            read(open_run(root).snapshots[1])
    files.write_tensors(layout.snapshot_path(root, 20), WEIGHTS, {})
    with pytest.raises(SnapshotError, match="says it is of step None, its name says 20"):
        open_run(root).snapshots[1].load()


@pytest.mark.parametrize(
    "metrics",
    ["", "{", "[]", "3", '{"a": "b"}', '{"a": []}', '{"a": 1' + "0" * 400 + "}", "[" * 100_000],
)
def test_damaged_metrics_are_named(root, metrics):
    write_snapshot(root, 20, metrics=metrics)
    with pytest.raises(SnapshotError, match=r"000000000020\.safetensors: its logged metrics are damaged \("):
        open_run(root).snapshots[1].metrics()
    with pytest.raises(SnapshotError, match="its logged metrics are damaged"):
        open_run(root).snapshots[1].load()


def test_metrics_are_read_without_the_weights_and_are_still_protected(root):
    path = layout.snapshot_path(root, 20)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # a weight
    snapshot = open_run(root).snapshots[1]
    assert snapshot.metrics() == {"loss": 0.5}
    with pytest.raises(SnapshotError, match="does not match its digest"):
        snapshot.load()
    path.write_bytes(whole.replace(b"0.5", b"0.6"))
    with pytest.raises(SnapshotError, match="it does not match its digest"):
        open_run(root).snapshots[1].metrics()


def test_a_damaged_snapshot_leaves_the_others_readable(root):
    layout.snapshot_path(root, 20).write_bytes(b"half")
    layout.snapshot_path(root, 30).mkdir()
    snapshots = open_run(root).snapshots
    assert [snapshot.step for snapshot in snapshots] == [0, 20, 30, 100]
    for read in (Snapshot.load, Snapshot.metrics, Snapshot.fingerprint):
        with pytest.raises(SnapshotError, match=r"000000000020\.safetensors: truncated or not a safetensors file"):
            read(snapshots[1])
        with pytest.raises(SnapshotError, match=r"000000000030\.safetensors: cannot be read \(Is a directory\)"):
            read(snapshots[2])
    assert snapshots[3].load().keys() == WEIGHTS.keys()
    layout.snapshot_path(root, 100).unlink()
    with pytest.raises(SnapshotError, match=r"000000000100\.safetensors: cannot be read \(No such file or directory\)"):
        snapshots[3].load()


def test_a_fingerprint_tells_weights_and_steps_apart(root):
    first, second, third = (snapshot.fingerprint() for snapshot in open_run(root).snapshots)
    assert len({first, second, third}) == 3
    write_snapshot(root, 0, metrics="{}")
    write_snapshot(root, 20, WEIGHTS | {"bias": torch.ones(2)})
    again = [snapshot.fingerprint() for snapshot in open_run(root).snapshots]
    assert again[0] == first
    assert again[1] != second
    assert again[2] == third


def test_data_are_there_without_a_program(whole):
    (whole / "program.json").unlink()
    data = open_run(whole).data
    assert (data.n, len(data.train), len(data.val), data.constants) == (INFO["n"], 4, 1, {})
    assert torch.equal(data.train.nested()[0], DATA["train.0"])
    with pytest.raises(TaskError, match=r"from_model\(model, loss=\.\.\.\)\."):
        _ = open_run(whole).task
    (whole / "data.safetensors").unlink()
    assert open_run(whole).data is None
    with pytest.raises(TaskError, match=r"from_model\(model, loss=\.\.\., train=\.\.\.\)\."):
        _ = open_run(whole).task


def test_the_task_is_that_of_the_recording(whole):
    task = open_run(whole).task
    loss, outputs = task.forward(open_run(whole).snapshots[0].load(), task.train.tensors)
    expected = nn.functional.linear(DATA["train.0"], WEIGHTS["weight"], WEIGHTS["bias"])
    assert torch.equal(outputs, expected)
    assert torch.equal(loss, nn.functional.mse_loss(expected, DATA["train.1"]))
    assert (task.n, len(task.train), len(task.val), task.shift_invariant) == (9, 4, 1, False)
    assert all(torch.equal(a, b) for a, b in zip(task.val.nested(), (DATA["val.0"], DATA["val.1"]), strict=True))


def test_more_than_ten_leaves_come_in_their_order(whole):
    leaves = {f"train.{i}": torch.full((2,), float(i)) for i in range(12)}
    files.write_tensors(whole / "data.safetensors", leaves, {})
    run = open_run(change(whole, data={"train": {"structure": {"list": list(range(12))}}, "val": None}))
    assert [leaf[0].item() for leaf in run.task.train.nested()] == list(range(12))
    assert run.task.val is None


@pytest.mark.parametrize("missing", ["program.json", "data.safetensors"])
@pytest.mark.parametrize(("hint", "named"), [(None, "package.module:factory"), ("my.code:make", r"my\.code:make")])
def test_a_recording_that_kept_no_task_says_what_to_pass(whole, missing, hint, named):
    (whole / missing).unlink()
    with pytest.raises(TaskError, match=rf"holds no model and loss to evaluate; pass --task {named}, a function"):
        _ = open_run(change(whole, task=hint)).task


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], r"program\.json: not a groktrace program"),
        ({}, r"program\.json: not a groktrace program"),
        ({"offset_free": 1}, r"program\.json: not a groktrace program"),
        ({"offset_free": True}, r"program\.json: not a program that groktrace wrote"),
    ],
)
def test_a_damaged_program_is_named(whole, document, message):
    files.write_json(whole / "program.json", document)
    with pytest.raises(RunError, match=message):
        _ = open_run(whole).task


def test_a_program_of_another_network_is_named(whole):
    weights = {name: entry for name, entry in INFO["weights"].items() if name != "bias"}
    run = open_run(change(whole, weights=weights))
    with pytest.raises(RunError, match=r"program\.json: uses the weight 'bias', which run\.json does not list"):
        _ = run.task


@pytest.mark.parametrize(
    ("tensors", "data", "message"),
    [
        ({"val.0": DATA["val.0"]}, INFO["data"], "the recorded train data are damaged .*at least one tensor"),
        (DATA | {"train.1": torch.ones(3, 2)}, INFO["data"], r"train data are damaged .*got \[4, 3\]"),
        (DATA | {"train.x": torch.ones(4)}, INFO["data"], "train data are damaged .*invalid literal"),
        (DATA | {"train.1": torch.tensor(1.0)}, INFO["data"], "train data are damaged .*one without axes"),
        (DATA | {"val.1": torch.ones(0, 2)}, INFO["data"], r"val data are damaged .*got \[1, 0\]"),
        (DATA, {"train": {"structure": 5}}, "train data are damaged .*the recorded nesting is damaged"),
        (DATA, {"train": {}}, "train data are damaged .*'structure'"),
        (DATA, {"train": None}, "train data are damaged .*NoneType"),
        (DATA, INFO["data"] | {"val": {"structure": {"tuple": [0, 2]}}}, "val data are damaged .*the recorded nesting"),
        (DATA, INFO["data"] | {"val": 0}, "val data are damaged .*int"),
        (DATA, None, r"run\.json: names no data, but data\.safetensors is there"),
    ],
)
def test_damaged_data_are_named(whole, tensors, data, message):
    files.write_tensors(whole / "data.safetensors", tensors, {})
    with pytest.raises(RunError, match=message):
        _ = open_run(change(whole, data=data)).task


def test_a_data_file_with_a_changed_value_is_refused(whole):
    path = whole / "data.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunError, match=r"data\.safetensors: tensor '.*' does not match its digest"):
        _ = open_run(whole).task


@pytest.mark.parametrize("name", ["run.json", "data.safetensors", "weights", "analysis/a/.lock"])
def test_links_out_of_the_directory_are_refused(whole, tmp_path_factory, name):
    outside = tmp_path_factory.mktemp("outside") / "it"
    (whole / name).parent.mkdir(parents=True, exist_ok=True)
    if (whole / name).exists():
        (whole / name).rename(outside)
    (whole / name).symlink_to(outside)
    with pytest.raises(RunError, match="a link out of the run directory, outside of which nothing is read or written"):
        open_run(whole)


def test_a_snapshot_that_is_a_link_out_costs_itself(whole, tmp_path_factory):
    first = open_run(whole).snapshots[0]
    first.path.rename(outside := tmp_path_factory.mktemp("outside") / "it")
    first.path.symlink_to(outside)
    run = open_run(whole)
    with pytest.raises(SnapshotError, match="a link out of the run directory"):
        run.snapshots[0].load()
    assert all(snapshot.load() for snapshot in run.snapshots[1:])


def test_a_link_to_the_directory_or_within_it_is_followed(whole, tmp_path_factory):
    (whole / "data.safetensors").rename(whole / "moved")
    (whole / "data.safetensors").symlink_to("moved")
    link = tmp_path_factory.mktemp("links") / "run"
    link.symlink_to(whole)
    assert open_run(link).task.n == open_run(whole).task.n


def test_fewer_samples_than_are_stored_are_noticed(whole):
    change(whole, n=1)
    with pytest.raises(RunError, match=r"run\.json: damaged: n is 1, but data\.safetensors holds \d+ training samples"):
        _ = open_run(whole).task


def test_tensors_of_the_loss_come_only_where_they_are_asked_for(root):
    own = {"loss.scale": {"shape": [1], "dtype": "float32", "trainable": True, "trainable_from": 20, "loss": True}}
    change(root, weights=INFO["weights"] | own)
    write_snapshot(root, 300, WEIGHTS | {"loss.scale": torch.ones(1)})
    last = open_run(root).snapshots[-1]
    assert last.load().keys() == WEIGHTS.keys()
    assert last.load(with_loss=True).keys() == {*WEIGHTS, "loss.scale"}
    spec = open_run(root).specs["loss.scale"]
    assert (spec.trainable_from, spec.loss) == (20, True)
    assert (open_run(root).specs["weight"].trainable_from, open_run(root).specs["weight"].loss) == (0, False)
