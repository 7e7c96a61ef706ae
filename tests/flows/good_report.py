"""The parts of a judge's report that the gate reads, with figures that it likes."""

from __future__ import annotations

from typing import Any

GOOD: dict[str, Any] = {
    "prompts": 400,
    "seed": 1,
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
        "sft": {"perplexity_ratio": 1.02},
        "champion_before": {
            "thumbs_up_gain": 0.3,
            "thumbs_up_gain_low": 0.25,
            "thumbs_up_gain_high": 0.35,
            "second_judge_gain": 0.1,
            "second_judge_gain_low": 0.04,
            "second_judge_gain_high": 0.16,
        },
    },
}
