"""The keeper: starts again whichever server of the workspace died, so that nobody has to.

A process that `thumbwheel up` starts last and `thumbwheel down` ends first. In a cluster its work is the cluster's.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from pathlib import Path

from flows import servers

POLL_SECONDS = 1.0
PAUSE_SECONDS = 10.0  # after a start that failed

log = logging.getLogger("thumbwheel.keeper")


def turn(root: Path) -> list[str]:
    """One look: start again what servers.json names and what no longer lives. Returns the names.

    Raises servers.ServerError when one does not start.
    """
    dead = [server for server in servers.read(root).values() if not server.alive and server.pid != os.getpid()]
    for server in dead:
        log.warning("%s (pid %s) died: it is started again", server.name, server.pid)
        servers.start(root, [server.name], owner=server.owner)
    return [server.name for server in dead]


def watch(root: Path, stop: threading.Event) -> None:
    """Turn until `stop` is set."""
    servers.ready_path(root, "keeper").write_text(str(os.getpid()))
    pause = POLL_SECONDS
    while not stop.wait(pause):
        pause = POLL_SECONDS
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # what it started itself and what died since
                pass
        try:
            turn(root)
        except Exception:  # it will be tried again; the log of the server says why it did not start
            log.exception("a server could not be started; the next try is in %s s", PAUSE_SECONDS)
            pause = PAUSE_SECONDS


def main() -> None:
    """The process that `thumbwheel up` starts; ends at SIGTERM."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGINT, lambda *_: stop.set())
    watch(servers.workspace(), stop)


if __name__ == "__main__":
    main()
