"""Real people's preferences, read from files that a user has: PandaLM's test set and OpenAssistant's conversation trees.

PandaLM (WeOpenML/PandaLM, data/testset-v1.json): two models' answers to an instruction, compared by three annotators.
OpenAssistant (LAION-AI/Open-Assistant, *.jsonl of conversation trees): answers to one message, ranked by people.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from models.opinions import Preference, Rated
from models.tokenizer import Tokenizer

PANDALM, OPENASSISTANT = "pandalm_testset_v1.json", "openassistant_en_100_tree.jsonl"
MAX_PROMPT, MAX_ANSWER = 384, 512  # tokens: of a longer prompt the end is read, of a longer answer the beginning


@dataclass(frozen=True)
class Question:
    """One prompt with its answers and what was preferred to what.

    group: what is held out together: PandaLM's prompt, OpenAssistant's tree, whose later prompts quote earlier answers.
    """

    group: str
    messages: list[dict[str, str]]
    answers: list[str] = field(default_factory=list)
    preferences: list[Preference] = field(default_factory=list)

    def prefer(self, winner: str, loser: str) -> None:
        """Note that people preferred one answer to another; between equal texts there is nothing to prefer."""
        for text in (winner, loser):
            if text not in self.answers:
                self.answers.append(text)
        if winner != loser:
            self.preferences.append(Preference(self.answers.index(winner), self.answers.index(loser)))

    def rated(self, tokenizer: Tokenizer) -> Rated:
        """The project's own form of it, in the chat template of the base that the tokenizer belongs to."""
        prompt = tokenizer.encode_chat(self.messages)[-MAX_PROMPT:]
        answers = [[*tokenizer.encode(answer), tokenizer.stop_id][:MAX_ANSWER] for answer in self.answers]
        return Rated(prompt, answers, [0] * len(answers), self.preferences)


def read_pandalm(path: Path) -> list[Question]:
    """What two of three annotators preferred; rows where most see a tie, or where no two agree, are left out.

    Raises FileNotFoundError, and ValueError that names file, row and field.
    """
    questions: dict[str, Question] = {}
    for number, row in enumerate(_json(path, path.read_text(encoding="utf-8"))):
        where = f"{path}: row {number}"
        votes = Counter(str(_field(row, f"annotator{i}", where)) for i in (1, 2, 3))
        if not set(votes) <= {"0", "1", "2"}:
            raise ValueError(f"{where}: annotators say 0, 1 or 2, not {', '.join(sorted(votes))}")
        [(choice, count)] = votes.most_common(1)
        if count < 2 or choice == "0":
            continue
        asked = "\n\n".join(filter(str.strip, (str(_field(row, name, where)) for name in ("instruction", "input"))))
        # some answers are JSON's true and false
        first, second = (str(_field(row, name, where)) for name in ("response1", "response2"))
        question = questions.setdefault(asked, Question(asked, [{"role": "user", "content": asked}]))
        question.prefer(*((first, second) if choice == "1" else (second, first)))
    return [question for question in questions.values() if question.preferences]


def read_openassistant(path: Path) -> list[Question]:
    """The ranks that people gave to answers to one message, as pairs; a lower rank is better.

    Raises FileNotFoundError, and ValueError that names file, row and field.
    """
    questions: list[Question] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        where = f"{path}: row {number}"
        tree = _json(path, line)
        questions += _walk(str(_field(tree, "message_tree_id", where)), _field(tree, "prompt", where), [], where)
    return questions


def _walk(tree: str, node: Any, before: list[dict[str, str]], where: str) -> Iterator[Question]:
    role = {"prompter": "user", "assistant": "assistant"}.get(_field(node, "role", where))
    if role is None:
        raise ValueError(f"{where}: a message's role is {node['role']!r}, not prompter or assistant")
    messages = [*before, {"role": role, "content": str(_field(node, "text", where))}]
    replies = _field(node, "replies", where)
    if role == "user":
        question = Question(tree, messages)
        ranked = [
            (reply["rank"], str(_field(reply, "text", where))) for reply in replies if reply.get("rank") is not None
        ]
        for (rank, text), (other_rank, other) in combinations(ranked, 2):
            if rank != other_rank:
                question.prefer(*((text, other) if rank < other_rank else (other, text)))
        if question.preferences:
            yield question
    for reply in replies:
        yield from _walk(tree, reply, messages, where)


def _json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _field(row: Any, name: str, where: str) -> Any:
    if not isinstance(row, Mapping) or name not in row:
        raise ValueError(f"{where}: {name} is missing")
    return row[name]


def folds(questions: Sequence[Question], count: int, seed: int) -> list[int]:
    """The fold (0..count-1) in which each question is held out: those of one group together, groups dealt at random.

    Raises ValueError when there are fewer groups than folds.
    """
    groups = sorted({question.group for question in questions})
    if len(groups) < count:
        raise ValueError(f"{len(groups)} prompts are too few for {count} folds")
    order = np.random.default_rng(seed).permutation(len(groups))
    fold = {groups[place]: i % count for i, place in enumerate(order)}
    return [fold[question.group] for question in questions]
