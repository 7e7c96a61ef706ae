import json

import pytest
import torch

from models.checkpoint import load_model, model_hash, save_model
from models.layout import dense_layout
from models.tokenizer import Tokenizer
from models.training import Checkpoints, stream
from models.transformer import Transformer


def test_a_saved_model_is_the_same_and_its_bytes_too(model: Transformer, tokenizer: Tokenizer, tmp_path) -> None:
    save_model(model, tmp_path / "a", tokenizer)
    save_model(model, tmp_path / "b", tokenizer)
    again = load_model(tmp_path / "a")
    ids = torch.tensor([5, 6, 7])
    assert torch.equal(again(ids, dense_layout(1, 3)), model(ids, dense_layout(1, 3)))
    assert model_hash(tmp_path / "a") == model_hash(tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_a_folder_has_what_hugging_face_expects(model: Transformer, tokenizer: Tokenizer, tmp_path) -> None:
    save_model(model, tmp_path / "m", tokenizer, "# A card")
    config = json.loads((tmp_path / "m/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["eos_token_id"] == tokenizer.stop_id
    assert {p.name for p in (tmp_path / "m").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "README.md",
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip


def test_damage_is_named(model: Transformer, tokenizer: Tokenizer, tmp_path) -> None:
    save_model(model, tmp_path / "m", tokenizer)
    config = tmp_path / "m/config.json"
    text = config.read_text()
    config.write_text(text.replace('"LlamaForCausalLM"', '"MambaForCausalLM"'))
    with pytest.raises(ValueError, match="MambaForCausalLM"):
        load_model(tmp_path / "m")
    config.write_text(text.replace('"intermediate_size": 96', '"intermediate_size": 80'))
    with pytest.raises(ValueError, match=r"mlp.gate_proj.weight has shape \[96, 64\], config.json asks for \[80, 64\]"):
        load_model(tmp_path / "m")
    config.write_text(text)
    weights = tmp_path / "m/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        load_model(tmp_path / "m")
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="dvc pull"):
        load_model(tmp_path / "m")


def test_a_torn_checkpoint_gives_way_to_the_one_before(tmp_path) -> None:
    kept = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        kept.save(step, {"x": torch.tensor(float(step))})
    files = sorted(tmp_path.glob("*.pt"))
    assert len(files) == 2
    files[-1].write_bytes(files[-1].read_bytes()[: files[-1].stat().st_size // 2])
    state = kept.load()
    assert state is not None
    assert (state["step"], state["x"].item()) == (2, 2.0)
    assert not files[-1].exists()


def test_no_checkpoint_is_none(tmp_path) -> None:
    assert Checkpoints(tmp_path / "new").load() is None


def test_streams_are_their_own() -> None:
    assert stream(1, "a", 2).random() == stream(1, "a", 2).random()
    draws = {stream(*key).random() for key in [(1, "a", 2), (1, "a", 3), (1, "b", 2), (2, "a", 2)]}
    assert len(draws) == 4
