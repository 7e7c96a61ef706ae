"""Prompts to label, from what people asked or from a file; answers to them of servers by URL; gold items from a file."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from feedback import completions, labelling
from feedback.completions import Completion
from feedback.engine import Ask, Done, EngineError
from feedback.identity import Identity
from feedback.opinions import canonical, sha256
from feedback.remote import RemoteEngine
from feedback.schemas import Message, Text
from feedback.store import Store
from feedback.tables import CompletionRow, FeedbackRow, TaskAnswerRow, table_of

completion, feedback, answer = (table_of(row) for row in (CompletionRow, FeedbackRow, TaskAnswerRow))


@dataclass(frozen=True)
class Prompt:
    """of: the answer that it was asked for, if people asked it; subject: whose words it is."""

    messages: list[dict[str, str]]
    of: str | None
    subject: str


class Asked(BaseModel):
    """A line of a file of prompts."""

    model_config = ConfigDict(extra="ignore")
    messages: list[Message] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def prompt(cls, row: Any) -> Any:
        """`prompt` (a text, or messages) stands for `messages`."""
        if isinstance(row, dict) and "messages" not in row and "prompt" in row:
            told = row["prompt"]
            return {**row, "messages": [{"role": "user", "content": told}] if isinstance(told, str) else told}
        return row

    @model_validator(mode="after")
    def asks(self) -> Asked:
        """An answer answers somebody."""
        if self.messages[-1].role == "assistant":
            raise ValueError("messages: the last message must not be the assistant's")
        return self

    def plain(self) -> list[dict[str, str]]:
        """As they stand in the tables."""
        return [message.plain() for message in self.messages]


class Gold(Asked):
    """A line of a file of gold items. ranking: numbers of the answers, from 1, in groups of equal ones, best first."""

    answers: list[Text] = Field(min_length=labelling.FEWEST, max_length=labelling.MOST)
    ranking: list[list[int]]

    @model_validator(mode="after")
    def ordered(self) -> Gold:
        """Different answers, each with a place."""
        if len(set(self.answers)) < len(self.answers) or not all(self.answers):
            raise ValueError("answers: no two of them may be the same, and none empty")
        try:
            labelling.check_order(self.expected(), len(self.answers))
        except ValueError as problem:
            raise ValueError(f"{problem}; they have the numbers 1 to {len(self.answers)}") from problem
        return self

    def expected(self) -> list[list[int]]:
        """The groups with indices."""
        return [[number - 1 for number in group] for group in self.ranking]


def recent(connection: sa.Connection, limit: int) -> list[Prompt]:
    """The newest prompts that people asked, each once; not those of the simulated rater, nor those of tasks."""
    simulated = sa.exists().where(feedback.c.completion_id == completion.c.id, feedback.c.source == "simulated")
    of_a_task = sa.exists().where(answer.c.completion_id == completion.c.id)
    query = (
        sa.select(completion.c.id, completion.c.request_messages, completion.c.subject)
        .where(completion.c.status == "complete", completion.c.origin != "import", ~simulated, ~of_a_task)
        .order_by(completion.c.id.desc())
    )
    found: dict[bytes, Prompt] = {}
    for row in connection.execute(query, execution_options={"yield_per": 500}):
        found.setdefault(canonical(row.request_messages), Prompt(row.request_messages, row.id, row.subject))
        if len(found) == limit:
            break
    return list(found.values())


def read_lines(path: Path, kind: type[Asked]) -> Iterator[Any]:
    """The rows of a jsonl file. Raises ValueError with file, line, field and problem at the first that is none."""
    adapter = TypeAdapter(kind)
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            yield adapter.validate_python(json.loads(line))
        except json.JSONDecodeError as problem:
            raise ValueError(f"{path}:{number}: this is no JSON: {problem}") from problem
        except ValidationError as problem:
            first = problem.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            text = f"{where}: {first['msg']}" if where else first["msg"].removeprefix("Value error, ")
            raise ValueError(f"{path}:{number}: {text}") from problem


def load_gold(store: Store, identity: Identity, path: Path, report: Callable[[int], None]) -> tuple[int, int]:
    """Make a gold task of each line; (made, there already). A line that cannot be read: ValueError, and nothing is made."""
    rows: list[Gold] = list(read_lines(path, Gold))
    made = 0
    subject = identity.subject("import", "", "gold")
    for done, row in enumerate(rows, 1):
        with store.write() as connection:
            made += make_gold(connection, row, subject)
        report(done)
    return made, len(rows) - made


def make_gold(connection: sa.Connection, row: Gold, subject: str) -> bool:
    """A gold task and its answers; whether it is new. The answers' ids tell nothing of where they come from."""
    messages = row.plain()
    name = sha256(["gold file", messages, sorted(row.answers)])
    if labelling.named(connection, name) is not None:
        return False
    ids = []
    for text in row.answers:
        written = answer_of(Prompt(messages, None, subject), completions.new_id(), text, sha256(["gold"]), "import")
        completions.insert(connection, written)
        ids.append(written.id)
    labelling.make(connection, ids, name=name, expected=row.expected())
    return True


def answer_of(prompt: Prompt, id: str, text: str, model_hash: str, origin: str, **more: Any) -> Completion:
    """The row of an answer whose text is all that is known."""
    now = datetime.now(UTC)
    return Completion(
        id=id,
        subject=prompt.subject,
        request_sha256=sha256(["label", prompt.messages]),
        request_messages=prompt.messages,
        sampling=more.pop("sampling", {}),
        model_hash=model_hash,
        prompt_token_ids=[],
        response=text,
        status="complete",
        finish_reason="stop",
        conversation=id,
        turn=sum(message["role"] == "user" for message in prompt.messages),
        parent=prompt.of,
        origin=origin,
        finished_at=now,
        created_at=now,
        **more,
    )


async def ask_engine(
    store: Store, engine: RemoteEngine, prompt: Prompt, number: int, temperature: float, max_tokens: int
) -> list[str]:
    """The ids of up to `number` different answers of a server by URL, written down; asked again, those are found.

    Raises EngineError.
    """
    if engine.model_hash is None:
        await engine.look()
    model_hash = engine.model_hash
    assert model_hash is not None
    ids = [f"label-{sha256([prompt.messages, model_hash, n])[:48]}" for n in range(number)]
    if known := await asyncio.to_thread(there, store, ids):  # all that came was written in one transaction
        return known
    sampling: dict[str, Any] = {"temperature": temperature, "top_p": 1.0, "max_tokens": max_tokens}
    rows: dict[str, Completion] = {}
    for id in ids:
        seed = secrets.randbits(53)
        ask = Ask(id=id, messages=prompt.messages, stream=False, logprobs=False, seed=seed, stop=[], **sampling)
        async for message in engine.answer(ask):
            if isinstance(message, Done) and message.text.strip():
                more = {"sampling": {**sampling, "seed": seed, "stop": []}, "model_alias": engine.model[:64]}
                rows[message.text] = answer_of(prompt, id, message.text, model_hash, "remote", **more)
    if not rows:
        raise EngineError("engine_failed", f"{engine.url} gave no answer that says anything")
    await asyncio.to_thread(insert, store, list(rows.values()))
    return sorted(row.id for row in rows.values())


def there(store: Store, ids: Sequence[str]) -> list[str]:
    """Those of the answers that are written already."""
    with store.read() as connection:
        query = sa.select(completion.c.id).where(completion.c.id.in_(ids), completion.c.status == "complete")
        return list(connection.execute(query.order_by(completion.c.id)).scalars())


def insert(store: Store, rows: Sequence[Completion]) -> None:
    """Write answers."""
    with store.write() as connection:
        for row in rows:
            completions.insert(connection, row)
