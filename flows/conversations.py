"""The conversation formats that people have → the rows that curate reads: `text`, `messages` or `prompt`.

ShareGPT, Alpaca, prompt and answer, TRL's preference and unpaired preference, OpenAssistant's trees. A row that has the field
of its kind already is taken as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from flows.readers import Unreadable

Row = dict[str, Any]
SENDERS = {
    "human": "user", "user": "user", "prompter": "user",
    "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant", "system": "system",
}  # fmt: skip
ANSWERS = ("completion", "response", "output", "answer")
QUESTIONS = ("prompt", "instruction", "question", "query")
KEPT = ("source", "group")


def rows(row: Row, kind: str) -> Iterator[Row]:
    """The rows of `kind` (pretrain, sft, prompts) that a record gives: one; of a tree one for each of its paths; none of
    an answer that was marked as bad. Raises Unreadable where a format is recognised and broken."""
    extra = {name: row[name] for name in KEPT if name in row}
    if kind == "pretrain":
        yield row if "text" in row or "content" not in row else {"text": row["content"], **extra}
    elif kind == "sft":
        for messages in conversations(row):
            yield {"messages": messages, **extra}
    else:
        for prompt in prompts(row):
            yield {"prompt": prompt, **extra}


def conversations(row: Row) -> Iterator[Any]:
    """Messages that end with the assistant's."""
    if "messages" in row:
        yield row["messages"]
    elif "conversations" in row:
        yield share_gpt(row["conversations"])
    elif isinstance(row.get("prompt"), Mapping) and "replies" in row["prompt"]:
        yield from paths(row["prompt"], [])
    elif "chosen" in row:
        yield whole(row.get("prompt"), row["chosen"], "chosen")
    elif "label" in row and "completion" in row:
        if row["label"]:
            yield whole(row.get("prompt"), row["completion"], "completion")
    elif (answer := first(row, ANSWERS)) and (question := first(row, QUESTIONS)):
        yield whole(asked(row, question), row[answer], answer)
    else:
        raise Unreadable(
            'field "messages" is missing',
            'write {"messages": […]}, ShareGPT\'s "conversations", or "prompt" and "completion"',
        )


def prompts(row: Row) -> Iterator[Any]:
    """What a user says: text, or messages that end with the user's."""
    if "prompt" in row and not isinstance(row["prompt"], Mapping):
        yield row["prompt"]
    elif question := first(row, QUESTIONS[1:]):
        yield asked(row, question)
    elif {"messages", "conversations", "prompt", "chosen"} & row.keys():
        for messages in conversations(row):
            yield messages[:-1] if isinstance(messages, list) and messages[-1:] and ends(messages) else messages
    else:
        raise Unreadable('field "prompt" is missing', 'write {"prompt": "…"}')


def ends(messages: list[Any]) -> bool:
    """Whether the assistant has the last word."""
    return isinstance(messages[-1], Mapping) and messages[-1].get("role") == "assistant"


def first(row: Row, names: tuple[str, ...]) -> str:
    """The first of the names that the row has; empty for none."""
    return next((name for name in names if name in row), "")


def asked(row: Row, question: str) -> Any:
    """Alpaca's instruction with its input, or the question as it is."""
    given = row.get("input")
    if question == "instruction" and isinstance(row[question], str) and isinstance(given, str) and given.strip():
        return f"{row[question]}\n\n{given}"
    return row[question]


def whole(prompt: Any, answer: Any, name: str) -> list[Any]:
    """Prompt and answer, each a text or messages, as one conversation; without a prompt the answer is a whole one."""
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
    after = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    if not isinstance(before, list) or not isinstance(after, list):
        raise Unreadable(f'"prompt" or "{name}" is neither text nor messages', "write a text or a list of messages")
    return [*before, *after]


def share_gpt(turns: Any) -> list[Row]:
    """ShareGPT's {"from", "value"} as messages."""
    if not isinstance(turns, list):
        raise Unreadable('"conversations" is not a list', 'write [{"from": "human", "value": "…"}, …]')
    messages = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, Mapping) or not {"from", "value"} <= turn.keys():
            raise Unreadable(f'turn {number} lacks "from" or "value"', 'write {"from": "human", "value": "…"}')
        if (role := SENDERS.get(str(turn["from"]).lower())) is None:
            raise Unreadable(f"turn {number} is from {turn['from']!r}", "use human, gpt or system")
        messages.append({"role": role, "content": turn["value"]})
    return messages


def paths(message: Any, before: list[Row]) -> Iterator[list[Row]]:
    """The conversations of an OpenAssistant tree: at each fork of answers the best-ranked one, of questions every one;
    each ends with an answer. Deleted messages and what follows them are left out."""
    if not isinstance(message, Mapping) or not isinstance(message.get("text"), str):
        raise Unreadable("a message of the tree has no text", "export the tree again")
    if message.get("deleted"):
        return
    if (role := SENDERS.get(str(message.get("role")).lower())) is None:
        raise Unreadable(f"a message of the tree has the role {message.get('role')!r}", "use prompter or assistant")
    said = [*before, {"role": role, "content": message["text"]}]
    replies = [reply for reply in message.get("replies") or [] if isinstance(reply, Mapping)]
    if role == "user" and replies:
        ranked = [reply for reply in replies if reply.get("rank") is not None and not reply.get("deleted")]
        replies = [min(ranked, key=lambda reply: reply["rank"])] if ranked else replies[:1]
    found = False
    for reply in replies:
        for path in paths(reply, said):
            found = True
            yield path
    if role == "assistant" and not found:
        yield said
