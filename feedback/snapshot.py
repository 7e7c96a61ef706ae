"""Snapshots: the opinions of a manifest's batches as sorted files, the only thing that training reads of feedback."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from feedback.batches import Opinion
from feedback.opinions import canonical, sha256
from feedback.retelling import Retelling
from feedback.store import Store
from feedback.written import Quarantine, Rules, conversation, curated, pair

SEVERAL = (".comparisons", ".rankings", ".edits")


def write_snapshot(
    store: Store,
    manifest: dict[str, Any],
    folder: Path,
    heldout_percent: int,
    retell: Retelling | None = None,
    rules: Rules = Rules(),
) -> dict[str, Any]:
    """Write the files of a snapshot into `folder`; returns the summary.

    retell: for answers that came from elsewhere and for own answers; without it they are not learned from; rules: what may be
    learned of what people wrote.

    - opinions.train.jsonl, opinions.heldout.jsonl: thumbs, comparisons and rankings as models.opinions reads them; an own
      answer is a comparison, preferred to the model's. The prompt decides the file: `heldout_percent` of all prompts, 0 to
      100, are held out, each that an expert judged, and own answers to prompts that `rules` hold out. Two people who say the
      same of the same answer make two equal lines: the weight of opinion is data.
    - conversations.jsonl: answers that people wrote themselves, after the messages they answer, as curated conversations.
    - prompts.jsonl: what people asked (not simulated ones) and then had an opinion about, as curated prompts.
    - quarantine.jsonl: what people wrote and `rules` refused, with the reason.
    - summary.json: how many of each; tokenised: rows whose token ids were made of text; unreadable: opinions left out.
    Equal opinions give equal bytes, whatever their ids, times and order. Raises ValueError when the manifest does not fit
    the database.
    """
    if not 0 <= heldout_percent <= 100:
        raise ValueError(f"params.yaml: snapshot.heldout_percent must be 0 to 100, not {heldout_percent}")
    opinions = list(store.opinions(manifest, retell) if retell else store.opinions(manifest))
    judged = judged_prompts(opinions)
    files: dict[str, list[bytes]] = {"opinions.train": [], "opinions.heldout": []}
    quarantine, counts = Quarantine(), Counter[str]()
    for opinion in opinions:
        counts[f"source.{opinion.source}"] += 1
        row = row_of(opinion, retell, rules, quarantine)
        if row is None:
            counts["unreadable"] += opinion.kind != "edit"
            continue
        held = held_out(opinion.messages, heldout_percent, judged)
        split = "heldout" if held or (opinion.kind == "edit" and rules.held(opinion.messages)) else "train"
        files[f"opinions.{split}"].append(canonical(row))
        counts.update((split, f"{split}.{said(opinion)}"))
        counts["tokenised"] += row.get("tokenised", False)
    asked = [opinion.messages for opinion in opinions if opinion.source != "simulated"]
    written = {
        "conversations": {curated(messages) for _, messages in own_answers(opinions, rules, quarantine)},
        "prompts": set(map(curated, cleaned("prompt", asked, rules, quarantine))),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in {**files, **written, "quarantine": quarantine.rows}.items():
        write(folder / f"{name}.jsonl", b"".join(line + b"\n" for line in sorted(lines)))
    counts.update({name: len(lines) for name, lines in written.items()}, quarantined=len(quarantine.rows))
    splits = [f"{split}{what}" for split in ("train", "heldout") for what in ("", ".up", ".down", *SEVERAL)]
    keys = (*splits, "conversations", "prompts", "quarantined", "unreadable", "tokenised")
    left_out = {f"unreadable.{reason}": number for reason, number in retell.left_out.items()} if retell else {}
    summary = {"batches": len(manifest["batches"]), **dict.fromkeys(keys, 0), **counts, **left_out}
    write(folder / "summary.json", (json.dumps(summary, sort_keys=True, indent=2) + "\n").encode())
    return summary


def judged_prompts(opinions: Iterable[Opinion]) -> set[str]:
    """The hashes of the prompts that an expert judged."""
    return {sha256(opinion.messages) for opinion in opinions if opinion.kind == "expert"}


def held_out(messages: list[dict[str, str]], heldout_percent: int, judged: set[str]) -> bool:
    """Whether the reward model is measured on this prompt, and must not learn from it."""
    return bucket(messages) < heldout_percent or sha256(messages) in judged


def row_of(opinion: Opinion, retell: Retelling | None, rules: Rules, quarantine: Quarantine) -> dict[str, Any] | None:
    """The line of an opinion, None when its token ids cannot be learned from.

    An expert's judgement is read as a thumb, whose source says whose it is; an own answer as a comparison with the model's.
    """
    if not opinion.trainable:
        return None
    if opinion.kind != "edit":
        return {**opinion.lesson, "kind": "thumb"} if opinion.kind == "expert" else opinion.lesson
    own = next(iter(own_answers([opinion], rules, quarantine)), None)
    if retell is None or own is None:
        return None
    text = own[1][-1]["content"]
    ids = retell.written(opinion.lesson["prompt_ids"], text)
    return pair(opinion.lesson, text, ids) if ids else None


def own_answers(
    opinions: Iterable[Opinion], rules: Rules, quarantine: Quarantine
) -> Iterable[tuple[Opinion, list[dict[str, str]]]]:
    """The edits among the opinions, each with its conversation as it is to be learned."""
    for opinion in opinions:
        if opinion.kind == "edit":
            messages = conversation(opinion.messages, opinion.lesson["correction"])
            for clean in cleaned("answer", [messages], rules, quarantine):
                yield opinion, clean


def cleaned(
    kind: str, conversations: Iterable[list[dict[str, str]]], rules: Rules, quarantine: Quarantine
) -> Iterable[list[dict[str, str]]]:
    """The conversations as they are to be learned; those that must not be go into the quarantine."""
    for messages in conversations:
        try:
            yield rules.clean(messages)
        except ValueError as error:
            quarantine.add(kind, messages, error)


def said(opinion: Opinion) -> str:
    """What the summary counts an opinion as."""
    if opinion.kind in ("comparison", "ranking", "edit"):
        return f"{opinion.kind}s"
    return "up" if opinion.value > 0 else "down"


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
