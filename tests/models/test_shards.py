"""Weights in several files and several dtypes, both ways, and what is said when one is missing or torn."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from models.checkpoint import load_model, model_hash, read_weights, save_model
from models.layout import dense_layout
from models.tokenizer import Tokenizer
from models.transformer import Transformer

INDEX = "model.safetensors.index.json"
IDS = torch.tensor([5, 6, 7, 99, 200])


@torch.inference_mode()
def logits(model: Transformer) -> torch.Tensor:
    return model.logits(model(IDS, dense_layout(1, len(IDS))))


@pytest.fixture
def sharded(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    save_model(model, tmp_path / "sharded", tokenizer, max_shard_size=60_000)
    return tmp_path / "sharded"


def test_shards_hold_the_same_weights_and_the_index_names_each_once(
    model: Transformer, tokenizer: Tokenizer, sharded: Path, tmp_path: Path
) -> None:
    save_model(model, tmp_path / "whole", tokenizer)
    files = sorted(sharded.glob("*.safetensors"))
    assert [f.name for f in files] == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert len(files) > 2
    index = json.loads((sharded / INDEX).read_text())
    whole = load_file(tmp_path / "whole/model.safetensors")
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in whole.values())
    assert index["weight_map"].keys() == whole.keys()
    for file in files:
        held = load_file(file)
        assert {name for name, at in index["weight_map"].items() if at == file.name} == held.keys()
        assert len(held) == 1 or sum(t.numel() * 4 for t in held.values()) <= 60_000
        assert all(torch.equal(tensor, whole[name]) for name, tensor in held.items())
    assert torch.equal(logits(load_model(sharded)), logits(model))


def test_transformers_reads_our_shards_and_we_theirs(sharded: Path, model: Transformer, tmp_path: Path) -> None:
    theirs, info = AutoModelForCausalLM.from_pretrained(sharded, output_loading_info=True)
    assert not any(info.values()), info
    with torch.inference_mode():
        assert (theirs(IDS[None]).logits[0] - logits(model)).abs().max() < 1e-4
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    assert (tmp_path / "theirs" / INDEX).exists()
    assert torch.equal(logits(load_model(tmp_path / "theirs")), logits(model))


def test_a_folder_loads_as_tokenizer_and_generation_config_too(sharded: Path, tokenizer: Tokenizer) -> None:
    chat = [{"role": "user", "content": "hello"}]
    theirs = AutoTokenizer.from_pretrained(sharded)
    text = theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == "<|user|>hello<|end|><|assistant|>"
    assert theirs.convert_tokens_to_ids("<|end|>") == theirs.eos_token_id == tokenizer.stop_id
    generation = AutoModelForCausalLM.from_pretrained(sharded).generation_config
    assert (generation.eos_token_id, generation.max_new_tokens) == (tokenizer.stop_id, 48)


def test_the_hash_of_shards_is_that_of_their_digests(sharded: Path) -> None:
    digests = [hashlib.sha256(f.read_bytes()).digest() for f in sorted(sharded.glob("*.safetensors"))]
    assert model_hash(sharded) == hashlib.sha256(b"".join(digests)).hexdigest()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_of_every_dtype_are_read_as_fp32_or_as_asked(
    dtype: torch.dtype, model: Transformer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    save_model(model, tmp_path / "ours", tokenizer, dtype=dtype)
    assert {t.dtype for t in read_weights(tmp_path / "ours").values()} == {dtype}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert theirs.dtype == dtype
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        again = load_model(tmp_path / folder)
        for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
            assert b.dtype == torch.float32
            assert torch.equal(a.to(dtype).float(), b), name
    half = load_model(tmp_path / "ours", dtype=torch.bfloat16)
    assert logits(half).dtype == torch.bfloat16
    assert (logits(half).float() - logits(model)).abs().mean() < 0.05 * logits(model).std()


def test_what_is_missing_is_named_and_nothing_is_half_written(sharded: Path, model: Transformer) -> None:
    second = sharded / sorted(json.loads((sharded / INDEX).read_text())["weight_map"].values())[-1]
    kept = second.read_bytes()
    save_file({"other": torch.zeros(1)}, second)
    with pytest.raises(ValueError, match=rf"{second.name} lacks .*, which {INDEX} says it holds"):
        load_model(sharded)
    second.write_bytes(kept[: len(kept) // 2])
    with pytest.raises(ValueError, match=rf"{second.name} is damaged"):
        load_model(sharded)
    second.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{second.name} is missing"):
        load_model(sharded)
    (sharded / INDEX).write_text('{"weight_map": {"a": "../../etc/passwd"}}')
    with pytest.raises(ValueError, match=rf"{INDEX} is no index of shards: .*files of this folder"):
        load_model(sharded)
    (sharded / INDEX).unlink()
    (sharded / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: pickled weights are not read"):
        load_model(sharded)


def test_a_missing_tensor_is_named(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_model(model, tmp_path / "m", tokenizer)
    tensors = load_file(tmp_path / "m/model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "m/model.safetensors")
    with pytest.raises(ValueError, match=r"missing \['model\.layers\.1\.mlp\.up_proj\.weight'\]"):
        load_model(tmp_path / "m")


def test_quantised_integers_are_no_weights(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_model(model, tmp_path / "m", tokenizer)
    tensors = load_file(tmp_path / "m/model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, tmp_path / "m/model.safetensors")
    with pytest.raises(ValueError, match=r"model\.norm\.weight is stored as torch\.int8"):
        load_model(tmp_path / "m")


def test_a_limit_below_one_byte_is_refused_before_the_old_folder_goes(
    model: Transformer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    save_model(model, tmp_path / "m", tokenizer)
    with pytest.raises(ValueError, match="max_shard_size must be at least 1 byte, not 0"):
        save_model(model, tmp_path / "m", tokenizer, max_shard_size=0)
    assert torch.equal(logits(load_model(tmp_path / "m")), logits(model))


def test_a_model_of_theirs_comes_back_as_their_family_with_their_files(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Read, save, read again by transformers: equal weights, and the generation settings of the folder are kept."""
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "a")
    tokenizer.save(tmp_path / "a")
    template = (tmp_path / "a/chat_template.jinja").read_text() + " "  # no longer ours
    (tmp_path / "a/chat_template.jinja").write_text(template)
    settings = {"temperature": 0.6, "top_p": 0.9, "do_sample": True, "eos_token_id": [tokenizer.stop_id, 0]}
    (tmp_path / "a/generation_config.json").write_text(json.dumps(settings))
    save_model(load_model(tmp_path / "a"), tmp_path / "b", Tokenizer.load(tmp_path / "a"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b").generation_config
    assert (again.temperature, again.top_p, again.eos_token_id) == (0.6, 0.9, [tokenizer.stop_id, 0])
    assert model_hash(tmp_path / "a") == model_hash(tmp_path / "b")
