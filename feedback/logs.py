"""Logs of other systems, read row by row: CSV, jsonl and parquet files of plain rows, of OpenAI's chat logs with thumbs, and of
TRL's dataset formats. A row that cannot be read is a Problem that names line, field and remedy; the others go on."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from feedback.schemas import UNSTORABLE, Message
from feedback.tables import SOURCES

FORMATS = ("auto", "csv", "jsonl", "parquet", "openai", "trl-unpaired", "trl-preference")
CONTAINERS = ("csv", "jsonl", "parquet")
MAX_TEXT = 100_000  # characters, as the API takes them
VALUES = ("value", "thumb", "label", "rating", "feedback")  # the first that a row has says what was thought
UP = {"1", "+1", "true", "up", "like", "liked", "positive", "good", "👍", "thumbs_up"}
DOWN = {"-1", "false", "down", "dislike", "disliked", "negative", "bad", "👎", "thumbs_down"}
NEITHER = {"0", "neutral", "none"}
# what a row may say beside the conversation
EXTRAS = ("comment", "user", "model", "source", "created_at", "locale")
FIELDS = ("prompt", "messages", "response", "completion", "chosen", "rejected", "request", *VALUES, *EXTRAS)
CONVERSATION: TypeAdapter[list[Message]] = TypeAdapter(list[Message])


class Problem(ValueError):
    """A row cannot be taken: which field, why, and what to do."""

    def __init__(self, field: str, problem: str, remedy: str) -> None:
        super().__init__(f"{field}: {problem}; {remedy}")
        self.field, self.problem, self.remedy = field, problem, remedy


@dataclass(frozen=True)
class Row:
    """One row of a file: its line (CSV, jsonl) or number (parquet), from 1; `values`, or why it could not even be parsed."""

    line: int
    values: dict[str, Any]
    problem: Problem | None = None
    done: int = 0  # of the file's `size`: how far the reading is


@dataclass(frozen=True)
class Opinion:
    """What one row says. A thumb: `response` and `value`; a preference: `response` was chosen over `rejected`."""

    messages: list[dict[str, str]]
    response: str
    value: int
    rejected: str | None = None
    comment: str = ""
    user: str = ""
    model: str = ""
    source: str = ""
    locale: str = ""
    created_at: datetime | None = None
    unread: frozenset[str] = field(default_factory=frozenset)


# ---------------------------------------------------------------- files


def container(path: Path, format: str) -> str:
    """The kind of file: as `format` says, else by its first bytes and its name. Raises ValueError when neither tells."""
    if format in CONTAINERS:
        return format
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"PAR1":
        return "parquet"
    suffix = path.suffix.lower()
    if suffix == ".csv":
        return "csv"
    if suffix in (".jsonl", ".ndjson", ".json") or start.lstrip(b"\xef\xbb\xbf")[:1] == b"{":
        return "jsonl"
    raise ValueError(f"{path}: cannot tell whether it is CSV, jsonl or parquet: name it so, or give --format")


def size(path: Path, kind: str) -> int:
    """What Row.done runs up to: bytes, of parquet rows."""
    if kind != "parquet":
        return path.stat().st_size
    import pyarrow.parquet

    return int(pyarrow.parquet.read_metadata(path).num_rows)


def rows(path: Path, kind: str) -> Iterator[Row]:
    """The rows of a file. Raises OSError, and ValueError for a file that is not of its kind at all."""
    if kind == "csv":
        return csv_rows(path)
    return jsonl_rows(path) if kind == "jsonl" else parquet_rows(path)


def csv_rows(path: Path) -> Iterator[Row]:
    """Rows of a CSV file with a header. Bytes that are no UTF-8 spoil their own row alone."""
    csv.field_size_limit(16 * 1024 * 1024)
    with path.open("rb") as raw:
        done = 0

        def text() -> Iterator[str]:
            nonlocal done
            for line in raw:
                done += len(line)
                yield line.decode("utf-8-sig" if done == len(line) else "utf-8", "surrogateescape")

        reader = csv.reader(text())
        try:
            names = next(reader, [])
            if not names or len(set(names)) < len(names):
                raise ValueError(f"{path}: the first line must name each column once")
            before = reader.line_num
            for cells in reader:
                line, before = before + 1, reader.line_num
                if not cells:
                    continue
                problem = None
                if len(cells) != len(names):
                    why = f"{len(cells)} cells, the header names {len(names)}"
                    problem = Problem("row", why, "quote cells that hold commas or line ends")
                present = {name: cell for name, cell in zip(names, cells, strict=False) if cell != ""}
                yield Row(line, present, problem, done)
        except csv.Error as error:
            raise ValueError(f"{path}:{reader.line_num}: {error}: not a CSV file") from error


def jsonl_rows(path: Path) -> Iterator[Row]:
    """Rows of a file with one JSON object a line."""

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON")

    with path.open("rb") as file:
        done = 0
        for number, line in enumerate(file, 1):
            done += len(line)
            text = line.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape").strip()
            if not text:
                continue
            problem, values = None, {}
            try:
                values = json.loads(text, parse_constant=refuse)
                if not isinstance(values, dict):
                    problem, values = Problem("row", "no JSON object", 'write {"prompt": …} a line'), {}
            except (ValueError, RecursionError) as error:
                problem = Problem("row", f"not JSON ({error})", "write one JSON object a line")
            yield Row(number, values, problem, done)


def parquet_rows(path: Path) -> Iterator[Row]:
    """Rows of a parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=500):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(number, {k: v for k, v in values.items() if v is not None}, None, number)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a parquet file that can be read ({error})") from error


# ---------------------------------------------------------------- rows


def shape(values: Mapping[str, Any], format: str) -> str:
    """How to read a row: as `format` says, else by its fields."""
    if format in ("openai", "trl-unpaired", "trl-preference"):
        return format
    if "chosen" in values and "rejected" in values:
        return "trl-preference"
    if "completion" in values and "label" in values:
        return "trl-unpaired"
    return "openai" if "request" in values or ("messages" in values and "response" not in values) else "plain"


def opinion(row: Row, format: str) -> Opinion:
    """What a row says. Raises Problem."""
    if row.problem is not None:
        raise row.problem
    values = row.values
    read = {"plain": plain, "openai": openai, "trl-unpaired": unpaired, "trl-preference": preference}
    said = read[shape(values, format)](values)
    if not said["messages"] or said["messages"][-1]["role"] == "assistant":
        raise Problem("messages", "an answer must follow a question", "end the prompt with what the user said")
    for name in ("response", "rejected"):
        if name in said:
            text(said[name], name, least=1)
    return Opinion(**said, **extras(values), unread=frozenset(values) - set(FIELDS))


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """{"prompt" or "messages", "response", "value"}."""
    given = values.get("messages", values.get("prompt"))
    return {"messages": conversation(given, "prompt"), "response": values.get("response"), "value": value_of(values)}


def openai(values: Mapping[str, Any]) -> dict[str, Any]:
    """{"messages": […, the assistant's], "value"}, or {"request": {…}, "response": a chat completion, "value"}."""
    if "request" in values:
        request, response = nested(values["request"], "request"), nested(values.get("response"), "response")
        try:
            answer = response["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise Problem("response", "no choices[0].message.content", "put the whole chat completion there") from error
        messages = conversation(request.get("messages"), "request.messages")
    else:
        *messages, last = conversation(values.get("messages"), "messages")
        if last["role"] != "assistant":
            raise Problem("messages", "the last message is not the assistant's", "end with the answer that was rated")
        answer = last["content"]
    return {"messages": messages, "response": answer, "value": value_of(values)}


def unpaired(values: Mapping[str, Any]) -> dict[str, Any]:
    """TRL's unpaired preference: {"prompt", "completion", "label"}."""
    messages = conversation(values.get("prompt"), "prompt")
    return {"messages": messages, "response": answer_of(values, "completion"), "value": value_of(values)}


def preference(values: Mapping[str, Any]) -> dict[str, Any]:
    """TRL's preference: {"prompt", "chosen", "rejected"}, or whole conversations that differ in the last message."""
    if "prompt" in values:
        messages = conversation(values["prompt"], "prompt")
        chosen, rejected = answer_of(values, "chosen"), answer_of(values, "rejected")
    else:
        whole = {name: conversation(values.get(name), name) for name in ("chosen", "rejected")}
        (*messages, better), (*others, worse) = whole["chosen"], whole["rejected"]
        if messages != others or better["role"] != "assistant" or worse["role"] != "assistant":
            why = "chosen and rejected are not one prompt with two answers"
            raise Problem("chosen", why, "they must differ in their last message alone, the assistant's")
        chosen, rejected = better["content"], worse["content"]
    if chosen == rejected:
        raise Problem("rejected", "the same text as chosen", "leave the row out: it prefers nothing")
    return {"messages": messages, "response": chosen, "rejected": rejected, "value": 1}


def conversation(given: Any, name: str) -> list[dict[str, str]]:
    """A prompt as messages: a text is what the user said; a list, or its JSON, is the messages. Raises Problem."""
    if isinstance(given, str) and given.lstrip().startswith("[{"):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise Problem(
                name, f"looks like JSON, and is not ({error})", "write a list of messages, or a text"
            ) from error
    if isinstance(given, str):
        return [{"role": "user", "content": text(given, name, least=1)}]
    if not given:
        raise Problem(name, "missing", "write the question, or the messages before the answer")
    if isinstance(given, list):  # parquet tells every message's fields, those that are not there as null
        given = [
            {k: v for k, v in message.items() if v is not None} if isinstance(message, dict) else message
            for message in given
        ]
    try:
        return [message.plain() for message in CONVERSATION.validate_python(given)]
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in (name, *first["loc"]))
        remedy = 'messages are {"role": system, user or assistant, "content": text}'
        raise Problem(where, str(first["msg"]), remedy) from error


def answer_of(values: Mapping[str, Any], name: str) -> Any:
    """An answer: a text, or messages of which there is one, the assistant's. Raises Problem."""
    given = values.get(name)
    if isinstance(given, str) and not given.lstrip().startswith("[{"):
        return given
    messages = conversation(given, name)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise Problem(name, "not one message of the assistant", "put what comes before into prompt")
    return messages[0]["content"]


def value_of(values: Mapping[str, Any]) -> int:
    """What was thought: 1, -1 or 0. Raises Problem."""
    name = next((name for name in VALUES if name in values), None)
    if name is None:
        raise Problem("value", "missing", f"name it {', '.join(VALUES)}: 1 or up, -1 or down, 0 for neither")
    given = values[name]
    if isinstance(given, Mapping):
        return value_of(given)
    word = str(given).strip().lower().removesuffix(".0")
    for words, value in ((UP, 1), (DOWN, -1), (NEITHER, 0)):
        if word in words:
            return value
    raise Problem(name, f"{str(given)[:40]!r} is no thumb", "write 1 or up, -1 or down, 0 for neither")


def extras(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a row says beside the conversation. Raises Problem."""
    inner = [values[name] for name in ("feedback", "request") if isinstance(values.get(name), Mapping)]
    found = {name: next((part[name] for part in (values, *inner) if name in part), "") for name in EXTRAS}
    if found["source"] and found["source"] not in SOURCES:
        raise Problem("source", f"{str(found['source'])[:40]!r} is none", f"write {', '.join(SOURCES)}")
    limits = {"comment": 10_000, "user": 255, "model": 255, "source": 16, "locale": 16}
    texts = {name: text(str(found[name]), name, most=most) for name, most in limits.items()}
    return {**texts, "created_at": moment(found["created_at"])}


def moment(given: Any) -> datetime | None:
    """ISO 8601 or seconds since 1970; without a zone it is UTC. Raises Problem."""
    if given == "":
        return None
    try:
        if isinstance(given, datetime):
            found = given
        elif isinstance(given, int | float) or str(given).replace(".", "", 1).isdecimal():
            found = datetime.fromtimestamp(float(given), UTC)
        else:
            found = datetime.fromisoformat(str(given))
    except (ValueError, OverflowError, OSError) as error:
        remedy = "write 2026-11-24T12:00:00Z, or seconds since 1970"
        raise Problem("created_at", f"{str(given)[:40]!r} is no time", remedy) from error
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def text(given: Any, name: str, least: int = 0, most: int = MAX_TEXT) -> str:
    """A text that can be kept. Raises Problem."""
    if not isinstance(given, str):
        raise Problem(name, "missing" if given is None else f"no text but {type(given).__name__}", "write a text")
    if not least <= len(given) <= most:
        raise Problem(name, "empty" if not given else f"{len(given)} characters", f"write {least} to {most} characters")
    if UNSTORABLE.search(given):
        raise Problem(name, "bytes that are no UTF-8, or NUL", "save the file as UTF-8, and remove NUL characters")
    return given


def nested(given: Any, name: str) -> Mapping[str, Any]:
    """An object, or the JSON of one. Raises Problem."""
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            given = None
    if not isinstance(given, Mapping):
        raise Problem(name, "no JSON object", "put the request, or the chat completion, there as it was logged")
    return given
