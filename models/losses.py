"""Cross-entropy and log-probabilities through the output layer by chunks of rows: no [rows, vocabulary] tensor is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 512  # rows: logits of a chunk stay in the cache, and a matrix product of this height runs near its peak


def _nll_and_softmax(logits: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """−log softmax at the targets at [rows, 1] → [rows], and the softmax [rows, V] in the logits' own memory (fp32).

    The normalizer is read off the largest probability, which is at least 1/V: −log p of an unlikely target would be infinite.
    """
    top, target = logits.amax(-1), logits.gather(1, at)[:, 0]
    p = torch.softmax(logits, dim=-1, out=logits)
    return top - p.amax(-1).log() - target, p


class _Chunks:
    """The output layer by chunks of rows, in hidden's precision, and what gradients of the logits make of hidden and weight."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, needed: Sequence[bool]
    ) -> None:
        self.hidden, self.weight, self.targets, self.temperature = hidden, weight.to(hidden.dtype), targets, temperature
        self.grad_hidden = torch.empty_like(hidden) if needed[0] else None
        self.grad_weight = torch.zeros_like(weight) if needed[1] else None

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Each chunk's rows, −log p of its targets, and its softmax, which the next step may write into."""
        for start in range(0, self.hidden.shape[0], CHUNK):
            rows = slice(start, min(start + CHUNK, self.hidden.shape[0]))
            logits = F.linear(self.hidden[rows], self.weight).float()
            if self.temperature != 1:
                logits.div_(self.temperature)
            yield rows, *_nll_and_softmax(logits, self.targets[rows, None])

    def pull(self, rows: slice, p: Tensor, slope: Tensor) -> None:
        """Take in the gradient of a loss with the slope [chunk] by −log p: slope·(p − 1 at the target), which p becomes.

        The slopes go to the narrow side of the products, which has fewer numbers than the logits.
        """
        at = self.targets[rows, None]
        grad = p.scatter_add_(1, at, p.new_full(at.shape, -1.0)).to(self.hidden.dtype)
        slope = (slope / self.temperature).to(self.hidden.dtype)[:, None]
        if self.grad_hidden is not None:
            torch.mm(grad, self.weight, out=self.grad_hidden[rows]).mul_(slope)
        if self.grad_weight is None:
            return
        if self.grad_weight.dtype == self.hidden.dtype:
            self.grad_weight.addmm_(grad.t(), self.hidden[rows] * slope)
        else:
            self.grad_weight += torch.mm(grad.t(), self.hidden[rows] * slope)


class _CrossEntropy(torch.autograd.Function):
    """Σ weight·nll with the gradient made in the forward pass, so that each chunk's logits are made once."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, learning: bool) -> Tensor:
        chunks = _Chunks(hidden, weight, targets, 1.0, [learning and needed for needed in ctx.needs_input_grad])
        total = hidden.new_zeros((), dtype=torch.float32)
        for rows, nll, p in chunks:
            total += nll @ weights[rows]
            chunks.pull(rows, p, weights[rows])
        ctx.save_for_backward(chunks.grad_hidden, chunks.grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        scaled = [None if g is None else g * grads[0] for g in ctx.saved_tensors]
        return *scaled, None, None, None


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Σ_i weights_i · (−log softmax(hidden_i · weightᵀ)[targets_i]).

    hidden [rows, d], weight [V, d], targets [rows], weights [rows]: for a mean over N tokens of the whole batch, give
    1/N for tokens in the loss (the global count, not each micro-batch's own). Returns a scalar in fp32 whatever the inputs.
    """
    return _CrossEntropy.apply(hidden, weight, targets, weights, torch.is_grad_enabled())


class _LogProbs(torch.autograd.Function):
    """log-probabilities whose backward makes the logits again, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> Tensor:
        out = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        for rows, nll, _ in _Chunks(hidden, weight, targets, temperature, (False, False)):
            torch.neg(nll, out=out[rows])
        ctx.save_for_backward(hidden, weight, targets)
        ctx.temperature = temperature
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        hidden, weight, targets = ctx.saved_tensors
        chunks = _Chunks(hidden, weight, targets, ctx.temperature, ctx.needs_input_grad)
        for rows, _, p in chunks:
            chunks.pull(rows, p, -grads[0][rows])
        return chunks.grad_hidden, chunks.grad_weight, None, None


def log_probs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(hidden · weightᵀ / temperature) at the targets: [rows, d], [V, d], [rows] → [rows] in fp32.

    The temperature divides logits everywhere a policy is asked (sampling, ratio, KL), as in Ziegler et al. 2019.
    """
    return _LogProbs.apply(hidden, weight, targets, temperature)


class _LogProbLoss(torch.autograd.Function):
    """A loss of log-probabilities with its gradient made in the forward pass, so that each chunk's logits are made once."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        losses: Callable[[Tensor, slice], Tensor],
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        chunks = _Chunks(hidden, weight, targets, temperature, ctx.needs_input_grad)
        total = hidden.new_zeros((), dtype=torch.float32)
        out = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        for rows, nll, p in chunks:
            with torch.enable_grad():
                chosen = nll.neg_().requires_grad_()
                loss = losses(chosen, rows).sum()
                (slope,) = torch.autograd.grad(loss, chosen)
            total += loss.detach()
            out[rows] = chosen.detach()
            chunks.pull(rows, p, -slope)
        ctx.save_for_backward(chunks.grad_hidden, chunks.grad_weight)
        ctx.mark_non_differentiable(out)
        return total, out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        scaled = [None if g is None else g * grads[0] for g in ctx.saved_tensors]
        return *scaled, None, None, None


def log_prob_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    losses: Callable[[Tensor, slice], Tensor],
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The sum of losses(logp of a chunk, its rows), a loss of each token by its own log-probability alone, and logp [rows].

    The arguments are those of log_probs; `losses` takes [chunk] in fp32 and gives [chunk]. The gradient goes to hidden and
    weight; what is known of logp is for statistics. One product with the output layer less than log_probs and its backward.
    """
    return _LogProbLoss.apply(hidden, weight, targets, losses, temperature)
