"""Attention is fused where it can be, unfused where it must be, and the same either way."""

import threading

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as plain

from groktrace.attention import attention, twice_differentiable


@pytest.fixture
def heads():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 2, 5, 4, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}])
def test_fused_and_unfused_agree_with_pytorch(heads, options):
    expected = plain(*heads, **options)
    torch.testing.assert_close(attention(*heads, **options), expected)
    with twice_differentiable():
        torch.testing.assert_close(attention(*heads, **options), expected)


def test_a_mask_is_kept(heads):
    mask = torch.rand(5, 5, generator=torch.Generator().manual_seed(1)) > 0.3
    mask |= torch.eye(5, dtype=torch.bool)
    with twice_differentiable():
        torch.testing.assert_close(attention(*heads, mask), plain(*heads, mask))


def test_it_can_be_stacked_and_differentiated_twice(heads):
    stacked = torch.func.vmap(attention)(*heads)
    torch.testing.assert_close(stacked, plain(*heads))
    query = heads[0].clone().requires_grad_()

    def curvature():
        loss = attention(query, *heads[1:]).square().sum()
        (slope,) = torch.autograd.grad(loss, query, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), query)[0]

    with twice_differentiable():
        assert bool(curvature().any())
    with pytest.raises(RuntimeError):
        curvature()


def test_one_thread_does_not_decide_for_another(heads):
    """A backend chosen for the whole process would change the other's rounding."""
    found = []
    with twice_differentiable():
        thread = threading.Thread(target=lambda: found.append(attention(*heads)))
        thread.start()
        thread.join()
    assert torch.equal(found[0], attention(*heads))
