"""What PPO is asked for is what it does: rewards of episodes, and which of them learn when and how fast."""

from __future__ import annotations

import copy
import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_stages import make_workspace, run_stage

from models import episodes, ppo
from models.corpus import Sequences
from models.critic import Critic
from models.episodes import Models, Rollout, roll_out
from models.ppo import Updater
from models.ppo_options import PPOOptions
from models.reward import RewardModel
from models.rollout import Answer
from models.tokenizer import Tokenizer
from models.transformer import Transformer

PROMPTS = [[7, 8, 9], [30], [40, 41], [50, 51, 52, 53]]


@pytest.fixture
def four(model: Transformer) -> Models:
    """Policy, critic, reference and reward model of one trunk; the reward model's probability is σ(0.5·(r + 0.25))."""
    judges = [RewardModel(copy.deepcopy(model)).initialize(torch.Generator().manual_seed(5)).eval() for _ in range(2)]
    with torch.no_grad():
        judges[1].offset.fill_(0.25)
        judges[1].scale.fill_(0.5)
    return Models(model, Critic(judges[0]), copy.deepcopy(model), judges[1])


def rolled(models: Models, **options: Any) -> Rollout:
    return roll_out(models, PROMPTS, [1, 2, 3, 4], PPOOptions(batch_size=4, max_new_tokens=6, **options), 0.0, 2)


def test_the_probability_of_a_thumb_up_is_the_score_when_asked_for(four: Models) -> None:
    r = rolled(four, reward="score").scores
    expected = 1 / (1 + torch.exp(-0.5 * (r + 0.25)))
    torch.testing.assert_close(rolled(four, reward="probability").scores, expected)


def test_whitened_rewards_keep_their_mean_in_the_returns(four: Models) -> None:
    """β = 0, γ = λ = 1: the return at the first token is the sum of an answer's rewards, by numpy."""
    made = rolled(four, reward="score", whiten_rewards=True, gae_lambda=1.0)
    raw = [np.array([0.0] * (len(a.ids) - 1) + [s]) for a, s in zip(made.answers, made.scores.tolist(), strict=True)]
    every = np.concatenate(raw)
    for i, rewards in enumerate(raw):
        expected = sum((rewards - every.mean()) / every.std() + every.mean())
        assert made.returns[i, 0].item() == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_gamma_discounts_and_lambda_mixes(four: Models) -> None:
    """The other way round would be another return; by the recursion in float64."""
    made = rolled(four, reward="score", gamma=0.9, gae_lambda=0.5)
    for i, answer in enumerate(made.answers):
        values, advantage = [*made.values[i, : len(answer.ids)].tolist(), 0.0], 0.0
        for t in reversed(range(len(answer.ids))):
            reward = made.scores[i].item() if t == len(answer.ids) - 1 else 0.0
            advantage = reward + 0.9 * values[t + 1] - values[t] + 0.9 * 0.5 * advantage
            assert made.returns[i, t].item() == pytest.approx(advantage + values[t], abs=1e-4)


def test_as_many_answers_are_sampled_side_by_side_as_asked_for(four: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    widths, sampler = [], episodes.generate

    def watched(*args: Any, **kwargs: Any) -> list[Answer]:
        widths.append(kwargs["width"])
        return sampler(*args, **kwargs)

    monkeypatch.setattr(episodes, "generate", watched)
    rolled(four)
    rolled(four, rollout_width=3)
    assert widths == [4, 3]


def test_every_episode_learns_once_an_epoch_in_an_order_of_its_own_at_the_rates_of_the_schedule(
    four: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3 iterations × 2 epochs × 2 minibatches: warm-up over 2 steps, then straight down towards a tenth at step 12."""
    options = PPOOptions(
        iterations=3, batch_size=4, minibatches=2, epochs=2, max_new_tokens=6, ptx_coefficient=0, warmup_steps=2,
        learning_rate=1e-3, critic_learning_rate=5e-3,
    )  # fmt: skip
    updater = Updater(four, options, np.arange(9, dtype=np.uint16), Sequences(*[np.zeros(1, int)] * 3))
    cut, seen = ppo.minibatch, []
    rates: dict[str, list[float]] = {"policy": [], "critic": []}
    for name, optimizer in (("policy", updater.policy_optimizer), ("critic", updater.critic_optimizer)):

        def step(rate: float, clip: float, name: str = name, taken: Any = optimizer.step) -> Any:
            rates[name].append(rate)
            return taken(rate, clip)

        monkeypatch.setattr(optimizer, "step", step)

    def watched(rollout: Rollout, chosen: list[int], *rest: Any) -> Any:
        seen.append(list(chosen))
        return cut(rollout, chosen, *rest)

    monkeypatch.setattr(ppo, "minibatch", watched)
    rollout = roll_out(four, PROMPTS, [1, 2, 3, 4], options, 0.1, 2)
    for iteration in range(3):
        updater.update(rollout, 1, iteration)
    epochs = [seen[i] + seen[i + 1] for i in range(0, 12, 2)]
    assert all(sorted(epoch) == [0, 1, 2, 3] for epoch in epochs)
    assert any(epochs[i] != epochs[i + 1] for i in (0, 2, 4)), "each epoch of a rollout is shuffled anew"
    shape = [0.5, 1.0, *(0.1 + 0.9 * (1 - (s - 2) / 10) for s in range(2, 12))]
    assert rates["policy"] == pytest.approx([1e-3 * x for x in shape])
    assert rates["critic"] == pytest.approx([5e-3 * x for x in shape])


def test_an_iteration_asks_no_prompt_twice_and_the_curve_has_the_loss_of_ptx(
    model: Transformer, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_workspace(tmp_path, model, tokenizer)
    asked, real = [], ppo.roll_out

    def watched(models: Models, prompts: list[list[int]], *rest: Any) -> Rollout:
        asked.append(sorted(prompts))
        return real(models, prompts, *rest)

    monkeypatch.setattr(ppo, "roll_out", watched)
    prompts = Sequences.load(tmp_path / "artifacts/tokenize/prompts.train.npz")
    options = {"iterations": 2, "batch_size": len(prompts), "epochs": 1, "max_new_tokens": 3, "checkpoint_every": 9}
    output, _ = run_stage(tmp_path, "ppo", tmp_path / "run", {"ppo": options})
    assert asked == [sorted(prompts[i] for i in range(len(prompts)))] * 2
    with (output / "curves.csv").open(newline="") as file:
        assert all(float(row["policy/ptx_loss"]) > 0 for row in csv.DictReader(file))
