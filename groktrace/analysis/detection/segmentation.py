"""Curves with error bars as flat and straight pieces: the best partition, and draws of all that the data allow."""

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np

from groktrace.analysis.detection.settings import DEFAULTS

# Sums over partitions leave out what adds less than the rounding: exp(−NEVER/2).
NEVER = 80.0


@dataclass(frozen=True, eq=False)
class Data:
    """A curve with error bars.

    Attributes:
        x: abscissa, ascending, [T], T ≥ 2.
        value: [T].
        variance: of each value, positive, [T].
    """

    x: np.ndarray
    value: np.ndarray
    variance: np.ndarray

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True, eq=False)
class Fit:
    """The best partition of a curve into pieces.

    Attributes:
        data: that are fitted.
        value: fitted value at each point, [T].
        variance: its variance at each point, [T].
        starts: first index of each piece, ascending from 0.
        cost: χ² + log(T) for each parameter and each piece's place.
    """

    data: Data
    value: np.ndarray
    variance: np.ndarray
    starts: list[int]
    cost: float

    def pieces(self) -> list[tuple[int, int]]:
        """First and last index of each piece."""
        return [(start, end - 1) for start, end in itertools.pairwise([*self.starts, len(self.value)])]

    def cost_within(self, window: tuple[int, int], slope_price: float = DEFAULTS.slope_price) -> float:
        """χ² of the points from one index to another, and log(T) for each parameter and inner break of their pieces."""
        first, last = window
        squares = (self.data.value - self.value) ** 2 / self.data.variance
        chi2 = float(np.sum(squares[first : last + 1]))
        inside = [(a, b) for a, b in self.pieces() if a <= last and b >= first]
        parameters = sum(2 + slope_price * (self.value[a] != self.value[b]) for a, b in inside) - 1
        return chi2 + math.log(len(self.value)) * parameters


def segment(data: Data, slope_price: float = DEFAULTS.slope_price) -> Fit:
    """The partition into constant and linear pieces of least cost, exactly, by dynamic programming in O(T²).

    A piece costs its weighted χ² and log(T) (BIC) for its place, its level and, if it is linear, its slope; it has two
    points or more.

    Args:
        data: the curve.
        slope_price: of a slope, in units of log(T).
    """
    count, pieces = len(data), _Pieces(data, slope_price)
    best = np.full(count + 1, np.inf)
    best[0] = 0.0
    previous = np.zeros(count + 1, dtype=int)
    for end in range(2, count + 1):
        first, total = pieces.ending(end, best)
        choice = int(np.argmin(total))
        previous[end], best[end] = first + choice, total[choice]
        pieces.leave_out(total > best[end] + pieces.most)
    ends = [count]
    while previous[ends[-1]]:
        ends.append(int(previous[ends[-1]]))
    bounds = [0, *reversed(ends)]
    fitted, spread = np.empty(count), np.empty(count)
    for start, end in itertools.pairwise(bounds):
        line, x = _piece(data, start, end, slope_price), data.x[start:end]
        fitted[start:end] = line.level + line.slope * (x - line.centre)
        spread[start:end] = line.level_variance + line.slope_variance * (x - line.centre) ** 2
    return Fit(data, fitted, spread, bounds[:-1], float(best[count]))


def straight_cost(data: Data, slope_price: float = DEFAULTS.slope_price) -> float:
    """What a single linear piece costs.

    Args:
        data: the curve.
        slope_price: see `segment`.
    """
    root = 1 / np.sqrt(data.variance)
    design = np.column_stack([root, root * (data.x - data.x.mean())])
    residual = data.value * root - design @ np.linalg.lstsq(design, data.value * root, rcond=None)[0]
    return float(np.sum(residual**2)) + (2 + slope_price) * math.log(len(data))


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
    def through(cls, data: Data, start: int, end: int) -> "Line":
        """Weighted least squares.

        Args:
            data: the curve.
            start: index of the first of two points or more.
            end: index after the last.
        """
        w, x, y = 1 / data.variance[start:end], data.x[start:end], data.value[start:end]
        total = float(w.sum())
        centre, level = float(w @ x) / total, float(w @ y) / total
        dx = x - centre
        wx = w * dx
        sxx = float(wx @ dx)
        return cls(centre, level, float(wx @ (y - level)) / sxx, 1 / total, 1 / sxx)


def draw_curves(
    data: Data, draws: int, generator: np.random.Generator, slope_price: float = DEFAULTS.slope_price
) -> tuple[np.ndarray, np.ndarray]:
    """Independent draws from the posterior over partitions and over the lines of their pieces.

    exp(−cost/2) approximates a partition's probability; the recursion that finds the best also sums it over all, and is
    drawn from backwards (Fearnhead 2006, Exact and efficient Bayesian inference for multiple changepoint problems).

    Args:
        data: the curve.
        draws: how many.
        generator: of the draws.
        slope_price: see `segment`.

    Returns:
        The curves at the points, [draws, T], and whether a piece begins there, [draws, T].
    """
    count, pieces = len(data), _Pieces(data, slope_price)
    cost = np.full(count + 1, np.inf)  # −2·log Σ exp(−cost/2) over the partitions of the first t points
    cost[0] = 0.0
    for end in range(2, count + 1):
        _, total = pieces.ending(end, cost)
        least = total.min()
        cost[end] = least - 2 * math.log(np.exp(0.5 * (least - total)).sum())
        pieces.leave_out(total > cost[end] + pieces.most + NEVER)
    curves, begins = np.empty((draws, count)), np.zeros((draws, count), dtype=bool)
    cumulative: dict[int, np.ndarray] = {}
    lines: dict[tuple[int, int], Line] = {}
    for curve, begin in zip(curves, begins, strict=True):
        end = count
        while end:
            if end not in cumulative:
                total = cost[: end - 1] + _costs_ending(data, end, slope_price)
                cumulative[end] = np.cumsum(np.exp(0.5 * (cost[end] - total)))
            sums = cumulative[end]
            start = min(int(np.searchsorted(sums, generator.random() * sums[-1], side="right")), end - 2)
            if (start, end) not in lines:
                lines[start, end] = _piece(data, start, end, slope_price)
            line = lines[start, end]
            noise = generator.standard_normal(2)
            level = line.level + math.sqrt(line.level_variance) * noise[0]
            slope = line.slope + math.sqrt(line.slope_variance) * noise[1]
            curve[start:end] = level + slope * (data.x[start:end] - line.centre)
            begin[start] = True
            end = start
    return curves, begins


class _Pieces:
    """The costs of all pieces that end at one point, kept from point to point.

    Attributes:
        most: the most that a piece costs beside its χ².
    """

    def __init__(self, data: Data, slope_price: float) -> None:
        self._points = data.x.tolist(), data.value.tolist(), (1 / data.variance).tolist()
        self._price, self._slope_price = math.log(len(data)), slope_price
        self.most = (2 + slope_price) * self._price
        # By first point: weight, means of abscissa and value, their sums of squares and products about those.
        self._moments = np.zeros((6, len(data)))
        self._scratch = np.empty((5, len(data)))
        self._end = self._first = self._next = 0

    def ending(self, end: int, before: np.ndarray) -> tuple[int, np.ndarray]:
        """What partitions cost whose last piece ends before one point, by where that piece begins.

        Args:
            end: one past the last point; no less than in the call before.
            before: costs of the partitions of the first t points, [T + 1].

        Returns:
            The first start, and the costs of that and all later ones but for pieces of a single point.
        """
        while self._end < end:
            self._add()
        live = slice(self._first, end - 1)
        *_, sxx, sxy, syy = self._moments[:, live]
        cost = _cheaper(sxx, sxy, syy, self._price, self._slope_price, self._scratch[0, live])
        cost += before[live]
        return self._first, cost

    def leave_out(self, hopeless: np.ndarray) -> None:
        """Forget the starts up to the first that is not hopeless: one that costs more than the best by all of `most`.

        A later end would do no worse with a break here, as χ² is never less than that of two parts (Killick, Fearnhead
        and Eckley 2012, Optimal detection of changepoints with a linear computational cost, theorem 3.1). That break
        leaves a single point to an end one further on, for which such a start is kept.

        Args:
            hopeless: for the starts that `ending` has returned.
        """
        self._first, self._next = self._next, max(self._next, self._first + int(np.argmin(hopeless)))

    def _add(self) -> None:
        """Take in one more point (Welford's update, which loses no digits)."""
        x, y, w = (column[self._end] for column in self._points)
        live = slice(self._first, self._end)
        weight, mean_x, mean_y, sxx, sxy, syy = self._moments[:, live]
        dx, dy, share, factor, term = self._scratch[:, live]
        np.subtract(x, mean_x, out=dx)
        np.subtract(y, mean_y, out=dy)
        np.add(weight, w, out=term)
        np.divide(w, term, out=share)
        np.multiply(weight, share, out=factor)
        weight[:] = term
        mean_x += np.multiply(share, dx, out=term)
        mean_y += np.multiply(share, dy, out=term)
        syy += np.multiply(np.multiply(factor, dy, out=term), dy, out=term)
        factor *= dx
        sxx += np.multiply(factor, dx, out=term)
        sxy += np.multiply(factor, dy, out=term)
        self._moments[:3, self._end] = w, x, y
        self._end += 1


def _costs_ending(data: Data, end: int, slope_price: float) -> np.ndarray:
    """Costs of the pieces [start, end) for every start ≤ end − 2, [end − 1].

    Moments are summed from the end backwards, about the last point, so that short pieces lose no digits.
    """
    w = 1 / data.variance[:end][::-1]
    dx, dy = data.x[:end][::-1] - data.x[end - 1], data.value[:end][::-1] - data.value[end - 1]
    s, sx, sy, sxx, sxy, syy = np.cumsum([w, w * dx, w * dy, w * dx**2, w * dx * dy, w * dy**2], axis=1)[:, 1:]
    sxx -= sx * sx / s
    sxy -= sx * sy / s
    syy -= sy * sy / s
    return _cheaper(sxx, sxy, np.maximum(syy, 0.0), math.log(len(data)), slope_price, np.empty(end - 1))[::-1]


def _cheaper(
    sxx: np.ndarray, sxy: np.ndarray, syy: np.ndarray, price: float, slope_price: float, out: np.ndarray
) -> np.ndarray:
    """What pieces cost, flat or with a slope, whichever is less; by their sums of squares and products about the means.

    Args:
        sxx: of the abscissa, [pieces].
        sxy: of abscissa and value, [pieces].
        syy: of the value, [pieces].
        price: log(T).
        slope_price: of a slope, in units of that.
        out: filled and returned, [pieces].
    """
    # What a slope takes off χ², less its price.
    np.multiply(sxy, sxy, out=out)
    out /= sxx
    np.minimum(out, syy, out=out)
    out -= slope_price * price
    np.maximum(out, 0.0, out=out)
    np.subtract(syy, out, out=out)
    out += 2 * price
    return out


def _piece(data: Data, start: int, end: int, slope_price: float) -> Line:
    """The line of one piece: flat where its slope is not worth its price."""
    line = Line.through(data, start, end)
    if line.slope**2 <= slope_price * math.log(len(data)) * line.slope_variance:
        return replace(line, slope=0.0, slope_variance=0.0)
    return line
