"""Stacks of products A_r·B_r on a processor, where the library's own way is a slow one.

Samples that are mostly zeros, as one-hot codes are, need no multiplications by zero: the products of a stack are one
product of the block-diagonal matrix of all A_r, in compressed rows, with the B_r below one another. And products with
few columns, as in a last layer, are quicker as products with few rows. What is here reads and writes the very memory
that the stack's products would, so that either can stand for the other.
"""

import warnings

import torch
from torch import Tensor

# In compressed rows a number takes about four times as long as one of many in a dense product.
MAX_DENSITY = 0.1
# Rows that are others at each call have to be looked up: it pays from so many numbers in each B_r, and so many
# multiplications in all.
MIN_DENSE = 30_000
MIN_WORK = 4_000_000
# Kernels are slow for weight gradients of fewer columns than the first, and between the two where the columns are no
# multiple of what the processor takes at once. A copy of the result pays from so many multiplications.
NARROW, UNEVEN, AT_ONCE = 16, 32, 4
MIN_NARROW_WORK = 200_000


def is_sparse(matrix: Tensor) -> bool:
    """Whether products with a matrix are quicker without its zeros, on this device."""
    return (
        matrix.device.type == "cpu"
        and torch.backends.mkl.is_available()
        and matrix.dtype in (torch.float32, torch.float64)
        and int(matrix.count_nonzero()) <= MAX_DENSITY * matrix.numel()
    )


def is_sparse_gathered(samples: Tensor, chosen: int, width: int) -> bool:
    """Whether products with rows of a matrix, others at each call, are quicker without its zeros.

    Args:
        samples: the matrix, [n, m].
        chosen: how many rows are taken.
        width: columns of what they are multiplied with, K.
    """
    size = samples.shape[1] * width
    return size >= MIN_DENSE and size * chosen >= MIN_WORK and is_sparse(samples)


def is_narrow(left: Tensor, right: Tensor) -> bool:
    """Whether a stack of products is quicker as the transposes of B_rᵀ·A_rᵀ, on this device.

    Args:
        left: the A_r, [R, n, m].
        right: the B_r, [R, m, K].
    """
    columns = right.shape[2]
    uneven = NARROW < columns < UNEVEN and columns % AT_ONCE != 0
    transposed = left.stride(1) == 1 and left.stride(2) > 1
    return (
        left.device.type == "cpu"
        and torch.backends.mkl.is_available()
        and left.dtype == torch.float32
        and (uneven or (transposed and columns < NARROW))
        and left.numel() * columns >= MIN_NARROW_WORK
    )


class FixedProduct:
    """A·B_r for one matrix A and a stack of B_r.

    Args:
        matrix: A, [n, m].
        dense: an example of the B_r, [R, m, K]; later ones lie in memory as this one does.
    """

    def __init__(self, matrix: Tensor, dense: Tensor) -> None:
        rows = _Rows(dense)
        row, column = matrix.nonzero(as_tuple=True)
        counts = torch.bincount(row, minlength=len(matrix)).repeat(len(dense))
        columns = (column + rows.begins[:, None]).flatten().int()
        self._blocks = _Blocks(rows, counts, columns, matrix[row, column].repeat(len(dense)))

    def __call__(self, dense: Tensor, out: Tensor) -> None:
        """Write the products into `out`, [R, n, K]."""
        self._blocks.multiply(dense, out)


class GatheredProduct:
    """A_r·B_r, where the rows of each A_r are rows of one matrix, others at each call.

    Args:
        samples: the matrix that rows are taken from, [n, m].
        index: an example of their numbers, [R, B].
        dense: an example of the B_r, [R, m, K]; later ones lie in memory as this one does.
    """

    def __init__(self, samples: Tensor, index: Tensor, dense: Tensor) -> None:
        rows = _Rows(dense)
        self._chosen = _Chosen(samples, index, rows.begins, torch.int32)
        columns, values = self._chosen.columns, self._chosen.values
        counts = torch.full((len(columns),), columns.shape[1])
        self._blocks = _Blocks(rows, counts, columns.view(-1), values.view(-1))

    def __call__(self, index: Tensor, dense: Tensor, out: Tensor) -> None:
        """Write the products into `out`, [R, B, K]."""
        self._chosen.choose(index)
        self._blocks.multiply(dense, out)


class GatheredTransposedProduct:
    """A_rᵀ·B_r, where the rows of each A_r are rows of one matrix, others at each call.

    Args:
        samples: the matrix that rows are taken from, [n, m].
        index: an example of their numbers, [R, B].
        dense: an example of the B_r, [R, B, K].
    """

    def __init__(self, samples: Tensor, index: Tensor, dense: Tensor) -> None:
        begins = samples.shape[1] * torch.arange(len(index))
        self._chosen = _Chosen(samples, index, begins, torch.int64)
        self._scaled = None if self._chosen.ones else torch.empty(index.numel(), dense.shape[2], dtype=dense.dtype)

    def __call__(self, index: Tensor, dense: Tensor, out: Tensor) -> None:
        """Write the products into `out`, [R, m, K]."""
        self._chosen.choose(index)
        rows, flat = dense.reshape(-1, dense.shape[-1]), out.view(-1, out.shape[-1]).zero_()
        for columns, values in zip(self._chosen.columns.unbind(1), self._chosen.values.unbind(1), strict=True):
            scaled = rows if self._scaled is None else torch.mul(rows, values[:, None], out=self._scaled)
            flat.index_add_(0, columns, scaled)


class NarrowProduct:
    """A_r·B_r with few columns.

    Args:
        left: an example of the A_r, [R, n, m].
        right: an example of the B_r, [R, m, K].
    """

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self._turned = torch.empty(len(left), right.shape[2], left.shape[1], dtype=left.dtype)

    def __call__(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        """Write the products into `out`, [R, n, K]."""
        torch.bmm(right.mT, left.mT, out=self._turned)
        out.copy_(self._turned.mT)


class TurnedProduct:
    """The transposes of A_r·B_r, one after another in memory."""

    def __call__(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        """Write the transposed products of [R, n, m] and [R, m, K] into `out`, [R, K, n]."""
        torch.bmm(right.mT, left.mT, out=out)


Product = FixedProduct | GatheredProduct | GatheredTransposedProduct | NarrowProduct | TurnedProduct


class _Chosen:
    """Rows taken from a matrix that is mostly zeros: where their numbers stand in a block-diagonal one, and these.

    Every row gets as many places as the fullest has; a place that is left over holds a zero in column 0.

    Args:
        samples: the matrix, [n, m].
        index: an example of the numbers of its rows, [R, B].
        begins: the column at which each block begins, [R].
        dtype: of the columns.

    Attributes:
        columns: [R·B, places].
        values: [R·B, places].
        ones: whether all values are one whichever rows are taken.
    """

    def __init__(self, samples: Tensor, index: Tensor, begins: Tensor, dtype: torch.dtype) -> None:
        row, column = samples.nonzero(as_tuple=True)
        filled = torch.bincount(row, minlength=len(samples))
        place = torch.arange(len(row)) - (filled.cumsum(0) - filled)[row]
        shape = len(samples), max(int(filled.max()), 1)
        self._columns = torch.zeros(shape, dtype=dtype).index_put_((row, place), column.to(dtype))
        self._values = torch.zeros(shape, dtype=samples.dtype).index_put_((row, place), samples[row, column])
        self._begins = begins.to(dtype).repeat_interleave(index.shape[1])[:, None]
        self.ones = bool((self._values == 1).all())
        self.columns = torch.empty(index.numel(), shape[1], dtype=dtype)
        self.values = torch.ones(index.numel(), shape[1], dtype=samples.dtype)

    def choose(self, index: Tensor) -> None:
        """Take other rows."""
        index = index.reshape(-1)
        torch.index_select(self._columns, 0, index, out=self.columns).add_(self._begins)
        if not self.ones:
            torch.index_select(self._values, 0, index, out=self.values)


class _Rows:
    """A stack of matrices as one matrix, theirs below one another.

    Args:
        like: an example of the stack, [R, m, K].

    Attributes:
        begins: the row at which each of them begins, [R].
        count: rows in all, those between them included.
    """

    def __init__(self, like: Tensor) -> None:
        stack, inner, width = like.shape
        between = like.stride(0)
        fits = like.stride()[1:] == (width, 1) and (between % width == 0 or stack == 1)
        self._buffer = None if fits else torch.empty(like.shape, dtype=like.dtype)
        self.begins = torch.arange(stack) * (between // width if fits else inner)
        self.count = int(self.begins[-1]) + inner

    def __call__(self, stack: Tensor) -> Tensor:
        if self._buffer is not None:
            stack = self._buffer.copy_(stack)
        width = stack.shape[2]
        return stack.as_strided((self.count, width), (width, 1), stack.storage_offset())


class _Blocks:
    """A block-diagonal matrix in compressed rows.

    Args:
        rows: of what it is multiplied with.
        counts: numbers in each of its rows.
        columns: of the numbers, row by row, in int32; like the values, it is used as it then stands.
        values: the numbers.
    """

    def __init__(self, rows: _Rows, counts: Tensor, columns: Tensor, values: Tensor) -> None:
        self._rows = rows
        begins = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
            shape = len(counts), rows.count
            self._matrix = torch.sparse_csr_tensor(begins, columns, values, shape, check_invariants=False)

    def multiply(self, dense: Tensor, out: Tensor) -> None:
        """Write the products of its blocks with `dense`, [R, m, K], into `out`, [R, n, K]."""
        flat = out.view(-1, out.shape[-1])
        torch.addmm(flat, self._matrix, self._rows(dense), beta=0, out=flat)
