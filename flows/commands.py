"""What the files of the command line share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from feedback.store import Store


def fail(message: object) -> typer.Exit:
    """Say what went wrong; raise what this returns."""
    typer.secho(f"✘ {message}", fg=typer.colors.RED, err=True)
    return typer.Exit(1)


@contextmanager
def opinions() -> Iterator[Store]:
    """The feedback database of the workspace, migrated."""
    from feedback.store import Store
    from flows import servers

    store = Store(servers.database_url(servers.workspace()))
    try:
        store.migrate()
        yield store
    finally:
        store.close()


def actor() -> str:
    """Who uses the command line, for the audit log."""
    import getpass

    try:
        return f"command:{getpass.getuser()}"
    except (OSError, KeyError):  # a container's user without a name
        return f"command:{os.getuid()}"
