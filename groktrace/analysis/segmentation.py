"""Curves with error bars as flat and straight pieces: the best partition, and draws of all that the data allow."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

# The price of a slope, in those of a level.
SLOPE = 2.0
# Middles and widths of a ramp that are tried in each round, ever more closely.
PLACES = 17
ROUNDS = 3
# Intervals of midpoints are this much wider than the posterior's: the neighbours of a change are held where they fit
# best, and a ramp is an idealisation. As it takes for 90 % to cover 90 % on simulated curves.
JUMP_WIDENING = 1.08
RAMP_WIDENING = 1.3
# A ramp has begun, and is done, but for this share of it.
EDGE = 0.05
# The width, in snapshots, from which on a ramp is a jump.
NARROWEST = 0.002


@dataclass(frozen=True)
class Fit:
    """The best partition of a curve into pieces.

    Attributes:
        value: fitted value at each point, [T].
        variance: its variance at each point, [T].
        starts: first index of each piece, ascending from 0.
        cost: χ² + log(T) for each parameter and each piece's place.
    """

    value: np.ndarray
    variance: np.ndarray
    starts: list[int]
    cost: float

    def pieces(self) -> list[tuple[int, int]]:
        """First and last index of each piece."""
        return [(start, end - 1) for start, end in itertools.pairwise([*self.starts, len(self.value)])]

    def cost_within(self, value: np.ndarray, variance: np.ndarray, window: tuple[int, int]) -> float:
        """χ² of the points from one index to another, and log(T) for each parameter and inner break of their pieces."""
        first, last = window
        chi2 = float(np.sum((value - self.value)[first : last + 1] ** 2 / variance[first : last + 1]))
        inside = [(a, b) for a, b in self.pieces() if a <= last and b >= first]
        parameters = sum(2 + SLOPE * (self.value[a] != self.value[b]) for a, b in inside) - 1
        return chi2 + math.log(len(self.value)) * parameters


def segment(x: np.ndarray, value: np.ndarray, variance: np.ndarray) -> Fit:
    """The partition into constant and linear pieces of least cost, exactly, by dynamic programming in O(T²).

    A piece costs its weighted χ² and log(T) (BIC) for its place, its level and, if it is linear, its slope (twice, for
    phases are flat unless they clearly are not); it has two points or more.

    Args:
        x: abscissa, ascending, [T], T ≥ 2.
        value: [T].
        variance: of each value, positive, [T].
    """
    count, precision = len(value), 1 / variance
    best = np.full(count + 1, np.inf)
    best[0] = 0.0
    previous = np.zeros(count + 1, dtype=int)
    for end in range(2, count + 1):
        cost = _piece_costs(x, value, precision, end)
        total = best[: end - 1] + cost
        previous[end] = np.argmin(total)
        best[end] = total[previous[end]]
    ends = [count]
    while previous[ends[-1]]:
        ends.append(int(previous[ends[-1]]))
    bounds = [0, *reversed(ends)]
    fitted, spread = np.empty(count), np.empty(count)
    for start, end in itertools.pairwise(bounds):
        line = _piece(x, value, variance, start, end)
        fitted[start:end] = line.level + line.slope * (x[start:end] - line.centre)
        spread[start:end] = line.level_variance + line.slope_variance * (x[start:end] - line.centre) ** 2
    return Fit(fitted, spread, bounds[:-1], float(best[count]))


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
    x: np.ndarray,
    value: np.ndarray,
    variance: np.ndarray,
    change: tuple[int, int],
    window: tuple[int, int],
    others: Sequence[tuple[float, float]] = (),
    sloped: tuple[bool, bool] = (False, False),
) -> Ramp:
    """Fit a ramp to one change, over all middles and widths, for each with the best levels.

    The edges may lie between snapshots; a jump is a ramp inside one gap. The prior is flat in the middle and in the
    logarithm of the width, both counted in snapshots.

    Args:
        x: abscissa, [T].
        value: [T].
        variance: [T].
        change: first and last index of the change.
        window: first and last index of the points that are fitted.
        others: edges, as abscissae, of other changes among them, whose heights are fitted too.
        sloped: whether the phases before and after have slopes of their own.
    """
    (first, last), (low, high) = change, window
    points = slice(low, high + 1)
    at, root = x[points], 1 / np.sqrt(variance[points])
    offset = float(value[points].mean())
    target = (value[points] - offset) * root
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
        basis += [np.broadcast_to(each, (len(m), len(at))) for each in known]
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
    widen = JUMP_WIDENING if w[best] < 2.5 else RAMP_WIDENING
    quantiles[[0, 2]] = np.clip(quantiles[1] + widen * (quantiles[[0, 2]] - quantiles[1]), at[0], at[-1])
    edge = EDGE * (b[best, 0] - a[best, 0])
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


def straight_cost(x: np.ndarray, value: np.ndarray, variance: np.ndarray) -> float:
    """What a single linear piece costs.

    Args:
        x: abscissa, [T].
        value: [T].
        variance: [T].
    """
    root = 1 / np.sqrt(variance)
    design = np.column_stack([root, root * (x - x.mean())])
    residual = value * root - design @ np.linalg.lstsq(design, value * root, rcond=None)[0]
    return float(np.sum(residual**2)) + (2 + SLOPE) * math.log(len(x))


@dataclass(frozen=True)
class Line:
    """The straight line through some of the points.

    Attributes:
        centre: mean abscissa, weighted.
        level: there.
        slope: per unit of the abscissa.
        level_variance: of the level.
        slope_variance: of the slope.
    """

    centre: float
    level: float
    slope: float
    level_variance: float
    slope_variance: float

    @classmethod
    def through(cls, x: np.ndarray, value: np.ndarray, variance: np.ndarray, start: int, end: int) -> "Line":
        """Weighted least squares.

        Args:
            x: abscissa, [T].
            value: [T].
            variance: of each value, [T].
            start: index of the first of two points or more.
            end: index after the last.
        """
        w = 1 / variance[start:end]
        centre = float(np.average(x[start:end], weights=w))
        dx = x[start:end] - centre
        level, sxx = float(np.average(value[start:end], weights=w)), float(np.sum(w * dx**2))
        slope = float(np.sum(w * dx * (value[start:end] - level))) / sxx
        return cls(centre, level, slope, float(1 / w.sum()), 1 / sxx)


def draw_curves(
    x: np.ndarray, value: np.ndarray, variance: np.ndarray, draws: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Independent draws from the posterior over partitions and over the lines of their pieces.

    exp(−cost/2) approximates a partition's probability; the recursion that finds the best also sums it over all, and is
    drawn from backwards (Fearnhead 2006, Exact and efficient Bayesian inference for multiple changepoint problems).

    Args:
        x: abscissa, ascending, [T], T ≥ 2.
        value: [T].
        variance: of each value, positive, [T].
        draws: how many.
        generator: of the draws.

    Returns:
        The curves at the points, [draws, T], and whether a piece begins there, [draws, T].
    """
    count, precision = len(value), 1 / variance
    weights = np.full(count + 1, -np.inf)  # log Σ exp(−cost/2) over the partitions of the first t points
    weights[0] = 0.0
    for end in range(2, count + 1):
        exponent = weights[: end - 1] - 0.5 * _piece_costs(x, value, precision, end)
        top = exponent.max()
        weights[end] = top + math.log(np.exp(exponent - top).sum())
    curves, begins = np.empty((draws, count)), np.zeros((draws, count), dtype=bool)
    cumulative: dict[int, np.ndarray] = {}
    lines: dict[tuple[int, int], Line] = {}
    for curve, begin in zip(curves, begins, strict=True):
        end = count
        while end:
            if end not in cumulative:
                cost = _piece_costs(x, value, precision, end)
                cumulative[end] = np.cumsum(np.exp(weights[: end - 1] - 0.5 * cost - weights[end]))
            sums = cumulative[end]
            start = min(int(np.searchsorted(sums, generator.random() * sums[-1], side="right")), end - 2)
            if (start, end) not in lines:
                lines[start, end] = _piece(x, value, variance, start, end)
            line = lines[start, end]
            noise = generator.standard_normal(2)
            level = line.level + math.sqrt(line.level_variance) * noise[0]
            slope = line.slope + math.sqrt(line.slope_variance) * noise[1]
            curve[start:end] = level + slope * (x[start:end] - line.centre)
            begin[start] = True
            end = start
    return curves, begins


def _piece_costs(x: np.ndarray, value: np.ndarray, precision: np.ndarray, end: int) -> np.ndarray:
    """Costs of the pieces [start, end) for every start ≤ end − 2, [end − 1].

    Moments are summed from the end backwards, about the last point, so that short pieces lose no digits.
    """
    w = precision[end - 1 :: -1] if end < len(x) else precision[::-1]
    dx = x[:end][::-1] - x[end - 1]
    dy = value[:end][::-1] - value[end - 1]
    wx, wy = w * dx, w * dy
    sums = [np.cumsum(term)[1:] for term in (w, wx, wy, wx * dx, wx * dy, wy * dy)]
    s, sx, sy, sxx, sxy, syy = sums
    sx /= s
    sxx -= sx * sx * s
    sxy -= sx * sy
    syy -= sy * sy / s
    np.maximum(syy, 0.0, out=syy)
    # What a slope takes off χ², less its price.
    sxy *= sxy
    sxy /= sxx
    np.minimum(sxy, syy, out=sxy)
    price = math.log(len(x))
    sxy -= SLOPE * price
    syy -= np.maximum(sxy, 0.0, out=sxy)
    syy += 2 * price
    return syy[::-1]


def _piece(x: np.ndarray, value: np.ndarray, variance: np.ndarray, start: int, end: int) -> Line:
    """The line of one piece: flat where its slope is not worth its price."""
    line = Line.through(x, value, variance, start, end)
    if line.slope**2 <= SLOPE * math.log(len(value)) * line.slope_variance:
        return replace(line, slope=0.0, slope_variance=0.0)
    return line
