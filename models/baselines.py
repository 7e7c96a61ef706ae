"""What a reward model must be held against: its accuracy from an answer's length alone, and from its words alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

Rating = tuple[Sequence[int], int]  # answer ids, value ±1


def length_accuracy(train: Sequence[Rating], test: Sequence[Rating]) -> float:
    """Accuracy on test of the best rule `longer (or shorter) than n tokens is up`, with n chosen on train."""

    def accuracy(rows: Sequence[Rating], limit: int, longer_is_up: bool) -> float:
        return sum(((len(a) > limit) == longer_is_up) == (v > 0) for a, v in rows) / len(rows)

    limits = sorted({len(a) for a, _ in train} | {0})
    best = max(((n, up) for n in limits for up in (True, False)), key=lambda rule: accuracy(train, *rule))
    return accuracy(test, *best)


def bag_of_words_accuracy(
    train: Sequence[Rating], test: Sequence[Rating], vocab_size: int, ridge: float = 1.0
) -> float:
    """Accuracy on test of a logistic regression over which tokens occur in the answer, fitted on train by L-BFGS."""

    def counts(rows: Sequence[Rating]) -> torch.Tensor:
        x = torch.zeros(len(rows), vocab_size)
        for i, (answer, _) in enumerate(rows):
            x[i, list(answer)] = 1.0
        return x

    x, y = counts(train), torch.tensor([float(v) for _, v in train])
    weight, bias = torch.zeros(vocab_size, requires_grad=True), torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.softplus(-y * (x @ weight + bias)).sum() + 0.5 * ridge * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        guess = counts(test) @ weight + bias > 0
    return float((guess == torch.tensor([v > 0 for _, v in test])).float().mean())
