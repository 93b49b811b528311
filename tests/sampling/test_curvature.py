from dataclasses import replace

import pytest
import torch
from torch import nn

from groktrace.run.task import Task
from groktrace.sampling import curvature
from groktrace.sampling.curvature import difference_product, gaussian_start, hessian_operator, lanczos, top_eigenvalue
from groktrace.sampling.large import top_eigenvalue_large
from groktrace.sampling.network import LargeNetwork
from groktrace.sampling.posterior import StackedLoss
from groktrace.sampling.weights import WeightLayout


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    train = (torch.randn(30, 4), torch.randn(30, 2))
    task = Task.from_model(model, loss="mse", train=train)
    layout = WeightLayout(*zip(*[(name, tuple(p.shape)) for name, p in model.named_parameters()], strict=True))
    flat = torch.stack([layout.flatten(dict(model.named_parameters())).detach() * scale for scale in (1.0, 1.5)])
    return StackedLoss(task.forward, layout, train, {}), flat


def exact_hessians(loss, flat):
    return torch.stack([torch.autograd.functional.hessian(lambda w: loss.losses(w[None])[0], row) for row in flat])


def test_products_agree_with_the_exact_hessian():
    loss, flat = network()
    v = torch.randn(flat.shape, generator=torch.Generator().manual_seed(1))
    v /= v.norm(dim=1, keepdim=True)
    exact = torch.einsum("rij,rj->ri", exact_hessians(loss, flat), v)
    found = difference_product(loss, flat, loss.gradients(flat)[1], v)
    torch.testing.assert_close(found, exact, rtol=0, atol=3e-3 * float(exact.norm()))


def by_differences_alone(monkeypatch):
    monkeypatch.setattr(StackedLoss, "has_second_derivatives", lambda *_: False)


@pytest.mark.parametrize("seed", range(4))
def test_the_top_eigenvalue_is_that_at_the_weights_and_not_some_way_off(confident_classifier, monkeypatch, seed):
    loss, flat, exact = confident_classifier
    start = torch.randn(flat.shape, generator=torch.Generator().manual_seed(seed))
    assert float(top_eigenvalue(loss, flat, start)) == pytest.approx(float(exact), rel=1e-3)
    by_differences_alone(monkeypatch)
    assert not 0.7 < float(top_eigenvalue(loss, flat, start)) / exact < 1.4  # or the test shows nothing


def test_differences_that_agree_among_themselves_are_checked_by_smaller_ones(confident_classifier):
    loss, flat, exact = confident_classifier
    along = torch.tensor([[1.0, 0.0, 0.0, 0.0]])  # an eigenvector, that all differences keep to
    assert float(top_eigenvalue(loss, flat, along)) == pytest.approx(float(exact), rel=1e-3)


def test_rows_are_checked_one_by_one(confident_classifier, monkeypatch):
    loss, flat, exact = confident_classifier
    both = torch.cat([flat, flat * torch.tensor([1.0, 1.0, 1.0, 0.0])])
    start = torch.randn(both.shape, generator=torch.Generator().manual_seed(0))
    found = top_eigenvalue(loss, both, start)
    torch.testing.assert_close(found, exact.expand(2), rtol=0.02, atol=0)
    # Differences do for the second, whatever it is stacked with.
    by_differences_alone(monkeypatch)
    assert float(found[1]) == float(top_eigenvalue(loss, both[1:], start[1:]))


def test_products_are_exact_where_there_are_second_derivatives(confident_classifier):
    loss, flat, _ = confident_classifier
    v = torch.nn.functional.normalize(torch.randn(flat.shape, generator=torch.Generator().manual_seed(1)))
    expected = torch.einsum("rij,rj->ri", exact_hessians(loss, flat), v)
    torch.testing.assert_close(hessian_operator(loss, flat)(v), expected, rtol=1e-4, atol=1e-9)


class Once(torch.autograd.Function):
    """x², whose gradient has none."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        (x,) = ctx.saved_tensors
        return 2 * x * upstream


def test_without_second_derivatives_differences_do():
    layout = WeightLayout(("w",), ((2,),))
    flat = torch.tensor([[1.0, 2.0]])
    loss = StackedLoss(lambda w, _: (3 * Once.apply(w["w"]).sum(), None), layout, (torch.ones(1),), {}).probe(flat)
    assert not loss.has_second_derivatives(flat)
    assert float(top_eigenvalue(loss, flat, torch.ones(1, 2))) == pytest.approx(6, rel=1e-2)
    torch.testing.assert_close(
        hessian_operator(loss, flat)(torch.eye(2)[:1]), 6 * torch.eye(2)[:1], rtol=1e-2, atol=1e-2
    )


def test_a_linear_loss_has_no_curvature():
    layout, flat = WeightLayout(("w",), ((2,),)), torch.tensor([[1.0, 2.0]])
    loss = StackedLoss(lambda w, _: (w["w"].sum(), None), layout, (torch.ones(1),), {}).probe(flat)
    assert loss.has_second_derivatives(flat)
    assert not hessian_operator(loss, flat)(torch.eye(2)[:1]).any()


def test_top_eigenvalue_comes_from_below_within_one_percent():
    loss, flat = network()
    exact = torch.linalg.eigvalsh(exact_hessians(loss, flat)).abs().amax(1)
    found = top_eigenvalue(loss, flat, torch.randn(flat.shape, generator=torch.Generator().manual_seed(2)))
    assert ((found / exact) > 0.99).all()
    assert ((found / exact) < 1.01).all()


def test_a_flat_loss_has_no_curvature(bowl):
    loss = bowl([0.0, 0.0, 0.0])
    assert top_eigenvalue(loss, torch.zeros(1, 3, dtype=torch.float64), torch.ones(1, 3, dtype=torch.float64)) == 0


FLAT = {
    "probabilities": lambda outputs: torch.softmax(outputs, -1).sum(-1).mean(),
    "norms": lambda outputs: nn.functional.normalize(outputs, dim=-1).square().sum(-1).mean(),
}
# A loss of one and more beside the curvature along weights of a tenth.
SMALL_WEIGHTS = {"a loss beside small weights": lambda outputs: 1 + (outputs - 0.1).square().mean()}


@pytest.mark.parametrize("name", [*FLAT, *SMALL_WEIGHTS])
@pytest.mark.parametrize("evaluated", ["whole", "sampled", "large"])
@pytest.mark.parametrize("seed", range(3))
def test_rounding_is_no_curvature(name, evaluated, seed):
    torch.manual_seed(seed)
    x, flat = torch.randn(500, 4), 0.1 * torch.randn(1, 12)

    def forward(weights, tensors):
        return (FLAT | SMALL_WEIGHTS)[name](tensors[0] @ weights["w"]), None

    layout = WeightLayout(("w",), ((4, 3),))
    loss = StackedLoss(forward, layout, (x,), {}, sample_bytes=64 if evaluated == "sampled" else None)
    if evaluated == "large":
        network = LargeNetwork(replace(loss, micro_batch=100, is_sample_mean=True), layout.unflatten(flat[0]))
        found = top_eigenvalue_large(network, torch.Generator().manual_seed(0))
    else:
        found = float(top_eigenvalue(loss.probe(flat), flat, torch.randn(1, 12)))
    if name in FLAT:
        assert found == 0
    else:
        assert found == pytest.approx(float(torch.linalg.eigvalsh(2 / 3 * x.T @ x / 500).max()), rel=0.1)


def test_curvature_at_the_origin_of_weight_space(bowl):
    found = top_eigenvalue(bowl([1.0, 7.0]), torch.zeros(1, 2).double(), torch.ones(1, 2).double())
    torch.testing.assert_close(found, torch.tensor([7.0]).double(), rtol=1e-3, atol=0)


def test_products_go_on_until_the_largest_eigenvalue_has_settled_in_each_row(bowl):
    """Of many dimensions a random start has little of the stiffest direction; six products do not find it."""
    curvatures = torch.cat([torch.linspace(0, 1, 3999), torch.tensor([1.4])]).double()
    loss = replace(bowl(curvatures.tolist()), sample_bytes=1)
    weights = torch.full((4, 4000), 0.01).double()
    starts = torch.randn(4, 4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    starts[:, -1] *= 0.1  # one product adds less than 1 % in two of them before it is found
    assert (top_eigenvalue(loss, weights, starts, 6) < 0.9 * 1.4).any()
    found = top_eigenvalue(loss, weights, starts, 6, rtol=0.01, max_iterations=24)
    torch.testing.assert_close(found, torch.full((4,), 1.4).double(), rtol=0.02, atol=0)
    for row in range(4):
        alone = top_eigenvalue(loss, weights[row : row + 1], starts[row : row + 1], 6, rtol=0.01, max_iterations=24)
        torch.testing.assert_close(alone, found[row : row + 1], rtol=1e-9, atol=0)
    assert (top_eigenvalue(loss, weights, starts, 6, rtol=0.01, max_iterations=7) < 0.9 * 1.4).any()


@pytest.mark.parametrize("sampled", [True, False])
def test_kinks_between_two_places_are_no_curvature(kinked, sampled, monkeypatch):
    """Differences across them tell of more, the shorter they are."""
    loss, flat, exact = kinked(sampled)
    start = torch.randn(flat.shape, generator=torch.Generator().manual_seed(0))
    lengths = 6, None, 0.01, 24
    found = top_eigenvalue(loss, flat, start, *lengths)
    torch.testing.assert_close(found, exact, rtol=0.02, atol=0)
    for row in range(2):
        alone = top_eigenvalue(loss, flat[row : row + 1], start[row : row + 1], *lengths)
        torch.testing.assert_close(alone, found[row : row + 1], rtol=1e-4, atol=0)
    by_differences_alone(monkeypatch)
    assert (top_eigenvalue(loss, flat, start, *lengths) > 1.2 * exact).any()  # or the test shows nothing


def start(loss, weights, *more):
    return gaussian_start(loss, weights, loss.gradients(weights), *more)[0]


def test_starts_have_the_covariance_of_the_gaussian_posterior(bowl):
    curvatures, nbeta, localization = [0.0, 2.0, 9.0], 3.0, 1.5
    normal = torch.randn(1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = start(bowl(curvatures), torch.zeros(1, 3).double(), normal, nbeta, localization)
    # Three products span a space of three dimensions.
    expected = normal / (nbeta * torch.tensor(curvatures).double() + localization).sqrt()
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0)


def test_few_products_come_near_the_gaussian_posterior_of_many_dimensions(bowl):
    curvatures = torch.linspace(0, 1, 200).double() ** 3
    rows = torch.randn(64, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    found = start(bowl(curvatures.tolist()), torch.zeros(64, 200).double(), rows, 10.0, 1.0)
    energy = 0.5 * 10 * (curvatures * found.square()).sum(1).mean()
    exact = 0.5 * (10 * curvatures / (10 * curvatures + 1)).sum()
    # From w* itself it would be 0; from the flat directions' width everywhere, 3.6 times as much.
    torch.testing.assert_close(energy, exact, rtol=0.1, atol=0)


def test_starts_stay_where_the_loss_climbs_more_than_its_curvature_tells():
    def quartic(weights, tensors):
        return 100 * (weights["w"] ** 4).sum() + 0 * tensors[0].sum(), None

    loss = StackedLoss(quartic, WeightLayout(("w",), ((20,),)), (torch.zeros(1),), {})
    normal = torch.randn(8, 20, generator=torch.Generator().manual_seed(5))
    found = start(loss, torch.zeros(8, 20), normal, 50.0, 1.0)
    energy = 50 * 100 * (found**4).sum(1) + 0.5 * found.square().sum(1)
    assert (energy <= 1.25 * 0.5 * normal.square().sum(1)).all()
    assert (found.norm(dim=1) > 0).all()


def walls(stiff, quartic):
    """A bowl with these curvatures, and walls along its stiff directions."""

    def forward(weights, tensors):
        squares = stiff * weights["w"].square()
        return 0.5 * squares.sum() + quartic * squares.square().sum() + 0 * tensors[0].sum(), None

    return StackedLoss(forward, WeightLayout(("w",), ((len(stiff),),)), (torch.zeros(1),), {})


@pytest.mark.parametrize("quartic", [0.0, 100.0])
def test_a_start_descends_to_what_its_curvature_tells_and_stays_far_out_along_flat_directions(monkeypatch, quartic):
    stiff, nbeta = torch.cat([torch.full((40,), 10.0), torch.zeros(3960)]), 100.0
    loss, weights = walls(stiff, quartic), torch.zeros(8, 4000)
    normal = torch.randn(8, 4000, generator=torch.Generator().manual_seed(5))
    posterior = loss.gradients(weights), normal, nbeta, 1.0

    def climb(found):
        squares = stiff * found.square()
        return nbeta * (0.5 * squares.sum(1) + quartic * squares.square().sum(1))

    found, nearer = gaussian_start(loss, weights, *posterior)
    assert (climb(found) < 60).all()  # λ is 20 in the bowl, and walls may have 1 % of a nat a weight
    assert not nearer.any()
    torch.testing.assert_close(found[:, 40:], normal[:, 40:], rtol=0.05, atol=0.05)
    monkeypatch.setattr(curvature, "CURVATURE", replace(curvature.CURVATURE, start_descents=0, start_halvings=0))
    assert (climb(gaussian_start(loss, weights, *posterior)[0]) > 80).all() == (quartic > 0)


def test_what_no_descent_brings_down_is_drawn_nearer(monkeypatch):
    stiff, nbeta = torch.cat([torch.full((400,), 10.0), torch.zeros(3600)]), 100.0
    loss, weights = walls(stiff, 100.0), torch.zeros(2, 4000)
    normal = torch.randn(2, 4000, generator=torch.Generator().manual_seed(5))
    settings = replace(curvature.CURVATURE, start_descents=0)
    monkeypatch.setattr(curvature, "CURVATURE", settings)
    found, nearer = gaussian_start(loss, weights, loss.gradients(weights), normal, nbeta, 1.0)
    assert nearer.all()
    factors = normal[:, 400:] / found[:, 400:]
    torch.testing.assert_close(factors, factors[:, :1].round().expand_as(factors), rtol=0.02, atol=0)  # halved
    assert (factors > 1.9).all()


def test_products_that_are_not_symmetric_end_the_iteration():
    generator = torch.Generator().manual_seed(6)
    matrix = torch.randn(2, 20, 20, dtype=torch.float64, generator=generator)
    matrix = matrix + matrix.mT
    normal = torch.randn(2, 20, dtype=torch.float64, generator=generator)
    skew = torch.triu(torch.ones(20, 20).double()) * torch.tensor([1.0, 0.0]).double()[:, None, None]

    def products(changed, rows=slice(None)):
        return lanczos(lambda v: (changed[rows] @ v[:, :, None])[:, :, 0], normal[rows], 6, max_asymmetry=0.1)

    _, basis, asymmetry = products(matrix)
    assert len(basis) == 6
    assert (asymmetry < 1e-9).all()
    _, basis, asymmetry = products(matrix + 5 * skew)
    assert len(basis) == 6  # the second row goes on
    assert asymmetry[0] > 0.1
    assert asymmetry[1] < 1e-9
    _, basis, _ = products(matrix + 5 * skew, slice(1))
    assert len(basis) < 6


@pytest.mark.parametrize("twice", [True, False])
def test_starts_around_a_confident_classifier_follow_the_curvature_at_it(confident_classifier, monkeypatch, twice):
    loss, flat, top = confident_classifier
    localization = 100.0
    nbeta = 10 * localization / float(top)
    normal = torch.randn(flat.shape, generator=torch.Generator().manual_seed(4))
    if not twice:
        by_differences_alone(monkeypatch)
    found = start(loss, flat, normal, nbeta, localization)
    values, vectors = torch.linalg.eigh(exact_hessians(loss, flat)[0].double())
    shrunk = (nbeta * values + localization).rsqrt()
    expected = (vectors * shrunk) @ (vectors.T @ normal[0].double())
    # The loss slopes at the weights, so that the start may be drawn nearer; its direction stays.
    cosine = float(torch.nn.functional.cosine_similarity(found[0].double(), expected, dim=0))
    assert (cosine > 0.9999) == twice  # by differences alone it is wrong, or the test shows nothing
