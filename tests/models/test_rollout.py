import random

import pytest
import torch

from models.rollout import Engine, Request, generate, sequence_logprobs
from models.transformer import Transformer

STOP = 2


def prompts(n: int) -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(6, 300) for _ in range(rng.randrange(1, 12))] for _ in range(n)]


def test_text_depends_on_the_request_alone_not_on_its_batch_mates(model: Transformer) -> None:
    asked = prompts(40)
    seeds = list(range(40))
    forth = generate(model, asked, stop_id=STOP, max_new_tokens=20, seeds=seeds, width=8)
    back = generate(model, asked[::-1], stop_id=STOP, max_new_tokens=20, seeds=seeds[::-1], width=8)[::-1]
    assert forth == back
    alone = generate(model, asked[17:18], stop_id=STOP, max_new_tokens=20, seeds=[17], width=8)
    assert alone[0] == forth[17]


def test_sampled_log_probabilities_equal_the_training_code(model: Transformer) -> None:
    """Bug of others: logits of the sampler and of the trainer differ (left padding, positions, temperature)."""
    asked = prompts(20)
    for temperature in (1.0, 0.7):
        answers = generate(
            model, asked, stop_id=STOP, max_new_tokens=16, seeds=list(range(20)), temperature=temperature, width=6
        )
        again = sequence_logprobs(model, asked, [a.ids for a in answers], temperature=temperature, tokens_per_batch=64)
        for answer, scored in zip(answers, again, strict=True):
            assert answer.logprobs == pytest.approx(scored, abs=1e-5)


def test_the_stop_token_is_kept_and_ends_the_answer(model: Transformer) -> None:
    answers = generate(model, prompts(60), stop_id=STOP, max_new_tokens=30, seeds=list(range(60)), width=16)
    ended = [a for a in answers if a.finish_reason == "stop"]
    assert all(a.ids[-1] == STOP and STOP not in a.ids[:-1] for a in ended)
    assert all(len(a.ids) <= 30 and STOP not in a.ids for a in answers if a.finish_reason == "length")


def test_an_answer_ends_where_the_context_ends(model: Transformer) -> None:
    [answer] = generate(model, [[9] * 40], stop_id=299, max_new_tokens=100, seeds=[0], width=2)
    assert answer.finish_reason in ("length", "stop")
    assert 40 + len(answer.ids) <= 48


def test_a_prompt_that_does_not_fit_is_refused(model: Transformer) -> None:
    engine = Engine(model, stop_id=STOP, width=2)
    with pytest.raises(ValueError, match="48 tokens; 1 to 47 fit"):
        engine.submit(Request("a", [5] * 48, 4))
    with pytest.raises(ValueError, match="0 tokens"):
        engine.submit(Request("a", [], 4))


def test_sampling_follows_the_distribution(model: Transformer) -> None:
    """Frequencies of the first token over 4,000 seeds against its probability from the training code."""
    n = 4000
    answers = generate(model, [[7, 8, 9]] * n, stop_id=STOP, max_new_tokens=1, seeds=list(range(n)), width=64)
    top = max({a.ids[0] for a in answers}, key=lambda t: sum(a.ids[0] == t for a in answers))
    [[logp]] = sequence_logprobs(model, [[7, 8, 9]], [[top]])
    share = sum(a.ids[0] == top for a in answers) / n
    p = float(torch.tensor(logp).exp())
    assert abs(share - p) < 4 * (p * (1 - p) / n) ** 0.5


def test_top_k_and_top_p_keep_a_renormalised_set(model: Transformer) -> None:
    n = 300
    two = generate(model, [[7, 8]] * n, stop_id=STOP, max_new_tokens=1, seeds=list(range(n)), top_k=2, width=32)
    assert len({a.ids[0] for a in two}) == 2
    mass = {a.ids[0]: a.logprobs[0] for a in two}
    assert sum(float(torch.tensor(v).exp()) for v in mass.values()) == pytest.approx(1.0, abs=1e-5)
    greedy = generate(model, [[7, 8]], stop_id=STOP, max_new_tokens=5, seeds=[0], temperature=0.0, width=4)
    nucleus = generate(model, [[7, 8]], stop_id=STOP, max_new_tokens=5, seeds=[9], top_p=1e-6, width=4)
    assert greedy[0].ids == nucleus[0].ids


def test_a_cancelled_request_leaves_its_slot(model: Transformer) -> None:
    engine = Engine(model, stop_id=STOP, width=1)
    engine.submit(Request("a", [7], 30))
    engine.submit(Request("b", [8], 2))
    engine.step()
    engine.cancel("a")
    seen = []
    while engine.busy:
        seen += [t.request_id for t in engine.step()]
    assert set(seen) == {"b"}
