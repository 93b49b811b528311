"""NumPy's numbers in pickles, such as a metric beside the weights: as plain numbers, without NumPy's own functions.

What a pickle calls `numpy.dtype` and `scalar` are here two functions of ours that run nothing and take no more memory
than a number. NumPy's own would do as well for honest files, but allocate as many bytes as a stranger's asks for.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

# Booleans, whole and real numbers; no objects, texts, structures or times.
_CODES = frozenset({"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"})
_ORDERS = ("<", ">", "|", "=")


class Dtype:
    """Stands for a dtype.

    Attributes:
        code: kind and bytes, such as f8.
        order: of the bytes.
    """

    code, order = "", "="

    def __init__(self, code: Any, align: Any = False, copy: Any = False) -> None:
        if not isinstance(code, str) or code not in _CODES:
            raise ValueError(f"expected the dtype of a number, got {str(code)[:40]!r}")
        self.code = code

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in _ORDERS:
            raise ValueError("expected the state of a number's dtype")
        self.order = state[1]


def scalar(dtype: Any, data: Any) -> bool | int | float:
    """A number from its bytes.

    Raises:
        ValueError: they are none of such a number.
    """
    if not isinstance(dtype, Dtype) or dtype.code not in _CODES or not isinstance(data, bytes):
        raise ValueError("expected a dtype and bytes")
    if len(data) != int(dtype.code[1:]):
        raise ValueError(f"expected {dtype.code[1:]} bytes, got {len(data)}")
    found: bool | int | float = np.frombuffer(data, dtype.order + dtype.code)[0].item()
    return found


# What the names in a pickle stand for, as torch.serialization.safe_globals takes it: of NumPy 1 and 2.
NAMES: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (Dtype, "numpy.dtype"),
    (scalar, "numpy.core.multiarray.scalar"),
    (scalar, "numpy._core.multiarray.scalar"),
]
