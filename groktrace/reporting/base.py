"""What a reporter is."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from groktrace.analysis.detection import Detector
from groktrace.analysis.results.trajectory import Trajectory
from groktrace.reporting.series import Events, Series


class Reporter(Protocol):
    """Shows a trajectory somewhere: on a dashboard, in a file, on a terminal."""

    def report(self, series: Series, events: Events, place: Path) -> None:
        """Show it as it is now, in place of what was shown before.

        Args:
            series: all that is known of each snapshot.
            events: transitions, and what there is to say beside them.
            place: the folder, which is there, in which a reporter that writes files puts them.
        """
        ...


def report(
    trajectory: Trajectory, reporters: Sequence[Reporter], place: Path, detector: Detector | None = None
) -> None:
    """Show a trajectory by several reporters.

    Args:
        trajectory: λ̂ along a run.
        reporters: called one after another.
        place: the folder in which they put their files.
        detector: of the transitions; see `find_transitions`.
    """
    series, events = Series.of(trajectory), Events.of(trajectory, detector)
    for reporter in reporters:
        reporter.report(series, events, place)
