"""Whether a candidate may take the champion's place: a pure function of the report that `judge` wrote.

A gain in thumbs alone is not enough, because a model can earn it by saying "Yeah" to everything. So the gain has to be
larger than chance, and relevance, diversity, answers that end, the distance from the SFT model and held-out perplexity have
to hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class GateOptions:
    """What a candidate must show. Shares are of 1, kl in nats per answer."""

    min_gain: float = 0.0  # the lower end of the interval of the gain in thumbs-up rate has to be above this
    max_second_judge_fall: float = 0.0  # a fall of the second judge is one when the whole interval is below minus this
    max_most_common: float = 0.05
    min_distinct: float = 0.90
    min_relevance_kept: float = 0.5  # of the SFT model's relevance
    min_ended_kept: float = 0.75  # of the SFT model's share of answers that end by themselves
    max_perplexity_ratio: float = 1.10  # to the SFT model's, on held-out pretraining text
    max_kl: float = 15.0  # to the SFT model
    max_next_turn_fall: float = (
        0.1  # of the share of true answers told from others, when the whole interval is below minus this
    )
    max_expert_fall: float = 0.0  # of the agreement with held-out judgements of experts, likewise
    min_expert_pairs: int = 10  # with fewer held-out judgements of experts nothing is concluded from them
    min_win_rate: float = (
        0.5  # by each of judge.judges, length-controlled: the interval's lower end has to be above this
    )
    max_judge_failures: float = 0.1  # share of the pairs that one of judge.judges gives no verdict on
    min_prompts: int = 300

    def __post_init__(self) -> None:
        for name in (
            *("max_most_common", "min_distinct", "min_relevance_kept", "min_ended_kept"),
            *("max_next_turn_fall", "max_expert_fall", "min_win_rate", "max_judge_failures"),
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share: give a number from 0 to 1, not {getattr(self, name)}")
        for name in ("max_second_judge_fall", "max_perplexity_ratio", "max_kl", "min_prompts", "min_expert_pairs"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} cannot be negative, it is {getattr(self, name)}")


@dataclass(frozen=True)
class Check:
    """One condition of the gate: its name, whether it holds, and the sentence that says so with the figures."""

    name: str
    passed: bool
    text: str


@dataclass(frozen=True)
class Decision:
    """What the gate says, and every check behind it."""

    checks: tuple[Check, ...]

    @property
    def promote(self) -> bool:
        """True when every check holds."""
        return all(check.passed for check in self.checks)

    @property
    def reasons(self) -> list[str]:
        """The sentences of the checks that failed; when none did, of all of them."""
        failed = [check.text for check in self.checks if not check.passed]
        return failed or [check.text for check in self.checks]

    def as_dict(self) -> dict[str, Any]:
        """The `gate` entry of report.json."""
        return {
            "decision": "promote" if self.promote else "keep",
            "reasons": self.reasons,
            "checks": {check.name: check.passed for check in self.checks},
        }


def decide(report: Mapping[str, Any], options: GateOptions | None = None) -> Decision:
    """Apply the gate to a report of `judge`. Raises KeyError that names the figure which the report lacks.

    A figure that is not a number (NaN) fails its check: every condition is written so that only a proven value passes.
    """
    limits = options or GateOptions()
    candidate, champion = report["candidate"], report["comparisons"]["champion_before"]
    return Decision(
        (
            _prompts(int(report["prompts"]), limits),
            _thumbs(champion, limits),
            _second_judge(champion, limits),
            _at_most(
                "most_common", candidate["most_common_share"], limits.max_most_common, "most common answer's share"
            ),
            _at_least("distinct", candidate["distinct_answers"], limits.min_distinct, "distinct answers' share"),
            _relevance(candidate["relevance"], report["sft"]["relevance"], limits),
            _ended(candidate["ended_share"], report["sft"]["ended_share"], limits),
            _at_most(
                "perplexity",
                report["comparisons"]["sft"]["perplexity_ratio"],
                limits.max_perplexity_ratio,
                "held-out perplexity over the SFT model's",
            ),
            _below("kl", candidate["kl_per_answer"], limits.max_kl, "KL to the SFT model, nats per answer,"),
            _next_turn(report["comparisons"]["sft"], limits),
            _expert(report["expert"], limits),
            *(_judge(name, told, limits) for name, told in report["pairwise"].items() if name != "words"),
        )
    )


def _prompts(prompts: int, limits: GateOptions) -> Check:
    text = f"judged on {prompts} prompts, at least {limits.min_prompts} are needed"
    return Check("prompts", prompts >= limits.min_prompts, text)


def _thumbs(against: Mapping[str, Any], limits: GateOptions) -> Check:
    gain, low, high = (float(against[key]) for key in _with_ends("thumbs_up_gain"))
    passed = low > limits.min_gain
    text = (
        f"thumbs-up rate {gain:+.3f} [{low:+.3f}, {high:+.3f}] against the champion: the interval's lower end is "
        f"{'above' if passed else 'not above'} {limits.min_gain:+.3f}"
    )
    return Check("thumbs", passed, text)


def _second_judge(against: Mapping[str, Any], limits: GateOptions) -> Check:
    if against.get("second_judge_gain") is None:
        return Check("second_judge", True, "no second judge reads this language: nothing to compare")
    gain, low, high = (float(against[key]) for key in _with_ends("second_judge_gain"))
    passed = high >= -limits.max_second_judge_fall
    text = (
        f"second judge's rate {gain:+.3f} [{low:+.3f}, {high:+.3f}] against the champion: "
        f"{'no fall beyond chance' if passed else 'a fall that chance does not explain'}"
    )
    return Check("second_judge", passed, text)


def _next_turn(against: Mapping[str, Any], limits: GateOptions) -> Check:
    if against["next_turn_gain"] is None:
        return Check("next_turn", True, "true answers told from others: not applicable, too few held-out conversations")
    return _fall("next_turn", "true answers told from others", against, "next_turn_gain", limits.max_next_turn_fall)


def _expert(expert: Mapping[str, Any] | None, limits: GateOptions) -> Check:
    if expert is None:
        return Check("expert", True, "experts' held-out judgements: not applicable, there are none")
    if expert["pairs"] < limits.min_expert_pairs:
        text = f"experts' held-out judgements: not applicable, {expert['pairs']} pairs are too few to conclude from"
        return Check("expert", True, text)
    return _fall(
        "expert", f"agreement with {expert['pairs']} judgements of experts", expert, "gain", limits.max_expert_fall
    )


def _judge(name: str, told: Mapping[str, Any], limits: GateOptions) -> Check:
    rate, low, high = (float(told[key]) for key in _with_ends("length_controlled_win_rate"))
    failed = told["failures"] / told["pairs"] if told["pairs"] else 1.0
    if not failed <= limits.max_judge_failures:
        text = f"judge {name} gave no verdict on {failed:.0%} of the pairs, at most {limits.max_judge_failures:.0%} may fail"
        return Check(f"judge {name}", False, text)
    passed = low > limits.min_win_rate
    text = (
        f"judge {name}: length-controlled win rate {rate:.3f} [{low:.3f}, {high:.3f}] against the champion, the interval's "
        f"lower end is {'above' if passed else 'not above'} {limits.min_win_rate:.3f}"
    )
    return Check(f"judge {name}", passed, text)


def _fall(name: str, what: str, figures: Mapping[str, Any], key: str, limit: float) -> Check:
    gain, low, high = (float(figures[each]) for each in _with_ends(key))
    passed = high >= -limit
    ending = "no fall beyond chance" if passed else "a fall that chance does not explain"
    return Check(name, passed, f"{what} {gain:+.3f} [{low:+.3f}, {high:+.3f}], {limit:.3f} allowed: {ending}")


def _relevance(candidate: float, sft: float, limits: GateOptions) -> Check:
    if sft <= 0:
        text = f"the SFT model's answers tell nothing of their prompts (relevance {sft:.3f} nats): nothing to keep"
        return Check("relevance", True, text)
    kept = candidate / sft
    passed = kept >= limits.min_relevance_kept
    text = (
        f"relevance {candidate:.3f} of the SFT model's {sft:.3f} nats per answer, {kept:.0%} kept: "
        f"at least {limits.min_relevance_kept:.0%} {'holds' if passed else 'is needed'}"
    )
    return Check("relevance", passed, text)


def _ended(candidate: float, sft: float, limits: GateOptions) -> Check:
    if sft <= 0:
        return Check("ended", True, "no answer of the SFT model ends by itself: nothing to keep")
    kept = candidate / sft
    passed = kept >= limits.min_ended_kept
    text = (
        f"{candidate:.0%} of the answers end by themselves, {sft:.0%} of the SFT model's, {kept:.0%} kept: "
        f"at least {limits.min_ended_kept:.0%} {'holds' if passed else 'is needed'}"
    )
    return Check("ended", passed, text)


def _at_most(name: str, value: float, limit: float, what: str) -> Check:
    passed = value <= limit
    return Check(name, passed, f"{what} {value:.3f} is {'within' if passed else 'above'} {limit:.3f}")


def _below(name: str, value: float, limit: float, what: str) -> Check:
    passed = value < limit
    return Check(name, passed, f"{what} {value:.3f} is {'below' if passed else 'not below'} {limit:.3f}")


def _at_least(name: str, value: float, limit: float, what: str) -> Check:
    passed = value >= limit
    return Check(name, passed, f"{what} {value:.3f} is {'at least' if passed else 'below'} {limit:.3f}")


def _with_ends(name: str) -> tuple[str, str, str]:
    return name, f"{name}_low", f"{name}_high"
