"""Stage snapshot: the opinions of the manifest's batches become files, the only thing that training reads of feedback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.job import Job

if TYPE_CHECKING:
    from feedback.store import Store
    from feedback.written import Rules
    from models.tokenizer import Tokenizer


@dataclass(frozen=True)
class SnapshotOptions:
    """Section `snapshot` of params.yaml. heldout_percent: of the rated prompts, never learned from."""

    heldout_percent: int = 26

    def __post_init__(self) -> None:
        if not 0 <= self.heldout_percent <= 100:
            raise ValueError(f"heldout_percent must be 0 to 100, it is {self.heldout_percent}")


def run(job: Job) -> dict[str, Any]:
    """The stage body: feedback.manifest.json + the feedback database → opinions.{train,heldout}.jsonl, conversations.jsonl,
    prompts.jsonl, quarantine.jsonl, summary.json (see feedback.snapshot), and prompts.npz: what people asked, for PPO, less
    the prompts that the judge asks. Answers that came from a server by URL, from an imported log or from a person are
    tokenised as the SFT model reads them.

    The database is no dep: the manifest names each batch with its hash, so what is read from it is settled.
    Raises ValueError when the manifest cannot be read or names a batch that the database does not hold.
    """
    from feedback.retelling import Retelling
    from feedback.snapshot import write_snapshot
    from flows.screen import rules
    from models.tokenizer import Tokenizer

    options = job.options("snapshot", SnapshotOptions)
    manifest, screen = read_manifest(job.input("feedback.manifest.json")), rules(job)

    def reader() -> tuple[Tokenizer, int]:
        folder = job.input("artifacts/sft/model")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return Tokenizer.load(folder), int(config["max_position_embeddings"])

    retell = Retelling(reader)
    with opened_store(job) as store:
        counts = write_snapshot(store, manifest, job.output, options.heldout_percent, retell, screen)
    numbers = {"opinions/train": counts["train"], "opinions/heldout": counts["heldout"], "batches": counts["batches"]}
    job.log(1, 1, {**numbers, "prompts/asked": write_prompts(job, screen)})
    return counts


def write_prompts(job: Job, screen: Rules) -> int:
    """prompts.npz of prompts.jsonl: those that may be learned from and are short enough. Returns how many."""
    from flows.tokenize import TokenizeOptions, read_rows
    from models.corpus import Sequences, prompts
    from models.tokenizer import Tokenizer

    asked = [row["messages"] for row in read_rows(job.output / "prompts.jsonl")]
    asked = [messages for messages in asked if not screen.held(messages)]
    longest = job.options("tokenize", TokenizeOptions).max_prompt
    sequences = Sequences.none()
    if asked:
        sequences, _ = prompts(Tokenizer.load(job.input("artifacts/sft/model")), asked, longest)
    sequences.save(job.output / "prompts.npz")
    return len(sequences)


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest of batches. Raises ValueError that names the file and the remedy."""
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        len(manifest["batches"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path.name} is no manifest ({error}): delete it, the next flow run writes it") from error
    return manifest


@contextmanager
def opened_store(job: Job) -> Iterator[Store]:
    """The feedback database of the job's workspace, migrated."""
    from feedback.store import Store
    from flows.environment import environment

    store = Store(environment(job.root).feedback_url())
    try:
        store.migrate()
        yield store
    finally:
        store.close()
