"""Langevin dynamics on stacked weight vectors: settings, state, init, step.

Target: density ∝ exp(−U(w)), U(w) = nβ·L(w) + (γ/2)‖w − w*‖². With ξ_t standard normal,

- "sgld":     w_{t+1} = w_t − (ε/2)∇U(w_t) + √ε·ξ_t                (Welling & Teh 2011)
- "averaged": w_{t+1} = w_t − (ε/2)∇U(w_t) + √ε·(ξ_t + ξ_{t+1})/2  (Leimkuhler & Matthews 2013, arXiv 1203.5428)

The first is too wide by 1/(1 − εa/4) along a direction of curvature a; the second is exact in every harmonic direction
for any stable ε (εa < 4), at the same cost.
"""

import hashlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from groktrace.sampling.noise import NormalNoise


@dataclass(frozen=True)
class LangevinConfig:
    """The dynamics.

    Attributes:
        method: "averaged" or "sgld".
        nbeta: nβ.
        localization: γ.
        step_size: ε of each row, [R].
    """

    method: Literal["averaged", "sgld"]
    nbeta: float
    localization: float
    step_size: Tensor


@dataclass
class LangevinState:
    """R chains; the tensors are updated in place.

    Attributes:
        displacement: w − w*, [R, D].
        noise: ξ_t, [R, D]; "sgld" leaves it unused.
        fresh: room for ξ_{t+1}, [R, D].
        normal: what draws them.
        generators: one a row, so that a chain's noise does not depend on what it is stacked with.
    """

    displacement: Tensor
    noise: Tensor
    fresh: Tensor
    normal: NormalNoise
    generators: list[torch.Generator]

    def select(self, rows: Tensor) -> "LangevinState":
        """The state of some of the chains."""
        return LangevinState(
            self.displacement[rows],
            self.noise[rows],
            self.fresh[rows],
            NormalNoise((len(rows), self.noise.shape[1]), self.noise.dtype, self.noise.device),
            [self.generators[r] for r in rows.tolist()],
        )


def generator_for(seed: int, step: int, chain: int, purpose: str, device: torch.device) -> torch.Generator:
    """A generator keyed by (seed, training step, chain) and what it is for."""
    key = hashlib.sha256(f"{purpose}:{seed}:{step}:{chain}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(key[:4], "little"))


def init(config: LangevinConfig, start: Tensor, generators: list[torch.Generator]) -> LangevinState:
    """Chains before their first step.

    Args:
        config: the dynamics.
        start: w − w* of each row, [R, D].
        generators: one a row.
    """
    noise, normal = torch.empty_like(start), NormalNoise(tuple(start.shape), start.dtype, start.device)
    if config.method == "averaged":
        normal.fill(noise, generators)
    return LangevinState(start, noise, torch.empty_like(start), normal, generators)


def step(config: LangevinConfig, state: LangevinState, gradients: Tensor) -> None:
    """Advance every chain by one step, in place.

    Args:
        config: the dynamics.
        state: w_t; becomes w_{t+1}.
        gradients: ∇L(w_t), [R, D].
    """
    epsilon = config.step_size[:, None]
    state.normal.fill(state.fresh, state.generators)
    state.displacement.mul_(1 - 0.5 * epsilon * config.localization)
    state.displacement.addcmul_(gradients, -0.5 * epsilon * config.nbeta)
    if config.method == "averaged":
        state.displacement.addcmul_(state.noise.add_(state.fresh), 0.5 * epsilon.sqrt())
        state.noise, state.fresh = state.fresh, state.noise
    else:
        state.displacement.addcmul_(state.fresh, epsilon.sqrt())
