"""Stage snapshot: the opinions of the manifest's batches become files, the only thing that training reads of feedback."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from models.job import Job


@dataclass(frozen=True)
class SnapshotOptions:
    """Section `snapshot` of params.yaml. heldout_percent: of the rated prompts, never learned from."""

    heldout_percent: int = 26

    def __post_init__(self) -> None:
        if not 0 <= self.heldout_percent <= 100:
            raise ValueError(f"heldout_percent must be 0 to 100, it is {self.heldout_percent}")


def run(job: Job) -> dict[str, Any]:
    """The stage body: feedback.manifest.json + the feedback database → opinions.{train,heldout}.jsonl, conversations.jsonl,
    prompts.jsonl, summary.json (see feedback.snapshot). Answers that came from a server by URL or from an imported log are
    tokenised as the SFT model reads them.

    The database is no dep: the manifest names each batch with its hash, so what is read from it is settled.
    Raises ValueError when the manifest cannot be read or names a batch that the database does not hold.
    """
    from feedback.retelling import Retelling
    from feedback.snapshot import write_snapshot
    from feedback.store import Store
    from flows.environment import environment
    from models.tokenizer import Tokenizer

    options = job.options("snapshot", SnapshotOptions)
    path = job.input("feedback.manifest.json")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        batches = len(manifest["batches"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path.name} is no manifest ({error}): delete it, the next flow run writes it") from error

    def reader() -> tuple[Tokenizer, int]:
        folder = job.input("artifacts/sft/model")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return Tokenizer.load(folder), int(config["max_position_embeddings"])

    store = Store(environment(job.root).feedback_url())
    try:
        store.migrate()
        counts = write_snapshot(store, manifest, job.output, options.heldout_percent, Retelling(reader))
    finally:
        store.close()
    job.log(1, 1, {"opinions/train": counts["train"], "opinions/heldout": counts["heldout"], "batches": batches})
    return counts
