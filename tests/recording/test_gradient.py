import torch
from torch import nn

from groktrace.recording.gradient import UsedGradient, shared_parameters


def of_two():
    small, large = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(3))
    return small, large, torch.optim.SGD([large, small], lr=0.1), torch.optim.Adam([large])


def test_shared_parameters_are_the_smallest_first():
    small, large, both, one = of_two()
    assert [id(p) for p in shared_parameters(both, torch.optim.SGD([large, small]))] == [id(small), id(large)]
    assert [id(p) for p in shared_parameters(both, one)] == [id(large)]


def test_a_gradient_serves_another_optimizer_until_it_changes():
    _, large, both, one = of_two()

    def used():
        large.grad = torch.ones(3)
        return UsedGradient(both, [large])

    assert used().serves(one)
    assert not used().serves(both)
    assert not used().serves(torch.optim.SGD([nn.Parameter(torch.ones(3))]))
    written, replaced, gone = used(), used(), used()
    large.grad = written._gradient
    large.grad.add_(1)  # as a backward pass that accumulates does
    assert not written.serves(one)
    large.grad = replaced._gradient.clone()
    assert not replaced.serves(one)
    large.grad = None
    assert not gone.serves(one)


def test_without_a_gradient_that_is_counted_nothing_is_known():
    _, large, both, one = of_two()
    assert not UsedGradient(both, [large]).serves(one)
    with torch.inference_mode():
        large.grad = torch.ones(3)
    assert not UsedGradient(both, [large]).serves(one)
