"""Trust: how often each rater is right, and a sequential test that finds those who are so no more often than by guessing.

What is right is known where an expert judged the same answer (gold), and estimated where several people judged the same,
by the model of Dawid and Skene (Maximum Likelihood Estimation of Observer Error-Rates Using the EM Algorithm, 1979) with
one accuracy a rater and a prior. Opinions that nobody else judged tell nothing of their raters.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import combinations, groupby, product
from typing import Any

import sqlalchemy as sa

from feedback import agreement, opinions
from feedback.agreement import Judgement, by_unit
from feedback.tables import CompletionRow, EventRow, FeedbackRow, TaskAnswerRow, TaskRow, table_of
from feedback.trust_options import TrustOptions

feedback = table_of(FeedbackRow)
completion = table_of(CompletionRow)
event_log = table_of(EventRow)
task, task_answer = table_of(TaskRow), table_of(TaskAnswerRow)

Unit = tuple[str, ...]
TESTED = ("human_user",)  # simulated raters and judging models are the operator's own; experts are the gold
# accuracy a rater is taken to have before anything is known of them: Beta(8, 2), mean .8
PRIOR_RIGHT, PRIOR_WRONG = 8.0, 2.0
ROUNDS = 25
CHUNK = 500
TRUST = sa.update(feedback).where(feedback.c.id == sa.bindparam("of")).values(trust=sa.bindparam("to"))


@dataclass(frozen=True)
class Rater:
    """What is known of one rater. accuracy: posterior mean; trust: accuracy over the prior's, at most 1; compared:
    judgements that gold or others speak to; llr: log-likelihood ratio of the test (guessing over honest); why: the reason
    to quarantine, empty for none.
    """

    subject: str
    opinions: int
    compared: int
    gold: int
    accuracy: float
    trust: float
    llr: float
    why: str = ""


@dataclass(frozen=True)
class Review:
    """What a review found and did: all raters of the window, and how many opinions were put in quarantine."""

    raters: list[Rater] = field(default_factory=list)
    quarantined: int = 0


def review(connection: sa.Connection, options: TrustOptions, *, act: bool = True) -> Review:
    """Look at the newest opinions, write each rater's trust, and quarantine all that raters who were found out said.

    What earlier batches accepted of them is quarantined too: the next batch notes it as revised, and its snapshot leaves it
    out. Runs under the store's write lock, before a batch is opened. A moderator who accepts an opinion of a rater restarts the
    rater's test from there, and that opinion stays accepted. act=False only looks.
    """
    if not options.enabled:
        return Review()
    rows = newest(connection, options.window)
    cleared = acceptances(connection, {row.subject for row in rows if row.source in TESTED})
    found = examine(rows, gold(connection, rows), cleared, options)
    if not act:
        return Review(found)
    raters = {rater.subject: rater for rater in found}
    tested = [(row, raters[row.subject]) for row in rows if row.source in TESTED]
    changed = [{"of": row.id, "to": rater.trust} for row, rater in tested if abs(row.trust - rater.trust) > 0.005]
    if changed:  # in one call: others wait for the write lock
        connection.execute(TRUST, changed)
    quarantined = 0
    for row, rater in tested:
        if rater.why and row.moderation == "accepted" and row.last_seq > cleared.get(row.subject, 0):
            opinions.moderate(connection, row.id, "quarantined", rater.why)
            quarantined += 1
    return Review(found, quarantined)


def most_per_rater(counts: Mapping[str, int], free: int, options: TrustOptions) -> int:
    """How many opinions of one rater a batch takes at most.

    counts: rater -> opinions; free: opinions of others, who are not held to it. The share holds of what is left after it
    was applied; it does not apply where too few raters speak for it to be met (fewer than 1 / max_share).
    """
    most = max(counts.values(), default=0)
    if not options.enabled:
        return most
    if options.max_per_subject is not None:
        most = min(most, options.max_per_subject)
    if options.max_share is not None and (free or len(counts) * options.max_share >= 1):
        while most > 1:
            allowed = int(options.max_share * (free + sum(min(number, most) for number in counts.values())))
            if allowed >= most:
                break
            most = max(1, allowed)
    return most


# ---------------------------------------------------------------- reading


def newest(connection: sa.Connection, window: int) -> list[sa.Row[Any]]:
    """The newest opinions of people that were not taken back, in the order in which they were last said.

    Without imported ones; but the answers of gold tasks come from files, and those who rank them are tested.
    """
    names = ("id", "completion_id", "subject", "kind", "other", "value", "ranked", "source", "trust", "moderation")
    query = (
        sa.select(*(feedback.c[name] for name in names), feedback.c.last_seq, feedback.c.created_at)
        .join(completion, completion.c.id == feedback.c.completion_id)
        .where(
            feedback.c.source.in_(agreement.PEOPLE),
            feedback.c.kind.in_(("thumb", "comparison", "ranking")),
            sa.not_(feedback.c.retracted),
            feedback.c.moderation.in_(("accepted", "quarantined")),
            sa.or_(completion.c.origin != "import", feedback.c.kind == "ranking"),
        )
        .order_by(feedback.c.last_seq.desc())
        .limit(window)
    )
    return list(connection.execute(query))[::-1]


def gold(connection: sa.Connection, rows: Iterable[Any]) -> dict[Unit, int]:
    """unit -> what experts judged it to be (1 or -1), for units of `rows`; nothing where they differ.

    Gold tasks of the labelling page count as an expert's ranking.
    """
    answers = sorted({row.completion_id for row in rows})
    votes: dict[Unit, int] = defaultdict(int)
    for unit, value in gold_pairs(connection):
        votes[unit] += value
    for start in range(0, len(answers), CHUNK):
        query = sa.select(feedback).where(
            feedback.c.completion_id.in_(answers[start : start + CHUNK]),
            sa.or_(feedback.c.kind == "expert", feedback.c.source == "human_expert"),
            sa.not_(feedback.c.retracted),
            feedback.c.moderation == "accepted",
        )
        for row in connection.execute(query):
            if row.kind == "expert":
                votes[("thumb", row.completion_id)] += row.value
            else:
                for each in agreement.judgements(row):
                    votes[each.unit] += each.value
    return {unit: 1 if vote > 0 else -1 for unit, vote in votes.items() if vote}


def gold_pairs(connection: sa.Connection) -> Iterator[tuple[Unit, int]]:
    """The pairs whose order the gold tasks know."""
    query = (
        sa.select(task.c.id, task.c.expected, task_answer.c.place, task_answer.c.completion_id)
        .join(task_answer, task_answer.c.task_id == task.c.id)
        .where(task.c.gold)
        .order_by(task.c.id)
    )
    for _, rows in groupby(connection.execute(query), key=lambda row: row.id):
        answers = list(rows)
        ids = {row.place: row.completion_id for row in answers}
        groups = [[ids[place] for place in group if place in ids] for group in answers[0].expected]
        for better, worse in combinations(groups, 2):
            for one, two in product(better, worse):
                yield ("pair", *sorted((one, two))), 1 if one < two else -1


def acceptances(connection: sa.Connection, subjects: set[str]) -> dict[str, int]:
    """subject -> number of the newest event by which a moderator accepted an opinion of theirs."""
    found: dict[str, int] = {}
    names = sorted(subjects)
    for start in range(0, len(names), CHUNK):
        query = (
            sa.select(event_log.c.subject, event_log.c.seq, event_log.c.payload)
            .join(feedback, feedback.c.id == event_log.c.feedback_id)
            .where(feedback.c.subject.in_(names[start : start + CHUNK]), event_log.c.op == "moderate")
        )
        for row in connection.execute(query):
            if row.payload["moderation"] == "accepted":
                found[row.subject] = max(found.get(row.subject, 0), row.seq)
    return found


# ---------------------------------------------------------------- judging


def examine(
    rows: Iterable[Any], known: Mapping[Unit, int], cleared: Mapping[str, int], options: TrustOptions
) -> list[Rater]:
    """All tested raters of `rows`, least trusted first. known: gold; cleared: what to leave out of the test, up to a number.

    Quarantined opinions count for their rater's own record, never as what others are measured by.
    """
    rows = list(rows)
    mine = [row for row in rows if row.source in TESTED]
    said = [(each, row.moderation) for row in mine for each in agreement.judgements(row)]
    units = by_unit(each for each, moderation in said if moderation == "accepted")
    accuracy = accuracies(units, known)
    priors = shares_of_up(units)
    numbers, by_rater = Counter(row.subject for row in mine), defaultdict(list)
    for each, _ in said:
        by_rater[each.rater].append(each)
    rushed = bursts(mine, cleared, options.max_per_minute)
    raters = []
    for subject in numbers:
        spoken = [(each, right(each, units, known, accuracy, priors)) for each in by_rater[subject]]
        heard_of = [(each, share) for each, share in spoken if share is not None]
        tested = [(each, share) for each, share in heard_of if each.seq > cleared.get(subject, 0)]
        llr, crossed = sprt([share for _, share in tested], options)
        mean = posterior(share for _, share in heard_of)
        why = rushed.get(subject, "")
        if crossed:
            why = sentence(len(tested), mean, llr, options)
        raters.append(
            Rater(
                subject=subject,
                opinions=numbers[subject],
                compared=len(heard_of),
                gold=sum(each.unit in known for each, _ in heard_of),
                accuracy=round(mean, 4),
                trust=round(min(1.0, mean * (PRIOR_RIGHT + PRIOR_WRONG) / PRIOR_RIGHT), 4),
                llr=round(llr, 3),
                why=why,
            )
        )
    return sorted(raters, key=lambda rater: (rater.trust, rater.subject))


def shares_of_up(units: Mapping[Unit, Mapping[str, int]]) -> dict[str, float]:
    """Kind of unit -> prior probability that it is a 1: of thumbs the share of ups, of pairs a half (no side is the better)."""
    thumbs = [value for unit, said in units.items() if unit[0] == "thumb" for value in said.values()]
    up = sum(value == 1 for value in thumbs)
    return {"thumb": min(0.95, max(0.05, (up + 1) / (len(thumbs) + 2))), "pair": 0.5}


def accuracies(units: Mapping[Unit, Mapping[str, int]], known: Mapping[Unit, int]) -> dict[str, float]:
    """rater -> probability of being right, by EM over the units that gold or several people speak to.

    A rater's own vote is left out of what it is measured by: with two raters a unit it would count as half of its proof.
    """
    priors = shares_of_up(units)
    shared = {unit: said for unit, said in units.items() if unit in known or len(said) >= 2}
    votes: dict[str, list[Judgement]] = defaultdict(list)
    for unit, said in shared.items():
        for rater, value in said.items():
            votes[rater].append(Judgement(unit, rater, value, 0))
    found = dict.fromkeys(votes, PRIOR_RIGHT / (PRIOR_RIGHT + PRIOR_WRONG))
    for _ in range(ROUNDS):
        found = {
            rater: posterior(right(each, shared, known, found, priors) for each in each_of)
            for rater, each_of in votes.items()
        }
    return found


def right(
    judgement: Judgement,
    units: Mapping[Unit, Mapping[str, int]],
    known: Mapping[Unit, int],
    accuracy: Mapping[str, float],
    priors: Mapping[str, float],
) -> float | None:
    """Probability that a judgement is right, by gold, else by what the others said of the unit; None: nobody else did.

    Somebody who is wrong more often than not is left unheard, not read the other way round: that could be played.
    """
    if judgement.unit in known:
        return float(known[judgement.unit] == judgement.value)
    others = {rater: value for rater, value in units.get(judgement.unit, {}).items() if rater != judgement.rater}
    if not others:
        return None
    prior = priors[judgement.unit[0]]
    log_odds = math.log(prior / (1 - prior))
    for rater, value in others.items():
        p = min(0.99, max(0.5, accuracy.get(rater, PRIOR_RIGHT / (PRIOR_RIGHT + PRIOR_WRONG))))
        log_odds += value * math.log(p / (1 - p))
    return 1 / (1 + math.exp(-judgement.value * log_odds))


def posterior(shares: Iterable[float | None]) -> float:
    """Mean of the Beta posterior of an accuracy, given how likely each judgement was right."""
    heard = [share for share in shares if share is not None]
    return (PRIOR_RIGHT + sum(heard)) / (PRIOR_RIGHT + PRIOR_WRONG + len(heard))


def sprt(shares: Iterable[float], options: TrustOptions) -> tuple[float, bool]:
    """Wald's sequential probability ratio test of guess_accuracy against honest_accuracy, begun anew whenever it finds
    the rater honest (so that who turns later is found out too). Returns the last log-likelihood ratio, and whether the
    upper bound was ever crossed.

    shares: for each judgement in order, the probability q that it was right; its likelihood under accuracy p is
    p q + (1 - p)(1 - q). Wald, Sequential Tests of Statistical Hypotheses (1945).
    """
    upper, lower = math.log((1 - options.beta) / options.alpha), math.log(options.beta / (1 - options.alpha))
    ratio = 0.0
    for q in shares:
        guessing = options.guess_accuracy * q + (1 - options.guess_accuracy) * (1 - q)
        honest = options.honest_accuracy * q + (1 - options.honest_accuracy) * (1 - q)
        ratio += math.log(guessing / honest)
        if ratio >= upper:
            return ratio, True
        if ratio <= lower:
            ratio = 0.0
    return ratio, False


def bursts(rows: Iterable[Any], cleared: Mapping[str, int], most: int | None) -> dict[str, str]:
    """subject -> why, for those who first said more than `most` opinions within 60 seconds."""
    if most is None:
        return {}
    times: dict[str, list[datetime]] = defaultdict(list)
    for row in rows:
        if row.last_seq > cleared.get(row.subject, 0):
            times[row.subject].append(row.created_at)
    found = {}
    for subject, moments in times.items():
        moments.sort()
        spans = zip(moments, moments[most:], strict=False)
        if any(late - early < timedelta(seconds=60) for early, late in spans):
            found[subject] = f"burst: more than {most} opinions within a minute"
    return found


def sentence(number: int, accuracy: float, llr: float, options: TrustOptions) -> str:
    """Why the test found a rater out, for moderators."""
    return (
        f"outlier: in {number} judgements that experts or others spoke to, right with probability {accuracy:.2f}; "
        f"{math.exp(min(llr, 50)):.0f} times likelier for one who is right {options.guess_accuracy:.0%} of the time than "
        f"for one who is right {options.honest_accuracy:.0%} (error rate {options.alpha})"
    )
