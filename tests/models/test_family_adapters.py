"""Adapters and reward models of families that differ from Llama, against peft and transformers on the same folder."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from test_families import TOKENS, logits, peer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from models.checkpoint import load_model, save_model
from models.lora import LoraOptions, attach, load_adapter, lora_layers, save_adapter
from models.reward import RewardModel, lay_out, load_reward_model, save_reward_model
from models.tokenizer import Tokenizer


@pytest.mark.parametrize("case", ["glm4", "qwen2", "qwen3", "mistral-window", "internlm3-biases"])
def test_an_adapter_of_ours_is_pefts_and_a_saved_model_has_it_merged(
    case: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    peer(case).save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base")
    base = logits(model, TOKENS)
    attach(model, LoraOptions(rank=3, alpha=6.0), torch.Generator().manual_seed(0))
    with torch.no_grad():
        for layer in lora_layers(model):
            for b in layer.b.values():
                b.normal_(0, 0.1, generator=torch.Generator().manual_seed(4))
    expected = logits(model, TOKENS)
    assert (expected - base).abs().max() > 0.1
    save_adapter(model, tmp_path / "adapter", "base")
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    ).eval()
    save_model(model, tmp_path / "merged", tokenizer)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    for other in (theirs, merged):
        with torch.inference_mode():
            assert (other(torch.tensor([TOKENS])).logits[0] - expected).abs().max() < 1e-4
    again = load_model(tmp_path / "base")
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again, TOKENS), expected)


def test_a_folder_of_ours_is_a_base_for_peft_without_edits(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    peer("qwen3").save_pretrained(tmp_path / "theirs")
    save_model(load_model(tmp_path / "theirs"), tmp_path / "ours", tokenizer)
    made = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "ours"),
        LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    ).eval()
    made.save_pretrained(tmp_path / "adapter")
    ours = load_model(tmp_path / "ours")
    load_adapter(ours, tmp_path / "adapter")
    with torch.inference_mode():
        assert (made(torch.tensor([TOKENS])).logits[0] - logits(ours, TOKENS)).abs().max() < 1e-4


@pytest.mark.parametrize("case", ["llama", "mistral-window", "qwen2", "qwen3", "smollm3", "glm4"])
def test_a_reward_model_is_transformers_sequence_classifier(case: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    peer(case).save_pretrained(tmp_path / "base")
    judge = RewardModel(load_model(tmp_path / "base")).initialize(torch.Generator().manual_seed(2)).eval()
    with torch.no_grad():
        judge.head.bias.fill_(0.5)
    save_reward_model(judge, tmp_path / "reward", tokenizer, "# card")
    theirs, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward", output_loading_info=True)
    assert not any(info.values()), info
    with torch.inference_mode():
        expected = theirs.eval()(torch.tensor([TOKENS])).logits[0, 0] + 0.5
        [got] = judge.scores(*lay_out([TOKENS], "cpu"))
        [again] = load_reward_model(tmp_path / "reward").scores(*lay_out([TOKENS], "cpu"))
    assert (got - expected).abs() < 1e-4
    assert torch.equal(got, again)
