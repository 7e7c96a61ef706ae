"""Promotion: the gate's decision carried out. A model folder is kept, the promotion's row written, MLflow's aliases moved.

The row is the truth, which the chat service follows; the aliases `champion`, `previous` and `challenger` mirror it.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows import approval, card, files
from flows.gate import decide
from models.checkpoint import model_hash

if TYPE_CHECKING:
    from feedback.promotions import Promotion
    from feedback.store import Store
    from flows.record import Records

MODELS = ".thumbwheel/models"
SFT = "artifacts/sft/model"
log = logging.getLogger("thumbwheel.promote")


def promote_first(root: Path, store: Store, records: Records) -> dict[str, Any]:
    """Without a champion the SFT model becomes it, on no figures; with one, nothing changes. Returns {"decision", …}."""
    reigning = store.champion()
    if reigning is not None:
        return outcome("reigns", reigning, ["there is a champion already"])
    hash = model_hash(root / SFT)
    path = keep_model(root, root / SFT, hash)
    row = store.promote(
        model_hash=hash,
        model_path=path,
        figures=origin(root, records, hash),
        reason="first champion: somebody has to answer before anybody can say what they think",
        expected_champion=None,
    )
    mirror(store, records)
    card.write(root, row, records, None)
    return outcome("promote", row, [row.reason])


def promote_candidate(root: Path, store: Store, report: Mapping[str, Any], records: Records) -> dict[str, Any]:
    """Apply the gate, with the limits of params.yaml as they are now, to the judge's report.

    Returns {"decision": "promote" | "keep" | "reigns" | "wait", "reasons", "champion"}. A candidate that reigns already
    changes nothing; one that was rolled back stays so; with approval.mode required it waits for a person's word. Raises
    ValueError for a report of another candidate, and StaleChampion (a ValueError) for one against another champion than the
    one that reigns.
    """
    from flows import settings

    params, candidate = settings.load(root), str(report["candidate"]["model_hash"])
    folder = root / params.candidate
    if (found := model_hash(folder)) != candidate:
        raise ValueError(
            f"artifacts/judge/report.json is about {candidate[:12]}, but {params.candidate} holds {found[:12]}: "
            "run stage judge"
        )
    decision, reigning = decide(report, params.gate), store.champion()
    if reigning is not None and reigning.model_hash == candidate:
        mirror(store, records)
        return outcome("reigns", reigning, decision.reasons)
    reasons = decision.reasons
    if taken_back := rollback_of(store.promotions(), candidate):
        reasons = [f"this model was rolled back ({taken_back.reason}): it does not come back by itself"]
    if not decision.promote or taken_back:
        mirror(store, records, challenger=candidate)
        return outcome("keep", reigning, reasons)
    kept = keep_model(root, folder, candidate)
    if params.approval.mode == "required":
        question = approval.ask(root, report, decision.reasons, params.approval.hours)
        mirror(store, records, challenger=candidate)
        return outcome("keep" if question.word else "wait", reigning, [f"{question.text}, after the gate's promote"])
    row = store.promote(
        model_hash=candidate,
        model_path=kept,
        figures={**numbers(report), **origin(root, records, candidate)},
        reason=decision.checks[1].text,
        expected_champion=str(report["champion_before"]["model_hash"]),
    )
    mirror(store, records)
    card.write(root, row, records, report)
    return outcome("promote", row, reasons)


def outcome(decision: str, champion: Promotion | None, reasons: list[str]) -> dict[str, Any]:
    """What a promotion step tells its flow."""
    return {"decision": decision, "champion": champion.model_hash if champion else None, "reasons": reasons}


def rollback_of(rows: Sequence[Promotion], hash: str) -> Promotion | None:
    """The rollback that took the crown from `hash`, unless it was promoted again since."""
    about = [row for row in rows if (row.from_hash if row.action == "rollback" else row.model_hash) == hash]
    return about[-1] if about and about[-1].action == "rollback" else None


# ---------------------------------------------------------------- the folder


def keep_model(root: Path, folder: Path, hash: str) -> str:
    """Copy a model folder to .thumbwheel/models/<hash>, whole or not at all; returns that path relative to `root`.

    A whole copy that stands there is left alone, a damaged one replaced. Raises ValueError when `folder` is not `hash`.
    """
    target = root / MODELS / hash
    if (target / "config.json").exists() and (target / "model.safetensors").exists() and model_hash(target) == hash:
        return str(target.relative_to(root))
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{hash[:12]}-", dir=target.parent))
    try:
        shutil.copytree(folder, draft, dirs_exist_ok=True)
        draft.chmod(0o755)
        if (found := model_hash(draft)) != hash:
            raise ValueError(f"{folder} changed while it was copied: it was {hash[:12]}, it is {found[:12]}")
        files.move(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return str(target.relative_to(root))


# ---------------------------------------------------------------- what is recorded


def numbers(report: Mapping[str, Any]) -> dict[str, Any]:
    """The figures that decided, for the promotion's row."""
    against = report["comparisons"]["champion_before"]
    chosen = (
        *("relevance", "kl_per_answer", "distinct_answers", "most_common_share", "perplexity"),
        *("length_characters", "ended_share"),
    )
    gains = {key: value for key, value in against.items() if key.startswith(("thumbs_up_gain", "second_judge_gain"))}
    return {
        "prompts": report["prompts"],
        "thumbs_up_rate": report["candidate"]["thumbs_up_rate"],
        "win_rate": against["win_rate"],
        **gains,
        **{key: report["candidate"][key] for key in chosen if key in report["candidate"]},
    }


def origin(root: Path, records: Records, hash: str) -> dict[str, str]:
    """Where a model comes from, as far as it is known: its MLflow run, data and code; the service notes it by every answer."""
    from flows.record import MODEL, code_revision
    from flows.values import yaml

    found = {"code_revision": code_revision(root)}
    if (root / "data.dvc").exists():
        found["data_revision"] = str(yaml().load((root / "data.dvc").read_text(encoding="utf-8"))["outs"][0]["md5"])
    if (version := records.version(hash)) is not None:
        found["mlflow_run_id"] = str(records.client.get_model_version(MODEL, version).run_id)
    return found


def mirror(store: Store, records: Records, challenger: str | None = None) -> None:
    """Let MLflow's aliases say what the promotion table says; a model that MLflow does not know is told in the log."""
    reigning = store.champion()
    aliases: dict[str, str | None] = {"challenger": challenger}
    if reigning is not None:
        aliases |= {"champion": reigning.model_hash, "previous": reigning.from_hash}
    for alias, hash in aliases.items():
        if hash is None:
            continue
        try:
            records.set_alias(alias, hash)
        except LookupError as error:
            log.warning("alias %s was not moved: %s", alias, error)
