"""Which processes of a workspace are still there."""

from __future__ import annotations

from pathlib import Path

import psutil


def leftovers(root: Path) -> list[psutil.Process]:
    """Live processes that were started for this workspace."""
    found = []
    for process in psutil.process_iter():
        try:
            ours = process.environ().get("THUMBWHEEL_ROOT") == str(root)
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found
