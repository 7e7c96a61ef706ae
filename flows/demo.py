"""The main job, `thumbwheel demo`: boots the servers, turns the wheel once, shows how far it is and what came of it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from flows import progress as events
from flows import servers, summary
from flows.timeline import Display, Follower, Progress, read_durations, write_durations
from flows.turn import outcome_path

BEFORE = (
    *("servers", "ingest", "curate", "validate", "tokenize", "pretrain", "written", "sft"),
    *("opinions", "snapshot", "reward"),
)
LOG = "align"


class Memory:
    """Samples, every few seconds, the memory of this process, its children and the servers: summed PSS, so that shared pages
    count once (where the kernel tells PSS; elsewhere the sum of what each process has for itself)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.now = self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(3.0):  # reading PSS of a dozen processes costs a tenth of a second
            self.now = sum(_memory(process) for process in self._tree())
            self.peak = max(self.peak, self.now)

    def _tree(self) -> set[psutil.Process]:
        me = psutil.Process()
        found = {me, *me.children(recursive=True)}
        for server in servers.read(self.root).values():
            try:
                process = psutil.Process(server.pid)
                found |= {process, *process.children(recursive=True)}
            except psutil.NoSuchProcess:
                continue
        return found


def _memory(process: psutil.Process) -> int:
    try:
        info = process.memory_full_info()
        return int(getattr(info, "pss", info.uss))
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0


class Boot(threading.Thread):
    """Starts Prefect's and MLflow's servers, which the flow waits for (`ready`, after `seconds`), then the chat service
    beside the data stages: it is not asked before there is an SFT model. `error` says what went wrong."""

    def __init__(self, root: Path, owner: str) -> None:
        super().__init__(daemon=True)
        self.root, self.owner = root, owner
        self.ready = threading.Event()
        self.error = ""
        self.seconds = 0.0

    def run(self) -> None:
        started = time.monotonic()
        records = [name for name in servers.CORE if name != "service"]
        try:
            servers.start(self.root, records, owner=self.owner)
            self.seconds = time.monotonic() - started
            self.ready.set()
            servers.start(self.root, ["service"], owner=self.owner)
        except Exception as error:
            self.error = str(error) or repr(error)


def run(root: Path, keep: bool, console: Console) -> int:
    """Run the main job in the workspace `root`; the exit code. Unless `keep`, ends the servers that a demo started."""
    console.print(summary.left_to_do(root), highlight=False)
    began = time.monotonic()
    try:
        with Memory(root) as memory:
            failure = _turn(root, "up" if keep else "demo", console, memory)
        if failure:
            console.print("\n✘ " + failure, style="red", markup=False, highlight=False)
            return 1
        summary.show(root, console)
        peak = f"peak memory {memory.peak / 1e9:.2f} GB (all processes, servers included)"
        console.print(f"\ndone in {time.monotonic() - began:.1f} s, {peak}", highlight=False)
        summary.where_to_look(root, keep, console)
        return 0
    except KeyboardInterrupt:
        console.print("\ninterrupted: run it again and it goes on from here", style="yellow")
        return 130
    finally:
        if not keep:
            servers.stop(root, servers.CORE, owner="demo")


def _turn(root: Path, owner: str, console: Console, memory: Memory) -> str:
    """Servers and flow together, with what a person sees of it. Returns what went wrong, "" when nothing did."""
    durations = servers.state_folder(root) / "durations.json"
    stages = [*BEFORE, summary.method(root), "judge", "promote"]
    progress = Progress(stages, read_durations(durations))
    progress.assume_unchanged(name for name in stages if (root / "artifacts" / name).exists())
    events.path(root).parent.mkdir(parents=True, exist_ok=True)
    follower = Follower(events.path(root))
    outcome_path(root).unlink(missing_ok=True)
    boot = Boot(root, owner)
    progress.take({"event": "stage", "stage": "servers", "state": "started"})
    boot.start()
    child = _start_flow(root)
    try:
        with Display(progress, console, lambda: f"{memory.now / 1e9:.1f} GB") as display:
            failure = _follow(child, boot, follower, progress, display)
    except KeyboardInterrupt:
        _let_go(child)
        raise
    finally:
        _end(child)
        write_durations(durations, progress.durations())
    return failure or _outcome(root, child)


def _start_flow(root: Path) -> subprocess.Popen[bytes]:
    """The flow's process, in our process group; it ends when our end of its standard input closes."""
    log = servers.log_path(root, LOG)
    log.parent.mkdir(parents=True, exist_ok=True)
    env = os.environ | servers.fixed_environment(root)
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "flows.turn"],
            cwd=root,
            env=env,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def _follow(
    child: subprocess.Popen[bytes], boot: Boot, follower: Follower, progress: Progress, display: Display
) -> str:
    """Until the flow's process ends. Returns what went wrong with the servers, "" when nothing did."""
    assert child.stdin is not None
    waiting = True
    while True:
        ended = child.poll() is not None
        if boot.error:
            progress.take({"event": "stage", "stage": "servers", "state": "failed", "seconds": boot.seconds})
            return boot.error
        if waiting and boot.ready.is_set():
            waiting = False
            progress.take({"event": "stage", "stage": "servers", "state": "finished", "seconds": boot.seconds})
            if not ended:
                child.stdin.write(b"go\n")
                child.stdin.flush()
        for event in follower.events():
            progress.take(event)
        display.refresh()
        if ended:
            boot.join()
            return boot.error
        time.sleep(0.25)


def _let_go(child: subprocess.Popen[bytes]) -> None:
    """Ask the flow to stop, with the time to say so to its servers."""
    child.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(10)


def _end(child: subprocess.Popen[bytes]) -> None:
    """Close the flow's lifeline and see it gone."""
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        child.stdin.close()
    try:
        child.wait(10)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _outcome(root: Path, child: subprocess.Popen[bytes]) -> str:
    log = servers.log_path(root, LOG)
    try:
        outcome: dict[str, Any] = json.loads(outcome_path(root).read_text(encoding="utf-8"))
    except FileNotFoundError:
        lines = "\n".join(log.read_text(errors="replace").splitlines()[-10:])
        return f"the flow's process ended with {child.returncode}; the end of {log}:\n{lines}"
    return "" if outcome["ok"] else f"{outcome['message']}\n  (the whole log: {log})"
