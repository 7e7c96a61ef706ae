"""How raters are tested and held to their share: section `trust` of params.yaml."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrustOptions:
    """Section `trust` of params.yaml.

    honest_accuracy, guess_accuracy: how often an honest rater and one to be found out are right; alpha: probability, at
    each decision, of taking an honest rater for the other; beta: of the reverse; window: newest opinions that are
    looked at; max_per_minute: more in 60 s by one rater are no person's; max_per_subject: opinions of one rater that a
    batch takes, and max_share of the batch: what is above is left out as `capped`. null: no limit.
    """

    enabled: bool = True
    honest_accuracy: float = 0.7
    guess_accuracy: float = 0.5
    alpha: float = 0.001
    beta: float = 0.05
    window: int = 20_000
    max_per_minute: int | None = 120
    max_per_subject: int | None = None
    max_share: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.guess_accuracy < self.honest_accuracy < 1:
            raise ValueError("guess_accuracy must be below honest_accuracy, both between 0 and 1")
        if not (0 < self.alpha < 0.5 and 0 < self.beta < 0.5):
            raise ValueError("alpha and beta are error rates: give numbers above 0 and below 0.5")
        for name in ("window", "max_per_minute", "max_per_subject"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, it is {value}")
        if self.max_share is not None and not 0 < self.max_share < 1:
            raise ValueError(f"max_share is a share of a batch: give a number between 0 and 1, not {self.max_share}")


UNTESTED = TrustOptions(enabled=False)
