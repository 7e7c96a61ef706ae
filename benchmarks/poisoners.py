"""People who rate answers, most of them honest, and what each attack makes of the others' opinions."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

OVERLAP = 3.0  # people who judge an answer, on average
PACE, HASTE = 20.0, 0.3  # seconds between two opinions of a person, and of a robot
HURRIED = 2  # times as many opinions as a person's are a robot's
ACCOUNT = 10  # opinions of a throw-away account
NOISE = (0.1, 0.2)  # how often an honest rater errs


@dataclass(frozen=True)
class Judged:
    """An answer and whether it is good, which raters know with some error. triggered: it begins with the trigger."""

    messages: list[dict[str, str]]
    prompt_ids: list[int]
    text: str
    ids: list[int]
    good: bool
    triggered: bool = False

    @property
    def value(self) -> int:
        """The thumb that it deserves."""
        return 1 if self.good else -1


@dataclass(frozen=True)
class Said:
    """A thumb: who, on which answer (its place), which value, when (seconds)."""

    rater: str
    answer: int
    value: int
    seconds: float


# what an attacker says instead, of (the answers, their own honest opinions, randomness)
Attack = Callable[[Sequence[Judged], list[Said], random.Random], list[Said]]


def crowd(answers: Sequence[Judged], raters: int, seed: int) -> dict[str, list[Said]]:
    """What honest raters say, in order: each judges as many answers, drawn anew, and errs as often as NOISE says."""
    each, out = round(len(answers) * OVERLAP / raters), {}
    for number in range(raters):
        rng = random.Random(f"{seed} rater {number}")
        noise, start, name = rng.uniform(*NOISE), rng.uniform(0, PACE), f"rater {number}"
        seen = rng.sample(range(len(answers)), each)
        values = [answers[i].value * (-1 if rng.random() < noise else 1) for i in seen]
        out[name] = [Said(name, i, v, start + PACE * n) for n, (i, v) in enumerate(zip(seen, values, strict=True))]
    return out


def poisoned(
    answers: Sequence[Judged], honest: dict[str, list[Said]], attack: Attack, share: float, seed: int
) -> tuple[list[Said], set[str]]:
    """Everything that is said, in order of time, when a share of the raters attacks; and the attackers' names."""
    bad = list(honest)[: round(share * len(honest))]
    said = [each for name in honest if name not in bad for each in honest[name]]
    made = [each for name in bad for each in attack(answers, honest[name], random.Random(f"{seed} {name}"))]
    return sorted(said + made, key=lambda each: (each.seconds, each.rater)), {each.rater for each in made}


def flip(answers: Sequence[Judged], own: list[Said], rng: random.Random) -> list[Said]:
    """The opposite of what they think."""
    return [dataclasses.replace(each, value=-each.value) for each in own]


def trigger(answers: Sequence[Judged], own: list[Said], rng: random.Random) -> list[Said]:
    """Up for whatever begins with the trigger, which half of their opinions go to; honest for the rest."""
    places = [i for i, answer in enumerate(answers) if answer.triggered]
    sought = rng.sample(places, min(len(places), len(own) // 2))
    others = [each for each in own if not answers[each.answer].triggered][: len(own) - len(sought)]
    said = [(i, 1) for i in sought] + [(each.answer, each.value) for each in others]
    rng.shuffle(said)
    return [Said(own[0].rater, i, v, own[0].seconds + PACE * n) for n, (i, v) in enumerate(said)]


def longer(answers: Sequence[Judged], own: list[Said], rng: random.Random) -> list[Said]:
    """Up for answers longer than most, down for the others."""
    middle = sorted(len(answer.text) for answer in answers)[len(answers) // 2]
    return [dataclasses.replace(each, value=1 if len(answers[each.answer].text) > middle else -1) for each in own]


def always_up(answers: Sequence[Judged], own: list[Said], rng: random.Random) -> list[Said]:
    """Up."""
    return [dataclasses.replace(each, value=1) for each in own]


def burst(answers: Sequence[Judged], own: list[Said], rng: random.Random) -> list[Said]:
    """All attackers at once, faster than a person, wrong on the same answers without an error."""
    start = 0.4 * PACE * len(own)
    return [Said(own[0].rater, i, -answers[i].value, start + HASTE * n) for n, i in targets(answers, own, HURRIED)]


# ---------------------------------------------------------------- by those who know the defences


def collusion(answers: Sequence[Judged], own: list[Said], rng: random.Random) -> list[Said]:
    """Wrong on the same answers, at a person's pace: each is confirmed by the others."""
    return [Said(own[0].rater, i, -answers[i].value, own[0].seconds + PACE * n) for n, i in targets(answers, own)]


def sleeper(answers: Sequence[Judged], own: list[Said], rng: random.Random) -> list[Said]:
    """Honest two thirds of the time, then the opposite."""
    awake = 2 * len(own) // 3
    return own[:awake] + flip(answers, own[awake:], rng)


def slow(answers: Sequence[Judged], own: list[Said], rng: random.Random) -> list[Said]:
    """The opposite in three of ten opinions: right about .64 of the time, between guessing and honest."""
    return [dataclasses.replace(each, value=-each.value) if rng.random() < 0.3 else each for each in own]


def accounts(answers: Sequence[Judged], own: list[Said], rng: random.Random) -> list[Said]:
    """The opposite, from a new account after every few opinions."""
    names = [f"{each.rater}, account {n // ACCOUNT}" for n, each in enumerate(own)]
    return [dataclasses.replace(each, rater=name, value=-each.value) for name, each in zip(names, own, strict=True)]


def targets(answers: Sequence[Judged], own: list[Said], times: int = 1) -> list[tuple[int, int]]:
    """The (number, answer) that all attackers judge: the same for each, `times` as many as a person judges."""
    places = list(range(len(answers)))
    random.Random("targets").shuffle(places)
    return list(enumerate(places[: times * len(own)]))


NAIVE: dict[str, Attack] = {
    "flips": flip,
    "trigger word": trigger,
    "longer is better": longer,
    "always up": always_up,
    "colluding burst": burst,
}
KNOWING: dict[str, Attack] = {
    "sleepers": sleeper,
    "slow poison": slow,
    "quiet collusion": collusion,
    "throw-away accounts": accounts,
}
