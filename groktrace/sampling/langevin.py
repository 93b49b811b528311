"""Langevin dynamics on stacked weight vectors: settings, state, init, step.

Target: density ∝ exp(−U(w)), U(w) = nβ·L(w) + (γ/2)‖w − w*‖². With ξ_t standard normal and momenta p,

- "sgld":     w_{t+1} = w_t − (ε/2)∇U(w_t) + √ε·ξ_t                     (Welling & Teh 2011)
- "averaged": w_{t+1} = w_t − (ε/2)∇U(w_t) + √ε·(ξ_t + ξ_{t+1})/2       (Leimkuhler & Matthews 2013, arXiv 1203.5428)
- "kinetic":  q = p_t − √ε·∇U(w_t),  p_{t+1} = c·q + √(1 − c²)·ξ_{t+1},  w_{t+1} = w_t + √ε·(q + p_{t+1})/2

The last is their BAOAB with time step √ε, whose limit at high friction, c = 0, is the second. Both are exact in every
harmonic direction for any stable ε (that is εa < 4 along a direction of curvature a), where the first is too wide by
1/(1 − εa/4), all at the cost of one gradient. With momenta a flat direction, whose curvature is γ, forgets its start in
fewer steps: in 2.5/√(εγ) and not in 2/(εγ) where friction damps it critically, c = exp(−2√(εγ)). But where stiff
directions turn along the way, friction that weak lets the discretisation feed energy into them: networks at generic
solutions were heated at c = 0.82, but not at 0.67, the most that is taken at the step that is the default. Where that
was halved, friction may be as much weaker: the estimates of such networks are right then, too.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from groktrace.sampling.noise import NormalNoise

Method = Literal["kinetic", "averaged", "sgld"]

# Least friction times the time step.
MIN_FRICTION = 0.4
# On a processor so many columns are advanced at once: all that a step needs of two chains then stays in its cache.
BLOCK = 2**17


def persistence(method: Method, step_size: float, localization: float, halvings: int = 0) -> float:
    """c, what is left of a momentum after a step.

    Args:
        method: of the dynamics.
        step_size: ε.
        localization: γ.
        halvings: how often ε was halved.
    """
    return math.exp(-_friction(step_size * localization, halvings)) if method == "kinetic" else 0.0


def relaxation_steps(method: Method, step_size: float, localization: float, halvings: int = 0) -> float:
    """Steps between two nearly independent draws along a flat direction: its square keeps e⁻² of what it was at most.

    Args:
        method: of the dynamics.
        step_size: ε.
        localization: γ.
        halvings: how often ε was halved.
    """
    stiffness = step_size * localization
    if method != "kinetic":
        return 2 / stiffness
    # At critical damping (1 + x)²·e⁻²ˣ is left after x/√(εγ) steps, a twelfth at x = 2.5; overdamped it is slower.
    return max(2.5 / math.sqrt(stiffness), _friction(stiffness, halvings) / stiffness)


def noise_gain(method: Method, step_size: float, localization: float, halvings: int = 0) -> float:
    """What noise of variance V in the force nβ·∇L adds to a variance in equilibrium, over that and V.

    A kick moves a chain by ½ε(1 + c)/(1 − c) times itself in the end, and what warms the chain by √ε(1 − c²)^½/(1 − c).

    Args:
        method: of the dynamics.
        step_size: ε.
        localization: γ.
        halvings: how often ε was halved.
    """
    c = persistence(method, step_size, localization, halvings)
    return 0.25 * step_size * (1 + c) / (1 - c)


def _friction(stiffness: float, halvings: int) -> float:
    """Friction times time step; `stiffness` is εγ."""
    return max(2 * math.sqrt(stiffness), MIN_FRICTION / 2**halvings)


@dataclass(frozen=True)
class LangevinConfig:
    """The dynamics.

    Attributes:
        method: "kinetic", "averaged" or "sgld".
        nbeta: nβ.
        localization: γ.
        step_size: ε of each row, [R].
        halvings: how often each was halved, [R]; None for never.
    """

    method: Method
    nbeta: float
    localization: float
    step_size: Tensor
    halvings: Tensor | None = None

    @cached_property
    def coefficients(self) -> tuple[Tensor, ...]:
        """−√ε·nβ, −√ε·γ, ½√ε, c and √(1 − c²), [R, 1] each."""
        root, c = self.step_size.sqrt()[:, None], self._each(persistence)
        return -root * self.nbeta, -root * self.localization, 0.5 * root, c, (1 - c**2).sqrt()

    @cached_property
    def noise_gain(self) -> Tensor:
        """See the function of this name, [R]."""
        return self._each(noise_gain)[:, 0]

    def select(self, rows: Tensor) -> "LangevinConfig":
        """The dynamics of some of the rows."""
        halvings = None if self.halvings is None else self.halvings[rows]
        return LangevinConfig(self.method, self.nbeta, self.localization, self.step_size[rows], halvings)

    def _each(self, function: Callable[[Method, float, float, int], float]) -> Tensor:
        """A function of method, ε, γ and halvings for each row, [R, 1]."""
        halvings = [0] * len(self.step_size) if self.halvings is None else self.halvings.tolist()
        rows = zip(self.step_size.tolist(), halvings, strict=True)
        values = [[function(self.method, epsilon, self.localization, halved)] for epsilon, halved in rows]
        return torch.tensor(values, dtype=self.step_size.dtype, device=self.step_size.device)


@dataclass
class LangevinState:
    """R chains; the tensors are updated in place.

    Attributes:
        displacement: w − w*, [R, D].
        momentum: p_t, [R, D]; "sgld" leaves it unused.
        fresh: room for ξ_{t+1} of a block of columns, flat.
        normal: what draws them.
        generators: one a row, so that a chain's noise does not depend on what it is stacked with.
    """

    displacement: Tensor
    momentum: Tensor
    fresh: Tensor
    normal: NormalNoise
    generators: list[torch.Generator]

    def select(self, rows: Tensor) -> "LangevinState":
        """The state of some of the chains."""
        displacement, generators = self.displacement[rows], [self.generators[r] for r in rows.tolist()]
        return LangevinState(displacement, self.momentum[rows], *_noise(displacement), generators)

    def draw(self) -> Tensor:
        """ξ_{t+1} of a block, [R, columns]; the next call overwrites it."""
        fresh = self.fresh.view_as(self.displacement)
        self.normal.fill(fresh, self.generators)
        return fresh

    def blocks(self) -> Iterator[tuple[slice, "LangevinState"]]:
        """Some columns after another, and the state of these, whose tensors are views."""
        rows, size = self.displacement.shape
        width = len(self.fresh) // rows
        for first in range(0, size, width):
            columns = slice(first, min(first + width, size))
            w, p = self.displacement[:, columns], self.momentum[:, columns]
            yield columns, LangevinState(w, p, self.fresh[: w.numel()], self.normal, self.generators)


def generator_for(seed: int, snapshot: int, chain: int, purpose: str, device: torch.device) -> torch.Generator:
    """A generator keyed by (seed, snapshot, chain) and what it is for.

    Args:
        seed: of all random numbers.
        snapshot: a number that no other snapshot has, of this run or another; without a run, its step.
        chain: its number.
        purpose: what the generator is for.
        device: where it draws.
    """
    key = hashlib.sha256(f"{purpose}:{seed}:{snapshot}:{chain}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(key[:4], "little"))


def _noise(like: Tensor) -> tuple[Tensor, NormalNoise]:
    """Room for the noise of a block, and what draws it; a GPU takes all columns at once."""
    rows, size = like.shape
    width = min(size, BLOCK) if like.device.type == "cpu" else size
    return like.new_empty(rows * width), NormalNoise((rows, width), like.dtype, like.device)


def init(config: LangevinConfig, start: Tensor, generators: list[torch.Generator]) -> LangevinState:
    """Chains before their first step.

    Args:
        config: the dynamics.
        start: w − w* of each row, [R, D].
        generators: one a row.
    """
    state = LangevinState(start, torch.empty_like(start), *_noise(start), generators)
    if config.method != "sgld":
        for _, block in state.blocks():
            block.momentum.copy_(block.draw())
    return state


def step(config: LangevinConfig, state: LangevinState, gradients: Tensor) -> None:
    """Advance every chain by one step, in place.

    Args:
        config: the dynamics.
        state: a block of w_t; becomes w_{t+1}.
        gradients: ∇L(w_t) of the same columns, [R, columns].
    """
    w, p, fresh = state.displacement, state.momentum, state.draw()
    if config.method == "sgld":
        epsilon = config.step_size[:, None]
        w.mul_(1 - 0.5 * epsilon * config.localization).addcmul_(gradients, -0.5 * epsilon * config.nbeta)
        w.addcmul_(fresh, epsilon.sqrt())
        return
    force, pull, half, kept, renewed = config.coefficients
    p.addcmul_(gradients, force).addcmul_(w, pull)
    w.addcmul_(p, half)
    p.mul_(kept).addcmul_(fresh, renewed)
    w.addcmul_(p, half)
