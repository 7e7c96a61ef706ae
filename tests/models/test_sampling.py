"""Sampling against a cumulative sum in double precision, against transformers' filters, and on many draws."""

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from transformers import TopKLogitsWarper, TopPLogitsWarper

from models import device_decoder
from models.sampling import Sampler, Sampling, Settings


def drawn(logits: np.ndarray, samplings: list[Sampling]) -> tuple[np.ndarray, np.ndarray]:
    """One token for every row."""
    rows, vocabulary = logits.shape
    settings, sampler = Settings(rows, 1), Sampler(rows, vocabulary)
    for row, sampling in enumerate(samplings):
        settings.begin(row, sampling)
    sampler.logits(rows)[...] = logits
    return sampler.draw(settings, slice(0, rows))


def plain(number: float, top_k: int = 0, top_p: float = 1.0) -> Sampling:
    return Sampling(1.0, top_k, top_p, np.array([number]))


@pytest.mark.parametrize("vocabulary", [2, 127, 128, 129, 300, 5000])
def test_the_two_levels_invert_the_cumulative_distribution(vocabulary: int) -> None:
    rng = np.random.default_rng(vocabulary)
    logits = (rng.standard_normal((400, vocabulary)) * rng.choice([0.1, 1, 5], (400, 1))).astype(np.float32)
    numbers = np.concatenate(([0.0, 1 - 2**-53], rng.random(398)))
    ids, logprobs = drawn(logits, [plain(u) for u in numbers])
    exact = logits.astype(np.float64)
    p = np.exp(exact - exact.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    edges = p.cumsum(1)
    at = np.arange(400)
    assert logprobs == pytest.approx(np.log(p[at, ids]), abs=1e-5)
    below = np.where(ids > 0, edges[at, ids - 1], 0.0)
    assert (below <= numbers + 1e-6).all() and (numbers <= edges[at, ids] + 1e-6).all()
    expected = np.minimum((edges <= numbers[:, None]).sum(1), vocabulary - 1)
    near = np.abs(edges - numbers[:, None]).min(1) < 1e-6  # an edge so near that single precision may decide otherwise
    assert (ids == expected)[~near].all() and near.mean() < 0.2
    on_device = device_decoder.invert(torch.from_numpy(np.exp(logits)), torch.from_numpy(numbers)).numpy()
    assert (on_device == expected)[~near].all()


def test_many_draws_have_the_frequencies_of_softmax() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal(500).astype(np.float32) * 1.5
    p = torch.softmax(torch.from_numpy(logits).double(), 0).numpy()
    rows, counts = 2000, np.zeros(500)
    for _ in range(50):
        ids, _ = drawn(np.tile(logits, (rows, 1)), [plain(u) for u in rng.random(rows)])
        counts += np.bincount(ids, minlength=500)
    expected = p * counts.sum()
    enough = expected >= 5
    statistic = ((counts - expected) ** 2 / expected)[enough].sum()
    assert statistic < chi2.ppf(0.999, enough.sum() - 1)


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(1, 1.0), (7, 1.0), (0, 0.9), (0, 0.3), (20, 0.8), (400, 0.99), (0, 1e-9)]
)
def test_the_filters_keep_what_transformers_keeps(top_k: int, top_p: float) -> None:
    """All its tokens are drawn with the probabilities that its processors leave, top-k before top-p."""
    rng = np.random.default_rng(top_k)
    logits = rng.standard_normal(400).astype(np.float32) * 2
    scores = torch.from_numpy(logits)[None]
    for wanted, warper in ((top_k, TopKLogitsWarper), (top_p if top_p < 1 else 0, TopPLogitsWarper)):
        scores = warper(wanted)(None, scores) if wanted else scores
    p = torch.softmax(scores[0].double(), 0).numpy()
    numbers = (np.arange(4000) + 0.5) / 4000
    ids, logprobs = drawn(np.tile(logits, (4000, 1)), [plain(u, top_k, top_p) for u in numbers])
    assert logprobs == pytest.approx(np.log(p[ids]), abs=1e-5)
    assert (np.abs(np.bincount(ids, minlength=400) / 4000 - p) <= 1 / 4000 + 1e-6).all()
    logp = torch.log_softmax(torch.from_numpy(logits), 0)[None]
    kept = device_decoder.keep_top(logp, torch.tensor([top_k]), torch.tensor([top_p]))[0]
    assert torch.exp(kept).double().numpy() == pytest.approx(p, abs=1e-6)


def test_of_equally_likely_tokens_the_first_ones_are_kept() -> None:
    logits = np.zeros((60, 9), dtype=np.float32)
    logits[:, 6] = 1.0
    ids, logprobs = drawn(logits, [plain(u, top_k=3) for u in (np.arange(60) + 0.5) / 60])
    assert set(ids.tolist()) == {0, 1, 6}
    assert sum({i: np.exp(v) for i, v in zip(ids, logprobs, strict=True)}.values()) == pytest.approx(1.0)


def test_each_row_has_its_own_settings() -> None:
    logits = np.tile(np.array([0.0, 2.0, 1.0, -1.0], dtype=np.float32), (4, 1))
    settings = [plain(0.999), Sampling(0.0, 0, 1.0, np.array([0.0])), plain(0.999, top_k=2), plain(0.0)]
    ids, logprobs = drawn(logits, settings)
    assert ids.tolist() == [3, 1, 2, 0]
    assert logprobs[1] == 0.0
    assert logprobs[2] == pytest.approx(-np.log1p(np.e))
