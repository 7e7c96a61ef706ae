"""Training from a base by folder: a tiny Qwen2 made by transformers, with a tokenizer and a chat template of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from small_stages import nothing_written

from flows import tokenize
from models import ppo, pretrain, reward, sft
from models.base import base_hash
from models.checkpoint import load_model
from models.job import Job
from models.tokenizer import Tokenizer

WORDS = ["who", "are", "you", "I", "am", "a", "cat", "dog", "what", "do", "eat", "fish", "bread", "and", "milk"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMALL: dict[str, dict[str, Any]] = {
    "tokenize": {"vocab_size": 999, "max_conversation": 60, "max_prompt": 30, "training_characters": 1000},
    "sft": {"steps": 4, "batch_size": 4},
    "reward": {"epochs": 1, "batch_size": 2},
    "ppo": {"iterations": 2, "batch_size": 4, "max_new_tokens": 6, "ptx_batch_size": 1, "ptx_conversations": 2},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with curated text and a base in bases/tiny."""
    root = tmp_path_factory.mktemp("workspace")
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        [" ".join(WORDS)] * 3,
        tokenizers.trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet),
    )
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token="<|endoftext|>"
    )
    wrapped.chat_template = TEMPLATE
    wrapped.save_pretrained(root / "bases/tiny")
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=len(wrapped), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.Qwen2ForCausalLM(config).save_pretrained(root / "bases/tiny")

    def rows(count: int, make: Callable[[int], dict[str, Any]]) -> str:
        return "".join(json.dumps(make(i)) + "\n" for i in range(count))

    def chat(i: int) -> list[dict[str, str]]:
        return [
            {"role": "user", "content": f"what do you {WORDS[i % 15]}"},
            {"role": "assistant", "content": f"I eat {WORDS[-i % 15]}"},
        ]

    curated, snapshot = root / "artifacts/curate", root / "artifacts/snapshot"
    for folder in (curated, snapshot, root / "artifacts/validate"):
        folder.mkdir(parents=True)
    for split in ("train", "heldout"):
        (curated / f"pretrain.{split}.jsonl").write_text(rows(40, lambda i: {"text": " ".join(WORDS)}))
        (curated / f"sft.{split}.jsonl").write_text(rows(12, lambda i: {"messages": chat(i)}))
    (curated / "prompts.train.jsonl").write_text(rows(12, lambda i: {"messages": chat(i)[:1]}))
    tokenizer = Tokenizer.load(root / "bases/tiny")
    for split in ("train", "heldout"):
        text = rows(
            8,
            lambda i: {
                "kind": "thumb",
                "prompt_ids": tokenizer.encode_chat(chat(i // 2)[:1]),
                "response_ids": [*tokenizer.encode(WORDS[i]), tokenizer.stop_id],
                "value": (-1) ** i,
            },
        )
        (snapshot / f"opinions.{split}.jsonl").write_text(text)
    nothing_written(root)
    return root


def stage(root: Path, name: str, body: Any, deps: tuple[str, ...]) -> dict[str, Any]:
    """Run one stage's body in this process, into artifacts/<name>."""
    base = {"base": "bases/tiny", "base_hash": base_hash(root / "bases/tiny")}
    params = {"seed": 1, "model": base, "pretrain": {}, "lora": {}, **SMALL}
    output = root / "artifacts" / name
    output.mkdir(parents=True, exist_ok=True)
    return body(Job(name, root, deps, output, root / "work" / name, params))


def test_the_wheel_turns_from_a_base_of_another_family(root: Path) -> None:
    stage(root, "tokenize", tokenize.run, ("artifacts/curate", "artifacts/validate"))
    figures = stage(root, "pretrain", pretrain.run, ("artifacts/tokenize",))
    assert figures["parameters"] == sum(p.numel() for p in load_model(root / "bases/tiny").parameters())
    stage(root, "sft", sft.run, ("artifacts/pretrain/model", "artifacts/tokenize", "artifacts/written"))
    stage(root, "reward", reward.run, ("artifacts/sft/model", "artifacts/snapshot"))
    read = ("artifacts/sft/model", "artifacts/reward/model", "artifacts/tokenize", "artifacts/snapshot")
    stage(root, "ppo", ppo.run, read)

    tokens = torch.randint(0, 250, (1, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        given = transformers.AutoModelForCausalLM.from_pretrained(root / "bases/tiny")(tokens).logits
        taken = transformers.AutoModelForCausalLM.from_pretrained(root / "artifacts/pretrain/model")(tokens).logits
        tuned = transformers.AutoModelForCausalLM.from_pretrained(root / "artifacts/ppo/model")(tokens).logits
    assert torch.equal(given, taken)
    assert not torch.equal(given, tuned)
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (root / "artifacts/ppo/model" / name).read_bytes() == (root / "bases/tiny" / name).read_bytes()
    assert json.loads((root / "artifacts/ppo/model/config.json").read_text())["model_type"] == "qwen2"


def test_a_base_that_changed_is_refused(root: Path, tmp_path: Path) -> None:
    params = {"seed": 1, "model": {"base": "bases/tiny", "base_hash": "0" * 16}, "tokenize": SMALL["tokenize"]}
    job = Job("tokenize", root, ("artifacts/curate", "artifacts/validate"), tmp_path, tmp_path, params)
    with pytest.raises(ValueError, match=r"model.base_hash is 0000000000000000, but bases/tiny is .*config --write"):
        tokenize.run(job)


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"model.base: .* holds no \*.safetensors"):
        base_hash(tmp_path)
