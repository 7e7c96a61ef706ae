"""Which batches of opinions a stage's outputs learned from: tags of its MLflow run and of the model versions it made."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import count, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.pipeline import METHODS, Look

if TYPE_CHECKING:
    from flows.record import Records

BATCHES = "thumbwheel.batches"  # "1-3,5": batch ids; "" where nobody's opinion was learned from
LEARNERS = ("written", "sft", "snapshot", "reward", *METHODS)
SFT = "artifacts/sft/model"


def spell(ids: Iterable[int]) -> str:
    """Batch ids in few characters: {1, 2, 3, 5} -> "1-3,5"."""
    ordered, position = sorted(set(ids)), count()
    runs = [list(run) for _, run in groupby(ordered, lambda id: id - next(position))]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def read(tag: str) -> set[int]:
    """The inverse of spell."""
    ids: set[int] = set()
    for part in filter(None, tag.split(",")):
        first, _, last = part.partition("-")
        ids.update(range(int(first), int(last or first) + 1))
    return ids


def learned_batches(root: Path, seen: Look, records: Records) -> set[int]:
    """The batches behind what a stage has just made: of its snapshot, of people's own answers, and of its SFT model."""
    found: set[int] = set()
    if seen.name == "snapshot" or "artifacts/snapshot" in seen.data:
        manifest = json.loads((root / "feedback.manifest.json").read_text(encoding="utf-8"))
        found.update(batch["id"] for batch in manifest["batches"])
    if seen.name == "written" or "artifacts/written" in seen.data:
        found.update(json.loads((root / "artifacts/written/summary.json").read_text(encoding="utf-8"))["batches"])
    if SFT in seen.data:
        from models.checkpoint import model_hash

        version = records.find_version(model_hash(root / SFT))
        found |= read(version.tags.get(BATCHES, "")) if version is not None else set()
    return found


def runs_that_learned(records: Records, batches: Iterable[int]) -> Iterator[str]:
    """The ids of the stage runs whose outputs learned from one of these batches."""
    wanted = set(batches)
    for run in records.search(f"tags.`{BATCHES}` != ''"):
        if not wanted.isdisjoint(read(run.data.tags[BATCHES])):
            yield run.info.run_id


def versions(records: Records) -> list[Any]:
    """All registered versions of the model, oldest first."""
    from flows.record import MODEL

    found, token = [], None
    while True:
        page = records.client.search_model_versions(f"name = '{MODEL}'", max_results=200, page_token=token)
        found += list(page)
        token = page.token
        if not token:
            return sorted(found, key=lambda version: int(version.version))
