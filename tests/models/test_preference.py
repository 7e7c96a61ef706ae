"""DPO and KTO: losses worked out by hand, what their gradients do, and what must not change them."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from models.corpus import Sequences
from models.dpo import Comparisons, DPOOptions, dpo_loss
from models.figures import Figures
from models.job import Job
from models.kto import KTOOptions, Thumbs, balanced_weights, kto_loss, mismatched
from models.layout import dense_layout
from models.opinions import Preference, Rated
from models.preference import (
    Answers,
    Method,
    PreferenceOptions,
    answer_logprobs,
    find_pairs,
    heldout_pairs,
    sample,
)
from models.ptx import add_ptx_gradient, check_ptx
from models.ranks import Ranks
from models.reward import RewardModel
from models.rollout import sequence_logprobs
from models.tokenizer import Tokenizer
from models.transformer import Transformer

OPINIONS = [
    Rated([7, 8, 9], [[20, 21, 2], [22, 2], [23, 24, 25, 2]], [1, -1, -1]),
    Rated([30], [[31, 2], [32, 33, 2]], [1, 1]),
    Rated([40, 41], [[42, 2], [43, 2], [44, 45, 2]], [-1, 0, 0], [Preference(2, 1)]),
]


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# ---------------------------------------------------------------- what is a pair


def test_thumbs_and_preferences_become_pairs_and_ties_do_not() -> None:
    prompts, answers, pairs = find_pairs(OPINIONS)
    named = [(answers[better], answers[worse]) for better, worse in pairs]
    assert named == [([20, 21, 2], [22, 2]), ([20, 21, 2], [23, 24, 25, 2]), ([44, 45, 2], [43, 2])]
    assert [prompts[better] for better, _ in pairs] == [[7, 8, 9], [7, 8, 9], [40, 41]]
    assert len(answers) == 6  # the prompt whose answers both have a thumb up says nothing; no answer is there twice


def test_opinions_without_a_pair_or_with_one_prompt_are_refused_with_the_way_out(model: Transformer) -> None:
    with pytest.raises(ValueError, match=r"holds no pair: .* or set align.method to kto"):
        Comparisons(model, OPINIONS[1:2], DPOOptions())
    with pytest.raises(ValueError, match=r"thumbs on answers to 1 prompts: .* or set align.method to dpo"):
        Thumbs(model, OPINIONS[:1], KTOOptions(), seed=1)


# ---------------------------------------------------------------- the losses


def test_dpo_loss_by_hand() -> None:
    """β = 0.5, log ratios (1, −1) and (0, 2): z = 1 and −1, so −log σ(1) and −log σ(−1)."""
    chosen, rejected = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 2.0])
    expected = [-math.log(sigma(1.0)), -math.log(sigma(-1.0))]
    assert dpo_loss(chosen, rejected, 0.5).tolist() == pytest.approx(expected)
    smooth = [0.9 * expected[0] + 0.1 * expected[1], 0.9 * expected[1] + 0.1 * expected[0]]
    assert dpo_loss(chosen, rejected, 0.5, label_smoothing=0.1).tolist() == pytest.approx(smooth)


def test_dpo_gradient_pushes_chosen_up_and_rejected_down_by_how_wrong_the_order_is() -> None:
    """∂/∂Δ of −log σ(βΔ) is −β·σ(−βΔ) (Rafailov et al. 2023, eq. 7 and the text below it)."""
    chosen = torch.tensor([0.0, -4.0], requires_grad=True)
    rejected = torch.zeros(2, requires_grad=True)
    dpo_loss(chosen, rejected, 0.5).sum().backward()
    expected = [-0.5 * sigma(0.0), -0.5 * sigma(2.0)]
    assert chosen.grad.tolist() == pytest.approx(expected)
    assert rejected.grad.tolist() == pytest.approx([-g for g in expected])


def test_smoothed_labels_hold_a_pair_at_the_odds_that_they_mean() -> None:
    """With ε = 0.2 the loss is least where σ(z) = 0.8: beyond it the gradient turns round."""
    best = math.log(0.8 / 0.2)
    z = torch.tensor([best - 1, best, best + 1], requires_grad=True)
    dpo_loss(z, torch.zeros(3), 1.0, label_smoothing=0.2).sum().backward()
    assert z.grad[0] < 0 < z.grad[2]
    assert z.grad[1].item() == pytest.approx(0, abs=1e-6)


def test_kto_loss_by_hand() -> None:
    """β = 2, KL = 0.5: up with ratio 1 → 1 − σ(2·0.5) = 1 − σ(1), times 1.5; down with ratio 0 → 1 − σ(2·0.5), times 0.5."""
    ratios, values = torch.tensor([1.0, 0.0]), torch.tensor([1, -1])
    losses = kto_loss(ratios, values, torch.tensor(0.5), 2.0, (1.5, 0.5))
    assert losses.tolist() == pytest.approx([1.5 * (1 - sigma(1.0)), 0.5 * (1 - sigma(1.0))])


def test_kto_gradient_raises_answers_with_a_thumb_up_and_lowers_the_others_but_saturates() -> None:
    ratios = torch.tensor([0.0, 0.0, 40.0, -40.0], requires_grad=True)
    kto_loss(ratios, torch.tensor([1, -1, 1, -1]), torch.tensor(0.0), 1.0, (1.0, 1.0)).sum().backward()
    assert ratios.grad.tolist() == pytest.approx([-0.25, 0.25, 0.0, 0.0], abs=1e-6)


@pytest.mark.parametrize(
    ("ups", "downs", "expected"),
    [(4, 4, (1.0, 1.0)), (4, 3, (1.0, 1.0)), (1, 4, (4.0, 1.0)), (8, 2, (1.0, 3.0)), (5, 0, (1.0, 1.0))],
)
def test_weights_put_both_kinds_of_thumbs_in_balance(ups: int, downs: int, expected: tuple[float, float]) -> None:
    found = balanced_weights(ups, downs)
    assert found == pytest.approx(expected)
    if downs:
        assert 1 - 1e-9 <= found[0] * ups / (found[1] * downs) <= 4 / 3 + 1e-9


def test_given_weights_stand(model: Transformer) -> None:
    thumbs = Thumbs(model, OPINIONS, KTOOptions(desirable_weight=0.25), seed=1)
    assert thumbs.weights == (0.25, 1.0)  # 3 up, 3 down: nothing to balance
    assert Thumbs(model, OPINIONS, KTOOptions(), seed=1).weights == (1.0, 1.0)


def test_every_thumb_is_paired_with_an_answer_to_another_prompt() -> None:
    sizes, owner = [3, 1, 4, 2], np.repeat(range(4), [3, 1, 4, 2])
    drawn = np.array([mismatched(sizes, np.random.default_rng(seed)) for seed in range(200)])
    assert (owner[drawn] != owner[None, :]).all()
    shares = np.bincount(drawn[:, 0], minlength=10)[3:] / 200  # of the first item: each of seven others is as likely
    assert shares == pytest.approx([1 / 7] * 7, abs=0.09)


# ---------------------------------------------------------------- on a real model


def by_hand(model: Transformer, prompt: list[int], answer: list[int]) -> float:
    """Σ log softmax at the answer's tokens, of one sequence alone."""
    ids = torch.tensor([*prompt, *answer])
    logp = torch.log_softmax(model.logits(model(ids, dense_layout(1, len(ids)))), -1)
    return sum(logp[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))


def whole_loss(method: Method, policy: Transformer, chosen: Sequence[int]) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss and figures of a batch in one part."""
    ((loss, shares),) = method.losses(policy, chosen, [(chosen, 1.0)])
    return loss, {name: share.item() for name, share in shares.items()}


def moved(model: Transformer, by: float = 0.02) -> Transformer:
    """A policy somewhere else than the reference."""
    out = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in out.parameters():
            p.add_(by * torch.randn(p.shape, generator=generator))
    return out


def test_answers_packed_together_are_what_each_is_alone(model: Transformer) -> None:
    prompts, answers, _ = find_pairs(OPINIONS)
    found = answer_logprobs(model, prompts, answers)
    expected = [by_hand(model, p, a) for p, a in zip(prompts, answers, strict=True)]
    assert found.tolist() == pytest.approx(expected, abs=1e-4)
    one = answer_logprobs(model, prompts[2:3], answers[2:3])
    assert one.item() == pytest.approx(found[2].item(), abs=1e-4)  # whatever its batch mates


def test_answers_that_share_a_prompt_have_the_gradient_of_each_alone(model: Transformer) -> None:
    """An answer of one token reads the prompt alone; a prompt that comes back later is read again."""
    prompts = [[7, 8, 9], [7, 8, 9], [7, 8, 9], [30], [7, 8, 9]]
    answers = [[20, 21, 2], [2], [22, 2], [2], [23, 24, 25, 2]]
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0])
    seen: list[int] = []
    hook = model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    found = answer_logprobs(model, prompts, answers)
    hook.remove()
    assert seen == [3 + 2 + 1 + 1 + 1 + 1 + 3 + 3]
    (weights * found).sum().backward()
    shared = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for prompt, answer, weight in zip(prompts, answers, weights, strict=True):
        ids = torch.tensor([*prompt, *answer])
        logp = torch.log_softmax(model.logits(model(ids[:-1], dense_layout(1, len(ids) - 1))), -1)[len(prompt) - 1 :]
        (weight * logp.gather(1, ids[len(prompt) :, None]).sum()).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(shared[name], p.grad, atol=1e-5, rtol=1e-3)


def test_where_policy_and_reference_are_one_dpo_loses_log_two_and_kto_a_half(model: Transformer) -> None:
    loss, stats = whole_loss(Comparisons(model, OPINIONS, DPOOptions(chosen_coefficient=0.0)), model, [0, 1, 2])
    assert loss.item() == pytest.approx(math.log(2), abs=1e-5)
    assert stats["rewards/margins"] == pytest.approx(0, abs=1e-5)
    loss, stats = whole_loss(Thumbs(model, OPINIONS, KTOOptions(), seed=1), model, range(6))
    assert loss.item() == pytest.approx(0.5, abs=1e-5)
    assert stats["kl"] == pytest.approx(0, abs=1e-4)


def test_dpo_of_a_batch_is_the_mean_of_its_pairs_by_hand(model: Transformer) -> None:
    policy = moved(model)
    comparisons = Comparisons(model, OPINIONS, DPOOptions(beta=0.3, chosen_coefficient=0.0))
    prompts, answers, pairs = find_pairs(OPINIONS)
    ratio = [by_hand(policy, p, a) - by_hand(model, p, a) for p, a in zip(prompts, answers, strict=True)]
    losses = [-math.log(sigma(0.3 * (ratio[better] - ratio[worse]))) for better, worse in pairs]
    found, stats = whole_loss(comparisons, policy, [2, 0])
    assert found.item() == pytest.approx((losses[2] + losses[0]) / 2, abs=1e-4)
    again, _ = whole_loss(comparisons, policy, [0, 2])
    assert again.item() == pytest.approx(found.item(), abs=1e-6)  # the order within a batch is nothing
    chosen, rejected = (0.3 * sum(ratio[pairs[i][side]] for i in (2, 0)) / 2 for side in (0, 1))
    assert (stats["rewards/chosen"], stats["rewards/rejected"]) == pytest.approx((chosen, rejected), abs=1e-4)
    by_token = DPOOptions(beta=0.3, length_normalised=True, chosen_coefficient=0.0)
    normalised = whole_loss(Comparisons(model, OPINIONS, by_token), policy, [0])[0]
    better, worse = pairs[0]
    z = 0.3 * (ratio[better] / len(answers[better]) - ratio[worse] / len(answers[worse]))
    assert normalised.item() == pytest.approx(-math.log(sigma(z)), abs=1e-4)
    keeping = DPOOptions(beta=0.3, chosen_coefficient=0.7)
    kept = whole_loss(Comparisons(model, OPINIONS, keeping), policy, [2, 0])[0]
    sides = [pairs[2][0], pairs[0][0]]
    nll = sum(-by_hand(policy, prompts[i], answers[i]) / len(answers[i]) for i in sides) / 2
    assert kept.item() == pytest.approx(found.item() + 0.7 * nll, abs=1e-4)


def test_kto_of_a_batch_by_hand(model: Transformer) -> None:
    """KL is the mean over foreign answers, 0 where that is below, and no gradient goes through it."""
    policy = moved(model)
    thumbs = Thumbs(model, OPINIONS, KTOOptions(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5), seed=1)
    assert thumbs.values == [1, -1, -1, 1, 1, -1]  # what was only compared has no thumb

    def ratio(of: Answers, i: int) -> float:
        return by_hand(policy, of.prompts[i], of.answers[i]) - by_hand(model, of.prompts[i], of.answers[i])

    foreign, own = ([ratio(of, i) for i in range(6)] for of in (thumbs.foreign, thumbs.answers))
    order = sorted(range(6), key=lambda i: foreign[i])
    signs = set()
    for chosen in (order[:3], order[3:], [1, 2]):
        mean = sum(foreign[i] for i in chosen) / len(chosen)
        kl = max(0.0, mean)
        signs.add(mean > 0)
        losses = {i: 1 - sigma(thumbs.values[i] * 0.3 * (own[i] - kl)) for i in chosen}
        expected = sum((1.5 if thumbs.values[i] > 0 else 0.5) * losses[i] for i in chosen) / len(chosen)
        loss, stats = whole_loss(thumbs, policy, chosen)
        assert loss.item() == pytest.approx(expected, abs=1e-4)
        assert stats["kl"] == pytest.approx(kl, abs=1e-3)
        right = [(own[i] > kl) == (thumbs.values[i] > 0) for i in chosen]
        assert stats["rewards/accuracy"] == pytest.approx(sum(right) / len(chosen))
        for name, sign in (("rewards/chosen", 1), ("rewards/rejected", -1)):
            side = [0.3 * own[i] for i in chosen if thumbs.values[i] == sign]
            assert (name in stats) == bool(side)
            assert not side or stats[name] == pytest.approx(sum(side) / len(side), abs=1e-3)
    assert signs == {True, False}
    assert not thumbs.kl(policy, [([0, 1], 1.0)], 2).requires_grad


@pytest.mark.parametrize("size", [1, 2, 4])
def test_parts_of_a_batch_add_up_to_its_gradient_and_figures(model: Transformer, size: int) -> None:
    policy, rated = moved(model), [0, 1, 2]
    with_kl = Thumbs(model, OPINIONS, KTOOptions(), seed=1)
    while with_kl.kl(policy, [(rated, 1.0)], 3) <= 0:  # else a KL of too few thumbs would be 0 as well
        rated = [i + 1 for i in rated]
    keeping = DPOOptions(beta=0.3, chosen_coefficient=0.7, label_smoothing=0.1)
    for method, chosen in ((Comparisons(model, OPINIONS, keeping), [0, 1, 2]), (with_kl, rated)):
        policy.zero_grad()
        loss, stats = whole_loss(method, policy, chosen)
        loss.backward()
        expected = {name: p.grad.clone() for name, p in policy.named_parameters()}
        policy.zero_grad()
        figures = Figures()
        for loss_of_part, shares in method.losses(policy, chosen, list(Ranks().cut(chosen, size))):
            loss_of_part.backward()
            figures.add({"loss": loss_of_part, **shares})
        for name, p in policy.named_parameters():
            torch.testing.assert_close(p.grad, expected[name], atol=1e-6, rtol=1e-3)
        assert figures.total() == pytest.approx({"loss": loss.item(), **stats}, abs=1e-5)


def test_a_foreign_answer_that_is_too_long_is_cut_to_the_context(model: Transformer) -> None:
    room = model.config.context_length
    opinions = [Rated([9] * (room - 2), [[5, 2]], [1]), Rated([3], [[6] * (room - 1)], [-1])]
    thumbs = Thumbs(model, opinions, KTOOptions(), seed=1)
    assert [len(a) for a in thumbs.foreign.answers] == [3, 2]
    whole_loss(thumbs, model, [0, 1])


def test_a_few_steps_move_the_policy_where_people_want_it(model: Transformer) -> None:
    """On the pairs themselves: the margin grows, and KTO parts thumbs up from thumbs down."""
    for method in (Comparisons(model, OPINIONS, DPOOptions()), Thumbs(model, OPINIONS, KTOOptions(), seed=1)):
        policy = copy.deepcopy(model)
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.05)
        for _ in range(10):
            loss, stats = whole_loss(method, policy, range(len(method)))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert stats["rewards/margins"] > 0.01
        assert stats["rewards/chosen"] > stats["rewards/rejected"]


def test_the_language_modelling_gradient_is_added_times_its_coefficient(model: Transformer) -> None:
    tokens = np.random.default_rng(0).integers(0, 300, 500).astype(np.uint16)
    chats = Sequences(tokens[:20], np.array([False, True] * 10), np.array([0, 8, 20]))

    def gradient(coefficient: float, before: float = 0.0) -> torch.Tensor:
        options = PreferenceOptions(ptx_coefficient=coefficient, ptx_batch_size=2, ptx_conversations=3)
        model.norm.weight.grad = torch.full_like(model.norm.weight, before)
        loss = add_ptx_gradient(model, tokens, chats, options, np.random.default_rng(5))
        assert loss > 0
        return model.norm.weight.grad.clone()

    one = gradient(1.0)
    assert one.abs().max() > 0
    torch.testing.assert_close(gradient(0.25, before=7.0), 7.0 + 0.25 * one, atol=1e-5, rtol=1e-5)


def test_too_little_text_for_the_language_is_told_by_name() -> None:
    check_ptx("dpo", PreferenceOptions(), 98, 1, 97)
    with pytest.raises(ValueError, match=r"dpo.ptx_batch_size draws windows of 97 tokens .* there are 96: set it to 0"):
        check_ptx("dpo", PreferenceOptions(), 96, 1, 96)
    with pytest.raises(ValueError, match=r"kto.ptx_conversations draws SFT conversations, there are none"):
        check_ptx("kto", PreferenceOptions(), 98, 0, 97)


def test_accuracy_on_heldout_pairs_counts_what_the_log_ratios_order_rightly(model: Transformer) -> None:
    policy = moved(model)
    prompts, answers, pairs = find_pairs(OPINIONS)
    own, under = (sequence_logprobs(m, prompts, answers) for m in (policy, model))
    ratio = [sum(a) - sum(b) for a, b in zip(own, under, strict=True)]
    found = heldout_pairs(policy, model, OPINIONS)
    assert found["heldout_pairs"] == 3
    assert found["pair_accuracy"] == pytest.approx(sum(ratio[b] > ratio[w] for b, w in pairs) / 3)
    assert found["pair_accuracy_low"] < found["pair_accuracy_high"]
    assert heldout_pairs(policy, model, OPINIONS[1:2]) == {}


def test_a_policy_that_is_the_reference_has_no_distance_from_it(model: Transformer, tokenizer: Tokenizer) -> None:
    prompts = Sequences(np.arange(20, 28), np.zeros(8, dtype=bool), np.array([0, 3, 8]))
    judge = RewardModel(model).initialize(torch.Generator().manual_seed(2)).eval()
    options = PreferenceOptions(samples=2, max_new_tokens=4)
    assert sample(model, model, judge, prompts, tokenizer, options, 1)["objective_kl"] == pytest.approx(0, abs=1e-4)
    away = sample(moved(model, 0.1), model, judge, prompts, tokenizer, options, 1)
    assert away["objective_kl"] > 1


@pytest.mark.parametrize(
    ("section", "cls", "change", "message"),
    [
        ("dpo", DPOOptions, {"beta": 0.0}, "beta must be above 0"),
        ("dpo", DPOOptions, {"label_smoothing": 0.5}, "label_smoothing must be at least 0 and below 0.5"),
        ("dpo", DPOOptions, {"chosen_coefficient": -1.0}, "chosen_coefficient must not be negative"),
        ("dpo", DPOOptions, {"ptx_coefficient": -1.0}, "ptx_coefficient must not be negative"),
        ("dpo", DPOOptions, {"micro_batch": 0}, "micro_batch must be at least 1, not 0"),
        ("kto", KTOOptions, {"batch_size": 1}, "batch_size must be at least 2"),
        ("kto", KTOOptions, {"undesirable_weight": 0.0}, "undesirable_weight must be above 0, or null"),
        ("kto", KTOOptions, {"smoothing": 0.1}, "kto.smoothing is not known"),
    ],
)
def test_impossible_options_are_refused(section: str, cls: type, change: dict, message: str) -> None:
    job = Job(section, Path(), (), Path(), Path(), {section: change})
    with pytest.raises(ValueError, match=message):
        job.options(section, cls)
