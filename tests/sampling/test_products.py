"""Products by another way are the same."""

import pytest
import torch

from groktrace.sampling.products import FixedProduct, is_sparse

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


def test_what_is_dense_or_of_integers_is_multiplied_as_it_is():
    assert is_sparse(one_hot(30, 25))
    assert not is_sparse(one_hot(30, 5))
    assert not is_sparse(one_hot(30, 25).long())
    assert not is_sparse(one_hot(30, 25).bfloat16())
