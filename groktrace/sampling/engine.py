"""Draws and restarts of chains, whatever advances them: a stack of small networks, or one large one."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from groktrace.sampling.calibration import more_draws, slowdown, step_size
from groktrace.sampling.settings import ResolvedSettings
from groktrace.sampling.traces import Traces, reduced_step_size
from groktrace.sampling.tuning import CALIBRATION, EQUILIBRIUM, MINIBATCH_NOISE, SUBSAMPLED, WHOLE_DATA, Effort


class Chains(Protocol):
    """The chains of some snapshots in flight."""

    @property
    def lengths(self) -> Sequence[tuple[int, int]]:
        """Burn-in and first draws of each snapshot, in steps."""
        ...

    @property
    def made(self) -> int:
        """Steps made so far."""
        ...

    def begin(self) -> list[Traces]:
        """Burn in, and make the first draws of each snapshot."""
        ...

    def extend(self, counts: Mapping[int, int]) -> dict[int, Traces]:
        """Make more draws of some snapshots; the others are dropped.

        Args:
            counts: how many, by snapshot.

        Returns:
            These draws, by snapshot.
        """
        ...

    def has_left(self, traces: Traces) -> bool:
        """Whether a chain is or was on its way out, so that a smaller step has to be tried."""
        ...


@dataclass(frozen=True)
class Target:
    """What is sampled.

    Attributes:
        settings: kernel, chains, batch size, run length.
        nbeta: nβ.
        localization: γ.
        dimension: D.
        subsampled: whether data are so many that they are sampled.
        sample_losses: whether the loss of each sample is kept at each draw.
    """

    settings: ResolvedSettings
    nbeta: float
    localization: float
    dimension: int
    subsampled: bool
    sample_losses: bool = False

    @property
    def effort(self) -> Effort:
        """What is spent on each snapshot."""
        return SUBSAMPLED if self.subsampled else WHOLE_DATA

    def has_fallen(self, fall: float, share: float) -> bool:
        """Whether nβ·L fell by more than so many nats a weight.

        Args:
            fall: of nβ·L; NaN for one without a bottom.
            share: nats a weight.
        """
        return not fall <= share * self.dimension + EQUILIBRIUM.slack

    def is_heated(self, traces: Traces) -> bool:
        """Whether the discretisation fed energy to the chains, which more draws would not mend."""
        scale = self.settings.kernel, self.localization, self.dimension
        return traces.has_energy_spike or traces.has_discretization_bias(*scale)

    def has_climbed(self, traces: Traces) -> bool:
        """Whether chains have more energy than in equilibrium, where no look at the curvature tells of their step."""
        most = EQUILIBRIUM.max_mean_total_virial * self.dimension + EQUILIBRIUM.slack
        return float(traces.total_virial.mean()) > most

    def curved_step(self, curvature: float | None, epsilon: float) -> float | None:
        """The step for the curvature that chains met, where theirs was too large for it; else None.

        Args:
            curvature: h_max there; None where it was not looked at.
            epsilon: ε of the chains.
        """
        if curvature is None or self.settings.step_size is not None:
            return None
        fitting = step_size(self.nbeta, self.localization, curvature)
        return fitting if fitting < 0.7 * epsilon else None

    def fitting_step(self, traces: Traces) -> float:
        """The step for the curvature that the chains met, or for the noise of their minibatches."""
        most = self.effort.measured_heating if traces.excess else self.effort.heating
        reduced = reduced_step_size(traces, self.settings.kernel, self.localization, most)
        return self.curved_step(traces.curvature, traces.step_size) or reduced

    def is_hopeless(self, traces: Traces, falls: int) -> bool:
        """Whether no smaller step will do, as the snapshot is in no basin."""
        for_good = self.subsampled and self.has_fallen(traces.fall, EQUILIBRIUM.fall_for_good)
        return for_good or falls > EQUILIBRIUM.tolerated_restarts

    def draw(self, chains: Chains, needed: Callable[[Traces], float]) -> list[Traces]:
        """Burn in, draw, and go on with those snapshots whose draws do not suffice yet.

        Args:
            chains: before their first step.
            needed: how many times as many draws a snapshot needs, at most 1 where they suffice; asked only where
                `settings.draws` is None.
        """
        traces = chains.begin()
        while self.settings.draws is None:
            counts = {}
            for s, drawn in enumerate(traces):
                first = chains.lengths[s][1]
                relaxation = self.settings.kernel.relaxation(drawn.step_size, self.localization, drawn.halvings)
                limit = min(max(self.effort.growth * first, math.ceil(relaxation)), CALIBRATION.max_steps)
                grows = not chains.has_left(drawn) and len(drawn.delta_loss) < limit and not self.is_heated(drawn)
                curved = self.curved_step(drawn.curvature, drawn.step_size)
                if grows and curved is None and (times := needed(drawn)) > 1:
                    counts[s] = more_draws(len(drawn.delta_loss), times)
            if not counts:
                break
            for s, more in chains.extend(counts).items():
                traces[s] = traces[s].extended(more)
        return traces


@dataclass(frozen=True)
class Attempt:
    """Which snapshots are sampled next, and how.

    Attributes:
        snapshots: S of them, by number.
        step_sizes: ε of each.
        halvings: how often that was halved.
        fitting: the ε that would suit the curvature of each.
        in_batches: whether gradients may be of minibatches.
    """

    snapshots: Sequence[int]
    step_sizes: Sequence[float]
    halvings: Sequence[int]
    fitting: Sequence[float]
    in_batches: bool


def sample_with_restarts(
    begin: Callable[[Attempt], Chains],
    step_sizes: Sequence[float],
    target: Target,
    needed: Callable[[Traces], float],
    fallback: float | None = None,
    fitting: Sequence[float] | None = None,
) -> list[Traces]:
    """Run all chains of S snapshots, again with a smaller step where that was too large.

    Args:
        begin: gives the chains of an attempt, before their first step.
        step_sizes: ε of each snapshot; halved where chains diverge, reduced where they find a larger curvature than at
            w* or where minibatch noise heats them: 16 times at most, or three where they fall far at once, and within
            the first three where the step heats them.
        target: what is sampled.
        needed: see `Target.draw`.
        fallback: how many times as much a step without minibatches costs, for chains that these throw out, or heat so
            much that a step small enough would need more of them than that; None where there is only a smaller step,
            which is tried first where chains are heated and minibatches add little.
        fitting: the ε that the curvature at w* calls for; None where those are `step_sizes`.

    Returns:
        Traces of each snapshot, those of the last attempt where its chains diverged at every step size tried.
    """
    count = len(step_sizes)
    suited = list(step_sizes if fitting is None else fitting)
    results: dict[int, Traces] = {}
    pending = list(range(count))
    epsilon, halvings, falls, lost = list(step_sizes), [0] * count, [0] * count, [0] * count
    batched = [target.settings.batch_size is not None] * count
    for attempt in range(target.effort.restarts + 1):
        again: list[int] = []
        groups = {in_batches: [s for s in pending if batched[s] is in_batches] for in_batches in (True, False)}
        for in_batches, some in groups.items():
            if not some:
                continue
            sizes, suits = ([values[s] for s in some] for values in (epsilon, suited))
            chains = begin(Attempt(some, sizes, [halvings[s] for s in some], suits, in_batches))
            for s, found, length in zip(some, target.draw(chains, needed), chains.lengths, strict=True):
                traces = results[s] = replace(found, halvings=halvings[s], lost=lost[s])
                lost[s] += min(chains.made, sum(length))
                falls[s] += target.has_fallen(traces.fall, EQUILIBRIUM.fall)
                if target.is_hopeless(traces, falls[s]):
                    continue
                curved, left = target.curved_step(traces.curvature, traces.step_size), chains.has_left(traces)
                heated = attempt < EQUILIBRIUM.tolerated_restarts and target.is_heated(traces)
                if curved is None and (left or heated):
                    heated_by_step = not left and traces.heating <= MINIBATCH_NOISE.heating
                    if in_batches and fallback is not None and not (heated_by_step and halvings[s] == 0):
                        batched[s] = False
                        again.append(s)
                        continue
                    epsilon[s] /= 2
                    suited[s] = min(suited[s], epsilon[s])
                    halvings[s] += 1
                else:
                    epsilon[s] = target.fitting_step(traces)
                    if left:
                        epsilon[s] = max(epsilon[s], traces.step_size / CALIBRATION.max_reduction)
                    if curved is not None:
                        suited[s] = min(suited[s], epsilon[s])
                    slow = slowdown(target.settings.kernel, epsilon[s], suited[s], halvings[s])
                    if in_batches and fallback is not None and slow > fallback * traces.slow:
                        epsilon[s], batched[s] = traces.step_size, False
                        again.append(s)
                        continue
                if epsilon[s] != traces.step_size:
                    again.append(s)
        pending = sorted(again)
        if not pending or target.settings.step_size is not None:
            break
    return [results[s] for s in range(count)]
