"""Loading a user's "package.module:factory", the only way that user code enters an analysis."""

import importlib
from contextvars import ContextVar

from groktrace.errors import TaskError
from groktrace.run.task import Task

_loading: ContextVar[str | None] = ContextVar("_loading", default=None)


def refuse_while_loading() -> None:
    """Refuse to record while a factory is loaded: it would train for hours, into the folder of the run itself.

    Raises:
        TaskError: a factory is being loaded.
    """
    if (reference := _loading.get()) is not None:
        raise TaskError(
            f"--task {reference}: loading it calls groktrace.watch(), so that it would train anew; put what trains "
            'under `if __name__ == "__main__":`, or the factory into a module of its own.'
        )


def load_factory(reference: str) -> Task:
    """Import "package.module:factory" and call it.

    Raises:
        TaskError: it cannot be imported, fails, begins to record, or returns something else than a Task.
    """
    module_name, _, function_name = reference.partition(":")
    if not module_name or not function_name:
        raise TaskError(f"--task: expected package.module:factory, got '{reference}'.")
    token = _loading.set(reference)
    try:
        try:
            factory = getattr(importlib.import_module(module_name), function_name)
        except TaskError:
            raise
        except (Exception, SystemExit) as failure:  # a module may fail in any way while it is imported
            raise TaskError(
                f"--task {reference}: cannot be imported ({failure}); run from the folder that holds it."
            ) from failure
        try:
            task = factory()
        except TaskError:
            raise
        except (Exception, SystemExit) as failure:
            raise TaskError(f"--task {reference}: failed ({type(failure).__name__}: {failure}).") from failure
    finally:
        _loading.reset(token)
    if not isinstance(task, Task):
        raise TaskError(
            f"--task {reference}: expected it to return groktrace.Task.from_model(...), got {type(task).__name__}."
        )
    return task
