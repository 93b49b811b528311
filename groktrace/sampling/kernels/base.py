"""What a sampler is, and the chains that it advances.

Target: density ∝ exp(−U(w)), U(w) = nβ·L(w) + (γ/2)‖w − w*‖².
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from groktrace.sampling.noise import NormalNoise, copy_generator

# On a processor so many columns are advanced at once: all that a step needs of two chains then stays in its cache.
BLOCK = 2**17


@runtime_checkable
class Kernel(Protocol):
    """One step of a Markov chain, as a function of arrays: it knows neither losses nor files.

    Its name and two facts are read only: attributes of a class, also of a frozen one, will do.
    """

    @property
    def name(self) -> str:
        """What it is called in settings and results."""
        ...

    @property
    def vanilla(self) -> bool:
        """Whether chains start at w* and take the gradients of minibatches as they are, as in published SGLD.

        Else they start near equilibrium, with a control variate.
        """
        ...

    @property
    def momentum_is_noise(self) -> bool:
        """Whether the momentum after a step is the noise that the step drew, and nothing else."""
        ...

    def coefficients(self, step_size: float, nbeta: float, localization: float, halvings: int = 0) -> tuple[float, ...]:
        """What `step` multiplies with; it gets them as tensors, one number a chain.

        Args:
            step_size: ε.
            nbeta: nβ.
            localization: γ.
            halvings: how often ε was halved because chains diverged.
        """
        ...

    def step(
        self, displacement: Tensor, momentum: Tensor, gradient: Tensor, noise: Tensor, coefficients: tuple[Tensor, ...]
    ) -> None:
        """Advance R chains by one step, in place.

        Args:
            displacement: w − w*, [R, columns]; becomes that of the next step.
            momentum: standard normal at first, [R, columns]; becomes that of the next step.
            gradient: ∇L(w), [R, columns].
            noise: standard normal, fresh at each step, [R, columns].
            coefficients: see `coefficients`, [R, 1] each.
        """
        ...

    def relaxation(self, step_size: float, localization: float, halvings: int = 0) -> float:
        """Steps between two nearly independent draws along a flat direction, where U has the curvature γ.

        Args:
            step_size: ε.
            localization: γ.
            halvings: how often ε was halved.
        """
        ...

    def noise_gain(self, step_size: float, localization: float, halvings: int = 0) -> float:
        """Increase of a stationary variance by gradient noise, divided by that variance and by the noise's, of nβ·∇L.

        Args:
            step_size: ε.
            localization: γ.
            halvings: how often ε was halved.
        """
        ...


@dataclass(frozen=True)
class Dynamics:
    """A kernel at the settings of R chains.

    Attributes:
        kernel: whose steps they make.
        nbeta: nβ.
        localization: γ.
        step_size: ε of each row, [R].
        halvings: how often each was halved, [R]; None for never.
    """

    kernel: Kernel
    nbeta: float
    localization: float
    step_size: Tensor
    halvings: Tensor | None = None

    @cached_property
    def coefficients(self) -> tuple[Tensor, ...]:
        """Those of the kernel, [R, 1] each."""
        of_rows = self._of_rows(lambda e, h: self.kernel.coefficients(e, self.nbeta, self.localization, h))
        return tuple(of_rows[:, i : i + 1].contiguous() for i in range(of_rows.shape[1]))

    @cached_property
    def noise_gain(self) -> Tensor:
        """That of the kernel, [R]."""
        return self._of_rows(lambda e, h: (self.kernel.noise_gain(e, self.localization, h),))[:, 0]

    def select(self, rows: Tensor) -> "Dynamics":
        """The dynamics of some of the rows."""
        halvings = None if self.halvings is None else self.halvings[rows]
        return Dynamics(self.kernel, self.nbeta, self.localization, self.step_size[rows], halvings)

    def step(self, state: "ChainState", gradients: Tensor) -> None:
        """Advance every chain by one step, in place.

        Args:
            state: a block of w_t; becomes w_{t+1}.
            gradients: ∇L(w_t) of the same columns, [R, columns].
        """
        self.kernel.step(state.displacement, state.momentum, gradients, state.draw(), self.coefficients)

    def _of_rows(self, function: Callable[[float, int], tuple[float, ...]]) -> Tensor:
        """Functions of ε and halvings for each row, [R, functions]."""
        halvings = [0] * len(self.step_size) if self.halvings is None else self.halvings.tolist()
        values = [function(epsilon, halved) for epsilon, halved in zip(self.step_size.tolist(), halvings, strict=True)]
        return torch.tensor(values, dtype=self.step_size.dtype, device=self.step_size.device)


@dataclass
class ChainState:
    """R chains; the tensors are updated in place.

    Attributes:
        displacement: w − w*, [R, D].
        momentum: p_t, [R, D].
        fresh: room for the noise of a block of columns, flat.
        normal: what draws it.
        generators: one a row, so that a chain's noise does not depend on what it is stacked with.
    """

    displacement: Tensor
    momentum: Tensor
    fresh: Tensor
    normal: NormalNoise
    generators: list[torch.Generator]

    @classmethod
    def begin(cls, dynamics: Dynamics, start: Tensor, generators: list[torch.Generator]) -> "ChainState":
        """Chains before their first step.

        Args:
            dynamics: whose momenta they are to have.
            start: w − w* of each row, [R, D].
            generators: one a row.
        """
        state = cls(start, torch.empty_like(start), *_noise(start), generators)
        if not dynamics.kernel.vanilla:
            for _, block in state.blocks():
                block.momentum.copy_(block.draw())
        return state

    def select(self, rows: Tensor) -> "ChainState":
        """The state of some of the chains."""
        displacement, generators = self.displacement[rows], [self.generators[r] for r in rows.tolist()]
        return ChainState(displacement, self.momentum[rows], *_noise(displacement), generators)

    def saved(self, rows: Tensor) -> "ChainState":
        """A copy of some of the chains as they are."""
        chosen = self.select(rows)
        return replace(chosen, generators=list(map(copy_generator, chosen.generators)))

    def restore(self, rows: Tensor, saved: "ChainState") -> None:
        """Put chains back to what `saved` returned."""
        self.displacement[rows], self.momentum[rows] = saved.displacement, saved.momentum
        for r, generator in zip(rows.tolist(), saved.generators, strict=True):
            self.generators[r] = generator

    def draw(self) -> Tensor:
        """Noise of a block, [R, columns]; the next call overwrites it."""
        fresh = self.fresh.view_as(self.displacement)
        self.normal.fill(fresh, self.generators)
        return fresh

    def blocks(self) -> Iterator[tuple[slice, "ChainState"]]:
        """Some columns after another, and the state of these, whose tensors are views."""
        rows, size = self.displacement.shape
        width = len(self.fresh) // rows
        for first in range(0, size, width):
            columns = slice(first, min(first + width, size))
            w, p = self.displacement[:, columns], self.momentum[:, columns]
            yield columns, ChainState(w, p, self.fresh[: w.numel()], self.normal, self.generators)


def _noise(like: Tensor) -> tuple[Tensor, NormalNoise]:
    """Room for the noise of a block, and what draws it; a GPU takes all columns at once."""
    rows, size = like.shape
    width = min(size, BLOCK) if like.device.type == "cpu" else size
    return like.new_empty(rows * width), NormalNoise((rows, width), like.dtype, like.device)
