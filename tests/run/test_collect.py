import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate

from groktrace.errors import TaskError
from groktrace.run.collation import random_samples_note
from groktrace.run.collect import collect

X, Y = torch.arange(20.0).reshape(10, 2), torch.arange(10)


class Augmented(Dataset):
    """Ten samples, each with a draw from every generator a script may use."""

    def __len__(self):
        return 10

    def __getitem__(self, i):
        noise = torch.tensor([random.random(), float(np.random.rand()), float(torch.rand(()))])
        return X[i] + noise[:2] + noise[2], int(Y[i])


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
        (iter([(X, Y)]), "got list_iterator, which reading would use up; give list"),
        ((X.numpy(), Y), "data: expected tensors in tuples, lists or dicts, got ndarray"),
        ([1, 2], "data: expected tensors in tuples, lists or dicts, got int"),
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


PIECES = [(X[i], Y[i]) for i in range(10)]
SERIES = [(torch.arange(6) + i, torch.arange(1, 7) + i) for i in range(5)]
STACKED = torch.stack([x for x, _ in SERIES]), torch.stack([y for _, y in SERIES])
JOINED = torch.cat([x for x, _ in SERIES]), torch.cat([y for _, y in SERIES])


def axes(*expected):
    """A model and loss that take inputs with these numbers of axes."""
    return lambda batch: batch.tensors[0].ndim in expected


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (PIECES, (X, Y)),
        (PIECES[:1], (X[:1], Y[:1])),
        ([[x, y] for x, y in PIECES], (X, Y)),
        ([{"x": x, "y": {"label": y}} for x, y in PIECES], {"x": X, "y": {"label": Y}}),
        ([(x, int(y)) for x, y in PIECES], (X, Y)),
        ([(x.numpy(), y.numpy()) for x, y in PIECES], (X, Y)),
        ([(float(i), float(2 * i)) for i in range(5)], (torch.arange(5.0), 2 * torch.arange(5.0))),
        ([(X[i], X[i, :1]) for i in range(10)], (X, X[:, :1])),
        ([(torch.full((3, 4, 4), i), torch.tensor([i])) for i in (1, 2)],
         (torch.stack([torch.full((3, 4, 4), i) for i in (1, 2)]), torch.tensor([[1], [2]]))),
        ([(X[:4].numpy(), Y[:4].numpy()), (X[4:].numpy(), Y[4:].numpy())], (X, Y)),
        ([(Y[:4], Y[:4]), (Y[4:8], Y[4:8]), (Y[8:], Y[8:])], (Y, Y)),
        ([(Y, Y)], (Y, Y)),
    ],
)  # fmt: skip
def test_a_list_of_samples_or_batches_is_read_by_the_rule(data, expected):
    batch, n = collect(data, "train", 100, 0)
    assert same(batch.nested(), expected)
    assert n == len(batch)


@pytest.mark.parametrize(
    ("data", "fits", "expected"),
    [
        (SERIES, axes(2), STACKED),
        (SERIES, axes(1), JOINED),
        (SERIES[:1], axes(2), (STACKED[0][:1], STACKED[1][:1])),
        (SERIES[:1], axes(1, 2), (JOINED[0][:6], JOINED[1][:6])),
        ([(X, X), (X, X)], axes(2), (torch.cat([X, X]),) * 2),
        ([(X, X), (X, X)], axes(2, 3), (torch.cat([X, X]),) * 2),
        ([(X, X), (X, X)], axes(3), (torch.stack([X, X]),) * 2),
        ([(X[0], X[0, :1])], axes(2), (X[:1], X[:1, :1])),
    ],
)
def test_the_loss_decides_where_only_one_reading_fits_it(data, fits, expected):
    batch, n = collect(data, "train", 100, 0, fits)
    assert same(batch.nested(), expected)
    assert n == len(batch)


@pytest.mark.parametrize("fits", [None, axes(1, 2), axes(3)])
@pytest.mark.parametrize("data", [SERIES, SERIES[:2]])
def test_a_list_that_may_be_either_is_refused(data, fits):
    with pytest.raises(
        TaskError, match=r"train: each entry .* one length \(6\).* torch.stack and of batches by torch.cat"
    ):
        collect(data, "train", 100, 0, fits)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([(Y[:3], Y[:3]), (Y[:5], Y[:5]), (Y[:4], Y[:4])], r"train: each entry of the list .* one length \(3 to 5\)"),
        ([Y] * 9, r"train: a list of 9 tensors of shape \(10,\) may be one of samples or one of batches; torch.stack"),
        # Samples on the second axis: time-first batches.
        ([(X.T, Y), (X.T, Y)], r"equally many samples, got \[2, 10\]; the first axis of every tensor is that of the s"),
        ([(X[0], Y[0]), (X[1, :1], Y[1])], "train: the samples of the list cannot be joined"),
        ([(X[0], "two")], "got str"),
    ],
)
def test_lists_that_cannot_be_read_are_named(data, message):
    with pytest.raises(TaskError, match=message):
        collect(data, "train", 100, 0)


@pytest.mark.parametrize(
    "view", [X.T.contiguous().T, X[:, :1].expand(10, 2), X.repeat(2, 1)[::2], torch.conj(X + 1j * X)]
)
def test_views_become_plain_tensors(view):
    (tensor,) = collect(view, "train", 100, 0)[0].tensors
    assert tensor.is_contiguous()
    assert not tensor.is_conj()
    assert torch.equal(tensor, view)


def padded(samples, first=True):
    rows = torch.nn.utils.rnn.pad_sequence([x for x, _ in samples], batch_first=first)
    return rows, torch.stack([y for _, y in samples])


RAGGED = [(torch.arange(1, 2 + i % 5), torch.tensor(i)) for i in range(20)]


def test_collation_may_pad():
    batch, n = collect(DataLoader(RAGGED, batch_size=4, collate_fn=padded), "train", 100, 0)
    assert n == 20
    assert batch.tensors[0].shape == (20, 5)
    assert torch.equal(batch.tensors[1], torch.arange(20))


def test_collation_may_use_its_samples_up():
    class Records(Dataset):
        def __len__(self):
            return 10

        def __getitem__(self, i):
            return {"x": X[i], "y": Y[i]}

    def popping(samples):
        targets = [sample.pop("y") for sample in samples]
        return {"x": torch.stack([sample["x"] for sample in samples]), "y": torch.stack(targets)}

    batch, _ = collect(DataLoader(Records(), batch_size=4, collate_fn=popping), "train", 100, 0)
    assert same(batch.nested(), {"x": X, "y": Y})


@pytest.mark.parametrize("count", [1, 2])
def test_collation_of_few_samples(count):
    data = DataLoader(Subset(TensorDataset(X, Y), range(count)), collate_fn=padded)
    batch, n = collect(data, "val", 100, 0)
    assert (n, len(batch)) == (count, count)


@pytest.mark.parametrize(
    ("collate", "message"),
    [
        (
            lambda items: torch.stack([x for x, _ in items], 1),
            r"collate_fn makes axis 1 is that of the samples, of shape",
        ),
        (lambda items: torch.cat([torch.stack([x for x, _ in items])] * 2), "no axis is that of the samples"),
        (
            lambda items: {"x": torch.stack([x for x, _ in items]), "k": torch.tensor(3)},
            "in tensor 1 of what collate_fn",
        ),
        (lambda items: torch.stack([y for _, y in items if y % 2]), "no axis is that of the samples"),
        (lambda items: torch.stack([y for _, y in items if y < 8]), "one entry of each of 10 samples, got 8"),
        (lambda items: (torch.zeros(min(len(items), 4)), torch.zeros(len(items))), r"as collate_fn makes .* \[4, 10\]"),
    ],
)
def test_collation_that_puts_samples_elsewhere_or_drops_some_is_refused(collate, message):
    with pytest.raises(TaskError, match=f"train.*{message}"):
        collect(DataLoader(TensorDataset(X, Y), batch_size=4, collate_fn=collate), "train", 100, 0)


def test_samples_that_are_drawn_are_noticed():
    states = generator_states()
    for data in (
        Augmented(),
        DataLoader(Augmented(), batch_size=2),
        DataLoader(Augmented(), collate_fn=default_collate),
    ):
        note = random_samples_note(data, "val")
        assert note is not None
        assert note.startswith("val: the samples are drawn at random each time")
    masked = DataLoader(TensorDataset(X, Y), collate_fn=lambda items: torch.rand(len(items)))
    assert random_samples_note(masked, "train") is not None
    assert generator_states() == states


def test_samples_that_stay_are_passed_over_after_two_reads():
    class Counted(Dataset):
        reads = 0

        def __len__(self):
            return 1000

        def __getitem__(self, i):
            self.reads += 1
            return torch.tensor([float("nan"), i])

    data = Counted()
    assert random_samples_note(data, "train") is None
    assert data.reads == 4
    for other in ((X, Y), PIECES, {"x": X}, DataLoader(TensorDataset(X, Y)), DataLoader(RAGGED, collate_fn=padded)):
        assert random_samples_note(other, "train") is None


@pytest.mark.parametrize("data", [[(X, Y)] * 3, (X, Y), TensorDataset(X, Y)])
def test_the_true_number_of_samples_may_be_given(data):
    batch, n = collect(data, "train", 4, 0, n=1000)
    assert (len(batch), n) == (4, 1000)
    with pytest.raises(TaskError, match=r"n: expected .* at least the (10|30) that it holds, got 5; leave n out"):
        collect(data, "train", 4, 0, n=5)
