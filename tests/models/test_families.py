"""Tiny random models of every family, against transformers: both directions, one forward pass and cached decoding."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from models.checkpoint import load_model, read_weights, save_model
from models.config import ModelConfig
from models.huggingface import read_config, tensor_names, write_config
from models.layout import dense_layout, packed_layout
from models.rollout import generate
from models.tokenizer import Tokenizer
from models.transformer import Transformer

TINY = {
    "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 96, "vocab_size": 300, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 10000.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24, "rope_theta": 10000.0}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama3-rope": {"model_type": "llama", "rope_parameters": LLAMA3, "head_dim": 32},
    "llama-linear-rope": {
        "model_type": "llama", "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
    },
    "mistral": {"model_type": "mistral", "head_dim": 16, "sliding_window": None},
    "mistral-window": {"model_type": "mistral", "head_dim": 16, "sliding_window": 9},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2-window": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen2-yarn": {"model_type": "qwen2", "rope_parameters": YARN},
    "qwen3": {"model_type": "qwen3", "head_dim": 24},
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 0, 1]},
    "internlm3": {
        "model_type": "internlm3", "head_dim": 16,
        "rope_parameters": {"rope_type": "dynamic", "factor": 6.0, "rope_theta": 50000.0},
    },
    "internlm3-biases": {"model_type": "internlm3", "head_dim": 16, "qkv_bias": True, "bias": True},
    "glm": {"model_type": "glm", "head_dim": 16},
    "glm4": {"model_type": "glm4", "head_dim": 16},
    "glm4-three-quarters": {
        "model_type": "glm4", "head_dim": 16, "attention_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
    },
}  # fmt: skip
TOKENS = [
    7,
    250,
    31,
    4,
    99,
    180,
    5,
    5,
    61,
    222,
    9,
    140,
    33,
    18,
    270,
    3,
    91,
    17,
    44,
    201,
    12,
    77,
    160,
    8,
    29,
    111,
    240,
    6,
]


def peer(case: str) -> Any:
    """transformers' model with weights that are far from their start: norms and biases differ from 1 and 0."""
    values = TINY | CASES[case]
    config = AutoConfig.for_model(values["model_type"], **{k: v for k, v in values.items() if k != "model_type"})
    torch.manual_seed(3)
    made = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.15 if parameter.dim() > 1 else 0.3))
            if parameter.dim() == 1:
                parameter.add_(0.8)
    made.tie_weights()
    return made


@pytest.fixture(scope="module", params=list(CASES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    """A case's name, transformers' model and the folder it was saved in."""
    torch.set_num_threads(1)
    model = peer(request.param)
    path = tmp_path_factory.mktemp("peer") / request.param
    model.save_pretrained(path)
    return request.param, model, path


@torch.inference_mode()
def logits(model: Transformer, tokens: list[int]) -> torch.Tensor:
    return model.logits(model(torch.tensor(tokens), dense_layout(1, len(tokens))))


def test_a_folder_of_theirs_gives_their_logits(folder: tuple[str, Any, Path]) -> None:
    _, theirs, path = folder
    ours = load_model(path)
    with torch.inference_mode():
        expected = theirs(torch.tensor([TOKENS])).logits[0]
    assert expected.std() > 0.1
    assert (logits(ours, TOKENS) - expected).abs().max() < 1e-4
    with torch.inference_mode():
        pair = torch.tensor(TOKENS + TOKENS[:5])
        packed = ours.logits(ours(pair, packed_layout([len(TOKENS), 5])))
    assert (packed[: len(TOKENS)] - expected).abs().max() < 1e-4
    assert (packed[len(TOKENS) :] - expected[:5]).abs().max() < 1e-4


def test_a_folder_of_ours_gives_our_logits_in_theirs(
    folder: tuple[str, Any, Path], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    name, theirs, path = folder
    ours = load_model(path)
    save_model(ours, tmp_path / "model", tokenizer)
    written = json.loads((tmp_path / "model/config.json").read_text())
    assert written["model_type"] == CASES[name]["model_type"]
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info.values()), info
    assert type(again) is type(theirs)
    with torch.inference_mode():
        got = again.eval()(torch.tensor([TOKENS])).logits[0]
    assert (logits(ours, TOKENS) - got).abs().max() < 1e-4
    before, after = read_weights(path), read_weights(tmp_path / "model")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_cached_decoding_is_generate(folder: tuple[str, Any, Path]) -> None:
    """Greedy, longer than the sliding windows, with prompts of different lengths beside each other."""
    _, theirs, path = folder
    ours = load_model(path)
    prompts = [TOKENS, TOKENS[:3], TOKENS[5:20]]
    answers = generate(ours, prompts, stop_id=2, max_new_tokens=24, seeds=[0, 1, 2], temperature=0.0, width=4)
    for prompt, answer in zip(prompts, answers, strict=True):
        out = theirs.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=24,
            do_sample=False,
        )  # fmt: skip
        assert answer.ids == out[0, len(prompt) :].tolist()


def test_the_count_of_parameters_is_that_of_the_tensors(folder: tuple[str, Any, Path]) -> None:
    _, theirs, path = folder
    config = read_config(json.loads((path / "config.json").read_text()))
    assert config.parameter_count() == sum(p.numel() for p in theirs.parameters())
    assert sum(rows > 0 for parts in tensor_names(config).values() for _, rows in parts) == len(read_weights(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba'; known are llama"),
        (
            {"architectures": ["LlamaForTokenClassification"]},
            "architectures is .*; LlamaForCausalLM is what this needs",
        ),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_type is 'longrope'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type llama3 needs low_freq_factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters differs by layer"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; llama turns whole heads"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is set"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_key_value_heads": 3}, "num_attention_heads must be a multiple of num_key_value_heads"),
    ],
)
def test_what_we_would_compute_wrongly_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    content = write_config(ModelConfig()) | change
    with pytest.raises(ValueError, match=message):
        read_config(content)


def test_a_family_that_cannot_say_it_is_not_written() -> None:
    with pytest.raises(ValueError, match="family mistral cannot say qkv_bias = True"):
        write_config(ModelConfig(family="mistral", qkv_bias=True))


def test_a_head_other_than_the_embedding_is_no_tied_model(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_model(Transformer(ModelConfig(16, 1, 2, 2, 32, 64, vocab_size=300)), tmp_path / "m", tokenizer)
    tensors = read_weights(tmp_path / "m")
    twin = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(twin, tmp_path / "m/model.safetensors")
    load_model(tmp_path / "m")
    save_file(twin | {"lm_head.weight": twin["lm_head.weight"] + 1}, tmp_path / "m/model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight differs"):
        load_model(tmp_path / "m")
