"""The flow `align`: the whole wheel, from the data to a judged and perhaps promoted model.

data → curate → validate → tokenize → pretrain → what people wrote → SFT → (the first time the SFT model becomes the champion,
is served, and the simulated rater asks it) → snapshot → reward model → PPO (or DPO or KTO) → judge → promotion. What is up to
date is not run again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prefect import flow

from flows.flowrun import WEEK_SECONDS, FlowRun, open_flow_run
from flows.retrain import MANIFEST, WRITTEN, Overrides, Preset, learn, nothing_to_do, open_store

if TYPE_CHECKING:
    from feedback.store import Store


@flow(name="align", validate_parameters=True, persist_result=True, timeout_seconds=WEEK_SECONDS)
def align(preset: Preset = None, overrides: Overrides = None) -> Any:
    """Turn the wheel once.

    preset: `tiny` (minutes) or `micro` (seconds, to try things); overrides: changed parameters, as sections or as dotted
    keys ({"ppo.iterations": 40}). Both are checked, then written into params.yaml, before the first stage.
    """
    store = open_store()
    try:
        with open_flow_run("align", preset, overrides.plain() if overrides else None) as run:
            run.write_json(WRITTEN, store.written_manifest())
            run.step("data", lambda emit: verify_data(run))
            for name in ("curate", "validate", "tokenize", "pretrain", "written", "sft"):
                run.stage(name)
            crown_first(run, store)
            run.step("opinions", lambda emit: gather_opinions(run, store, emit))
            if not store.manifest()["batches"]:
                return nothing_to_do("nobody has rated an answer yet; the SFT model is served, ask it something")
            return learn(run, store)
    finally:
        store.close()


def verify_data(run: FlowRun) -> str:
    """data/ is what data.dvc says, or is made so. Returns a sentence."""
    from flows import ingest

    return ingest.verify_data(run.root, run.params.data)


def crown_first(run: FlowRun, store: Store) -> None:
    """Without a champion, the SFT model becomes it: somebody has to answer before anybody can say what they think."""
    from flows.promote import promote_first

    if store.champion() is None:
        run.step("first champion", lambda emit: promote_first(run.root, store, run.records))


def gather_opinions(run: FlowRun, store: Store, emit: Any) -> int:
    """Have the simulated rater ask the SFT model while that is the champion, and open a batch of what it said.

    Opinions that people gave meanwhile wait for the bell, unless nothing was learned from yet. Returns the batch's size.
    """
    from flows import rater
    from models.checkpoint import model_hash

    champion = store.champion()
    assert champion is not None
    if run.params.rater.enabled and champion.model_hash == model_hash(run.root / "artifacts/sft/model"):
        rater.rate(run.root, champion.model_hash, run.params.rater, emit)
    first = not (run.root / MANIFEST).exists() or not store.manifest()["batches"]
    if first or store.count_opinions(source="simulated", pending_only=True):
        batch = store.open_batch(1, run.params.trust)
        return batch.accepted if batch else 0
    return 0
