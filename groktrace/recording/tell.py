"""What a recording has to say to who trains."""

import sys
import warnings


def tell(message: str) -> None:
    """Warn, and never raise."""
    try:
        warnings.warn(f"groktrace: {message}", RuntimeWarning, stacklevel=2)
    except RuntimeWarning:  # warnings are errors in this process, but recording must not stop a training
        print(f"groktrace: {message}", file=sys.stderr)
