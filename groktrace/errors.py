"""The one family of errors; each message says what was expected, what came, and what to do."""


class GroktraceError(Exception):
    """Base of every error groktrace raises on purpose."""


class SettingsError(GroktraceError):
    """An argument is outside what it may be."""


class RunError(GroktraceError):
    """A run directory is missing, foreign, or damaged as a whole."""


class SnapshotError(GroktraceError):
    """One snapshot is damaged; the others of its run can still be used."""


class TaskError(GroktraceError):
    """Model, loss and data do not fit together, or cannot be rebuilt from the run directory."""
