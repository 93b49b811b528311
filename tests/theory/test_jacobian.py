import copy

import pytest
import torch
from torch import nn

from groktrace.errors import SettingsError
from groktrace.theory import (
    deep_linear_llc,
    jacobian_rank,
    lazy_feature_llc,
    linearised_llc,
    modular_addition_llc,
    quadratic_llc,
)


class Quadratic(nn.Module):
    def __init__(self, d, p, K):
        super().__init__()
        self.W, self.V = nn.Parameter(torch.randn(d, K)), nn.Parameter(torch.randn(p, K))

    def forward(self, x):
        return (x @ self.W).square() @ self.V.T


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pairs(p, keep=None):
    """One-hot pairs; a random subset in which every symbol occurs, if `keep` says how many."""
    index = torch.arange(p * p)
    x = torch.cat([torch.eye(p)[index // p], torch.eye(p)[index % p]], dim=1)
    if keep is None:
        return x
    while True:
        subset = x[torch.randperm(len(x))[:keep]]
        if torch.linalg.matrix_rank(subset) == 2 * p - 1:
            return subset


def dense(model, x, centred=False):
    """J by one backward pass per output, as the model stands."""
    model = copy.deepcopy(model).double().eval()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    rows = []
    for value in model(x.double()).reshape(-1):
        gradients = torch.autograd.grad(value, weights, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([gradient.reshape(-1) for gradient in gradients]))
    J = torch.stack(rows).reshape(len(x), -1, len(rows[0]))
    return (J - J.mean(0) if centred else J).flatten(0, 1)


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


@pytest.mark.parametrize(
    ("p", "K", "rank"),
    [
        (5, 1, 13),
        (5, 2, 26),
        (5, 4, 52),
        (5, 8, 104),
        (5, 12, 120),
        (5, 20, 120),
        (7, 1, 19),
        (7, 4, 76),
        (7, 12, 228),
        (7, 20, 336),
    ],
)
def test_modular_addition_on_all_pairs(p, K, rank):
    found = jacobian_rank(Quadratic(2 * p, p, K), pairs(p), centred=True)
    assert found.rank == rank == 2 * modular_addition_llc(p, K).llc
    assert found.llc == rank / 2
    assert found.gap > 1e4
    assert (found.rows, found.parameters) == (p**3, 3 * p * K)


@pytest.mark.parametrize(("K", "rank"), [(4, 76), (12, 161)])
def test_modular_addition_on_a_part_of_the_pairs(K, rank):
    assert jacobian_rank(Quadratic(14, 7, K), pairs(7, 24), centred=True).rank == rank
    assert 2 * modular_addition_llc(7, K, 24).llc == rank


def test_near_saturation_the_closed_form_is_an_upper_bound():
    ranks = [jacobian_rank(Quadratic(14, 7, 8), pairs(7, 24), centred=True).rank for _ in range(5)]
    assert 2 * modular_addition_llc(7, 8, 24).llc == 152
    assert all(149 <= rank <= 152 for rank in ranks)
    assert min(ranks) < 152


@pytest.mark.parametrize(("K", "rank"), [(1, 14), (4, 56), (12, 168), (20, 275)])
def test_inputs_that_span_the_space(K, rank):
    assert jacobian_rank(Quadratic(10, 5, K), torch.randn(100, 10), centred=True).rank == rank
    assert 2 * quadratic_llc(10, 5, K).llc == rank


@pytest.mark.parametrize("n", [1, 5, 10])
@pytest.mark.parametrize("K", [1, 3, 6])
@pytest.mark.parametrize("centred", [True, False])
def test_few_samples(n, K, centred):
    found = jacobian_rank(Quadratic(10, 5, K), torch.randn(n, 10), centred=centred)
    assert found.rank == 2 * quadratic_llc(10, 5, K, n, centred=centred).llc


def test_lazy_features_and_linearised_models():
    model, x = Quadratic(6, 4, 9), torch.randn(7, 6)
    model.W.requires_grad_(False)
    found = jacobian_rank(model, x)
    assert found.parameters == 36
    assert found.llc == lazy_feature_llc(4, 7, 9).llc == linearised_llc(found.rank).llc == 14
    assert jacobian_rank(model, x, centred=True).llc == lazy_feature_llc(4, 6, 9).llc


def test_a_regular_point_of_a_deep_linear_network():
    # At a network whose map has the full rank 3, λ is half the dimension of the maps of that rank.
    model = nn.Sequential(nn.Linear(5, 3, bias=False), nn.Linear(3, 4, bias=False))
    assert jacobian_rank(model, torch.randn(20, 5)).llc == deep_linear_llc([5, 3, 4], 3).llc == 9


@pytest.mark.parametrize("samples", [3, 40])
@pytest.mark.parametrize("centred", [True, False])
def test_it_agrees_with_singular_values(samples, centred):
    # Fewer rows than weights (JJᵀ), and more (JᵀJ).
    model, x = mlp(), torch.randn(samples, 4)
    found = jacobian_rank(model, x, centred=centred)
    singular = torch.linalg.svdvals(dense(model, x, centred))
    singular = singular / singular[0]
    assert found.rank == int((singular > found.tolerance).sum())
    assert found.smallest_kept == pytest.approx(singular[found.rank - 1].item(), rel=1e-4)
    assert found.largest_dropped < found.tolerance < found.smallest_kept


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("samples", [6, 40, 200])
def test_little_memory_gives_the_same(samples, centred):
    model, x = mlp(), torch.randn(samples, 4)
    whole = jacobian_rank(model, x, centred=centred)
    least = 16 * min(whole.rows, whole.parameters) ** 2 + 8 * 3 * whole.parameters * centred
    for rows in (2, 3, 5):
        found = jacobian_rank(model, x, centred=centred, memory=least + rows * 32 * whole.parameters)
        assert found.rank == whole.rank
        assert found.smallest_kept == pytest.approx(whole.smallest_kept, rel=1e-6)
    with pytest.raises(SettingsError, match=r"memory: .* rows \(samples × outputs\) of 51 weights need at least .* kB"):
        jacobian_rank(model, x, centred=centred, memory=least)


def test_the_model_stays_as_it_is():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2))
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    flags = [part.training for part in model.modules()]
    x, state = torch.randn(9, 4), torch.get_rng_state()
    first = jacobian_rank(model, x)
    assert jacobian_rank(model, x) == first
    # Evaluation mode: the last layer sees all six features.
    assert first.smallest_kept > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in model.modules()] == flags
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(weight.grad is None and weight.dtype == torch.float32 for weight in model.parameters())


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(5, 3), nn.Linear(3, 2)

    def forward(self, x, token):
        return type("Output", (), {"logits": self.linear(x) + self.linear(self.embedding(token))})


def test_inputs_may_be_tensors_tuples_or_dicts():
    x, token = torch.randn(8, 3), torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    model = TwoInputs()
    by_position = jacobian_rank(model, (x, token))
    assert jacobian_rank(model, [x, token]) == by_position == jacobian_rank(model, {"token": token, "x": x})
    assert (by_position.rows, by_position.parameters) == (16, 23)


def test_one_output_may_come_without_an_axis():
    class Squeezed(nn.Linear):
        def forward(self, x):
            return super().forward(x).squeeze()

    assert jacobian_rank(Squeezed(4, 1), torch.randn(9, 4)).rank == 5


def test_models_that_cannot_be_stacked():
    class Branching(nn.Sequential):
        def forward(self, x):
            return super().forward(x) if x.sum().item() > -1e9 else x

    plain, x = mlp(), torch.randn(7, 4)
    expected, found = jacobian_rank(plain, x), jacobian_rank(Branching(*plain), x)
    assert found.rank == expected.rank
    assert found.smallest_kept == pytest.approx(expected.smallest_kept, rel=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on importing its compiler
def test_compiled_models():
    model, x = mlp(), torch.randn(7, 4)
    assert jacobian_rank(torch.compile(model, backend="eager"), x) == jacobian_rank(model, x)


def test_outputs_that_ignore_weights():
    class Constant(nn.Linear):
        def forward(self, x):
            return x if x.sum().item() < 1e9 else super().forward(x)

    assert jacobian_rank(Constant(4, 4), torch.randn(3, 4)).rank == 0
    idle = nn.Sequential(mlp(), nn.Identity())
    idle[1].weight = nn.Parameter(torch.randn(5))
    found = jacobian_rank(idle, torch.randn(7, 4))
    assert (found.parameters, found.rank) == (51 + 5, 21)


def test_tied_weights_count_once():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False))
    model[2].weight = model[0].weight
    found = jacobian_rank(model, torch.randn(20, 3))
    assert (found.parameters, found.rank) == (9, 9)


def test_attention():
    model = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    x = torch.randn(3, 5, 4)
    found = jacobian_rank(model, x)
    singular = torch.linalg.svdvals(dense(model, x))
    assert found.rank == int((singular > found.tolerance * singular[0]).sum())


def test_what_centring_leaves_of_constant_derivatives_is_nothing():
    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.rand(3))

        def forward(self, x):
            return x + (0.1 + self.shift).exp()

    x = torch.randn(11, 3)
    assert jacobian_rank(Shift(), x).rank == 3
    found = jacobian_rank(Shift(), x, centred=True)
    assert (found.rank, found.smallest_kept, found.llc) == (0, 0.0, 0.0)


def test_a_tolerance_of_ones_own():
    class ScaleChanged(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x * self.weight

    x = torch.diag(torch.tensor([1.0, 1e-3, 1e-6]))
    assert jacobian_rank(ScaleChanged(), x).rank == 3
    found = jacobian_rank(ScaleChanged(), x, tolerance=1e-4)
    assert (found.rank, found.tolerance) == (2, 1e-4)
    assert found.smallest_kept == pytest.approx(1e-3)
    assert found.largest_dropped == pytest.approx(1e-6)
    assert found.gap == pytest.approx(1e3)
    assert found.to_dict()["llc"] == 1


class ComplexScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, dtype=torch.complex64))

    def forward(self, x):
        return (x * self.weight).abs()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: jacobian_rank(mlp().requires_grad_(False), x), "model: expected trainable weights, got none"),
        (lambda x: jacobian_rank(ComplexScale(), x), "model: expected real weights, got complex ones"),
        (lambda x: jacobian_rank(mlp(), x[:, :3]), "inputs: the model, in float64, fails on the first sample"),
        (lambda x: jacobian_rank(mlp(), (x, x)), r"TypeError.*give a tensor for model\(x\)"),
        (lambda x: jacobian_rank(mlp(), x.tolist()), "inputs: expected a tensor, or a tuple or dict.*, got list"),
        (lambda x: jacobian_rank(mlp(), (x, x[:2])), r"equally many and at least one, got \[5, 2\]"),
        (lambda x: jacobian_rank(mlp(), x[:0]), r"equally many and at least one, got \[0\]"),
        (lambda x: jacobian_rank(mlp(), {}), r"equally many and at least one, got \[\]"),
        (lambda x: jacobian_rank(mlp(), x * torch.inf), "expected finite derivatives on the inputs"),
        (lambda x: jacobian_rank(nn.LSTM(4, 3), x), "model: expected one real tensor as its output, got tuple"),
        (lambda x: jacobian_rank(nn.Linear(4, 0), x), "model: expected at least one output a sample, got none"),
        (
            lambda x: jacobian_rank(mlp(), x, tolerance=1e-9),
            r"tolerance: expected a number from 1\.5e-08, .* got 1e-09",
        ),
        (lambda x: jacobian_rank(mlp(), x, memory=-1), "memory: expected a positive number of bytes, got -1"),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
def test_bad_input_is_named(call, message):
    with pytest.raises(SettingsError, match=message):
        call(torch.randn(5, 4))
