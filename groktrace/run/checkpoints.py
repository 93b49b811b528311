"""What is said where a command is given checkpoints in place of a run."""

from pathlib import Path

from groktrace.errors import RunError
from groktrace.run import layout

NO_RUN = f"holds no {layout.RUN_FILE}, so it is not a directory that groktrace.watch() wrote."


def refuse_checkpoints(root: Path, name: str) -> None:
    """Refuse what holds checkpoints and is no run, nor one that is being begun.

    Args:
        root: a file or folder, if there is one.
        name: what to call it.

    Raises:
        RunError: it does; the message has the command that makes a run of them.
    """
    if any((root / name).exists() for name in (*layout.START_FILES, layout.LOCK_FILE)):
        return
    from groktrace.importing.find import import_command  # built on this package: only where it is called

    if (advice := import_command(root, name)) is not None:
        raise RunError(f"{name}: {NO_RUN} {advice}")
