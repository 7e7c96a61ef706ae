"""Progress as JSON lines in .thumbwheel/progress.jsonl, for whoever wants to show it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any


def path(root: Path) -> Path:
    """The file that takes the events."""
    return root / ".thumbwheel" / "progress.jsonl"


class Progress:
    """Appends events, each with `time` (seconds since 1970), `stage` and `flow_run_id`.

    Events: {"event": "stage", "state": "started|unchanged|restored|finished|failed", "seconds": …} of every stage, and what
    its body emits: {"event": "metrics", "step", "total", "metrics"}, {"event": "resumed", "step"},
    {"event": "estimate", "seconds", "memory" in bytes}.
    """

    def __init__(self, root: Path, stage: str, flow_run_id: str | None) -> None:
        self._common = {"stage": stage, "flow_run_id": flow_run_id}
        self._path = path(root)
        self._path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, event: dict[str, Any]) -> None:
        """Append one event; a line is written in one call, so that readers never see half of one of another process."""
        line = json.dumps({"time": round(time.time(), 3), **self._common, **event}, ensure_ascii=False) + "\n"
        handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)
