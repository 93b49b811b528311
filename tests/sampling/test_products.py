"""Products by another way are the same."""

import pytest
import torch

from groktrace.sampling import products
from groktrace.sampling.products import (
    FixedProduct,
    GatheredProduct,
    GatheredTransposedProduct,
    NarrowProduct,
    TurnedProduct,
    is_narrow,
    is_sparse,
    is_sparse_gathered,
)

pytestmark = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="products are dense without MKL")


def mostly_zeros(rows, columns, dtype=torch.float32, seed=0):
    """Rows of none, one or two numbers."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.zeros(rows, columns, dtype=dtype)
    for row in range(1, rows):
        matrix[row, torch.randint(columns, (2,), generator=generator)] = 1.0 if row % 3 else -2.5
    return matrix


def one_hot(rows, columns):
    return torch.nn.functional.one_hot(torch.arange(rows) * 7 % columns, columns).float()


def stack(layout, shape, dtype=torch.float32):
    """Random matrices in one of the ways in which they lie in memory."""
    count, inner, width = shape
    generator = torch.Generator().manual_seed(3)

    def random(*sizes):
        return torch.randn(*sizes, dtype=dtype, generator=generator)

    if layout == "close":
        return random(*shape)
    if layout == "transposed":  # as the weights of a linear layer
        return random(count, width, inner).transpose(1, 2)
    if layout == "shared":
        return random(1, inner, width).expand(shape)
    between = {"rows between": 3 * width, "numbers between": 3 * width + 1}[layout]
    return random(count, inner * width + between)[:, 2 * width : (2 + inner) * width].view(shape)


LAYOUTS = ("close", "rows between", "numbers between", "transposed", "shared")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "count"), [(torch.float32, 4), (torch.float64, 4), (torch.float32, 1)])
def test_a_fixed_matrix_times_a_stack(layout, dtype, count):
    matrix, dense = mostly_zeros(30, 25, dtype), stack(layout, (count, 25, 6), dtype)
    product = FixedProduct(matrix, dense)
    out = torch.full((count, 30, 6), torch.nan, dtype=dtype)
    for _ in range(2):
        product(dense, out)
        torch.testing.assert_close(out, matrix @ dense)
        dense = dense.clone(memory_format=torch.preserve_format) if layout == "shared" else dense.mul_(-2)
    transposed = FixedProduct(matrix.T, dense := stack(layout, (count, 30, 6), dtype))
    transposed(dense, out := torch.full((count, 25, 6), torch.nan, dtype=dtype))
    torch.testing.assert_close(out, matrix.T @ dense)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("samples", [mostly_zeros(30, 25), one_hot(30, 25), torch.zeros(30, 25)])
@pytest.mark.parametrize("transposed", [False, True])
def test_rows_of_a_matrix_times_a_stack(layout, samples, transposed):
    dense = stack(layout, (4, 9 if transposed else 25, 6))
    out = torch.full((4, 25 if transposed else 9, 6), torch.nan)
    product = None
    for seed in range(3):
        index = torch.randint(30, (4, 9), generator=torch.Generator().manual_seed(seed))
        if product is None:
            product = (GatheredTransposedProduct if transposed else GatheredProduct)(samples, index, dense)
        product(index, dense, out)
        rows = samples[index]
        torch.testing.assert_close(out, torch.bmm(rows.transpose(1, 2) if transposed else rows, dense))


def test_what_is_dense_small_or_of_integers_is_multiplied_as_it_is():
    assert is_sparse(one_hot(30, 25))
    assert not is_sparse(one_hot(30, 5))
    assert not is_sparse(one_hot(30, 25).long())
    assert not is_sparse(one_hot(30, 25).bfloat16())
    enough = products.MIN_DENSE // 25
    assert is_sparse_gathered(one_hot(30, 25), 200, enough)
    assert not is_sparse_gathered(one_hot(30, 25), 200, enough - 1)
    assert not is_sparse_gathered(one_hot(30, 25), 100, enough)
    assert not is_sparse_gathered(torch.ones(30, 25), 200, enough)


@pytest.mark.parametrize(("left", "right"), [("close", "transposed"), ("transposed", "close")])
@pytest.mark.parametrize("columns", [3, 23])
def test_products_with_few_columns(left, right, columns):
    left, right = stack(left, (4, 70, 50)), stack(right, (4, 50, columns))
    product, out = NarrowProduct(left, right), torch.full((4, 70, columns), torch.nan)
    product(left, right, out)
    torch.testing.assert_close(out, torch.bmm(left, right))


def test_few_columns_are_those_that_have_slow_kernels():
    def narrow(columns, layout="close", shape=(4, 70, 1000), dtype=torch.float32):
        return is_narrow(stack(layout, shape, dtype), torch.ones(4, shape[2], columns, dtype=dtype))

    assert [columns for columns in range(1, 40) if narrow(columns)] == [
        each for each in range(17, 32) if each not in (20, 24, 28)
    ]
    assert [columns for columns in range(1, 17) if narrow(columns, "transposed")] == list(range(1, 16))
    assert not narrow(23, dtype=torch.float64)
    assert not narrow(23, shape=(4, 10, 10))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_turned_products_are_the_transposes(layout):
    left, right = stack("transposed", (3, 20, 12)), stack(layout, (3, 12, 9))
    out = torch.empty(3, 9, 20)
    TurnedProduct()(left, right, out)
    torch.testing.assert_close(out, (left @ right).mT)
