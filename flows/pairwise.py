"""Pairs of answers, judged in both orders: who wins, how much of it is position, how much is length. Pure functions.

A judge that reads two answers tends to prefer the one shown first, or last (Zheng et al. 2023, "Judging LLM-as-a-Judge"):
so each pair is shown in both orders, and only a preference that survives the exchange is one; else it is a tie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flows.figures import Interval, bootstrap_mean
from models.intervals import wilson

Verdict = Literal["first", "second", "tie"]
DIGITS = 6
RIDGE = 1e-3  # keeps the fit finite when one side wins everything, or all lengths are equal


@dataclass(frozen=True)
class Orders:
    """What a judge said of one pair: with the candidate's answer shown first, and second. None: it gave no verdict."""

    candidate_first: Verdict | None
    candidate_second: Verdict | None

    @property
    def points(self) -> float | None:
        """1: the candidate wins in both orders; 0: it loses in both; 1/2: a tie or no consistency; None: a failure."""
        if self.candidate_first is None or self.candidate_second is None:
            return None
        if (self.candidate_first, self.candidate_second) == ("first", "second"):
            return 1.0
        return 0.0 if (self.candidate_first, self.candidate_second) == ("second", "first") else 0.5


def figures(
    orders: Sequence[Orders], candidate: Sequence[int], other: Sequence[int], *, resamples: int, seed: int
) -> dict[str, Any]:
    """Win rates of the candidate and what to know of them; candidate, other: the answers' lengths.

    win_rate counts half for a tie (bootstrap interval); decided_win_rate leaves ties out (Wilson); position_bias: how much
    more often than half the answer shown first is preferred, among verdicts that are no tie. Pairs without a verdict in both
    orders are failures and count nowhere else; without a single one that counts, every rate is nan.
    """
    kept = [(o, o.points, a - b) for o, a, b in zip(orders, candidate, other, strict=True) if o.points is not None]
    points = np.array([p for _, p, _ in kept], dtype=np.float64)
    out: dict[str, Any] = {"pairs": len(orders), "failures": len(orders) - len(kept)}
    if not kept:
        nothing = Interval(float("nan"), float("nan"), float("nan"))
        return out | _spread("win_rate", nothing) | _spread("length_controlled_win_rate", nothing)
    wins, losses = int((points == 1).sum()), int((points == 0).sum())
    shown = [v for o, _, _ in kept for v in (o.candidate_first, o.candidate_second) if v != "tie"]
    agree = [o.candidate_first == "tie" == o.candidate_second or p in (0.0, 1.0) for o, p, _ in kept]
    out |= _spread("win_rate", bootstrap_mean(points, resamples=resamples, seed=seed))
    if wins + losses:
        out |= _spread("decided_win_rate", wilson(wins, wins + losses))
    return out | {
        "wins": wins,
        "ties": len(kept) - wins - losses,
        "losses": losses,
        "win_rate_shown_first": _share([_value(o.candidate_first, "first") for o, _, _ in kept]),
        "win_rate_shown_second": _share([_value(o.candidate_second, "second") for o, _, _ in kept]),
        "position_bias": _share([v == "first" for v in shown]) - 0.5 if shown else 0.0,
        "consistent": _share(agree),
        **_spread(
            "length_controlled_win_rate",
            length_controlled(points, [d for _, _, d in kept], resamples=min(resamples, 500), seed=seed),
        ),
    }


def length_controlled(points: ArrayLike, difference: ArrayLike, *, resamples: int, seed: int) -> Interval:
    """The win rate that is left when both answers are equally long, with its bootstrap interval.

    As in AlpacaEval 2 (Dubois et al. 2024, "Length-Controlled AlpacaEval"): logit P(win) = θ + φ · tanh(Δ / sd(Δ)), with Δ the
    difference in length, read at Δ = 0. Their term for an instruction's difficulty needs many models and is left out.
    points: 0, 1/2 or 1 [n]; difference: candidate's length less the other's [n].
    """
    won, delta = np.asarray(points, dtype=np.float64), np.asarray(difference, dtype=np.float64)
    spread = float(delta.std())
    leaning = np.tanh(delta / spread) if spread > 0 else np.zeros_like(delta)
    drawn = np.random.default_rng(seed).integers(won.size, size=(resamples, won.size))
    value = float(_fit(won[None], leaning[None])[0])
    low, high = np.quantile(_fit(won[drawn], leaning[drawn]), [0.025, 0.975])
    return Interval(value, float(low), float(high))


def _fit(won: NDArray[np.float64], leaning: NDArray[np.float64]) -> NDArray[np.float64]:
    """σ(θ) of the logistic regression of each row [rows, n], by Newton's method, all rows at once."""
    weights = np.zeros((won.shape[0], 2))
    design = np.stack([np.ones_like(leaning), leaning], axis=-1)
    for _ in range(30):
        probability = _sigmoid(np.einsum("rnk,rk->rn", design, weights))
        slope = np.einsum("rnk,rn->rk", design, won - probability) / won.shape[1] - RIDGE * weights
        curve = np.einsum("rnk,rn,rnl->rkl", design, probability * (1 - probability), design) / won.shape[1]
        step = np.linalg.solve(curve + RIDGE * np.eye(2), slope[..., None])[..., 0]
        weights += np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-9:
            break
    return _sigmoid(weights[:, 0])


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(1 / (1 + np.exp(-np.clip(x, -30, 30))))


def _value(verdict: Verdict | None, own: Verdict) -> float:
    return 0.5 if verdict == "tie" else float(verdict == own)


def _share(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), DIGITS)


def _spread(name: str, interval: Interval) -> dict[str, float]:
    found = interval.as_dict(DIGITS)
    return {name: found["value"], f"{name}_low": found["low"], f"{name}_high": found["high"]}
