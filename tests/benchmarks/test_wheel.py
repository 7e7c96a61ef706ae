"""The page of the turns: bars worked by hand, and a section that leaves the others alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks import overhead, wheel
from benchmarks.wheel import Turn, bars, kept, start_of, trend, with_section

FIGURES = {"relevance": 0.3, "perplexity": 100.0, "ended_share": 1.0, "kl_per_answer": 1.0, "thumbs_up_rate": 0.5}
FIGURES |= {"distinct_answers": 1.0, "most_common_share": 0.01}


def turn(number: int, ups: int, **champion: float) -> Turn:
    thumbs = {f"prompt {i:03}": i < ups for i in range(200)}
    figures: dict[str, Any] = {**FIGURES, **champion}
    return Turn(number, (100, 100), True, [], 0.5, figures, FIGURES, thumbs, thumbs, {}, {"turn": 60.0})


def test_the_trend_is_the_slope_of_the_mean() -> None:
    rates = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    assert trend(rates).value == pytest.approx(np.polyfit([0, 1, 2], rates.mean(axis=1), 1)[0])


def test_a_wheel_that_rises_holds_all_bars_and_one_that_stands_does_not() -> None:
    rising = bars([turn(0, 80), turn(1, 90), turn(2, 110), turn(3, 140)])
    assert [bar.name for bar in rising if not bar.holds] == []
    standing = {bar.name: bar.holds for bar in bars([turn(0, 80), turn(1, 140), turn(2, 140), turn(3, 140)])}
    assert standing["trend of the thumbs-up rate a turn: 95 % interval above zero"] is False
    assert standing["last turn above the first"] is False


def test_one_turn_that_collapses_is_a_miss() -> None:
    for figure, value, bar in (
        ("most_common_share", 0.3, "most common answer at most 5 % at every turn"),
        ("relevance", 0.1, "relevance keeps at least half at every turn"),
        ("perplexity", 120.0, "held-out perplexity at most 1.10 times at every turn"),
    ):
        found = bars([turn(0, 80), turn(1, 90), turn(2, 110, **{figure: value}), turn(3, 140)])
        assert [each.name for each in found if not each.holds] == [bar]


def test_the_section_is_put_between_the_others_and_replaced_there() -> None:
    page = "# Evidence\n\nfive seeds\n\n## Real people's preferences\n\npairs\n"
    once = with_section(page, f"{wheel.TITLE}\n\nold")
    assert once == f"# Evidence\n\nfive seeds\n\n{wheel.TITLE}\n\nold\n\n## Real people's preferences\n\npairs\n"
    assert with_section(once, f"{wheel.TITLE}\n\nnew") == once.replace("old", "new")
    assert kept(once).strip() == f"{wheel.TITLE}\n\nold"
    assert with_section(page, kept(page)) == page


def test_turn_0_is_the_sft_model() -> None:
    report: dict[str, Any] = {"gate": {"reasons": []}, "candidate": FIGURES, "sft": FIGURES}
    kept = {
        "report": report,
        "thumbs": {"sft": {"a": True}},
        "second": {"sft": {"a": True}},
        "reward": {},
        "seconds": {},
    }
    assert (start_of(kept).number, start_of(kept).champion, start_of(kept).promoted) == (0, FIGURES, False)


def test_the_overhead_is_the_last_section_of_its_page() -> None:
    page = overhead.with_section("# Benchmarks\n\nraces\n", overhead.section([1.0], [2.0]))
    assert page.startswith("# Benchmarks\n\nraces\n\n## Orchestration and records\n")
    assert "| **1.00 s** | 1.00 to 1.00 (1) | 1.5 s |" in page
    assert "missed" in overhead.section([1.6], [2.0])
    assert overhead.with_section("# Benchmarks\n\nraces anew\n", overhead.kept(page)).endswith(overhead.kept(page))
