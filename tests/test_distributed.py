"""Two processes that train one model over gloo, by data parallelism and with sharded weights."""

import contextlib
import datetime
import os
import sys
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F  # noqa: N812

import groktrace
from groktrace.recording.writer import Writer
from groktrace.run import layout

FEW = {"chains": 1, "burn_in": 4, "draws": 8}


def in_two_processes(body, folder):
    """Run body(rank, folder) in two processes of one group; what one prints when it fails becomes the test's."""
    # Copies of a process in which autograd runs threads of its own, as for GPUs, cannot train.
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=_enter, args=(body, rank, folder)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0, 0]


def _enter(body, rank, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=20))
    try:
        body(rank, folder)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)  # at once: the other process would wait for this one to leave the group
    dist.destroy_process_group()
    os._exit(0)  # without what pytest does at the end of a process


def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    return model, torch.randn(24, 4), torch.randint(0, 3, (24,))


def train(model, optimizer, x, y, updates, rank=0):
    for _ in range(updates):
        optimizer.zero_grad()
        F.cross_entropy(model(x[12 * rank : 12 * rank + 12]), y[12 * rank : 12 * rank + 12]).backward()
        optimizer.step()


def whole(model):
    """The weights as one process would have them, gathered by every one."""
    full = {name: getattr(tensor, "full_tensor", lambda t=tensor: t)() for name, tensor in model.state_dict().items()}
    return {name.replace("module.", "").replace("_orig_mod.", ""): tensor for name, tensor in full.items()}


def data_parallel(rank, folder):
    model, x, y = make()
    model = nn.parallel.DistributedDataParallel(torch.compile(model, backend="eager"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    out = folder / f"run{rank}"  # so that what the second process writes would show
    with groktrace.watch(model, optimizer, train=(x, y), loss="cross_entropy", out=out, every=2) as recorder:
        train(model, optimizer, x, y, 5, rank)
    assert recorder.steps == 5
    if rank == 0:
        torch.save(whole(model), folder / "truth")


def sharded(rank, folder):
    from torch.distributed.fsdp import fully_shard

    model, x, y = make()
    fully_shard(model[0])
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    out = folder / f"run{rank}"
    with groktrace.watch(model, optimizer, train=(x, y), loss="cross_entropy", out=out, every=2) as recorder:
        train(model, optimizer, x, y, 5, rank)
        assert all(hasattr(parameter, "full_tensor") for parameter in model.parameters())
    assert recorder.steps == 5
    state = whole(model)
    if rank == 0:
        torch.save(state, folder / "truth")


@pytest.mark.parametrize("kind", [data_parallel, sharded], ids=["DDP", "fully_shard"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_two_processes_make_one_recording(kind, tmp_path):
    in_two_processes(kind, tmp_path)
    assert not (tmp_path / "run1").exists()
    run = groktrace.open_run(tmp_path / "run0")
    assert [snapshot.step for snapshot in run.snapshots] == [0, 2, 4, 5]
    truth, last = torch.load(tmp_path / "truth"), run.snapshots[-1].load()
    assert last.keys() == truth.keys()
    assert all(torch.equal(last[name], truth[name]) for name in truth)
    assert torch.equal(run.snapshots[0].load()["0.weight"], make()[0][0].weight)
    trajectory = groktrace.analyze(tmp_path / "run0", **FEW)
    model, x, y = make()
    model.load_state_dict(truth)
    assert trajectory.points[-1].train_loss == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-5)


def sharded_and_saved(rank, folder):
    """Both processes save their shards by torch.distributed.checkpoint, beside what the hook records."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.fsdp import fully_shard

    model, x, y = make()
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with groktrace.watch(model, optimizer, train=(x, y), loss="cross_entropy", out=folder / "run0", every=2):
        for step in (2, 4):
            train(model, optimizer, x, y, 2, rank)
            weights, state = get_state_dict(model, optimizer)
            dcp.save({"model": weights, "optim": state}, checkpoint_id=folder / "saved" / f"step{step}")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_shards_that_were_saved_by_pytorch_are_imported(tmp_path):
    in_two_processes(sharded_and_saved, tmp_path)
    assert len(list((tmp_path / "saved" / "step2").glob("*.distcp"))) == 2
    model, x, y = make()
    task = groktrace.Task.from_model(model, train=(x, y), loss="cross_entropy")
    run = groktrace.import_checkpoints(tmp_path / "saved", task=task, out=tmp_path / "imported")
    hooked = groktrace.open_run(tmp_path / "run0")
    assert [s.fingerprint() for s in run.snapshots] == [s.fingerprint() for s in hooked.snapshots if s.step]
    assert run.weight_decay


def sharded_and_refused(rank, folder):
    """The first process sees a folder that holds something else; both have to say so, or the second would wait."""
    from torch.distributed.fsdp import fully_shard

    model, x, y = make()
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    out = folder / f"run{rank}"
    if rank == 0:
        out.mkdir()
        (out / "thesis.tex").touch()
    with pytest.raises(groktrace.GroktraceError, match="holds files, but is not a groktrace run"):
        groktrace.watch(model, optimizer, train=(x, y), loss="cross_entropy", out=out)
    train(model, optimizer, x, y, 2)


def sharded_twice(rank, folder):
    """The second run goes beside the first, and both processes know where."""
    from torch.distributed.fsdp import fully_shard

    for name in ("run", "run-2"):
        model, x, y = make()
        fully_shard(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        with groktrace.watch(model, optimizer, train=(x, y), loss="cross_entropy", out=folder / "run") as recorder:
            assert recorder.out == folder / name
            train(model, optimizer, x, y, 2)
    assert not (folder / "run-3").exists()


def sharded_and_failing(rank, folder):
    """The first process cannot write, and one leaves in the middle: no process waits for another."""
    from torch.distributed.fsdp import fully_shard

    model, x, y = make()
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    out = folder / f"run{rank}"
    with pytest.warns(RuntimeWarning) as caught:  # noqa: PT031
        recorder = groktrace.watch(model, optimizer, out=out, every=1)
        train(model, optimizer, x, y, 1)
        with (
            mock.patch.object(Writer, "make_room", side_effect=ZeroDivisionError)
            if rank == 0
            else contextlib.nullcontext()
        ):
            train(model, optimizer, x, y, 2)
        train(model, optimizer, x, y, 1)
        recorder._keep = lambda step: False
        train(model, optimizer, x, y, 1)
        with pytest.raises(KeyError), recorder:
            raise KeyError
        if rank == 1:
            groktrace.recording.warn.warn_user("nothing: this process has nothing to say")
    if rank == 0:
        messages = [str(warning.message) for warning in caught]
        assert ["ZeroDivisionError" in messages[0], "every process calls close()" in messages[1]] == [True, True]
        assert layout.snapshot_steps(out) == [0, 1, 4]


@pytest.mark.parametrize("body", [sharded_and_refused, sharded_twice, sharded_and_failing])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_processes_never_wait_for_each_other_in_vain(body, tmp_path):
    in_two_processes(body, tmp_path)


def test_the_older_way_of_sharding_is_refused(tmp_path):
    older = type("FullyShardedDataParallel", (nn.Module,), {})()
    older.inner = make()[0]
    with pytest.raises(groktrace.GroktraceError, match="FullyShardedDataParallel keeps weights in flat pieces"):
        groktrace.watch(older, out=tmp_path / "run")
