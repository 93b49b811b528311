"""Trace model and loss in place by torch.export, and write the trace down as a graph in JSON."""

import builtins
import cmath
import contextlib
import io
import json
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from groktrace.errors import TaskError
from groktrace.run.batch import Batch
from groktrace.run.isolation import eager_and_unfused
from groktrace.run.model_with_loss import ModelWithLoss, evaluation_mode
from groktrace.run.program import scalar_reads
from groktrace.run.program.allow_list import ARITHMETIC_NAMES, RandomError, RefusedError
from groktrace.run.program.graph import FORMAT, Graph, build
from groktrace.run.program.inputs import Inputs
from groktrace.run.program.verification import explain, perturbed, verify

EXAMPLE_SAMPLES = 32


def trace(forward: ModelWithLoss, batch: Batch) -> Graph:
    """Trace model and loss in place; weights, flags, gradients and random generators stay as they are.

    Args:
        forward: model and loss.
        batch: training samples; a few serve as the example.

    Returns:
        The graph, rebuilt from its own JSON and verified against the live model. Its batch size is free where that can
        be traced, and else the size of `batch`.

    Raises:
        TaskError: model and loss cannot be traced, or are not a function of weights and data alone.
    """
    model = getattr(forward.model, "_orig_mod", forward.model)
    plain = ModelWithLoss(model, forward.loss, forward.batch_loss, forward.structure, forward.noise)
    plain.adopt(forward.own)
    device = next(model.parameters(), batch.tensors[0]).device
    # A size of one becomes a constant of the trace, so a single sample is doubled.
    few = batch.take(slice(0, EXAMPLE_SAMPLES) if len(batch) > 1 else torch.tensor([0, 0], device="cpu"))
    with eager_and_unfused(device), _quiet(), _trusting_distributions(), evaluation_mode(plain):
        try:
            try:
                return _trace_any_size(plain, few.to(device), batch.to(device))
            except RandomError:
                raise
            except Exception as failure:
                return _trace_with_scalar_reads(plain, few.to(device), batch.to(device), failure)
        except RandomError as failure:
            remedy = 'noise="fixed" keeps one draw for each sample'
            raise TaskError(f"the loss is not a function of the weights alone: {failure}; {remedy}.") from failure
        except RefusedError as failure:
            raise TaskError(f"the model and loss cannot be recorded as a program: {failure}.") from failure
        except Exception as failure:
            reason = explain(failure)
            raise TaskError(f"the model and loss cannot be traced by torch.export ({reason}).") from failure


def _trace_any_size(plain: ModelWithLoss, few: Batch, batch: Batch) -> Graph:
    """Trace for batches of any size, or of the one size if that fails."""
    try:
        return _trace(plain, few, dynamic=True)
    except RandomError:
        raise
    except Exception:
        return _trace(plain, batch, dynamic=False)


def _trace_with_scalar_reads(plain: ModelWithLoss, few: Batch, batch: Batch, failure: Exception) -> Graph:
    """Trace a loss that reads Python numbers from tensors, as for a log, without using them itself.

    Other numbers must give the same graph, and the graph must match the live loss on other samples and weights.

    Raises:
        Exception: `failure`, where there is no such graph.
    """
    for example, dynamic in ((few, True), (batch, False)):
        known = plain.parameters_by_name() | plain.buffers_by_name()
        state = {name: tensor.detach().clone() for name, tensor in known.items()}  # it may modify them
        with torch.no_grad(), scalar_reads.recorded() as values:
            plain.evaluate(state, example.tensors)
        if not values:
            break
        try:
            with scalar_reads.replayed(values):
                document, constants = _export(plain, example, dynamic)
            same = 0
            for variant in scalar_reads.variants(values):
                # An ArithmeticError may be that of a logarithm.
                with contextlib.suppress(ArithmeticError, ValueError), scalar_reads.replayed(variant):
                    if json.dumps(_export(plain, example, dynamic)[0]) != json.dumps(document):
                        raise failure
                    same += 1
            if not same:
                raise failure
            graph = build(json.loads(json.dumps(document)), constants)
            for part in _parts(example, dynamic):
                verify(graph, plain, part)
                for scale in (0.1, 1.0):
                    verify(graph, plain, part, perturbed(plain, scale))
            return graph
        except RandomError:
            raise
        except Exception:
            continue
    raise failure


def _parts(example: Batch, dynamic: bool) -> list[Batch]:
    """The whole example, and both halves where sizes are free."""
    half = len(example) // 2
    return (
        [example]
        if not dynamic or half < 2
        else [example, example.take(slice(0, half)), example.take(slice(half, None))]
    )


def _trace(plain: ModelWithLoss, example: Batch, dynamic: bool) -> Graph:
    """Trace, rebuild the graph from its own JSON, and verify it on all and on half of the example."""
    document, constants = _export(plain, example, dynamic)
    graph = build(json.loads(json.dumps(document)), constants)
    verify(graph, plain, example)
    if dynamic and len(example) >= 4:
        verify(graph, plain, example.take(slice(0, len(example) // 2)))
    return graph


def _export(plain: ModelWithLoss, example: Batch, dynamic: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Trace in place, and return the document and its constants."""
    from torch.export import Dim, export

    shapes = (tuple({0: Dim("batch")} for _ in example.tensors),) if dynamic else None
    with torch.enable_grad(), _symbolic_len():
        exported = export(plain, example.tensors, strict=False, dynamic_shapes=shapes)
    _keep_detached(exported.graph)
    exported = exported.run_decompositions({})  # makes every call functional
    graph, signature = exported.graph, exported.graph_signature
    results = graph.output_node().args[0]
    outputs: list[torch.fx.Node | None] = []
    for result, spec in zip(results, signature.output_specs, strict=True):
        if spec.kind.name in ("PARAMETER_MUTATION", "USER_INPUT_MUTATION"):
            raise RefusedError("it changes its weights or its data while it runs")
        if spec.kind.name == "USER_OUTPUT":
            outputs.append(result if isinstance(result, torch.fx.Node) else None)
    live = {node for node in outputs if node is not None}
    for node in reversed(graph.nodes):
        if node in live:
            live.update(node.all_input_nodes)  # drops assertions and pure buffer updates

    inputs = Inputs(plain, signature, exported.constants)
    placeholders = [node for node in graph.nodes if node.op == "placeholder" and node in live]
    index, nodes = inputs.take(placeholders)
    for node in graph.nodes:
        if node not in live or node.op == "placeholder":
            continue
        if node.op != "call_function":
            raise RefusedError(f"it holds a {node.op} of {str(node.target)[:80]}")
        index[node] = len(inputs.entries) + len(nodes)
        target = ARITHMETIC_NAMES.get(node.target) or str(node.target)
        kwargs = {name: _encode(arg, index) for name, arg in node.kwargs.items()}
        nodes.append({"target": target, "args": _encode(node.args, index), "kwargs": kwargs})
    document = {
        "format": FORMAT,
        "static_batch": None if dynamic else len(example),
        "data": len(example.tensors),
        "inputs": inputs.entries,
        "nodes": nodes,
        "outputs": [None if node is None else index[node] for node in outputs],
    }
    return document, inputs.constants


def _keep_detached(graph: torch.fx.Graph) -> None:
    """Insert detach() where torch.no_grad() blocks cut gradients; decomposing would lose them."""
    for node in list(graph.nodes):
        if getattr(node.target, "__name__", "") == "wrap_with_set_grad_enabled" and node.args[0] is False:
            for user in list(node.users):
                if isinstance(user.meta.get("val"), Tensor) and user.op == "call_function":
                    with graph.inserting_after(user):
                        cut = graph.call_function(torch.ops.aten.detach.default, (user,))
                    cut.meta = dict(user.meta)
                    user.replace_all_uses_with(cut, delete_user_cb=lambda other, cut=cut: other is not cut)


def _encode(value: Any, index: Mapping[torch.fx.Node, int]) -> Any:
    """Encode an argument of a traced call as JSON."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else {"float": str(value)}
        case complex() if cmath.isfinite(value):
            return {"complex": [value.real, value.imag]}
        case torch.fx.Node():
            return {"ref": index[value]}
        case list() | tuple():
            return [_encode(item, index) for item in value]
        case torch.dtype():
            return {"dtype": str(value).removeprefix("torch.")}
        case torch.memory_format():
            return {"memory_format": str(value).removeprefix("torch.")}
        case torch.device():
            return {"device": "run"}
        case torch.layout() if value == torch.strided:
            return {"layout": "strided"}
    raise RefusedError(f"it passes a {type(value).__name__} to an operation")


@contextlib.contextmanager
def _symbolic_len() -> Iterator[None]:
    """Let len(tensor) return the symbolic batch size; as a plain number it would become a constant of the trace."""
    plain_len = builtins.len

    def tensor_len(value: Any, /) -> Any:
        return value.shape[0] if isinstance(value, Tensor) and value.ndim else plain_len(value)

    builtins.len = tensor_len
    try:
        yield
    finally:
        builtins.len = plain_len


@contextlib.contextmanager
def _trusting_distributions() -> Iterator[None]:
    """Keep torch.distributions from looking at the values of their parameters, which a trace cannot follow."""
    before = Distribution._validate_args
    try:
        Distribution.set_default_validate_args(False)
        yield
    finally:
        Distribution.set_default_validate_args(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the warnings, log lines and printed graphs of torch.export."""
    loggers = [item for name, item in logging.root.manager.loggerDict.items() if name.split(".")[0] == "torch"]
    loggers = [item for item in loggers if isinstance(item, logging.Logger) and not item.disabled]
    try:
        for logger in loggers:
            logger.disabled = True
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger in loggers:
            logger.disabled = False
