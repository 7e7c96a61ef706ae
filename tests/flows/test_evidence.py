"""The evidence page: its bars and its tables, by hand; and that a workspace of its own is a copy of the checkout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import evidence
from benchmarks.evidence import Result
from flows import settings


def result(seed: int, gain: int = 40, **changes: float) -> Result:
    """100 prompts: 40 thumbs up before, `gain` more after; the second judge gains 10."""
    figures: dict[str, Any] = {
        "thumbs_up_rate": 0.4,
        "second_judge_rate": 0.3,
        "kl_per_answer": 5.0,
        "length_characters": 30.0,
        "distinct_answers": 0.95,
        "ended_share": 0.9,
        "most_common_share": 0.02,
        "most_common_answer": "a | b",
        "character_distinct_4": 0.5,
        "relevance": 2.0,
        "perplexity": 30.0,
    }
    against = {"relevance_kept": changes.pop("relevance_kept", 0.8), "perplexity_ratio": 1.05}
    against["perplexity_ratio"] = changes.pop("perplexity_ratio", 1.05)
    for name, value in {"thumbs_up_gain": gain / 100, "second_judge_gain": 0.1}.items():
        against |= {name: value, f"{name}_low": value - 0.05, f"{name}_high": value + 0.05}
    reward = {
        "heldout": changes.pop("heldout", 1200.0),
        "accuracy": 0.7,
        "accuracy_low": changes.pop("accuracy_low", 0.67),
        "accuracy_high": 0.73,
        "majority": 0.6,
        "length_baseline": 0.55,
        "bag_of_words_baseline": 0.8,
    }
    report = {
        "prompts": changes.pop("prompts", 400),
        "judges": {"thumbs_up": "VADER", "second_judge": "TextBlob"},
        "sft": figures,
        "candidate": {**figures, "thumbs_up_rate": 0.4 + gain / 100, **changes},
        "comparisons": {"sft": against},
        "gate": {"decision": "promote"},
    }
    after = [True] * (40 + gain) + [False] * (60 - gain)
    before = [True] * 40 + [False] * 60
    return Result(
        seed, report, reward, (after, before), ([True] * 40 + [False] * 60, [True] * 30 + [False] * 70), 300.0
    )


def missed(*results: Result) -> list[str]:
    return [bar.name for bar in evidence.bars(results) if not bar.holds]


def test_good_seeds_hold_every_bar() -> None:
    results = [result(seed) for seed in range(1, 6)]
    assert missed(*results) == []
    assert len(evidence.bars(results)) == 12


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"gain": 5}, "worst seed gains at least 0.10"),
        ({"most_common_share": 0.06}, "most common answer at most 5 %"),
        ({"distinct_answers": 0.85}, "distinct answers at least 90 %"),
        ({"relevance_kept": 0.4}, "relevance keeps at least half"),
        ({"ended_share": 0.67}, "answers that end at least 75 % of the SFT model's share"),
        ({"perplexity_ratio": 1.2}, "held-out perplexity at most 1.10 times"),
        ({"kl_per_answer": 15.0}, "KL under 15 nats an answer"),
        ({"prompts": 299}, "judged on at least 300 prompts"),
        ({"heldout": 999.0}, "reward model: at least 1,000 held-out rated answers"),
        ({"accuracy_low": 0.6}, "reward model: accuracy's interval above the majority class"),
    ],
)
def test_one_bad_seed_among_five_is_seen(changes: dict[str, Any], name: str) -> None:
    results = [result(seed, 55) for seed in range(1, 5)]
    assert name in missed(*results, result(5, **changes))


def test_a_mean_gain_that_chance_explains_is_seen() -> None:
    # the mean gain is .30, but a draw of five of these seeds is often below .20
    assert missed(*[result(1, 50), result(2, 50), result(3, 10), result(4, 10), result(5, 30)]) == [
        "mean gain in thumbs-up rate: 95 % interval above 0.20"
    ]


def test_the_page_shows_every_seed_and_every_bar() -> None:
    page = evidence.document([result(1), result(2, gain=5)], "abcdef0123456789-dirty")
    assert "--seeds 1 2` at revision abcdef012345 with local changes" in page
    assert "| 1 | 400 | 0.400 → 0.800 | +0.400 [+0.350, +0.450] |" in page
    assert "| worst seed gains at least 0.10 | +0.050 | **no** |" in page
    assert "| 2 | 1,200 | 0.700 [0.670, 0.730] | 0.600 | 0.550 | 0.800 |" in page
    assert "'a \\| b'" in page
    columns = {line.replace("\\|", "").count("|") for line in page.splitlines() if line.startswith("| 1 |")}
    assert columns == {9, 10, 7}


def test_a_seeds_workspace_is_a_copy_with_its_seed(tmp_path: Path) -> None:
    evidence.prepare(tmp_path / "seed-3", tmp_path / "cache", 3)
    assert settings.load(tmp_path / "seed-3").seed == 3
    assert f"dir = {tmp_path / 'cache'}" in (tmp_path / "seed-3/.dvc/config.local").read_text()
    first = evidence.identity(tmp_path / "seed-3")
    evidence.prepare(tmp_path / "seed-3", tmp_path / "cache", 4)
    assert evidence.identity(tmp_path / "seed-3") != first
    evidence.prepare(tmp_path / "seed-3", tmp_path / "cache", 3)
    assert evidence.identity(tmp_path / "seed-3") == first


def test_a_kept_seed_reads_back(tmp_path: Path) -> None:
    root, wanted = tmp_path / "seed-1", result(1)
    for path, content in {"judge/report.json": wanted.report, "reward/metrics.json": wanted.reward}.items():
        (root / "artifacts" / path).parent.mkdir(parents=True)
        (root / "artifacts" / path).write_text(json.dumps(content))
    rows = [
        {"candidate": {"thumb": after, "second": new}, "sft": {"thumb": before, "second": old}}
        for after, before, new, old in zip(*wanted.thumbs, *wanted.second, strict=True)
    ]
    (root / evidence.ANSWERS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    evidence.keep(root, tmp_path / "kept", {"identity": "x", "seconds": 300.0})
    assert evidence.read_result(1, tmp_path / "kept", 300.0) == wanted
