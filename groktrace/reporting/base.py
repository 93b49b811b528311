"""What a reporter is."""

from pathlib import Path
from typing import Protocol

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
