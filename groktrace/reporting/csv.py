"""The trajectory as comma-separated values, one snapshot a line."""

import csv
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groktrace.reporting.series import Events, Series


def as_csv(series: Series) -> str:
    """A line of column names, and a line for each snapshot; what is not known is empty.

    Args:
        series: of a trajectory.
    """
    columns, text = series.columns(), io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(value) for value in row] for row in zip(*columns.values(), strict=True))
    return text.getvalue()


@dataclass(frozen=True)
class CsvReporter:
    """Writes the trajectory as comma-separated values.

    Attributes:
        name: of the file.
    """

    name: str = "trajectory.csv"

    def report(self, series: Series, events: Events, place: Path) -> None:
        """Write the file; see `Reporter`."""
        (place / self.name).write_text(as_csv(series), encoding="utf-8")


def _cell(value: Any) -> str:
    return "" if isinstance(value, float) and math.isnan(value) else str(value)
