"""Stage written: answers that people wrote themselves, in the batches of written.manifest.json, become conversations for SFT.

The flow align writes that manifest at its start and retrain leaves it alone, so that what was written since changes the SFT
model once a turn of the whole wheel, and never the tokenizer or the base.
"""

from __future__ import annotations

import json
from typing import Any

from flows.snapshot import SnapshotOptions, opened_store, read_manifest
from flows.tokenize import TokenizeOptions
from models.corpus import Sequences, conversations
from models.job import Job


def run(job: Job) -> dict[str, Any]:
    """The stage body: written.manifest.json + the feedback database → sft.npz, conversations.jsonl, quarantine.jsonl,
    summary.json. A prompt that is held out anywhere (from the reward model, for the judge, from SFT) is left out.

    Raises ValueError when the manifest cannot be read or names a batch that the database does not hold.
    """
    from feedback.snapshot import held_out, judged_prompts, own_answers, write
    from feedback.written import Quarantine, curated
    from flows.screen import rules
    from models.tokenizer import Tokenizer

    tokenize, percent = (
        job.options("tokenize", TokenizeOptions),
        job.options("snapshot", SnapshotOptions).heldout_percent,
    )
    manifest, screen, quarantine = read_manifest(job.input("written.manifest.json")), rules(job), Quarantine()
    with opened_store(job) as store:
        opinions = list(store.opinions(manifest))
    judged = judged_prompts(opinions)
    batches, lines, held = set(), {}, 0
    for opinion, messages in own_answers(opinions, screen, quarantine):
        if held_out(opinion.messages, percent, judged) or screen.held(opinion.messages):
            held += 1
        else:
            lines[curated(messages)] = messages
            batches.add(opinion.batch_id)
    rows = [lines[line] for line in sorted(lines)]
    sequences, too_long = Sequences.none(), 0
    if rows:
        tokenizer = Tokenizer.load(job.input("artifacts/tokenize") / "tokenizer")
        sequences, too_long = conversations(tokenizer, rows, tokenize.max_conversation)
    sequences.save(job.output / "sft.npz")
    for name, found in (("conversations", lines), ("quarantine", quarantine.rows)):
        write(job.output / f"{name}.jsonl", b"".join(line + b"\n" for line in sorted(found)))
    summary: dict[str, Any] = {
        "batches": sorted(batches),
        "conversations": len(sequences),
        "held_out": held,
        "too_long": too_long,
        "quarantined": len(quarantine.rows),
    }
    write(job.output / "summary.json", (json.dumps(summary, sort_keys=True, indent=2) + "\n").encode())
    job.log(1, 1, {"written/conversations": len(sequences), "written/quarantined": len(quarantine.rows)})
    return summary
