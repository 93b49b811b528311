"""Bounds on the memory and work of a program, found on meta tensors before any of its calls is made."""

import contextlib
import math
import os
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from groktrace.errors import TaskError

# Multiplications in one evaluation; an analysis repeats it thousands of times, so even minutes would be too long.
# Elementwise operations count ten a number, as they read and write memory.
MAX_WORK = {"cpu": 10**13, "cuda": 10**16}
WORK_OF_ONE = 10

_aten = torch.ops.aten
_PRODUCTS = (
    _aten.mm,
    _aten.bmm,
    _aten.addmm,
    _aten.baddbmm,
    _aten.convolution,
    _aten._cdist_forward,
    _aten.dot,
    _aten.mv,
)
_CUBIC = (
    "linalg_",
    "_linalg_",
    "cholesky",
    "triangular",
    "qr",
    "svd",
    "inverse",
    "matrix_exp",
    "lu_",
    "ormqr",
    "geqrf",
)


class ResourceBound:
    """Adds up the memory and work of one evaluation of a program, and refuses excessive ones.

    While the product of all arguments' sizes stays small, nothing is counted: for some operations PyTorch loads its
    compiler, for seconds, before it can infer the sizes of their results.

    Args:
        device: where it is evaluated.

    Attributes:
        countable: whether every call so far could be counted.
    """

    def __init__(self, device: torch.device) -> None:
        self._memory = memory_limit(device)
        self._work_limit = MAX_WORK.get(device.type, MAX_WORK["cuda"])
        self._small: float | None = 0.0
        self.countable = True
        self.restart()

    def restart(self) -> None:
        """Reset the counts, for the same calls with data."""
        self._allocated = 0
        self._work = 0.0

    def stays_small(self, args: Any, kwargs: Any) -> bool:
        """Whether all calls so far, with this one, must be small; False once, when it is time to count.

        Args:
            args: of the call.
            kwargs: the same, by name.
        """
        if self._small is None:
            return True
        leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor | int | float)]
        self._small += math.prod(max(1.0, float(x.numel() if isinstance(x, Tensor) else abs(x))) for x in leaves)
        if self._small * 4 <= min(self._memory / 4, self._work_limit):
            return True
        self._small = None
        return False

    def count(self, step: Any, args: Any, kwargs: Any, values: list[Any]) -> Any:
        """Count a call, and return its results as meta tensors; None where they cannot be inferred.

        Args:
            step: its `target`, for the message, and its `function`.
            args: its arguments.
            kwargs: the same, by name.
            values: the values that are alive.

        Raises:
            TaskError: it would take more memory than there is, or longer than anybody would wait.
        """
        args, kwargs = without_data((args, dict(kwargs)))
        if _makes_tensors(step.target):
            kwargs["device"] = torch.device("meta")
        meter, results = _Meter(), None
        try:
            with torch.no_grad(), meter:
                results = step.function(*args, **kwargs)
        except Exception:  # sizes that depend on values, operations without a rule for sizes, arguments that do not fit
            self.countable = False
        self._work += meter.work
        if self._work > self._work_limit:
            raise TaskError(
                f"the recorded program takes more than {self._work_limit:.0e} operations, at {step.target}."
            )
        if self._allocated + meter.allocated > self._memory:
            self._allocated = _bytes_of(values)
        self._allocated += meter.allocated
        if self._allocated > self._memory:
            raise TaskError(
                f"the recorded program asks for {self._allocated / 2**30:.3g} GiB at {step.target}, and half of this "
                f"machine's memory is {self._memory / 2**30:.3g} GiB; its gradient takes the other half."
            )
        return results


def memory_limit(device: torch.device) -> int:
    """Half of the bytes that a process may have on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1] // 2
    known = [2**36]
    with contextlib.suppress(AttributeError, ValueError, OSError):
        known.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        known.append(resource.getrlimit(resource.RLIMIT_AS)[0])
    with contextlib.suppress(ValueError, OSError), open("/sys/fs/cgroup/memory.max") as file:
        known.append(int(file.read()))
    return min(number for number in known if number > 0) // 2  # no limit is -1


class _Meter(TorchDispatchMode):
    """Counts what is called, however deep inside a composed operation."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated = 0
        self.work = 0.0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True would import the whole compiler at the first use

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        given, made = _tensors((args, kwargs)), _tensors(results)
        known = {tensor.untyped_storage()._cdata for tensor in given}
        fresh = [tensor for tensor in made if tensor.untyped_storage()._cdata not in known]
        self.allocated += sum(tensor.untyped_storage().nbytes() for tensor in fresh)
        if fresh:
            sizes = sorted(tensor.numel() for tensor in (*given, *made))
            self.work += WORK_OF_ONE * sizes[-1]
            if func.overloadpacket in _PRODUCTS:
                self.work += math.sqrt(math.prod(sizes[-3:]))  # m·k, k·n and m·n elements take m·k·n multiplications
            elif func.overloadpacket.__name__.startswith(_CUBIC):
                self.work += sizes[-1] ** 1.5
        return results


def without_data(values: Any) -> Any:
    """The same nesting of values with its tensors and devices replaced by meta ones."""
    return pytree.tree_map(_without_data, values)


def _without_data(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")
    return torch.device("meta") if isinstance(value, torch.device) else value


def _makes_tensors(target: str) -> bool:
    """Whether the call takes a device, on which it would allocate a tensor."""
    name, _, overload = target.removeprefix("aten.").partition(".")
    op = getattr(getattr(_aten, name, None), overload, None) if overload else None
    return op is not None and any(argument.name == "device" for argument in op._schema.arguments)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _bytes_of(values: list[Any]) -> int:
    """Bytes of all storages, shared ones counted once."""
    storages = [tensor.untyped_storage() for tensor in _tensors(values)]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
