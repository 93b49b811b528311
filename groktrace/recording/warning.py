"""Warnings to the user whose training is recorded."""

import sys
import warnings


def warn_user(message: str) -> None:
    """Issue a RuntimeWarning, and never raise."""
    try:
        warnings.warn(f"groktrace: {message}", RuntimeWarning, stacklevel=2)
    except RuntimeWarning:  # warnings are errors in this process, but recording must not stop a training
        print(f"groktrace: {message}", file=sys.stderr)
