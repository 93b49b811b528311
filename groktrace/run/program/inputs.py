"""Classify the inputs of a traced graph as weights, data and constants."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from groktrace.run.model_with_loss import ModelWithLoss
from groktrace.run.program.allow_list import RefusedError
from groktrace.run.views import View, find_view

INDEX = ".index"  # at the end of the names of constants that number the elements of a view


class Inputs:
    """The inputs of a document: weights, then constants, then data.

    Args:
        plain: model and loss.
        signature: of the traced graph.
        lifted: tensors that the trace took as constants, by name.

    Attributes:
        entries: the inputs, once they are taken.
        constants: the constants among them.
    """

    def __init__(self, plain: ModelWithLoss, signature: Any, lifted: Mapping[str, Any]) -> None:
        self.entries: list[dict[str, Any]] = []
        self.constants: dict[str, Tensor] = {}
        self._views = plain.views
        self._known = plain.buffers_by_name() | plain.parameters_by_name()
        self._names = {id(tensor): name for name, tensor in self._known.items()}
        self._positions = {name: i for i, name in enumerate(signature.user_inputs)}
        self._targets = {spec.arg.name: spec.target for spec in signature.input_specs}
        self._state = dict(plain.named_parameters(remove_duplicate=False))
        self._state |= dict(plain.named_buffers(remove_duplicate=False))
        self._lifted = lifted

    def take(self, placeholders: Sequence[torch.fx.Node]) -> tuple[dict[torch.fx.Node, int], list[dict[str, Any]]]:
        """Number the placeholders' values, and make nodes that compute views of other weights."""
        data: dict[torch.fx.Node, int] = {}
        weights: dict[str, dict[str, Any]] = {}
        direct: dict[torch.fx.Node, tuple[str, str]] = {}
        following: dict[torch.fx.Node, View] = {}
        for node in placeholders:
            if node.name in self._positions:
                data[node] = self._positions[node.name]
                continue
            target = self._targets[node.name]
            tensor = self._state[target] if target in self._state else self._lifted.get(target)
            if not isinstance(tensor, Tensor):
                raise RefusedError(f"it needs '{target}', which is not a tensor")
            # A loss may hold the network's tensors by itself, to penalise them; they must not become constants.
            name = self._names.get(id(tensor))
            view = find_view(tensor, self._bases()) if name is None else self._views.get(name)
            if view is not None and view.dims == tuple(range(tensor.dim())):  # the base itself
                name = view.base
                direct[node] = "weight", name
            elif view is not None:
                following[node], name = view, view.base
            elif name is None:
                direct[node] = "constant", target
                self.constants[target] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
                continue
            else:
                direct[node] = "weight", name
            weights[name] = {"weight": name, "dtype": str(self._known[name].dtype).removeprefix("torch.")}
        for i, view in enumerate(following.values()):
            if view.index is not None:
                self.constants[f"view{i}{INDEX}"] = view.index.clone()
        names = [*(("weight", name) for name in weights), *(("constant", name) for name in self.constants)]
        numbers = {name: i for i, name in enumerate(names)}
        self.entries += [*weights.values(), *({"constant": name} for name in self.constants)]
        index = {node: numbers[name] for node, name in direct.items()}
        for node, position in data.items():
            index[node] = len(self.entries)
            self.entries.append({"data": position})
        nodes: list[dict[str, Any]] = []
        for i, (node, view) in enumerate(following.items()):
            base, first = numbers["weight", view.base], len(self.entries) + len(nodes)
            calls = _calls(view, base, numbers.get(("constant", f"view{i}{INDEX}")), first)
            nodes += calls
            index[node] = first + len(calls) - 1
        return index, nodes

    def _bases(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self._known.items() if name not in self._views}


def _calls(view: View, base: int, index: int | None, first: int) -> list[dict[str, Any]]:
    """Make the nodes that compute a view.

    Args:
        view: what to compute.
        base: the number of its base.
        index: the number of its index, if it has one.
        first: the number of the first node.
    """

    def node(name: str, *args: Any) -> dict[str, Any]:
        return {"target": f"aten.{name}", "args": list(args), "kwargs": {}}

    if view.dims is not None:
        return [node("permute.default", {"ref": base}, list(view.dims))]
    flat = node("reshape.default", {"ref": base}, [-1])
    if view.start is not None:
        stop = view.start + math.prod(view.shape)
        part = node("slice.Tensor", {"ref": first}, 0, view.start, stop)
        return [flat, part, node("reshape.default", {"ref": first + 1}, list(view.shape))]
    return [flat, node("index.Tensor", {"ref": first}, [{"ref": index}])]
