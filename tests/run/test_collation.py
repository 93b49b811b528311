"""Samples whose loss depends on those that they are collated with."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

import groktrace
from groktrace.run.task import Task

LENGTHS = [2 + i // 4 for i in range(40)]


@pytest.fixture
def sequences():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randint(1, 6, (n,), generator=generator), torch.tensor(n % 3)) for n in LENGTHS]


def padded(samples):
    return nn.utils.rnn.pad_sequence([x for x, _ in samples], batch_first=True), torch.stack([y for _, y in samples])


def standardised(samples):
    x = torch.stack([x[:2].float() for x, _ in samples])
    return (x - x.mean()) / (x.std() + 1), torch.stack([y for _, y in samples])


class Pool(nn.Module):
    """The mean of embedded tokens; of all of them, or of those that are no padding."""

    def __init__(self, masked):
        super().__init__()
        self.masked, self.embedding, self.output = masked, nn.Embedding(6, 4), nn.Linear(4, 3)

    def forward(self, x):
        weight = (x != 0).float() if self.masked else torch.ones_like(x, dtype=torch.float)
        pooled = (self.embedding(x) * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)
        return self.output(pooled)


def loader(samples, collate=padded):
    return DataLoader(samples, batch_size=4, collate_fn=collate)


def tokens_loss(model, batch):
    """Of the next token, with padding left out by its label."""
    x, _ = batch
    targets = torch.where(x[:, 1:] == 0, -100, x[:, 1:])
    return functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), targets.flatten())


def test_padding_that_the_model_reads_is_told_and_kept(sequences, tmp_path):
    torch.manual_seed(0)
    model = Pool(masked=False)
    optimizer, before = torch.optim.SGD(model.parameters(), 0.1), torch.get_rng_state()
    data = {"train": loader(sequences), "loss": "cross_entropy", "out": tmp_path / "run"}
    with pytest.warns(RuntimeWarning, match=r"train: collate_fn gives a sample another loss .* padded from \d+ to 11"):
        recorder = groktrace.watch(model, optimizer, **data)
    assert torch.equal(torch.get_rng_state(), before)
    recorder.close()
    (doubt,) = groktrace.open_run(tmp_path / "run").doubts
    assert doubt.startswith("step 0: train: collate_fn gives a sample another loss beside others than alone")
    # A training that goes on is told again, and the run keeps it once.
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.warns(RuntimeWarning, match="collate_fn gives a sample another loss"):
        groktrace.watch(model, optimizer, **data, start_step=1).close()
    assert len(groktrace.open_run(tmp_path / "run").doubts) == 1


def test_padding_that_the_model_leaves_out_is_no_news(sequences):
    Task.from_model(Pool(masked=True), train=loader(sequences), loss="cross_entropy")
    Task.from_model(nn.Sequential(nn.Embedding(6, 6)), train=loader(sequences), batch_loss=tokens_loss)


def test_statistics_of_a_batch_are_told(sequences):
    with pytest.warns(RuntimeWarning, match=r"train: collate_fn gives a sample another loss .* \(by [\d.e+]+ %\)"):
        Task.from_model(nn.Linear(2, 3), train=loader(sequences, standardised), loss="cross_entropy")


def test_samples_of_one_length_are_no_news(sequences):
    alike = [(x[:2], y) for x, y in sequences]
    Task.from_model(Pool(masked=False), train=loader(alike), loss="cross_entropy")
