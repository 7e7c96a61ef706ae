"""Prompts to label: from what people asked, from files, answered by several models; gold from files; `thumbwheel label`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from parrot import ParrotServer

from feedback import labelling
from feedback.identity import Identity
from feedback.opinions import Vote
from feedback.prompts import Asked, Gold, Prompt, load_gold, read_lines, recent
from feedback.store import Store
from flows.labelling import asked

Answer = Callable[..., str]
GOLD = [
    {"prompt": "2 + 2?", "answers": ["4", "5", "four"], "ranking": [[1, 3], [2]]},
    {"messages": [{"role": "user", "content": "你好"}], "answers": ["你好！", "走开"], "ranking": [[1], [2]]},
]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_recent_prompts_are_peoples_own_each_once_the_newest_first(store: Store, answer: Answer) -> None:
    for id, prompt in (("01", "old"), ("02", "twice"), ("03", "simulated"), ("04", "twice"), ("05", "new")):
        answer(prompt, id=f"chatcmpl-{id}")
    answer("unfinished", id="chatcmpl-06", status="streaming")
    tasks = [answer("of a task", text, id=f"chatcmpl-07-{text}") for text in "ab"]
    store.vote(Vote("chatcmpl-03", "robot", value=1, source="simulated"))
    with store.write() as connection:
        labelling.make(connection, tasks)
        found = recent(connection, 10)
        assert [prompt.of for prompt in found] == ["chatcmpl-05", "chatcmpl-04", "chatcmpl-01"]
        assert found[0].messages == [{"role": "user", "content": "new"}] and found[0].subject == "asker"
        assert [prompt.of for prompt in recent(connection, 1)] == ["chatcmpl-05"]


def test_gold_from_a_file_is_made_once(store: Store, tmp_path: Path) -> None:
    path, identity, seen = write(tmp_path / "gold.jsonl", GOLD), Identity(b"a key for the tests"), list[int]()
    assert load_gold(store, identity, path, seen.append) == (2, 0) and seen == [1, 2]
    assert load_gold(store, identity, path, seen.append) == (0, 2)
    with store.write() as connection:
        given = labelling.next_task(connection, "ann", labelling.Handing(gold_rate=1.0))
        assert given is not None and all(id.startswith("chatcmpl-") for id in given.ids())
        made = {len(task.answers): task for task in labelling.tasks(connection, labelling.task.c.gold, 9)}
    assert made[3].expected == [[0, 2], [1]] and made[2].expected == [[0], [1]]
    first = store.completion(made[3].answers[0])
    assert first is not None and (first.response, first.origin) == ("4", "import")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"gold\.jsonl:2: this is no JSON"),
        ({"answers": ["a", "b"], "ranking": [[1], [2]]}, "messages: Field required"),
        ({**GOLD[0], "answers": ["4"]}, "answers: .*at least 2"),
        ({**GOLD[0], "answers": ["4", "4", "5"]}, "no two of them may be the same"),
        ({**GOLD[0], "ranking": [[0], [1, 2]]}, "the numbers 1 to 3"),
        ({**GOLD[0], "ranking": [[1, 2, 3]]}, "all answers are equal"),
        ({**GOLD[0], "prompt": [{"role": "assistant", "content": "x"}]}, "must not be the assistant's"),
    ],
)
def test_a_file_with_a_wrong_line_makes_nothing(store: Store, tmp_path: Path, row: Any, message: str) -> None:
    path = write(tmp_path / "gold.jsonl", [GOLD[0]])
    with path.open("a", encoding="utf-8") as file:
        file.write(row if isinstance(row, str) else json.dumps(row))
    with pytest.raises(ValueError, match=message):
        load_gold(store, Identity(b"a key for the tests"), path, lambda done: None)
    with store.read() as connection:
        assert labelling.totals(connection)["gold"] == 0
    assert list(read_lines(write(tmp_path / "good.jsonl", GOLD), Gold))[1].plain()[0]["content"] == "你好"


def test_tasks_are_made_by_the_service_and_by_other_engines_and_made_again_they_are_found(
    parrot: Any, tmp_path: Path
) -> None:
    other = ParrotServer()
    lines = [{"prompt": f"answer N times: dish {n}"} for n in range(3)] + [{"prompt": "echo"}]
    rows: list[Asked] = list(read_lines(write(tmp_path / "prompts.jsonl", lines), Asked))
    prompts = [Prompt(row.plain(), None, "importer") for row in rows]
    wish = {"answers": 4, "raters": 2, "temperature": 1.0, "max_tokens": 32}
    steps: list[int] = []

    def make(engines: list[str]) -> tuple[int, int, list[str]]:
        return asyncio.run(asked(parrot.store, parrot.url, engines, prompts, wish, lambda: steps.append(1)))

    made, known, problems = make([])
    assert (made, known) == (3, 0) and len(problems) == 1 and "in one way only" in problems[0] and len(steps) == 4
    assert make([])[:2] == (0, 3)
    made, known, _ = make([other.url])
    assert made >= 3 and make([other.url])[:2] == (0, made + known)
    with parrot.store.read() as connection:
        newest = labelling.tasks(connection, labelling.task.c.raters == 2, made)
    models = [{parrot.store.completion(id).model_hash for id in task.answers} for task in newest]
    assert [len(task.answers) for task in newest].count(4) >= 3 and [len(names) for names in models].count(2) >= 3
    other.close()
