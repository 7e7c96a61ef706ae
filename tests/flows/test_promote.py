"""Promotion, on a real store, real model folders and MLflow's own tables."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from good_report import GOOD

from feedback.store import StaleChampion, Store
from flows import approval, promote, settings
from flows.record import MODEL, Records
from models.checkpoint import model_hash, save_model
from models.config import ModelConfig
from models.tokenizer import Tokenizer
from models.transformer import Transformer

CANDIDATE = "artifacts/ppo/model"


@pytest.fixture
def root(tmp_path: Path, empty_mlflow: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace with an SFT model and a candidate."""
    monkeypatch.delenv("THUMBWHEEL_MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / ".thumbwheel").mkdir()
    shutil.copy(empty_mlflow, tmp_path / ".thumbwheel" / "mlflow.db")
    shutil.copy(Path(settings.__file__).parents[1] / "params.yaml", tmp_path / "params.yaml")
    (tmp_path / "data.dvc").write_text("outs:\n- md5: 00112233.dir\n  path: data\n")
    tokenizer = Tokenizer.train(["hello there"], 300)
    for seed, stage in enumerate(("sft", "ppo")):
        torch.manual_seed(seed)
        config = ModelConfig(8, 1, 2, 2, 8, 32, vocab_size=tokenizer.vocab_size)
        save_model(Transformer(config), tmp_path / "artifacts" / stage / "model", tokenizer)
    return tmp_path


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(f"sqlite:///{tmp_path / 'feedback.db'}")
    store.migrate()
    yield store
    store.close()


@pytest.fixture
def records(root: Path) -> Records:
    """MLflow's records, with a run and a registered version of each model."""
    records = Records(root)
    for stage in ("sft", "ppo"):
        run_id = records.client.create_run(records.experiment, run_name=stage).info.run_id
        folder = root / "artifacts" / stage / "model"
        records.register(run_id, stage, folder, model_hash(folder), "md5")
    return records


def report(root: Path, champion: str) -> dict[str, Any]:
    """A report of the candidate that the gate likes."""
    found = copy.deepcopy(GOOD)
    found["candidate"] |= {"model_hash": model_hash(root / CANDIDATE), "thumbs_up_rate": 0.8}
    found["champion_before"] = {"model_hash": champion}
    found["comparisons"]["champion_before"]["win_rate"] = 0.65
    return found


def alias(records: Records, name: str) -> str:
    return str(records.client.get_model_version_by_alias(MODEL, name).tags["thumbwheel.model_hash"])


def test_the_wheel_of_promotions(root: Path, store: Store, records: Records) -> None:
    sft, ppo = model_hash(root / promote.SFT), model_hash(root / CANDIDATE)

    first = promote.promote_first(root, store, records)
    assert (first["decision"], first["champion"]) == ("promote", sft)
    row = store.champion()
    assert row is not None and row.model_path == f".thumbwheel/models/{sft}"
    assert model_hash(root / row.model_path) == sft
    assert row.figures["data_revision"] == "00112233.dir"
    run = records.client.get_run(row.figures["mlflow_run_id"])
    assert run.info.run_name == "sft"
    assert alias(records, "champion") == sft
    assert promote.promote_first(root, store, records)["decision"] == "reigns"

    second = promote.promote_candidate(root, store, report(root, sft), records)
    assert (second["decision"], second["champion"]) == ("promote", ppo)
    row = store.champion()
    assert row is not None
    assert (row.from_hash, row.figures["thumbs_up_gain_low"], row.figures["win_rate"]) == (sft, 0.25, 0.65)
    assert "+0.300 [+0.250, +0.350]" in row.reason
    assert (alias(records, "champion"), alias(records, "previous")) == (ppo, sft)
    card = (root / row.model_path / "README.md").read_text()
    assert "| thumbs up rate | – | – | 0.800 |" in card and "| data (DVC) | 00112233.dir |" in card
    assert "\\[+0.250, +0.350\\]" in card  # a reason is no markup
    assert records.find_version(ppo).description in card
    assert model_hash(root / row.model_path) == ppo
    assert json.dumps(row.figures)

    again = promote.promote_candidate(root, store, report(root, sft), records)
    assert again["decision"] == "reigns"
    assert len(store.promotions()) == 2

    store.rollback("it was rude")
    back = promote.promote_candidate(root, store, report(root, sft), records)
    assert (back["decision"], back["champion"]) == ("keep", sft)
    assert "it was rude" in back["reasons"][0]
    assert alias(records, "champion") == sft
    assert len(store.promotions()) == 3


def test_the_gate_is_asked_again_with_the_limits_of_now(root: Path, store: Store, records: Records) -> None:
    sft, ppo = model_hash(root / promote.SFT), model_hash(root / CANDIDATE)
    promote.promote_first(root, store, records)
    settings.set_params(root, {"gate.min_gain": 0.29})
    kept = promote.promote_candidate(root, store, report(root, sft), records)
    assert (kept["decision"], kept["champion"]) == ("keep", sft)
    assert len(kept["reasons"]) == 1
    assert alias(records, "challenger") == ppo
    assert not (root / promote.MODELS / ppo).exists()


def test_with_approval_required_a_person_has_the_last_word(
    root: Path, store: Store, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    sft, ppo = model_hash(root / promote.SFT), model_hash(root / CANDIDATE)
    promote.promote_first(root, store, records)
    settings.set_params(root, {"approval.mode": "required"})
    started: list[str] = []
    monkeypatch.setattr(approval, "start", lambda candidate, champion, hours: started.append(candidate))
    waits = promote.promote_candidate(root, store, report(root, sft), records)
    assert (waits["decision"], waits["champion"], started) == ("wait", sft, [ppo])
    assert alias(records, "challenger") == ppo
    shutil.rmtree(root / "artifacts/ppo/model")  # the next retraining has begun: the candidate was kept

    (question,) = approval.waiting(root)
    told = approval.carry_out(root, store, records, question, "reject", "Ann", "too long")
    assert told == "reject by Ann: too long"
    assert store.champion().model_hash == sft  # type: ignore[union-attr]
    assert records.find_version(ppo).tags["thumbwheel.approval"] == told
    shutil.copytree(root / promote.MODELS / ppo, root / "artifacts/ppo/model")
    again = promote.promote_candidate(root, store, report(root, sft), records)
    assert (again["decision"], started) == ("keep", [ppo])
    assert "too long" in again["reasons"][0]

    told = approval.carry_out(root, store, records, question, "promote", "", "")
    row = store.champion()
    assert row is not None and row.model_hash == ppo and row.figures["approval"]["comment"] == ""
    assert model_hash(root / row.model_path) == ppo
    assert alias(records, "champion") == ppo
    with pytest.raises(StaleChampion):
        stale = report(root, "f" * 64)
        stale["candidate"]["model_hash"] = sft
        approval.carry_out(root, store, records, approval.Question(sft, stale, ["x"], ""), "promote", "", "")


def test_a_report_against_another_champion_is_refused(root: Path, store: Store, records: Records) -> None:
    promote.promote_first(root, store, records)
    with pytest.raises(StaleChampion, match="judge it again"):
        promote.promote_candidate(root, store, report(root, "f" * 64), records)


def test_a_report_about_another_candidate_is_refused(root: Path, store: Store, records: Records) -> None:
    promote.promote_first(root, store, records)
    found = report(root, model_hash(root / promote.SFT))
    found["candidate"]["model_hash"] = "e" * 64
    with pytest.raises(ValueError, match="run stage judge"):
        promote.promote_candidate(root, store, found, records)


def test_a_model_that_mlflow_does_not_know_is_promoted_all_the_same(
    root: Path, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    first = promote.promote_first(root, store, Records(root))
    assert first["decision"] == "promote"
    assert "alias champion was not moved" in caplog.text


def test_a_damaged_copy_is_made_again_and_nothing_is_left_over(root: Path) -> None:
    folder = root / promote.SFT
    hash = model_hash(folder)
    path = root / promote.keep_model(root, folder, hash)
    (path / "model.safetensors").write_bytes(b"cut")
    assert root / promote.keep_model(root, folder, hash) == path
    assert model_hash(path) == hash
    with pytest.raises(ValueError, match="changed while it was copied"):
        promote.keep_model(root, folder, "0" * 64)
    assert [p.name for p in path.parent.iterdir()] == [hash]
    assert sorted(p.name for p in path.iterdir()) == sorted(p.name for p in folder.iterdir())
