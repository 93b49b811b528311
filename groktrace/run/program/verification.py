"""Verify a traced graph against the live model and loss, and name the line of user code where tracing failed."""

import linecache
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from groktrace.attention import twice_differentiable
from groktrace.run.batch import Batch
from groktrace.run.gradients import distance, gradients, norm
from groktrace.run.model_with_loss import ModelWithLoss
from groktrace.run.program.allow_list import RandomError, RefusedError
from groktrace.run.program.graph import Graph
from groktrace.run.program.inputs import INDEX

_SYMBOL = re.compile(r"\b(?:[us]|zuf|zf)\d+\b")  # the tracer's names of unknown numbers and sizes
_OWN_BACKWARD = "does it hold a custom autograd.Function?"


def verify(graph: Graph, plain: ModelWithLoss, example: Batch, weights: Mapping[str, Tensor] | None = None) -> None:
    """Compare loss and gradient with those of the live model.

    Args:
        graph: traced.
        plain: model and loss, live.
        example: samples.
        weights: instead of the model's own, by its names.

    Raises:
        RandomError: the live loss differs from one evaluation to the next.
        RefusedError: the program's loss or gradient differs.
    """

    def buffers() -> dict[str, Tensor]:
        return {
            name: buffer.clone() for name, buffer in plain.buffers_by_name().items()
        }  # the model may modify its own

    parameters = plain.parameters_by_name() | dict(weights or {})
    tensors = plain.buffers_by_name() | parameters
    training = {name for name, tensor in parameters.items() if tensor.requires_grad}
    training = {plain.views[name].base if name in plain.views else name for name in training}
    # Views are computed from their base, which may not require a gradient itself.
    bases = {view.base: tensors[view.base] for view in plain.views.values()}
    for name in bases.keys() & training:
        bases[name] = bases[name] if bases[name].requires_grad else bases[name].detach().requires_grad_()

    def live() -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return plain.evaluate({**buffers(), **(weights or {}), **bases}, example.tensors)[0]

    def recorded() -> Tensor:
        with twice_differentiable():
            return graph.run(parameters | buffers() | bases, example.tensors)[0]

    with torch.enable_grad():
        expected, again = live(), live()
        loss = recorded()
    if not _same(expected, again):
        raise RandomError("two evaluations of it differ")
    # Traced, some losses are sums in another order; so are those of gathered elements, whose memory layout is another.
    if not _same(expected, loss, 1e-5 if any(name.endswith(INDEX) for name in graph.constants) else 1e-6):
        raise RefusedError(f"traced, the loss is {loss.item()!r}; live, it is {expected.item()!r}")
    moving = {name: bases.get(name, parameters[name]) for name in parameters if name in training}
    held = {name: parameters[name] for name in plain.views if name in parameters and parameters[name].requires_grad}
    own_backward = any(isinstance(node, torch.autograd.function.BackwardCFunction) for node in _nodes(expected))
    try:
        found, got = gradients(expected, moving | held), gradients(loss, moving)
    except RuntimeError as failure:
        raise RefusedError(f"its gradient with respect to the weights fails ({first_line(failure)})") from failure
    wanted = plain.gather(found)  # a loss may hold views itself
    # A custom autograd.Function, such as a straight-through estimator, is traced without its own backward.
    if not distance([wanted[name] for name in moving], got.values()) <= 1e-3 * norm(wanted.values()):
        raise RefusedError(f"traced, the loss has another gradient than live; {_OWN_BACKWARD}")
    if own_backward:
        with torch.enable_grad():
            curved = [_curvature(loss, list(moving.values())) for loss in (live(), recorded())]
        # A backward written by hand to avoid NaN may do so at first order only. A finite live second derivative may be
        # wrong, too: that of a once-differentiable function drops terms.
        if curved[1] is not None and not _finite(curved[1]) and (curved[0] is None or _finite(curved[0])):
            raise RefusedError(f"traced, the loss's gradient has a derivative that is not finite; {_OWN_BACKWARD}")
        for scale in (1.0, 3.0) if weights is None else ():  # it may equal the plain gradient only here
            verify(graph, plain, example, perturbed(plain, scale))


def perturbed(plain: ModelWithLoss, scale: float) -> dict[str, Tensor]:
    """Perturb the weights, by the model's own names; views follow from their bases.

    Args:
        plain: model and loss.
        scale: of the change, relative to the mean size of a tensor's elements.
    """
    generator = torch.Generator("cpu").manual_seed(0)

    def other(tensor: Tensor) -> Tensor:
        kind = torch.complex64 if tensor.is_complex() else torch.float32
        noise = torch.randn(tensor.shape, generator=generator, device="cpu", dtype=kind).to(tensor.device, tensor.dtype)
        size = tensor.detach().abs().mean()
        return (tensor.detach() + scale * size * noise).requires_grad_(tensor.requires_grad)

    # Tensors that a loss holds itself cannot be replaced.
    names = plain.parameters_by_name().keys() - plain.views.keys() - plain.own.loose.keys()
    return {
        name: other(tensor) if tensor.is_floating_point() or tensor.is_complex() else tensor
        for name, tensor in plain.parameters_by_name().items()
        if name in names
    }


def _finite(tensors: Sequence[Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _curvature(loss: Tensor, moving: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
    """The Hessian times one random direction; None where it cannot be computed."""
    generator = torch.Generator("cpu").manual_seed(0)
    try:
        slopes = torch.autograd.grad(loss, moving, create_graph=True, allow_unused=True, materialize_grads=True)
        along = [torch.randn(w.shape, generator=generator, device="cpu", dtype=w.dtype).to(w.device) for w in moving]
        slope = sum((_reals(a) * _reals(b)).sum() for a, b in zip(slopes, along, strict=True))
        return torch.autograd.grad(slope, moving, allow_unused=True, materialize_grads=True)
    except (RuntimeError, NotImplementedError):
        return None


def _reals(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _nodes(loss: Tensor) -> Iterator[object]:
    """The nodes of autograd's graph."""
    left, seen = [loss.grad_fn], set()
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [following for following, _ in node.next_functions]
            yield node


def _same(left: Tensor, right: Tensor, rtol: float = 0.0) -> bool:
    """Equal bitwise, or to `rtol`, on the CPU; sums on other devices may run in any order."""
    return torch.allclose(left, right, rtol=rtol if left.device.type == "cpu" else 1e-4, atol=0, equal_nan=True)


def first_line(failure: Exception) -> str:
    """The first line of a message, shortened."""
    line = next((line.strip() for line in str(failure).splitlines() if line.strip()), "no message")
    return line if len(line) <= 160 else line[:157] + "..."


def explain(failure: Exception) -> str:
    """Explain why tracing failed, with the line of the user's code where it did.

    Args:
        failure: what the tracer raised.
    """
    reason = first_line(failure)
    if _SYMBOL.search(reason):
        reason = "it depends on what a tensor holds, which a graph cannot follow"
    return f"{type(failure).__name__}: {reason}{_place(failure)}"


def _place(failure: BaseException) -> str:
    """The innermost line of code that is neither PyTorch's nor Python's own, the user's before a library's."""
    found = []
    left: list[BaseException | None] = [failure]
    seen: set[int] = set()
    while left:
        error = left.pop(0)
        if error is None or id(error) in seen:
            continue
        seen.add(id(error))
        trace, lines = error.__traceback__, []
        while trace is not None:
            code, name = trace.tb_frame.f_code, str(trace.tb_frame.f_globals.get("__name__", "")).split(".")[0]
            if name not in ("torch", "groktrace") and name not in sys.stdlib_module_names - {"__main__"}:
                lines.append((code.co_filename, trace.tb_lineno))
            trace = trace.tb_next
        found += lines[::-1]
        left += [error.__cause__, error.__context__]
    if not found:
        return ""
    own = [place for place in found if "site-packages" not in place[0] and "dist-packages" not in place[0]]
    file, number = (own or found)[0]
    line = linecache.getline(file, number).strip()
    return f"; at {os.path.basename(file)}:{number}" + (f": `{line[:100]}`" if line else "")
