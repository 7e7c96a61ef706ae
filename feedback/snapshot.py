"""Snapshots: the opinions of a manifest's batches as sorted files, the only thing that training reads of feedback."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from feedback.batches import Opinion
from feedback.opinions import canonical, sha256
from feedback.retelling import Retelling
from feedback.store import Store


def write_snapshot(
    store: Store, manifest: dict[str, Any], folder: Path, heldout_percent: int, retell: Retelling | None = None
) -> dict[str, Any]:
    """Write the files of a snapshot into `folder`; returns the summary.

    retell: for answers that came from elsewhere; without it they are not learned from.

    - opinions.train.jsonl, opinions.heldout.jsonl: thumbs, comparisons and rankings as models.opinions reads them. The
      prompt decides the file: `heldout_percent` of all prompts, 0 to 100, are held out, and each that an expert judged. Two
      people who say the same of the same answer make two equal lines: the weight of opinion is data.
    - conversations.jsonl: answers that people wrote themselves, after the messages they answer, as curated conversations.
    - prompts.jsonl: what people asked (not simulated ones) and then had an opinion about, as curated prompts.
    - summary.json: how many of each; tokenised: rows whose token ids were made of text; unreadable: opinions left out.
    Equal opinions give equal bytes, whatever their ids, times and order. Raises ValueError when the manifest does not fit
    the database.
    """
    if not 0 <= heldout_percent <= 100:
        raise ValueError(f"params.yaml: snapshot.heldout_percent must be 0 to 100, not {heldout_percent}")
    opinions = list(store.opinions(manifest, retell) if retell else store.opinions(manifest))
    judged = {sha256(opinion.messages) for opinion in opinions if opinion.kind == "expert"}
    files: dict[str, list[bytes]] = {"opinions.train": [], "opinions.heldout": []}
    written: dict[str, set[bytes]] = {"conversations": set(), "prompts": set()}
    counts: Counter[str] = Counter()
    for opinion in opinions:
        counts[f"source.{opinion.source}"] += 1
        if opinion.source != "simulated":
            written["prompts"].add(curated(opinion.messages))
        if opinion.kind == "edit":
            answer = {"role": "assistant", "content": opinion.lesson["correction"]}
            written["conversations"].add(curated([*opinion.messages, answer]))
        elif not opinion.trainable:
            counts["unreadable"] += 1
        else:
            held = bucket(opinion.messages) < heldout_percent or sha256(opinion.messages) in judged
            split = "heldout" if held else "train"
            files[f"opinions.{split}"].append(canonical(row_of(opinion)))
            counts.update((split, f"{split}.{said(opinion)}"))
            counts["tokenised"] += opinion.lesson.get("tokenised", False)
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in {**files, **written}.items():
        write(folder / f"{name}.jsonl", b"".join(line + b"\n" for line in sorted(lines)))
    counts.update({name: len(lines) for name, lines in written.items()})
    splits = [f"{split}{what}" for split in ("train", "heldout") for what in ("", ".up", ".down", *SEVERAL)]
    keys = (*splits, "conversations", "prompts", "unreadable", "tokenised")
    left_out = {f"unreadable.{reason}": number for reason, number in retell.left_out.items()} if retell else {}
    summary = {"batches": len(manifest["batches"]), **dict.fromkeys(keys, 0), **counts, **left_out}
    write(folder / "summary.json", (json.dumps(summary, sort_keys=True, indent=2) + "\n").encode())
    return summary


SEVERAL = (".comparisons", ".rankings")


def row_of(opinion: Opinion) -> dict[str, Any]:
    """The line of an opinion; an expert's judgement is read as a thumb, whose source says whose it is."""
    return {**opinion.lesson, "kind": "thumb"} if opinion.kind == "expert" else opinion.lesson


def said(opinion: Opinion) -> str:
    """What the summary counts an opinion as."""
    if opinion.kind in ("comparison", "ranking"):
        return f"{opinion.kind}s"
    return "up" if opinion.value > 0 else "down"


def curated(messages: list[dict[str, str]]) -> bytes:
    """A line as the stage curate writes them: what a row is named after is its content."""
    return canonical({"id": sha256(messages)[:16], "source": "feedback", "messages": messages})


def bucket(messages: list[dict[str, str]]) -> int:
    """Which of 100 buckets a prompt falls into: always the same, evenly spread, and independent of other splits' hashes."""
    return int(sha256(["snapshot", messages])[:8], 16) % 100


def digest(folder: Path) -> str:
    """sha256 over the names and bytes of a snapshot's files."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return sha256([[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in files])


def write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    draft = path.with_name(path.name + ".draft")
    with draft.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
