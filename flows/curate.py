"""Stage curate: data/ as people left it → rows that are clean, unique and split, and a quarantine for what is unreadable.

Every line is read as bytes and judged alone, so that one bad line costs one row and is named by file and line. The split
is a fixed hash of the row's group: a row keeps its side whatever else is added to data/.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows import conversations, readers
from flows.readers import Unreadable
from models.job import Job

Row = dict[str, Any]
Messages = list[dict[str, str]]
KINDS = ("pretrain", "sft", "prompts")
# the files of each kind by the side of the split; a side that a kind lacks is dropped (tune: seen by nobody but prompts)
FILES = {
    "pretrain": {"train": "pretrain.train", "heldout": "pretrain.heldout"},
    "sft": {"train": "sft.train", "heldout": "sft.heldout"},
    "prompts": {"train": "prompts.train", "tune": "prompts.tune", "heldout": "prompts.report"},
}
FIELD = {"pretrain": "text", "sft": "messages", "prompts": "prompt"}
SHAPE = {
    "pretrain": '{"text": "…"}',
    "sft": '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}',
    "prompts": '{"prompt": "…"}',
}
# controls, and the invisible marks that do not shape text: byte order mark, zero-width space, soft hyphen, word joiner,
# marks and embeddings of direction, line and paragraph separators (written as line ends below)
_INVISIBLE = re.compile("[\x01-\x08\x0b-\x1f\x7f-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]")
_LINE_ENDS = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_BLANKS = re.compile(r"[^\S\n]+")
_EMPTY_LINES = re.compile(r"\n{3,}")
_NOT_WORD = re.compile(r"[\W_]+")
# the same for ASCII, several times as fast
_NOT_WORD_ASCII = {n: None for n in range(128) if not chr(n).isalnum()}
_ENCODER = json.JSONEncoder(ensure_ascii=False, sort_keys=True)  # made once: making it costs more than a row


@dataclass(frozen=True)
class CurateOptions:
    """Section `curate` of params.yaml.

    max_chars_text: a longer pretraining text is cut into pieces at line ends; max_chars_message: a conversation or prompt
    with a longer message is left out and counted; heldout_percent, tune_percent: shares of the groups that nobody
    trains on (heldout: figures in reports; tune: prompts to choose settings with).
    """

    max_chars_text: int = 20_000
    max_chars_message: int = 4_000
    heldout_percent: int = 10
    tune_percent: int = 5

    def __post_init__(self) -> None:
        for key in ("max_chars_text", "max_chars_message"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}: it must be at least 1")
        if min(self.heldout_percent, self.tune_percent) < 0 or self.heldout_percent + self.tune_percent >= 100:
            raise ValueError("heldout_percent and tune_percent must be at least 0 and leave something to train on")


def normalise(text: str) -> str:
    """NFC, one kind of line end, no invisible characters, single spaces, no blank at either end of a line.

    Raises Unreadable for text that holds NUL, a lone surrogate or the replacement character: signs of a wrong encoding.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
        if "\ufffd" in text:
            raise Unreadable("holds the replacement character U+FFFD", "save the text again as UTF-8 from its source")
        if any("\ud800" <= ch <= "\udfff" for ch in text):
            raise Unreadable("holds half of a surrogate pair", "save the text again as UTF-8 from its source")
    if text.isprintable():  # most messages: one line without controls
        return " ".join(text.split())
    if "\0" in text:
        raise Unreadable("holds a NUL character", "remove it, or save the file as UTF-8 and not UTF-16")
    text = _INVISIBLE.sub("", _LINE_ENDS.sub("\n", text))
    lines = (_BLANKS.sub(" ", line).strip() for line in text.split("\n"))
    return _EMPTY_LINES.sub("\n\n", "\n".join(lines)).strip("\n")


def key(text: str) -> bytes:
    """What two texts share that differ only in case, white space and punctuation (8 bytes of a hash).

    A text of punctuation alone is compared by its characters.
    """
    folded = text.casefold()
    word = folded.translate(_NOT_WORD_ASCII) if folded.isascii() else _NOT_WORD.sub("", folded)
    return hashlib.sha256((word or "".join(folded.split())).encode()).digest()[:8]


def bucket(group: str) -> int:
    """The hundredth, 0 to 99, that a group falls into, for ever."""
    return int(hashlib.sha256(group.encode()).hexdigest()[:8], 16) % 100


def identity(content: str) -> str:
    """The id of a row: 16 hexadecimal digits of the sha256 of its normalised content."""
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def dump(value: Any) -> str:
    """JSON with sorted keys, readable in any script, the same bytes for the same value."""
    return _ENCODER.encode(value)


def pieces(text: str, limit: int) -> Iterator[str]:
    """`text` in pieces of at most `limit` characters, cut at a line end, else at a space, else anywhere."""
    while len(text) > limit:
        cut = max(text.rfind("\n", 1, limit + 1), 0) or max(text.rfind(" ", 1, limit + 1), 0) or limit
        yield text[:cut].rstrip()
        text = text[cut:].lstrip()
    if text:
        yield text


def parse(raw: bytes, kind: str) -> Row:
    """One line of data/<kind>/*.jsonl as an object. Raises Unreadable for wrong encoding and bad JSON."""
    line = readers.utf8(raw, "line")
    if not line.strip():
        raise Unreadable("empty line", "remove the line")
    try:
        row = json.loads(line)
    except ValueError as error:
        raise Unreadable(f"bad JSON ({error})", f"write one object a line, such as {SHAPE[kind]}") from None
    except RecursionError:
        raise Unreadable("bad JSON (nested too deeply)", f"write one object a line, such as {SHAPE[kind]}") from None
    if not isinstance(row, dict):
        raise Unreadable(f"not an object but a {type(row).__name__}", f"write {SHAPE[kind]}")
    return row


def understood(row: Row, kind: str) -> Iterator[Row]:
    """The rows that a record gives, in the format of their kind. Raises Unreadable for missing fields and wrong types."""
    for name in ("source", "group"):
        if not isinstance(row.get(name, ""), str):
            raise Unreadable(f'field "{name}" is not text', "write it in quotes, or leave it out")
    for found in (
        [row] if FIELD[kind] in row and not isinstance(row[FIELD[kind]], dict) else conversations.rows(row, kind)
    ):
        if FIELD[kind] not in found:
            raise Unreadable(f'field "{FIELD[kind]}" is missing', f"write {SHAPE[kind]}")
        yield found


def text_of(value: Any, what: str) -> str:
    """A field's text, normalised. Raises Unreadable where it is no text or empty."""
    if not isinstance(value, str):
        raise Unreadable(f"{what} is not text but {type(value).__name__}", "write it as text in quotes")
    text = normalise(value)
    if not text:
        raise Unreadable(f"{what} is empty", "fill it in, or remove the line")
    return text


def messages_of(value: Any, last: str) -> Messages:
    """The messages of a conversation, normalised: an optional system message, then user and assistant in turn, the last
    one by `last`. Raises Unreadable where they are not so.
    """
    if not isinstance(value, list) or not value:
        raise Unreadable('"messages" is not a list with messages', f"write {SHAPE['sft']}")
    messages: Messages = []
    for n, message in enumerate(value, 1):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise Unreadable(f'message {n} lacks "role" or "content"', f"write {SHAPE['sft']}")
        role = message["role"]
        if role not in ("system", "user", "assistant"):
            raise Unreadable(f"message {n} has the role {role!r}", "use system, user or assistant")
        messages.append({"role": role, "content": text_of(message["content"], f"message {n}")})
    turns = [m["role"] for m in messages[messages[0]["role"] == "system" :]]
    if turns and turns[0] == "assistant":
        raise Unreadable("an assistant turn comes first", "put the user's message before it, or remove the turn")
    for n, role in enumerate(turns):
        if role != ("user", "assistant")[n % 2]:
            raise Unreadable(f"roles do not alternate (two {role} turns in a row or a late system turn)", "join them")
    if not turns or turns[-1] != last:
        raise Unreadable(f"the last message is not by the {last}", f"end with a message whose role is {last}")
    return messages


def contents(row: Row, kind: str, options: CurateOptions) -> Iterator[str | Messages]:
    """What one readable row gives: the pieces of a text, or a conversation (none where a message is too long)."""
    if kind == "pretrain":
        yield from pieces(text_of(row["text"], '"text"'), options.max_chars_text)
        return
    if kind == "prompts" and not isinstance(row["prompt"], list):
        messages = [{"role": "user", "content": text_of(row["prompt"], '"prompt"')}]
    else:
        messages = messages_of(row[FIELD[kind]], "assistant" if kind == "sft" else "user")
    if all(len(m["content"]) <= options.max_chars_message for m in messages):
        yield messages


def records_of(folder: Path, shown: str, kind: str, home: Path) -> Iterator[tuple[str, int, Any]]:
    """(file, line, record as flows.readers gives it) of all files in a folder of one kind, files by name; line 0 speaks of
    a file as a whole.

    shown: what the user calls the folder; home: links that lead out of it are refused.
    """
    entries = sorted(folder.iterdir(), key=lambda path: path.name) if folder.is_dir() else []
    entries = [path for path in entries if not path.name.startswith(".")]
    if not entries:
        yield shown, 0, Unreadable("no file in this folder", f"put files there with lines such as {SHAPE[kind]}")
    for path in entries:
        name, source = f"{shown}/{path.name}", readers.source_of(path)
        if path.is_symlink() and not path.resolve().is_relative_to(home.resolve()):
            yield name, 0, Unreadable("a link that leads out of the workspace", "put the file itself here")
        elif source is None:
            known = ", ".join(readers.SUFFIXES)
            remedy = f"move it away, or write lines such as {SHAPE[kind]}"
            yield name, 0, Unreadable(f"not a file that is read ({known}, or these compressed)", remedy)
        elif path.is_file() and path.stat().st_size == 0:
            yield name, 0, Unreadable("empty file", "fill it, or remove it")
        else:
            for number, record in source.records():
                yield name, number, record


class Kind:
    """The rows of one kind, by the side of the split and by id, with counts of what was left out and why."""

    def __init__(self, kind: str, options: CurateOptions) -> None:
        self.kind, self.options = kind, options
        self.sides: dict[str, dict[str, Row]] = {side: {} for side in FILES[kind]}
        self.counts: Counter[str] = Counter()

    def side(self, group: str) -> str:
        """heldout, tune or train."""
        n = bucket(group)
        if n < self.options.heldout_percent:
            return "heldout"
        return "tune" if n < self.options.heldout_percent + self.options.tune_percent else "train"

    def add(self, row: Row) -> None:
        """Take a readable row in. Raises Unreadable for one whose content is not."""
        self.counts["rows_read"] += 1
        found = list(contents(row, self.kind, self.options))
        self.counts["left_out_too_long"] += not found
        group = row.get("group")
        for content in found:
            text = content if isinstance(content, str) else dump(content)
            group = text if group is None else group  # all pieces of one text stay on one side
            side = self.side(group)
            if side not in self.sides:
                self.counts["left_out_kept_for_tuning"] += 1
                continue
            rows, identifier = self.sides[side], identity(text)
            self.counts["left_out_duplicates"] += identifier in rows
            name = "text" if isinstance(content, str) else "messages"
            rows.setdefault(identifier, {"id": identifier, name: content, "source": row.get("source", "user")})

    def drop_known(self, side: str, known: set[bytes]) -> None:
        """Leave out the rows of `side` that ask or say something known (see `key`)."""
        rows = self.sides[side]
        self.sides[side] = {i: row for i, row in rows.items() if known.isdisjoint(keys_of(row))}
        self.counts[f"left_out_known_{side}"] += len(rows) - len(self.sides[side])


def keys_of(row: Row) -> list[bytes]:
    """The keys by which a row would leak: of its text, or of every message by the user."""
    if "text" in row:
        return [key(row["text"])]
    return [key(m["content"]) for m in row["messages"] if m["role"] == "user"]


def trained_on(kinds: dict[str, Kind]) -> dict[str, set[bytes]]:
    """The keys that training sees: `texts` as wholes, and `prompts`, which are user messages and single lines of texts."""
    texts: set[bytes] = set()
    prompts: set[bytes] = set()
    for row in kinds["pretrain"].sides["train"].values():
        texts.add(key(row["text"]))
        prompts.update(key(line) for line in row["text"].split("\n"))
    for kind in ("sft", "prompts"):
        for row in kinds[kind].sides["train"].values():
            prompts.update(keys_of(row))
    return {"texts": texts, "prompts": prompts}


def remove_leaks(kinds: dict[str, Kind]) -> None:
    """Leave out of the held-out and tuning files what training sees, and of the report's prompts what tuning sees."""
    known = trained_on(kinds)
    kinds["pretrain"].drop_known("heldout", known["texts"])
    kinds["sft"].drop_known("heldout", known["prompts"])
    kinds["prompts"].drop_known("tune", known["prompts"])
    tuned = {k for row in kinds["prompts"].sides["tune"].values() for k in keys_of(row)}
    kinds["prompts"].drop_known("heldout", known["prompts"] | tuned)


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as JSON lines."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(dump(row) + "\n" for row in rows)


def beginning(record: Any) -> str:
    """The first characters of a record, to know it by."""
    if isinstance(record, Unreadable):
        return ""
    return record.decode("utf-8", "backslashreplace")[:200] if isinstance(record, bytes) else repr(record)[:200]


def run(job: Job) -> dict[str, Any]:
    """Read data/, write artifacts/curate/. Returns the number of rows of each file and how many were quarantined."""
    started = time.monotonic()
    options = job.options("curate", CurateOptions)
    shown = next(dep for dep in job.deps if not dep.endswith(".py"))  # data, or where data.folder points
    folder = job.input(shown)
    kinds = {kind: Kind(kind, options) for kind in KINDS}
    quarantine: list[Row] = []
    for step, (kind, rows) in enumerate(kinds.items(), 1):
        for file, line, record in records_of(folder / kind, f"{shown}/{kind}", kind, job.root):
            try:
                if isinstance(record, Unreadable):
                    raise record
                for row in understood(parse(record, kind) if isinstance(record, bytes) else record, kind):
                    rows.add(row)
            except Unreadable as error:
                begins = beginning(record)
                where = {"file": file, "line": line, "text": begins}
                quarantine.append({**where, "reason": error.reason, "remedy": error.remedy})
        job.log(step, len(kinds), {f"{kind}_rows": rows.counts["rows_read"], "quarantined": len(quarantine)})
    remove_leaks(kinds)
    written = {}
    for kind, rows in kinds.items():
        for side, name in FILES[kind].items():
            write_rows(job.output / f"{name}.jsonl", (rows.sides[side][i] for i in sorted(rows.sides[side])))
            written[name] = len(rows.sides[side])
    write_rows(job.output / "quarantine.jsonl", quarantine)
    summary = {
        "files": written,
        "quarantined": len(quarantine),
        "steps": {kind: dict(rows.counts) for kind, rows in kinds.items()},
    }
    (job.output / "summary.json").write_text(json.dumps(summary, indent=1, sort_keys=True) + "\n", "utf-8")
    seconds = round(time.monotonic() - started, 2)
    return {**written, "quarantined": len(quarantine), "seconds": seconds}
