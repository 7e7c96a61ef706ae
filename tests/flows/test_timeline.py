"""What is shown of a long job: events followed from a file, seconds, estimates."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from flows.timeline import Display, Follower, Progress, clock_text, read_durations, write_durations


class Clock:
    """Seconds that only the test moves."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def stage(name: str, state: str, seconds: float | None = None) -> dict[str, object]:
    event: dict[str, object] = {"event": "stage", "stage": name, "state": state}
    return event if seconds is None else event | {"seconds": seconds}


def steps(name: str, step: int, total: int) -> dict[str, object]:
    return {"event": "metrics", "stage": name, "step": step, "total": total, "metrics": {"loss": 2.5}}


def test_a_stage_that_tells_its_steps_is_estimated_by_its_own_pace() -> None:
    clock = Clock()
    progress = Progress(["pretrain", "sft"], {"pretrain": 100.0, "sft": 40.0}, clock)
    assert progress.left() == 140.0
    progress.take(stage("pretrain", "started"))
    clock.now += 10
    progress.take(steps("pretrain", 20, 100))  # 20 steps in 10 s, 80 are left: 40 s
    assert progress.left() == pytest.approx(40.0 + 40.0)
    assert progress.lines["pretrain"].fraction(clock()) == pytest.approx(0.2)
    progress.take(stage("pretrain", "finished", 51.0))
    assert progress.left() == 40.0
    assert progress.durations() == {"pretrain": 51.0}


def test_a_resumed_stage_counts_its_pace_from_the_checkpoint() -> None:
    clock = Clock()
    progress = Progress(["ppo"], {"ppo": 100.0}, clock)
    progress.take(stage("ppo", "started"))
    progress.take({"event": "resumed", "stage": "ppo", "step": 60})
    clock.now += 5
    progress.take(steps("ppo", 70, 100))  # 10 steps in 5 s, 30 are left: 15 s
    assert progress.left() == pytest.approx(15.0)
    progress.take(stage("ppo", "finished", 21.0))
    assert progress.durations() == {}  # not the time of a whole run


def test_a_slow_machine_stretches_what_was_only_typical() -> None:
    clock = Clock()
    progress = Progress(["pretrain", "ppo"], {}, clock)
    typical = progress.lines["ppo"].expected
    progress.take(stage("pretrain", "finished", 2 * progress.lines["pretrain"].expected))
    assert progress.left() == pytest.approx(2 * typical)


def test_unchanged_stages_leave_nothing_to_wait_for() -> None:
    progress = Progress(["curate", "judge"], {}, Clock())
    for name in ("curate", "judge"):
        progress.take(stage(name, "unchanged", 0.1))
    assert progress.left() == 0.0
    assert progress.durations() == {}


def test_what_was_made_before_counts_little_until_a_stage_runs_after_all() -> None:
    progress = Progress(["curate", "ppo", "judge"], {"curate": 8.0, "ppo": 90.0, "judge": 30.0}, Clock())
    progress.assume_unchanged(["curate", "ppo", "judge"])
    assert progress.left() == 3.0
    progress.take(stage("curate", "unchanged", 0.2))
    assert progress.left() == 2.0
    progress.take(steps("ppo", 0, 80))  # its parameters changed
    assert progress.left() == 90.0 + 30.0


def test_a_file_is_followed_from_its_present_end_line_by_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    path.write_text(json.dumps(stage("old", "finished")) + "\n")
    follower = Follower(path)
    assert list(follower.events()) == []
    line = json.dumps(stage("curate", "started"))
    with path.open("a") as file:
        file.write("not json\n" + line[:10])
        file.flush()
        assert list(follower.events()) == []
        file.write(line[10:] + "\n")
    assert [event["stage"] for event in follower.events()] == ["curate"]
    path.write_text(json.dumps(stage("new", "started")) + "\n")  # somebody emptied it
    assert [event["stage"] for event in follower.events()] == ["new"]


def test_a_log_gets_a_line_a_change_and_no_control_characters() -> None:
    clock, output = Clock(), io.StringIO()
    progress = Progress(["curate", "pretrain"], {"curate": 5.0, "pretrain": 60.0}, clock)
    with Display(progress, Console(file=output, width=120), lambda: "0.4 GB") as display:
        progress.take(stage("curate", "started"))
        display.refresh()
        progress.take(stage("curate", "finished", 4.0))
        progress.take(stage("pretrain", "started"))
        display.refresh()
        clock.now += 15
        progress.take(steps("pretrain", 25, 100))
        display.refresh()
        display.refresh()
    lines = output.getvalue().splitlines()
    assert lines == [
        "▶ curate: started",
        "✔ curate: finished 4.0 s",
        "▶ pretrain: started",
        "  pretrain 25% loss 2.5 (0:15 passed, about 0:45 left · 0.4 GB)",
    ]


def test_durations_of_other_stages_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "new" / "durations.json"
    write_durations(path, {"curate": 5.0, "ppo": 80.0})
    write_durations(path, {"ppo": 70.0})
    assert read_durations(path) == {"curate": 5.0, "ppo": 70.0}
    path.write_text("{")
    assert read_durations(path) == {}


def test_clock_text() -> None:
    assert [clock_text(s) for s in (0, 9.9, 75.2, 3600)] == ["0:00", "0:09", "1:15", "60:00"]
