"""Batches in tags, and what they are found by."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flows.lineage import BATCHES, learned_batches, read, runs_that_learned, spell, versions
from flows.pipeline import Look
from flows.record import Records


@pytest.mark.parametrize(
    ("ids", "tag"),
    [(set(), ""), ({7}, "7"), ({1, 2}, "1-2"), ({1, 2, 3, 5, 9, 10}, "1-3,5,9-10")],
)
def test_batch_ids_are_spelled_in_few_characters_and_read_back(ids: set[int], tag: str) -> None:
    assert spell(ids) == tag and read(tag) == ids


def look(name: str, *deps: str) -> Look:
    return Look(name, "run", dict.fromkeys(deps, "md5"), {}, ())


def test_a_policy_learned_from_its_snapshot_and_through_sft_from_what_people_wrote(workspace: Path) -> None:
    records = Records(workspace)
    (workspace / "feedback.manifest.json").write_text(json.dumps({"batches": [{"id": 4}, {"id": 5}]}))
    (workspace / "artifacts/written").mkdir(parents=True)
    (workspace / "artifacts/written/summary.json").write_text(json.dumps({"batches": [2]}))
    (workspace / "artifacts/sft/model").mkdir(parents=True)
    weights = workspace / "artifacts/sft/model/model.safetensors"
    weights.write_bytes(b"sft")
    assert learned_batches(workspace, look("sft", "artifacts/written"), records) == {2}
    from models.checkpoint import model_hash

    ids = {}
    for name, tag in (("sft", "2"), ("ppo", "2,4-5"), ("reward", "4-5"), ("pretrain", "")):
        tags = {BATCHES: tag} if tag else {}
        ids[name] = records.client.create_run(records.experiment, run_name=name, tags=tags).info.run_id
    records.register(ids["sft"], "sft", weights.parent, model_hash(weights.parent), "md5", {BATCHES: "2"})
    assert [version.tags[BATCHES] for version in versions(records)] == ["2"]
    policy = look("ppo", "artifacts/sft/model", "artifacts/reward/model", "artifacts/snapshot")
    assert learned_batches(workspace, policy, records) == {2, 4, 5}
    assert set(runs_that_learned(records, [2])) == {ids["sft"], ids["ppo"]}
    assert set(runs_that_learned(records, [5, 6])) == {ids["reward"], ids["ppo"]}
