"""Numbers that the script logs beside its snapshots."""

from collections.abc import Mapping
from typing import Any

from groktrace.recording.warn import WarnOnce


def numbers_in(metrics: Mapping[str, Any], warn_once: WarnOnce) -> dict[str, float]:
    """Metrics as plain numbers; what is none is left out, with a warning.

    Args:
        metrics: names and values.
        warn_once: told of those that are left out.
    """
    found = {}
    for name, value in metrics.items():
        try:
            found[name] = float(value)
        except Exception as failure:  # of any type
            reason = " ".join(str(failure).split())[:120]
            warn_once(f"metric {name}", f"log: '{name}' is left out, as it is no number ({reason}).")
    return found
