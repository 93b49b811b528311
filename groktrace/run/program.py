"""The loss as a program: traced from the live model by torch.export, which nothing else touches, and kept as JSON."""

import builtins
import cmath
import contextlib
import io
import json
import logging
import math
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from groktrace.errors import RunError, TaskError
from groktrace.run import numbers
from groktrace.run.batch import Batch
from groktrace.run.forward import Forward, evaluation_mode
from groktrace.run.graph import FORMAT, Graph, build
from groktrace.run.inputs import Inputs
from groktrace.run.operations import ARITHMETIC_NAMES, RandomError, RefusedError
from groktrace.run.verify import explain, perturbed, verify

EXAMPLE_SAMPLES = 32


@dataclass(frozen=True, eq=False)
class Program:
    """Model and loss as a graph of ATen calls.

    Attributes:
        graph: the calls, checked and ready.
        where: the file that it was read from, for messages.
    """

    graph: Graph
    where: str | None = None

    @property
    def static_batch(self) -> int | None:
        """The only size of batches that it takes; None where that is free."""
        return self.graph.document["static_batch"]

    @property
    def constants(self) -> dict[str, Tensor]:
        """Tensors that the program needs and that are neither weights nor data."""
        return self.graph.constants

    @property
    def weights(self) -> list[str]:
        """Names of the weights that the program uses."""
        return [entry["weight"] for entry in self.graph.document["inputs"] if "weight" in entry]

    def forward(self, weights: Mapping[str, Tensor], tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Loss and outputs on one batch.

        Args:
            weights: parameters and buffers by the model's own names; names the program does not use are ignored.
            tensors: the batch's leaves.

        Returns:
            The mean loss, and the model's outputs if they are one tensor.

        Raises:
            TaskError: a weight or a batch tensor is missing, or the batch has a size the program was not traced for.
        """
        try:
            return self.graph.run(weights, tensors)
        except TaskError as failure:
            if self.where is None:
                raise
            raise TaskError(f"{self.where}: {failure}") from failure

    def to_json(self) -> dict[str, Any]:
        """The program as plain JSON, without its constants; `groktrace.run.graph` says what is in it."""
        return json.loads(json.dumps(self.graph.document))

    @classmethod
    def from_json(cls, document: Any, constants: dict[str, Tensor], where: str) -> "Program":
        """Rebuild a program; the document is taken as hostile.

        Args:
            document: what `to_json` returned; further keys beside its own are ignored.
            constants: the program's constants.
            where: the file's name, for messages.

        Raises:
            RunError: the document is damaged or calls something that is not allowed.
        """
        try:
            return cls(build(document, constants), where)
        except (RefusedError, RandomError) as failure:
            raise RunError(f"{where}: not a program that groktrace wrote: {failure}.") from failure

    @classmethod
    def trace(cls, forward: Forward, batch: Batch) -> "Program":
        """Trace model and loss in place; weights, flags, gradients and random generators stay as they are.

        Args:
            forward: model and loss.
            batch: training samples; a few serve as the example.

        Returns:
            The program, rebuilt from its own JSON and checked against the live model. Its batch size is free where
            that can be traced, and else the size of `batch`.

        Raises:
            TaskError: model and loss cannot be traced, or are not a function of weights and data alone.
        """
        model = getattr(forward.model, "_orig_mod", forward.model)
        plain = Forward(model, forward.loss, forward.batch_loss, forward.structure)
        plain.adopt(forward.own)
        device = next(model.parameters(), batch.tensors[0]).device
        # Sizes of one are burnt into a trace, so a single sample is doubled.
        few = batch.take(slice(0, EXAMPLE_SAMPLES) if len(batch) > 1 else torch.tensor([0, 0], device="cpu"))
        with undisturbed(device), _quiet(), evaluation_mode(plain):
            try:
                try:
                    return cls(_trace_somehow(plain, few.to(device), batch.to(device)))
                except RandomError:
                    raise
                except Exception as failure:
                    return cls(_trace_with_numbers(plain, few.to(device), batch.to(device), failure))
            except RandomError as failure:
                raise TaskError(f"the loss is not a function of the weights alone: {failure}.") from failure
            except RefusedError as failure:
                raise TaskError(f"the model and loss cannot be recorded as a program: {failure}.") from failure
            except Exception as failure:
                reason = explain(failure)
                raise TaskError(f"the model and loss cannot be traced by torch.export ({reason}).") from failure


def traced_forward(forward: Forward, batch: Batch) -> Callable[..., tuple[Tensor, Tensor | None]] | None:
    """Model and loss as a program, in which other tensors can be put in the place of those that the loss holds.

    None, and a warning, where it cannot be traced.
    """
    try:
        program = Program.trace(forward, batch)
    except TaskError as failure:
        warnings.warn(
            f"groktrace: the loss holds tensors that train, or the model's own, and stays as it is when these move "
            f"({failure}); make it a torch.nn.Module with parameters, or a function of outputs and targets.",
            RuntimeWarning,
            stacklevel=3,
        )
        return None
    if forward.model is getattr(forward.model, "_orig_mod", forward.model):
        return program.forward
    return lambda weights, tensors: program.forward(
        {name.removeprefix("_orig_mod."): tensor for name, tensor in weights.items()}, tensors
    )


def _trace_somehow(plain: Forward, few: Batch, batch: Batch) -> Graph:
    """The graph, for batches of any size if that can be had."""
    try:
        return _trace(plain, few, dynamic=True)
    except RandomError:
        raise
    except Exception:
        return _trace(plain, batch, dynamic=False)


def _trace_with_numbers(plain: Forward, few: Batch, batch: Batch, failure: Exception) -> Graph:
    """The graph of a loss that reads numbers off its tensors which it has no use for itself, as for a log.

    Whatever the numbers, the graph must be the same one, and give the live loss on other samples and at other weights.

    Raises:
        Exception: `failure`, where there is no such graph.
    """
    for example, dynamic in ((few, True), (batch, False)):
        known = plain.parameters_by_name() | plain.buffers_by_name()
        state = {name: tensor.detach().clone() for name, tensor in known.items()}  # it may move them
        with torch.no_grad(), numbers.noted() as values:
            plain.evaluate(state, example.tensors)
        if not values:
            break
        try:
            with numbers.given(values):
                document, constants = _export(plain, example, dynamic)
            same = 0
            for variant in numbers.variants(values):
                with contextlib.suppress(ArithmeticError, ValueError), numbers.given(variant):  # a logarithm, say
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
    """The whole, and where that is possible each half."""
    half = len(example) // 2
    return (
        [example]
        if not dynamic or half < 2
        else [example, example.take(slice(0, half)), example.take(slice(half, None))]
    )


def _trace(plain: Forward, example: Batch, dynamic: bool) -> Graph:
    """The graph, rebuilt from its own JSON and compared with the live model on all and on half of the example."""
    document, constants = _export(plain, example, dynamic)
    graph = build(json.loads(json.dumps(document)), constants)
    verify(graph, plain, example)
    if dynamic and len(example) >= 4:
        verify(graph, plain, example.take(slice(0, len(example) // 2)))
    return graph


def _export(plain: Forward, example: Batch, dynamic: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Trace in place; the document and the constants."""
    from torch.export import Dim, export

    shapes = (tuple({0: Dim("batch")} for _ in example.tensors),) if dynamic else None
    with torch.enable_grad(), _symbolic_len():
        exported = export(plain, example.tensors, strict=False, dynamic_shapes=shapes)
    _keep_detached(exported.graph)
    exported = exported.run_decompositions({})  # makes every call functional, and decomposes nothing
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
            live.update(node.all_input_nodes)  # leaves out assertions and what only moves buffers

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
    """Write down what torch.no_grad() blocks do to gradients; decomposing would forget it."""
    for node in list(graph.nodes):
        if getattr(node.target, "__name__", "") == "wrap_with_set_grad_enabled" and node.args[0] is False:
            for user in list(node.users):
                if isinstance(user.meta.get("val"), Tensor) and user.op == "call_function":
                    with graph.inserting_after(user):
                        cut = graph.call_function(torch.ops.aten.detach.default, (user,))
                    cut.meta = dict(user.meta)
                    user.replace_all_uses_with(cut, delete_user_cb=lambda other, cut=cut: other is not cut)


def _encode(value: Any, index: Mapping[torch.fx.Node, int]) -> Any:
    """An argument of a traced call as JSON."""
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
def undisturbed(device: torch.device) -> Iterator[None]:
    """Put every random generator back, run compiled parts as plain Python, and keep attention unfused."""
    python, legacy, fast = random.getstate(), numpy.random.get_state(), torch.backends.mha.get_fastpath_enabled()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.compiler.set_stance("force_eager"):
            torch.backends.mha.set_fastpath_enabled(False)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        random.setstate(python)
        numpy.random.set_state(legacy)


@contextlib.contextmanager
def _symbolic_len() -> Iterator[None]:
    """Let len(tensor) be the free batch size; by itself it is a plain number, which would be burnt into the trace."""
    plain_len = builtins.len

    def tensor_len(value: Any, /) -> Any:
        return value.shape[0] if isinstance(value, Tensor) and value.ndim else plain_len(value)

    builtins.len = tensor_len
    try:
        yield
    finally:
        builtins.len = plain_len


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing of torch.export's warnings, log lines and printed graphs reaches the user's terminal."""
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
