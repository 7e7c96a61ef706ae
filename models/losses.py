"""Cross-entropy and log-probabilities through the output layer by chunks of rows: no [rows, vocabulary] tensor is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 512  # rows: logits of a chunk stay in the cache, and a matrix product of this height runs near its peak


class _CrossEntropy(torch.autograd.Function):
    """Σ weight·nll with the gradient made in the forward pass, so that each chunk's logits are made once."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, learning: bool) -> Tensor:
        for_hidden, for_weight = (learning and needed for needed in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if for_hidden else None
        grad_weight = torch.zeros_like(weight) if for_weight else None
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, hidden.shape[0], CHUNK):
            rows = slice(start, start + CHUNK)
            logits = F.linear(hidden[rows], weight).float()
            logp = torch.log_softmax(logits, dim=-1)
            total -= (logp.gather(1, targets[rows, None])[:, 0] * weights[rows]).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            grad = logp.exp_()
            grad.scatter_add_(1, targets[rows, None], grad.new_full((grad.shape[0], 1), -1.0))
            grad.mul_(weights[rows, None])
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight.addmm_(grad.t(), hidden[rows])
        ctx.save_for_backward(grad_hidden, grad_weight)
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
        for start in range(0, hidden.shape[0], CHUNK):
            rows = slice(start, start + CHUNK)
            logits = F.linear(hidden[rows], weight).float() / temperature
            out[rows] = logits.gather(1, targets[rows, None])[:, 0] - logits.logsumexp(-1)
        ctx.save_for_backward(hidden, weight, targets)
        ctx.temperature = temperature
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        hidden, weight, targets = ctx.saved_tensors
        (grad_out,) = grads
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for start in range(0, hidden.shape[0], CHUNK):
            rows = slice(start, start + CHUNK)
            p = torch.softmax(F.linear(hidden[rows], weight).float() / ctx.temperature, dim=-1).neg_()
            p.scatter_add_(1, targets[rows, None], p.new_ones((p.shape[0], 1)))
            p.mul_(grad_out[rows, None] / ctx.temperature)
            p = p.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(p, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight.addmm_(p.t(), hidden[rows])
        return grad_hidden, grad_weight, None, None


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
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        total = hidden.new_zeros((), dtype=torch.float32)
        out = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        for start in range(0, hidden.shape[0], CHUNK):
            rows = slice(start, min(start + CHUNK, hidden.shape[0]))
            logits = F.linear(hidden[rows], weight).float()
            logp = torch.log_softmax(logits if temperature == 1 else logits.div_(temperature), dim=-1)
            with torch.enable_grad():
                chosen = logp.gather(1, targets[rows, None])[:, 0].requires_grad_()
                loss = losses(chosen, rows).sum()
                (slope,) = torch.autograd.grad(loss, chosen)
            total += loss.detach()
            out[rows] = chosen.detach()
            slope = slope[:, None] / temperature
            grad = logp.exp_().mul_(-slope).scatter_add_(1, targets[rows, None], slope).to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight.addmm_(grad.t(), hidden[rows])
        ctx.save_for_backward(grad_hidden, grad_weight)
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
