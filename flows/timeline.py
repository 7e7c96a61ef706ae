"""What a long job is doing: events of its stages in, one line a stage out, with an estimate of what is left."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

# seconds of each step of the main job with the built-in parameters on two CPU cores: shares, until this workspace
# has durations of its own
TYPICAL_SECONDS = {
    "servers": 12.0,
    "ingest": 8.0,
    "curate": 8.0,
    "validate": 10.0,
    "tokenize": 10.0,
    "pretrain": 90.0,
    "written": 0.5,
    "sft": 45.0,
    "opinions": 40.0,
    "snapshot": 3.0,
    "reward": 20.0,
    "ppo": 90.0,
    "dpo": 45.0,
    "kto": 60.0,
    "judge": 30.0,
    "promote": 3.0,
}
ENDED = ("finished", "unchanged", "restored", "failed")
MARKS = {"waiting": "·", "started": "▶", "finished": "✔", "unchanged": "=", "restored": "↺", "failed": "✘"}
COLOURS = {"started": "cyan", "finished": "green", "unchanged": "green", "restored": "green", "failed": "red"}


@dataclass
class Line:
    """One stage: its state, its clock, and how far it is (steps, where it tells them)."""

    name: str
    expected: float
    state: str = "waiting"
    started: float = 0.0
    seconds: float = 0.0
    step: int = 0
    total: int = 0
    first_step: int = 0
    first_step_at: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)

    def fraction(self, now: float) -> float:
        """How much of it is done, 0 to 1."""
        if self.state in ENDED:
            return 1.0
        if self.state == "waiting":
            return 0.0
        if self.total:
            return min(1.0, self.step / self.total)
        return min(0.95, (now - self.started) / self.expected) if self.expected else 0.0

    def left(self, now: float, scale: float) -> float:
        """Seconds until it ends, from its own pace when it tells steps, else from `expected` × `scale`."""
        if self.state in ENDED:
            return 0.0
        if self.state == "waiting":
            return self.expected * scale
        done = self.step - self.first_step
        if self.total and done > 0:
            return (self.first_step_at and (now - self.first_step_at) / done * (self.total - self.step)) or 0.0
        return max(0.0, self.expected * scale - (now - self.started))


class Progress:
    """The stages of a job, fed with event dicts (`take`); unknown stages are added as they come."""

    def __init__(
        self, names: list[str], durations: Mapping[str, float], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.clock = clock
        self.began = clock()
        self.known = {**TYPICAL_SECONDS, **durations}
        self.measured = set(durations)
        self.lines = {name: Line(name, self.known.get(name, 5.0)) for name in names}
        self.assumed: set[str] = set()

    def assume_unchanged(self, names: Iterable[str]) -> None:
        """Expect these stages to be found up to date, until one of them turns out to run."""
        self.assumed = set(names) & self.lines.keys()
        for name in self.assumed:
            self.lines[name].expected = 1.0

    def _expect_all(self) -> None:
        for name in self.assumed:
            self.lines[name].expected = self.known.get(name, 5.0)
        self.assumed = set()

    def take(self, event: Mapping[str, Any]) -> Line | None:
        """Follow one event (see flows.progress.Progress); others are ignored. Returns its line."""
        name = event.get("stage")
        if event.get("event") not in ("stage", "metrics", "resumed", "estimate") or not isinstance(name, str):
            return None
        line = self.lines.setdefault(name, Line(name, self.known.get(name, 5.0)))
        now = self.clock()
        if event["event"] == "stage":
            self._change(line, str(event.get("state")), event.get("seconds"), now)
        elif event["event"] == "resumed":
            line.step = line.first_step = int(event["step"])
            line.first_step_at = now
        elif event["event"] == "estimate":
            if name not in self.measured:
                line.expected = float(event["seconds"])
        else:
            self._advance(line, event, now)
        return line

    def _change(self, line: Line, state: str, seconds: float | None, now: float) -> None:
        if state == "started" and line.state != "started":
            line.started = line.first_step_at = now
        line.state = state
        if state == "finished" and line.name in self.assumed:
            self._expect_all()
        if state in ENDED:
            line.seconds = float(seconds) if seconds is not None else (now - line.started if line.started else 0.0)

    def _advance(self, line: Line, event: Mapping[str, Any], now: float) -> None:
        if line.state == "waiting":
            self._change(line, "started", None, now)
        if line.name in self.assumed:
            self._expect_all()
        line.step, line.total = int(event["step"]), int(event["total"])
        line.metrics = {k: float(v) for k, v in event.get("metrics", {}).items() if isinstance(v, int | float)}

    def elapsed(self) -> float:
        """Seconds since the job began."""
        return self.clock() - self.began

    def left(self) -> float:
        """Seconds until the job ends, by the stages' own pace and by how this machine did against what was expected."""
        now = self.clock()
        ended = [
            line
            for line in self.lines.values()
            if line.state == "finished" and line.name not in self.measured and line.name != "servers"
        ]
        expected = sum(line.expected for line in ended)
        scale = min(4.0, max(0.05, sum(line.seconds for line in ended) / expected)) if expected > 15 else 1.0
        return sum(line.left(now, 1.0 if line.name in self.measured else scale) for line in self.lines.values())

    def durations(self) -> dict[str, float]:
        """Seconds of every stage that ran from its start to its end, and did something."""
        return {
            line.name: round(line.seconds, 1)
            for line in self.lines.values()
            if line.state == "finished" and not line.first_step and line.seconds >= 1
        }


def read_durations(path: Path) -> dict[str, float]:
    """Durations of earlier runs; none when there is no such file or it is damaged."""
    try:
        return {str(k): float(v) for k, v in json.loads(path.read_text()).items()}
    except (FileNotFoundError, ValueError, AttributeError, TypeError):
        return {}


def write_durations(path: Path, durations: Mapping[str, float]) -> None:
    """Keep `durations` for the estimates of the next run; what is not in it stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(read_durations(path) | dict(durations), indent=2, sort_keys=True) + "\n")
    temporary.replace(path)


class Follower:
    """Reads the new whole lines of a growing JSON-lines file; starts at its present end, and again when it shrinks."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = path.stat().st_size if path.exists() else 0

    def events(self) -> Iterator[dict[str, Any]]:
        """The events written since the last call."""
        if not self.path.exists():
            return
        if self.path.stat().st_size < self.offset:
            self.offset = 0
        with self.path.open("rb") as file:
            file.seek(self.offset)
            for raw in file:
                if not raw.endswith(b"\n"):
                    break
                self.offset += len(raw)
                try:
                    event = json.loads(raw)
                except ValueError:  # a line torn by a kill
                    continue
                if isinstance(event, dict):
                    yield event


# -- what a person sees -------------------------------------------------------------------------------------------


def clock_text(seconds: float) -> str:
    """75.2 -> 1:15."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _figures(line: Line, limit: int = 3) -> str:
    shown = [f"{key.split('/')[-1]} {value:.3g}" for key, value in list(line.metrics.items())[:limit]]
    return "  ".join(shown)


class Display:
    """Shows a Progress: a live table on a terminal, plain lines elsewhere. A context manager; call `refresh` often."""

    def __init__(self, progress: Progress, console: Console, note: Callable[[], str] = lambda: "") -> None:
        self.progress, self.console, self.note = progress, console, note
        self.live = Live(console=console, auto_refresh=False, transient=False) if console.is_terminal else None
        self.printed: dict[str, str] = {}
        self.last_line = progress.clock()

    def __enter__(self) -> Display:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.refresh()
        if self.live:
            self.live.stop()

    def refresh(self) -> None:
        """Bring what is shown up to date."""
        if self.live:
            self.live.update(self._table(), refresh=True)
        else:
            self._plain()

    def _table(self) -> Group:
        now = self.progress.clock()
        table = Table.grid(padding=(0, 1))
        for line in self.progress.lines.values():
            colour = COLOURS.get(line.state, "dim")
            seconds = line.seconds if line.state in ENDED else (now - line.started if line.state == "started" else 0.0)
            table.add_row(
                Text(MARKS.get(line.state, "?"), style=colour),
                Text(line.name, style=colour),
                ProgressBar(total=1.0, completed=line.fraction(now), width=24),
                Text(f"{seconds:6.1f} s" if line.state != "waiting" else "", justify="right"),
                Text(line.state if line.state in ENDED[1:] else _figures(line), style="dim", overflow="ellipsis"),
            )
        return Group(table, Text(self._summary(), style="bold"))

    def _summary(self) -> str:
        note = self.note()
        elapsed, left = clock_text(self.progress.elapsed()), clock_text(self.progress.left())
        return f"{elapsed} passed, about {left} left" + (f" · {note}" if note else "")

    def _plain(self) -> None:
        now = self.progress.clock()
        for line in list(self.progress.lines.values()):
            if line.state != self.printed.get(line.name, "waiting"):
                self.printed[line.name] = line.state
                took = f" {line.seconds:.1f} s" if line.state in ENDED else ""
                self.console.print(f"{MARKS.get(line.state, '?')} {line.name}: {line.state}{took}", highlight=False)
                self.last_line = now
        if now - self.last_line >= 10:
            self.last_line = now
            running = [line for line in self.progress.lines.values() if line.state == "started"]
            what = "; ".join(f"{line.name} {line.fraction(now):.0%} {_figures(line)}".rstrip() for line in running)
            self.console.print(f"  {what or 'waiting'} ({self._summary()})", highlight=False)
