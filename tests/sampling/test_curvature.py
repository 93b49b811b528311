import torch
from torch import nn

from groktrace.run.task import Task
from groktrace.sampling.curvature import hessian_product, top_eigenvalue
from groktrace.sampling.posterior import StackedLoss, WeightLayout


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
    torch.testing.assert_close(hessian_product(loss, flat, v), exact, rtol=0, atol=2e-3 * float(exact.norm()))


def test_top_eigenvalue_comes_from_below_within_one_percent():
    loss, flat = network()
    exact = torch.linalg.eigvalsh(exact_hessians(loss, flat)).abs().amax(1)
    found = top_eigenvalue(loss, flat, torch.randn(flat.shape, generator=torch.Generator().manual_seed(2)))
    assert ((found / exact) > 0.99).all()
    assert ((found / exact) < 1.01).all()


def test_a_flat_loss_has_no_curvature(bowl):
    loss = bowl([0.0, 0.0, 0.0])
    assert top_eigenvalue(loss, torch.zeros(1, 3, dtype=torch.float64), torch.ones(1, 3, dtype=torch.float64)) == 0


def test_curvature_at_the_origin_of_weight_space(bowl):
    found = top_eigenvalue(bowl([1.0, 7.0]), torch.zeros(1, 2).double(), torch.ones(1, 2).double())
    torch.testing.assert_close(found, torch.tensor([7.0]).double(), rtol=1e-3, atol=0)
