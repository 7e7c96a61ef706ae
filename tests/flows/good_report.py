"""The parts of a judge's report that the gate reads, with figures that it likes."""

from __future__ import annotations

from typing import Any

GOOD: dict[str, Any] = {
    "prompts": 400,
    "seed": 1,
    "judges": {"thumbs_up": "a word list"},
    "sft": {"relevance": 2.0, "ended_share": 0.96},
    "champion_before": {},
    "candidate": {
        "most_common_share": 0.02,
        "distinct_answers": 0.97,
        "relevance": 1.6,
        "ended_share": 0.9,
        "kl_per_answer": 4.0,
    },
    "comparisons": {
        "sft": {
            "perplexity_ratio": 1.02,
            "next_turn_gain": -0.01,
            "next_turn_gain_low": -0.04,
            "next_turn_gain_high": 0.02,
        },
        "champion_before": {
            "thumbs_up_gain": 0.3,
            "thumbs_up_gain_low": 0.25,
            "thumbs_up_gain_high": 0.35,
            "second_judge_gain": 0.1,
            "second_judge_gain_low": 0.04,
            "second_judge_gain_high": 0.16,
        },
    },
    "expert": {"pairs": 40, "gain": 0.02, "gain_low": -0.05, "gain_high": 0.1},
    "pairwise": {
        "words": {"pairs": 400, "failures": 0},
        "house": {
            "pairs": 400,
            "failures": 8,
            "length_controlled_win_rate": 0.6,
            "length_controlled_win_rate_low": 0.55,
            "length_controlled_win_rate_high": 0.65,
        },
    },
}
