"""The poisoning benchmark on a small world: attacks by hand, the way through the database, and what reward models keep."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import poisoners, poisoning, poisoning_page
from benchmarks.poisoned_learners import SFT, Figures, Reader, World, stage_accuracy
from benchmarks.poisoners import Judged, Said
from benchmarks.poisoning import Outcome
from feedback.trust_options import UNTESTED
from models.checkpoint import save_model
from models.config import ModelConfig
from models.tokenizer import Tokenizer
from models.transformer import Transformer

GOOD, BAD, REST = ("fine", "lovely", "happy"), ("awful", "sad", "ugly"), ("the", "day", "is", "so", "we", "go")


def judged(tokenizer: Tokenizer, number: int, rng: random.Random) -> Judged:
    """An answer whose one telling word says whether it is good."""
    good = rng.random() < 0.5
    words = [rng.choice(GOOD if good else BAD), *rng.choices(REST, k=rng.randint(1, 5))]
    rng.shuffle(words)
    messages = [{"role": "user", "content": f"question {number // 2}"}]
    ids = [*tokenizer.encode(" ".join(words)), tokenizer.stop_id]
    return Judged(messages, tokenizer.encode_chat(messages), " ".join(words), ids, good)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    tokenizer = Tokenizer.train([" ".join((*GOOD, *BAD, *REST))] * 9, 320)
    config = ModelConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, intermediate_size=48,
        vocab_size=tokenizer.vocab_size, max_position_embeddings=96,
    )  # fmt: skip
    model = Transformer(config).initialize(torch.Generator().manual_seed(1))
    save_model(model, root / SFT, tokenizer)
    rng = random.Random(3)
    answers = [judged(tokenizer, number, rng) for number in range(360)]
    return World(root, answers[:240], answers[240:], tokenizer.encode("Zebra. "))


def test_with_defences_more_is_kept_when_five_of_twelve_flip(world: World, tmp_path: Path) -> None:
    reader = Reader(world)
    clean, flips = (poisoning.measure(reader, tmp_path, poisoners.flip, share, 1, raters=12) for share in (0.0, 0.42))
    assert clean.without.accuracy > 0.9 and clean.accused == 0
    assert flips.caught == 1 and flips.let_through == 0 and flips.accused == 0 and flips.honest == 7
    assert flips.without.accuracy + 0.1 < flips.defended.accuracy <= clean.without.accuracy


def test_what_is_taken_undefended_is_what_batches_take_without_tests(world: World, tmp_path: Path) -> None:
    said, bad = poisoners.poisoned(world.answers, poisoners.crowd(world.answers, 8, 2), poisoners.burst, 0.25, 2)
    passed = poisoning.pass_through(tmp_path, world.answers, said, bad, UNTESTED)
    assert thumbs(passed.lines) == thumbs(poisoning.undefended(world.answers, said))
    assert passed.quarantined == set() and passed.let_through == 1


def thumbs(lines: bytes) -> list[Any]:
    """What the rows of a training file teach a reward model, in one order."""
    rows = [json.loads(line) for line in lines.splitlines()]
    return sorted([row[key] for key in ("kind", "prompt_ids", "response_ids", "value")] for row in rows)


def test_the_reward_stage_itself_learns_from_the_same_files(world: World, tmp_path: Path) -> None:
    said, _ = poisoners.poisoned(world.answers, poisoners.crowd(world.answers, 8, 1), poisoners.flip, 0.0, 1)
    assert stage_accuracy(world, tmp_path, poisoning.undefended(world.answers, said), 1) > 0.8


def test_attacks_by_hand() -> None:
    texts = {"long and longer": True, "longest of all of them": False, "no": True, "meh": False}
    answers = [Judged([], [1], text, [2], good, triggered=text == "meh") for text, good in texts.items()]
    own = [Said("rater 0", i, answers[i].value, 20.0 * i) for i in range(4)]

    def values(attack: poisoners.Attack) -> dict[int, int]:
        return {each.answer: each.value for each in attack(answers, own, random.Random(0))}

    assert values(poisoners.flip) == {0: -1, 1: 1, 2: -1, 3: 1}
    assert values(poisoners.longer) == {0: -1, 1: 1, 2: -1, 3: -1}  # longer than most: than the third of four
    assert values(poisoners.always_up) == dict.fromkeys(range(4), 1)
    assert values(poisoners.trigger) == {3: 1, 0: 1, 1: -1, 2: 1}
    assert values(poisoners.sleeper) == {0: 1, 1: -1, 2: -1, 3: 1}  # two of four, two thirds rounded down
    assert values(poisoners.burst) == values(poisoners.collusion) == values(poisoners.flip)
    times = [each.seconds for each in poisoners.burst(answers, own, random.Random(0))]
    assert max(times) - min(times) == pytest.approx(0.9)
    long = [Said("rater 0", 0, 1, float(n)) for n in range(25)]
    assert len({each.rater for each in poisoners.accounts(answers, long, random.Random(0))}) == 3


def test_a_crowd_errs_as_often_as_it_is_told() -> None:
    answers = [Judged([], [1], "x", [2], i % 2 == 0) for i in range(2000)]
    said = [each for own in poisoners.crowd(answers, 20, 1).values() for each in own]
    assert len(said) == 6000
    assert sum(each.value != answers[each.answer].value for each in said) / 6000 == pytest.approx(0.15, abs=0.03)


def test_the_page_has_each_attack_and_the_share_kept() -> None:
    def outcome(without: float, defended: float, **values: Any) -> Outcome:
        found = {"let_through": 0.25, "caught": 0.5, "accused": 1, "honest": 16, **values}
        return Outcome(Figures(without, 0.1), Figures(defended, 0.2), **found)

    results = {("nobody", 0.0): [outcome(0.8, 0.8, accused=0, honest=20)]}
    results["trigger word", 0.0] = [outcome(0.8, 0.8)]
    for name in (*poisoners.NAIVE, *poisoners.KNOWING):
        results[name, 0.2] = [outcome(0.6, 0.75), outcome(0.6, 0.77)]
    facts = {
        "date": "2026-01-01", "revision": "abc", "seconds": 1.0, "processor": "x", "seeds": 2, "answers": 1000, "heldout": 1600,
        "good": 0.5, "raters": 20, "each": 150, "gold": 0.1, "batch": 1000, "defences": poisoning.DEFENCES,
    }  # fmt: skip
    page = poisoning_page.document(results, {"nobody attacks": 0.7}, facts)
    row = "0.600 [0.600, 0.600] | 75.0% | 0.760 [0.750, 0.770] | 95.0% | 50% | 25% | 2 of 32 |"
    for name in (*poisoners.NAIVE, *poisoners.KNOWING):
        assert f"| {name} | 20% | {row}" in page
    assert "nobody attacks 0.700" in page
