"""The reward model's terms by hand, what it reads of people's opinions, and how it is judged and kept."""

import csv
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from small_stages import Killed, make_workspace, run_stage

from models.baselines import bag_of_words_accuracy, length_accuracy
from models.checkpoint import model_hash
from models.config import ModelConfig
from models.figures import Figures
from models.opinions import Preference
from models.reward import (
    Rated,
    RewardModel,
    RewardOptions,
    batch_loss,
    counts_of,
    evaluate,
    lay_out,
    load_reward_model,
    normalise,
    pair_losses,
    read_opinions,
    save_reward_model,
    score,
    thumb_losses,
)
from models.tokenizer import Tokenizer
from models.training import torch_generator
from models.transformer import Transformer


@pytest.fixture
def judge(model: Transformer) -> RewardModel:
    return RewardModel(model).initialize(torch.Generator().manual_seed(2)).eval()


def pair_loss(
    scores: torch.Tensor, values: list[int], preferences: Sequence[Preference] = (), **options: float
) -> float:
    """The mean loss of the pairs of one prompt's answers."""
    pairs = Rated([], [[]] * len(values), values, list(preferences)).pairs()
    return pair_losses(scores, pairs, **options).mean().item()


def test_pair_loss_is_the_mean_over_a_prompts_pairs() -> None:
    scores = torch.tensor([1.0, -0.5, 2.0, 0.0])
    values = [1, -1, 1, -1]
    pairs = [(w, b) for w, b in itertools.permutations(range(4), 2) if values[w] > values[b]]
    by_hand = sum(-math.log(1 / (1 + math.exp(-(scores[w] - scores[b]).item()))) for w, b in pairs) / len(pairs)
    assert len(pairs) == 4
    assert pair_loss(scores, values) == pytest.approx(by_hand)
    order = [2, 0, 3, 1]
    assert pair_loss(scores[order], [values[i] for i in order]) == pytest.approx(by_hand)
    assert Rated([], [[]] * 4, [1, 1, 1, 1]).pairs() == []


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_preferences_and_thumbs_of_a_prompt_are_one_mean_over_all_its_pairs() -> None:
    """Answers 0 up, 1 down, 2 and 3 without a thumb; 3 before 2, and 0 before 3: three pairs, no pair of 2 with a thumb."""
    r = [0.5, -0.25, 1.0, 2.0]
    preferences = [Preference(3, 2), Preference(0, 3, 2.0)]
    expected = (softplus(-(r[0] - r[1])) + softplus(-(r[3] - r[2])) + softplus(-(r[0] - r[3]))) / 3
    assert pair_loss(torch.tensor(r), [1, -1, 0, 0], preferences) == pytest.approx(expected)
    assert Rated([], [[], []], [0, 0]).pairs() == []
    order = [2, 3, 0, 1]  # where answers stand does not matter
    moved = [Preference(order.index(p.winner), order.index(p.loser), p.strength) for p in preferences]
    got = pair_loss(torch.tensor([r[i] for i in order]), [[1, -1, 0, 0][i] for i in order], moved)
    assert got == pytest.approx(expected)


def test_margin_and_centering_by_hand() -> None:
    """m = .5 for the thumbs' pair, 2·.5 for the strong preference; centring adds .1·mean((r_w + r_l)²)."""
    r, strong = torch.tensor([0.5, -0.25, 1.0]), [Preference(2, 0, 2.0)]
    with_margin = (softplus(0.5 - 0.75) + softplus(1.0 - 0.5)) / 2
    assert pair_loss(r, [1, -1, 0], strong, margin=0.5) == pytest.approx(with_margin)
    centred = (softplus(-0.75) + softplus(-0.5)) / 2 + 0.1 * (0.25**2 + 1.5**2) / 2
    assert pair_loss(r, [1, -1, 0], strong, centering=0.1) == pytest.approx(centred)


def test_an_answer_is_one_forward_pass_however_many_pairs_it_is_in(judge: RewardModel) -> None:
    """Bug of others: each of C(K, 2) pairs read by itself, so that an answer is learned K − 1 times an epoch."""
    seen = []
    judge.trunk.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    answers = [[7], [8, 8], [9], [10, 11, 12]]
    ranked = [Preference(i, j) for i, j in itertools.combinations(range(4), 2)]
    _, parts = batch_loss(judge, [Rated([5, 6], answers, [0] * 4, ranked)], RewardOptions())
    assert seen == [2 + 7], "and the prompt one for all of them"
    assert parts.keys() == {"pair_loss"}


def test_a_batch_without_thumbs_or_without_pairs_has_a_gradient_of_what_it_has(judge: RewardModel) -> None:
    thumbs, pairs = Rated([5], [[7], [8]], [1, 1]), Rated([6], [[9], [10]], [0, 0], [Preference(0, 1)])
    for batch, offset_learns in (([thumbs], True), ([pairs], False)):
        judge.zero_grad()
        loss, _ = batch_loss(judge, batch, RewardOptions())
        loss.backward()
        assert judge.head.weight.grad.abs().max() > 0
        assert (judge.offset.grad is not None) == offset_learns
    loss, _ = batch_loss(judge, [pairs], RewardOptions(pair_weight=0.0))
    judge.zero_grad()
    loss.backward()
    assert not judge.head.weight.grad.any()


def test_the_head_starts_with_deviation_one_over_root_d_plus_one() -> None:
    """Bug of others: 1/(d + 1), here sixteen times too small."""
    config = ModelConfig(
        hidden_size=256, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, intermediate_size=8
    )
    trunk = Transformer(config)
    weights = [RewardModel(trunk).initialize(torch.Generator().manual_seed(n)).head.weight for n in range(20)]
    assert torch.cat(weights).std().item() == pytest.approx(257**-0.5, rel=0.05)


def test_thumb_loss_has_its_own_offset() -> None:
    losses = thumb_losses(torch.tensor([0.3, -0.2]), torch.tensor([1.0, -1.0]), torch.tensor([0.5]))
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-0.8)), math.log1p(math.exp(0.3))])


def test_prompts_weigh_alike_however_many_pairs_they_have(judge: RewardModel) -> None:
    batch = [Rated([5, 6], [[7], [8], [9]], [1, -1, -1]), Rated([10], [[11], [12]], [1, -1])]
    _, parts = batch_loss(judge, batch, RewardOptions())
    scores = [score(judge, [r.prompt] * len(r.answers), r.answers) for r in batch]
    expected = sum(pair_loss(torch.tensor(s), r.values) for s, r in zip(scores, batch, strict=True)) / 2
    assert parts["pair_loss"].item() == pytest.approx(expected, abs=1e-5)


BATCH = [
    Rated([5, 6], [[7], [8, 8], [9]], [1, -1, -1]),
    Rated([10], [[11], [12, 13]], [0, 0], [Preference(1, 0, 2.0)]),
    Rated([20, 21, 22], [[23]], [1]),
    Rated([30], [[31], [32], [33], [34]], [1, 0, -1, -1], [Preference(3, 1)]),
]


def test_a_batchs_loss_is_means_over_all_its_thumbs_and_over_its_prompts_with_pairs(judge: RewardModel) -> None:
    """Seven thumbs, whosever prompt; three prompts with pairs, each the mean of its own 2, 1 and 3."""
    options = RewardOptions(pair_weight=0.7, thumb_weight=0.3, margin=0.2, centering_coefficient=0.1)
    with torch.no_grad():
        judge.offset.fill_(0.4)
    thumbs, prompts = [], []
    for rated in BATCH:
        r = score(judge, [rated.prompt] * len(rated.answers), rated.answers)
        thumbs += [(s + 0.4, v) for s, v in zip(r, rated.values, strict=True) if v]
        pairs = [
            (w, b, 1.0) for w, b in itertools.permutations(range(len(r)), 2) if rated.values[w] > 0 > rated.values[b]
        ]
        pairs += [tuple(p) for p in rated.preferences]
        losses = [softplus(0.2 * m - (r[w] - r[b])) + 0.1 * (r[w] + r[b]) ** 2 for w, b, m in pairs]
        prompts += [sum(losses) / len(losses)] if losses else []
    assert (len(thumbs), len(prompts)) == (7, 3)
    loss, parts = batch_loss(judge, BATCH, options)
    assert parts["thumb_loss"].item() == pytest.approx(sum(softplus(-v * s) for s, v in thumbs) / 7, abs=1e-5)
    assert parts["pair_loss"].item() == pytest.approx(sum(prompts) / 3, abs=1e-5)
    assert parts["accuracy"].item() == pytest.approx(sum((s > 0) == (v > 0) for s, v in thumbs) / 7)
    expected = 0.7 * parts["pair_loss"].item() + 0.3 * parts["thumb_loss"].item()
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_a_shared_prompt_gives_the_gradient_of_each_answer_alone(judge: RewardModel) -> None:
    """Scores and gradients of batch_loss against one forward pass over prompt and answer for each answer by itself."""
    options = RewardOptions(margin=0.2, centering_coefficient=0.1)
    loss, _ = batch_loss(judge, BATCH, options)
    loss.backward()
    shared = {name: p.grad.clone() for name, p in judge.named_parameters()}
    judge.zero_grad()
    alone = [torch.cat([judge.scores(*lay_out([r.prompt + a], "cpu")) for a in r.answers]) for r in BATCH]
    thumbs = [(s, v) for r, of in zip(BATCH, alone, strict=True) for s, v in zip(of, r.values, strict=True) if v]
    expected = sum(torch.nn.functional.softplus(-v * (s + judge.offset[0])) for s, v in thumbs) / len(thumbs)
    for r, of in zip(BATCH, alone, strict=True):
        if pairs := r.pairs():
            expected = expected + pair_losses(of, pairs, 0.2, 0.1).mean() / 3
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    for name, p in judge.named_parameters():
        torch.testing.assert_close(shared[name], p.grad, atol=2e-6, rtol=1e-3)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_parts_of_a_batch_add_up_to_its_gradient_and_figures(judge: RewardModel, size: int) -> None:
    """Bug of others: each part's own mean, which weighs a part with one thumb or one pair as much as a full one."""
    options = RewardOptions(centering_coefficient=0.1)
    loss, shares = batch_loss(judge, BATCH, options)
    loss.backward()
    expected = {name: p.grad.clone() for name, p in judge.named_parameters()}
    judge.zero_grad()
    figures = Figures()
    for start in range(0, 4, size):
        part, found = batch_loss(judge, BATCH[start : start + size], options, counts_of(BATCH))
        part.backward()
        figures.add({"loss": part, **found})
    for name, p in judge.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], atol=1e-6, rtol=1e-4)
    whole = {"loss": loss.item(), **{name: share.item() for name, share in shares.items()}}
    assert figures.total() == pytest.approx(whole, abs=1e-6)


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


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_comparisons_and_rankings_point_to_the_answers_of_their_prompt(tmp_path: Path) -> None:
    path = write(
        tmp_path / "opinions.jsonl",
        {"kind": "thumb", "prompt_ids": [1], "response_ids": [7], "value": 1},
        {"kind": "comparison", "prompt_ids": [1], "chosen_ids": [8], "rejected_ids": [7], "strength": 3},
        {
            "kind": "ranking", "prompt_ids": [1],
            "answers": [{"response_ids": [n], "rank": rank} for n, rank in ((8, 2), (9, 1), (7, 2))],
        },
        {"kind": "comparison", "prompt_ids": [2], "chosen_ids": [5], "rejected_ids": [6]},
        {"kind": "ranking", "prompt_ids": [3], "answers": [{"response_ids": [n], "rank": 1} for n in (5, 6)]},
        {"kind": "comment", "text": "of no interest here"},
    )  # fmt: skip
    assert read_opinions(path) == [
        Rated([1], [[7], [8], [9]], [1, 0, 0], [Preference(1, 0, 3.0), Preference(2, 1), Preference(2, 0)]),
        Rated([2], [[5], [6]], [0, 0], [Preference(0, 1)]),
    ]  # of the third prompt only a tie is known


def test_a_bad_opinion_is_named_by_file_line_and_field(tmp_path: Path) -> None:
    good = {"kind": "comparison", "prompt_ids": [2], "chosen_ids": [5], "rejected_ids": [6]}
    answers = [{"response_ids": [5], "rank": 1}, {"response_ids": [6], "rank": 2}]
    for bad, message in (
        (good | {"prompt_ids": []}, "a comparison needs prompt_ids, a list of token ids"),
        (good | {"rejected_ids": "abc"}, "a comparison needs rejected_ids, a list of token ids"),
        (good | {"rejected_ids": [5]}, "chosen_ids other than rejected_ids"),
        (good | {"strength": 0}, "strength must be a number above 0, not 0"),
        (
            {"kind": "ranking", "prompt_ids": [1], "answers": answers[:1]},
            "a ranking needs answers, a list of at least two",
        ),
        ({"kind": "ranking", "prompt_ids": [1], "answers": [answers[0], {"response_ids": [6]}]}, r"answers\[1\].rank"),
        (
            {"kind": "ranking", "prompt_ids": [1], "answers": [answers[0], {"response_ids": [-6], "rank": 1}]},
            r"a ranking's answers\[1\] needs response_ids",
        ),
        ({"kind": "thumb", "prompt_ids": [1], "response_ids": [1.5], "value": 1}, "a thumb needs response_ids"),
        ([1, 2], "a line must hold a JSON object"),
    ):
        with pytest.raises(ValueError, match=rf"opinions.jsonl:2: .*{message}"):
            read_opinions(write(tmp_path / "opinions.jsonl", good, bad))
    path = write(tmp_path / "opinions.jsonl", {"kind": "ranking", "prompt_ids": [1, 2], "answers": answers})
    assert len(read_opinions(path, vocab_size=7, context=3)) == 1
    with pytest.raises(
        ValueError, match=r"opinions.jsonl:1: answers\[1\].response_ids holds token 6, the model knows 6"
    ):
        read_opinions(path, vocab_size=6)
    with pytest.raises(
        ValueError, match=r":1: prompt_ids and answers\[0\].response_ids are 3 tokens, the context is 2"
    ):
        read_opinions(path, context=2)
    (tmp_path / "opinions.jsonl").write_text(json.dumps(good) + "\n{half")
    with pytest.raises(ValueError, match=r"opinions.jsonl:2: Expecting property name"):
        read_opinions(tmp_path / "opinions.jsonl")


def test_held_out_pairs_are_counted_by_hand(judge: RewardModel, tokenizer: Tokenizer) -> None:
    answers = [[7], [8, 9], [10]]
    r = score(judge, [[5]] * 3, answers)
    best, middle, worst = sorted(range(3), key=lambda i: -r[i])
    thumbs = Rated([5], answers, [1 if i == best else -1 for i in range(3)])  # two pairs, both right
    ranked = Rated([5], answers, [0, 0, 0], [Preference(best, middle), Preference(worst, middle)])  # right, wrong
    metrics = evaluate(judge, [ranked], [thumbs, ranked], tokenizer)
    assert (metrics["heldout_pairs"], metrics["pair_accuracy"]) == (4, 0.75)
    assert "accuracy" not in metrics, "there was no thumb to learn"
    metrics = evaluate(judge, [thumbs], [thumbs], tokenizer)
    assert (metrics["heldout"], metrics["rated"], metrics["pair_accuracy"]) == (3, 3, 1.0)
    ups = [Rated([5], answers, [1, 1, 1])]  # a thumb up is foretold where r + b is above 0, wherever r itself is
    for offset, accuracy in ((-r[worst] + 0.01, 1.0), (-r[best] - 0.01, 0.0)):
        with torch.no_grad():
            judge.offset.fill_(offset)
        assert evaluate(judge, ups, ups, tokenizer)["accuracy"] == accuracy


def test_a_reward_model_learns_from_preferences_alone_and_resumes_bit_for_bit(
    model: Transformer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    make_workspace(tmp_path, model, tokenizer)
    snapshot = tmp_path / "artifacts/snapshot"
    likes, dislikes = tokenizer.encode("fine"), tokenizer.encode("hello")
    for split, count in (("train", 24), ("heldout", 6)):
        rows = []
        for n in range(count):
            ranks = [{"response_ids": [*words, 40 + n], "rank": i} for i, words in enumerate((likes, dislikes))]
            rows.append(
                {"kind": "ranking", "prompt_ids": [10 + n], "answers": [*ranks, {**ranks[1], "response_ids": [9]}]}
            )
        write(snapshot / f"opinions.{split}.jsonl", *rows)
    params = {"reward": {"epochs": 4, "batch_size": 4, "checkpoint_every": 3, "log_every": 1, "centering_coefficient": 0.01,
                         "margin": 0.1}}  # fmt: skip
    whole, _ = run_stage(tmp_path, "reward", tmp_path / "whole", params)
    metrics = json.loads((whole / "metrics.json").read_text())
    assert metrics["heldout_pairs"] == 12  # of each ranking's three pairs one is a tie
    assert metrics["pair_accuracy"] == 1.0
    with pytest.raises(Killed):
        run_stage(tmp_path, "reward", tmp_path / "again", params, killed_after=5)
    again, _ = run_stage(tmp_path, "reward", tmp_path / "again", params)
    assert model_hash(again / "model") == model_hash(whole / "model")


def test_the_stages_loss_is_the_mean_over_its_whole_batch(
    model: Transformer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    make_workspace(tmp_path, model, tokenizer)
    params = {"reward": {"epochs": 1, "batch_size": 99, "log_every": 1}}
    output, _ = run_stage(tmp_path, "reward", tmp_path / "work", params)
    with (output / "curves.csv").open() as file:
        (row,) = csv.DictReader(file)
    fresh = RewardModel(model).initialize(torch_generator(3, "reward head"))
    opinions = read_opinions(tmp_path / "artifacts/snapshot/opinions.train.jsonl")
    loss, _ = batch_loss(fresh, opinions, RewardOptions())
    assert float(row["loss"]) == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize("stage", ["reward", "dpo", "kto"])
def test_a_stage_in_micro_batches_learns_the_same(
    model: Transformer, tokenizer: Tokenizer, tmp_path: Path, stage: str
) -> None:
    make_workspace(tmp_path, model, tokenizer)
    options = {"epochs": 1, "batch_size": 6, "log_every": 1, "learning_rate": 1e-4, "warmup_steps": 0}
    options |= {} if stage == "reward" else {"samples": 2, "max_new_tokens": 2, "ptx_conversations": 1}
    curves = []
    for size in (None, 2):
        output, _ = run_stage(tmp_path, stage, tmp_path / str(size), {stage: options | {"micro_batch": size}})
        with (output / "curves.csv").open() as file:
            curves.append(
                [{k: float(v) for k, v in row.items() if v and "accuracy" not in k} for row in csv.DictReader(file)]
            )
    for one, other in zip(*curves, strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-4)
    with pytest.raises(ValueError, match="micro_batch must be at least 1, not 0"):
        run_stage(tmp_path, stage, tmp_path / "none", {stage: options | {"micro_batch": 0}})


def test_baselines_find_what_they_can_see() -> None:
    train = [([n % 7] * (1 + n % 10), 1 if n % 10 >= 5 else -1) for n in range(200)]
    assert length_accuracy(train, train) == 1.0
    words = [([n % 5, 9], 1 if n % 5 < 2 else -1) for n in range(200)]
    assert bag_of_words_accuracy(words, words, 10) == 1.0
    assert length_accuracy(words, words) == pytest.approx(0.6)
