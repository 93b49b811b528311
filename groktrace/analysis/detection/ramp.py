"""A straight change between two phases that it is joined to: where its edges lie, and how well that is known."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from groktrace.analysis.detection.segmentation import Data
from groktrace.analysis.detection.settings import DEFAULTS, DetectionSettings

# Middles and widths of a ramp that are tried in each round, ever more closely.
PLACES = 17
ROUNDS = 3
# The width, in snapshots, from which on a ramp is a jump.
NARROWEST = 0.002


@dataclass(frozen=True)
class Ramp:
    """A straight change between two phases that it is joined to.

    Attributes:
        middle: abscissa half-way through, the posterior's median.
        low, high: its 90 % interval.
        begin, end: index of the last point before the change, and of the first after it.
        before, after: values at its edges.
        error: standard error of after − before.
        edges: abscissae of the best.
        chi2: of the points of the change and its phases.
        parameters: of those.
    """

    middle: float
    low: float
    high: float
    begin: int
    end: int
    before: float
    after: float
    error: float
    edges: tuple[float, float]
    chi2: float
    parameters: int

    def cost(self, price: float) -> float:
        """χ² and the price of its parameters."""
        return self.chi2 + price * self.parameters


def fit_ramp(
    data: Data,
    change: tuple[int, int],
    window: tuple[int, int],
    others: Sequence[tuple[float, float]] = (),
    sloped: tuple[bool, bool] = (False, False),
    settings: DetectionSettings = DEFAULTS,
) -> Ramp:
    """Fit a ramp to one change, over all middles and widths, for each with the best levels.

    The edges may lie between snapshots; a jump is a ramp inside one gap. The prior is flat in the middle and in the
    logarithm of the width, both counted in snapshots.

    Args:
        data: the curve.
        change: first and last index of the change.
        window: first and last index of the points that are fitted.
        others: edges, as abscissae, of other changes among them, whose heights are fitted too.
        sloped: whether the phases before and after have slopes of their own.
        settings: how much wider intervals are, and where edges lie.
    """
    x, (first, last), (low, high) = data.x, change, window
    points = slice(low, high + 1)
    at, root = x[points], 1 / np.sqrt(data.variance[points])
    offset = float(data.value[points].mean())
    target = (data.value[points] - offset) * root
    known = [np.clip((at - begin) / (end - begin), 0.0, 1.0) for begin, end in others]
    centre = x[first] + x[last]
    floor = max((end for begin, end in others if begin + end < centre), default=at[0])
    ceiling = min((begin for begin, end in others if begin + end >= centre), default=at[-1])
    # One change may reach into the next by a snapshot, for which of the two a peak belongs to is open.
    order = np.interp([floor, ceiling], x, np.arange(len(x))) + np.array([-1.0, 1.0])
    reach = 0.5 * (last - first) + 3.0
    middles, widths = ((first + last) / 2 - reach, (first + last) / 2 + reach), (NARROWEST, 4 * reach)
    for _ in range(ROUNDS):
        m, w = np.meshgrid(np.linspace(*middles, PLACES), np.geomspace(*widths, PLACES), indexing="ij")
        inside = (m - w / 2 >= max(low, order[0]) - 1e-9) & (m + w / 2 <= min(high, order[1]) + 1e-9)
        if not inside.any():
            m, w, inside = np.array([(low + high) / 2]), np.array([float(high - low)]), np.array([True])
        m, w = m[inside], w[inside]
        index = np.arange(len(x))
        a, b = np.interp(m - w / 2, index, x)[:, None], np.interp(m + w / 2, index, x)[:, None]
        basis = [np.ones((len(m), len(at))), np.clip((at - a) / (b - a), 0.0, 1.0)]
        if sloped[0]:
            basis.append(np.minimum(np.maximum(at, floor) - a, 0.0))
        if sloped[1]:
            basis.append(np.maximum(np.minimum(at, ceiling) - b, 0.0))
        basis += [np.broadcast_to(rise, (len(m), len(at))) for rise in known]
        design = np.stack(basis, axis=1) * root
        gram = design @ design.transpose(0, 2, 1)
        # A slope that no point bears on is left at zero.
        gram += 1e-9 * np.einsum("gkk->g", gram)[:, None, None] * np.eye(len(basis))
        inverse = np.linalg.inv(gram)
        coefficients = (inverse @ (design @ target)[:, :, None])[:, :, 0]
        chi2 = np.sum((target - np.einsum("gki,gk->gi", design, coefficients)) ** 2, axis=1)
        best = int(np.argmin(chi2))
        weight = np.exp(-0.5 * (chi2 - chi2[best]))
        # The next round looks more closely where the weight is.
        likely = weight > 1e-3
        step = (middles[1] - middles[0]) / (PLACES - 1)
        middles = float(m[likely].min()) - step, float(m[likely].max()) + step
        ratio = (widths[1] / widths[0]) ** (1 / (PLACES - 1))
        widths = max(float(w[likely].min()) / ratio, NARROWEST), float(w[likely].max()) * ratio
    # Half-way up lies midway between the edges on the abscissa, which need not be so in snapshots.
    places, merged = np.unique(np.round(0.5 * (a + b)[:, 0], 9), return_inverse=True)
    share = np.bincount(merged, weight) / weight.sum()
    quantiles = np.interp([0.05, 0.5, 0.95], np.cumsum(share) - share / 2, places)
    # The change's error is that of its levels for one middle and width, and how much it differs between them.
    likelihood = weight / weight.sum()
    change_variance = likelihood @ (inverse[:, 1, 1] + (coefficients[:, 1] - coefficients[best, 1]) ** 2)
    near = (at >= min(floor, a[best, 0])) & (at <= max(ceiling, b[best, 0]))
    residual = target - coefficients[best] @ design[best]
    widen = settings.jump_widening if w[best] < 2.5 else settings.ramp_widening
    quantiles[[0, 2]] = np.clip(quantiles[1] + widen * (quantiles[[0, 2]] - quantiles[1]), at[0], at[-1])
    edge = settings.edge * (b[best, 0] - a[best, 0])
    bounds = np.interp([a[best, 0] + edge, b[best, 0] - edge], x, index)
    begin = min(max(math.floor(bounds[0]), low), high - 1)
    end = max(min(math.ceil(bounds[1]), high), begin + 1)
    base, change_by = coefficients[best, :2].tolist()
    heights = coefficients[best, len(basis) - len(known) :] if known else []
    before = base + sum(
        height * float(np.clip((a[best, 0] - start) / (stop - start), 0.0, 1.0))
        for height, (start, stop) in zip(heights, others, strict=True)
    )
    return Ramp(
        *quantiles[[1, 0, 2]].tolist(),
        begin,
        end,
        before + offset,
        before + change_by + offset,
        math.sqrt(float(change_variance)),
        (float(a[best, 0]), float(b[best, 0])),
        float(np.sum(residual[near] ** 2)),
        len(basis) - len(known) + 2,
    )
