"""The loss as a program: a graph of ATen calls, kept as JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from groktrace.errors import RunError, TaskError
from groktrace.run.batch import Batch
from groktrace.run.model_with_loss import ModelWithLoss
from groktrace.run.program.allow_list import RandomError, RefusedError
from groktrace.run.program.graph import Graph, build
from groktrace.run.program.tracing import trace


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
        """The program as plain JSON, without its constants; `groktrace.run.program.graph` says what is in it."""
        return json.loads(json.dumps(self.graph.document))

    @classmethod
    def from_json(cls, document: Any, constants: dict[str, Tensor], where: str) -> "Program":
        """Rebuild a program; the document is checked as hostile input.

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
    def trace(cls, forward: ModelWithLoss, batch: Batch) -> "Program":
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
        return cls(trace(forward, batch))
