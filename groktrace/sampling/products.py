"""Products of a matrix that is mostly zeros with a stack of others, on a processor.

Samples that are mostly zeros, as one-hot codes are, need no multiplications by zero: their products with a stack of
B_r are one product of a block-diagonal matrix, in compressed rows, with the B_r below one another. A gradient of the
network of arXiv 2603.01192 (163 000 weights) takes 0.65 times as long. What is here reads and writes the very memory
that the stack's products would, so that either can stand for the other.
"""

import warnings

import torch
from torch import Tensor

# In compressed rows a number takes about four times as long as one of many in a dense product.
MAX_DENSITY = 0.1


def is_sparse(matrix: Tensor) -> bool:
    """Whether products with a matrix are quicker without its zeros, on this device."""
    return (
        matrix.device.type == "cpu"
        and torch.backends.mkl.is_available()
        and matrix.dtype in (torch.float32, torch.float64)
        and int(matrix.count_nonzero()) <= MAX_DENSITY * matrix.numel()
    )


class FixedProduct:
    """A·B_r for one matrix A and a stack of B_r.

    Args:
        matrix: A, [n, m].
        dense: an example of the B_r, [R, m, K]; later ones lie in memory as this one does.
    """

    def __init__(self, matrix: Tensor, dense: Tensor) -> None:
        self._rows = rows = _Rows(dense)
        row, column = matrix.nonzero(as_tuple=True)
        counts = torch.bincount(row, minlength=len(matrix)).repeat(len(dense))
        columns = (column + rows.begins[:, None]).flatten().int()
        begins = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
        values, shape = matrix[row, column].repeat(len(dense)), (len(counts), rows.count)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
            self._blocks = torch.sparse_csr_tensor(begins, columns, values, shape, check_invariants=False)

    def __call__(self, dense: Tensor, out: Tensor) -> None:
        """Write the products into `out`, [R, n, K]."""
        flat = out.view(-1, out.shape[-1])
        torch.addmm(flat, self._blocks, self._rows(dense), beta=0, out=flat)


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
