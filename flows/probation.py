"""The probation of a champion: when people like it less than the one before, it is rolled back without hands.

A promotion is decided on simulated or judged answers; what people then say of the answers that they get is the last
word. Each reign that began with a promotion is one sequential test (sequential.py) of its own.
"""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from feedback import live
from feedback.tables import SOURCES
from flows.sequential import Evidence, evidence

if TYPE_CHECKING:
    from feedback.promotions import Promotion
    from feedback.store import Store

log = logging.getLogger("thumbwheel.probation")


@dataclass(frozen=True)
class ProbationOptions:
    """Section `probation` of params.yaml: when a champion that people like less is rolled back by itself.

    alpha: probability of rolling back a champion that is no worse, over its whole reign; min_thumbs: before so many of the
    new champion nothing is decided; per_person: thumbs of one person that count, for each model (null: all, as the simulated
    rater is one person); sources: whose count.
    """

    enabled: bool = True
    alpha: float = 0.01
    min_thumbs: int = 30
    per_person: int | None = 20
    sources: list[str] = field(default_factory=lambda: ["human_user", "human_expert"])

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha is a probability above 0 and below 1, not {self.alpha}")
        for name in ("min_thumbs", "per_person"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, it is {value}")
        unknown = [source for source in self.sources if source not in SOURCES]
        if unknown or not self.sources:
            raise ValueError(f"sources must name some of {', '.join(SOURCES)}, not {', '.join(unknown) or 'nothing'}")


@dataclass(frozen=True)
class Probation:
    """How the reigning champion stands beside the one before: thumbs, rates (nan: none yet), evidence against it."""

    champion: str
    before: str | None
    since: datetime
    thumbs: int
    rate: float
    before_thumbs: int
    before_rate: float
    evidence: Evidence
    failed: bool

    def as_dict(self) -> dict[str, Any]:
        """For a promotion's row and for `thumbwheel status --json`; no number is nan."""
        numbers = {"rate": self.rate, "before_rate": self.before_rate}
        plain = {name: None if math.isnan(value) else round(value, 6) for name, value in numbers.items()}
        return {**asdict(self), "since": self.since.isoformat(), **plain}


def examine(store: Store, options: ProbationOptions) -> Probation | None:
    """Look at the reigning champion's thumbs and at those of the one before; None before the first promotion.

    The old ones are those given before the promotion, the newest first: an order that what came later cannot change.
    A champion that came back by a rollback is on no probation: it has just been found the better one.
    """
    reigning = store.champion()
    if reigning is None:
        return None
    per_person = options.per_person
    with store.read() as connection:
        new = live.thumbs(
            connection, reigning.model_hash, options.sources, since=reigning.created_at, per_person=per_person
        )
        old = live.thumbs(
            connection, reigning.from_hash or "", options.sources, before=reigning.created_at, per_person=per_person
        )
    found = evidence(new, old[::-1])
    tested = options.enabled and reigning.action == "promote" and len(new) >= options.min_thumbs
    return Probation(
        champion=reigning.model_hash,
        before=reigning.from_hash,
        since=reigning.created_at,
        thumbs=len(new),
        rate=_rate(new),
        before_thumbs=len(old),
        before_rate=_rate(old),
        evidence=found,
        failed=tested and found.value >= 1 / options.alpha,
    )


def watch(store: Store, options: ProbationOptions) -> Promotion | None:
    """Roll the champion back when it failed; the row, or None. Whoever promoted another meanwhile is left alone."""
    from feedback.store import StaleChampion

    found = examine(store, options) if options.enabled else None
    if found is None or not found.failed:
        return None
    reason = (
        f"by itself: {found.rate:.1%} of {found.thumbs} thumbs are up, {found.before_rate:.1%} of {found.before_thumbs} "
        f"were before; {found.evidence.against} pairs against it, {found.evidence.for_it} for it: evidence "
        f"{found.evidence.value:.4g}, and {1 / options.alpha:.4g} is enough (false alarms at most {options.alpha:g})"
    )
    try:
        row = store.rollback(reason, expected_champion=found.champion, figures={"probation": found.as_dict()})
    except StaleChampion:
        return None
    log.warning("champion %s was rolled back %s", found.champion[:12], reason)
    return row


def _rate(thumbs: list[bool]) -> float:
    return sum(thumbs) / len(thumbs) if thumbs else math.nan
