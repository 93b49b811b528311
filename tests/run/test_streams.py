import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate

from groktrace.errors import TaskError
from groktrace.run.collation import random_samples_note
from groktrace.run.collect import collect

X, Y = torch.arange(20.0).reshape(10, 2), torch.arange(10)


class Finite(IterableDataset):
    def __init__(self, entries):
        self.entries = entries

    def __iter__(self):
        return iter(self.entries)


class Sized(Finite):
    def __len__(self):
        return len(self.entries)


SAMPLES = [(x, int(y)) for x, y in zip(X, Y, strict=True)]
BATCHES = [(X[:4], Y[:4]), (X[4:8], Y[4:8]), (X[8:], Y[8:])]


class Drawn(IterableDataset):
    """Samples without an end, from generators of its own and the global ones; it counts its passes."""

    def __init__(self):
        self.torch, self.numpy, self.python = (
            torch.Generator().manual_seed(0),
            np.random.default_rng(0),
            random.Random(0),
        )
        self.passes = self.given = 0
        self.table = torch.arange(6.0)

    def __iter__(self):
        self.passes += 1
        while True:
            self.given += 1
            own = float(torch.rand((), generator=self.torch)), self.numpy.random(), self.python.random()
            yield torch.tensor([*own, random.random(), float(np.random.rand()), float(torch.rand(()))])


class Consumed(IterableDataset):
    """Its own iterator: what one pass has read, the next does not see."""

    def __init__(self):
        self.at = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.at += 1
        return torch.tensor([float(self.at)])


class Outer(IterableDataset):
    """Wraps another one, and holds itself."""

    def __init__(self, source):
        self.source, self.me = source, self

    def __iter__(self):
        yield from self.source


def samples(batch):
    """A model and loss that take samples of one axis."""
    return batch.tensors[0].ndim == 2


@pytest.mark.parametrize(
    ("data", "fits"),
    [
        (Finite(SAMPLES), None),
        (Sized(SAMPLES), None),
        (DataLoader(Finite(SAMPLES), batch_size=4), None),
        (DataLoader(Sized(SAMPLES), batch_size=4, collate_fn=lambda items: default_collate(items)), None),
        (DataLoader(Finite(BATCHES), batch_size=None), None),
        (DataLoader(Sized(BATCHES), batch_size=None), None),
        (DataLoader(Finite(SAMPLES), batch_size=None), None),
        (Finite(BATCHES), samples),
    ],
)
@pytest.mark.parametrize("cap", [10, 100])
def test_a_stream_that_ends_is_read_whole(data, fits, cap):
    batch, n = collect(data, "train", cap, 0, fits)
    x, y = batch.nested()
    assert torch.equal(x, X)
    assert torch.equal(y, Y)
    assert n == 10


@pytest.mark.parametrize(
    "data", [Sized(SAMPLES), DataLoader(Sized(SAMPLES), batch_size=3), DataLoader(Finite(BATCHES), batch_size=None)]
)
def test_of_a_long_one_the_first_are_kept(data):
    for given in (10, 1000) if not isinstance(data, Sized) else (None, 10):
        batch, n = collect(data, "train", 6, 0, n=given)
        assert torch.equal(batch.tensors[1], Y[:6])
        assert n == (given or 10)
    assert len(collect(data, "train", 6, 0, n=3)[0]) == 3


@pytest.mark.parametrize("wrap", [lambda data: data, DataLoader, lambda data: DataLoader(data, batch_size=None)])
def test_reading_leaves_the_stream_and_all_generators_where_they_were(wrap):
    data = Drawn()
    running = iter(wrap(data))
    next(running)
    before = next(running), data.given, data.passes
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    first, n = collect(wrap(data), "train", 50, 3, samples, n=200)
    assert (len(first), n) == (50, 200)
    assert (data.given, data.passes) == before[1:]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert torch.equal(collect(wrap(data), "train", 50, 3, samples, n=200)[0].tensors[0], first.tensors[0])
    assert random_samples_note(wrap(data), "train") is None

    again = Drawn()
    unread = iter(wrap(again))
    for _ in range(2):
        next(unread)
    assert torch.equal(next(unread).flatten()[:3], next(running).flatten()[:3])


def test_a_stream_that_is_used_up_is_read_from_where_it_stands():
    data = Consumed()
    next(iter(data))
    batch, _ = collect(data, "train", 3, 0, n=10)
    assert batch.tensors[0].flatten().tolist() == [2, 3, 4]
    assert next(iter(data)).item() == 2


def test_what_it_holds_in_memory_is_not_copied(monkeypatch):
    def refuse(*_):
        raise MemoryError

    monkeypatch.setattr(torch.Tensor, "__deepcopy__", refuse)
    assert len(collect(Finite([X[0], X[1]]), "train", 3, 0)[0]) == 2
    assert len(collect(Outer(Finite(X)), "train", 3, 0, n=9)[0]) == 3


@pytest.mark.parametrize("wrap", [lambda data: data, DataLoader, lambda data: DataLoader(data, batch_size=None)])
def test_a_stream_without_an_end_needs_n(wrap):
    with pytest.raises(TaskError, match=r"train: the stream does not end within 50 samples and .* give n="):
        collect(wrap(Drawn()), "train", 50, 0, samples)
    batch, n = collect(wrap(Drawn()), "val", 50, 0, samples, endless=True)
    assert len(batch) == n == 50


def test_streams_that_cannot_be_used_are_named():
    class Failing(IterableDataset):
        def __iter__(self):
            yield X[0]
            raise OSError("the shard is gone")

    with pytest.raises(TaskError, match=r"reading the Failing fails \(OSError: the shard is gone\); give train="):
        collect(Failing(), "train", 5, 0)
    with pytest.raises(TaskError, match=r"a Finite cannot be read without being used up \(TypeError: .*generator"):
        collect(Finite(x for x in X), "train", 5, 0)
    for empty in (Finite([]), DataLoader(Finite([]), batch_size=None)):
        with pytest.raises(TaskError, match="expected at least one sample, got an empty stream"):
            collect(empty, "train", 5, 0)
    for short in (Finite(SAMPLES), DataLoader(Finite(BATCHES), batch_size=None)):
        with pytest.raises(TaskError, match="n: the stream ends after 10 samples, got n=12; leave n out"):
            collect(short, "train", 50, 0, n=12)
    with pytest.raises(TaskError, match="nested differently"):
        collect(DataLoader(Finite([*BATCHES, *BATCHES, {"x": X}]), batch_size=None), "train", 50, 0)
    with pytest.raises(TaskError, match="axis 1 is that of the samples"):
        collect(DataLoader(Finite(list(X)), collate_fn=lambda items: torch.stack(items, 1)), "train", 50, 0)
