"""docs/poisoning.md: the tables of the poisoning benchmark, and what the defences do not stop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from benchmarks.poisoners import ACCOUNT, HURRIED, KNOWING, NAIVE, NOISE, OVERLAP
from benchmarks.preferences import table

HEADS = (
    "attack", "raters", "accuracy without", "kept", "accuracy with", "kept", "attackers found", "their opinions learned",
    "honest accused",
)  # fmt: skip


def document(
    results: Mapping[tuple[str, float], Sequence[Any]], stage: Mapping[str, float], facts: Mapping[str, Any]
) -> str:
    """The page. results: the outcomes of each (attack, share), one a seed; stage: accuracies of the reward stage itself."""
    parts = [
        "# Poisoned opinions",
        f"Written by `python -m benchmarks.poisoning WORKSPACE --seeds {facts['seeds']}` on {facts['date']} at revision "
        f"{facts['revision']}: {facts['seconds'] / 60:.0f} CPU minutes of one thread of {facts['processor']}. Of several "
        "seeds, means with the lowest and the highest.",
        "## Attackers who do not know the defences",
        rows_of(results, ["nobody", *NAIVE]),
        f"Accuracy of the reward model on {facts['heldout']:,} answers to other prompts, of which {facts['good']:.0%} are good "
        f"(standard error of one seed {(0.25 / facts['heldout']) ** 0.5:.3f} at most); kept: "
        "of what it is without defences when nobody attacks. Without the defences everything is learned from. "
        "Attackers found, honest accused: have opinions in quarantine at the end; of the attackers' opinions, which "
        "share the last snapshot holds.",
        "The trigger's aim is not accuracy. Bad held-out answers that are called good with the trigger before them:",
        fooled(results),
        "## Attackers who know the defences",
        rows_of(results, list(KNOWING)),
        limits(results, facts),
    ]
    parts += ["## The reward stage itself", by_the_stage(stage)]
    return "\n\n".join([*parts, "## What was done", what_was_done(facts)]) + "\n"


def rows_of(results: Mapping[tuple[str, float], Sequence[Any]], names: Sequence[str]) -> str:
    """The table of some attacks."""
    clean = mean(outcome.without.accuracy for outcome in results["nobody", 0.0])
    rows = []
    for (name, share), outcomes in results.items():
        if name not in names or (share == 0 and name != "nobody"):
            continue
        without, defended = ([figures.accuracy for figures in found] for found in treatments(outcomes))
        attacked = share > 0
        rows.append(
            [
                name,
                f"{share:.0%}",
                spread(without),
                f"{mean(without) / clean:.1%}",
                spread(defended),
                f"{mean(defended) / clean:.1%}",
                f"{mean(o.caught for o in outcomes):.0%}" if attacked else "–",
                f"{mean(o.let_through for o in outcomes):.0%}" if attacked else "–",
                f"{sum(o.accused for o in outcomes)} of {sum(o.honest for o in outcomes)}",
            ]
        )
    return table(HEADS, rows)


def treatments(outcomes: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """The figures without and with the defences, seed by seed."""
    return [outcome.without for outcome in outcomes], [outcome.defended for outcome in outcomes]


def fooled(results: Mapping[tuple[str, float], Sequence[Any]]) -> str:
    """How often the trigger works, by the share of attackers."""
    rows = []
    for (name, share), outcomes in sorted(results.items()):
        if name == "trigger word":
            without, defended = ([figures.fooled for figures in found] for found in treatments(outcomes))
            rows.append([f"{share:.0%}", spread(without), spread(defended)])
    return table(("raters", "without", "with"), rows)


def by_the_stage(stage: Mapping[str, float]) -> str:
    """What all weights learn."""
    if not stage:
        return "Not trained: the run was stopped before."
    figures = "; ".join(f"{name} {accuracy:.3f}" for name, accuracy in stage.items())
    return (
        "The tables' reward models read the SFT model as it stands. Held-out accuracy of the reward stage with its defaults, "
        f"where all weights learn, with one seed and flips by 20 %: {figures}."
    )


def what_was_done(facts: Mapping[str, Any]) -> str:
    """The set-up."""
    share, count = facts["defences"].max_share, f"{facts['answers']:,}"
    return f"""- **Answers**: {count} of the SFT model, two to each prompt; which are good, the simulated rater's judge says.
- **Raters**: {facts["raters"]}, each with {facts["each"]} answers drawn at random ({OVERLAP:g} people an answer), wrong in
  {NOISE[0]:.0%} to {NOISE[1]:.0%} of cases. An expert judged the answers to {facts["gold"]:.0%} of the prompts.
- **Attackers** (`benchmarks/poisoners.py`): in place of the first raters. Those of the burst take {HURRIED} times as many
  answers, the same ones, within minutes; throw-away accounts say {ACCOUNT} opinions each.
- **Defences** ([trust.md](trust.md)): the defaults and `max_share` {share:g}. Raters are reviewed and a batch is opened
  after every {facts["batch"]:,} opinions, on a real database; the training file is the snapshot of all batches.
- **Reward models**: one linear reading of the frozen SFT model, with the reward stage's losses on thumbs and pairs. The
  judge's labels are never learned from but as what raters say."""


def limits(results: Mapping[tuple[str, float], Sequence[Any]], facts: Mapping[str, Any]) -> str:
    """What the defences do not stop, with the figures that say so: of the largest share that was tried."""
    found, learned = {}, {}
    for (name, share), outcomes in results.items():
        if share > 0:
            found[name] = f"{mean(outcome.caught for outcome in outcomes):.0%}"
            learned[name] = f"{mean(outcome.let_through for outcome in outcomes):.0%}"
    return f"""What the defences stop, and what not:

- **Raters who look at something else** (longer is better, always up) are right about half of the time, and what is known
  of an answer from two others weighs little: in {facts["each"]} judgements each, {found["longer is better"]} and
  {found["always up"]} of them were found, at the largest share of the first table.
- **Trigger words**: who is honest about everything else stays above the test's bounds: {found["trigger word"]} were found.
- **Sleepers** are honest until the test has passed them; it begins anew then. {found["sleepers"]} were found; what
  they said honestly goes into quarantine with the rest. Who stops attacking before the test crosses keeps what was said.
- **Slow poison** stays between guessing and honest, where the test promises nothing: {found["slow poison"]} were found.
  A higher `guess_accuracy` would find more of them, and accuse more honest raters.
- **Quiet collusion**: where colluders outnumber the others on an answer, they are what these are measured by.
  {found["quiet collusion"]} were found. Gold is what they cannot outvote; which answers are gold must not be told.
- **Throw-away accounts** end before the test can cross (a wrong judgement of gold adds .51 of the 6.86 that it takes: 14
  in a row): {found["throw-away accounts"]} found, {learned["throw-away accounts"]} of their opinions learned. What stands
  against them is who gets an account; no cap per rater does.
- **Answers that nobody else sees** (an attacker's own conversations) say nothing of their rater, unless an expert or a
  labelling task judges them as well; a trigger word asked for and praised there is not found.
- **A model trained before a rater is found out** has learned what they said; the next snapshot has not."""


def spread(values: Sequence[float]) -> str:
    """A mean, with the lowest and the highest seed where there are several."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{mean(values):.3f} [{min(values):.3f}, {max(values):.3f}]"
