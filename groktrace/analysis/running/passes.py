"""In which order snapshots are sampled: a coarse subset, then those that date the transitions, then all others."""

import bisect
import heapq
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from groktrace.analysis.detection import Detector, Transition, find_transitions
from groktrace.analysis.results.trajectory import Point, Trajectory
from groktrace.analysis.tuning import PASSES


def spread(steps: Sequence[int], count: int) -> list[int]:
    """So many indices of the steps, evenly spread; the first and the last are among them."""
    count = min(len(steps), count)
    return sorted({round(i * (len(steps) - 1) / max(count - 1, 1)) for i in range(count)})


def sample_in_passes(
    steps: Sequence[int],
    measure: Callable[[list[int]], dict[int, Point]],
    n: int | None = None,
    *,
    coarse: int,
    together: int,
    detector: Detector | None = None,
) -> Iterator[dict[int, Point]]:
    """Sample all snapshots, in an order in which whatever there is so far tells most.

    Args:
        steps: of all snapshots, ascending.
        measure: gives the points of snapshots; those that cannot be read, or for which no time is left, are left out.
        n: number of training samples.
        coarse: how many are in the first pass.
        together: how many are in each later one.
        detector: of the transitions; see `find_transitions`.

    Yields:
        The points so far, by step, after each pass.
    """
    wanted, tried = spread(steps, coarse), set()
    points: dict[int, Point] = {}
    while wanted:
        tried |= set(wanted)
        points |= measure([steps[i] for i in wanted])
        yield points
        wanted = _next(steps, tried, points, n, detector)[:together]
        wanted = sorted(wanted + _between(len(steps), tried | set(wanted), together - len(wanted)))


def _between(count: int, tried: set[int], most: int) -> list[int]:
    """Indices in the middle of the largest gaps, so many at most."""
    known = sorted(tried)
    gaps = [(low - high, low, high) for low, high in itertools.pairwise(known) if high - low > 1]
    heapq.heapify(gaps)
    found: list[int] = []
    while gaps and len(found) < most:
        _, low, high = heapq.heappop(gaps)
        middle = (low + high) // 2
        found.append(middle)
        for a, b in ((low, middle), (middle, high)):
            if b - a > 1:
                heapq.heappush(gaps, (a - b, a, b))
    return found


def sample_adaptively(
    steps: Sequence[int],
    measure: Callable[[list[int]], dict[int, Point]],
    report: Callable[[int, int], None],
    n: int | None = None,
    detector: Detector | None = None,
    deadline: float = math.inf,
) -> dict[int, Point]:
    """Sample evenly spread snapshots first, then between those where a transition is or may be.

    A gap between neighbours counts by what it leaves open of a transition's date, in snapshots: those that it hides
    times the share of the transition that happens in it, and what one more λ there would take off the error that noise
    makes. Gaps are halved, those that count most first, until no snapshot within a transition or close beside it is
    hidden, or a tenth of all are sampled.

    Args:
        steps: of all snapshots, ascending.
        measure: gives the points of snapshots; those that cannot be read are left out.
        report: called with (snapshots sampled, the most that will be).
        n: number of training samples.
        detector: of the transitions; see `find_transitions`.
        deadline: until when to begin another round, of `time.monotonic`.

    Returns:
        The points that were sampled, by step.
    """
    limit = min(max(2 * PASSES.adaptive_coarse, math.floor(PASSES.adaptive_share * len(steps))), len(steps))
    wanted = spread(steps, PASSES.adaptive_coarse)
    tried: set[int] = set()
    points: dict[int, Point] = {}
    while wanted:
        tried |= set(wanted)
        points |= measure([steps[i] for i in wanted])
        report(len(tried), limit)
        if time.monotonic() > deadline:
            break
        wanted = sorted(_next(steps, tried, points, n, detector)[: min(PASSES.round, limit - len(tried))])
    return points


def _next(
    steps: Sequence[int], tried: set[int], points: dict[int, Point], n: int | None, detector: Detector | None
) -> list[int]:
    """Indices of snapshots that halve the gaps, those that count most first."""
    trajectory = Trajectory(tuple(points[step] for step in sorted(points)), n=n)
    transitions = find_transitions(trajectory, detector) if points else []
    # A detector may be anyone's: only changes of some size have a date to narrow.
    transitions = sorted((t for t in transitions if abs(t.delta_llc) > 0), key=lambda t: t.onset)
    known = [(i, *_value(points[steps[i]])) for i in sorted(tried) if steps[i] in points]
    known = [point for point in known if math.isfinite(point[1]) and math.isfinite(point[2])]
    level = max((value for _, value, _ in known), default=0.0)
    dates = [_Date.of(steps, known, transitions, number) for number in range(len(transitions))]
    scored = []
    for (i, before, error), (j, after, other) in itertools.pairwise(known):
        inside = [k for k in range(i + 1, j) if k not in tried]
        if not inside:
            continue
        size, noise = abs(after - before), math.hypot(error, other)
        gain = max((date.gain(i, j) for date in dates), default=0.0)
        within = [transition for transition in transitions if _touches(transition, steps[i], steps[j])]
        if within:
            share = max(size, noise) / min(abs(transition.delta_llc) for transition in within)
        elif size > max(PASSES.suspicious_errors * noise, PASSES.suspicious_change * level):
            share = 1.0
        else:
            share = 0.0
        if share or gain:
            scored.append((-len(inside) * share - gain, inside[len(inside) // 2]))
    return [index for _, index in sorted(scored)]


@dataclass(frozen=True)
class _Date:
    """What the midpoint of one transition rests on, where λ is noisy: the levels beside it, and λ near half-way.

    With so many points at each, it is off by blur·√(1/centre + 1/4·before + 1/4·after) snapshots.

    Attributes:
        parts: for each of the three, the indices between which its points lie, how many there are, and what one counts.
        blur: in how many snapshots λ changes by its error.
    """

    parts: tuple[tuple[int, int, int, float], ...]
    blur: float

    @classmethod
    def of(
        cls,
        steps: Sequence[int],
        known: Sequence[tuple[int, float, float]],
        transitions: Sequence[Transition],
        number: int,
    ) -> "_Date":
        transition = transitions[number]
        onset, end = bisect.bisect_left(steps, transition.onset), bisect.bisect_left(steps, transition.end)
        first = bisect.bisect_left(steps, transitions[number - 1].end) if number else 0
        last = len(steps) - 1
        if number + 1 < len(transitions):
            last = bisect.bisect_left(steps, transitions[number + 1].onset)
        half, quarter = (transition.llc_before + transition.llc_after) / 2, abs(transition.delta_llc) / 4
        middle = [i for i, value, _ in known if onset <= i <= end and abs(value - half) <= quarter] or [onset, end]
        bounds = (
            (middle[0], middle[-1], 1.0),
            (max(first, onset - PASSES.phase), onset, 0.25),
            (end, min(last, end + PASSES.phase), 0.25),
        )
        parts = tuple((a, b, max(sum(a <= i <= b for i, _, _ in known), 1), share) for a, b, share in bounds)
        errors = [error for i, _, error in known if onset <= i <= end] or [0.0]  # of damaged points nothing is known
        return cls(parts, statistics.median(errors) * max(end - onset, 1) / abs(transition.delta_llc))

    def gain(self, i: int, j: int) -> float:
        """By how many snapshots the date gets better if one between two others is sampled."""
        total = math.sqrt(sum(share / count for _, _, count, share in self.parts))
        best = max((share / count**2 for a, b, count, share in self.parts if a <= i and j <= b), default=0.0)
        return 0.5 * self.blur * best / total


def _value(point: Point) -> tuple[float, float]:
    """λ_c, or λ̂ where there is none, and its error; NaN where there is neither."""
    value, error = point.llc_centred, point.stderr_centred
    if value is None:
        value, error = point.llc, point.stderr
    return (math.nan if value is None else value), (math.nan if error is None else error)


def _touches(transition: Transition, first: int, last: int) -> bool:
    """Whether a transition, or what its date leaves open, lies between two steps."""
    begin, end = min(transition.onset, transition.step_low), max(transition.end, transition.step_high)
    return first < end and last > begin
