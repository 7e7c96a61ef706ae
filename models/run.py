"""One training stage as a process of its own: `python -m models.run SPEC.json --metrics-fd N`.

SPEC holds the fields of models.job.Job. Progress and metrics leave as JSON lines on file descriptor N. When nobody reads
it any more the process ends: a stage never outlives the one who asked for it. Under torchrun every process runs this, with
`--metrics-fd 1`; the first one reports.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any, TextIO

from models.allocator import keep_large_blocks
from models.distributed import join, leave
from models.job import Emit, Job
from models.ranks import Ranks

STAGES = {
    "pretrain": "models.pretrain",
    "sft": "models.sft",
    "reward": "models.reward",
    "ppo": "models.ppo",
    "dpo": "models.dpo",
    "kto": "models.kto",
}


class Emitter:
    """Writes event dicts as JSON lines; a broken pipe ends the process."""

    def __init__(self, out: TextIO) -> None:
        self.out, self.lock = out, threading.Lock()

    def __call__(self, event: dict[str, Any]) -> None:
        try:
            with self.lock:
                self.out.write(json.dumps(event) + "\n")
                self.out.flush()
        except BrokenPipeError:
            os._exit(3)

    def watch(self, seconds: float = 2.0) -> None:
        """Beat while the stage works, so that a broken pipe shows between its reports too."""

        def beat() -> None:
            while True:
                time.sleep(seconds)
                self({"event": "alive"})

        threading.Thread(target=beat, daemon=True).start()


def load_job(spec: dict[str, Any], emit: Emit, ranks: Ranks) -> Job:
    """The job that a spec describes."""
    paths = {name: Path(spec[name]) for name in ("root", "output", "work")}
    return Job(
        stage=spec["stage"],
        deps=tuple(spec["deps"]),
        params=spec["params"],
        device=spec["device"],
        threads=int(spec["threads"]),
        emit=emit,
        ranks=ranks,
        **paths,
    )


def main() -> int:
    """Run the stage. Exit 0 after {"event": "done"}; exit 1 after {"event": "error"}, whose message is for the user."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("spec", type=Path)
    parser.add_argument("--metrics-fd", type=int, required=True)
    arguments = parser.parse_args()
    keep_large_blocks()
    import torch

    from models.memory import peak_memory

    spec = json.loads(arguments.spec.read_text(encoding="utf-8"))
    emit = Emitter(os.fdopen(_own(arguments.metrics_fd), "w", encoding="utf-8"))
    torch.set_num_threads(int(spec["threads"]))
    try:
        ranks = join(spec["device"])
        if ranks.first:
            emit.watch()
        job = load_job(spec, emit if ranks.first else _ignore, ranks)
        job.output.mkdir(parents=True, exist_ok=True)
        summary = importlib.import_module(STAGES[spec["stage"]]).run(job)
        leave()
    except Exception as error:
        emit({"event": "error", "message": f"{type(error).__name__}: {error}"})
        raise
    if ranks.first:
        emit({"event": "done", "summary": {**summary, "peak_memory": peak_memory(spec["device"])}})
    return 0


def _own(descriptor: int) -> int:
    """The descriptor for events. torchrun hands on standard output alone, which is then kept for them: prints go to stderr."""
    if descriptor != 1:
        return descriptor
    kept = os.dup(1)
    os.dup2(2, 1)
    return kept


def _ignore(event: dict[str, Any]) -> None:
    pass


if __name__ == "__main__":
    sys.exit(main())
