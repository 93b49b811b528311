import errno
import json
import math
import os
import threading
import time
from datetime import datetime

import pytest
import torch

import groktrace
from groktrace.recording import writer as writer_module
from groktrace.recording.lock import FolderLock
from groktrace.recording.writer import Writer, now, remove_leftovers
from groktrace.run import files, layout


@pytest.fixture
def root(tmp_path):
    (tmp_path / layout.WEIGHTS_FOLDER).mkdir()
    return tmp_path


@pytest.fixture
def writer(root):
    hold = FolderLock(root)
    hold.sign()
    writer = Writer(root, hold)
    yield writer
    writer.close()


def test_writes_tensors_and_metadata(root, writer):
    writer.submit(12, {"w": torch.arange(4.0)}, {"loss": 0.5})
    writer.close()
    path = layout.snapshot_path(root, 12)
    tensors, metadata = files.read_tensors(path)
    assert torch.equal(tensors["w"], torch.arange(4.0))
    assert (metadata["groktrace"], metadata["step"]) == (str(layout.FORMAT_VERSION), "12")
    assert json.loads(metadata["metrics"]) == {"loss": 0.5}
    assert datetime.fromisoformat(metadata["time"]).utcoffset().total_seconds() == 0
    assert (writer.written, writer.bytes, writer.last_step) == (1, path.stat().st_size, 12)


def test_small_snapshots_are_written_together(root, monkeypatch, writer):
    monkeypatch.setattr(writer_module, "QUEUE_SECONDS", 0.3)
    weight, began = torch.zeros(1000), time.perf_counter()
    writer.written = 1
    for step in range(5):
        writer.make_room()
        weight.fill_(step)
        writer.submit(step, {"w": weight}, {})
    assert layout.snapshot_steps(root) == []
    while writer.written < 6:
        assert time.perf_counter() < began + 5
        time.sleep(0.01)
    kept = [files.read_tensors(layout.snapshot_path(root, step))[0]["w"] for step in range(5)]
    assert all((tensor == step).all() for step, tensor in enumerate(kept))


def test_the_queue_does_not_grow_beyond_its_bytes(root, monkeypatch, writer):
    monkeypatch.setattr(writer_module, "QUEUE_BYTES", 40_000)
    most = 0
    for step in range(100):
        writer.submit(step, {"w": torch.zeros(1000)}, {})
        most = max(most, len(writer._jobs))
    writer.wait()
    assert len(layout.snapshot_steps(root)) == 100
    assert most <= 10


def test_the_folder_is_synced_once_for_all_that_come_together_and_before_they_count_as_written(
    root, monkeypatch, writer
):
    writer.submit(0, {"w": torch.ones(1)}, {})
    writer.wait()
    synced = []
    sync = files.sync_folder
    monkeypatch.setattr(files, "sync_folder", lambda folder: synced.append(layout.snapshot_steps(root)) or sync(folder))
    for step in range(1, 5):
        writer.submit(step, {"w": torch.ones(1)}, {})
    writer.wait()
    assert synced == [[0, 1, 2, 3, 4]]


def test_the_next_snapshot_waits_for_the_one_in_flight(monkeypatch, writer):
    monkeypatch.setattr(writer_module, "QUEUE_BYTES", 0)  # so that every one is large
    gate, done = threading.Event(), []
    monkeypatch.setattr(files, "write_tensors", lambda path, *_: (gate.wait(10) and done.append(path.name)) or 1)
    writer.submit(1, {}, {})
    second = threading.Thread(target=writer.submit, args=(2, {}, {}))
    second.start()
    second.join(0.05)
    assert second.is_alive()
    assert not done
    gate.set()
    second.join()
    writer.wait()
    assert done == ["000000000001.safetensors", "000000000002.safetensors"]


def test_goes_on_after_an_error(root, monkeypatch, writer):
    with monkeypatch.context() as patch:
        patch.setattr(files, "save", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        writer.submit(1, {"w": torch.ones(1)}, {})
        writer.wait()
    assert writer.error.errno == errno.ENOSPC
    writer.submit(2, {"w": torch.ones(1)}, {})
    writer.wait()
    assert layout.snapshot_steps(root) == [2]
    assert writer.last_step == 2


def test_close_twice_and_submit_afterwards(writer):
    writer.close()
    writer.close()
    writer.submit(1, {}, {})
    with pytest.raises(RuntimeError, match="has ended"):
        writer.wait()


def test_removes_only_leftovers(root):
    folder = root / layout.WEIGHTS_FOLDER
    for name in (f"{files.TEMPORARY_PREFIX}x", "000000000001.safetensors", "notes.txt"):
        (folder / name).touch()
        os.utime(folder / name, (0, 0))
    young = f"{files.TEMPORARY_PREFIX}y"  # another process may be writing it
    (folder / young).touch()
    remove_leftovers(root)
    assert sorted(entry.name for entry in folder.iterdir()) == [young, "000000000001.safetensors", "notes.txt"]


def test_now_is_in_utc():
    assert now().endswith("+00:00")


def test_metrics_that_are_not_finite_come_back_as_such(tmp_path):
    model = torch.nn.Linear(2, 1)
    with groktrace.watch(model, out=tmp_path / "run", every=1) as recorder:
        recorder.log(loss=float("nan"), lr=0.5)
        recorder.step()
    metrics = groktrace.open_run(tmp_path / "run").snapshots[1].metrics()
    assert math.isnan(metrics["loss"])
    assert metrics["lr"] == 0.5
