"""Both decoders against the trunk's own forward pass, for what the families add, and against each other."""

import dataclasses
import random

import numpy as np
import pytest
import torch

from models.config import ModelConfig
from models.cpu_decoder import CHUNK, CpuDecoder, span_of
from models.device_decoder import DeviceDecoder
from models.products import PRODUCTS, Precision
from models.rollout import Answer, Engine, Request, Token, generate, sequence_logprobs
from models.transformer import Transformer

PLAIN = ModelConfig(48, 3, 4, 2, 64, 96, vocab_size=300)
VARIANTS = {
    "plain": {},
    "untied": {"tie_word_embeddings": False},
    "one-query-a-key": {"num_key_value_heads": 4},
    "biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "qk-norm": {"qk_norm": True, "head_dim": 24},
    "post-norms-partial-interleaved": {"post_norms": True, "partial_rotary_factor": 0.5, "interleaved_rope": True},
    "partial": {"partial_rotary_factor": 0.5, "head_dim": 16},
    "window": {"sliding_window": 9, "sliding_layers": (0, 2)},
    "unrotated": {"unrotated_layers": (1,)},
}


def made(config: ModelConfig) -> Transformer:
    """Weights far from their start: norms and biases differ from 1 and 0."""
    torch.set_num_threads(1)
    model = Transformer(config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.15 if parameter.dim() > 1 else 0.3, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.8)
    return model.eval()


def requests(count: int, longest: int, new: int, seed: int = 1) -> list[Request]:
    rng = random.Random(seed)
    settings = [(1.0, 1.0, 0), (0.7, 1.0, 0), (0.0, 1.0, 0), (1.3, 0.8, 0), (1.0, 0.9, 20)]
    asked = []
    for i in range(count):
        prompt = [rng.randrange(300) for _ in range(rng.randrange(1, longest))]
        asked.append(Request(str(i), prompt, rng.randrange(1, new), *rng.choice(settings), seed=i))
    return asked


def answers(engine: Engine, asked: list[Request]) -> dict[str, Answer]:
    for request in asked:
        engine.submit(request)
    tokens: dict[str, list[Token]] = {}
    while engine.busy:
        for token in engine.step():
            tokens.setdefault(token.request_id, []).append(token)
    return {
        k: Answer([t.id for t in ts], [t.logprob for t in ts], ts[-1].finish_reason or "") for k, ts in tokens.items()
    }


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_log_probabilities_are_the_trunks(variant: str) -> None:
    model = made(dataclasses.replace(PLAIN, **VARIANTS[variant]))
    asked = requests(24, 40, 30)
    done = answers(Engine(model, stop_id=2, width=18), asked)
    on_device = Engine(model, stop_id=2, width=18)
    on_device.decoder = DeviceDecoder(model, 18, on_device.context)
    again = answers(on_device, asked)
    for request in asked:
        answer = done[request.id]
        if request.temperature and not request.top_k and request.top_p == 1:
            scored = sequence_logprobs(model, [request.prompt], [answer.ids], temperature=request.temperature)[0]
            assert answer.logprobs == pytest.approx(scored, abs=1e-5)
        assert again[request.id].ids == answer.ids
        assert again[request.id].logprobs == pytest.approx(answer.logprobs, abs=1e-5)


@pytest.mark.parametrize(("width", "precision"), [(1, "fp32"), (5, "fp32"), (40, "fp32"), (40, "int8")])
def test_a_request_gives_the_same_bits_under_any_schedule(width: int, precision: Precision) -> None:
    """Prompts enter at random moments, others are cancelled, and all share a step with some of thousands of tokens."""
    model = made(dataclasses.replace(PLAIN, num_hidden_layers=2, max_position_embeddings=700))
    asked = requests(12, 80, 30) + requests(3, 2 * CHUNK, 100, seed=2)
    asked = [dataclasses.replace(request, id=str(i)) for i, request in enumerate(asked)]
    alone = [
        answers(Engine(model, stop_id=2, width=width, precision=precision), [request])[request.id] for request in asked
    ]
    for seed in range(2):
        rng = random.Random(seed)
        engine, waiting = Engine(model, stop_id=2, width=width, precision=precision), rng.sample(asked, len(asked))
        mates = [f"mate-{i}" for i in range(2 * width)]
        for name in mates:
            engine.submit(Request(name, [rng.randrange(300)] * rng.randrange(1, 300), 40, seed=rng.randrange(99)))
        tokens: dict[str, list[Token]] = {}
        while engine.busy or waiting:
            while waiting and rng.random() < 0.3:
                engine.submit(waiting.pop())
            if mates and rng.random() < 0.3:
                engine.cancel(mates.pop(rng.randrange(len(mates))))
            for token in engine.step():
                tokens.setdefault(token.request_id, []).append(token)
        for request, expected in zip(asked, alone, strict=True):
            assert [t.id for t in tokens[request.id]] == expected.ids
            assert [t.logprob for t in tokens[request.id]] == expected.logprobs


def test_rows_that_idle_are_not_computed() -> None:
    """The last requests to end are brought together in fewer rows, where this machine gives these the same bits."""
    decoder = CpuDecoder(made(PLAIN), 64, 96, 8)
    computed: list[int] = []
    engine = Engine(made(PLAIN), stop_id=2, width=64)
    step = decoder.step
    decoder.step = lambda height: computed.append(height) or step(height)
    engine.decoder = decoder
    answers(engine, requests(64, 20, 40))
    assert computed == sorted(computed, reverse=True)
    assert set(computed) <= set(decoder.heights) and decoder.heights[-1] == 64
    assert computed[-1] == decoder.heights[0]


def test_spans_are_few_and_hold_every_key() -> None:
    assert [span_of(n, 96) for n in (1, 64, 65, 96)] == [64, 64, 96, 96]
    assert [span_of(n, 1024) for n in (200, 256, 257, 1000)] == [224, 256, 320, 1024]


def test_a_bf16_model_is_decoded_in_fp32_from_its_own_weights() -> None:
    halves = made(PLAIN).bfloat16()
    whole = made(PLAIN)
    with torch.no_grad():
        for a, b in zip(whole.parameters(), halves.parameters(), strict=True):
            a.copy_(b.float())
    asked = [dataclasses.replace(request, temperature=1.0, top_p=1.0, top_k=0) for request in requests(8, 20, 30)]
    done = answers(Engine(halves, stop_id=2, width=4), asked)
    scored = sequence_logprobs(whole, [r.prompt for r in asked], [done[r.id].ids for r in asked])
    for request, expected in zip(asked, scored, strict=True):
        assert done[request.id].logprobs == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_products_of_a_lower_precision_are_those_of_rounded_numbers(precision: Precision) -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((5, 70)).astype(np.float32), rng.standard_normal((600, 70)).astype(np.float32)
    bias = rng.standard_normal(600).astype(np.float32)
    if precision == "int8":
        x_scale, w_scale = (np.abs(m).max(1, keepdims=True) / 127 for m in (x, weight))
        expected = (np.rint(x / x_scale) * x_scale) @ (np.rint(weight / w_scale) * w_scale).T
    else:
        x_half, w_half = (torch.from_numpy(m).bfloat16().double().numpy() for m in (x, weight))
        expected = torch.from_numpy(x_half @ w_half.T).bfloat16().double().numpy()
    got = PRODUCTS[precision](torch.from_numpy(weight), torch.from_numpy(bias), 5)(x)
    assert got == pytest.approx(expected + bias, abs=1e-3 if precision == "int8" else 0.07)
    assert np.abs(got - bias - x @ weight.T).max() > 1e-3, "nothing was rounded"


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_log_probabilities_of_a_lower_precision_are_of_what_was_sampled(precision: Precision) -> None:
    """Three tokens may come first and three second: the probabilities of the nine answers add up to 1 and are their
    frequencies."""
    model = made(PLAIN)
    n = 600
    asked = [[7, 8, 9]] * n
    settings = {"stop_id": 299, "max_new_tokens": 2, "seeds": range(n), "top_k": 3, "width": 32}
    done = generate(model, asked, precision=precision, **settings)
    seen: dict[tuple[int, ...], list[float]] = {}
    for answer in done:
        seen.setdefault(tuple(answer.ids), []).append(sum(answer.logprobs))
    assert sum(np.exp(values[0]) for values in seen.values()) == pytest.approx(1.0, abs=1e-3)
    for values in seen.values():
        p = np.exp(values[0])
        assert values == [values[0]] * len(values)
        assert abs(len(values) / n - p) < 4 * (p * (1 - p) / n) ** 0.5 + 1 / n


def test_a_precision_that_is_not_offered_is_refused() -> None:
    with pytest.raises(ValueError, match="precision must be one of fp32, bf16, int8, not fp8"):
        Engine(made(PLAIN), stop_id=2, precision="fp8")  # type: ignore[arg-type]
