import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from groktrace.errors import TaskError
from groktrace.run.collect import collect

X, Y = torch.arange(20.0).reshape(10, 2), torch.arange(10)


class Augmented(Dataset):
    """Ten samples, each with a draw from every generator a script may use."""

    def __len__(self):
        return 10

    def __getitem__(self, i):
        noise = torch.tensor([random.random(), float(np.random.rand()), float(torch.rand(()))])
        return X[i] + noise[:2] + noise[2], int(Y[i])


class Streamed(IterableDataset):
    def __iter__(self):
        return iter([(X[0], Y[0])])

    def __len__(self):
        return 1


def same(left, right):
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and torch.equal(left, right)
    if type(left) is not type(right) or len(left) != len(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    return all(same(a, b) for a, b in zip(left, right, strict=True))


def generator_states():
    numpy_state = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), numpy_state[1].tolist(), numpy_state[2:]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ((X, Y), (X, Y)),
        ([X, Y], [X, Y]),
        (X, X),
        ({"x": X, "y": Y}, {"x": X, "y": Y}),
        (((X, X), Y), ((X, X), Y)),
        ([(X[:4], Y[:4]), (X[4:], Y[4:])], (X, Y)),
        ([[X[:4], Y[:4]], [X[4:], Y[4:]]], (X, Y)),
        ([{"x": X[:9]}, {"x": X[9:]}], {"x": X}),
        (TensorDataset(X, Y), (X, Y)),
        (Subset(TensorDataset(X, Y), [3, 1]), (X[[3, 1]], Y[[3, 1]])),
        (DataLoader(TensorDataset(X, Y), batch_size=3), (X, Y)),
        (DataLoader(TensorDataset(X, Y), batch_size=3, shuffle=True, drop_last=True), (X, Y)),
        (DataLoader(TensorDataset(X, Y), collate_fn=lambda items: {"x": torch.stack([x for x, _ in items])}), {"x": X}),
    ],
)
def test_data_of_any_form_become_one_batch(data, expected):
    batch, n = collect(data, "train", 100, 0)
    assert same(batch.nested(), expected)
    assert n == len(batch)


def test_the_batch_is_a_copy_apart_from_the_graph():
    x = X.clone().requires_grad_()
    batch, _ = collect((x, Y), "train", 100, 0)
    with torch.no_grad():
        x.zero_()
    assert torch.equal(batch.tensors[0], X)
    assert not batch.tensors[0].requires_grad


def test_all_forms_give_the_same_random_subset_and_the_true_n():
    forms = [(X, Y), [(X[:3], Y[:3]), (X[3:], Y[3:])], TensorDataset(X, Y), DataLoader(TensorDataset(X, Y))]
    batches = [collect(form, "train", 4, 1) for form in forms]
    assert [n for _, n in batches] == [10] * 4
    first = batches[0][0].nested()
    assert all(same(batch.nested(), first) for batch, _ in batches)
    x, y = first
    assert len(set(y.tolist())) == 4
    assert y.tolist() == sorted(y.tolist())
    assert torch.equal(x, X[y])
    assert len({tuple(collect((X, Y), "train", 4, seed)[0].tensors[1].tolist()) for seed in range(5)}) > 1


@pytest.mark.parametrize("cap", [10, 11])
def test_a_set_that_just_fits_is_kept_whole(cap):
    batch, n = collect((X, Y), "train", cap, 0)
    assert (len(batch), n) == (10, 10)
    assert torch.equal(batch.tensors[1], Y)


@pytest.mark.parametrize("wrap", [lambda data: data, DataLoader])
@pytest.mark.parametrize("cap", [4, 100])
def test_augmentation_neither_reads_nor_moves_the_global_generators(wrap, cap):
    before = generator_states()
    first, _ = collect(wrap(Augmented()), "train", cap, 3)
    assert generator_states() == before
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    assert same(collect(wrap(Augmented()), "train", cap, 3)[0].nested(), first.nested())


def test_generators_are_put_back_after_a_failure():
    class Failing(Augmented):
        def __getitem__(self, i):
            super().__getitem__(i)
            raise KeyError("lost")

    before = generator_states()
    with pytest.raises(KeyError, match="lost"):
        collect(Failing(), "train", 100, 0)
    assert generator_states() == before


def test_the_generators_of_gpus_are_not_seeded(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    collect(Augmented(), "train", 100, 0)
    assert seeded == []


def test_a_loader_in_use_goes_on_where_it_was():
    def batches(disturb):
        generator = torch.Generator().manual_seed(0)
        loader = DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True, generator=generator)
        iterator = iter(loader)
        seen = [next(iterator)[1].tolist()]
        if disturb:
            collect(loader, "train", 4, 0)
        return seen + [y.tolist() for _, y in iterator] + [y.tolist() for _, y in loader]

    assert batches(disturb=True) == batches(disturb=False)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((X, Y[:9]), r"train: inputs and targets must have equally many samples, got \[10, 9\]"),
        ([(X, Y[:9])], r"train: inputs and targets must have equally many samples, got \[10, 9\]"),
        ([(X, Y), (X, Y[:9])], r"train: inputs and targets must have equally many samples, got \[10, 9\]"),
        ((X, torch.tensor(1.0)), "train: every tensor needs the samples as its first axis"),
        ({"x": X, "weight": torch.tensor(1.0)}, "train: every tensor needs the samples as its first axis"),
        ((X[:0], Y[:0]), "train: expected at least one sample, got an empty set"),
        ([(X, Y), (X[:0], Y[:0])], "train: expected at least one sample, got an empty set"),
        (TensorDataset(X[:0], Y[:0]), "train: expected at least one sample, got an empty set"),
        (DataLoader(TensorDataset(X[:0])), "train: expected at least one sample, got an empty set"),
        ((), "train: expected at least one tensor, got none"),
        ([], "train: expected at least one tensor, got none"),
        ({}, "train: expected at least one tensor, got none"),
        ([()], "train: expected at least one tensor, got none"),
        ([(X, Y), {"x": X}], "train: the batches of the list are nested differently"),
        ([(X, Y), (X[:, :1], Y)], "train: the batches of the list cannot be joined"),
        (3, r"train: expected \(inputs, targets\) tensors, .* or a DataLoader over one, got int"),
        (iter([(X, Y)]), "got list_iterator"),
        ((X.numpy(), Y), "data: expected tensors in tuples, lists or dicts, got ndarray"),
        ([1, 2], "data: expected tensors in tuples, lists or dicts, got int"),
        (Streamed(), "a Dataset with a length, or a DataLoader over one, got Streamed"),
        (DataLoader(Streamed()), "a Dataset with a length, or a DataLoader over one, got DataLoader"),
        (DataLoader(TensorDataset(X, Y), batch_size=None), "a DataLoader with batch_size=None says nothing of samples"),
        (DataLoader(TensorDataset(X, Y), collate_fn=str), "data: expected tensors in tuples, lists or dicts, got str"),
        (
            DataLoader(Subset(TensorDataset(X, Y), range(2)), collate_fn=torch.stack),
            "train: the samples cannot be put into one batch",
        ),
    ],
)
def test_data_that_cannot_be_used_are_named(data, message):
    with pytest.raises(TaskError, match=message):
        collect(data, "train", 100, 0)


def test_samples_of_unequal_size_are_named():
    class Ragged(Augmented):
        def __getitem__(self, i):
            return torch.zeros(i + 1), i

    with pytest.raises(TaskError, match=r"val: the samples cannot be put into one batch \("):
        collect(Ragged(), "val", 100, 0)
