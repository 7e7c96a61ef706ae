"""After an erasure: the models that learned from the person are flagged in MLflow, and old snapshots deleted from the disk.

The feedback database erased the person's words in its own tables and noted which runs had learned from them. Snapshots of
before stand in the workspace, in DVC's cache and in remotes that are folders of this machine; they are deleted whole, and the
next flow run makes a new one. What was pushed to a remote elsewhere, and backups, are for their owner to see to.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows import files
from flows.lineage import runs_that_learned
from flows.values import yaml
from flows.workspace import WorkspaceBusyError, writer

if TYPE_CHECKING:
    from feedback.erasure import Erasure
    from feedback.store import Store
    from flows.record import Records

WORDS = {
    "snapshot": "artifacts/snapshot",
    "written": "artifacts/written",
}  # the stages whose outputs hold people's words
REPRODUCTIONS = ".thumbwheel/reproduce"  # workspaces in which runs are made again: copies of all they read
TAG = "thumbwheel.erasures"  # the numbers of the erasures that concern a run or a model version
LEARNED = ("snapshot", "reward", "ppo", "dpo", "kto")
log = logging.getLogger("thumbwheel.erasure")


def catch_up(root: Path, store: Store, records: Records) -> int:
    """See to the erasures that nobody has seen to yet; returns how many. While stages run here, none: the next time will."""
    waiting = store.unflagged_erasures()
    if not waiting:
        return 0
    try:
        with writer(root, "erasure"):
            forget_snapshots(root)
    except WorkspaceBusyError as busy:
        log.warning("%s erasures wait: %s", len(waiting), busy)
        return 0
    for erasure in waiting:
        for run_id in erasure.mlflow_runs:
            flag(records, run_id, erasure)
        for run_id in runs_that_learned(records, erasure.batches):
            tag(records, run_id, erasure)
        store.erasure_flagged(erasure.id)
    return len(waiting)


def flag(records: Records, run_id: str, erasure: Erasure) -> None:
    """Tag a flow's run, the runs of its stages that read opinions, and the model versions that they made."""
    from mlflow.exceptions import MlflowException

    try:
        parent = records.client.get_run(run_id)
    except MlflowException as error:
        log.warning("erasure %s: run %s was not flagged: %s", erasure.id, run_id, error.message)
        return
    stages = (parent.data.tags.get(f"stage.{name}.run_id") for name in LEARNED)
    for each in dict.fromkeys([run_id, *(stage for stage in stages if stage)]):
        tag(records, each, erasure)


def tag(records: Records, run_id: str, erasure: Erasure) -> None:
    """Tag a run and the model versions that it made."""
    tags = records.client.get_run(run_id).data.tags
    records.client.set_tag(run_id, TAG, added(tags.get(TAG, ""), erasure.id))
    for version in records.client.search_model_versions(f"run_id = '{run_id}'"):
        value = added(version.tags.get(TAG, ""), erasure.id)
        records.client.set_model_version_tag(version.name, version.version, TAG, value)


def added(known: str, number: int) -> str:
    """A tag's list of numbers with one more."""
    return ",".join(map(str, sorted({int(each) for each in known.split(",") if each} | {number})))


def forget_snapshots(root: Path) -> None:
    """Delete every snapshot, and what was made of people's own answers: the outputs, what a killed run left of them, and
    their copies in DVC's cache, its run cache, and remotes on this machine."""
    from dvc.repo import Repo

    repo = Repo(str(root))
    try:
        remotes = [remote["url"] for remote in repo.config.get("remote", {}).values()]
        places = [Path(repo.cache.local.path).parent.parent, *(Path(url) for url in remotes if "://" not in url)]
        elsewhere = [url for url in remotes if "://" in url]
    finally:
        repo.close()
    hashes = {out["md5"] for out in locked_outs(root / "dvc.lock")}
    for place in places:
        hashes |= forget_runs(place / "runs")
    for place in places:
        for md5 in hashes:
            forget_object(place / "files" / "md5", md5)
    files.remove(root / REPRODUCTIONS)
    for stage, output in WORDS.items():
        for left in (root / output, root / ".thumbwheel" / "work" / stage):
            files.remove(left)
    if elsewhere:
        log.warning("snapshots of before an erasure may still stand in %s: delete them there", ", ".join(elsewhere))


def locked_outs(path: Path) -> list[dict[str, Any]]:
    """The entries of those stages in dvc.lock, if there are any."""
    if not path.exists():
        return []
    stages = (yaml().load(path.read_text(encoding="utf-8")) or {}).get("stages", {})
    return [out for name in WORDS for out in snapshots(stages.get(name, {}))]


def snapshots(stage: dict[str, Any]) -> list[dict[str, Any]]:
    """The outputs of a locked stage that hold people's words."""
    return [out for out in stage.get("outs", []) if out.get("path") in WORDS.values() and out.get("md5")]


def forget_runs(folder: Path) -> set[str]:
    """Delete the run cache's entries about snapshots; returns the hashes of the folders that they name."""
    hashes = set()
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        if found := snapshots(yaml().load(path.read_text(encoding="utf-8")) or {}):
            hashes |= {out["md5"] for out in found}
            path.unlink()
    return hashes


def forget_object(objects: Path, md5: str) -> None:
    """Delete a folder's object and those of its files. Empty files stay: other outputs may have the same."""
    listing = objects / md5[:2] / md5[2:]
    if not listing.exists():
        return
    for entry in json.loads(listing.read_text(encoding="utf-8")):
        file = objects / entry["md5"][:2] / entry["md5"][2:]
        if file.exists() and file.stat().st_size:
            file.unlink()
    listing.unlink()
