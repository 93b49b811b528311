"""Where stacks of snapshots are evaluated: in threads, in processes on this machine, or by any executor."""

import contextlib
import math
import multiprocessing
import queue
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import (
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    as_completed,
)
from typing import Protocol

import torch

from groktrace.analysis.running.evaluator import Evaluator, EvaluatorSpec, Result, WorkItem, evaluate_elsewhere
from groktrace.analysis.tuning import PASSES
from groktrace.errors import GroktraceError, RunError, SettingsError, SnapshotError
from groktrace.run.store import Snapshot
from groktrace.sampling.interruption import TimeUpError, give_up_at, interruption

# Pools lost in a row, without an item finished between, until we take it that the next one would be lost too.
MAX_LOSSES = 3
CONNECT_SECONDS = 10

Results = list[Result | SnapshotError]
# None of an item that was begun and given up, as the time was up.
Finished = Iterator[tuple[int, Results | None]]


class Backend(Protocol):
    """Where work items are evaluated.

    Attributes:
        threads: of this process that it keeps busy.
    """

    threads: int

    def evaluate(
        self, items: Sequence[WorkItem], snapshots: Mapping[int, Snapshot], deadline: float = math.inf
    ) -> Finished:
        """Numbers of items and their results, as they are finished.

        Args:
            items: the work.
            snapshots: the run's, by step.
            deadline: until when to begin any, of `time.monotonic`; what is then begun is soon given up.
        """


def available_threads(device: torch.device) -> int:
    """How many threads may evaluate at once: on a processor as many as PyTorch would use for one operation."""
    return torch.get_num_threads() if device.type == "cpu" else 1


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Have each operation done by one thread meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def thread_backend(evaluator: Evaluator, threads: int) -> Iterator["ThreadBackend"]:
    """Threads of this process, each of which evaluates one item after another on a core of its own.

    Several threads in one operation wait for each other after each, up to 50 times as long on a busy machine.

    Args:
        evaluator: of the run.
        threads: how many.
    """
    pool, before = ThreadPoolExecutor(threads, "groktrace-evaluator"), torch.get_num_threads()
    if threads > 1:
        torch.set_num_threads(1)
    interruption.clear()
    try:
        yield ThreadBackend([evaluator, *(evaluator.fork() for _ in range(threads - 1))], pool)
    except KeyboardInterrupt:
        interruption.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


class ThreadBackend:
    """Evaluates in threads of this process.

    Args:
        evaluators: of the run, one a thread.
        pool: as many threads.
    """

    def __init__(self, evaluators: Sequence[Evaluator], pool: ThreadPoolExecutor) -> None:
        self._pool, self.threads = pool, len(evaluators)
        self._idle: queue.SimpleQueue[Evaluator] = queue.SimpleQueue()
        for evaluator in evaluators:
            self._idle.put(evaluator)

    def evaluate(
        self, items: Sequence[WorkItem], snapshots: Mapping[int, Snapshot], deadline: float = math.inf
    ) -> Finished:
        """See `Backend`."""

        def one(item: WorkItem) -> tuple[bool, Results | None]:
            if time.monotonic() > deadline:
                return False, None
            evaluator = self._idle.get()
            try:
                with give_up_at(deadline + PASSES.grace_seconds):
                    return True, evaluator.evaluate(item, snapshots)
            except TimeUpError:
                return True, None
            finally:
                self._idle.put(evaluator)

        futures = {self._pool.submit(one, item): number for number, item in enumerate(items)}
        try:
            for future in as_completed(futures):
                begun, results = future.result()
                if begun:
                    yield futures[future], results
        finally:
            for future in futures:
                future.cancel()


class ExecutorBackend:
    """Evaluates in other processes, whose items finish in any order.

    Args:
        spec: what they rebuild.
        executor: takes the items.
        renew: a new executor in place of one whose processes were lost; None where that is not ours to make.
    """

    def __init__(self, spec: EvaluatorSpec, executor: Executor, renew: Callable[[], Executor] | None = None) -> None:
        self._spec, self._executor, self._renew = spec, executor, renew
        self.threads = 1

    def evaluate(
        self, items: Sequence[WorkItem], snapshots: Mapping[int, Snapshot], deadline: float = math.inf
    ) -> Finished:
        """See `Backend`; a lost process's items are given out again, and `snapshots` is not used.

        Raises:
            RunError: processes were lost again and again, or an item failed.
        """
        todo, losses = list(range(len(items))) if time.monotonic() <= deadline else [], 0
        until = time.time() + deadline - time.monotonic()  # other machines have other clocks for the latter
        while todo:
            futures: dict[Future, int] = {}
            lost, failed = set(todo), None
            try:
                with contextlib.suppress(BrokenExecutor):  # some of the futures tell it again
                    for number in todo:
                        futures[self._executor.submit(evaluate_elsewhere, self._spec, items[number], until)] = number
                for future in as_completed(futures):
                    number = futures[future]
                    try:
                        begun, results = future.result()
                    except BrokenExecutor:
                        continue
                    except (Exception, CancelledError) as failure:
                        # What the others are at, or have finished, is still taken.
                        failed = failed or (number, failure)
                        for other in futures:
                            other.cancel()
                        continue
                    lost.discard(number)
                    if begun:
                        yield number, results
            finally:
                for future in futures:
                    future.cancel()
            if failed is not None:
                raise _failure(items[failed[0]], failed[1])
            losses = losses + 1 if len(lost) == len(todo) else 0
            todo = sorted(lost)
            if todo:
                if self._renew is None or losses == MAX_LOSSES:
                    raise RunError(
                        "workers end before they finish; out of memory? What is finished is kept: try fewer of them."
                    )
                self._executor = self._renew()


def _failure(item: WorkItem, failure: BaseException) -> GroktraceError:
    if isinstance(failure, GroktraceError):
        return failure
    found = RunError(
        f"a worker failed at the snapshots of steps {item.steps[0]} to {item.steps[-1]} "
        f"({type(failure).__name__}: {failure}); what is finished is kept."
    )
    found.__cause__ = failure
    return found


@contextlib.contextmanager
def process_pool(jobs: int) -> Iterator[tuple[Executor, Callable[[], Executor]]]:
    """Processes on this machine that share this one's threads, and what replaces them when they are lost.

    Args:
        jobs: how many.

    Raises:
        SettingsError: it is no positive whole number.
    """
    if isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1:
        raise SettingsError(f"jobs: expected a whole number of at least 1, got {jobs!r}.")
    pools: list[ProcessPoolExecutor] = []
    # More threads than cores wait for each other at every operation: up to 50 times slower (measured).
    threads = max(1, torch.get_num_threads() // jobs)

    def new() -> Executor:
        context = multiprocessing.get_context("spawn")
        pools.append(ProcessPoolExecutor(jobs, context, _begin_worker, (threads,)))
        return pools[-1]

    try:
        yield new(), new
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)


def _begin_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    # Ctrl-C goes to all processes of a terminal; those that only compute end without a word.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def dask_executor(address: str) -> Iterator[Executor]:
    """The workers of a Dask cluster that is running.

    Args:
        address: of its scheduler, such as tcp://host:8786.

    Raises:
        SettingsError: distributed is not installed, or there is no such scheduler.
    """
    try:
        from distributed import Client
    except ImportError as failure:
        raise SettingsError("dask: needs distributed; pip install 'groktrace[dask]'.") from failure
    try:
        client = Client(address, set_as_default=False, timeout=CONNECT_SECONDS)
    except (OSError, ValueError) as failure:
        raise SettingsError(f"dask: no scheduler answers at '{address}' ({failure}).") from failure
    with client, client.get_executor() as executor:
        yield executor
