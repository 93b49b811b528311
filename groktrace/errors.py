"""The one family of errors; each message says what was expected, what came, and what to do."""

MAX_LETTERS = 4000  # a message may quote what a damaged file holds


class GroktraceError(Exception):
    """Base of every error groktrace raises on purpose."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message if len(message) <= MAX_LETTERS else message[:MAX_LETTERS] + " ..."))


def printable(text: str) -> str:
    """The text without what would move a terminal's cursor or cannot be encoded; it may come from a stranger."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "\N{REPLACEMENT CHARACTER}" for letter in text)


class SettingsError(GroktraceError):
    """An argument is outside what it may be."""


class RunError(GroktraceError):
    """A run directory is missing, foreign, or damaged as a whole."""


class SnapshotError(GroktraceError):
    """One snapshot is damaged; the others of its run can still be used."""


class TaskError(GroktraceError):
    """Model, loss and data do not fit together, or cannot be rebuilt from the run directory."""
