"""Writes answers and opinions of past days, for what is counted by day."""

from __future__ import annotations

import itertools
import random
from datetime import UTC, datetime, time, timedelta
from typing import Any

import sqlalchemy as sa

from feedback import batches, completions, opinions, promotions
from feedback.completions import Completion
from feedback.opinions import Vote
from feedback.store import Store
from feedback.tables import BatchRow, EventRow, FeedbackRow, PromotionRow, table_of
from feedback.trust_options import TrustOptions

feedback, event_log = table_of(FeedbackRow), table_of(EventRow)
numbers = itertools.count()


def days_ago(days: int, hours: float = 12.0) -> datetime:
    """A moment so many days before today, so many hours after its midnight UTC."""
    return datetime.combine(datetime.now(UTC).date() - timedelta(days=days), time(), UTC) + timedelta(hours=hours)


def answered(connection: sa.Connection, at: datetime, model: str = "a" * 64, **more: Any) -> str:
    """An answer that was given then; returns its id."""
    prompt, response = more.pop("prompt", "How are you?"), more.pop("response", "Fine.")
    values: dict[str, Any] = {
        "id": f"chatcmpl-weeks-{next(numbers)}",
        "subject": "asker",
        "request_sha256": "0" * 64,
        "request_messages": [{"role": "user", "content": prompt}],
        "sampling": {},
        "model_hash": model,
        "prompt_token_ids": [],
        "response": response,
        "status": "complete",
        "created_at": at,
        **more,
    }
    completions.insert(connection, Completion(**values))
    return str(values["id"])


def said(connection: sa.Connection, at: datetime, completion_id: str, subject: str, **vote: Any) -> int:
    """An opinion of then; returns its number."""
    id = opinions.vote(connection, Vote(completion_id, subject, **vote))[0].feedback_id
    for table, column in ((feedback, feedback.c.id), (event_log, event_log.c.feedback_id)):
        connection.execute(sa.update(table).where(column == id).values(created_at=at))
    connection.execute(sa.update(feedback).where(feedback.c.id == id).values(updated_at=at))
    return id


def crowned(connection: sa.Connection, at: datetime, model: str, reason: str, figures: dict[str, Any]) -> None:
    """A promotion of then."""
    reigning = promotions.champion(connection)
    row = promotions.promote(connection, model, "models/x", figures, reason, reigning.model_hash if reigning else None)
    back_to(connection, row.id, at)


def back_to(connection: sa.Connection, promotion_id: int, at: datetime) -> None:
    """Give a promotion or rollback another time."""
    table = table_of(PromotionRow)
    connection.execute(sa.update(table).where(table.c.id == promotion_id).values(created_at=at))


def batched(connection: sa.Connection, at: datetime, run: str | None) -> None:
    """A batch of what waits, closed then, and learned from half an hour later by `run` if given."""
    batch = batches.open_batch(connection, 1, TrustOptions(enabled=False))
    assert batch is not None
    if run:
        batches.consume(connection, batch.id, run, "5" * 64)
    table = table_of(BatchRow)
    later = at + timedelta(minutes=30) if run else None
    connection.execute(sa.update(table).where(table.c.id == batch.id).values(opened_at=at, consumed_at=later))


TALK = (
    ("Do you like music?", "Yes, mostly jazz. What do you listen to?"),
    ("What did you do today?", "I read a book about the sea and went for a walk."),
    ("Can you recommend a film?", "Try “Spirited Away”: it is beautiful and not only for children."),
    ("你好，今天过得怎么样？", "很好，谢谢！你呢？"),
    ("How do I boil an egg?", "Seven minutes in boiling water, then cold water at once."),
)


def fill(store: Store, days: int = 30, seed: int = 7) -> None:
    """Some weeks of a small team's life: three models, each better than the one before, people and a simulated rater, batches,
    and some opinions that wait for a moderator."""
    rng = random.Random(seed)
    models = [f"{rng.getrandbits(256):064x}" for _ in range(3)]
    raters = [f"{rng.getrandbits(128):032x}" for _ in range(14)]
    with store.write() as connection:
        for back in range(days - 1, -1, -1):
            age = days - 1 - back
            rank = min(2, age * 3 // days)
            if age in (0, days // 3, 2 * days // 3):
                crown(connection, days_ago(back, 7.0), models, rank)
            one_day(connection, rng, back, models[rank], raters, 0.45 + 0.16 * rank)
            if age % 6 == 5:
                batched(
                    connection,
                    days_ago(back, 23.0 if back else 6.95),
                    f"{rng.getrandbits(128):032x}" if back > 5 else None,
                )
        held(connection, raters, models[2])


def crown(connection: sa.Connection, at: datetime, models: list[str], rank: int) -> None:
    """The reign of models[rank] begins."""
    reason = "first champion: somebody has to answer before anybody can say what they think"
    figures: dict[str, Any] = {}
    if rank:
        low = 0.08 + 0.03 * rank
        reason = f"thumbs up gain {low + 0.07:.2f} ({low:.2f} to {low + 0.14:.2f}): above 0"
        figures = {"prompts": 400, "thumbs_up_rate": 0.45 + 0.16 * rank, "win_rate": 0.6, "kl_per_answer": 3.2 + rank}
    crowned(connection, at, models[rank], reason, figures)


def one_day(connection: sa.Connection, rng: random.Random, back: int, model: str, raters: list[str], up: float) -> None:
    """Answers and opinions of one day; several rate the same answer, so that they can agree."""
    weekend = days_ago(back).weekday() >= 5
    for _ in range(rng.randint(8, 14) if weekend else rng.randint(18, 32)):
        at = days_ago(back, rng.uniform(0.1, 6.9 if back == 0 else 23.0))
        prompt, response = rng.choice(TALK)
        took = rng.lognormvariate(6.2, 0.5)
        about: dict[str, Any] = {"prompt": prompt, "response": response, "first_token_ms": took / 9, "total_ms": took}
        if rng.random() < 0.03:
            answered(connection, at, model, prompt=prompt, response="", status="error")
            continue
        id = answered(connection, at, model, **about)
        liked = rng.random() < up
        for rater in rng.sample(raters, rng.choice((0, 1, 1, 2, 3))):
            value = 1 if liked ^ (rng.random() < 0.15) else -1
            said(connection, at, id, rater, value=value, reasons=["helpful"] if value > 0 else ["off_topic"])
            if rng.random() < 0.05:
                said(connection, at, id, rater, retracted=True)
        if rng.random() < 0.25:
            said(connection, at, id, "simulated", value=1 if liked else -1, source="simulated")
        if rng.random() < 0.12:
            other = answered(connection, at, model, **{**about, "response": response + " 🙂"})
            said(connection, at, other, rng.choice(raters), kind="comparison", other=id, value=rng.choice((1, -1)))
        if not liked and rng.random() < 0.3:
            better = "I would rather ask you first: what do you like?"
            said(connection, at, id, rng.choice(raters), kind="edit", value=1, correction=better)


def held(connection: sa.Connection, raters: list[str], model: str) -> None:
    """What waits for a moderator."""
    at = days_ago(0, 0.5)
    for (prompt, response), state, reason, vote in zip(TALK, *zip(*HELD, strict=True), strict=False):
        id = answered(connection, at, model, prompt=prompt, response=response)
        opinion = said(connection, at, id, raters[-1] if "outlier" in reason else raters[0], **vote)
        opinions.moderate(connection, opinion, state, reason)


HELD: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("quarantined", "outlier: 41 of 44 against the others", {"value": -1, "reasons": ["incorrect", "unsafe"]}),
    ("quarantined", "outlier: 41 of 44 against the others", {"value": -1, "comment": "FREE COINS at coins.example"}),
    ("pending", "first written answer of a new rater", {"kind": "edit", "value": 1, "correction": "Try “Totoro”."}),
    ("pending", "comment with an address", {"kind": "comment", "comment": "write to me: someone@mail.example"}),
)
