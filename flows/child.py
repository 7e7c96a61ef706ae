"""A training stage as one child process: JSON lines come through a pipe, and the child ends when its parent does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TRAINING = ("-m", "models.run")
CODE = Path(__file__).resolve().parents[1]
_GRACE_SECONDS = 10.0
_SHOWN_LINES = 15


class ChildError(RuntimeError):
    """The child failed or was killed. The message holds its own, else the last lines it wrote to stderr."""


def run_child(
    spec: dict[str, Any],
    *,
    command: Sequence[str],
    work: Path,
    log: Path,
    emit: Callable[[dict[str, Any]], None],
    lock: int,
    code: Path = CODE,
) -> dict[str, Any]:
    """Run `python COMMAND SPEC.json --metrics-fd N` and return the summary of its "done" event.

    spec: what models.run expects, written to work/spec.json; log: the file that takes stdout and stderr; emit: takes every
    other event; lock: a descriptor that the child inherits, so that the work folder stays locked while it lives; code: the
    folder with the code that runs.
    Any exception here (KeyboardInterrupt, SystemExit) ends the child first. Raises ChildError.
    """
    spec_path = work / "spec.json"
    spec_path.write_text(json.dumps(spec, indent=2, sort_keys=True), encoding="utf-8")
    log.parent.mkdir(parents=True, exist_ok=True)
    readable, writable = os.pipe()
    with log.open("wb") as output, os.fdopen(readable, encoding="utf-8") as events:
        try:
            process = subprocess.Popen(
                _command(command, spec, spec_path, writable),
                cwd=spec["root"],
                env=_environment(spec, code),
                stdin=subprocess.DEVNULL,
                stdout=output if spec["world_size"] == 1 else writable,
                stderr=output,
                pass_fds=(writable, lock),
            )
        finally:
            os.close(writable)
        try:
            last = _read(events, emit)
            process.wait()
        except BaseException:
            _end(process)
            raise
    if process.returncode != 0 or last.get("event") != "done":
        raise ChildError(_explain(spec["stage"], process.returncode, last, log))
    return dict(last["summary"])


def _command(command: Sequence[str], spec: dict[str, Any], spec_path: Path, writable: int) -> list[str]:
    """The child alone, or torchrun with as many as spec["world_size"], to which only standard output comes through."""
    if spec["world_size"] == 1:
        return [sys.executable, *command, str(spec_path), "--metrics-fd", str(writable)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(spec["world_size"])]
    return [sys.executable, *torchrun, *command, str(spec_path), "--metrics-fd", "1"]


def _environment(spec: dict[str, Any], code: Path) -> dict[str, str]:
    """The parent's, with the code first on the path and the thread count that torch is told as well."""
    search = [str(code), *filter(None, [os.environ.get("PYTHONPATH")])]
    threads = str(spec["threads"])
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(search),
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OMP_WAIT_POLICY": "PASSIVE",
    }


def _read(events: Any, emit: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Pass events on until the pipe closes; return the "done" or "error" event, or {}."""
    last: dict[str, Any] = {}
    for line in events:
        if not line.endswith("\n"):
            break  # the child was killed in the middle of a line
        event = json.loads(line)
        if event["event"] in ("done", "error"):
            last = event
        elif event["event"] != "alive":
            emit(event)
    return last


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _explain(stage: str, code: int, last: dict[str, Any], log: Path) -> str:
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    if last.get("event") == "error":
        return f"stage {stage} failed: {last['message']} (its output: {log})"
    tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-_SHOWN_LINES:])
    return f"stage {stage} {how}; the end of {log}:\n{tail}"
