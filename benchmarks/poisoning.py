"""Poisoned opinions: how much of the reward model's held-out accuracy is kept, with the defences and without.

    python -m benchmarks.poisoning WORKSPACE

WORKSPACE is a checkout in which the flow has made the SFT model (artifacts/sft, artifacts/curate). That model answers
training prompts, the simulated rater's judge says which answers are good, and a crowd rates them: most honestly with some
error, a share by an attack (benchmarks/poisoners.py). Their thumbs go through a real feedback database, trust's review,
batches and a snapshot; reward models learn from it; what they tell of answers to other prompts is held against the judge.
Writes docs/poisoning.md. Exits 1 when at 20 % of flips the defences keep no more than there is without them.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import sqlalchemy as sa
import torch

from benchmarks.poisoned_learners import ANSWERS, Figures, Reader, make_world, stage_accuracy, thumb
from benchmarks.poisoners import KNOWING, NAIVE, OVERLAP, Attack, Judged, Said, crowd, flip, poisoned, trigger
from benchmarks.poisoning_page import document
from benchmarks.speed import machine, revision
from feedback import completions, opinions
from feedback.completions import Completion
from feedback.opinions import Vote, canonical
from feedback.snapshot import write_snapshot
from feedback.store import Store
from feedback.tables import BatchItemRow, FeedbackRow, table_of
from feedback.trust_options import TrustOptions
from flows.files import write_text

CHECKOUT = Path(__file__).resolve().parents[1]
PAGE = CHECKOUT / "docs" / "poisoning.md"
RATERS, SHARES, KNOWING_SHARE = 20, (0.05, 0.1, 0.2, 0.3), 0.2
GOLD = 0.1  # of the prompts: an expert judged their answers
BATCH = 1000  # opinions between two reviews
DEFENCES = TrustOptions(max_share=0.1)
START = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)

feedback, item = table_of(FeedbackRow), table_of(BatchItemRow)


@dataclass(frozen=True)
class Passed:
    """What came of a crowd's opinions: the snapshot's training file, who was quarantined, and which share of the attackers'
    opinions is learned from."""

    lines: bytes
    quarantined: set[str]
    let_through: float


@dataclass(frozen=True)
class Outcome:
    """One seed of one attack at one share: reward models without and with the defences, which share of the attackers'
    opinions got through them, which share of the attackers and how many honest raters were quarantined."""

    without: Figures
    defended: Figures
    let_through: float
    caught: float
    accused: int
    honest: int


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.poisoning", description=__doc__.split("\n")[0])
    parser.add_argument("workspace", type=Path, help="holds artifacts/sft and artifacts/curate")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.process_time()
    reader = Reader(make_world(arguments.workspace))
    attacks = {(name, share): attack for name, attack in NAIVE.items() for share in SHARES}
    attacks |= {(name, KNOWING_SHARE): attack for name, attack in KNOWING.items()}
    attacks["trigger word", 0.0] = trigger  # the same answers, and nobody attacks
    results: dict[tuple[str, float], list[Outcome]] = {key: [] for key in (("nobody", 0.0), *attacks)}
    stage: dict[str, float] = {}

    def write_page(seeds: int) -> None:
        write_text(PAGE, document(results, stage, facts(reader, time.process_time() - started, seeds)))

    with tempfile.TemporaryDirectory() as folder:
        for seed in range(1, arguments.seeds + 1):
            for (name, share), found in results.items():
                found.append(measure(reader, Path(folder), attacks.get((name, share), flip), share, seed))
                print(f"seed {seed}, {name}, {share:.0%}: {found[-1]}", flush=True)
            write_page(seed)
        stage.update(by_the_stage(reader, Path(folder)))
    write_page(arguments.seeds)
    print(PAGE.read_text(encoding="utf-8"))
    flips = results["flips", 0.2]
    return 0 if mean(o.defended.accuracy for o in flips) > mean(o.without.accuracy for o in flips) else 1


def facts(reader: Reader, seconds: float, seeds: int) -> dict[str, Any]:
    """What the page says of the run."""
    world = reader.world
    return {
        "date": datetime.date.today(),
        "revision": revision(),
        "seconds": seconds,
        "processor": machine()["processor"],
        "seeds": seeds,
        "answers": len(world.answers),
        "heldout": len(world.heldout),
        "good": mean(answer.good for answer in world.heldout),
        "raters": RATERS,
        "each": round(len(world.answers) * OVERLAP / RATERS),
        "gold": GOLD,
        "batch": BATCH,
        "defences": DEFENCES,
    }


def measure(reader: Reader, work: Path, attack: Attack, share: float, seed: int, raters: int = RATERS) -> Outcome:
    """One attack by a share of the raters, with one seed."""
    world = reader.world
    answers = world.with_triggers() if attack is trigger else world.answers
    said, attackers = poisoned(answers, crowd(answers, raters, seed), attack, share, seed)
    passed = pass_through(work, answers, said, attackers, DEFENCES)
    honest = {each.rater for each in said} - attackers
    return Outcome(
        without=reader.figures(undefended(answers, said)),
        defended=reader.figures(passed.lines),
        let_through=passed.let_through,
        caught=len(passed.quarantined & attackers) / len(attackers) if attackers else 0.0,
        accused=len(passed.quarantined & honest),
        honest=len(honest),
    )


def by_the_stage(reader: Reader, work: Path, seed: int = 1) -> dict[str, float]:
    """Held-out accuracy of the reward stage, all weights learning: nobody attacks, and flips by 20 %."""
    answers = reader.world.answers
    honest = crowd(answers, RATERS, seed)
    clean, flips = (poisoned(answers, honest, flip, share, seed) for share in (0.0, 0.2))
    runs = {
        "nobody attacks": undefended(answers, clean[0]),
        "without the defences": undefended(answers, flips[0]),
        "with them": pass_through(work, answers, *flips, DEFENCES).lines,
    }
    return {name: stage_accuracy(reader.world, work, lines, seed) for name, lines in runs.items()}


def undefended(answers: Sequence[Judged], said: Sequence[Said]) -> bytes:
    """The thumbs of a snapshot's training file when all that was said is learned from; prompts with gold are held out."""
    rows = [canonical(thumb(answers[each.answer], each.value)) for each in said if not is_gold(each.answer)]
    return b"".join(row + b"\n" for row in sorted(rows))


def is_gold(number: int) -> bool:
    """Whether an expert judged the answer: both answers to every so many prompts."""
    return number // ANSWERS % round(1 / GOLD) == 0


# ---------------------------------------------------------------- through the database


def pass_through(
    work: Path, answers: Sequence[Judged], said: Sequence[Said], attackers: set[str], limits: TrustOptions
) -> Passed:
    """Opinions through a new feedback database, a batch opened after every so many, and its snapshot."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        store = Store(f"sqlite:///{folder}/feedback.db")
        try:
            store.migrate()
            tell_answers(store, answers)
            for start in range(0, len(said), BATCH):
                tell(store, said[start : start + BATCH])
                store.open_batch(1, limits)
            write_snapshot(store, store.manifest(), Path(folder) / "snapshot", 0)
            lines = (Path(folder) / "snapshot" / "opinions.train.jsonl").read_bytes()
            return Passed(lines, *outcome(store, attackers))
        finally:
            store.close()


def tell_answers(store: Store, answers: Sequence[Judged]) -> None:
    """The answers, and what an expert says of those to a share of the prompts."""
    with store.write() as connection:
        for number, answer in enumerate(answers):
            values = Completion(
                id=f"answer-{number}",
                subject="asker",
                request_sha256="0" * 64,
                request_messages=answer.messages,
                sampling={"temperature": 1.0},
                model_hash="a" * 64,
                prompt_token_ids=answer.prompt_ids,
                response=answer.text,
                response_token_ids=answer.ids,
                response_logprobs=[0.0] * len(answer.ids),
                status="complete",
                finish_reason="stop",
            )
            completions.insert(connection, values)
            if is_gold(number):
                vote = Vote(values.id, "expert", kind="expert", value=answer.value, source="human_expert")
                opinions.vote(connection, vote)


def tell(store: Store, said: Sequence[Said]) -> None:
    """Thumbs in one transaction, dated as they were said."""
    with store.write() as connection:
        for each in said:
            vote = Vote(f"answer-{each.answer}", each.rater, value=each.value)
            opinions.create(connection, vote, START + datetime.timedelta(seconds=each.seconds))


def outcome(store: Store, attackers: set[str]) -> tuple[set[str], float]:
    """Who has opinions in quarantine, and which share of the attackers' opinions is learned from."""
    learned = sa.exists().where(item.c.feedback_id == feedback.c.id, item.c.accepted)
    query = sa.select(feedback.c.subject, feedback.c.moderation, learned.label("taken"))
    with store.read() as connection:
        rows = connection.execute(query.where(feedback.c.kind == "thumb")).all()
    quarantined = {row.subject for row in rows if row.moderation == "quarantined"}
    theirs = [row.taken and row.moderation == "accepted" for row in rows if row.subject in attackers]
    return quarantined, sum(theirs) / len(theirs) if theirs else 0.0


if __name__ == "__main__":
    sys.exit(main())
