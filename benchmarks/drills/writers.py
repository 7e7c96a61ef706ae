"""Writers that never give up, and the ledger of what was acknowledged to them.

Each writer has people of its own, so that the order of what is said by one person of one answer is the order of one writer.
Every write says something new (its comment is unique), so each has to make one event of the log, however often it is sent.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from benchmarks.drills.client import Broken, Client, Response
from benchmarks.drills.services import pick_pair
from feedback.opinions import canonical
from feedback.tables import EventRow, FeedbackRow, table_of

WRITERS = 16
PEOPLE = 8  # of one writer
event_log, feedback = table_of(EventRow), table_of(FeedbackRow)


@dataclass(frozen=True)
class Acknowledged:
    """What a 2xx promised: the event `seq` says `comment` and `value`, of this kind, about this answer."""

    seq: int
    completion_id: str
    kind: str
    value: int
    comment: str


@dataclass
class Ledger:
    """What all writers saw. tries: writes by how many requests each took."""

    acknowledged: list[Acknowledged] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)  # statuses, "broken", and "replayed"
    bad_bodies: list[str] = field(default_factory=list)  # of errors that have not OpenAI's shape
    tries: Counter[int] = field(default_factory=Counter)

    @property
    def done(self) -> int:
        """Writes acknowledged so far."""
        return len(self.acknowledged)


class Writer:
    """One of them: `writes` writes, each repeated until it is acknowledged."""

    def __init__(self, place: int, port: int, answers: list[list[str]], ledger: Ledger, seed: int = 1) -> None:
        self.place, self.client, self.answers, self.ledger = place, Client(port), answers, ledger
        self.luck = random.Random(f"{seed} writer {place}")

    async def run(self, writes: int) -> None:
        """All of them."""
        for number in range(writes):
            await self.write(number)
        self.client.close()

    def make(self, number: int) -> tuple[str, str, dict[str, Any], dict[str, str]]:
        """A write: PUT of a thumb, or with a key POST of any kind of opinion, or a comparison."""
        luck, comment = self.luck, f"writer {self.place} write {number}"
        body: dict[str, Any] = {"user": f"person {self.place}-{luck.randrange(PEOPLE)}", "comment": comment}
        kind, key = luck.random(), {"Idempotency-Key": f"drill-{self.place}-{number}"}
        id = luck.choice(luck.choice(self.answers))
        if kind < 0.5:
            return "PUT", f"/v1/feedback/{id}/thumb", {**body, "value": luck.choice((1, -1))}, {}
        if kind < 0.75:
            said = luck.choice(({"kind": "thumb", "value": 1}, {"kind": "edit", "correction": comment}))
            return "POST", "/v1/feedback", {**body, **said, "completion_id": id}, key
        pair = pick_pair(luck, self.answers)
        return "POST", "/v1/comparisons", {**body, "completion_ids": pair, "chosen": luck.choice(pair)}, key

    async def write(self, number: int) -> None:
        """Send a write until it is acknowledged."""
        what, tried = self.make(number), 0
        while True:
            tried += 1
            try:
                response = await self.client.request(*what)
            except Broken:
                self.ledger.seen["broken"] += 1
            else:
                self.ledger.seen[str(response.status)] += 1
                if response.status in (200, 201):
                    break
                self.check_error(response)
            await asyncio.sleep(0.05 * self.luck.random() + min(0.5, 0.02 * tried))
        if response.headers.get("idempotent-replayed"):
            self.ledger.seen["replayed"] += 1
        said = response.json()
        self.ledger.tries[tried] += 1
        self.ledger.acknowledged.append(
            Acknowledged(said["seq"], said["completion_id"], said["kind"], said["value"], what[2]["comment"])
        )

    def check_error(self, response: Response) -> None:
        """Note an error that is not {"error": {"message", "type", "param", "code"}} with a status that asks to try again."""
        try:
            whole = set(response.json()["error"]) == {"message", "type", "param", "code"}
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole or response.status != 503:
            self.ledger.bad_bodies.append(f"{response.status}: {response.body[:200]!r}")


@dataclass
class Found:
    """What the database has of what was acknowledged.

    lost: acknowledged writes whose event is not there or says something else; doubled: events beyond one a write; behind:
    opinions whose current state is not that of their newest event; torn: opinions without an event or events of no opinion.
    """

    events: int
    opinions: int
    lost: int
    doubled: int
    behind: int
    torn: int


def audit(database_url: str, ledger: Ledger) -> Found:
    """Compare the ledger with the tables, by SQL of the drill's own."""
    engine = sa.create_engine(database_url)
    with engine.connect() as connection:
        events = {row.seq: row for row in connection.execute(sa.select(event_log))}
        rows = {row.id: row for row in connection.execute(sa.select(feedback))}
    engine.dispose()
    newest: dict[int, Any] = {}
    for seq in sorted(events):
        newest[events[seq].feedback_id] = events[seq]
    comments = Counter(event.payload["comment"] for event in events.values())
    return Found(
        events=len(events),
        opinions=len(rows),
        lost=sum(not kept(events.get(one.seq), one) for one in ledger.acknowledged),
        doubled=sum(count - 1 for count in comments.values()),
        behind=sum(id in rows and not same(rows[id], event) for id, event in newest.items()),
        torn=len(set(rows) ^ set(newest)),
    )


def kept(event: Any, one: Acknowledged) -> bool:
    """Whether an event says what was acknowledged under its number."""
    if event is None:
        return False
    said = event.payload
    return bool(
        (said["completion_id"], said["kind"], said["value"], said["comment"])
        == (one.completion_id, one.kind, one.value, one.comment)
    )


def same(row: Any, event: Any) -> bool:
    """Whether an opinion's row is what its newest event says."""
    state = {key: getattr(row, key) for key in event.payload}
    return row.last_seq == event.seq and canonical(state) == canonical(event.payload)
