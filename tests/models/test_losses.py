"""The chunked losses: their arithmetic in low precision, what they compute, and how little they keep. The optimizer."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models.losses import CHUNK, cross_entropy, log_probs
from models.optim import Optimizer, clip_norm, learning_rate

ROWS, WIDTH, WORDS = 3 * CHUNK + 40, 8, 50


class Largest(TorchDispatchMode):
    """Keeps the size of the largest tensor with the vocabulary's width that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.dim() == 2 and tensor.shape[1] == WORDS:
                self.rows = max(self.rows, tensor.shape[0])
        return out


def parts(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(ROWS, WIDTH, generator=g), torch.randn(WORDS, WIDTH, generator=g)
    targets = torch.randint(WORDS, (ROWS,), generator=g)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets, torch.full((ROWS,), 1 / ROWS)


def test_no_tensor_of_all_rows_by_the_vocabulary_is_made() -> None:
    hidden, weight, targets, weights = parts()
    with Largest() as seen:
        cross_entropy(hidden, weight, targets, weights).backward()
        log_probs(hidden, weight, targets).sum().backward()
    assert 0 < seen.rows <= CHUNK


def test_losses_of_bf16_numbers_are_summed_in_fp32() -> None:
    """In bf16, 3 + 1/512 is 3: a sum of many small terms stops growing, and a ratio of policies is off by a percent."""
    hidden, weight, targets, weights = parts(torch.bfloat16)
    logits = torch.nn.functional.linear(hidden, weight).float()
    nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    loss = cross_entropy(hidden, weight, targets, weights)
    logp = log_probs(hidden, weight, targets)
    assert loss.dtype == logp.dtype == torch.float32
    torch.testing.assert_close(loss, nll.mean(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logp, -nll, atol=1e-5, rtol=1e-5)
    expected = torch.autograd.grad(nll.mean(), (hidden, weight))
    for got, want in zip(torch.autograd.grad(loss, (hidden, weight)), expected, strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got, want, atol=2e-3, rtol=0.05)


def test_a_frozen_output_layer_gets_no_gradient_and_the_rest_stays() -> None:
    hidden, weight, targets, weights = parts()
    frozen = weight.detach()
    for loss in (
        lambda w: cross_entropy(hidden, w, targets, weights),
        lambda w: (log_probs(hidden, w, targets) * weights).sum(),
    ):
        [with_both, _] = torch.autograd.grad(loss(weight), (hidden, weight))
        [alone] = torch.autograd.grad(loss(frozen), (hidden,))
        assert torch.equal(alone, with_both)
    with torch.inference_mode():
        assert cross_entropy(hidden, weight, targets, weights) == cross_entropy(
            hidden.detach(), frozen, targets, weights
        )


def test_the_schedule_at_its_corners() -> None:
    """Warm-up of 4 to 1, then down to a tenth over the 16 that remain: half way is (1 + .1)/2 for both shapes."""
    for shape in ("cosine", "linear"):
        rates = [learning_rate(step, 20, 1.0, 4, shape=shape) for step in range(21)]
        assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
        assert (rates[12], rates[20]) == pytest.approx((0.55, 0.1))
    assert learning_rate(8, 20, 1.0, 4) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert learning_rate(19, 20, 1.0, 4, shape="constant") == 1.0


def test_the_rate_reaches_every_group_of_parameters() -> None:
    """Bug of others: the schedule sets the first group alone. AdamW's first step is lr·sign(g), less lr·decay·w."""
    layer = torch.nn.Linear(2, 2)
    for p in layer.parameters():
        torch.nn.init.constant_(p, 1.0)
    optimizer = Optimizer(layer, weight_decay=0.5, eps=1e-12)
    (layer.weight.sum() + layer.bias.sum()).backward()
    norm, taken = optimizer.step(0.1, clip=1e9)
    assert (norm, taken) == (pytest.approx(math.sqrt(6)), True)
    torch.testing.assert_close(layer.bias.detach(), torch.full((2,), 0.9))  # no decay on vectors
    torch.testing.assert_close(layer.weight.detach(), torch.full((2, 2), 1 - 0.1 * 0.5 - 0.1))


def test_the_norm_is_clipped_over_all_gradients_together() -> None:
    first, second = torch.zeros(1, requires_grad=True), torch.zeros(2, requires_grad=True)
    first.grad, second.grad = torch.tensor([3.0]), torch.tensor([0.0, 4.0])
    assert clip_norm([first, second], 1.0) == 5.0
    torch.testing.assert_close(torch.cat([first.grad, second.grad]), torch.tensor([0.6, 0.0, 0.8]))
    assert clip_norm([first, second], 2.0) == pytest.approx(1.0)
    torch.testing.assert_close(first.grad, torch.tensor([0.6]))


def test_an_unlikely_target_has_a_finite_loss() -> None:
    """Its probability is 0 in fp32: −log p read off it would be infinite. By hand: 200 − 0 + log(1 + e⁻²⁰⁰) = 200."""
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[200.0], [0.0]])
    assert cross_entropy(hidden, weight, torch.tensor([1]), torch.ones(1)).item() == 200.0
    assert log_probs(hidden, weight, torch.tensor([1])).item() == -200.0
    assert cross_entropy(hidden, weight, torch.tensor([0]), torch.ones(1)).item() == 0.0
