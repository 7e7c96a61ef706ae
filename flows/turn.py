"""One turn of the wheel in a process of its own: data, then the flow `align`.

`thumbwheel demo` starts it, so that whatever the libraries print goes to one log, and a crash of theirs ends with a
message. It tells its progress in .thumbwheel/progress.jsonl, leaves its outcome in .thumbwheel/outcome.json, waits
for the word "go" on its standard input (the servers answer), and ends when that input does: its parent is gone.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flows import servers
from flows.progress import Progress


def outcome_path(root: Path) -> Path:
    """Where a turn leaves {"ok", "message"}."""
    return servers.state_folder(root) / "outcome.json"


@contextmanager
def told(root: Path, stage: str) -> Iterator[None]:
    """Tell that `stage` starts, and how it ends."""
    tell = Progress(root, stage, None)
    started = time.monotonic()
    tell({"event": "stage", "state": "started"})
    state = "failed"
    try:
        yield
        state = "finished"
    finally:
        tell({"event": "stage", "state": state, "seconds": round(time.monotonic() - started, 2)})


def main() -> None:
    """The process: exits 0 when the turn came to its end, 1 with the reason in outcome.json."""
    root = servers.workspace()
    go = _lifeline()
    outcome: dict[str, Any] = {"ok": False, "message": ""}
    try:
        turn(root, go)
        outcome["ok"] = True
    except BaseException as error:
        traceback.print_exc()
        outcome["message"] = _reason(error)
    temporary = outcome_path(root).with_suffix(".tmp")
    temporary.write_text(json.dumps(outcome, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    temporary.replace(outcome_path(root))
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(0 if outcome["ok"] else 1)


def _lifeline() -> threading.Event:
    """Set at "go"; the process ends when standard input does."""
    go = threading.Event()

    def listen() -> None:
        for line in sys.stdin:
            if line.strip() == "go":
                go.set()
        os._exit(3)

    threading.Thread(target=listen, daemon=True).start()
    return go


def turn(root: Path, go: threading.Event) -> None:
    """See to data/, wait for the servers, run the flow."""
    from flows import ingest, settings

    options = settings.load(root).data
    with told(root, "ingest"):
        print(ingest.verify_data(root, options), flush=True)
    align = _import_flow(root)
    go.wait()
    align()


def _import_flow(root: Path) -> Callable[[], Any]:
    """The flow, imported only once its server has an address: Prefect reads its settings at import."""
    while not {"PREFECT_API_URL", "MLFLOW_TRACKING_URI"} <= servers.environment(root).keys():
        time.sleep(0.1)
    os.environ.update(servers.environment(root))
    from flows.align import align

    return align


def _reason(error: BaseException) -> str:
    """What to tell a person: the message of our own errors, with the type's name where the error is a surprise."""
    text = str(error).strip()
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    expected = (
        isinstance(error, (ValueError, FileNotFoundError, FileExistsError)) or "Error" not in type(error).__name__
    )
    ours = type(error).__module__.split(".")[0] in ("flows", "feedback", "models")
    return text if text and (expected or ours) else f"{type(error).__name__}: {text}"


if __name__ == "__main__":
    main()
