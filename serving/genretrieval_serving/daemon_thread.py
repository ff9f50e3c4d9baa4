"""A thread that no process waits for at its end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from queue import SimpleQueue
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class DaemonThread(Executor):
    """Runs one call after another in a thread of its own.

    A process waits at its end for the threads of a pool, but not for this one: a graph that never returns, or a bundle
    that takes minutes to load, would keep it until it is killed.
    """

    def __init__(self, name: str, begin: Callable[[], object] | None = None) -> None:
        """Start the thread, which calls `begin` first."""
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        threading.Thread(target=self._run, args=(begin,), name=name, daemon=True).start()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run a call when those before it are done."""
        future: Future[T] = Future()
        self._calls.put((future, partial(fn, *args, **kwargs)))
        return future

    def shutdown(self, wait: bool = False, *, cancel_futures: bool = False) -> None:
        """End after what was submitted; there is no waiting for that, and nothing is cancelled."""
        assert not wait
        assert not cancel_futures
        self._calls.put(None)

    def _run(self, begin: Callable[[], object] | None) -> None:
        if begin is not None:
            begin()
        while (submitted := self._calls.get()) is not None:
            future, call = submitted
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:  # noqa: BLE001 - raised where it is awaited
                    future.set_exception(error)
            # Else it would keep what the last call held until the next one comes.
            del submitted, future, call
