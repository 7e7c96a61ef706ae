"""Export: opinions in the dataset formats of TRL, conversational, as jsonl or parquet.

https://huggingface.co/docs/trl/dataset_formats: unpaired preference, preference with an explicit prompt, language modelling.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

import sqlalchemy as sa

from feedback import lessons
from feedback.batches import stands
from feedback.opinions import STATED
from feedback.tables import CompletionRow, EventRow, FeedbackRow, table_of

feedback = table_of(FeedbackRow)
completion = table_of(CompletionRow)
event_log = table_of(EventRow)

# the kinds of opinion that a view is made of; what experts judge is held out, so it is in none
VIEWS = {
    "trl_unpaired": ("thumb",),
    "trl_preference": ("comparison", "ranking", "edit"),
    "sft": ("edit",),
}
ROWS = 1000  # in memory at a time
Message = dict[str, str]


def write(
    connection: sa.Connection, file: IO[bytes], view: str, form: str, sources: Sequence[str], after_seq: int = 0
) -> tuple[int, int]:
    """Write what stands and changed after `after_seq` to `file`; returns the number of rows, and of the log's last event.

    connection: of Store.moment, so that rows and number are of one moment. view: of VIEWS; form: "jsonl" or "parquet";
    sources: whose opinions. Raises KeyError for another view.
    """
    last = connection.execute(sa.select(sa.func.coalesce(sa.func.max(event_log.c.seq), 0))).scalar_one()
    found = records(connection, view, sources, after_seq)
    return (write_parquet if form == "parquet" else write_jsonl)(file, view, found), int(last)


def records(connection: sa.Connection, view: str, sources: Sequence[str], after_seq: int) -> Iterator[dict[str, Any]]:
    """The rows of a view, in the order in which the opinions were first said."""
    names = ("id", "completion_id", "kind", "other", *STATED)
    query = (
        sa.select(*(feedback.c[name] for name in names), *lessons.COLUMNS)
        .select_from(feedback.join(completion))
        .where(stands(), feedback.c.kind.in_(VIEWS[view]), feedback.c.source.in_(sources))
        .where(feedback.c.last_seq > after_seq)
        .order_by(feedback.c.id)
    )
    result = connection.execute(query, execution_options={"yield_per": lessons.CHUNK})
    for rows in result.partitions():
        states = [row._asdict() for row in rows]
        known = lessons.answers(connection, (id for s in states for id in lessons.others(s["kind"], s)))
        for row, state in zip(rows, states, strict=True):
            yield from shaped(view, lessons.lesson(row.kind, state, lessons.answer_of(row), known))


def shaped(view: str, lesson: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows that one opinion makes in a view."""
    prompt = lesson["messages"]
    if view == "trl_unpaired":
        yield {"prompt": prompt, "completion": said(lesson["response"]), "label": lesson["value"] > 0}
    elif view == "sft":
        yield {"messages": [*prompt, *said(lesson["correction"])]}
    else:
        for better, worse in lessons.pairs(lesson):
            yield {"prompt": prompt, "chosen": said(better), "rejected": said(worse)}


def said(text: str) -> list[Message]:
    """An answer as a conversation goes on with it."""
    return [{"role": "assistant", "content": text}]


def write_jsonl(file: IO[bytes], view: str, rows: Iterator[dict[str, Any]]) -> int:
    """One JSON object a line, UTF-8."""
    number = 0
    for row in rows:
        file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        number += 1
    return number


def write_parquet(file: IO[bytes], view: str, rows: Iterator[dict[str, Any]]) -> int:
    """Parquet with the view's schema, whether there are rows or not."""
    import pyarrow as pa  # here: the service starts without it
    import pyarrow.parquet as pq

    messages = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    columns = {
        "trl_unpaired": [("prompt", messages), ("completion", messages), ("label", pa.bool_())],
        "trl_preference": [("prompt", messages), ("chosen", messages), ("rejected", messages)],
        "sft": [("messages", messages)],
    }
    schema, number, group = pa.schema(columns[view]), 0, list[dict[str, Any]]()
    with pq.ParquetWriter(file, schema) as writer:
        for row in rows:
            group.append(row)
            number += 1
            if len(group) == ROWS:
                writer.write_table(pa.Table.from_pylist(group, schema))
                group = []
        writer.write_table(pa.Table.from_pylist(group, schema))
    return number
