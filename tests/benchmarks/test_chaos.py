"""A short share of the chaos drill: real processes, killed; a torn checkpoint; a disk that is really full."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import chaos

KINDS = ("pretrain",)


@pytest.mark.slow
@pytest.mark.fault
def test_a_short_drill_ends_with_the_bits_of_undisturbed_runs(tmp_path: Path) -> None:
    changes = {"data": {"max_chats": 100}, "pretrain": {"steps": 60}}
    result = json.loads(json.dumps(chaos.run(tmp_path / "drill", 4, seed=3, kinds=KINDS, **changes)))
    assert result["kills"] == 4 and len(result["steps_lost"]) == 4
    assert 0 <= result["max_steps_lost"] <= 5
    for kind in KINDS:
        models = result["models"][kind]
        assert models["disturbed"]["sha256"] == models["undisturbed"]["sha256"]
        assert models["disturbed"]["path"] != models["undisturbed"]["path"]
        assert all(Path(model["path"]).is_file() for model in models.values())
    torn = result["torn_checkpoint"]
    assert torn["resumed"] % 5 == 0 and 5 <= torn["steps_lost"] <= 10  # the checkpoint before the torn one served
    full = result["full_disk"]
    if "refused" in full:  # neither root nor allowed a user namespace: then the drill says what is missing, and fails
        assert "run as root, or allow user namespaces" in full["refused"]
        assert "full" in result["missed"]
    else:
        assert "No space left on device: the checkpoint of step" in full["cause"]
        assert full["steps_lost"] <= 5
    assert result["useful_steps"] == 60
    lost = sum(result["steps_lost"]) + torn["steps_lost"] + full.get("steps_lost", 0)
    assert result["steps_run"] == 60 + lost  # nothing else was done twice
    rows = Path(result["logbook"]).read_text(encoding="utf-8").splitlines()
    assert sum("SIGKILL" in row for row in rows) == 5
