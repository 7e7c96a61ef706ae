"""The writer: one thread that commits what many requests write in one transaction, so that each fsync serves many."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import sqlalchemy as sa

from feedback.opinions import Refused
from feedback.store import Store

Result = TypeVar("Result")
# rows of one transaction, and of the queue before it; beyond that the service says 503 instead of growing
GROUP, WAITING = 256, 10_000


class Overloaded(Exception):
    """The database does not keep up with what is asked; nothing was written."""


@dataclass
class Work:
    """One request's writes, and who waits for them."""

    operation: Callable[[sa.Connection], Any]
    future: asyncio.Future[Any]
    loop: asyncio.AbstractEventLoop
    result: Any = None
    error: BaseException | None = None


class Writer:
    """Commits operations in groups. An operation is a function of a connection that may be run twice: when one of a
    group fails, the group's transaction is rolled back and each is done again under a savepoint of its own, so that
    only the one that failed fails. An operation that raises Refused has written nothing and disturbs nobody.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.queue: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, daemon=True, name="writer")
        self.thread.start()

    def put(self, operation: Callable[[sa.Connection], Result]) -> asyncio.Future[Result]:
        """Queue an operation; the future has its result once it is committed, or its error.

        Raises Overloaded when too many wait already.
        """
        if self.queue.qsize() >= WAITING:
            raise Overloaded("too many writes are waiting for the database; try again in a moment")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        self.queue.put(Work(operation, future, loop))
        return future

    def close(self) -> None:
        """Commit what was queued, and end."""
        self.queue.put(None)
        self.thread.join()

    def _run(self) -> None:
        closing = False
        while not closing:
            group: list[Work] = []
            work = self.queue.get()
            while work is not None:
                group.append(work)
                if len(group) == GROUP or self.queue.empty():
                    break
                work = self.queue.get()
            closing = work is None
            if group:
                self._commit(group)

    def _commit(self, group: list[Work]) -> None:
        try:
            try:
                self._together(group)
            except Exception:
                self._each(group)
        except Exception as error:  # the database itself: nothing of the group is written, and each is told
            for work in group:
                work.error = error
        for loop in {work.loop for work in group}:
            try:
                loop.call_soon_threadsafe(settle, [work for work in group if work.loop is loop])
            except RuntimeError:  # that loop has ended: nobody waits there
                continue

    def _together(self, group: list[Work]) -> None:
        with self.store.write() as connection:
            for work in group:
                try:
                    work.result, work.error = work.operation(connection), None
                except Refused as refused:
                    work.error = refused

    def _each(self, group: list[Work]) -> None:
        with self.store.write() as connection:
            for work in group:
                try:
                    with connection.begin_nested():
                        work.result, work.error = work.operation(connection), None
                except sa.exc.OperationalError:
                    raise  # disk full, connection lost: not this row's fault
                except Exception as error:
                    work.error = error


def settle(group: list[Work]) -> None:
    """In the event loop: tell those that wait."""
    for work in group:
        if work.future.done():  # its request was given up
            continue
        if work.error is not None:
            work.future.set_exception(work.error)
        else:
            work.future.set_result(work.result)
