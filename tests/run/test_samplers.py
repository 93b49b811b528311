import random

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from groktrace.errors import TaskError
from groktrace.run.collect import collect
from groktrace.run.samplers import trained_indices


class Numbers(Dataset):
    """The numbers below 100; those that were read are remembered."""

    def __init__(self):
        self.read = set()

    def __len__(self):
        return 100

    def __getitem__(self, i):
        self.read.add(int(i))
        return torch.tensor([float(i)])

    def __deepcopy__(self, memo):
        raise AssertionError("data sets may be large")


class Drawn(Sampler):
    """What a function gives, anew in each pass."""

    def __init__(self, draw, dataset=None):
        self.draw, self.dataset, self.passes = draw, dataset, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.draw())


class Epochs(Drawn):
    """A larger part of the data in each pass."""

    def __iter__(self):
        self.passes += 1
        return iter(range(10 * self.passes))


def forever(draw):
    while True:
        yield from draw()


def shuffled(n):
    return torch.randperm(n).tolist()


DATA = Numbers()


def loader(sampler, size=8, **settings):
    return DataLoader(DATA, batch_size=size, sampler=sampler, **settings)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (DataLoader(DATA, batch_size=8), range(100)),
        (DataLoader(DATA, batch_size=8, shuffle=True), range(100)),
        (DataLoader(DATA, batch_size=8, drop_last=True), range(96)),
        (DataLoader(DATA, batch_size=8, shuffle=True, drop_last=True), range(100)),
        (DataLoader(DATA, batch_size=101, shuffle=True, drop_last=True), ()),
        (loader(SubsetRandomSampler(range(20, 50))), range(20, 50)),
        (loader(SubsetRandomSampler(torch.arange(30))), range(30)),
        (loader(SubsetRandomSampler(range(30)), drop_last=True), range(30)),
        (loader(RandomSampler(DATA, replacement=True, num_samples=10)), range(100)),
        (loader(RandomSampler(DATA, num_samples=10)), range(100)),
        (loader(RandomSampler(range(60))), range(60)),
        (loader(SequentialSampler(range(30)), drop_last=True), range(24)),
        (loader(WeightedRandomSampler([0.5] * 100, 100)), range(100)),
        (loader(WeightedRandomSampler([0.0] * 50 + [2.0] * 50, 10)), range(50, 100)),
        (loader(WeightedRandomSampler([1.0, 2.0, 0.0, 4.0], 3, replacement=False)), [0, 1, 3]),
        (loader(DistributedSampler(DATA, 4, 1)), range(100)),
        (loader(DistributedSampler(DATA, 3, 1, shuffle=False)), range(100)),
        (loader(DistributedSampler(DATA, 3, 1, shuffle=False, drop_last=True)), range(99)),
        (loader(DistributedSampler(DATA, 4, 1, shuffle=False), drop_last=True), range(96)),
        (loader([5, 3, 1]), [5, 3, 1]),
        (loader([5, 3, 1, 0, 2], 2, drop_last=True), [5, 3, 1, 0]),
        (loader(range(20, 50)), range(20, 50)),
        (loader(Drawn(lambda: [i + 10 for i in shuffled(30)], DATA)), range(10, 40)),
        (loader(Drawn(lambda: torch.randperm(30))), range(30)),
        (loader(Drawn(lambda: random.sample(range(30), 30))), range(30)),
        (loader(Drawn(lambda: np.random.permutation(30).tolist()), drop_last=True), range(30)),
        (loader(Drawn(lambda: forever(lambda: shuffled(60)))), range(60)),
        (loader(Drawn(lambda: forever(lambda: shuffled(100)))), range(100)),
        (DataLoader(DATA, batch_sampler=BatchSampler(SubsetRandomSampler(range(30)), 8, False)), range(30)),
        (DataLoader(DATA, batch_sampler=BatchSampler(range(30), 8, True)), range(24)),
        (DataLoader(DATA, batch_sampler=[[0, 1], [5, 6], [9]]), [0, 1, 5, 6, 9]),
        (DataLoader(DATA, batch_sampler=Drawn(lambda: torch.randperm(30).view(5, 6).tolist())), range(30)),
    ],
)
def test_what_is_trained_on(given, expected):
    assert list(trained_indices(given, "train")) == list(expected)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (loader(WeightedRandomSampler([1.0] * 50 + [2.0] * 50, 100)), "WeightedRandomSampler, draws some samples more"),
        (loader(Drawn(lambda: random.sample(range(100), 40))), "Drawn, gives other samples in each pass"),
        (loader(Drawn(lambda: [0, 1, 1])), "Drawn, .*some of them repeatedly"),
        (loader(Drawn(lambda: forever(lambda: [random.randrange(60)]))), "Drawn, .*some of them repeatedly"),
        (loader(Epochs(None)), "Epochs, gives other samples in each pass"),
        (loader(Drawn(lambda: 1 / 0)), "Drawn, does not say which .*ZeroDivisionError"),
        (loader(iter(range(9))), r"Subset\(dataset, indices\) or as tensors"),
        (loader(i for i in range(9)), "generator, does not say which samples are trained on without being used up"),
        (DataLoader(DATA, batch_sampler=Drawn(lambda: [random.sample(range(100), 8)])), "Drawn, gives other samples"),
    ],
)
def test_samples_that_are_not_equally_likely_or_unknown_are_refused(given, name):
    with pytest.raises(TaskError, match=f"train: its sampler, a .*{name}"):
        trained_indices(given, "train")


def test_held_out_samples_are_not_read():
    data = Numbers()
    batch, n = collect(DataLoader(data, sampler=SubsetRandomSampler(range(30)), batch_size=4), "train", 100, 0)
    assert n == 30
    assert sorted(batch.tensors[0].flatten().tolist()) == list(range(30))
    assert max(data.read) == 29


def test_a_part_of_what_is_trained_on():
    batch, n = collect(DataLoader(Numbers(), sampler=SubsetRandomSampler(range(50, 80)), batch_size=4), "train", 10, 0)
    values = batch.tensors[0].flatten().tolist()
    assert n == 30
    assert len(set(values)) == 10
    assert min(values) >= 50
    assert max(values) < 80


def test_a_loader_without_a_whole_batch_trains_on_nothing():
    with pytest.raises(TaskError, match="val: expected at least one sample, got an empty set"):
        collect(DataLoader(DATA, batch_size=101, drop_last=True), "val", 100, 0)


def test_samplers_and_generators_stay_as_they_are():
    generator = torch.Generator().manual_seed(5)
    held = Drawn(lambda: [0])
    held.generator = generator
    curriculum = Epochs(None)
    state = generator.get_state(), torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    trained_indices(DataLoader(DATA, batch_size=4, shuffle=True, generator=generator), "train")
    trained_indices(loader(held), "train")
    with pytest.raises(TaskError):
        trained_indices(loader(curriculum), "train")
    assert (held.passes, curriculum.passes) == (0, 0)
    assert torch.equal(generator.get_state(), state[0])
    assert torch.equal(torch.get_rng_state(), state[1])
    assert random.getstate() == state[2]
    assert np.random.get_state()[1].tolist() == state[3]


def test_a_sampler_with_its_own_generator_gives_one_order():
    class Seeded(Sampler):
        def __init__(self):
            self.generator = torch.Generator().manual_seed(5)

        def __iter__(self):
            return iter(torch.randperm(30, generator=self.generator).tolist())

    sampler = Seeded()
    state = sampler.generator.get_state()
    assert list(trained_indices(loader(sampler), "train")) == list(range(30))
    assert torch.equal(sampler.generator.get_state(), state)


def test_accelerate_splits_batches_among_processes_that_train_together():
    shard = pytest.importorskip("accelerate.data_loader").BatchSamplerShard
    inner = BatchSampler(SubsetRandomSampler(range(30)), 5, False)
    assert list(trained_indices(DataLoader(DATA, batch_sampler=shard(inner, 2, 1)), "train")) == list(range(30))
