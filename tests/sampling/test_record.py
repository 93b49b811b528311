"""What is written down of a function, and which products are taken another way."""

import pytest
import torch

from groktrace.sampling.products import TurnedProduct
from groktrace.sampling.record import CannotPlanError, Record, Recorder


def record(function, *arguments):
    with torch.no_grad(), Recorder(arguments) as recorder:
        results = function(*arguments)
    return Record(recorder, results)


def copied(product, memory_format=torch.contiguous_format):
    return product.mT.clone(memory_format=memory_format)


@pytest.mark.parametrize(
    ("function", "turned"),
    [
        (lambda product: (copied(product),), True),
        (lambda product: (copied(product) + 1,), True),
        (lambda product: (copied(product), product.sum(2)), False),
        (lambda product: (copied(product) + 1, product), False),
        (lambda product: (copied(product, torch.preserve_format).sum(),), False),
        (lambda product: (product.clone() + 1,), False),
        (lambda product: (copied(product[:, 1:]),), False),
    ],
    ids=["result", "intermediate", "read elsewhere", "a result itself", "strided", "not transposed", "a part"],
)
def test_products_are_turned_where_only_a_transposed_copy_is_read(function, turned):
    a, b = torch.randn(3, 20, 40), torch.randn(3, 40, 30)
    targets = [operation.target for operation in record(lambda a, b: function(torch.bmm(a, b)), a, b).operations]
    assert any(isinstance(target, TurnedProduct) for target in targets) == turned
    assert (torch.ops.aten.clone.default in targets) == (not turned)
    assert (torch.ops.aten.bmm.default in targets) == (not turned)


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="products are as they are without MKL")
@pytest.mark.parametrize(("rows", "turned"), [(18, False), (20, True)])
def test_products_whose_transposes_are_slow_are_copied(rows, turned):
    found = record(lambda a, b: (copied(torch.bmm(a, b)),), torch.randn(3, rows, 100), torch.randn(3, 100, 60))
    assert any(isinstance(operation.target, TurnedProduct) for operation in found.operations) == turned


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x + torch.randn_like(x),),
        lambda x: (x[x > 0],),
        lambda x: (x * x.sum().item(),),
        lambda x: (x.clone().add_(1),),
    ],
    ids=["random", "unknown size", "value", "in place"],
)
def test_what_cannot_be_repeated_is_refused(function):
    with pytest.raises(CannotPlanError):
        record(function, torch.ones(3))
