"""The operations that a recorded program may call: those of ATen that only compute, and arithmetic on sizes."""

import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from groktrace.errors import TaskError
from groktrace.run.program.recurrent import RECURRENT, recurrent_layer

MAX_LITERAL_ELEMENTS = 2**28  # that the document itself may ask for
MAX_ELEMENTS = 2**31
MAX_PARTS = 2**16  # tensors that one call may return, each of which takes memory even if it is empty

_TARGET = re.compile(r"aten\.([A-Za-z0-9_]{1,80})\.([A-Za-z0-9_]{1,80})", re.ASCII)
# Some operations with a leading underscore check no bounds; these do, and traces contain them.
_PRIVATE = re.compile(
    "_(to_copy|unsafe_view|conj|softmax|log_softmax|safe_softmax|prelu_kernel|trilinear|native_batch_norm_legit"
    "|native_batch_norm_legit_no_training|weight_norm|adaptive_avg_pool[23]d"
    "|upsample_(bilinear|bicubic)2d_aa|cdist_forward|euclidean_dist|linalg_(det|slogdet|svd|eigh))"
)
# These public operations do not check their indices, sizes or statistics, and read out of bounds or hang on wrong ones
# (found by calling every operation with wrong arguments), or allocate what they are asked for without a meta kernel
# that says how much; a traced loss hardly needs them.
_TRUSTING = re.compile(
    ".*(backward|mkldnn|fbgemm|quanti|qparams|sparse|cudnn|miopen|mps_|gather_stats|batch_norm_(stats|elemt|update)).*"
    "|special_.*_polynomial_.*|ctc_loss|_?embedding_bag.*|segment_reduce|lu_unpack|resize.*|set|pin_memory"
    "|to_padded_tensor|combinations|histogram.*"
)
# The literals that each kind of argument accepts; nothing would check a dtype given by its number.
_KINDS: dict[str, tuple[type, ...]] = {
    "Tensor": (bool, int, float, complex),  # traces pass numbers there
    "int": (int,),
    "float": (int, float),
    "number": (bool, int, float, complex),
    "bool": (bool,),
    "str": (str,),
    "ScalarType": (torch.dtype,),
    "Layout": (torch.layout,),
    "MemoryFormat": (torch.memory_format,),
}
# Arguments that say how much to allocate.
_SIZE_NAMES = frozenset(
    ["size", "steps", "n", "m", "N", "s", "window_length", "num_classes", "row", "col", "repeats", "output_size", "pad"]
) | frozenset(["scale_factors", "arange.end", "range.end", "tile.dims", "mvlgamma.p"])
_ARITHMETIC: dict[str, Callable[..., Any]] = {
    f"sym.{function.__name__}": function
    for function in (
        *(operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod, operator.pow),
        *(operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.and_, operator.or_),
        *(operator.neg, operator.not_, abs, max, min, float, int, math.sqrt),
    )
}
ARITHMETIC_NAMES: dict[Any, str] = {function: name for name, function in _ARITHMETIC.items()} | {
    torch.sym_max: "sym.max",
    torch.sym_min: "sym.min",
    torch.sym_float: "sym.float",
    torch.sym_int: "sym.int",
    torch.sym_not: "sym.not_",
    torch.sym_sqrt: "sym.sqrt",
    operator.getitem: "getitem",
}
# Methods, because under vmap they see the sizes of one row.
_SIZES: dict[str, Callable[..., Any]] = {
    "aten.sym_size.int": lambda tensor, dim: tensor.size(dim),
    "aten.sym_stride.int": lambda tensor, dim: tensor.stride(dim),
    "aten.sym_numel.default": lambda tensor: tensor.numel(),
    "aten.item.default": lambda tensor: tensor.item(),
}


class RefusedError(Exception):
    """Why a document is not a graph that may run."""


class RandomError(Exception):
    """What makes a loss more than a function of weights and data."""


def draws_random_numbers(op: Any, given: Mapping[str, Any]) -> bool:
    """Whether a call of an ATen operation draws random numbers.

    Args:
        op: the operation.
        given: its arguments by name, with the defaults of those that were not passed.
    """
    if torch.Tag.nondeterministic_seeded not in op.tags:
        return False
    still = any(given.get(key) is False for key in ("train", "training"))
    return not still and all(given.get(key) != 0 for key in ("p", "dropout", "dropout_p"))


def find_operation(target: str, args: list[Any], kwargs: dict[str, Any]) -> Callable[..., Any]:
    """Look up the operation that a node names, if it does nothing but compute.

    Args:
        target: as in the document.
        args: the node's arguments; what is known only when the program runs is an object of another kind.
        kwargs: the same, by name.

    Raises:
        RefusedError: the target is unknown, has side effects, or is told to make something absurdly large.
        RandomError: it draws random numbers.
    """
    if target == "getitem":
        return _getitem
    if target in _ARITHMETIC:
        return _on_numbers(_ARITHMETIC[target])
    name, overload = found.groups() if (found := _TARGET.fullmatch(target)) else ("", "")
    packet = getattr(torch.ops.aten, name, None) if name else None
    if not isinstance(packet, torch._ops.OpOverloadPacket) or overload not in packet.overloads():
        raise RefusedError(f"it calls '{target[:80]}', which is not an ATen operation")
    op = getattr(packet, overload)
    schema = op._schema
    names = [argument.name for argument in schema.arguments]
    if len(args) > len(names) or not kwargs.keys() <= set(names[len(args) :]):
        raise RefusedError(f"it calls {target} with arguments that it does not take")
    given = {argument.name: argument.default_value for argument in schema.arguments}
    passed = dict(zip(names, args, strict=False)) | kwargs
    for argument in schema.arguments:
        if argument.name in passed and not _fits(str(argument.real_type), passed[argument.name]):
            raise RefusedError(f"it calls {target} with a {argument.name} of the wrong kind")
    given |= passed
    private = re.match("_[^_]", name) and not _PRIVATE.fullmatch(name)
    # Normalisation updates its running statistics, which its schema does not say.
    moves = given.get("running_mean") is not None and given.get("training", given.get("use_input_stats", False))
    # The tag sets operations on tensors apart from TorchScript's own, such as aten::save.
    if torch.Tag.pt2_compliant_tag not in op.tags or schema.is_mutable or private or moves or "filename" in names:
        raise RefusedError(f"it calls {target}, which may do more than compute")
    # Without running statistics, some kernels read uninitialised memory.
    bare = "batch_norm" in name and given.get("running_mean") is None and given.get("training") is not True
    packed = overload == "data" and name in RECURRENT  # sequences of several lengths
    valued = overload == "tensor_indices_or_sections"  # as many results as a value says
    if _TRUSTING.fullmatch(name) or bare or packed or valued or overload.startswith("prim_"):
        raise RefusedError(f"it calls {target}, which does not check its arguments")
    if target in _SIZES:
        return _SIZES[target]
    if not schema.returns or not all(str(r.type) in ("Tensor", "List[Tensor]") for r in schema.returns):
        raise RefusedError(f"it calls {target}, which does not return tensors")
    if draws_random_numbers(op, given):
        raise RandomError(f"{target} draws random numbers")
    if target in _REPLACED:
        return _REPLACED[target]
    if name in RECURRENT:
        return recurrent_layer(name, op)
    if name in ("bincount", "repeat_interleave") or (name == "one_hot" and given.get("num_classes") == -1):
        return _sized_by_values(op)
    if _elements(name, given) > MAX_LITERAL_ELEMENTS:
        raise RefusedError(f"it calls {target} for an absurd size")
    lists = any(str(r.type) == "List[Tensor]" for r in schema.returns)
    if not lists and not any(key in _SIZE_NAMES or f"{name}.{key}" in _SIZE_NAMES for key in names):
        return op

    def bounded(*args: Any, **kwargs: Any) -> Any:
        values = given | dict(zip(names, args, strict=False)) | kwargs
        if _elements(name, values) > MAX_ELEMENTS:
            raise TaskError(f"the recorded program calls {target} for an absurd size.")
        if lists and _parts(name, values) > MAX_PARTS:
            raise TaskError(f"the recorded program calls {target} for an absurd number of parts.")
        if name.endswith("_aa") and not _scales_fit(values):
            raise TaskError(f"the recorded program calls {target} with scales that are not those of its sizes.")
        return op(*args, **kwargs)

    return bounded


def _scales_fit(values: dict[str, Any]) -> bool:
    """Whether an image is resized by about the scales given; other ones make kernels read far beyond it."""
    scales = values.get("scales_h"), values.get("scales_w")
    pairs = zip(scales, values["self"].shape[-2:], values["output_size"], strict=False) if any(scales) else ()
    return all(scale is None or 0.5 * after <= scale * before <= 2 * after for scale, before, after in pairs)


def _fits(kind: str, value: Any) -> bool:
    """Whether a literal may stand for an argument of that kind; a reference may for all but dtypes and the like."""
    if kind.startswith("Optional["):
        return value is None or _fits(kind[9:-1], value)
    if kind.startswith("List["):
        items = value if isinstance(value, list) else [value]  # one number may stand for a list of equal ones
        return all(_fits(kind[5:-1], item) for item in items)
    special = getattr(value, "kind", None)
    if special is not None:
        return special == (kind if kind in ("Device", "ScalarType", "Layout", "MemoryFormat") else "")
    return type(value) in _KINDS.get(kind, ())


def _elements(name: str, given: dict[str, Any]) -> float:
    """How many elements an operation is told to make, as far as its arguments say."""
    if name in ("arange", "range"):
        start, end, step = (given.get(key, default) for key, default in (("start", 0), ("end", 0), ("step", 1)))
        if not all(type(value) in (int, float) for value in (start, end, step)):
            return 0
        return abs(end - start) / abs(step) if step else math.inf
    if name == "eye":
        given = {"m": given["n"]} | given
    values = [given[key] for key in given if key in _SIZE_NAMES or f"{name}.{key}" in _SIZE_NAMES]
    numbers = [number for value in values for number in (value if isinstance(value, list) else [value])]
    return math.prod(max(1.0, abs(float(number))) for number in numbers if type(number) in (int, float))


def _parts(name: str, values: dict[str, Any]) -> float:
    """How many tensors an operation that cuts one up returns at most; 0 where nothing says so."""
    told = [values[key] for key in ("sections", "chunks") if type(values.get(key)) in (int, float)]
    tensor, dim, length = values.get("self"), values.get("dim"), values.get("split_size")
    if name.startswith("unbind"):
        length = 1
    if type(length) is int and isinstance(tensor, Tensor) and type(dim) is int and -tensor.ndim <= dim < tensor.ndim:
        told.append(tensor.size(dim) / max(length, 1))
    return max(told, default=0)


def _sized_by_values(op: Any) -> Callable[..., Any]:
    """The operation, where the values that say how much it makes are in bounds."""

    def bounded(*args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        counts = [float(tensor.double().abs().sum()) for tensor in tensors if not tensor.is_floating_point()]
        numbers = [abs(value) for value in (*args, *kwargs.values()) if type(value) in (int, float)]
        if max(tensors[0].numel(), 1) * max([1.0, *counts, *numbers]) > MAX_ELEMENTS:
            raise TaskError(f"the recorded program calls {op} for an absurd size.")
        return op(*args, **kwargs)

    return bounded


def _fill_tensor(tensor: Tensor, value: Tensor) -> Tensor:
    return value.to(tensor.dtype).expand_as(tensor).clone()


def _slice_scatter(
    tensor: Tensor, part: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Tensor:
    size = tensor.size(dim)
    return torch.slice_scatter(tensor, part, dim, start, size if end is None else min(end, size), step)


def _weight_norm(direction: Tensor, size: Tensor, dim: int = 0) -> Tensor:
    if not direction.numel() or not size.numel() or not direction.ndim:  # the kernel divides by these
        raise TaskError("the recorded program normalises an empty weight.")
    if dim in (0, direction.ndim - 1) and size.numel() != direction.size(dim):  # and reads that many unchecked
        raise TaskError("the recorded program normalises a weight to sizes that it does not have.")
    return torch._weight_norm(direction, size, dim)


def _normalise(tensor: Tensor, weight: Any, bias: Any, mean: Tensor, var: Tensor, momentum: float, eps: float) -> Any:
    cudnn = torch.backends.cudnn.enabled
    return torch.batch_norm(tensor, weight, bias, mean, var, False, momentum, eps, cudnn), None, None


def _complex_of_pairs(tensor: Tensor) -> Tensor:
    if tensor.shape[-1:] != (2,):
        raise TaskError("the recorded program takes numbers as complex ones that are no pairs.")
    return torch.complex(tensor[..., 0], tensor[..., 1])  # at any alignment; a view would need even offsets


# Equivalents of what vmap cannot batch, or only row by row.
_REPLACED: dict[str, Callable[..., Any]] = {
    "aten.view.default": torch.ops.aten.reshape.default,  # stacked tensors may have strides that no view can keep
    "aten._unsafe_view.default": torch.ops.aten.reshape.default,
    "aten.reshape.default": torch.ops.aten.reshape.default,
    "aten._native_batch_norm_legit_no_training.default": _normalise,
    "aten._weight_norm.default": _weight_norm,
    "aten.fill.Tensor": _fill_tensor,
    "aten.view_as_complex.default": _complex_of_pairs,
    "aten.slice_scatter.default": _slice_scatter,
}


def _getitem(values: Any, index: Any) -> Any:
    """One of an operation's several results."""
    if not isinstance(values, tuple | list) or type(index) is not int or not 0 <= index < len(values):
        raise TaskError("the recorded program takes a result that an operation does not have.")
    return values[index]


def _on_numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function on plain numbers only, which is what sizes are when a program runs."""

    def compute(*values: Any) -> Any:
        if not all(type(value) in (int, float, bool) for value in values):
            raise TaskError("the recorded program does arithmetic on sizes with something that is no number.")
        if function is operator.pow and type(values[-1]) is int and abs(values[-1]) > 64:
            raise TaskError("the recorded program raises a size to an absurd power.")
        try:
            result = function(*values)
        except (ArithmeticError, ValueError, TypeError) as failure:
            raise TaskError(f"the recorded program's arithmetic on sizes fails ({failure}).") from failure
        if type(result) is int and abs(result) >= 2**63:
            raise TaskError("the recorded program computes an absurd size.")
        return result

    return compute
