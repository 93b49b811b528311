"""A graph of ATen calls in plain JSON: checked as hostile input, then run.

The document: {"format": 1, "static_batch": size or null, "data": number of batch tensors, "inputs": [...],
"nodes": [...], "outputs": [loss, outputs or null]}. An input is {"weight": name, "dtype": d}, {"data": position} or
{"constant": name}. A node is {"target": "aten.linear.default", "args": [...], "kwargs": {...}}; inputs and then nodes
are numbered from 0, and a node refers only to lower numbers. In arguments, numbers, strings, true, false, null and
lists stand for themselves; {"ref": i}, {"float": "inf"}, {"complex": [0.0, 1.0]}, {"dtype": d}, {"memory_format": f},
{"layout": "strided"} and {"device": "run"} (the device of the batch) for the rest. A dtype that the weights had when
traced means the dtype that they have when run. A target is an ATen operation that only computes, "getitem", or
arithmetic such as "sym.mul".
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from groktrace.attention import attention
from groktrace.errors import TaskError
from groktrace.run.program.allow_list import RefusedError, find_operation
from groktrace.run.program.bounds import ResourceBound, without_data

FORMAT = 1
MAX_NODES = 2**17
MAX_LIST = 2**14
MAX_DEPTH = 6
MAX_INTEGER = 2**40

_TEXT = re.compile(r"[A-Za-z0-9_,.>\- ]{0,200}", re.ASCII)  # einsum equations and modes; no paths
# Raised by operations on arguments that do not fit, besides RuntimeError with its reason.
_CONFUSIONS = (TypeError, AttributeError, KeyError, ArithmeticError, AssertionError, MemoryError, BufferError)
_OPEN_ENDS = (2**63 - 1, -(2**63))  # of slices
_DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
_FORMATS = {
    str(f).removeprefix("torch."): f
    for f in (torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d)
}


@dataclass(frozen=True)
class _Ref:
    """The value at `index`: an input, a node's result, the device, or a dtype of the weights."""

    index: int
    kind: str = ""  # "Device" or "ScalarType", if it is one


@dataclass(frozen=True)
class _Step:
    """One call, with the places of its arguments that are filled in when it runs."""

    target: str
    function: Callable[..., Any]
    args: list[Any]
    kwargs: dict[str, Any]
    holes: tuple[tuple[int, Any], ...]
    named_holes: tuple[tuple[str, Any], ...]
    index: int
    dead: tuple[int, ...]  # values that no later step reads


@dataclass(frozen=True, eq=False)
class Graph:
    """Checked calls, ready to run; `build` makes them.

    Attributes:
        document: the graph as JSON.
        constants: the tensors it needs that are neither weights nor data.
        steps: its calls, in order.
        dtypes: the floating dtypes that the weights had when it was traced.
    """

    document: dict[str, Any]
    constants: dict[str, Tensor]
    steps: tuple[_Step, ...]
    dtypes: tuple[torch.dtype, ...]
    _placed: dict[Any, Tensor] = field(default_factory=dict)
    _measured: set[Any] = field(default_factory=set)

    def run(self, weights: Mapping[str, Tensor], tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Run all calls, and return loss and outputs.

        Raises:
            TaskError: weights or data are not those the graph takes, its arguments do not fit its operations, or it
                asks for more memory or work than an analysis could give it.
        """
        values = self._load(weights, tensors)
        self._carry_out(self.steps, values, self._counting(tensors) or _call)
        loss, outputs = (None if index is None else values[index] for index in self.document["outputs"])
        if not (isinstance(loss, Tensor) and loss.ndim == 0 and loss.is_floating_point()):
            got = f"a {loss.dtype} tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else "no tensor"
            raise TaskError(f"the recorded program gives no loss: expected one real number, got {got}.")
        return loss, outputs if isinstance(outputs, Tensor) else None

    def _carry_out(self, steps: Sequence[_Step], values: list[Any], call: Callable[..., Any]) -> None:
        """Compute the results of steps by `call(step, args, kwargs, values)`, and drop dead values."""
        for step in steps:
            args, kwargs = step.args, step.kwargs
            if step.holes:
                args = args.copy()
                for place, template in step.holes:
                    args[place] = _fill(template, values)
            if step.named_holes:
                kwargs = kwargs | {name: _fill(template, values) for name, template in step.named_holes}
            try:
                values[step.index] = call(step, args, kwargs, values)
            except _CONFUSIONS as failure:
                raise TaskError(
                    f"the recorded program fails at {step.target} ({type(failure).__name__}: {failure})."
                ) from failure
            for index in step.dead:
                values[index] = None

    def _counting(self, tensors: Sequence[Tensor]) -> Callable[..., Any] | None:
        """A call that counts memory and work; None for sizes counted before, and inside functorch transforms."""
        key = tuple((tensor.shape, tensor.device) for tensor in tensors)
        if key in self._measured or torch._C._functorch.peek_interpreter_stack() is not None:
            return None
        self._measured.add(key)
        bound = ResourceBound(tensors[0].device)

        def call(step: _Step, args: Any, kwargs: Any, values: list[Any]) -> Any:
            if not bound.stays_small(args, kwargs):
                left = self.steps[step.index - len(self.document["inputs"]) :]
                self._carry_out(left, without_data(values), bound.count)
                bound.restart()
            if not bound.countable:
                bound.count(step, args, kwargs, values)
            return step.function(*args, **kwargs)

        return call

    def _load(self, weights: Mapping[str, Tensor], tensors: Sequence[Tensor]) -> list[Any]:
        """Allocate the list of values, and fill in the inputs, the device and the weights' dtypes."""
        document = self.document
        if len(tensors) != document["data"]:
            raise TaskError(f"the recorded program takes {document['data']} batch tensors, got {len(tensors)}.")
        static = document["static_batch"]
        if static is not None and any(len(tensor) != static for tensor in tensors):
            raise TaskError(
                f"the model and loss could only be traced for batches of exactly {static} samples, got "
                f"{len(tensors[0])}; use that many, or pass --task."
            )
        device = tensors[0].device
        values: list[Any] = []
        moved: dict[torch.dtype, torch.dtype] = {}
        for entry in document["inputs"]:  # the weights come first
            if "weight" in entry:
                if entry["weight"] not in weights:
                    raise TaskError(f"the weights lack '{entry['weight']}', which the recorded program uses.")
                weight = weights[entry["weight"]]
                if weight.dtype != (traced := _DTYPES[entry["dtype"]]) and traced in self.dtypes:
                    moved[traced] = weight.dtype
                values.append(weight)
            elif "data" in entry:
                tensor = tensors[entry["data"]]
                values.append(tensor.to(moved[tensor.dtype]) if tensor.dtype in moved else tensor)
            else:
                values.append(self._constant(entry["constant"], device, moved))
        values += [None] * len(document["nodes"])
        values.append(device)
        values += [moved.get(dtype, dtype) for dtype in self.dtypes]
        return values

    def _constant(self, name: str, device: torch.device, moved: dict[torch.dtype, torch.dtype]) -> Tensor:
        """Return a constant on the device and in the dtype that are needed; cached."""
        tensor = self.constants[name]
        key = (name, device, moved.get(tensor.dtype, tensor.dtype))
        if key not in self._placed:
            # The cached tensor must outlive the transforms and inference mode of this call.
            with torch._C._DisableFuncTorch(), torch.inference_mode(False), torch.no_grad():
                self._placed[key] = tensor.to(device=device, dtype=key[2])
        return self._placed[key]


def build(document: Any, constants: Mapping[str, Tensor]) -> Graph:
    """Check a document, and prepare its calls.

    Raises:
        RefusedError: it is malformed or calls something that does more than compute.
        RandomError: it draws random numbers.
    """
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise RefusedError(f"expected an object of format {FORMAT}")
    count, static = document.get("data"), document.get("static_batch")
    if type(count) is not int or not 1 <= count <= MAX_LIST:
        raise RefusedError("its number of batch tensors is missing or absurd")
    if static is not None and (type(static) is not int or not 1 <= static <= MAX_INTEGER):
        raise RefusedError("its batch size is absurd")
    inputs, nodes, outputs = (document.get(key) for key in ("inputs", "nodes", "outputs"))
    if not all(isinstance(value, list) and len(value) <= MAX_NODES for value in (inputs, nodes, outputs)):
        raise RefusedError("its inputs, nodes or outputs are no lists or absurdly long")
    for entry in inputs:
        match entry:
            case {"weight": str(), "dtype": str(dtype), **rest} if not rest and dtype in _DTYPES:
                pass
            case {"data": position, **rest} if not rest and type(position) is int and 0 <= position < count:
                pass
            case {"constant": str(name), **rest} if not rest and isinstance(constants.get(name), Tensor):
                pass
            case _:
                raise RefusedError(f"input {str(entry)[:80]} is unknown, or its constant is missing")
    names = dict.fromkeys(entry["dtype"] for entry in inputs if "weight" in entry)
    dtypes = tuple(_DTYPES[name] for name in names if _DTYPES[name].is_floating_point)
    limit = len(inputs) + len(nodes)
    special = {"run": limit} | {str(dtype): limit + 1 + i for i, dtype in enumerate(dtypes)}
    steps = [_step(node, len(inputs) + i, special) for i, node in enumerate(nodes)]
    indices = outputs[:1] + [index for index in outputs[1:] if index is not None]
    if len(outputs) != 2 or not all(type(index) is int and 0 <= index < limit for index in indices):
        raise RefusedError("its outputs are not among its values")
    needed = set(indices)
    for i in reversed(range(len(steps))):
        templates = [template for _, template in (*steps[i].holes, *steps[i].named_holes)]
        dead = {index for index in _references(templates) if index < limit} - needed
        needed |= dead
        steps[i] = replace(steps[i], dead=tuple(dead))
    kept = {key: document.get(key) for key in ("format", "static_batch", "data", "inputs", "nodes", "outputs")}
    used = {entry["constant"]: constants[entry["constant"]] for entry in inputs if "constant" in entry}
    return Graph(kept, used, tuple(steps), dtypes)


def _call(step: _Step, args: Any, kwargs: Any, values: list[Any]) -> Any:
    return step.function(*args, **kwargs)


def _fill(template: Any, values: list[Any]) -> Any:
    if type(template) is _Ref:
        return values[template.index]
    return [_fill(item, values) for item in template] if type(template) is list else template


def _references(template: Any) -> Iterator[int]:
    if type(template) is _Ref:
        yield template.index
    elif type(template) is list:
        for item in template:
            yield from _references(item)


def _step(node: Any, index: int, special: dict[str, int]) -> _Step:
    """Check and prepare one node; `dead` is filled in later."""
    match node:
        case {"target": str(target), "args": list(args), "kwargs": dict(kwargs), **rest} if not rest:
            pass
        case _:
            raise RefusedError(f"value {index} is no node")
    args = _decode(args, index, special)
    kwargs = {name: _decode(arg, index, special) for name, arg in kwargs.items()}
    function = find_operation(target, args, kwargs)
    if target == "aten.scaled_dot_product_attention.default":
        function = attention
    holes = tuple((i, arg) for i, arg in enumerate(args) if any(True for _ in _references(arg)))
    named = tuple((name, arg) for name, arg in kwargs.items() if any(True for _ in _references(arg)))
    return _Step(target, function, args, kwargs, holes, named, index, ())


def _decode(value: Any, index: int, special: dict[str, int], depth: int = 0) -> Any:
    """Decode an argument, with references to values known only at run time."""
    match value:
        case None | bool() | float():
            return value
        case int() if abs(value) <= MAX_INTEGER or value in _OPEN_ENDS:
            return value
        case str() if _TEXT.fullmatch(value):
            return value
        case list() if len(value) <= MAX_LIST and depth < MAX_DEPTH:
            return [_decode(item, index, special, depth + 1) for item in value]
        case {"ref": reference, **rest} if not rest and type(reference) is int and 0 <= reference < index:
            return _Ref(reference)
        case {"float": "inf" | "-inf" | "nan" as name, **rest} if not rest:
            return float(name)
        case {"complex": [float(real), float(imaginary)], **rest} if not rest:
            return complex(real, imaginary)
        case {"device": "run", **rest} if not rest:
            return _Ref(special["run"], "Device")
        case {"dtype": str(name), **rest} if not rest and name in _DTYPES:
            place = special.get(f"torch.{name}")
            return _DTYPES[name] if place is None else _Ref(place, "ScalarType")
        case {"memory_format": str(name), **rest} if not rest and name in _FORMATS:
            return _FORMATS[name]
        case {"layout": "strided", **rest} if not rest:
            return torch.strided
    raise RefusedError(f"value {index} has an argument that is malformed, too large, or no earlier value")
