"""One workspace, one writer: whoever runs stages holds the lock file, and says who it is."""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

_held: dict[Path, int] = {}
_mutex = threading.Lock()


class WorkspaceBusyError(RuntimeError):
    """Another process runs stages in this workspace. The message says which, since when, and what to do."""


@contextmanager
def writer(root: Path, what: str) -> Iterator[None]:
    """Hold the workspace while the block runs. Inside a process that holds it already, this does nothing.

    `what`: the name to show others, such as the flow's. Raises WorkspaceBusyError at once when another process holds it.
    The system releases the lock of a process that dies.
    """
    path = root.resolve() / ".thumbwheel" / "workspace.lock"
    with _mutex:
        first = _held.get(path, 0) == 0
        handle = _take(path, what) if first else None
        _held[path] = _held.get(path, 0) + 1
    try:
        yield
    finally:
        with _mutex:
            _held[path] -= 1
        if handle is not None:
            os.close(handle)


def _take(path: Path, what: str) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        held_by = os.pread(handle, 4096, 0).decode()
        os.close(handle)
        raise WorkspaceBusyError(_explain(held_by, path)) from error
    os.ftruncate(handle, 0)
    since = datetime.now().isoformat(timespec="seconds")
    os.pwrite(handle, json.dumps({"pid": os.getpid(), "what": what, "since": since}).encode(), 0)
    return handle


def _explain(held_by: str, path: Path) -> str:
    try:
        who = json.loads(held_by)
        said = f"`{who['what']}` (pid {who['pid']}, since {who['since']})"
    except (json.JSONDecodeError, KeyError):
        said = "another process"
    return f"{said} is running stages in {path.parent.parent}: wait until it ends, or end it, then try again"


def hold(path: Path, timeout: float = 120.0) -> int:
    """Lock the file `path` and return its open descriptor, to be closed by the caller.

    A process that inherits the descriptor keeps the lock after the caller is dead: so a stage's work folder stays taken
    until the last process that writes there has ended. Raises WorkspaceBusyError after `timeout` seconds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    end = time.monotonic() + timeout
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError as error:
            if time.monotonic() > end:
                os.close(handle)
                raise WorkspaceBusyError(
                    f"{path.parent}: a process of an earlier run still writes here after {timeout:.0f} s; end it"
                ) from error
            time.sleep(0.1)
