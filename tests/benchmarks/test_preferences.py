"""The benchmark on real people's preferences, on hand-made rows: reading, split, readings, and the arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import preferences
from benchmarks.human_pairs import Question, folds, read_openassistant, read_pandalm
from flows.figures import Interval
from models.config import ModelConfig
from models.layout import packed_layout
from models.opinions import Preference, Rated
from models.transformer import Transformer


def comparison(votes: str, answers: tuple[Any, Any] = ("one", "two"), **fields: Any) -> dict[str, Any]:
    row = {"instruction": "Say it.", "input": "", "response1": answers[0], "response2": answers[1]}
    return row | {f"annotator{i}": vote for i, vote in enumerate(votes, 1)} | fields


def written(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_pandalm_takes_what_two_of_three_prefer(tmp_path: Path) -> None:
    rows = [
        comparison("112"),
        comparison("220", ("one", "three")),
        comparison("221", (True, "four"), input="Louder."),
        comparison("001"),  # most see a tie
        comparison("012"),  # no two agree
        comparison("111", ("same", "same")),  # nothing to prefer
    ]
    plain, louder = read_pandalm(written(tmp_path / "p.json", rows))
    assert plain.messages == [{"role": "user", "content": "Say it."}]
    assert plain.answers[:3] == ["one", "two", "three"]
    assert plain.preferences == [Preference(0, 1), Preference(2, 0)]
    assert louder.messages == [{"role": "user", "content": "Say it.\n\nLouder."}]
    assert louder.answers == ["four", "True"]
    assert louder.preferences == [Preference(0, 1)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{", r"p\.json: Expecting"),
        ([comparison("113")], r"row 0: annotators say 0, 1 or 2, not 1, 3"),
        ([{"instruction": "a"}], r"row 0: annotator1 is missing"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_pandalm(written(tmp_path / "p.json", content))


def message(role: str, text: str, *replies: dict[str, Any], rank: int | None = None) -> dict[str, Any]:
    return {"role": role, "text": text, "rank": rank, "replies": list(replies)}


def test_ranks_of_siblings_become_pairs_within_a_prompt(tmp_path: Path) -> None:
    later = message("prompter", "more", message("assistant", "y", rank=1), message("assistant", "x", rank=0))
    tree = message(
        "prompter",
        "hello",
        message("assistant", "b", rank=1),
        message("assistant", "a", later, rank=0),
        message("assistant", "c", rank=1),
        message("assistant", "unranked"),
    )
    lines = [{"message_tree_id": "t", "prompt": tree}, {"message_tree_id": "u", "prompt": message("prompter", "?")}]
    first, second = read_openassistant(written(tmp_path / "o.jsonl", "\n".join(map(json.dumps, lines))))
    assert first.group == second.group == "t"
    named = [(first.answers[p.winner], first.answers[p.loser]) for p in first.preferences]
    assert named == [("a", "b"), ("a", "c")]  # b and c tie
    assert [m["content"] for m in second.messages] == ["hello", "a", "more"]
    assert [m["role"] for m in second.messages] == ["user", "assistant", "user"]
    assert [(second.answers[p.winner], second.answers[p.loser]) for p in second.preferences] == [("x", "y")]


def test_a_group_is_held_out_together_and_each_once() -> None:
    questions = [Question(f"g{i // 3}", []) for i in range(30)]
    found = folds(questions, 5, seed=1)
    assert all(len(set(found[i : i + 3])) == 1 for i in range(0, 30, 3))
    assert sorted(found) == sorted(list(range(5)) * 6)
    assert found != folds(questions, 5, seed=2)
    with pytest.raises(ValueError, match="10 prompts are too few for 11 folds"):
        folds(questions, 11, seed=1)


def rated_questions(count: int) -> list[Question]:
    """Two answers each: people like the one with the good word, which is the shorter one in every third question."""
    out = []
    for i in range(count):
        question = Question(f"g{i}", [])
        question.prefer("good" if i % 3 == 0 else "good thing here", "bad thing")
        out.append(question)
    return out


def test_what_judges_a_pair_has_not_learned_from_its_group() -> None:
    questions = [Question(f"g{i // 2}", [], ["a", "b"], [Preference(0, 1)]) for i in range(12)]
    met = []

    def scorer(train: Any, heldout: Any) -> list[list[float]]:
        met.extend(heldout)
        assert not {questions[i].group for i in train} & {questions[i].group for i in heldout}
        assert sorted([*train, *heldout]) == list(range(12))
        return [[1.0, 1.0] if i == 0 else [float(i % 3), 1.0] for i in heldout]  # 0: a draw

    hits = preferences.right(questions, scorer, count=3, repeats=2)
    assert sorted(met) == sorted(list(range(12)) * 2)
    # i % 3 = 0 loses, 1 draws, 2 wins
    assert [float(h[0]) for h in hits] == [0.5, 0.5, 1, 0, 0.5, 1, 0, 0.5, 1, 0, 0.5, 1]


def test_baselines_on_rows_worked_by_hand() -> None:
    questions = rated_questions(12)
    words = preferences.right(questions, preferences.tfidf_scorer(questions), count=3, repeats=1)
    assert np.concatenate(words).mean() == 1.0
    lengths = [[len(answer) for answer in question.answers] for question in questions]
    longer = preferences.right(questions, preferences.length_scorer(lengths), count=3, repeats=1)
    assert np.concatenate(longer).mean() == pytest.approx(8 / 12)


def test_the_reward_model_finds_the_direction_that_people_like() -> None:
    generator = torch.Generator().manual_seed(0)
    liked = torch.tensor([1.0, -2.0, 0.5, 0.0])
    read, opinions, questions = [], [], []
    for i in range(60):
        rows = torch.randn(3, 4, generator=generator) * torch.tensor([1.0, 1.0, 1.0, 50.0])
        order = (rows @ liked).argsort(descending=True).tolist()
        pairs = [Preference(order[0], order[1]), Preference(order[1], order[2])]
        read.append(rows)
        opinions.append(Rated([0], [[0]] * 3, [0] * 3, pairs))
        questions.append(Question(f"g{i}", [], ["a", "b", "c"], pairs))
    hits = preferences.right(questions, preferences.reward_scorer(read, opinions), count=5, repeats=1)
    assert np.concatenate(hits).mean() > 0.95


def test_the_bootstrap_draws_groups_with_all_their_pairs() -> None:
    """Two groups, one right in all its 3 pairs and one wrong in its 1: draws give 1, 0 or 3/4, so the ends are 0 and 1."""
    questions = [Question("a", []), Question("a", []), Question("b", [])]
    values = [np.ones(2), np.ones(1), np.zeros(1)]
    assert preferences.grouped_bootstrap(questions, values) == Interval(0.75, 0.0, 1.0)
    # pairs that were independent would give a standard error of .05 here; 20 groups of 5 equal ones give .112
    many = [Question(f"g{i}", []) for i in range(20)]
    interval = preferences.grouped_bootstrap(many, [np.full(5, float(i % 2)) for i in range(20)])
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * 0.5 / 20**0.5, rel=0.1)


@pytest.fixture(scope="module")
def trunk() -> Transformer:
    config = ModelConfig(
        hidden_size=16, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24,
        vocab_size=40, max_position_embeddings=32,
    )  # fmt: skip
    model = Transformer(config).initialize(torch.Generator().manual_seed(3)).eval()
    model.requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(8.0 if parameter.dim() > 1 else 1.0)  # so that tokens differ by more than rounding
    return model


def test_answers_behind_one_prompt_read_as_each_alone(trunk: Transformer) -> None:
    prompt, answers = [1, 2, 3], [[4, 5], [6, 7, 8, 9], [5]]
    found = preferences.readings(trunk, Rated(prompt, answers, [0] * 3))
    assert preferences.layers_read(trunk) == [2, 3, 3]
    assert found.shape == (3, 2 * 2 * 16)
    for row, answer in zip(found, answers, strict=True):
        ids = [*prompt, *answer]
        layout = packed_layout([len(ids)])
        x = trunk.embedding(torch.tensor(ids))
        expected = []
        for number, block in enumerate(trunk.layers[:3], 1):
            x, _, _ = block(x, trunk.cos[layout.positions], trunk.sin[layout.positions], layout)
            if number > 1:
                expected += [x[-1], x[len(prompt) :].mean(0)]
        torch.testing.assert_close(row, torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_what_was_read_is_kept_for_the_same_base_alone(trunk: Transformer, tmp_path: Path) -> None:
    opinions = [Rated([1, 2], [[3], [4, 5]], [0, 0])]
    [first] = preferences.all_readings(trunk, opinions, tmp_path, print)
    [file] = tmp_path.glob("*.npy")
    np.save(file, np.zeros((2, 64), dtype=np.float32))
    [again] = preferences.all_readings(trunk, opinions, tmp_path, print)
    assert not again.any()
    other = Transformer(trunk.config).initialize(torch.Generator().manual_seed(4)).eval()
    [others] = preferences.all_readings(other, opinions, tmp_path, print)
    assert others.any()
    assert not torch.equal(others, first)


def test_the_page_and_its_section_survive_a_rewrite(tmp_path: Path) -> None:
    def result(value: float) -> dict[str, Any]:
        names = ("reward model", *preferences.BASELINES, *(f"gain over {name}" for name in preferences.BASELINES))
        figures = {name: Interval(value, value - 0.1, value + 0.1) for name in names}
        return {**figures, "pairs": 1234, "prompts": 56, "groups": 7, "answers": 99}

    page = tmp_path / "preferences.md"
    evidence = "# Evidence\n\n## Bars\n\nall hold\n"
    assert preferences.with_section(evidence, page) == evidence
    for value in (0.5, 0.75):
        page.write_text(preferences.document({"OpenAssistant": result(value)}, "base", 20, 60.0), encoding="utf-8")
        evidence = preferences.with_section(evidence, page)
    assert evidence.startswith("# Evidence\n\n## Bars\n\nall hold\n\n## Real people's preferences\n\n")
    assert evidence.count("## Real people's preferences") == 1
    assert "| OpenAssistant | 1,234 | 56 | **0.750 [0.650, 0.850]** |" in evidence
    assert "0.500 [" not in evidence
