"""A snapshot's opinions, read for training: lone thumbs, comparisons of two answers and rankings of several."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple


class Preference(NamedTuple):
    """One answer was preferred to another (both by index), how strongly: 1 is as usual, 2 counts for twice the margin."""

    winner: int
    loser: int
    strength: float = 1.0


@dataclass(frozen=True)
class Rated:
    """One prompt with its rated answers: their ids, a value for each (+1, −1; 0: no thumb), and what was preferred to what.

    A thumb is an answer of its own, so that two people's thumbs on one answer weigh twice. Comparisons and rankings point
    to the answers that are there: however many pairs an answer is in, it is one forward pass.
    """

    prompt: list[int]
    answers: list[list[int]]
    values: list[int]
    preferences: list[Preference] = field(default_factory=list)

    def pairs(self) -> list[Preference]:
        """Each answer with a thumb up beats each with a thumb down; and what was compared or ranked."""
        ups, downs = ([i for i, v in enumerate(self.values) if v == value] for value in (1, -1))
        return [Preference(up, down) for up in ups for down in downs] + self.preferences

    def tokens(self) -> int:
        """How many tokens a forward pass over it has: its prompt once, and all answers."""
        return len(self.prompt) + sum(map(len, self.answers))


def read_opinions(path: Path, vocab_size: int | None = None, context: int | None = None) -> list[Rated]:
    """Group a snapshot's thumbs, comparisons and rankings by prompt, in the file's order; rows of other kinds are passed over.

    A line is a JSON object with `kind` and `prompt_ids`, and
    - thumb: `response_ids`, `value` (1 or −1);
    - comparison: `chosen_ids`, `rejected_ids`, and `strength` where it was asked (a number above 0);
    - ranking: `answers`, a list of {`response_ids`, `rank`}: the lowest rank is the best, and equal ranks are a tie, which
      says nothing. A prompt about which nothing was said but ties is left out.
    Raises ValueError that names file, line and field, also for a token that is not below vocab_size, and for a prompt and
    answer of more than `context` tokens.
    """
    groups: dict[tuple[int, ...], Rated] = {}
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                if _add(groups, row):
                    _check_sizes(row, vocab_size, context)
            except ValueError as error:  # json.JSONDecodeError is one
                raise ValueError(f"{path}:{number}: {error}") from error
    return [rated for rated in groups.values() if rated.preferences or any(rated.values)]


def _add(groups: dict[tuple[int, ...], Rated], row: Any) -> bool:
    """Put one row to its prompt; whether it is of a kind to learn from. Raises ValueError that names the field."""
    if not isinstance(row, Mapping):
        raise ValueError("a line must hold a JSON object")
    kind = row.get("kind")
    if kind not in ("thumb", "comparison", "ranking"):
        return False
    prompt = _ids(row, "prompt_ids", kind)
    rated = groups.setdefault(tuple(prompt), Rated(prompt, [], []))
    if kind == "thumb":
        if row.get("value") not in (1, -1):
            raise ValueError(f"a thumb needs value 1 or -1, not {row.get('value')!r}")
        rated.answers.append(_ids(row, "response_ids", kind))
        rated.values.append(int(row["value"]))
    elif kind == "comparison":
        strength = row.get("strength", 1.0)
        if isinstance(strength, bool) or not isinstance(strength, int | float) or not strength > 0:
            raise ValueError(f"a comparison's strength must be a number above 0, not {strength!r}")
        winner, loser = (_place(rated, _ids(row, name, kind)) for name in ("chosen_ids", "rejected_ids"))
        if winner == loser:
            raise ValueError("a comparison needs chosen_ids other than rejected_ids")
        rated.preferences.append(Preference(winner, loser, float(strength)))
    else:
        ranked = [(rank, _place(rated, ids)) for rank, ids in _ranking(row)]
        for (rank, one), (other_rank, other) in combinations(ranked, 2):
            if rank != other_rank and one != other:
                rated.preferences.append(Preference(one, other) if rank < other_rank else Preference(other, one))
    return True


def _check_sizes(row: Mapping[str, Any], vocab_size: int | None, context: int | None) -> None:
    """Raises ValueError for a row that the model cannot read."""
    answers = {name: row[name] for name in ("response_ids", "chosen_ids", "rejected_ids") if name in row}
    answers |= {f"answers[{i}].response_ids": a["response_ids"] for i, a in enumerate(row.get("answers", []))}
    for name, ids in {"prompt_ids": row["prompt_ids"], **answers}.items():
        if vocab_size is not None and max(ids) >= vocab_size:
            raise ValueError(f"{name} holds token {max(ids)}, the model knows {vocab_size}: it is of another tokenizer")
    for name, ids in answers.items():
        if context is not None and len(row["prompt_ids"]) + len(ids) > context:
            raise ValueError(
                f"prompt_ids and {name} are {len(row['prompt_ids']) + len(ids)} tokens, the context is {context}"
            )


def _ranking(row: Mapping[str, Any]) -> Iterator[tuple[float, list[int]]]:
    answers = row.get("answers")
    if not isinstance(answers, list) or len(answers) < 2 or not all(isinstance(a, Mapping) for a in answers):
        raise ValueError("a ranking needs answers, a list of at least two objects with response_ids and rank")
    for i, answer in enumerate(answers):
        rank = answer.get("rank")
        if isinstance(rank, bool) or not isinstance(rank, int | float):
            raise ValueError(f"a ranking needs answers[{i}].rank, a number, not {rank!r}")
        yield rank, _ids(answer, "response_ids", f"ranking's answers[{i}]")


def _place(rated: Rated, ids: list[int]) -> int:
    """The index of an answer with these ids; it is put there, without a thumb, when there is none."""
    if ids not in rated.answers:
        rated.answers.append(ids)
        rated.values.append(0)
    return rated.answers.index(ids)


def _ids(row: Mapping[str, Any], name: str, kind: str) -> list[int]:
    ids = row.get(name)
    if not isinstance(ids, list) or not ids or not all(type(i) is int and i >= 0 for i in ids):
        raise ValueError(f"a {kind} needs {name}, a list of token ids that is not empty")
    return ids
