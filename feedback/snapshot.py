"""Snapshots: the opinions of a manifest's batches as two sorted files, the only thing that training reads of feedback."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from feedback.opinions import canonical, sha256
from feedback.store import Store


def write_snapshot(store: Store, manifest: dict[str, Any], folder: Path, heldout_percent: int) -> dict[str, Any]:
    """Write opinions.train.jsonl, opinions.heldout.jsonl and summary.json into `folder`; returns the summary.

    A line is {"kind", "prompt_ids", "response_ids", "messages", "response", "value", "source", "model_hash"}. The prompt
    decides the file (all its answers go to the same one); `heldout_percent` of all prompts, 0 to 100, are held out. Two
    people who say the same of the same answer make two equal lines: the weight of opinion is data. Equal opinions give
    equal bytes, whatever their ids, times and order. Raises ValueError when the manifest does not fit the database.
    """
    if not 0 <= heldout_percent <= 100:
        raise ValueError(f"params.yaml: snapshot.heldout_percent must be 0 to 100, not {heldout_percent}")
    lines: dict[str, list[bytes]] = {"train": [], "heldout": []}
    counts: Counter[str] = Counter()
    for opinion in store.opinions(manifest):
        if opinion.kind != "thumb":
            continue
        split = "heldout" if bucket(opinion.messages) < heldout_percent else "train"
        lines[split].append(canonical(opinion.content()))
        for key in (split, f"{split}.{'up' if opinion.value > 0 else 'down'}", f"source.{opinion.source}"):
            counts[key] += 1
    folder.mkdir(parents=True, exist_ok=True)
    for split, found in lines.items():
        write(folder / f"opinions.{split}.jsonl", b"".join(line + b"\n" for line in sorted(found)))
    keys = ("train", "train.up", "train.down", "heldout", "heldout.up", "heldout.down")
    summary = {"batches": len(manifest["batches"]), **dict.fromkeys(keys, 0), **counts}
    write(folder / "summary.json", (json.dumps(summary, sort_keys=True, indent=2) + "\n").encode())
    return summary


def bucket(messages: list[dict[str, str]]) -> int:
    """Which of 100 buckets a prompt falls into: always the same, evenly spread, and independent of other splits' hashes."""
    return int(sha256(["snapshot", messages])[:8], 16) % 100


def write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    draft = path.with_name(path.name + ".draft")
    with draft.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
