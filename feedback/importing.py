"""Import: opinions of other systems' logs become opinions of ours, each once, however often a file is imported.

Nothing is half written: a chunk of rows is one transaction. Every row has a name made of what it says, so that an import that
was killed is begun anew and finds what it had done: the same rows, and not one more.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from feedback import completions, logs, opinions
from feedback.comparisons import compared
from feedback.completions import Completion
from feedback.erasure import erased_before
from feedback.identity import Identity
from feedback.logs import Opinion, Problem, Row
from feedback.opinions import Refused, Vote, sha256
from feedback.store import Store
from feedback.tables import SOURCES, CompletionRow, table_of

CHUNK = 200  # rows of one transaction: the service's own writes wait for less than a second
completion = table_of(CompletionRow)


@dataclass
class Tally:
    """What came of the rows."""

    created: int = 0
    revised: int = 0
    known: int = 0
    rejected: int = 0
    erased: int = 0  # rows of people whose data was erased: left out
    unread: set[str] = field(default_factory=set)  # columns that nobody looked at

    @property
    def rows(self) -> int:
        """All of them."""
        return self.created + self.revised + self.known + self.rejected + self.erased


@dataclass(frozen=True)
class Named:
    """An opinion with the names that it has in the tables."""

    row: Row
    opinion: Opinion
    subject: str
    key: str


class Namer:
    """Names for what rows say: the same for the same file again.

    A row without a user is by somebody unknown: the n-th row about an answer is by the n-th unknown person, so that equal
    rows are the opinions of several people. A row that says again what its user said last has that row's name; one that goes
    back to what was said before comes later and is another event.
    """

    def __init__(self, identity: Identity, source: str) -> None:
        """source: of rows that name none."""
        self.identity, self.source = identity, source
        self.unknown: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()
        self.last: dict[str, tuple[str, str]] = {}  # what was said last of an opinion, and the name of that row

    def name(self, row: Row, opinion: Opinion) -> Named:
        """Give a row its names."""
        said = [opinion.messages, opinion.response, opinion.rejected, opinion.model]
        if opinion.user:
            subject = self.identity.subject("import", opinion.user)
        else:
            about = sha256(said)
            self.unknown[about] += 1
            subject = self.identity.subject("import", "", str(self.unknown[about]))
        content = sha256([*said, opinion.value, opinion.comment, opinion.source, subject])
        whose = opinion.source or self.source
        state = sha256([*said, opinion.value, opinion.comment, whose, opinion.locale])
        answers = sorted([opinion.response, opinion.rejected or ""])
        about = sha256([opinion.messages, answers, opinion.model, subject])
        before, key = self.last.get(about, ("", ""))
        if state != before:
            self.seen[content] += 1
            key = f"import-{sha256([content, self.seen[content]])[:48]}"
            self.last[about] = state, key
        return Named(row, opinion, subject, key)


@dataclass(frozen=True)
class Options:
    """source: of rows that name none; channel: noted on every opinion."""

    format: str = "auto"
    source: str = "human_user"
    channel: str = "import"
    dry_run: bool = False

    def __post_init__(self) -> None:
        if self.format not in logs.FORMATS:
            raise ValueError(f"there is no format {self.format!r}; the formats are {', '.join(logs.FORMATS)}")
        if self.source not in SOURCES:
            raise ValueError(f"there is no source {self.source!r}; the sources are {', '.join(SOURCES)}")
        if not re.fullmatch(r"[a-z0-9_.-]{1,16}", self.channel):
            raise ValueError(f"a channel has 1 to 16 of a-z, 0-9, '_', '.', '-'; {self.channel!r} does not")


def load(
    store: Store,
    identity: Identity,
    path: Path,
    options: Options,
    rejected: Path,
    report: Callable[[int], None] = lambda done: None,
) -> Tally:
    """Import a file; rows that cannot be taken stand in `rejected` as jsonl, with their line, field, problem and remedy.

    dry_run: everything is done and taken back again, so that what it says is what would happen. Rows of people who were
    erased are left out. Raises ValueError and OSError for a file that cannot be read.
    """
    kind = logs.container(path, options.format)
    tally, namer, before = Tally(), Namer(identity, options.source), Before(options)
    draft = rejected.with_name(rejected.name + ".draft")
    try:
        with draft.open("w", encoding="utf-8", errors="backslashreplace") as refused:

            def refuse(row: Row, problem: Problem) -> None:
                tally.rejected += 1
                entry = {"file": str(path), "line": row.line, **vars(problem), "row": row.values}
                refused.write(json.dumps(entry, ensure_ascii=False, default=str) + "\n")

            named = readable(logs.rows(path, kind), namer, options, refuse, tally)
            while chunk := list(islice(named, CHUNK)):
                write(store, chunk, options, refuse, tally, before)
                report(chunk[-1].row.done)
        if tally.rejected:
            draft.replace(rejected)
    finally:
        draft.unlink(missing_ok=True)
    return tally


def readable(
    rows: Iterator[Row], namer: Namer, options: Options, refuse: Callable[[Row, Problem], None], tally: Tally
) -> Iterator[Named]:
    """The rows that say something."""
    for row in rows:
        try:
            opinion = logs.opinion(row, options.format)
        except Problem as problem:
            refuse(row, problem)
            continue
        tally.unread |= opinion.unread
        yield namer.name(row, opinion)


class TakenBack(Exception):
    """A dry run's transaction ends without being committed."""


class Before:
    """In a dry run: what earlier chunks said last of each opinion. Their transactions were taken back, so it is said again,
    uncounted, before what a chunk says of the same."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.last: dict[tuple[str, ...], Named] = {}

    def said_again(self, chunk: list[Named]) -> list[Named]:
        """The rows of earlier chunks that this one, which comes next, revises or repeats."""
        if not self.options.dry_run:
            return []
        keys = [self.natural_key(named) for named in chunk]
        again = [self.last[key] for key in dict.fromkeys(keys) if key in self.last]
        self.last.update(zip(keys, chunk, strict=True))
        return again

    def natural_key(self, named: Named) -> tuple[str, ...]:
        """What two rows share that are states of one opinion."""
        vote = vote_of(named, self.options)
        return vote.completion_id, vote.subject, vote.kind, vote.other


def write(
    store: Store,
    chunk: list[Named],
    options: Options,
    refuse: Callable[[Row, Problem], None],
    tally: Tally,
    before: Before,
) -> None:
    """One transaction."""
    try:
        with store.write() as connection:
            gone = erased_before(connection, {named.subject for named in chunk})
            tally.erased += sum(named.subject in gone for named in chunk)
            chunk = [named for named in chunk if named.subject not in gone]
            again = before.said_again(chunk)
            insert_answers(connection, [*again, *chunk])
            for named in again:
                with contextlib.suppress(Refused):  # it was refused when its own turn was
                    opinions.vote(connection, vote_of(named, options))
            for named in chunk:
                try:
                    _, how = opinions.vote(connection, vote_of(named, options))
                except Refused:  # the answer is here or was just written: it can only have been erased since
                    why = "this answer was erased because a person asked for it"
                    refuse(named.row, Problem("row", why, "erase the row from the log, too"))
                    continue
                tally.known += how == "replayed"
                tally.created += how == "created"
                tally.revised += how == "revised"
            if options.dry_run:
                raise TakenBack
    except TakenBack:
        return


def answer_id(opinion: Opinion, response: str) -> str:
    """The id of an answer: made of what was asked, what was answered and by which model."""
    return f"import-{sha256([opinion.messages, response, opinion.model])[:48]}"


def insert_answers(connection: sa.Connection, chunk: list[Named]) -> None:
    """Write the answers of a chunk that are not there yet."""
    wanted: dict[str, tuple[Named, str]] = {}
    for named in chunk:
        for response in filter(None, (named.opinion.response, named.opinion.rejected)):
            wanted.setdefault(answer_id(named.opinion, response), (named, response))
    there = set(connection.execute(sa.select(completion.c.id).where(completion.c.id.in_(list(wanted)))).scalars())
    for id, (named, response) in wanted.items():
        if id not in there:
            completions.insert(connection, answer_of(id, named, response))


def answer_of(id: str, named: Named, response: str) -> Completion:
    """The row of an answer. It has no token ids: what its model read and said is known as text alone."""
    opinion = named.opinion
    at = opinion.created_at or datetime.now(UTC)
    return Completion(
        id=id,
        subject=named.subject,
        request_sha256=sha256(["import", opinion.messages]),
        request_messages=opinion.messages,
        sampling={},
        model_hash=sha256(["import", opinion.model]),
        model_alias=opinion.model[:64] or "import",
        origin="import",
        prompt_token_ids=[],
        response=response,
        status="complete",
        finish_reason="stop",
        conversation=id,
        turn=sum(message["role"] == "user" for message in opinion.messages),
        locale=opinion.locale,
        created_at=at,
        finished_at=at,
    )


def vote_of(named: Named, options: Options) -> Vote:
    """What a row says, as a vote. Its key makes a repetition harmless, also after its author has changed their mind."""
    opinion = named.opinion
    id = answer_id(opinion, opinion.response)
    what: dict[str, Any] = {"completion_id": id, "value": opinion.value}
    if opinion.rejected is not None:
        what = compared([id, answer_id(opinion, opinion.rejected)], id)
        what["position"] = None  # nobody knows which one was shown first
    return Vote(
        subject=named.subject,
        **what,
        comment=opinion.comment,
        source=opinion.source or options.source,
        channel=options.channel,
        locale=opinion.locale,
        client_time=opinion.created_at,
        idempotency_key=named.key,
        request_sha256=sha256(["import", named.key]),
    )
