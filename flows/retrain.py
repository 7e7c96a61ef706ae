"""The flow `retrain`: what people said since the last time becomes a new candidate, judged against the champion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prefect import flow, get_run_logger
from prefect.states import Completed, State
from pydantic.json_schema import SkipJsonSchema

from flows.environment import environment
from flows.flowrun import WEEK_SECONDS, FlowRun, open_flow_run
from flows.settings import Changes, changes_model

if TYPE_CHECKING:
    from feedback.promotions import Promotion
    from feedback.store import Store

    Preset = Literal["tiny", "micro"] | None
    Overrides = Changes | None
else:  # with the null left out of the schema, Prefect's form shows the fields themselves, to be left empty
    Preset = Literal["tiny", "micro"] | SkipJsonSchema[None]
    Overrides = changes_model() | SkipJsonSchema[None]

MANIFEST = "feedback.manifest.json"
WRITTEN = "written.manifest.json"  # of the batches whose own answers SFT learns from: align writes it, retrain leaves it alone
CHAMPION = "champion.json"


@flow(name="retrain", validate_parameters=True, persist_result=True, timeout_seconds=WEEK_SECONDS)
def retrain(preset: Preset = None, overrides: Overrides = None) -> Any:
    """Snapshot, reward model, PPO (or DPO or KTO), judge, promotion, on all batches so far, when one of them is open.

    preset, overrides: changed parameters, written into params.yaml first. With no open batch there is nothing to do.
    """
    store = open_store()
    try:
        if not (preset or overrides or store.open_batches()):
            return nothing_to_do("no batch is open")  # nor any need to hold the workspace, or for a run in MLflow
        with open_flow_run("retrain", preset, overrides.plain() if overrides else None) as run:
            if not store.open_batches():
                return nothing_to_do("no batch is open")
            return learn(run, store)
    finally:
        store.close()


def learn(run: FlowRun, store: Store) -> dict[str, Any]:
    """From the batches to a judged and perhaps promoted candidate; the batches in the manifest are then consumed."""
    from feedback.snapshot import digest

    manifest = store.manifest()
    run.write_json(MANIFEST, manifest)
    run.stage("snapshot")
    check_tokenizer(run.root)
    run.stage("reward")
    run.stage(run.params.align.method)
    name_champion(run, store)
    run.stage("judge")
    decision = run.step("promote", lambda emit: promote(run, store))
    learned, files = {batch["id"] for batch in manifest["batches"]}, digest(run.root / "artifacts/snapshot")
    for batch in store.open_batches():
        if batch.id in learned:
            store.consume_batch(batch.id, run.parent, files)
    return decision


def check_tokenizer(root: Path) -> None:
    """Refuse opinions on answers of another tokenizer: their token ids would mean other words to the reward model.

    Raises RuntimeError that names the models.
    """
    ours = (root / "artifacts/sft/model/tokenizer.json").read_bytes()
    rows = (root / "artifacts/snapshot/opinions.train.jsonl").read_text(encoding="utf-8").splitlines()
    for rated in sorted({model for row in rows for model in models_of(json.loads(row))}):
        theirs = root / ".thumbwheel/models" / rated / "tokenizer.json"
        if theirs.exists() and theirs.read_bytes() != ours:
            raise RuntimeError(
                f"people rated answers of model {rated[:12]}, whose tokenizer is not that of artifacts/sft/model: their "
                "token ids do not fit. Put data, curate and tokenize back as they were, or begin anew with an empty "
                "feedback database (THUMBWHEEL_DATABASE_URL, by default .thumbwheel/feedback.db)"
            )


def models_of(row: dict[str, Any]) -> set[str]:
    """The models whose answers a row of a snapshot is about."""
    several = {answer["model_hash"] for answer in row.get("answers", [])}
    return {row["model_hash"], row.get("rejected_model_hash", row["model_hash"]), *several}


def name_champion(run: FlowRun, store: Store) -> None:
    """Write into champion.json whom the candidate has to beat, unless the candidate reigns already.

    Then the file keeps the one whom it has beaten: judging again would compare the candidate with itself.
    """
    from models.checkpoint import model_hash

    candidate, reigning = model_hash(run.root / run.params.candidate), store.champion()
    if reigning is None:
        raise RuntimeError("no model has been promoted yet: run the flow align first")
    if reigning.model_hash == candidate:
        if (run.root / CHAMPION).exists():
            return
        reigning = _before(store.promotions(), candidate) or reigning
    run.write_json(CHAMPION, {"model_hash": reigning.model_hash, "path": reigning.model_path})


def _before(promotions: list[Promotion], candidate: str) -> Promotion | None:
    others = [each for each in promotions if each.model_hash != candidate]
    return others[-1] if others else None


def promote(run: FlowRun, store: Store) -> dict[str, Any]:
    """Apply the gate's decision: the promotion's row, then MLflow's aliases. Returns what was decided."""
    from flows.promote import promote_candidate

    report = json.loads((run.root / "artifacts/judge/report.json").read_text(encoding="utf-8"))
    return promote_candidate(run.root, store, report, run.records)


def open_store() -> Store:
    """The feedback database of the workspace, migrated."""
    from feedback.store import Store

    where = environment()
    where.state.mkdir(parents=True, exist_ok=True)
    store = Store(where.feedback_url())
    store.migrate()
    return store


def nothing_to_do(why: str) -> State[Any]:
    """The state of a flow run that found nothing to do."""
    get_run_logger().info("nothing to do: %s", why)
    return Completed(name="NothingToDo", message=f"nothing to do: {why}")
