"""Read batches ahead of the step that uses them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")
POLL_SECONDS = 0.1


class Prefetcher(Generic[T]):
    """Iterates over fetch(start), …, fetch(stop - 1); a background thread works up to `depth` results ahead.

    With `depth` 0 everything happens in the caller. An exception of `fetch` is raised in the consumer, in its turn.
    `close` (or leaving a `with` block) stops the thread; a process that forgets it still exits, the thread is a daemon.
    """

    def __init__(self, fetch: Callable[[int], T], start: int, stop: int, depth: int) -> None:
        self._fetch, self._next, self._stop = fetch, start, stop
        self._closed = threading.Event()
        self._queue: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(max(1, depth))
        self._thread: threading.Thread | None = None
        if depth > 0 and start < stop:
            self._thread = threading.Thread(target=self._work, args=(start,), name="nexa-prefetch", daemon=True)
            self._thread.start()

    def _work(self, first: int) -> None:
        for step in range(first, self._stop):
            try:
                item: tuple[T | None, BaseException | None] = (self._fetch(step), None)
            except BaseException as error:  # handed over to the consumer, which raises it
                item = (None, error)
            while not self._closed.is_set():
                try:
                    self._queue.put(item, timeout=POLL_SECONDS)
                    break
                except queue.Full:
                    continue
            if self._closed.is_set() or item[1] is not None:
                return

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._closed.is_set() or self._next >= self._stop:
            raise StopIteration
        if self._thread is None:
            value = self._fetch(self._next)
        else:
            result, error = self._queue.get()
            if error is not None:
                self.close()
                raise error
            value = result  # type: ignore[assignment]
        self._next += 1
        return value

    def close(self) -> None:
        """Stop the thread and drop what it has read ahead; may be called twice."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(timeout=5.0)
            self._thread = None

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
