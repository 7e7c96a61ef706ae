import itertools
import json
import math

import pytest
import torch

from models.baselines import bag_of_words_accuracy, length_accuracy
from models.reward import (
    Rated,
    RewardModel,
    RewardOptions,
    batch_loss,
    lay_out,
    load_reward_model,
    normalise,
    pair_loss,
    read_opinions,
    save_reward_model,
    score,
    thumb_loss,
)
from models.transformer import Transformer


@pytest.fixture
def judge(model: Transformer) -> RewardModel:
    return RewardModel(model).initialize(torch.Generator().manual_seed(2)).eval()


def test_pair_loss_is_the_mean_over_a_prompts_pairs() -> None:
    scores = torch.tensor([1.0, -0.5, 2.0, 0.0])
    values = [1, -1, 1, -1]
    pairs = [(w, b) for w, b in itertools.permutations(range(4), 2) if values[w] > values[b]]
    by_hand = sum(-math.log(1 / (1 + math.exp(-(scores[w] - scores[b]).item()))) for w, b in pairs) / len(pairs)
    assert len(pairs) == 4
    assert pair_loss(scores, values).item() == pytest.approx(by_hand)
    order = [2, 0, 3, 1]
    assert pair_loss(scores[order], [values[i] for i in order]).item() == pytest.approx(by_hand)
    assert pair_loss(scores, [1, 1, 1, 1]) is None


def test_thumb_loss_has_its_own_offset() -> None:
    loss = thumb_loss(torch.tensor([0.3, -0.2]), torch.tensor([1.0, -1.0]), torch.tensor(0.5))
    assert loss.item() == pytest.approx((math.log1p(math.exp(-0.8)) + math.log1p(math.exp(0.3))) / 2)


def test_prompts_weigh_alike_however_many_pairs_they_have(judge: RewardModel) -> None:
    batch = [Rated([5, 6], [[7], [8], [9]], [1, -1, -1]), Rated([10], [[11], [12]], [1, -1])]
    _, parts = batch_loss(judge, batch, RewardOptions())
    scores = [score(judge, [r.prompt] * len(r.answers), r.answers) for r in batch]
    expected = sum(pair_loss(torch.tensor(s), r.values).item() for s, r in zip(scores, batch, strict=True)) / 2
    assert parts["pair_loss"] == pytest.approx(expected, abs=1e-5)


def test_a_score_does_not_depend_on_batch_mates(judge: RewardModel) -> None:
    prompts, answers = [[5, 6, 7]] * 9, [[n] * (n % 4 + 1) for n in range(20, 29)]
    together = score(judge, prompts, answers)
    alone = [score(judge, [p], [a])[0] for p, a in zip(prompts, answers, strict=True)]
    assert together == pytest.approx(alone, abs=1e-5)
    small = score(judge, prompts, answers, tokens_per_batch=8)
    assert small == pytest.approx(together, abs=1e-5)


def test_normalised_scores_have_mean_0_and_variance_1_and_keep_their_sign(judge: RewardModel) -> None:
    prompts, answers = [[5]] * 30, [[n, n + 1] for n in range(30)]
    with torch.no_grad():
        judge.offset.fill_(0.37)
    before = score(judge, prompts, answers)
    chances = judge.probability(torch.tensor(before))
    normalise(judge, before)
    after = torch.tensor(score(judge, prompts, answers))
    assert after.mean().item() == pytest.approx(0, abs=1e-4)
    assert after.var(correction=0).item() == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(judge.probability(after), chances, atol=1e-4, rtol=1e-4)
    signs = [s + 0.37 > 0 for s in before]
    assert [bool(s + judge.offset > 0) for s in after] == signs


def test_a_saved_reward_model_is_the_same(judge: RewardModel, tokenizer, tmp_path) -> None:
    with torch.no_grad():
        judge.head.bias.fill_(0.25)
        judge.offset.fill_(-0.5)
    save_reward_model(judge, tmp_path / "model", tokenizer, "card")
    again = load_reward_model(tmp_path / "model")
    tokens, layout = lay_out([[5, 6, 7], [9]], "cpu")
    assert torch.equal(again.scores(tokens, layout), judge.scores(tokens, layout))
    assert again.offset.item() == -0.5
    with pytest.raises(ValueError, match="LlamaForCausalLM is what this needs"):
        from models.checkpoint import load_model

        load_model(tmp_path / "model")


def test_opinions_are_grouped_by_prompt_and_bad_ones_named(tmp_path) -> None:
    path = tmp_path / "opinions.jsonl"
    rows = [([1, 2], [3], 1), ([4], [5, 6], -1), ([1, 2], [7], -1)]
    path.write_text("".join(
        json.dumps({"kind": "thumb", "prompt_ids": p, "response_ids": a, "value": v}) + "\n" for p, a, v in rows
    ))  # fmt: skip
    assert read_opinions(path) == [Rated([1, 2], [[3], [7]], [1, -1]), Rated([4], [[5, 6]], [-1])]
    with path.open("a") as file:
        file.write('{"kind": "thumb", "prompt_ids": [1], "response_ids": [2], "value": 0}\n')
    with pytest.raises(ValueError, match=r"opinions.jsonl:4: a thumb needs value 1 or -1"):
        read_opinions(path)


def test_baselines_find_what_they_can_see() -> None:
    train = [([n % 7] * (1 + n % 10), 1 if n % 10 >= 5 else -1) for n in range(200)]
    assert length_accuracy(train, train) == 1.0
    words = [([n % 5, 9], 1 if n % 5 < 2 else -1) for n in range(200)]
    assert bag_of_words_accuracy(words, words, 10) == 1.0
    assert length_accuracy(words, words) == pytest.approx(0.6)
