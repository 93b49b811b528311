"""Which rises and falls of a piecewise fit stand out as changes of phase."""

import itertools
import math
import statistics
from collections.abc import Callable

import numpy as np

from groktrace.analysis.detection.segmentation import Fit, Line
from groktrace.analysis.detection.settings import DEFAULTS, DetectionSettings


def find_changes(fit: Fit, settings: DetectionSettings = DEFAULTS) -> list[tuple[int, int]]:
    """First and last index of each change that is large, significant and stands out from a phase beside it.

    Args:
        fit: of the curve.
        settings: what counts as a change.
    """
    # A complexity is positive: what is negative, far off any minimum, sets no scale.
    least = settings.min_change * max(float(fit.value.max()), 0.0)
    quantile = statistics.NormalDist().inv_cdf(1 - settings.significance / (2 * len(fit.value)))

    def counts(first: int, last: int) -> bool:
        size = abs(fit.value[last] - fit.value[first])
        return size >= least and size >= quantile * math.sqrt(fit.variance[first] + fit.variance[last])

    swings = _swings(fit, counts)
    if not swings:
        return []
    # What comes before the first and after the last is part of their phases.
    swings[0] = (0, swings[0][1])
    swings[-1] = (swings[-1][0], len(fit.value) - 1)
    found = []
    for first, last in swings:
        changes = _stand_out(fit, _moves(fit, first, last, settings.jump_errors), least, counts, settings)
        if changes != [(0, len(fit.value) - 1)]:  # else the curve drifts throughout
            found += [change for change in changes if counts(*change)]
    return found


def _swings(fit: Fit, counts: Callable[[int, int], bool]) -> list[tuple[int, int]]:
    """Alternating rises and falls between extremes of the fit, each of which counts, but perhaps for the first."""
    value = fit.value
    # Straight pieces are highest and lowest at their ends.
    ends = sorted({end for piece in fit.pieces() for end in piece})
    extremes, candidate, direction = _first_swing(value, ends, counts)
    for i in range(candidate + 1, len(value) if direction else 0):
        if direction * (value[i] - value[candidate]) > 0:
            candidate = i
        elif counts(candidate, i):
            extremes.append(candidate)
            candidate, direction = i, -direction
    return [*itertools.pairwise([*extremes, candidate])] if direction else []


def _first_swing(
    value: np.ndarray, ends: list[int], counts: Callable[[int, int], bool]
) -> tuple[list[int], int, float]:
    """Where the first rise or fall that counts begins, by which point it does, and its sign; 0 for none.

    What comes before it need not be small: early in training λ is far below all that follows, and hardly known. If so,
    it is a swing of its own, from the first of the points that are returned to the second.
    """
    for i in range(1, len(value)):
        begun = [j for j in ends if j < i and counts(j, i)]
        if not begun:
            continue
        first = max(begun, key=lambda j: abs(value[i] - value[j]))
        sign = math.copysign(1.0, value[i] - value[first])
        opposite = int(np.argmax(sign * value[: first + 1]))
        return ([opposite] if sign * (value[opposite] - value[i]) > 0 else []) + [first], i, sign
    return [], 0, 0.0


def _moves(fit: Fit, first: int, last: int, jump_errors: float) -> list[tuple[int, int]]:
    """What a swing is made of: its pieces and the significant jumps between them, as first and last index.

    A jump that is not significant goes with the steeper of its two pieces: it is where a bend was found late or early.
    """
    pieces = [(max(a, first), min(b, last)) for a, b in fit.pieces() if a <= last and b >= first]
    moves = [pieces[0]]
    for piece in pieces[1:]:
        left, right = moves[-1][1], piece[0]
        jump = abs(fit.value[right] - fit.value[left])
        if jump > jump_errors * math.sqrt(fit.variance[left] + fit.variance[right]):
            moves += [(left, right), piece]
        elif _steepness(fit, piece) > _steepness(fit, moves[-1]):
            moves.append((left, piece[1]))
        else:
            moves[-1] = (moves[-1][0], right)
            moves.append(piece)
    return [(a, b) for a, b in moves if b > a]


def _steepness(fit: Fit, move: tuple[int, int]) -> float:
    return abs(fit.value[move[1]] - fit.value[move[0]]) / max(move[1] - move[0], 1)


def _stand_out(
    fit: Fit,
    moves: list[tuple[int, int]],
    least: float,
    counts: Callable[[int, int], bool],
    settings: DetectionSettings,
) -> list[tuple[int, int]]:
    """The changes within one swing, apart from phases that stay or drift the same way.

    Args:
        fit: of the curve.
        moves: that the swing is made of.
        least: what a change has to be.
        counts: whether a change between two points does.
        settings: what parts a change from a phase.
    """
    x, first, last = fit.data.x, moves[0][0], moves[-1][1]
    sign = math.copysign(1.0, fit.value[last] - fit.value[first])
    size = np.array([sign * (fit.value[b] - fit.value[a]) for a, b in moves])
    rate = size / np.array([x[b] - x[a] for a, b in moves])
    # What is fast but small is part of a joint, no transition of its own.
    peak = np.where(size >= least, rate, -np.inf)
    if not np.isfinite(peak).any():
        return [(first, last)]
    before = np.concatenate([[-np.inf], np.maximum.accumulate(peak)[:-1]])
    after = np.concatenate([np.maximum.accumulate(peak[::-1])[::-1][1:], [-np.inf]])
    slower = np.minimum(before, after)
    valley = rate < settings.drift_ratio * slower
    for between, group in itertools.groupby(range(len(moves)), key=valley.tolist().__getitem__):
        inside = list(group)
        if between:
            # A straight piece too short to tell a phase from a bend is cheap to the fit, and no phase.
            line = Line.through(fit.data, moves[inside[0]][0], moves[inside[-1]][1] + 1)
            fastest = sign * line.slope + settings.plateau_errors * math.sqrt(line.slope_variance)
            valley[inside] = fastest < settings.plateau_ratio * slower[inside].max()
    found = []
    for between, group in itertools.groupby(range(len(moves)), key=valley.tolist().__getitem__):
        if between:
            continue
        kept = list(group)
        fastest = peak[kept].max()
        for outer in (0, -1):
            phase = -np.inf
            # The phase before or after; what is faster than that, though slow, is the change's beginning or tail, and
            # so is what a change would not count without.
            while (
                len(kept) > 1
                and rate[kept[outer]] < settings.drift_ratio * fastest
                and (phase == -np.inf or rate[kept[outer]] <= 2 * phase)
                and counts(*_ends(moves, kept[1:] if outer == 0 else kept[:-1]))
            ):
                phase = max(rate[kept.pop(outer)], 0.0)
        found.append(_ends(moves, kept))
    return found


def _ends(moves: list[tuple[int, int]], kept: list[int]) -> tuple[int, int]:
    """First and last index of some neighbouring moves."""
    return moves[kept[0]][0], moves[kept[-1]][1]
