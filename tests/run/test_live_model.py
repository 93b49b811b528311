"""Snapshots put back into live networks: all of a snapshot, or nothing."""

import pytest
import torch
from torch import nn

import groktrace
from groktrace.errors import TaskError


class Tied(nn.Module):
    """A tied head, batch statistics, a complex weight, and buffers that a state_dict leaves out."""

    def __init__(self, size=3, tied=True):
        super().__init__()
        self.embedding = nn.Embedding(5, size)
        self.norm = nn.BatchNorm1d(size)
        self.head = nn.Linear(size, 5, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.phase = nn.Parameter(torch.randn(2, dtype=torch.complex64), requires_grad=False)
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.register_buffer("places", torch.arange(4.0)[None, :1].expand(3, 1), persistent=False)

    def forward(self, tokens):
        self.seen += self.training
        return self.head(self.norm(self.embedding(tokens))) + self.phase.real.sum() + 0 * self.places.sum()


def train(out, model, tokens):
    """A recorded training of two steps, three snapshots."""
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    with groktrace.watch(model, optimizer, train=(tokens, tokens), loss="cross_entropy", out=out, every=1):
        for _ in range(2):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(tokens), tokens).backward()
            optimizer.step()
    return groktrace.open_run(out)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run of a tied network, the network as the last snapshot holds it, and its inputs."""
    torch.manual_seed(0)
    model, tokens = Tied(), torch.randint(0, 5, (30,))
    return train(tmp_path_factory.mktemp("tied") / "run", model, tokens), model, tokens


def everything(model):
    return {name: tensor.clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def test_a_tied_network_becomes_what_it_was(trained):
    run, model, tokens = trained
    torch.manual_seed(1)
    other = Tied()
    head = other.head.weight
    run.snapshots[-1].load_into(other)
    for name, tensor in everything(model).items():
        assert torch.equal(tensor, everything(other)[name]), name
    assert other.seen == 2
    assert other.head.weight is head is other.embedding.weight
    assert torch.equal(other.eval()(tokens), model.eval()(tokens))
    run.snapshots[0].load_into(nn.DataParallel(torch.compile(other, backend="eager")))
    assert other.seen == 0
    assert not torch.equal(other.embedding.weight, model.embedding.weight)


def test_precision_and_gradients_stay_those_of_the_network(trained):
    run, model, _ = trained
    other = Tied().double().requires_grad_(False)
    run.snapshots[-1].load_into(other)
    assert other.embedding.weight.dtype == torch.float64
    assert torch.equal(other.embedding.weight, model.embedding.weight.double())
    assert not other.embedding.weight.requires_grad


def with_more():
    model = Tied()
    model.extra = nn.Linear(1, 1)
    return model


def with_less():
    model = Tied()
    del model.norm
    return model


def with_a_moved_place():
    model = Tied()
    model.places = (model.places[:1] + 1).expand(3, 1)
    return model


def of_whole_numbers():
    model = Tied()
    model.seen = torch.zeros((), dtype=torch.long)
    return model


def with_real_phase():
    model = Tied()
    model.phase = nn.Parameter(torch.zeros(2))
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Tied(4), r"'embedding.weight' is \[5, 4\] in the model, \[5, 3\] in the snapshot"),
        (lambda: Tied(tied=False), "the snapshot lacks 'head.weight'"),
        (with_more, "the snapshot lacks 'extra.weight', 'extra.bias'"),
        (with_less, "the model lacks 'norm.weight', 'norm.bias', 'norm.running_mean', .*, 'norm.num_batches_tracked'"),
        (of_whole_numbers, r"'seen' is torch\.int64 in the model, torch\.float32 in the snapshot"),
        (with_real_phase, r"'phase' is torch\.float32 in the model, torch\.complex64 in the snapshot"),
        (with_a_moved_place, "'places' is expanded"),
        (lambda: Tied().to("meta"), "'embedding.weight' is on 'meta' or sparse"),
        (lambda: nn.Sequential(*(nn.Linear(1, 1) for _ in range(5))), "the snapshot lacks '0.weight', .* and 5 more"),
    ],
)
def test_other_networks_are_refused_and_left_as_they_were(trained, make, message):
    run, _, _ = trained
    model = make()
    before = everything(model)
    with pytest.raises(TaskError, match=rf"{2:012d}\.safetensors: does not fit the model: .*{message}"):
        run.snapshots[-1].load_into(model)
    for name, tensor in everything(model).items():
        assert tensor.is_meta or torch.equal(tensor, before[name]), name


def test_lazy_modules_and_other_things_are_refused(trained):
    run, _, _ = trained
    model = Tied()
    model.head = nn.LazyLinear(5, bias=False)
    with pytest.raises(TaskError, match=r"'head.weight'"):
        run.snapshots[-1].load_into(model)
    with pytest.raises(TaskError, match=r"model: expected a torch\.nn\.Module, got OrderedDict"):
        run.snapshots[-1].load_into(model.state_dict())
