"""Lessons: what an opinion teaches, as a row of what training reads. Equal opinions make equal rows: no ids, no times."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import sqlalchemy as sa

from feedback.tables import CompletionRow, table_of

completion = table_of(CompletionRow)
CHUNK = 500  # ids in one statement


@dataclass(frozen=True)
class Answer:
    """An answer as training reads it: token ids as they were sampled; or made of text.

    ours: the answer came from elsewhere, but these are ids of the tokenizer that is learned with; tokenised: made of its text
    (retelling.py says both).
    """

    id: str
    prompt_ids: list[int]
    response_ids: list[int]
    messages: list[dict[str, str]]
    response: str
    model_hash: str
    origin: str = "decoder"
    finish_reason: str | None = None
    ours: bool = False
    tokenised: bool = False


# the columns of an answer under the names of Answer
COLUMNS = (
    completion.c.model_hash,
    completion.c.prompt_token_ids.label("prompt_ids"),
    completion.c.response_token_ids.label("response_ids"),
    completion.c.request_messages.label("messages"),
    completion.c.response,
    completion.c.origin,
    completion.c.finish_reason,
)


def others(kind: str, state: Mapping[str, Any]) -> list[str]:
    """The ids of the answers that an opinion is about, where they are several. state: a row of feedback, or an event's."""
    if kind == "comparison":
        return [state["other"]]
    return [place["completion_id"] for place in state["ranked"]] if kind == "ranking" else []


def answers(connection: sa.Connection, ids: Iterable[str]) -> dict[str, Answer]:
    """The answers with these ids, by id."""
    found, wanted = {}, sorted(set(ids))
    for start in range(0, len(wanted), CHUNK):
        query = sa.select(completion.c.id, *COLUMNS).where(completion.c.id.in_(wanted[start : start + CHUNK]))
        found.update({row.id: Answer(**row._mapping) for row in connection.execute(query)})
    return found


def answer_of(row: sa.Row[Any]) -> Answer:
    """The answer in a row that has COLUMNS and completion_id."""
    names = ("prompt_ids", "response_ids", "messages", "response", "model_hash", "origin", "finish_reason")
    return Answer(id=row.completion_id, **{name: getattr(row, name) for name in names})


def lesson(kind: str, state: Mapping[str, Any], answer: Answer, known: Mapping[str, Answer]) -> dict[str, Any]:
    """The row: {"kind", "prompt_ids", "messages", "source", "model_hash"} and what its kind says.

    - thumb, expert: "response_ids", "response", "value";
    - comparison: "chosen_ids", "chosen", "rejected_ids", "rejected", "rejected_model_hash", "strength";
    - ranking: "answers", a list of {"response_ids", "response", "model_hash", "rank"};
    - edit: "response_ids", "response", "correction".
    state: the opinion, as a mapping of its columns; known: the other answers that it is about.
    """
    row = {"kind": kind, "prompt_ids": answer.prompt_ids, "messages": answer.messages, "source": state["source"]}
    if kind == "comparison":
        pair = [answer, known[state["other"]]]
        better, worse = pair if state["value"] >= 0 else reversed(pair)
        return {
            **row,
            "chosen_ids": better.response_ids,
            "chosen": better.response,
            "model_hash": better.model_hash,
            "rejected_ids": worse.response_ids,
            "rejected": worse.response,
            "rejected_model_hash": worse.model_hash,
            "strength": state["strength"],
        }
    if kind == "ranking":
        places = [{"rank": place["rank"], **said_by(known[place["completion_id"]])} for place in state["ranked"]]
        places.sort(key=lambda place: (place["rank"], place["response"], place["response_ids"], place["model_hash"]))
        return {**row, "answers": places, "model_hash": places[0]["model_hash"]}
    special = {"correction": state["correction"]} if kind == "edit" else {"value": state["value"]}
    return {**row, **said_by(answer), **special}


def said_by(answer: Answer) -> dict[str, Any]:
    """What an answer brings into a row."""
    return {"response_ids": answer.response_ids, "response": answer.response, "model_hash": answer.model_hash}


def pairs(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The (better, worse) texts of a comparison, a ranking (all its pairs but the ties) or an edit; of others, none."""
    if row["kind"] == "comparison":
        found = [(row["chosen"], row["rejected"])]
    elif row["kind"] == "ranking":
        couples = combinations(row["answers"], 2)  # best first
        found = [(a["response"], b["response"]) for a, b in couples if a["rank"] < b["rank"]]
    elif row["kind"] == "edit":
        found = [(row["correction"], row["response"])]
    else:
        found = []
    return [(better, worse) for better, worse in found if better != worse]


def trainable(row: Mapping[str, Any], about: Sequence[Answer]) -> bool:
    """Whether the token ids of a row can be learned from. about: all its answers.

    They cannot when an answer has none that the model reads (a server by URL tells ids of who knows which tokenizer, if any),
    when models of two tokenizers answered, or when two answers that are compared are one.
    """
    same = row["kind"] == "comparison" and row["chosen_ids"] == row["rejected_ids"]
    told = bool(row["prompt_ids"]) and all(
        answer.response_ids and (answer.ours or answer.origin == "decoder") for answer in about
    )
    return told and not same and all(answer.prompt_ids == row["prompt_ids"] for answer in about)
